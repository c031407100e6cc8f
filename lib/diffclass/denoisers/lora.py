"""Low-rank adapters: a few trained numbers beside a denoiser that stays as it is, saved alone, merged when they are done.

PEFT's layers do it, in a copy of the base: a base that others hold is never changed.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffclass import units
from diffclass.denoisers.base import Denoiser
from diffclass.storage.files import write_tensors
from diffclass.storage.weights import check_finite

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of diffusers' networks: what TMDC adapts
HEADER = "adapter"  # of a saved one: its settings as JSON
ADDED = (".lora_A.", ".lora_B.")  # in the names of what PEFT adds


@dataclass(frozen=True, eq=False)
class Adapter:
    """A denoiser with low-rank layers beside some of its own, and what they were made beside.

    Formula     W x + (alpha / r) B A x,  A [r,n], B [m,r] of a layer W [m,n]; of a convolution of k x k pixels n counts its
                inputs times k^2; r (m + n) numbers in place of m n
    Source      Hu et al. 2022 (LoRA); A is drawn from N(0, 1/r^2), B is 0, so that nothing changes at first
    Shapes      denoiser: a copy of the base, of the same class; only A and B have gradients
    Randomness  A from the seed of `beside`
    """

    denoiser: Denoiser
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str

    @classmethod
    def beside(
        cls,
        base: Denoiser,
        targets: Sequence[str] = ATTENTION,
        rank: int = 4,
        alpha: float | None = None,
        seed: int = 0,
    ) -> "Adapter":
        """A fresh adapter beside a copy of a denoiser, which answers as the base does, bit for bit.

        Shapes      targets: endings of names of linear layers and convolutions, such as "to_q"; alpha: the rank for None
        Errors      TypeError, ValueError for targets that the base does not have or that are other layers, a rank above
                    the size of one of them, an alpha <= 0, or a base that is adapted already
        """
        from peft import LoraConfig, inject_adapter_in_model  # here, not above: it takes seconds

        rank = units.check_whole(rank, "the rank of an adapter", least=1)
        alpha = float(rank) if alpha is None else units.check_number(alpha, "alpha", above=0)
        if isinstance(targets, str) or not isinstance(targets, Sequence):
            raise TypeError(
                f"expected targets as a list of endings of layers' names, got {targets!r:.60}; pass ['to_q', 'to_v']."
            )
        targets = tuple(targets)
        chosen = check_targets(base, targets, rank)
        adapted = copy.deepcopy(base)
        settings = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(chosen), init_lora_weights=False
        )
        # modules first fill themselves from the global generator
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(settings, adapted)
        generator = torch.Generator().manual_seed(units.check_whole(seed, "a seed", most=None))
        for name, value in _added(adapted).items():
            fresh = torch.zeros(value.shape)
            if ".lora_A." in name:
                nn.init.normal_(fresh, std=1 / rank, generator=generator)
            value.data = fresh.to(value)
        return cls(adapted, rank, alpha, targets, checksum(base))

    @classmethod
    def of(cls, adapted: Denoiser) -> "Adapter":
        """The adapter of a denoiser that has one, such as the copy that was trained: its base is in it, unchanged.

        Errors      ValueError for a denoiser without one
        """
        layers = _adapted_layers(adapted)
        if not layers:
            raise ValueError(
                f"expected a denoiser with an adapter, got a {type(adapted).__name__} without; Adapter.beside makes one."
            )
        settings = adapted.peft_config["default"]
        return cls(
            adapted, settings.r, float(settings.lora_alpha), tuple(layers), checksum(adapted)
        )

    @classmethod
    def load(cls, base: Denoiser, path: str | Path) -> "Adapter":
        """The adapter in a file beside a copy of its base.

        Errors      FileNotFoundError; ValueError for a file that holds no adapter, or one of another base
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"expected an adapter at {path.name}, found none; train it first."
            )
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                told = (opened.metadata() or {}).get(HEADER)
            state = load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"expected {path.name} to be a safetensors file, got one that is not ({error}); was it cut short?"
            ) from None
        if told is None:
            raise ValueError(
                f"expected {path.name} to hold an adapter, got a file whose header names none; whole networks have a loader "
                "of their own."
            )
        try:
            settings = {
                name: json.loads(told)[name] for name in ("base", "targets", "rank", "alpha")
            }
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"expected the settings of an adapter in the header of {path.name}, got {told[:60]!r}; the file was changed."
            ) from None
        own = checksum(base)
        if settings.pop("base") != own:
            raise ValueError(
                f"expected {path.name} to hold an adapter of this base, whose weights have the checksum {own[:12]}, got one "
                "trained beside another; load the base that it was trained with, in the same precision."
            )
        adapter = cls.beside(base, **settings)
        added = _added(adapter.denoiser)
        wanted = {_plain(name): tuple(value.shape) for name, value in added.items()}
        got = {name: tuple(value.shape) for name, value in state.items()}
        if wanted != got:
            raise ValueError(
                f"expected {len(wanted)} tensors of an adapter of rank {adapter.rank} in {path.name}, got {len(got)} of other "
                "names or shapes; the file was changed."
            )
        check_finite(state, f"an adapter in {path.name}")
        for name, value in added.items():
            value.data = state[_plain(name)].to(value)
        return adapter

    @property
    def weights(self) -> dict[str, Tensor]:
        """A and B of every adapted layer, by name: what is trained, and all that is saved."""
        return {_plain(name): value for name, value in _added(self.denoiser).items()}

    @property
    def count(self) -> int:
        """How many numbers are trained. Formula: the sum of r (m + n) over the adapted layers."""
        return sum(value.numel() for value in self.weights.values())

    def save(self, path: str | Path, card: dict | None = None) -> None:
        """Write the adapter alone, with its settings, the checksum of its base, and a model card.

        Errors      those of `storage.files.write_tensors`; ValueError for weights that are not finite
        """
        state = {
            name: value.detach().float().cpu().contiguous() for name, value in self.weights.items()
        }
        check_finite(state, "an adapter")
        settings = dict(
            rank=self.rank, alpha=self.alpha, targets=list(self.targets), base=self.base
        )
        header = {HEADER: json.dumps(settings), "card": json.dumps(card or {})}
        write_tensors(Path(path), state, header)

    def truncated(self, rank: int) -> "Adapter":
        """The same adapter with the nearest B A of a lower rank in every layer: what is lost says how much rank it uses.

        Formula     B A = U S V^T;  only the largest `rank` singular values stay
        Source      Eckart & Young 1936: nearest in the Frobenius norm
        Shapes      the same; the columns of B and the rows of A beyond `rank` are zero
        Errors      ValueError for a rank that is none of 1 .. the adapter's
        """
        rank = units.check_whole(rank, "a lower rank", least=1, most=self.rank)
        lower = copy.deepcopy(self)
        for name, value in lower.weights.items():
            if ".lora_A." not in name:
                continue
            b = lower.weights[name.replace(".lora_A.", ".lora_B.")]
            u, s, vh = torch.linalg.svd(b.flatten(1) @ value.flatten(1), full_matrices=False)
            s = s[: self.rank].clone()
            s[rank:] = 0
            b.data = (u[:, : self.rank] * s).reshape(b.shape)
            kept = (s > 0)[:, None] * vh[: self.rank]
            value.data = kept.reshape(value.shape)
        return lower

    def merged(self) -> Denoiser:
        """A denoiser of the base's own layers that answers as the adapted one does, up to rounding.

        Formula     W + (alpha / r) B A in the place of W
        """
        merged = copy.deepcopy(self.denoiser)
        for name, layer in _adapted_layers(merged).items():
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(merged.get_submodule(parent), own, layer.get_base_layer())
        del merged.peft_config
        return merged.eval().requires_grad_(False)


