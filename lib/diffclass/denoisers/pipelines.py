"""Folders of diffusers' pipelines with an autoencoder: Stable Diffusion 1 and 2, Stable Diffusion 3, Flux, DiT.

As in `pretrained`, what a folder says is read or refused by name, and every weight comes from its files.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import noise, units
from diffclass.denoisers import latent
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.flow import FlowDenoiser
from diffclass.denoisers.latent import Autoencoder, LatentModel
from diffclass.denoisers.pretrained import ScheduledDenoiser, read_schedule, read_settings
from diffclass.storage.weights import check_finite

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPLATES = ("a photo of a {}.",)
TOGETHER = 32  # prompts that are encoded at once
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# What a flow's scheduler does to the times that its sampler visits; levels are chosen here without it.
SAMPLER_TIMES = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
# Settings of networks that are asked about something else than noise, time and text, and what says that they are not.
UNREAD = {
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "num_class_embeds": None,
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "guidance_embeds": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# Texts: prompts -> what the network is given for each


def _sd_texts(parts: dict, prompts: list[str]) -> tuple[Tensor]:
    """The hidden states of CLIP's text encoder. Shapes: N prompts -> [N,L,D]."""
    from diffusers import StableDiffusionPipeline  # here, not above: it takes seconds

    pipeline = StableDiffusionPipeline(
        **parts,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _check_lengths(parts["tokenizer"], prompts)
    place = parts["text_encoder"].device
    return (pipeline.encode_prompt(prompts, place, 1, False)[0],)


def _sd3_texts(parts: dict, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The hidden states of three text encoders, and two pooled ones. Shapes: N prompts -> [N,L,D], [N,E]."""
    from diffusers import StableDiffusion3Pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline(**{**absent, **parts}, scheduler=None)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        _check_lengths(parts[tokenizer], prompts)
    place = parts["text_encoder"].device
    texts, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, place, 1, False)
    return texts, pooled


def _flux_texts(parts: dict, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The hidden states of T5, and CLIP's pooled one. Shapes: N prompts -> [N,L,D], [N,E]."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline(**parts, scheduler=None)
    _check_lengths(parts["tokenizer"], prompts)
    place = parts["text_encoder"].device
    texts, pooled, _ = pipeline.encode_prompt(prompts, prompts, place, 1)
    return texts, pooled


def _check_lengths(tokenizer, prompts: list[str]) -> None:
    """Raise a ValueError for a prompt of which the end would be cut off, and with it perhaps the class."""
    most = tokenizer.model_max_length
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > most:
            raise ValueError(
                f"expected prompts of at most {most} tokens, as the text encoder reads, got {length} in {prompt[:40]!r}...; "
                "what is cut off may be the class: shorten the template."
            )


@dataclass(frozen=True)
class Family:
    """A kind of pipeline: the class of each of its parts, which of them may be absent, and how its network is asked.

    flow        whether its network predicts a velocity
    texts       parts, prompts -> what `asked` is given for each prompt; None for a network of numbered classes
    """

    parts: dict[str, str]
    network: str
    asked: Callable[..., nn.Module]
    flow: bool
    texts: Callable[[dict, list[str]], tuple[Tensor, ...]] | None
    absent: tuple[str, ...] = ()


CLIP = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
FAMILIES = {
    "StableDiffusionPipeline": Family(
        {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", **CLIP},
        "unet",
        latent.PromptedUNet,
        False,
        _sd_texts,
    ),
    "StableDiffusion3Pipeline": Family(
        {
            "vae": "AutoencoderKL",
            "transformer": "SD3Transformer2DModel",
            "text_encoder": "CLIPTextModelWithProjection",
            "tokenizer": "CLIPTokenizer",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "tokenizer_2": "CLIPTokenizer",
            "text_encoder_3": "T5EncoderModel",
            "tokenizer_3": "T5Tokenizer",
        },
        "transformer",
        latent.PromptedVelocity,
        True,
        _sd3_texts,
        ("text_encoder_3", "tokenizer_3"),
    ),
    "FluxPipeline": Family(
        {
            "vae": "AutoencoderKL",
            "transformer": "FluxTransformer2DModel",
            **CLIP,
            "text_encoder_2": "T5EncoderModel",
            "tokenizer_2": "T5Tokenizer",
        },
        "transformer",
        latent.PackedVelocity,
        True,
        _flux_texts,
    ),
    "DiTPipeline": Family(
        {"vae": "AutoencoderKL", "transformer": "DiTTransformer2DModel"},
        "transformer",
        latent.LabelledTransformer,
        False,
        None,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def from_pipeline(
    source: str | Path,
    names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    *,
    precision: str = "fp32",
    variant: str | None = None,
    size: int | None = None,
    place: torch.device | None = None,
) -> LatentModel:
    """A pipeline saved by diffusers as a model of latents whose classes are prompts.

    Shapes      source: a folder, or the name owner/pipeline of one on the Hugging Face hub, fetched once; names of K classes
                (of DiT some of its labels, or None for all); templates with one {}, of which DiT has no use; size: height
                and width of the pictures of Flux, whose config does not say it
    Precision   "fp32", "bf16" or, on an accelerator, "fp16"; place: where it is put, the CPU for None
    Classes     K x templates prompts, then the prompt "", or DiT's own null class, as "no class"
    Errors      FileNotFoundError for no folder, no network or a part that is missing; TypeError, ValueError for a pipeline,
                a scheduler, prompts or a precision that cannot be meant
    """
    dtype = PRECISIONS[units.chosen(precision, list(PRECISIONS), "the precision")]
    if precision == "fp16" and (place is None or place.type == "cpu"):
        raise ValueError(
            "expected a precision that a CPU computes in, got fp16 (half precision); pass precision='fp32' or 'bf16', or the "
            "place of an accelerator."
        )
    folder = _folder(source, variant)
    family = _family(folder)
    if family.texts is not None:
        prompts = [*latent.prompts_of(names, templates), ""]
    schedule = folder / "scheduler" / "scheduler_config.json"
    if not schedule.exists():
        raise FileNotFoundError(
            f"expected a pipeline folder with scheduler/{schedule.name}, found none in {folder.name}; fetch it again."
        )
    read = read_flow_schedule if family.flow else read_schedule
    *told, notes = read(schedule)
    parts = {
        part: _part(folder / part, kind, dtype, variant, place)
        for part, kind in _present(folder, family).items()
    }
    network = parts[family.network]
    shape = _latent_shape(network.config, parts["vae"].config, size)
    if family.texts is None:
        names, ids = _labels(folder, names, network.config.num_embeds_ada_norm)
        conditions = (torch.tensor(ids),)
        count = len(names)
    else:
        conditions = _encoded(family, parts, prompts)
        count = len(prompts) - 1
    asked = family.asked(network, *conditions)
    denoiser: Denoiser
    if family.flow:
        sigma_range, shift = told
        denoiser = FlowDenoiser(asked, count, shape, sigma_range, has_null=True, shift=shift)
    else:
        denoiser = ScheduledDenoiser(asked, *told, count, shape, has_null=True)
    denoiser.notes = (*denoiser.notes, *notes)
    model = LatentModel(denoiser, Autoencoder(parts["vae"], shape), names, count // len(names))
    return model.to(place or network.device).eval().requires_grad_(False)


def _folder(source: str | Path, variant: str | None) -> Path:
    """The folder of a pipeline, here or fetched by its name. Errors: FileNotFoundError for neither."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    why = "and it is no owner/pipeline of the Hugging Face hub"
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        from diffusers import DiffusionPipeline

        try:
            return Path(DiffusionPipeline.download(name, variant=variant, use_safetensors=True))
        # of the hub's client and of the network beneath it, which has classes of its own for every failure
        except Exception as error:
            why = f"and the hub did not give it ({str(error).splitlines()[0][:90]})"
    raise FileNotFoundError(
        f"expected a folder that diffusers saved, found none at {name!r}, {why}; where there is a network, run "
        "`hf download OWNER/PIPELINE --local-dir FOLDER`, and name the folder."
    )


def _family(folder: Path) -> Family:
    """The kind of pipeline in a folder. Errors: FileNotFoundError, ValueError for none that is read."""
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(
            f"expected a pipeline folder with model_index.json, found none in {folder.name}; name the folder above its "
            "parts, as pipeline.save_pretrained wrote it."
        )
    kind = read_settings(index).get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(
            f"expected one of {', '.join(FAMILIES)}, got {kind or 'no _class_name'} in {folder.name}; how other pipelines "
            "condition their networks is not known here."
        )
    return FAMILIES[kind]


def _present(folder: Path, family: Family) -> dict[str, str]:
    """The parts that a folder says it has, as far as they are needed. Errors: ValueError, FileNotFoundError."""
    index = read_settings(folder / "model_index.json")
    present = {}
    for part, wanted in family.parts.items():
        named = index.get(part)
        kind = named[1] if isinstance(named, list) and len(named) == 2 else None
        if kind is None:
            if part in family.absent:
                continue
            advice = (
                "prompts are its classes: save the pipeline with its text encoder and tokenizer"
                if part.startswith(("text", "token"))
                else "fetch the folder again"
            )
            raise ValueError(
                f"expected a pipeline with a {part}, got none in {folder.name}/model_index.json; {advice}."
            )
        if kind.removesuffix("Fast") != wanted:
            raise ValueError(
                f"expected a {wanted} as the {part} of {folder.name}, got {kind}, which is not read."
            )
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"expected a folder {part} in {folder.name}, as its model_index.json says, found none; fetch it again."
            )
        present[part] = kind
    return present


def _part(
    path: Path, kind: str, dtype: torch.dtype, variant: str | None, place: torch.device | None
):
    """A network or a tokenizer of a pipeline, every weight of it from its files.

    Errors      FileNotFoundError for no weights; ValueError for settings that it would drop, or weights that do not fit or
                are not finite
    """
    import diffusers
    import transformers

    own = kind in dir(diffusers)
    cls = getattr(diffusers if own else transformers, kind)
    if kind.endswith(("Tokenizer", "TokenizerFast")):
        return cls.from_pretrained(path, local_files_only=True)
    if own:
        _check_known(path, cls)
    precision = {"torch_dtype" if own else "dtype": dtype}
    try:
        network, found = cls.from_pretrained(
            path, variant=variant, local_files_only=True, output_loading_info=True, **precision
        )
    except OSError as error:
        raise FileNotFoundError(
            f"expected the weights of a {kind} in {path.name}, got none that load ({str(error).splitlines()[0][:160]}); "
            "name the variant, or fetch the folder again."
        ) from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"expected the weights of a {kind} in {path.name}, got some that are refused "
            f"({str(error).splitlines()[0][:160]}); fetch the folder again."
        ) from None
    lost = [*found["missing_keys"], *found["mismatched_keys"]]
    if lost:
        raise ValueError(
            f"expected every weight of a {kind} in {path.name}, got none that fits for {lost[0]!r} and {len(lost) - 1} more, "
            "which would be left at random; the file is another network's."
        )
    check_finite(network.state_dict(), f"a {kind} in {path.name}")
    return network.to(place or network.device).eval()


