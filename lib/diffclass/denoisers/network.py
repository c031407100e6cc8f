"""Denoisers that are learned: EDM preconditioning around a network, one class at a time or one head for each class."""

import json
import math
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffclass.denoisers.base import Denoiser

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


class ConditionalDenoiser(Denoiser):
    """A class-conditional network: one call for each class, batched. With `has_null`, the last class is "no class".

    Formula     D_k(x, sigma) = c_skip x + c_out F(c_in x, ln sigma, k)
    Source      Karras et al. 2022, equation 7
    """

    def __init__(self, network: nn.Module, num_classes: int, image_shape: tuple[int, int, int],
                 sigma_range: tuple[float, float] = (0.01, 80.0), has_null: bool = True):
        super().__init__()
        self.network, self.has_null = network, has_null
        self.num_classes, self.image_shape, self.sigma_range = num_classes, tuple(image_shape), tuple(sigma_range)

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        return self.paired(_repeat(x_sigma, len(classes)), _repeat(sigma, len(classes)), classes.repeat(len(sigma))) \
            .reshape(len(x_sigma), len(classes), *self.image_shape)

    def paired(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Denoise each image under its own label, as training needs. Shapes: [B,C,H,W], [B], [B] -> [B,C,H,W]."""
        c_skip, c_out, c_in = (c[:, None, None, None] for c in edm_scalings(sigma))
        return c_skip * x_sigma + c_out * self.network(c_in * x_sigma, sigma.log(), labels)


class MultiHeadDenoiser(Denoiser):
    """One trunk, one output head for each class and one for "no class": a single call answers for all.

    Formula     D_k(x, sigma) = c_skip x + c_out F(c_in x, ln sigma)_k
    Source      RDC (Chen et al. 2024), multi-head diffusion; trained by distillation, because the heads of wrong
                classes never see an image otherwise
    """

    def __init__(self, network: nn.Module, num_classes: int, image_shape: tuple[int, int, int],
                 sigma_range: tuple[float, float] = (0.01, 80.0), has_null: bool = True):
        super().__init__()
        self.network, self.has_null = network, has_null
        self.num_classes, self.image_shape, self.sigma_range = num_classes, tuple(image_shape), tuple(sigma_range)

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        c_skip, c_out, c_in = (c[:, None, None, None] for c in edm_scalings(sigma))
        heads = self.network(c_in * x_sigma, sigma.log(), None).unflatten(1, (self.num_classes + self.has_null, -1))
        if len(classes) != heads.shape[1]:
            heads = heads[:, :-1] if len(classes) == self.num_classes and _is_range(classes) else heads[:, classes]
        return (c_skip * x_sigma)[:, None] + c_out[:, None] * heads


def _is_range(classes: Tensor) -> bool:
    return bool((classes == torch.arange(len(classes), device=classes.device)).all())


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Networks: F(c_in x, ln sigma, classes or None) -> [B, heads * C, H, W]


class DigitNet(nn.Module):
    """A residual convolutional network for 8x8 digits, small enough to be trained in front of the reader.

    Shapes      x [B,C,H,W], log_sigma [B], classes [B] or None -> [B, heads*C, H, W]
    """

    def __init__(self, channels: int = 1, classes: int = 0, heads: int = 1, width: int = 48, blocks: int = 4,
                 size: int = 8):
        super().__init__()
        self.config = dict(channels=channels, classes=classes, heads=heads, width=width, blocks=blocks, size=size)
        self.register_buffer("frequencies", torch.linspace(0.25, 4.0, 16))
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes, width) if classes else None
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, width, size, size))  # where a stroke is matters on an 8x8 grid
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, heads * channels, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, x: Tensor, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """One call of the network."""
        angles = log_sigma[:, None] * self.frequencies
        condition = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        if self.classes is not None:
            condition = condition + self.classes(classes)
        h = self.enter(x) + self.place
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(h)


class _Block(nn.Module):
    """A residual block whose channels are scaled and shifted by the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h [B,width,H,W], condition [B,width] -> [B,width,H,W]."""
        scale, shift = self.modulate(nn.functional.silu(condition))[:, :, None, None].chunk(2, 1)
        inner = self.conv1(nn.functional.silu(self.norm1(h)))
        inner = self.conv2(nn.functional.silu(self.norm2(inner) * (1 + scale) + shift))
        return h + inner


class UNet(nn.Module):
    """`diffusers.UNet2DModel` as F(x, ln sigma, classes): its timestep is 250 ln sigma, its null class the last.

    Source      EDM's c_noise = ln(sigma)/4, in the units of a positional embedding made for t in 0..1000
    """

    def __init__(self, channels: int = 3, classes: int = 0, heads: int = 1, size: int = 32,
                 widths: tuple[int, ...] = (64, 128, 128), layers: int = 2, attention: bool = True,
                 dropout: float = 0.0):
        super().__init__()
        from diffusers import UNet2DModel  # here, not above: it takes seconds and digits do not need it

        self.config = dict(channels=channels, classes=classes, heads=heads, size=size, widths=list(widths),
                           layers=layers, attention=attention, dropout=dropout)
        plain, attentive = ["DownBlock2D"] * len(widths), ["UpBlock2D"] * len(widths)
        if attention and len(widths) > 1:
            plain[1], attentive[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.unet = UNet2DModel(sample_size=size, in_channels=channels, out_channels=heads * channels,
                                block_out_channels=tuple(widths), layers_per_block=layers,
                                down_block_types=tuple(plain), up_block_types=tuple(attentive), dropout=dropout,
                                attention_head_dim=min(64, *widths),
                                # one channel a group would erase the embedding of level and class, a shift by channel
                                norm_num_groups=min(32, math.gcd(*widths) // 2),
                                num_class_embeds=classes or None)

    def forward(self, x: Tensor, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """One call of the network."""
        return self.unet(x, 250 * log_sigma, class_labels=classes).sample


# ---------------------------------------------------------------------------------------------------------------------
# Weights: safetensors with the architecture in the header, so that a file says what it is

_NETWORKS = {"DigitNet": DigitNet, "UNet": UNet}
_KINDS = {"ConditionalDenoiser": ConditionalDenoiser, "MultiHeadDenoiser": MultiHeadDenoiser}


def build(kind: str, network: str, num_classes: int, image_shape: tuple[int, int, int],
          sigma_range: tuple[float, float] = (0.01, 80.0), has_null: bool = True, seed: int = 0, **config) -> Denoiser:
    """A fresh denoiser by name.

    Shapes      kind 'ConditionalDenoiser' (classes go in) or 'MultiHeadDenoiser' (classes come out)
    Randomness  the initial weights are drawn from `seed` alone
    """
    if kind not in _KINDS or network not in _NETWORKS:
        raise ValueError(f"expected one of {list(_KINDS)} around one of {list(_NETWORKS)}, got {kind!r} around "
                         f"{network!r}; was the file made by another version?")
    channels, size, _ = image_shape
    answers = num_classes + has_null
    heads = dict(classes=answers, heads=1) if kind == "ConditionalDenoiser" else dict(classes=0, heads=answers)
    with torch.random.fork_rng(devices=[]):  # modules first fill themselves from the global generator
        net = _NETWORKS[network](**{**dict(channels=channels, size=size), **heads, **config})
    _initialise(net, torch.Generator().manual_seed(seed))
    return _KINDS[kind](net, num_classes, tuple(image_shape), tuple(sigma_range), has_null)


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
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
    own = {k: v for k, v in denoiser.network.config.items() if k not in ("channels", "classes", "heads", "size")}
    return dict(kind=type(denoiser).__name__, network=type(denoiser.network).__name__,
                num_classes=denoiser.num_classes, image_shape=list(denoiser.image_shape),
                sigma_range=list(denoiser.sigma_range), has_null=denoiser.has_null, **own)


def save_denoiser(denoiser: Denoiser, path: str | Path, card: dict | None = None,
                  dtype: torch.dtype = torch.float32) -> None:
    """Write weights, architecture and model card as safetensors; old files survive an interruption.

    Writes      `path`, or NAME-1-of-3.safetensors and so on where one file would exceed SHARD_BYTES
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
             for name, value in denoiser.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in state.items():
        if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + value.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value
    header = {"architecture": json.dumps(describe(denoiser)), "card": json.dumps(card or {})}
    names = [path.name] if len(shards) == 1 else [
        f"{path.stem}-{i}-of-{len(shards)}{path.suffix}" for i in range(1, len(shards) + 1)]
    files = [path.with_name(name) for name in names]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, file.with_suffix(".part"), header)
    for file in files:
        file.with_suffix(".part").replace(file)
    for old in {path, *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")} - set(files):
        old.unlink(missing_ok=True)  # of an earlier save in another number of files


def weight_files(path: Path) -> list[Path]:
    """The files that `save_denoiser(..., path)` wrote. Errors: FileNotFoundError, also if one of several is missing."""
    found = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    wanted = int(found[0].stem.rpartition("-")[2]) if found and found[0] != path else 1
    if len(found) != wanted:
        files, there = (f" in {wanted} files", len(found)) if wanted > 1 else ("", "none")
        raise FileNotFoundError(f"expected weights at {path.name}{files}, found {there}; run `diffclass doctor` to see "
                                "what is missing and how to get it.")
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
            raise ValueError(f"expected {file.name} to be a safetensors file, got {file.stat().st_size} bytes that are "
                             f"not ({error}); the download or copy was probably cut short.") from None
    return header


def load_denoiser(path: str | Path) -> tuple[Denoiser, dict]:
    """A denoiser and its model card from what `save_denoiser` wrote.

    Errors      FileNotFoundError; ValueError for a file that is not safetensors, is truncated, carries no
                architecture, or whose weights do not fit the architecture that it names
    """
    path, state, header = Path(path), {}, read_header(path)
    for file in weight_files(path):
        state |= load_file(file)
    if "architecture" not in header:
        raise ValueError(f"expected {path.name} to name its architecture, got the header {sorted(header)}; it was not "
                         "written by this course, so convert it with a loader for its format.")
    architecture = json.loads(header["architecture"])
    if not {"kind", "network", "num_classes", "image_shape"} <= set(architecture):
        raise ValueError(f"expected {path.name} to hold a denoiser, got the architecture {sorted(architecture)}; a "
                         "network of another kind has a loader of its own.")
    denoiser = build(**{**architecture, "image_shape": tuple(architecture["image_shape"])})
    wanted = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != got:
        name = next(n for n in sorted(wanted | got) if wanted.get(n) != got.get(n))
        raise ValueError(f"expected weights of {architecture['network']} in {path.name}, but {name!r} should have "
                         f"shape {wanted.get(name)} and has {got.get(name)}; these weights belong to another "
                         "architecture.")
    denoiser.load_state_dict(state)
    return denoiser.eval().requires_grad_(False), json.loads(header.get("card", "{}"))