def check_targets(base: nn.Module, targets: Sequence[str], rank: int) -> tuple[str, ...]:
    """Return the names of the layers that targets end the names of, if an adapter of this rank fits beside each.

    Errors      ValueError for a target that no layer has, layers that are neither linear nor plain convolutions, a rank
                above a layer's size, or a base that is adapted already
    """
    if _added(base):
        raise ValueError(
            "expected a base without an adapter, got one that has one; merge it first, or adapt the base itself."
        )
    if not targets:
        raise ValueError(
            f"expected the endings of some layers' names as targets, got none; {_known(base)}."
        )
    chosen = {}
    for target in targets:
        own = {
            name: layer
            for name, layer in base.named_modules()
            if isinstance(target, str) and (name == target or name.endswith(f".{target}"))
        }
        if not own:
            raise ValueError(
                f"expected targets among the layers of {type(base).__name__}, got {target!r}; {_known(base)}."
            )
        chosen |= own
    for name, layer in chosen.items():
        most = _largest_rank(name, layer)
        if rank > most:
            raise ValueError(
                f"expected a rank of at most {most}, the smaller side of the layer {name}, got {rank}; a low-rank adapter of "
                "full rank saves nothing: lower the rank, or leave the layer out."
            )
    return tuple(chosen)


def checksum(base: nn.Module) -> str:
    """SHA-256 of a network's weights by name, in single precision: which base an adapter belongs to.

    Why         what an adapter adds does not count, so that an adapted copy has the checksum of its base
    """
    digest = hashlib.sha256()
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in base.state_dict().items()
        if not any(part in name for part in ADDED)
    }
    for name, value in sorted(state.items()):
        numbers = value.detach().cpu()
        numbers = numbers.float() if numbers.is_floating_point() else numbers
        digest.update(f"{name} {list(numbers.shape)} {numbers.dtype}\n".encode())
        digest.update(numbers.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _largest_rank(name: str, layer: nn.Module) -> int:
    """The smaller side of a layer as a matrix. Errors: ValueError for a layer that is none."""
    plain = isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and layer.groups == 1
    if not plain:
        raise ValueError(
            f"expected linear layers or plain convolutions to adapt, got {name}, a {type(layer).__name__}; name the layers "
            "inside it."
        )
    return min(layer.weight.flatten(1).shape)


def _known(base: nn.Module) -> str:
    """What could be adapted, in words."""
    endings = {
        name.rpartition(".")[2] if not name.endswith(".0") else ".".join(name.split(".")[-2:])
        for name, layer in base.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    return f"its linear layers and convolutions are named {', '.join(sorted(endings)[:12])}"


def _added(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that PEFT added, by their whole names."""
    return {
        name: value
        for name, value in network.named_parameters()
        if any(part in name for part in ADDED)
    }


def _plain(name: str) -> str:
    """A parameter's name as PEFT saves it, without that of the adapter."""
    return name.replace(".default.", ".")


def _adapted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT put in the place of others, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
