"""Networks that others trained inside EDM's preconditioning, turned into denoisers of the course.

Files are read without running the code inside them.
"""

import io
import json
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffclass.denoisers.network import ConditionalDenoiser, build, save_denoiser
from diffclass.denoisers.pretrained import classes_of, load_unet, state_dict_of
from diffclass.noise import EDM_SIGMA_DATA
from diffclass.storage import files
from diffclass.storage.results import sha256_of
from diffclass.storage.weights import filled, unwrapped

EDM_RANGE = (0.002, 80.0)  # the noise levels between which EDM samples
SAID = (
    "sigma_data",
    "sigma_min",
    "sigma_max",
)  # what EDMPrecond says of its network beside the weights


def architecture_of(state: dict[str, Tensor]) -> dict:
    """The arguments of `SongUNet` that fit released weights, read off their names and shapes.

    Errors      ValueError that names what another architecture has: NCSN++'s Fourier features, ADM's output norm
    """
    state = state_dict_of(state, "the weights of a SongUNet")
    entries = [
        m for m in (re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name) for name in state) if m
    ]
    if len(entries) != 1 or "map_layer0.weight" not in state:
        raise ValueError(
            f"expected the weights of a SongUNet, such as enc.32x32_conv.weight, got {len(state)} others, "
            f"the first of them {sorted(state)[:3]}."
        )
    foreign = sorted(
        name
        for name in state
        if re.search(r"map_noise|_aux_(residual|skip|down|up)|^out_", name)
        or (name.endswith("resample_filter") and state[name].numel() != 4)
    )
    if foreign:
        raise ValueError(
            "expected a DDPM++ (EDM's files with -vp- in their names), got weights such as "
            f"{foreign[0]!r}, of another architecture."
        )
    size = int(entries[0][1])
    first = state[entries[0][0]]
    if first.ndim != 4:
        raise ValueError(
            f"expected {entries[0][0]} of shape [width,channels,3,3], got {list(first.shape)}."
        )
    width, channels = first.shape[:2]
    matches = (re.match(r"enc\.(\d+)x\1_block0\.", name) for name in state)
    sides = sorted({int(match[1]) for match in matches if match}, reverse=True)
    inputs = {
        what: state[f"map_{what}.weight"].shape[1] if f"map_{what}.weight" in state else 0
        for what in ("label", "augment")
    }
    return dict(
        channels=channels,
        size=size,
        labels=inputs["label"],
        augment=inputs["augment"],
        width=width,
        multiples=[len(state[f"enc.{s}x{s}_block0.conv1.bias"]) // width for s in sides],
        depth=sum(
            bool(re.fullmatch(rf"enc\.{size}x{size}_block\d+\.conv0\.weight", name))
            for name in state
        ),
        attention=[s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in state],
    )


class _Recorded:
    """An object of a pickle: what it holds, and none of its code."""

    def __init__(self, kind: str = "", state: dict | None = None):
        self.kind = kind
        self.state = state or {}

    def __setstate__(self, state):
        self.kind = ""
        self.state = state

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers by name, as `state_dict` would give them."""
        own = {**self.state.get("_parameters", {}), **self.state.get("_buffers", {})}
        passing = self.state.get("_non_persistent_buffers_set", ())
        tensors = {
            prefix + name: value
            for name, value in own.items()
            if isinstance(value, Tensor) and name not in passing
        }
        for name, part in self.state.get("_modules", {}).items():
            tensors |= part.tensors(f"{prefix}{name}.") if isinstance(part, _Recorded) else {}
        return tensors


class _TensorsOnly(pickle.Unpickler):
    """Unpickles tensors, numbers and containers. Code that travels in the file is recorded as a name and never run."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("dnnlib.util", "EasyDict"): dict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch.storage", "_load_from_bytes"): lambda content: torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        ),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: _Recorded(
            meta["class_name"], meta["state"]
        ),
        ("numpy", "dtype"): np.dtype,
        **{
            (f"numpy.{core}.multiarray", "scalar"): np.float64(0).__reduce__()[0]
            for core in ("core", "_core")
        },
    }

    def find_class(self, module, name):
        if module.startswith("torch.nn.modules."):
            return _Recorded
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")
        return self.ALLOWED[module, name]


def read_edm(path: str | Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights of a network that EDM released (.pkl), or of its state dict (.safetensors, or .pt of tensors only).

    Shapes      -> tensors by name, and what the file says of `SAID` (a state dict: in its header, or nothing)
    Errors      FileNotFoundError; ValueError for a file that asks for code, is damaged, or holds another kind of model
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a network at {path}, found no such file; check the name."
        )
    said = {}
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, framework="pt") as opened:
                header = opened.metadata() or {}
            said = {key: float(json.loads(header[key])) for key in SAID if key in header}
        elif path.suffix == ".pkl":
            state, said = _pickled(_TensorsOnly(io.BytesIO(path.read_bytes())).load())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RuntimeError,
        ValueError,
        OSError,
        SafetensorError,
    ) as reason:
        raise ValueError(
            f"expected {path.name} to hold the tensors of a network, got a file that is refused "
            f"({(str(reason).splitlines() or ['the file ends at once'])[0]}); fetch it again from its official source."
        ) from None
    state = unwrapped(state_dict_of(state, path.name))
    own = {name.removeprefix("model."): value for name, value in state.items()}
    if len(own) < len(state):
        twice = sorted(name for name in own if {name, f"model.{name}"} <= state.keys())
        raise ValueError(
            f"expected weights of one network in {path.name}, got {twice[0]!r} twice, also as 'model.{twice[0]}'; keep one "
            "of the copies."
        )
    return own, said


