"""Denoisers that are learned: EDM preconditioning around a network, one class at a time or one head for each class."""

import json
import math
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.nets import DigitNet, PatchNet, SongUNet, UNet

SHARD_BYTES = 15_000_000  # larger weights are written as several files
SIGMA_DATA = 0.5  # standard deviation of images in model space that the preconditioning assumes


def edm_scalings(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> tuple[Tensor, Tensor, Tensor]:
    """EDM's c_skip, c_out, c_in.

    Formula     c_skip = s^2/(sigma^2 + s^2),  c_out = sigma s/sqrt(sigma^2 + s^2),  c_in = 1/sqrt(sigma^2 + s^2)
    Source      Karras et al. 2022, Table 1
    Shapes      sigma [...] -> three tensors [...]
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


class _AroundNetwork(Denoiser):
    """A denoiser made of a network: what both kinds keep."""

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


class ConditionalDenoiser(_AroundNetwork):
    """A class-conditional network: one call for each class, batched. With `has_null`, the last class is "no class".

    Formula     D_k(x, sigma) = c_skip x + c_out F(c_in x, ln sigma, k)
    Source      Karras et al. 2022, equation 7
    """

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        return self.paired(
            _repeat(x_sigma, len(classes)), _repeat(sigma, len(classes)), classes.repeat(len(sigma))
        ).reshape(len(x_sigma), len(classes), *self.image_shape)

    def paired(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Denoise each image under its own label, as training needs. Shapes: [B,C,H,W], [B], [B] -> [B,C,H,W]."""
        c_skip, c_out, c_in = (c[:, None, None, None] for c in edm_scalings(sigma))
        return c_skip * x_sigma + c_out * self.network(c_in * x_sigma, sigma.log(), labels)


class MultiHeadDenoiser(_AroundNetwork):
    """One trunk, one output head for each class and one for "no class": a single call answers for all.

    Formula     D_k(x, sigma) = c_skip x + c_out F(c_in x, ln sigma)_k
    Source      RDC (Chen et al. 2024), multi-head diffusion; trained by distillation or by contrast, because the
                heads of wrong classes never see an image otherwise
    """

    one_call = True

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        c_skip, c_out, c_in = (c[:, None, None, None] for c in edm_scalings(sigma))
        heads = self.network(c_in * x_sigma, sigma.log(), None).unflatten(
            1, (self.num_classes + self.has_null, -1)
        )
        if len(classes) != heads.shape[1]:
            heads = (
                heads[:, :-1]
                if len(classes) == self.num_classes and _is_range(classes)
                else heads[:, classes]
            )
        return (c_skip * x_sigma)[:, None] + c_out[:, None] * heads


def _is_range(classes: Tensor) -> bool:
    return bool((classes == torch.arange(len(classes), device=classes.device)).all())


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=0)


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
            f"{network!r}; was the file made by another version?"
        )
    channels, size, _ = image_shape
    answers = num_classes + has_null
    heads = (
        dict(classes=answers, heads=1)
        if kind == "ConditionalDenoiser"
        else dict(classes=0, heads=answers)
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # modules first fill themselves from the global generator
        net = _NETWORKS[network](**{**dict(channels=channels, size=size), **heads, **config})
    initialise(net, torch.Generator().manual_seed(seed))
    return _KINDS[kind](net, num_classes, tuple(image_shape), tuple(sigma_range), has_null)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """torch's default initialisation, drawn again from a generator: modules fill themselves from global state."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if module.weight.any():  # a layer that starts at zero stays at zero
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(module.weight[0].numel())
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)


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


def save_weights(
    module: nn.Module,
    architecture: dict,
    path: str | Path,
    card: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, architecture and model card as safetensors; old files survive an interruption.

    Writes      `path`, or NAME-1-of-3.safetensors and so on where one file would exceed SHARD_BYTES
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in module.state_dict().items()
    }
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in state.items():
        if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + value.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value
    header = {"architecture": json.dumps(architecture), "card": json.dumps(card or {})}
    names = (
        [path.name]
        if len(shards) == 1
        else [f"{path.stem}-{i}-of-{len(shards)}{path.suffix}" for i in range(1, len(shards) + 1)]
    )
    files = [path.with_name(name) for name in names]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, file.with_suffix(".part"), header)
    for file in files:
        file.with_suffix(".part").replace(file)
    for old in {path, *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")} - set(files):
        old.unlink(missing_ok=True)  # of an earlier save in another number of files


def weight_files(path: Path) -> list[Path]:
    """The files that `save_denoiser(..., path)` wrote. Errors: FileNotFoundError, also if one of several is missing."""
    found = (
        [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    )
    wanted = int(found[0].stem.rpartition("-")[2]) if found and found[0] != path else 1
    if len(found) != wanted:
        files, there = (f" in {wanted} files", len(found)) if wanted > 1 else ("", "none")
        raise FileNotFoundError(
            f"expected weights at {path.name}{files}, found {there}; run `diffclass doctor` to see "
            "what is missing and how to get it."
        )
    return found


def read_header(path: str | Path) -> dict[str, str]:
    """What a weights file says of itself, "architecture" and "card" as JSON, without loading its weights.

    Errors      FileNotFoundError; ValueError for a file that is not safetensors, or is truncated
    """
    header = {}
    for file in weight_files(Path(path)):
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"expected {file.name} to be a safetensors file, got {file.stat().st_size} bytes that are "
                f"not ({error}); the download or copy was probably cut short."
            ) from None
    return header


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


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict, dict]:
    """Weights by name, architecture and model card from what `save_weights` wrote.

    Errors      FileNotFoundError; ValueError for a file that is not safetensors, is truncated, or carries no
                architecture
    """
    path, state, header = Path(path), {}, read_header(path)
    for file in weight_files(path):
        state |= load_file(file)
    if "architecture" not in header:
        raise ValueError(
            f"expected {path.name} to name its architecture, got the header {sorted(header)}; it was not "
            "written by this course, so convert it with a loader for its format."
        )
    return state, json.loads(header["architecture"]), json.loads(header.get("card", "{}"))


def filled(module: nn.Module, state: dict[str, Tensor], what: str) -> nn.Module:
    """The module with these weights, ready to be asked: in eval mode and without gradients of the weights.

    Errors      ValueError for weights that do not fit; `what` names the network and its file
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != got:
        name = next(n for n in sorted(wanted | got) if wanted.get(n) != got.get(n))
        raise ValueError(
            f"expected weights of {what}, but {name!r} should have shape {wanted.get(name)} and has "
            f"{got.get(name)}; these weights belong to another architecture."
        )
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
