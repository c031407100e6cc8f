"""Networks that others trained inside EDM's preconditioning, turned into denoisers of the course.

Files are read without running the code inside them.
"""

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffclass.denoisers.network import ConditionalDenoiser, build, save_denoiser
from diffclass.storage.results import sha256_of
from diffclass.storage.weights import filled

EDM_RANGE = (0.002, 80.0)  # the noise levels between which EDM samples


def architecture_of(state: dict[str, Tensor]) -> dict:
    """The arguments of `SongUNet` that fit released weights, read off their names and shapes.

    Errors      ValueError that names what another architecture has: NCSN++'s Fourier features, ADM's output norm
    """
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
    width, channels = state[entries[0][0]].shape[:2]
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


def read_edm(path: str | Path) -> dict[str, Tensor]:
    """The weights of a network that EDM released (.pkl), or of its state dict (.safetensors, or .pt of tensors only).

    Errors      FileNotFoundError; ValueError for a file that asks for code, is damaged, or holds another kind of model
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a network at {path}, found no such file; check the name."
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix == ".pkl":
            state = _pickled(_TensorsOnly(io.BytesIO(path.read_bytes())).load())
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
        OSError,
        SafetensorError,
    ) as reason:
        raise ValueError(
            f"expected {path.name} to hold the tensors of a network, got a file that is refused "
            f"({str(reason).splitlines()[0]}); fetch it again from its official source."
        ) from None
    return {name.removeprefix("model."): value for name, value in state.items()}


def _pickled(content) -> dict[str, Tensor]:
    net = content["ema"] if isinstance(content, dict) else content
    if net.kind != "EDMPrecond":
        raise TypeError(
            f"its network is scaled by {net.kind or type(net).__name__}, not by EDMPrecond"
        )
    return net.tensors()


def from_edm(path: str | Path) -> ConditionalDenoiser:
    """The denoiser in a file that EDM released, or in its state dict; without labels it answers without a class only.

    Source      Karras et al. 2022; `SongUNet` inside the same preconditioning as the course's own networks
    Errors      those of `read_edm` and `architecture_of`; ValueError for weights that are missing or left over
    """
    path = Path(path).expanduser()
    state = read_edm(path)
    own = architecture_of(state)
    classes = own["labels"]
    size = own.pop("size")
    denoiser = build(
        "ConditionalDenoiser",
        "SongUNet",
        classes,
        (own.pop("channels"), size, size),
        sigma_range=EDM_RANGE,
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


def from_edm_unet(folder: str | Path, num_classes: int) -> ConditionalDenoiser:
    """A `UNet2DModel` folder trained inside EDM's preconditioning at the timestep 250 ln sigma, as this course trains.

    Shapes      num_classes K; a network with K + 1 class embeddings also has the null class, its last
    Errors      ValueError for another number of embeddings, or blocks that `UNet` does not have
    """
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(Path(folder), local_files_only=True)
    config = unet.config
    if config.num_class_embeds not in (num_classes, num_classes + 1):
        raise ValueError(
            f"expected {num_classes} or {num_classes + 1} class embeddings, got "
            f"{config.num_class_embeds}."
        )
    denoiser = build(
        "ConditionalDenoiser",
        "UNet",
        num_classes,
        (config.in_channels,) + 2 * (config.sample_size,),
        has_null=config.num_class_embeds > num_classes,
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
    denoiser.network.unet.load_state_dict(unet.float().state_dict())
    return denoiser.eval().requires_grad_(False)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