def _check_known(path: Path, cls) -> None:
    """Raise a ValueError for settings that a class would drop, or that make its network another than is asked here."""
    settings = read_settings(path / "config.json")
    known = inspect.signature(cls.__init__).parameters
    dropped = sorted(key for key in settings if not key.startswith("_") and key not in known)
    if dropped:
        raise ValueError(
            f"expected settings that {cls.__name__} knows, got {', '.join(dropped)}, which it would drop; was the file "
            "written by another version of diffusers?"
        )
    for key, silent in UNREAD.items():
        if settings.get(key, silent) != silent:
            raise ValueError(
                f"expected a {cls.__name__} that is told noise, time and text alone, got {key} = {settings[key]!r}; it is "
                "not read."
            )


def _latent_shape(network, vae, size: int | None) -> tuple[int, int, int]:
    """The latents that a network is asked about. Errors: ValueError for what the config leaves open, or says otherwise.

    Shapes      size: height and width of a picture, where the config has no sample_size -> (c, h, w)
    """
    packed = "sample_size" not in network
    factor = 2 ** (len(vae.block_out_channels) - 1)
    if packed:
        if size is None:
            raise ValueError(
                "expected the size of the pictures, which Flux's config does not say, got none; pass size=, such as 1024."
            )
        size = units.check_whole(size, "the size of pictures", least=1)
        if size % (2 * factor):
            raise ValueError(
                f"expected a size that {2 * factor} divides, two latents of the autoencoder, got {size}."
            )
        side = (size // factor, size // factor)
        channels = network.in_channels // 4
    else:
        if size is not None:
            raise ValueError(
                f"expected no size of pictures where the network has its own, got {size}; resize pictures before."
            )
        if network.sample_size is None:
            raise ValueError(
                "expected a network that says the size of its latents, got no sample_size in its config."
            )
        own = network.sample_size
        side = (own, own) if isinstance(own, int) else tuple(own)
        channels = network.in_channels
    returned = network.out_channels or network.in_channels
    learned_variance = network.get("num_embeds_ada_norm") and returned == 2 * network.in_channels
    if returned != network.in_channels and not learned_variance:
        raise ValueError(
            f"expected a network that returns its {network.in_channels} input channels, got {returned}; inpainting and depth "
            "networks take more than a picture, and are not read."
        )
    return (channels, *side)


def _encoded(family: Family, parts: dict, prompts: list[str]) -> tuple[Tensor, ...]:
    """What the network is given for each prompt. Shapes: N prompts -> tensors [N,...]."""
    with torch.no_grad():
        pieces = [
            family.texts(parts, prompts[start : start + TOGETHER])
            for start in range(0, len(prompts), TOGETHER)
        ]
    return tuple(torch.cat(same) for same in zip(*pieces, strict=True))


def _labels(folder: Path, names: Sequence[str] | None, count: int) -> tuple[list[str], list[int]]:
    """The classes of DiT by name, and their numbers with that of "no class" at the end.

    Shapes      names, each one of the labels, or None for all of `count` classes -> K names, K + 1 numbers
    Errors      those of `latent.check_names`; ValueError for a name that is no label, or labels of other classes
    """
    told = read_settings(folder / "model_index.json").get("id2label") or {}
    numbers = {}
    for number, label in told.items():
        for word in label.split(","):
            numbers[word.strip()] = int(number)
    if numbers and max(numbers.values()) >= count:
        raise ValueError(
            f"expected labels of the {count} classes that the transformer has, got number {max(numbers.values())}; the "
            "pipeline's id2label is another's."
        )
    if names is None:
        shown = [told.get(str(number), f"class {number}") for number in range(count)]
        return list(latent.check_names(shown)), [*range(count), count]
    names = latent.check_names(names)
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise ValueError(
            f"expected names among the {len(numbers)} labels of {folder.name}, got {unknown[0]!r}; a class-conditional "
            "pipeline knows no others."
        )
    chosen = [numbers[name] for name in names]
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"expected names of different classes, got {', '.join(names)}, of which two are one class."
        )
    return list(names), [*chosen, count]


