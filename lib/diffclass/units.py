"""Pixel space [0,1] and model space [-1,1]: the only module that converts, and the checks that guard every entrance.

Attack budgets, smoothing noise and radii are stated in pixel units; networks and diffusion noise levels live in model
units. The map is z = 2x - 1, so every length doubles and every squared error quadruples on the way in.
"""

import math

import torch
from torch import Tensor

PIXELS_TO_MODEL = 2.0  # d z / d x


def to_model(x: Tensor) -> Tensor:
    """Images of model space.

    Formula     z = 2x - 1
    Shapes      x [...] in [0,1] -> [...] in [-1,1]; values outside (smoothing noise) are mapped by the same line
    """
    return PIXELS_TO_MODEL * x - 1


def to_pixel(z: Tensor) -> Tensor:
    """Images of pixel space, not clipped.

    Formula     x = (z + 1) / 2
    Shapes      z [...] -> [...]
    """
    return (z + 1) / PIXELS_TO_MODEL


def sigma_to_model(sigma_pixel):
    """A noise level (or any length) of pixel space, in model units: sigma = 2 sigma_pixel."""
    return PIXELS_TO_MODEL * sigma_pixel


def sigma_to_pixel(sigma):
    """A noise level (or any length) of model space, in pixel units: sigma_pixel = sigma / 2."""
    return sigma / PIXELS_TO_MODEL


def l2_of_linf(epsilon_linf: float, dimensions: int) -> float:
    """The largest L2 norm inside an L-inf ball: epsilon_linf * sqrt(D). Units: those of `epsilon_linf`."""
    return epsilon_linf * math.sqrt(dimensions)


def linf_of_l2(radius: float, dimensions: int) -> float:
    """The L-inf radius that an L2 radius guarantees: radius / sqrt(D). Units: those of `radius`."""
    return radius / math.sqrt(dimensions)


def _describe(x: Tensor) -> str:
    finite = x[torch.isfinite(x)] if x.is_floating_point() else x
    spread = (
        f"min {float(finite.min()):.3g} max {float(finite.max()):.3g} " if finite.numel() else ""
    )
    return f"{spread}of shape {list(x.shape)} and dtype {str(x.dtype).removeprefix('torch.')}"


def check_images(
    x, image_shape: tuple[int, int, int] | None = None, *, pixel_range: bool = True
) -> Tensor:
    """Return `x` if it is a batch of finite floating-point images, else raise one sentence that says what is wrong.

    Shapes      x [B,C,H,W]; `image_shape` is (C,H,W) or None for any
    Units       pixels in [0,1]; `pixel_range=False` admits any finite value (smoothing noise leaves [0,1] by design)
    Errors      TypeError for what is not a float tensor; ValueError for shape, NaN or range
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected images as a torch.Tensor, got {type(x).__name__}; pass torch.as_tensor(x)."
        )
    if not x.is_floating_point():
        hint = "divide by 255 first" if x.dtype == torch.uint8 else "convert with .float()"
        raise TypeError(f"expected floating-point images in [0,1], got {_describe(x)}; {hint}.")
    expected = "[B,C,H,W]" if image_shape is None else f"[B,{','.join(map(str, image_shape))}]"
    if x.ndim != 4 or (image_shape is not None and tuple(x.shape[1:]) != tuple(image_shape)):
        hint = (
            "add the batch axis with x[None]"
            if x.ndim == 3
            else "is this the world that the classifier was made for?"
        )
        raise ValueError(f"expected images of shape {expected}, got {_describe(x)}; {hint}")
    x, given = x.detach(), x
    if x.numel() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"expected finite images, got {bad} NaN or infinite values among {x.numel()}; "
            "an earlier step (a division, an attack, a corrupt file) made them."
        )
    if pixel_range and x.numel() and (float(x.min()) < -1e-6 or float(x.max()) > 1 + 1e-6):
        low = float(x.min())
        high = float(x.max())
        if high > 2:
            hint = "these look like [0,255]; divide by 255"
        elif low < 0 and low >= -1 - 1e-6 and high <= 1 + 1e-6:
            hint = "these look like model space [-1,1]; pass units.to_pixel(x)"
        else:
            hint = "clamp the perturbed image to [0,1]"
        raise ValueError(f"expected images in [0,1], got {_describe(x)}; {hint}.")
    return given


def check_labels(y: Tensor, images: int, num_classes: int) -> Tensor:
    """Return class labels [B] if there is one existing class for each image, else raise a ValueError."""
    if y.is_floating_point() or tuple(y.shape) != (images,):
        raise ValueError(
            f"expected one label for each of {images} images as integers, got shape {list(y.shape)} and "
            f"dtype {str(y.dtype).removeprefix('torch.')}."
        )
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise ValueError(
            f"expected labels between 0 and {num_classes - 1}, got {int(y.min())} to {int(y.max())}; is "
            "this the world that the classifier was made for?"
        )
    return y


def check_sigma(sigma, name: str = "sigma") -> Tensor:
    """Return `sigma` as a tensor if every level is finite and positive, else raise.

    Units       whatever space the caller names
    Errors      ValueError for a level <= 0, NaN or infinite
    """
    if not isinstance(sigma, Tensor):  # torch would make a Python number float32
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
    bad = sigma[~(torch.isfinite(sigma) & (sigma > 0))]
    if sigma.numel() == 0 or bad.numel():
        got = f"{float(bad.flatten()[0]):.3g}" if sigma.numel() else "nothing"
        raise ValueError(
            f"expected a finite noise level {name} > 0, got {got}; there is no loss at zero noise, "
            "so use a small level such as 0.01 instead."
        )
    return sigma


def check_budget(epsilon: float, norm: str, dimensions: int) -> float:
    """Return an attack budget in pixel units if it can be meant, else raise.

    Units       pixels in [0,1]; the largest possible budget is 1 (L-inf) or sqrt(D) (L2)
    Errors      ValueError for a negative or non-finite budget, or one larger than the pixel range
    """
    largest = {"linf": 1.0, "l2": math.sqrt(dimensions)}.get(norm)
    if largest is None:
        raise ValueError(f"expected norm 'linf' or 'l2', got {norm!r}.")
    if not math.isfinite(epsilon) or epsilon < 0:
        raise ValueError(f"expected an attack budget >= 0, got {epsilon}.")
    if epsilon > largest:
        raise ValueError(
            f"attack budget {epsilon:g} ({norm}) is larger than the pixel range allows ({largest:.3g}); "
            f"did you mean {epsilon:g}/255?"
        )
    return float(epsilon)


def chosen(value: str, allowed, what: str):
    """The entry of `allowed` (names, or a mapping from names) that `value` names, whatever its case.

    Errors      ValueError that lists the names
    """
    names = {name.lower(): name for name in allowed}
    if value.lower() not in names:
        choice = ", ".join(map(repr, allowed))
        one_of = "one of " if len(allowed) > 1 else ""
        raise ValueError(f"expected {what} to be {one_of}{choice}, got {value!r}.")
    name = names[value.lower()]
    return allowed[name] if isinstance(allowed, dict) else name
