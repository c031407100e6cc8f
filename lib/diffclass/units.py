"""Pixel space [0,1] and model space [-1,1]: the only module that converts, and the checks that guard every entrance.

Attack budgets, smoothing noise and radii are stated in pixel units; networks and diffusion noise levels live in model
units. The map is z = 2x - 1, so every length doubles and every squared error quadruples on the way in.
"""

import math
import numbers
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

PIXELS_TO_MODEL = 2.0  # d z / d x
MOST = 10_000_000  # of anything that is counted: more would only fail later, for want of memory or time


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
    """The largest L2 norm inside an L-inf ball: epsilon_linf * sqrt(D). Units: those of `epsilon_linf`.

    Errors      those of `check_number` and `check_whole`
    """
    size = check_number(epsilon_linf, "epsilon_linf", least=0)
    return size * math.sqrt(check_whole(dimensions, "dimensions", least=1))


def linf_of_l2(radius: float, dimensions: int) -> float:
    """The L-inf radius that an L2 radius guarantees: radius / sqrt(D). Units: those of `radius`.

    Errors      those of `check_number` and `check_whole`
    """
    size = check_number(radius, "radius", least=0)
    return size / math.sqrt(check_whole(dimensions, "dimensions", least=1))


def check_real(value, name: str) -> float:
    """Return one real number as a float, whatever library it comes from, else raise; NaN and infinity pass.

    Errors      TypeError for a text, a complex number, None, or several numbers
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} as a number, got {_briefly(value)}.")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def check_number(
    value, name: str, *, least: float | None = None, above: float | None = None
) -> float:
    """Return a finite number as a float if it is at least `least` and more than `above`, where these are given.

    Errors      those of `check_real`; ValueError for NaN, infinity, or a number that is too small
    """
    number = check_real(value, name)
    if not math.isfinite(number):
        raise ValueError(f"expected {name} as a finite number, got {number}.")
    if least is not None and number < least:
        raise ValueError(f"expected {name} of at least {least:g}, got {number:g}.")
    if above is not None and number <= above:
        raise ValueError(f"expected {name} > {above:g}, got {number:g}.")
    return number


def check_whole(value, name: str, *, least: int | None = None, most: int | None = MOST) -> int:
    """Return a whole number as an int, such as a count or a seed, else raise.

    Errors      those of `check_real`; ValueError for a fraction, NaN, infinity, and for fewer than `least` or more than
                `most`, where these are given
    """
    number = check_real(value, name)
    if isinstance(value, int):
        whole = int(value)
    elif math.isfinite(number) and number == math.floor(number):
        whole = int(number)
    else:
        raise ValueError(f"expected {name} as a whole number, got {number}.")
    if least is not None and whole < least:
        raise ValueError(f"expected {name} as a whole number of at least {least}, got {whole}.")
    if most is not None and whole > most:
        raise ValueError(f"expected {name} as a whole number of at most {most}, got {whole}.")
    return whole


def check_wholes(values, name: str) -> tuple[int, ...]:
    """Return whole numbers, such as widths or steps, else raise.

    Errors      those of `check_whole`; TypeError for what is no list
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"expected {name} as several whole numbers, got {_briefly(values)}.")
    return tuple(check_whole(value, name) for value in values)


def check_numbers(values, name: str) -> Tensor:
    """Return finite real numbers as a floating-point tensor; one that is so already stays as it is.

    Shapes      a tensor, an array or a list, of any shape
    Errors      TypeError for what holds something else than real numbers; ValueError for NaN and infinity
    """
    converted = check_reals(values, name)
    bad = int((~torch.isfinite(converted.detach())).sum())
    if bad:
        raise ValueError(
            f"expected {name} as finite numbers, got {bad} NaN or infinite ones among {converted.numel()}."
        )
    return converted


def check_reals(values, name: str) -> Tensor:
    """Return real numbers as a floating-point tensor, whether they are finite or not, else raise a TypeError."""
    try:
        tensor = values if isinstance(values, Tensor) else _copied(np.asarray(values))
        real = not tensor.is_complex() and tensor.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError, OverflowError):
        real = False
    if not real:
        raise TypeError(f"expected {name} as real numbers, got {_briefly(values)}.")
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def _copied(array: np.ndarray) -> Tensor:
    """An array's numbers as a tensor of their own.

    Why         a tensor has no backward view such as x[::-1], no other machine's order of bytes, no extended precision and
                no read-only memory, all of which an array may have; the numbers are the same
    """
    extended = array.dtype == np.longdouble
    own = np.dtype(np.float64) if extended else array.dtype.newbyteorder("=")
    return torch.from_numpy(array.astype(own, order="C", copy=True))


def check_image_shape(image_shape) -> tuple[int, int, int]:
    """Return (C,H,W) as three whole numbers of at least one, else raise a ValueError or a TypeError."""
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"expected an image shape (C,H,W), got {_briefly(image_shape)}.")
    channels, height, width = (
        check_whole(side, "a side of an image shape (C,H,W)", least=1) for side in image_shape
    )
    return channels, height, width