def read_flow_schedule(
    path: Path,
) -> tuple[tuple[float, float], float, tuple[str, ...]]:
    """The levels between which a flow was trained, the shift of its scheduler, and what its sampler would do besides.

    Formula     sigma = t/(1 - t) of the second and the last but one of the times 0, 1/N, ..., 1, shifted once
    Why         from the settings, not from a scheduler: after `set_timesteps` its ends are shifted a second time
    Shapes      scheduler_config.json -> (low, high), shift, sentences
    Errors      ValueError for another scheduler, or settings that no scheduler of its class has
    """
    import diffusers

    settings = read_settings(path)
    name = settings.get("_class_name")
    if name not in FLOW_SCHEDULERS:
        raise ValueError(
            f"expected a scheduler of a flow ({', '.join(FLOW_SCHEDULERS)}), got {name or 'no _class_name'}; which noise its "
            "timesteps have is not known here, and is not guessed."
        )
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    dropped = sorted(key for key in settings if not key.startswith("_") and key not in known)
    if dropped or settings.get("invert_sigmas"):
        raise ValueError(
            f"expected settings of a {name} that runs from noise to pictures, got "
            f"{', '.join(dropped) or 'invert_sigmas'}; it is not read."
        )
    told = {key: p.default for key, p in known.items()} | settings
    steps = units.check_whole(told["num_train_timesteps"], "num_train_timesteps", least=3)
    notes = tuple(
        f"{key}: the sampler of this folder chooses its times by it, the levels here are chosen without it"
        for key in SAMPLER_TIMES
        if told.get(key)
    )
    shift = units.check_number(told["shift"], "the shift of a flow", above=0)
    if told.get("use_dynamic_shifting"):
        shift = 1.0
        notes += (
            "use_dynamic_shifting: the shift of this folder depends on the size of a picture (mu); none is used here",
        )
    ends = torch.tensor([1, steps - 1], dtype=torch.float64) / steps
    low, high = noise.sigma_of_flow_time(noise.shifted_time(ends, shift)).tolist()
    return (low, high), shift, notes
