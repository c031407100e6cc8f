"""Networks that others trained, behind the one interface: timesteps and noise, v or x0 prediction vanish in here.

What a folder says of its network is read, or refused by name: nothing that it leaves out, or says otherwise, is replaced by
a guess. The only defaults are those of the class that it names, which diffusers fills in too.
"""

import inspect
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffclass import noise, units
from diffclass.denoisers.base import Denoiser
from diffclass.storage.weights import filled, unwrapped

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # diffusers' names for noise, v and x0

# Schedulers of diffusers that all walk the same chain: their `betas` say which noise each timestep has.
CHAIN_SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
# What a scheduler's settings say of how the network was trained: a class that does not know one of them would drop it.
TRAINING_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# Settings of another kind of network, and the values with which they say nothing.
FOREIGN_SETTINGS = {
    "sigma_data": None,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "predict_epsilon": True,
}
# Names of attention in networks that were saved before 2023.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ScheduledDenoiser(Denoiser):
    """A network of a variance-preserving chain, asked at noise levels instead of timesteps.

    Formula     z = x_sigma / sqrt(1 + sigma^2) is the chain's image at the t with sigma_t = sigma; with a = 1/sqrt(1 +
                sigma^2), b = sigma a:  D = (z - b eps)/a,  D = a z - b v,  or the output itself for x0 prediction
    Source      Ho et al. 2020; Salimans & Ho 2022 for v; Lin et al. 2024 for a last step of pure noise
    Shapes      network(z [B,C,H,W], t [B], class_labels=[B] or None).sample -> [B,C,H,W]; t between two steps is
                interpolated in ln sigma
    Errors      ValueError for a prediction or betas that cannot be meant, or a level that the chain does not have

    A last beta of 1 (zero terminal SNR) is a step of pure noise, sigma infinite: the steps before it are the levels, and
    `notes` says so. `notes` also names what a sampler would do to each estimate and this denoiser does not.
    """

    def __init__(
        self,
        network: nn.Module,
        betas: Tensor,
        predicts: str,
        num_classes: int,
        image_shape: tuple[int, int, int],
        has_null: bool = False,
    ):
        super().__init__()
        if predicts not in PREDICTIONS:
            raise ValueError(
                f"expected a network that predicts one of {', '.join(PREDICTIONS)}, got {predicts!r}."
            )
        betas = units.check_reals(betas, "betas").double()
        if betas.ndim != 1 or not bool(torch.isfinite(betas).all()):
            raise ValueError(
                f"expected finite betas, one for each timestep, got shape {list(betas.shape)} with "
                f"{int((~torch.isfinite(betas)).sum())} NaN or infinite values."
            )
        self.notes: tuple[str, ...] = ()
        pure_noise = len(betas) > 2 and float(betas[-1]) == 1
        if pure_noise:
            betas = betas[:-1]
        levels = noise.sigma_of_alpha_bar(noise.alpha_bar(betas))
        if pure_noise:
            self.notes = (
                f"zero terminal SNR: the last of {len(betas) + 1} timesteps is pure noise, so levels end at sigma "
                f"{float(levels[-1]):.4g}, one step before it",
            )
        self.network = network
        self.predicts = predicts
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        # a network without classes answers the question without a class only
        self.has_null = has_null or num_classes == 0
        self.sigma_range = (float(levels[0]), float(levels[-1]))
        self.register_buffer("log_levels", levels.log().float())

    def grid(self, count: int) -> noise.Levels:
        """`count` levels, evenly spread over the timesteps. Errors: those of `noise.timestep_levels`."""
        return noise.timestep_levels(self.log_levels.double().exp(), count)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The time, between steps too, at which the chain has this noise level. Shapes: [B] -> [B].

        Errors      ValueError for a level outside the chain, where the network would be told another one than it sees
        """
        at = (
            self.check_levels(sigma)
            .log()
            .float()
            .clamp(self.log_levels[0], self.log_levels[-1])
            .contiguous()
        )
        right = torch.searchsorted(self.log_levels, at).clamp(1, len(self.log_levels) - 1)
        low = self.log_levels[right - 1]
        high = self.log_levels[right]
        return right - 1 + (at - low) / (high - low)

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        times = len(classes)
        (images, own) = (len(x_sigma), self.image_shape)
        labels = classes.repeat(images) if self.num_classes else None
        signal = (1 + sigma**2).rsqrt().repeat_interleave(times)[:, None, None, None]
        spread = sigma.repeat_interleave(times)[:, None, None, None] * signal
        z = x_sigma.repeat_interleave(times, 0) * signal
        out = self.network(
            z, self.timestep(sigma).repeat_interleave(times).to(z), class_labels=labels
        ).sample
        x0 = {
            "epsilon": lambda: (z - spread * out) / signal,
            "v_prediction": lambda: signal * z - spread * out,
            "sample": lambda: out,
        }[self.predicts]()
        return x0.reshape(images, times, *own)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of diffusers


def from_diffusers(
    folder: str | Path, num_classes: int | None = None, variant: str | None = None
) -> ScheduledDenoiser:
    """The denoiser in a pipeline folder of diffusers: its U-Net and what its scheduler says of it.

    Shapes      parts in `unet/` and `scheduler/`, or everything at the root; num_classes K: as many class embeddings as
                the config says, or one less where the last of them means "no class"
    Errors      FileNotFoundError or ValueError that says which part is missing or cannot be meant; `variant` names one of
                several weights, such as "fp16"
    """
    folder = Path(folder)
    place = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    schedule = folder / "scheduler" / "scheduler_config.json"
    if not schedule.exists():
        schedule = folder / "scheduler_config.json"
    for part, path in (("unet", place / "config.json"), ("scheduler", schedule)):
        if not path.exists():
            raise FileNotFoundError(
                f"expected a pipeline folder with {part}/{path.name}, found none in {folder.name}, nor at its root; a lone "
                "UNet2DModel does not say what it predicts, nor at which noise."
            )
    unet = load_unet(place, variant)
    betas, predicts, notes = read_schedule(schedule)
    denoiser = ScheduledDenoiser(
        unet,
        betas,
        predicts,
        *classes_of(unet.config, num_classes),
    )
    denoiser.notes = (*denoiser.notes, *notes)
    return denoiser.eval()


def read_settings(path: Path) -> dict:
    """What a JSON file of settings says. Errors: ValueError for a file that is not JSON, or no settings by name."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"expected settings as JSON in {path.name}, got a file that is not ({error}); fetch it again."
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"expected settings by name in {path.name}, got a {type(settings).__name__}; fetch it again."
        )
    return settings