def _briefly(value) -> str:
    """A value in a sentence: what it is, where it would be long."""
    if isinstance(value, Tensor):
        return _describe(value)
    said = repr(value)
    return said if len(said) <= 60 and "\n" not in said else f"a {type(value).__name__}"


def _describe(x: Tensor) -> str:
    ordered = not x.is_complex() and x.dtype != torch.bool
    finite = x[torch.isfinite(x)] if x.is_floating_point() else x
    spread = (
        f"min {float(finite.min()):.3g} max {float(finite.max()):.3g} "
        if finite.numel() and ordered
        else ""
    )
    return f"{spread}of shape {list(x.shape)} and dtype {str(x.dtype).removeprefix('torch.')}"


def _likely_range(low: float, high: float) -> str:
    """What values outside [0,1] probably are, and how they become pixels; from the smallest, the largest and the spread.

    Why         the maximum alone misleads: pictures less their mean are not in [0,255], and dividing them makes them grey
    """
    if low >= -1e-6 and high > 255.5:
        return "these look like [0,65535], of 16 bits; divide by 65535"
    if low >= -1e-6 and high > 2:
        return "these look like [0,255]; divide by 255"
    if max(-low, high) < 0.05:
        return (
            f"these hardly vary, by {high - low:.2g} in all; were they divided by 255 though they were no [0,255]? Go "
            "back to the pictures before that"
        )
    if low < -10 or high > 10:
        return "these look like [0,255] less a mean; add that mean, then divide by 255"
    if low >= -0.1 and high <= 2:
        return "clamp the perturbed image to [0,1]"
    within = low >= -1 - 1e-6 and high <= 1 + 1e-6
    if within and (low < -0.6 or (low < -0.3 and high - low > 1.1)):
        return "these look like model space [-1,1]; pass units.to_pixel(x)"
    if high - low <= 1.1:
        return "these look like pixels less their mean, or model space [-1,1]; add the mean, or pass units.to_pixel(x)"
    if low >= -0.3 and high <= 1.3:
        return "clamp the perturbed image to [0,1]"
    return (
        "these look normalised by a mean and a standard deviation; undo it with x * std + mean (clamp only pixels with "
        "noise on them)"
    )


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
        hint = _likely_range(float(x.min()), float(x.max()))
        raise ValueError(f"expected images in [0,1], got {_describe(x)}; {hint}.")
    return given


def check_labels(y: Tensor, images: int, num_classes: int) -> Tensor:
    """Return class labels [B] of dtype int64 if there is one existing class for each image, else raise.

    Errors      TypeError for what is no tensor; ValueError for another shape or dtype, or a class that does not exist
    """
    if not isinstance(y, Tensor):
        raise TypeError(
            f"expected labels as a torch.Tensor of dtype int64, got {type(y).__name__}; pass torch.as_tensor(y)."
        )
    if y.dtype != torch.int64 or tuple(y.shape) != (images,):
        dtype = str(y.dtype).removeprefix("torch.")
        raise ValueError(
            f"expected one label for each of {images} images as integers, got shape {list(y.shape)} and dtype {dtype}; "
            f"{_label_hint(y, images, num_classes)}."
        )
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        counted = int(y.min()) == 1 and int(y.max()) == num_classes
        hint = (
            "are they counted from 1? Then pass y - 1."
            if counted
            else "is this the world that the classifier was made for?"
        )
        raise ValueError(
            f"expected labels between 0 and {num_classes - 1}, got {int(y.min())} to {int(y.max())}; {hint}"
        )
    return y


def _label_hint(y: Tensor, images: int, num_classes: int) -> str:
    """What labels of another shape or dtype probably are."""
    if tuple(y.shape) == (images, num_classes):
        return "one row for each image, one-hot or of probabilities: pass y.argmax(1)"
    if tuple(y.shape) == (images, 1):
        return "pass y[:, 0]"
    if tuple(y.shape) != (images,):
        return "are they the labels of other images, or not int64"
    if y.dtype == torch.bool:
        return "true and false name no class; pass y.long() if true means class 1"
    if y.is_floating_point():
        return "pass y.long() if they are whole numbers, not probabilities"
    return "pass y.long()"


def check_class_count(classes: int) -> int:
    """Return a number of classes between which can be decided, else raise a ValueError."""
    classes = check_whole(classes, "a number of classes")
    if classes < 2:
        raise ValueError(
            f"expected at least two classes, got {classes}: with one, no picture is ever classified wrongly and no attack "
            "succeeds; make a single logit f of two classes the logits [0, f]."
        )
    return classes