def _pickled(content) -> tuple[dict[str, Tensor], dict[str, float]]:
    net = content["ema"] if isinstance(content, dict) else content
    if net.kind != "EDMPrecond":
        raise TypeError(
            f"its network is scaled by {net.kind or type(net).__name__}, not by EDMPrecond"
        )
    return net.tensors(), {key: float(net.state[key]) for key in SAID if key in net.state}


def range_of(said: dict[str, float], what: str) -> tuple[float, float]:
    """The noise levels of a network of EDM: those of `EDM_RANGE` that it was made for.

    Errors      ValueError for another sigma_data than the one of this course's preconditioning, or a range without levels
    """
    sigma_data = said.get("sigma_data", EDM_SIGMA_DATA)
    if sigma_data != EDM_SIGMA_DATA:
        raise ValueError(
            f"expected a network scaled for sigma_data {EDM_SIGMA_DATA}, got {sigma_data:g} in {what}; with another scaling "
            "it would be another function."
        )
    unknown = [key for key, value in said.items() if math.isnan(value)]
    if unknown:
        raise ValueError(f"expected numbers in {what}, got NaN for its {unknown[0]}.")
    low = max(EDM_RANGE[0], said.get("sigma_min", 0.0))
    high = min(EDM_RANGE[1], said.get("sigma_max", EDM_RANGE[1]))
    if not low < high:
        raise ValueError(
            f"expected noise levels between {EDM_RANGE[0]:g} and {EDM_RANGE[1]:g}, got sigma_min {low:g} and sigma_max "
            f"{high:g} in {what}."
        )
    return low, high


def from_edm(path: str | Path) -> ConditionalDenoiser:
    """The denoiser in a file that EDM released, or in its state dict; without labels it answers without a class only.

    Source      Karras et al. 2022; `SongUNet` inside the same preconditioning as the course's own networks
    Meaning     a pickle says its sigma_data and the range of its sigma; a state dict, which cannot, is taken for one of
                EDM's own: sigma_data 0.5, levels of `EDM_RANGE`, unless its header says otherwise
    Errors      those of `read_edm`, `architecture_of` and `range_of`; ValueError for weights that are missing, left over or
                not finite
    """
    path = Path(path).expanduser()
    state, said = read_edm(path)
    with files.reading(f"the tensors of a SongUNet in {path.name}"):
        own = architecture_of(state)
        classes = own["labels"]
        size = own.pop("size")
        denoiser = build(
            "ConditionalDenoiser",
            "SongUNet",
            classes,
            (own.pop("channels"), size, size),
            sigma_range=range_of(said, path.name),
            has_null=classes == 0,
            **own,
        )
    kept = {
        f"network.{name}": value.float()
        for name, value in state.items()
        if not name.endswith("resample_filter")
    }
    return filled(denoiser, kept, f"a SongUNet in {path.name}")


def convert(source: str | Path, out: str | Path) -> tuple[ConditionalDenoiser, dict]:
    """Write the denoiser in a file that EDM released as weights of the course; returns it with its model card.

    Errors      those of `from_edm`
    """
    source, out, denoiser = Path(source), Path(out), from_edm(source)
    card = dict(
        name=out.name,
        source=source.name,
        source_sha256=sha256_of(source),
        parameters=sum(value.numel() for value in denoiser.parameters()),
        command=f"diffclass convert {source.name}",
        data="as trained by its authors, not by this course",
    )
    save_denoiser(denoiser, out, card)
    return denoiser, card


def from_edm_unet(
    folder: str | Path, num_classes: int, variant: str | None = None
) -> ConditionalDenoiser:
    """A `UNet2DModel` folder trained inside EDM's preconditioning at the timestep 250 ln sigma, as this course trains.

    Shapes      num_classes K; a network with K + 1 class embeddings also has the null class, its last
    Errors      those of `pretrained.load_unet`; ValueError for another number of embeddings, blocks that `UNet` does not
                have, or a scheduler beside it, which would tell the network other times
    """
    folder = Path(folder)
    for schedule in (
        folder / "scheduler_config.json",
        folder.parent / "scheduler/scheduler_config.json",
    ):
        if schedule.exists():
            raise ValueError(
                f"expected a U-Net that is told 250 ln sigma, got one beside {schedule.name}, which tells it other times; "
                "use pretrained.from_diffusers, if that scheduler walks a chain."
            )
    unet = load_unet(folder, variant)
    config = unet.config
    classes, image_shape, has_null = classes_of(config, num_classes)
    denoiser = build(
        "ConditionalDenoiser",
        "UNet",
        classes,
        image_shape,
        has_null=has_null,
        widths=tuple(config.block_out_channels),
        layers=config.layers_per_block,
        dropout=config.dropout,
        attention="AttnDownBlock2D" in config.down_block_types,
    )
    ours = denoiser.network.unet.config
    told = {
        key: value
        for key, value in ours.items()
        if not key.startswith("_") and key != "num_train_timesteps"
    }
    differing = sorted(
        key for key, value in told.items() if _plain(config.get(key)) != _plain(value)
    )
    if differing:
        raise ValueError(
            f"expected a U-Net built as `UNet` builds it, got other values of {', '.join(differing)}."
        )
    filled(denoiser.network.unet, unet.state_dict(), f"a UNet2DModel in {folder.name}")
    return denoiser.eval().requires_grad_(False)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