def read_schedule(path: Path) -> tuple[Tensor, str, tuple[str, ...]]:
    """The betas of a scheduler's settings, what its network predicts, and what its sampler would do besides.

    Shapes      scheduler_config.json -> betas [T], one of PREDICTIONS, sentences
    Errors      ValueError for a class that is not named or walks another chain, and for settings that its class drops
    """
    import diffusers  # here, not above: it takes seconds

    settings = read_settings(path)
    name = settings.get("_class_name")
    if name not in CHAIN_SCHEDULERS:
        raise ValueError(
            f"expected a scheduler of a variance-preserving chain ({', '.join(CHAIN_SCHEDULERS)}), got "
            f"{name or 'no _class_name'}; {_needed(str(name))}."
        )
    for key, silent in FOREIGN_SETTINGS.items():
        if key in settings and settings[key] != silent:
            raise ValueError(
                f"expected a {name} of a chain of timesteps, got {key} = {settings[key]!r}, which says that the network "
                "was trained for something else; it is not read."
            )
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    dropped = [
        key for key in TRAINING_SETTINGS if settings.get(key) is not None and key not in known
    ]
    if dropped:
        raise ValueError(
            f"expected settings that {name} knows, got {', '.join(dropped)}, which it would drop; name the scheduler with "
            "which the network was trained."
        )
    try:
        scheduler = kind.from_config(settings)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected settings that {name} can be made with, got some that are refused ({error})."
        ) from None
    betas = scheduler.betas.double()
    if len(betas) != scheduler.config.num_train_timesteps:
        raise ValueError(
            f"expected a beta for each of {scheduler.config.num_train_timesteps} timesteps, got {len(betas)} trained_betas."
        )
    clipping = [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]
    notes = tuple(
        f"{key}: the sampler of this folder keeps each estimate in range, this denoiser leaves it as it is"
        for key in clipping
    )
    return betas, scheduler.config.prediction_type, notes


def _needed(name: str) -> str:
    """What a network with another scheduler would need to be read."""
    if "Flow" in name or name in (
        "SCMScheduler",
        "PiflowScheduler",
        "LTXEulerAncestralRFScheduler",
    ):
        return (
            "a flow-matching network mixes (1 - t) x + t eps and predicts a velocity: `pipelines.from_pipeline` reads the "
            "pipelines of Stable Diffusion 3 and Flux"
        )
    if "EDM" in name or name == "CosineDPMSolverMultistepScheduler":
        return (
            "an EDM network is scaled by its sigma_data and told ln(sigma)/4; `edm.from_edm` reads EDM's own files, "
            "`edm.from_edm_unet` those of this course"
        )
    return "which noise its timesteps have is not known here, and is not guessed"


