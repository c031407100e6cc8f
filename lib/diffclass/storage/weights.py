"""Weights as safetensors that name their architecture and carry their model card."""

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffclass.storage.files import write_all

SHARD_BYTES = 15_000_000  # larger weights are written as several files


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
    # row-major copies under their own names, however the network lies in memory, shares tensors or was compiled
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value)
        .detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, value in unwrapped(module.state_dict()).items()
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
    written = [save(shard, metadata=header) for shard in shards]
    write_all(dict(zip(files, written, strict=True)))
    for old in {path, *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")} - set(files):
        old.unlink(missing_ok=True)  # of an earlier save in another number of files


def weight_files(path: Path) -> list[Path]:
    """The files that `save_denoiser(..., path)` wrote. Errors: FileNotFoundError, also if one of several is missing."""
    present = (
        [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    )
    wanted = int(present[0].stem.rpartition("-")[2]) if present and present[0] != path else 1
    if len(present) != wanted:
        files, there = (f" in {wanted} files", len(present)) if wanted > 1 else ("", "none")
        raise FileNotFoundError(
            f"expected weights at {path.name}{files}, found {there}; run `diffclass doctor` to see "
            "what is missing and how to get it."
        )
    return present


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


def _check_state(state: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError for what is not a dict of tensors by name."""
    named = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )
    if not named:
        raise ValueError(f"expected weights of {what} as tensors by name, got {str(state)[:60]!r}.")


def check_finite(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return weights by name if all of their values are finite numbers, else raise; `what` names them.

    Errors      ValueError that names the first tensor with NaN or infinity and counts its values
    """
    _check_state(state, what)
    counts = {}
    for name, value in state.items():
        if value.is_floating_point():
            numbers = value if value.element_size() > 1 else value.float()
            counts[name] = int((~torch.isfinite(numbers)).sum())
    spoilt = [name for name, count in counts.items() if count]
    if spoilt:
        name = spoilt[0]
        others = f" (and in {len(spoilt) - 1} more tensors)" if spoilt[1:] else ""
        raise ValueError(
            f"expected finite weights of {what}, got {counts[name]} NaN or infinite values among "
            f"{state[name].numel()} in {name!r}{others}; the training that wrote them diverged, or the file was changed."
        )
    return state


def check_weights(path: str | Path) -> None:
    """Read every tensor of a weights file, or of its parts, one by one, and check that its values are finite.

    Errors      those of `read_header` and `check_finite`
    """
    path = Path(path)
    read_header(path)
    for file in weight_files(path):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                check_finite({name: opened.get_tensor(name)}, path.name)


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that the network itself gives them, without those of what it was wrapped in.

    Formula     `module.` before every name is DataParallel's, `_orig_mod.` anywhere is that of `torch.compile`
    Errors      ValueError for two tensors of one name, as of a compiled and a plain copy
    """
    _check_state(state, "a network")
    plain = {}
    for name, value in state.items():
        own = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if own in plain:
            raise ValueError(
                f"expected weights of one network, got {own!r} twice, also as {name!r}; keep one of the copies."
            )
        plain[own] = value
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def filled(module: nn.Module, state: dict[str, Tensor], what: str) -> nn.Module:
    """The module with these weights, ready to be asked: in eval mode and without gradients of the weights.

    Errors      ValueError for weights that do not fit, are no floating-point numbers where such are due, or are not
                finite; `what` names the network and its file
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != got:
        name = next(n for n in sorted(wanted | got) if wanted.get(n) != got.get(n))
        missing = len(wanted.keys() - got.keys())
        surplus = len(got.keys() - wanted.keys())
        raise ValueError(
            f"expected weights of {what}, but {name!r} should have shape {wanted.get(name)} and has "
            f"{got.get(name)}; these weights belong to another architecture, or some are lost ({missing} missing, "
            f"{surplus} left over)."
        )
    for name, value in module.state_dict().items():
        if value.is_floating_point() != state[name].is_floating_point():
            raise ValueError(
                f"expected {name!r} of {what} as {str(value.dtype).removeprefix('torch.')}, got "
                f"{str(state[name].dtype).removeprefix('torch.')}; quantised weights are not read: save them as floats."
            )
    module.load_state_dict(check_finite(state, what))
    return module.eval().requires_grad_(False)


def card_line(content: dict) -> str:
    """The accuracy on a model card, in words; where it has one, also that under attack."""
    if "accuracy" not in content:
        return "no accuracy on its model card"

    def stated(a: dict) -> str:
        return (
            f"{a['correct'] / a['n']:.1%} [{a['low']:.1%}, {a['high']:.1%}] ({a['correct']} of {a['n']}, "
            "95 % Clopper-Pearson)"
        )

    sigma = content["accuracy"].get("sigma_pixel")
    noise = "" if sigma is None else f" under noise of sigma {sigma:g}"
    line = f"test accuracy{noise} {stated(content['accuracy'])}"
    hit = content.get("accuracy_under_attack")
    return (
        line
        if hit is None
        else (
            f"{line}, at most {stated(hit)} under {hit['attack']} in {hit['norm']} {hit['epsilon']:.3g}"
        )
    )


def card(path: Path) -> dict:
    """The model card inside a weights file, of whatever kind of network. Errors: as `network.read_header`."""
    return json.loads(read_header(path).get("card", "{}"))
