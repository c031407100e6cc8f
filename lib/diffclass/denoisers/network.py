"""Denoisers that are learned: EDM preconditioning around a network, one class at a time or one head for each class."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import noise
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.nets import DigitNet, PatchNet, SongUNet, UNet, initialise
from diffclass.storage.weights import filled, load_weights, save_weights


def edm_scalings(
    sigma: Tensor, sigma_data: float = noise.EDM_SIGMA_DATA
) -> tuple[Tensor, Tensor, Tensor]:
    """EDM's c_skip, c_out, c_in around a network, for images of standard deviation s in model space.

    Formula     c_skip = s^2/(sigma^2 + s^2),  c_out = sigma s/sqrt(sigma^2 + s^2),  c_in = 1/sqrt(sigma^2 + s^2)
    Source      Karras et al. 2022, Table 1; `noise.edm_lambda` is 1 / c_out^2
    Shapes      sigma [...] -> three tensors [...]
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


class LearnedDenoiser(Denoiser):
    """A denoiser around a network: what both kinds keep, and what training asks of them."""

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        image_shape: tuple[int, int, int],
        sigma_range: tuple[float, float] = (0.01, 80.0),
        has_null: bool = True,
    ):
        super().__init__()
        self.network = network
        self.has_null = has_null
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        self.sigma_range = tuple(sigma_range)

    def asked(self, x: Tensor, log_sigma: Tensor, labels: Tensor | None) -> Tensor:
        """One call of the network, where its weights are and in their precision; the answer comes back to the images.

        Why         pictures, noise and Bayes' rule may stay on the CPU, with its values, while an accelerator calls
        """
        own = next(self.network.parameters(), x)
        labels = labels if labels is None else labels.to(own.device)
        return self.network(x.to(own), log_sigma.to(own), labels).to(x)


class ConditionalDenoiser(LearnedDenoiser):
    """A class-conditional network: one call for each class, batched. With `has_null`, the last class is "no class".

    Formula     D_k(x, sigma) = c_skip x + c_out F(c_in x, ln sigma, k)
    Source      Karras et al. 2022, equation 7
    """

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        return self.paired(
            x_sigma.repeat_interleave(len(classes), dim=0),
            sigma.repeat_interleave(len(classes)),
            classes.repeat(len(sigma)),
        ).reshape(len(x_sigma), len(classes), *self.image_shape)

    def paired(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Denoise each image under its own label, as training needs. Shapes: [B,C,H,W], [B], [B] -> [B,C,H,W]."""
        c_skip, c_out, c_in = (c[:, None, None, None] for c in edm_scalings(sigma))
        return c_skip * x_sigma + c_out * self.asked(c_in * x_sigma, sigma.log(), labels)


class MultiHeadDenoiser(LearnedDenoiser):
    """One trunk, one output head for each class and one for "no class": a single call answers for all.

    Formula     D_k(x, sigma) = c_skip x + c_out F(c_in x, ln sigma)_k
    Source      RDC (Chen et al. 2024), multi-head diffusion; trained by distillation or by contrast, because the
                heads of wrong classes never see an image otherwise
    """

    one_call = True

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        heads = self._heads(x_sigma, sigma)
        heads = heads[:, : len(classes)] if _is_range(classes) else heads[:, classes]
        return self._denoised(x_sigma, sigma, heads)

    def answers(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser.answers`."""
        return self._denoised(x_sigma, sigma, self._heads(x_sigma, sigma))

    def _heads(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        c_in = edm_scalings(sigma)[2][:, None, None, None]
        heads = self.asked(c_in * x_sigma, sigma.log(), None)
        return heads.unflatten(1, (self.num_classes + self.has_null, -1))

    def _denoised(self, x_sigma: Tensor, sigma: Tensor, heads: Tensor) -> Tensor:
        c_skip, c_out, _ = (c[:, None, None, None] for c in edm_scalings(sigma))
        return (c_skip * x_sigma)[:, None] + c_out[:, None] * heads


def _is_range(classes: Tensor) -> bool:
    """Whether the classes are the first ones in order, so that a view of the heads will do."""
    return bool((classes == torch.arange(len(classes), device=classes.device)).all())


# ---------------------------------------------------------------------------------------------------------------------
# Weights: safetensors with the architecture in the header, so that a file says what it is

_NETWORKS = {"DigitNet": DigitNet, "PatchNet": PatchNet, "UNet": UNet, "SongUNet": SongUNet}
_KINDS = {"ConditionalDenoiser": ConditionalDenoiser, "MultiHeadDenoiser": MultiHeadDenoiser}


def build(
    kind: str,
    network: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    sigma_range: tuple[float, float] = (0.01, 80.0),
    has_null: bool = True,
    seed: int = 0,
    **config,
) -> Denoiser:
    """A fresh denoiser by name.

    Shapes      kind 'ConditionalDenoiser' (classes go in) or 'MultiHeadDenoiser' (classes come out)
    Randomness  the initial weights are drawn from `seed` alone
    """
    if kind not in _KINDS or network not in _NETWORKS:
        raise ValueError(
            f"expected one of {list(_KINDS)} around one of {list(_NETWORKS)}, got {kind!r} around "
            f"{network!r}; was the file written by another version?"
        )
    channels, size, _ = image_shape
    answers = num_classes + 1 if has_null else num_classes
    if kind == "ConditionalDenoiser":
        heads = dict(classes=answers, heads=1)
    else:
        heads = dict(classes=0, heads=answers)
    # modules first fill themselves from the global generator
    with torch.random.fork_rng(devices=[]):
        net = _NETWORKS[network](**{**dict(channels=channels, size=size), **heads, **config})
    initialise(net, torch.Generator().manual_seed(seed))
    return _KINDS[kind](net, num_classes, tuple(image_shape), tuple(sigma_range), has_null)


def describe(denoiser: Denoiser) -> dict:
    """The arguments with which `build` makes this denoiser again."""
    own = {
        k: v
        for k, v in denoiser.network.config.items()
        if k not in ("channels", "classes", "heads", "size")
    }
    return dict(
        kind=type(denoiser).__name__,
        network=type(denoiser.network).__name__,
        num_classes=denoiser.num_classes,
        image_shape=list(denoiser.image_shape),
        sigma_range=list(denoiser.sigma_range),
        has_null=denoiser.has_null,
        **own,
    )


def save_denoiser(
    denoiser: Denoiser,
    path: str | Path,
    card: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, architecture and model card of a denoiser, as `save_weights` does."""
    save_weights(denoiser, describe(denoiser), path, card, dtype)


def load_denoiser(path: str | Path) -> tuple[Denoiser, dict]:
    """A denoiser and its model card from what `save_denoiser` wrote.

    Errors      those of `load_weights` and `filled`; ValueError for a network of another kind
    """
    path = Path(path)
    state, architecture, card = load_weights(path)
    if not {"kind", "network", "num_classes", "image_shape"} <= set(architecture):
        raise ValueError(
            f"expected {path.name} to hold a denoiser, got the architecture {sorted(architecture)}; a "
            "network of another kind has a loader of its own."
        )
    denoiser = build(**{**architecture, "image_shape": tuple(architecture["image_shape"])})
    return filled(denoiser, state, f"{architecture['network']} in {path.name}"), card