def classes_of(config, num_classes: int | None) -> tuple[int, tuple[int, int, int], bool]:
    """How many classes a `UNet2DModel` has, the shape of its pictures, and whether its last embedding is "no class".

    Shapes      -> K, (C,H,W), has_null
    Errors      ValueError for what the config leaves open, or says and this course does not read
    """
    if config.sample_size is None:
        raise ValueError(
            "expected a U-Net that says the size of its pictures, got no sample_size in its config."
        )
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"expected a U-Net that returns its {config.in_channels} input channels, got "
            f"{config.out_channels}; a learned variance is not read: keep its first half."
        )
    unread = {
        "class_embed_type": (None,),
        "time_embedding_type": ("positional",),
        "center_input_sample": (False,),
    }
    for key, read in unread.items():
        if config.get(key) not in read:
            raise ValueError(
                f"expected a U-Net with {key} = {read[0]!r}, got {config.get(key)!r}; it is asked about another input, and "
                "is not read."
            )
    embeddings = config.num_class_embeds or 0
    classes = embeddings if num_classes is None else num_classes
    if classes not in (embeddings, embeddings - 1) or (embeddings and classes < 1):
        raise ValueError(f"expected {classes} or {classes + 1} class embeddings, got {embeddings}.")
    return classes, (config.in_channels, height, width), classes < embeddings


def load_unet(folder: Path, variant: str | None = None) -> nn.Module:
    """The `UNet2DModel` in a folder, every weight of it from the file; ready to be asked.

    Errors      FileNotFoundError for no weights; ValueError for another model, settings that it would drop, several
                weights, or weights that do not fit or are not finite
    """
    from diffusers import UNet2DModel  # here, not above: it takes seconds

    folder = Path(folder)
    settings = read_settings(folder / "config.json")
    name = settings.get("_class_name")
    if name != "UNet2DModel":
        raise ValueError(
            f"expected a UNet2DModel, got {name or 'no _class_name'} in {folder.name}/config.json; `pipelines.from_pipeline` "
            "reads text-to-image pipelines; networks of other kinds are not read."
        )
    known = inspect.signature(UNet2DModel.__init__).parameters
    unknown = sorted(key for key in settings if not key.startswith("_") and key not in known)
    if unknown:
        raise ValueError(
            f"expected settings that UNet2DModel knows, got {', '.join(unknown)}, which it would drop; was the file "
            "written by another version of diffusers?"
        )
    unet = UNet2DModel.from_config(settings)
    files = unet_files(folder, variant)
    state = {}
    for file in files:
        state |= _tensors(file)
    named = {_present_name(name): value for name, value in unwrapped(state).items()}
    return filled(unet, named, f"a UNet2DModel in {files[0].name}")


def _present_name(name: str) -> str:
    """The name that a weight of attention has today."""
    whole, dot, last = name.rpartition(".")
    parent, _, own = whole.rpartition(".")
    if "attentions." in parent and own in RENAMED:
        return f"{parent}.{RENAMED[own]}{dot}{last}"
    return name


def unet_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a network's weights in a folder of diffusers: one, or the parts that an index names.

    Errors      FileNotFoundError for none, or a part that is missing; ValueError for several to choose from
    """
    stem = "diffusion_pytorch_model"
    sets = {}
    for ending in (".safetensors", ".bin"):
        for path in sorted(folder.glob(f"{stem}*{ending}")):
            kind = path.name.removeprefix(stem).removesuffix(ending)
            if "-of-" not in kind:
                sets.setdefault(kind.removeprefix("."), [path])
    for index in sorted(folder.glob(f"{stem}*.index*.json")):
        own = index.name.removeprefix(stem).removesuffix(".json").replace(".index", "")
        kind = own.replace(".safetensors", "").replace(".bin", "").removeprefix(".")
        parts = sorted(set(read_settings(index).get("weight_map", {}).values()))
        sets.setdefault(kind, [folder / Path(part).name for part in parts])
    plain = "" if variant is None else variant
    if plain not in sets and (variant is not None or len(sets) != 1):
        listed = ", ".join(repr(kind or "no variant") for kind in sets)
        if sets:
            raise ValueError(
                f"expected one file of weights in {folder.name}, got the variants {listed} to choose from; say which as "
                "variant=."
            )
        raise FileNotFoundError(
            f"expected weights such as {stem}.safetensors in {folder.name}, found none; fetch the folder again."
        )
    files = sets[plain] if plain in sets else next(iter(sets.values()))
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise FileNotFoundError(
            f"expected {len(files)} files of weights in {folder.name}, found no {', '.join(missing)}; fetch it again."
        )
    return files


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; no code in it is run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"expected {path.name} to hold the tensors of a network, got a file that is refused "
            f"({str(error).splitlines()[0]}); fetch it again."
        ) from None
    return state_dict_of(state, path.name)


def state_dict_of(state, what: str) -> dict[str, Tensor]:
    """Return weights by name if it is that and nothing else, else raise a ValueError that says what it is."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"expected tensors by name in {what}, got a {type(state).__name__}; save network.state_dict()."
        )
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise ValueError(
            f"expected nothing but tensors in {what}, got {', '.join(map(repr, others[:3])) or 'nothing'} too; save the "
            "state_dict of the one network that is meant."
        )
    return state