def check_sigma(sigma, name: str = "sigma") -> Tensor:
    """Return `sigma` as a tensor if every level is finite and positive, else raise.

    Units       whatever space the caller names
    Errors      ValueError for a level <= 0, NaN or infinite
    """
    if not isinstance(sigma, Tensor):  # torch would make a Python number float32
        number = isinstance(sigma, numbers.Real)
        sigma = check_real(sigma, f"a noise level {name}") if number else sigma
        sigma = check_reals(sigma, f"a noise level {name}").double()
    sigma = check_reals(sigma, f"a noise level {name}")
    bad = sigma[~(torch.isfinite(sigma) & (sigma > 0))]
    if sigma.numel() == 0 or bad.numel():
        got = f"{float(bad.flatten()[0]):.3g}" if sigma.numel() else "nothing"
        raise ValueError(
            f"expected a finite noise level {name} > 0, got {got}; there is no loss at zero noise, "
            "so use a small level such as 0.01 instead."
        )
    return sigma


def check_sigma_pixel(sigma_pixel: float) -> float:
    """Return the standard deviation of noise on pixels if it can be meant, else raise.

    Units       pixels in [0,1]: noise above 1 is larger than the whole range of pixels
    Errors      those of `check_sigma`; ValueError for more than 1, or several levels
    """
    sigma = check_sigma(sigma_pixel, "sigma_pixel")
    if sigma.numel() != 1:
        raise ValueError(f"expected one noise level sigma_pixel, got {sigma.numel()}.")
    if float(sigma) > 1:
        raise ValueError(
            f"expected a noise sigma_pixel in pixels of [0,1], at most 1, got {float(sigma):g}; did you mean "
            f"{float(sigma):g}/255, or {float(sigma) / 2:g}, half of a noise in model units?"
        )
    return float(sigma)


def check_step_size(step_size: float, epsilon: float, steps: int) -> float:
    """Return an attack's step size if it can be meant inside its budget, else raise.

    Units       pixels in [0,1]; a step of 2 epsilon crosses the whole budget. Where the usual 2.5 epsilon / steps is
                longer, for one step, that is allowed too
    Errors      ValueError for a step that is not finite, not positive (but for a budget of 0), or longer than that
    """
    step_size = check_real(step_size, "a step size")
    steps = check_whole(steps, "steps")
    if epsilon == 0 and step_size == 0:
        return 0.0
    if not math.isfinite(step_size) or step_size <= 0:
        raise ValueError(
            f"expected a step size > 0, got {step_size:g}; a negative step would climb down, none at all stands still."
        )
    longest = max(2.0, 2.5 / max(1, steps)) * epsilon
    if step_size > longest * (1 + 1e-6) and epsilon > 0:
        hint = (
            f"did you mean {step_size:g}/255" if step_size / 255 <= longest else "is it in pixels"
        )
        raise ValueError(
            f"expected a step size of at most {longest:.3g}, across the whole budget of {epsilon:.3g}, got "
            f"{step_size:g}; {hint}?"
        )
    return float(step_size)


def check_norm(norm: str) -> str:
    """Return the name of a norm, "linf" or "l2", else raise a ValueError."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"expected norm 'linf' or 'l2', got {norm!r}.")
    return norm


def check_budget(epsilon: float, norm: str, dimensions: int) -> float:
    """Return an attack budget in pixel units if it can be meant, else raise.

    Units       pixels in [0,1]; the largest possible budget is 1 (L-inf) or sqrt(D) (L2)
    Errors      ValueError for a negative or non-finite budget, or one larger than the pixel range
    """
    check_norm(norm)
    largest = 1.0 if norm == "linf" else math.sqrt(dimensions)
    epsilon = check_real(epsilon, "an attack budget")
    if not math.isfinite(epsilon) or epsilon < 0:
        raise ValueError(f"expected an attack budget >= 0, got {epsilon}.")
    if epsilon > largest:
        hint = f"; did you mean {epsilon:g}/255?" if epsilon / 255 <= largest else "."
        raise ValueError(
            f"attack budget {epsilon:g} ({norm}) is larger than the pixel range allows ({largest:.3g}){hint}"
        )
    return float(epsilon)


def check_displacement(epsilon: float, height: int, width: int) -> float:
    """Return a budget of flow fields in pixel widths if it can be meant, else raise.

    Units       pixel widths; the largest possible budget leads from one edge of the image to the other
    Errors      ValueError for a negative or non-finite budget, a larger one, or an image of one pixel, in which nothing
                can be moved
    """
    largest = max(height, width) - 1
    if largest < 1:
        raise ValueError("expected images in which something can be moved, got images of 1x1.")
    if not math.isfinite(epsilon) or not 0 <= epsilon <= largest:
        raise ValueError(
            f"expected a displacement between 0 and {largest}, the width of the image, got {epsilon}; it is in pixel "
            "widths, not in shares of the image."
        )
    return float(epsilon)


def chosen(value: str, allowed, what: str):
    """The entry of `allowed` (names, or a mapping from names) that `value` names, whatever its case.

    Errors      ValueError that lists the names
    """
    names = {name.lower(): name for name in allowed}
    if not isinstance(value, str) or value.lower() not in names:
        choice = ", ".join(map(repr, allowed))
        one_of = "one of " if len(allowed) > 1 else ""
        raise ValueError(f"expected {what} to be {one_of}{choice}, got {value!r}.")
    name = names[value.lower()]
    return allowed[name] if isinstance(allowed, dict) else name
