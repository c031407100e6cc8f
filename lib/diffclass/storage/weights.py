"""Weights as safetensors that name their architecture and carry their model card."""

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pass


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


def card_line(content: dict) -> str:
    """The accuracy on a model card, in words; where it has one, also that under attack."""
    if "accuracy" not in content:
        return "no accuracy on its model card"

    def stated(a: dict) -> str:
        return (
            f"{a['correct'] / a['n']:.1%} [{a['low']:.1%}, {a['high']:.1%}] ({a['correct']} of {a['n']}, "
            "95 % Clopper-Pearson)"
        )

    line = f"test accuracy {stated(content['accuracy'])}"
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
