"""How every network of `assets/` is made: one table, a recipe for each weights file.

A recipe is data and small functions: how the network is built, what it is trained by, how it is measured and saved.
A new kind of network is a function that makes recipes of it; a new network is an entry.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers import attention, bridges, cnn, idc, joint
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.bridges import Bridge
from diffclass.data.worlds import BUDGETS
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.lora import Adapter
from diffclass.training import losses, measures, smoothing
from diffclass.training.hardening import Hardening, Inner, adversarial_loss, hardening_loss
from diffclass.training.joint import Chains, joint_loss
from diffclass.training.losses import Loss
from diffclass.training.measures import Measure
from diffclass.training.optimisers import Optimiser
from diffclass.training.truth import Truth, truth_loss
from diffclass.zoo import networks


@dataclass(frozen=True)
class Beginning:
    """What a network is built from.

    shape    (C, H, W) of its pictures, of `classes` classes
    widths   channels in place of the recipe's, for a dry run; None for the recipe's
    given    the network in the same folder that it needs, None for most
    """

    shape: tuple[int, int, int]
    classes: int
    seed: int = 0
    widths: tuple[int, ...] | None = None
    given: nn.Module | None = None


def as_they_are(images: Tensor) -> Tensor:
    """The same images."""
    return images


def nothing(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> dict:
    """The measure of a run that is not watched."""
    return {}


def denoiser_in(path: Path) -> nn.Module:
    """The denoiser of a weights file. Errors: those of `network.load_denoiser`."""
    return network.load_denoiser(path)[0]


def plain_in(path: Path) -> nn.Module:
    """The plain network of a weights file. Errors: those of `cnn.load`."""
    return cnn.load(path)[0]


@dataclass(frozen=True)
class Recipe:
    """How one network is made.

    world, method  by which `diffclass train WORLD --method METHOD` knows it, with `sigma` where it has one
    build          Beginning -> the network before its first step; all randomness is from the seed
    loss           Beginning -> what it is trained by
    pictures       images in [0,1] -> what the loss is given
    needs          the file beside it that it begins with: a teacher to copy, or weights to go on from; None for most
    reads          the path of that file -> the network in it
    measure        of the test images (the first `measured`, None for all) -> what its card states
    watch          of the first `watched` test images, twenty times along the run -> a point of its card's curve
    save           (network, path, card): writes its file
    config         network -> its architecture, for the card
    says           what else the card says of it, JSON values
    compiled       where there is an accelerator
    optimiser      (network, rate) -> what changes its weights
    sigma          of the noise that its pictures carry, in pixels; None for most
    kept           how many steps lie between weights that are put away along the run; None for none but the last
    """

    world: str
    method: str
    steps: int
    batch: int
    rate: float
    build: Callable[[Beginning], nn.Module]
    loss: Callable[[Beginning], Loss]
    measure: Measure
    save: Callable[[nn.Module, Path, dict], None]
    config: Callable[[nn.Module], dict]
    says: dict
    pictures: Callable[[Tensor], Tensor] = units.to_model
    needs: str | None = None
    reads: Callable[[Path], nn.Module] = denoiser_in
    measured: int | None = None
    watch: Measure = nothing
    watched: int = 0
    ema: float = 0.995
    mirror: bool = False
    precision: str = "fp32"
    compiled: bool = False
    optimiser: Callable[[nn.Module, float], Optimiser] = Optimiser
    sigma: float | None = None
    kept: int | None = None

    @property
    def command(self) -> str:
        """The command that trains the network."""
        parts = ["diffclass train", self.world]
        if self.method != "diffusion":
            parts.append(f"--method {self.method}")
        if self.sigma is not None:
            parts.append(f"--sigma {self.sigma:g}")
        return " ".join(parts)


def from_data(loss: Loss) -> Callable[[Beginning], Loss]:
    """A loss that needs no other network."""
    return lambda beginning: loss


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers


def denoiser(
    world: str,
    method: str,
    build: Callable[[Beginning], Denoiser],
    loss: Callable[[Beginning], Loss],
    *,
    levels: int,
    span: measures.Span | None = None,
    measure: Measure | None = None,
    stored: torch.dtype = torch.float32,
    precision: str = "fp32",
    measured: int = 400,
    **settings,
) -> Recipe:
    """The recipe of a denoiser, measured as the diffusion classifier of its world at so many levels.

    Shapes      span: of the levels, None for its world's; stored: the precision of its weights file; settings: other
                fields of `Recipe`
    """
    span = span or networks.RANGES[world]
    return Recipe(
        world,
        method,
        build=build,
        loss=loss,
        measure=measure or measures.bayes_accuracy(span, levels, precision),
        watch=measures.bayes_curve(span, precision),
        save=partial(network.save_denoiser, dtype=stored),
        config=network.describe,
        precision=precision,
        measured=measured,
        **settings,
    )


def several_widths(widths: tuple[int, ...]) -> dict:
    """The configuration of a U-Net, which has a width at each resolution."""
    return dict(widths=widths)


def one_width(widths: tuple[int, ...]) -> dict:
    """The configuration of a network of one width: the first."""
    return dict(width=widths[0])


def fresh(
    kind: str, name: str, resized: Callable[[tuple[int, ...]], dict] = one_width, **config
) -> Callable[[Beginning], Denoiser]:
    """A denoiser with first weights; it has a null class, unless it copies a teacher that has none.

    Shapes      resized: widths of a dry run -> configuration
    """

    def build(beginning: Beginning) -> Denoiser:
        teacher = beginning.given
        own = resized(beginning.widths) if beginning.widths else {}
        return network.build(
            kind,
            name,
            beginning.classes,
            beginning.shape,
            has_null=teacher is None or teacher.has_null,
            seed=beginning.seed,
            **{**config, **own},
        )

    return build


def going_on(file: str) -> Callable[[Beginning], nn.Module]:
    """The network of a file, to be trained on. Errors: ValueError for widths, which are those of the file."""

    def build(beginning: Beginning) -> nn.Module:
        if beginning.widths:
            raise ValueError(
                f"expected no widths for a network that goes on from {file}, got {beginning.widths}."
            )
        return beginning.given.requires_grad_(True)

    return build


def copying(beginning: Beginning) -> Loss:
    """The loss of a student: to answer as its teacher does."""
    return losses.distillation_loss(beginning.given)


def origin(teacher: str | None = None, start: str | None = None, contrastive: bool = False) -> dict:
    """What the card of a denoiser says of what it learned from: a teacher, weights to start from, or data alone."""
    return dict(teacher=teacher, contrastive=contrastive, start=start)


def hardened(
    world: str,
    start: str,
    inner: Inner,
    *,
    levels: int,
    precision: str = "fp32",
    choices: dict | None = None,
    **settings,
) -> Recipe:
    """The recipe of a denoiser that goes on from the weights `start`, on the images that fool it.

    Shapes      choices: other fields of `Hardening`; settings: other fields of `Recipe`
    """
    span = networks.range_of(networks.HARDENED[world])
    hardening = Hardening(inner, *span, **(choices or {}))
    return denoiser(
        world,
        "adversarial-dc",
        going_on(start),
        from_data(hardening_loss(hardening)),
        needs=start,
        levels=levels,
        precision=precision,
        span=span,
        measure=measures.bayes_under_attack(span, levels, precision, inner.epsilon),
        says=origin(start=start) | dict(hardening=asdict(hardening)),
        **settings,
    )


# of a world's network: its convolutions, and what level and class say to them
ADAPTED_LAYERS = {
    "digits": ("conv1", "conv2", "modulate"),
    "cifar10": ("conv1", "conv2", "time_emb_proj"),
}


def beside(file: str, layers: tuple[str, ...], rank: int) -> Callable[[Beginning], Denoiser]:
    """A copy of the network of a file with a fresh adapter. Errors: ValueError for widths, which are those of the file."""

    def build(beginning: Beginning) -> Denoiser:
        if beginning.widths:
            raise ValueError(
                f"expected no widths for an adapter beside {file}, got {beginning.widths}."
            )
        return Adapter.beside(beginning.given, layers, rank, seed=beginning.seed).denoiser

    return build


def save_adapter(adapted: nn.Module, path: Path, card: dict) -> None:
    """Write the adapter of a denoiser alone. Errors: those of `lora.Adapter.save`."""
    Adapter.of(adapted).save(path, card)


def truth_maximised(
    world: str,
    method: str,
    inner: Inner,
    *,
    levels: int,
    rank: int,
    choices: dict | None = None,
    whole: bool = False,
    **settings,
) -> Recipe:
    """The recipe of an adapter beside its world's network that raises the truth of attacked images.

    Shapes      choices: other fields of `Truth`; whole: all weights learn, in place of an adapter; settings: other fields
                of `Recipe`
    """
    start = networks.BENEATH[world]
    span = networks.range_of(networks.TRUTH[world][method])
    truth = Truth(inner, *span, **(choices or {}))

    def surrogate() -> Classifier:
        return cnn.load(networks.trained(networks.BASELINES[world]["cnn"]))[0]

    recipe = denoiser(
        world,
        method,
        going_on(start) if whole else beside(start, ADAPTED_LAYERS[world], rank),
        from_data(truth_loss(truth, surrogate)),
        needs=start,
        levels=levels,
        span=span,
        measure=measures.bayes_under_both(span, levels, inner.epsilon, surrogate),
        says=origin(start=start) | dict(truth=asdict(truth), rank=rank),
        **settings,
    )
    return recipe if whole else replace(recipe, save=save_adapter)


# ---------------------------------------------------------------------------------------------------------------------
# Plain classifiers and translators


def built(
    kind: type[cnn.Plain],
    resized: Callable[[tuple[int, ...]], dict] = several_widths,
    **config,
) -> Callable[[Beginning], cnn.Plain]:
    """A plain network with first weights. Shapes: resized: widths of a dry run -> configuration."""

    def build(beginning: Beginning) -> cnn.Plain:
        own = resized(beginning.widths) if beginning.widths else {}
        return kind(beginning.shape, beginning.classes, seed=beginning.seed, **{**config, **own})

    return build


def with_chains(
    network: Callable[[Beginning], cnn.WideClassifier], chains: int
) -> Callable[[Beginning], joint.JointClassifier]:
    """A network with so many chains that have not moved yet."""
    return lambda beginning: joint.JointClassifier.begun(network(beginning), chains, beginning.seed)


def classifier(
    world: str,
    method: str,
    loss: Loss,
    network: Callable[[Beginning], Classifier],
    *,
    attacked: int,
    says: dict,
    save: Callable[[nn.Module, Path, dict], None] = cnn.save,
    config: Callable[[nn.Module], dict] = cnn.described,
    **settings,
) -> Recipe:
    """The recipe of a deterministic classifier, measured on clean images and, of the first `attacked`, under attack."""
    epsilon = BUDGETS[world]["linf"]
    return Recipe(
        world,
        method,
        build=network,
        loss=from_data(loss),
        measure=measures.attacked_accuracy(epsilon, attacked),
        watch=measures.attacked_curve(epsilon),
        watched=200,
        save=save,
        config=config,
        says=dict(recipe=says),
        pictures=as_they_are,
        **settings,
    )


def plain(world: str, method: str = "cnn", *, crop: int = 0, **settings) -> Recipe:
    """The recipe of a plain network that learns from clean images, moved by up to `crop` pixels."""
    loss = losses.classification_loss(crop)
    return classifier(world, method, loss, says=dict(crop=crop, inner=None), **settings)


def adversarial(
    world: str, inner: Inner, method: str = "adversarial", *, crop: int = 0, **settings
) -> Recipe:
    """The recipe of a plain network that learns from each batch's worst case."""
    loss = adversarial_loss(inner, crop)
    return classifier(world, method, loss, says=dict(crop=crop, inner=asdict(inner)), **settings)


def adversarial_from(world: str, inner: Inner, method: str, start: str, **settings) -> Recipe:
    """The same for a plain network that goes on from the weights `start`."""
    own = settings | dict(network=going_on(start))
    recipe = adversarial(world, inner, method, **own)
    says = recipe.says | origin(start=start)
    return replace(recipe, needs=start, reads=plain_in, says=says)


def jem(
    world: str,
    chains: Chains,
    *,
    network: Callable[[Beginning], cnn.WideClassifier],
    replay: int,
    written: int | None = None,
    **settings,
) -> Recipe:
    """The recipe of a network that is a classifier and a density, whose chains are `replay` pictures.

    Shapes      written: how many of them go into the weights file, to be looked at and to go on from; None for all
    """
    return classifier(
        world,
        "jem",
        joint_loss(chains),
        with_chains(network, replay),
        says=dict(inner=None, chains=asdict(chains)),
        save=partial(joint.save, dtype=torch.float16, chains=written),
        config=joint.described,
        **settings,
    )


# What a method of smoothing is trained by, and what it chooses.
_SMOOTHING: dict[str, tuple[Callable[..., Loss], dict]] = {
    "cohen": (smoothing.gaussian_loss, {}),
    "smoothadv": (smoothing.smoothadv_loss, dict(copies=2, steps=2, reach=1.0)),
    "macer": (smoothing.macer_loss, dict(copies=8, weight=12.0, gamma=8.0, beta=16.0)),
    "consistency": (smoothing.consistency_loss, dict(copies=2, agreement=10.0, entropy=0.5)),
}


def smoothed(
    world: str,
    method: str,
    sigma: float,
    *,
    network: Callable[[Beginning], cnn.ConvClassifier],
    voted: int,
    crop: int = 0,
    choices: dict | None = None,
    **settings,
) -> Recipe:
    """The recipe of a convolutional network that learns from noised pictures, for randomised smoothing.

    Units       sigma in pixels
    Shapes      voted: of so many test images 100 votes are counted; choices: of the method's loss, in place of its own;
                settings: other fields of `Recipe`
    """
    loss, usual = _SMOOTHING[method]
    choices = usual | (choices or {})

    def build(beginning: Beginning) -> cnn.ConvClassifier:
        classifier = network(beginning)
        classifier.sigma_pixel = sigma  # its pictures leave [0,1]
        return classifier

    return Recipe(
        world,
        method,
        build=build,
        loss=from_data(loss(sigma, crop=crop, **choices)),
        measure=measures.noised_accuracy(sigma, voted, votes=100),
        watch=measures.noised_curve(sigma),
        watched=200,
        save=cnn.save,
        config=cnn.described,
        says=dict(recipe=dict(sigma_pixel=sigma, crop=crop, **choices)),
        pictures=as_they_are,
        sigma=sigma,
        **settings,
    )


def translator(
    world: str,
    method: str,
    name: str,
    *,
    labels: str = "Hadamard",
    positions: int = 4,
    inter: float = 0.2,
    scrambled: bool = False,
    stored: torch.dtype = torch.float32,
    **settings,
) -> Recipe:
    """The recipe of an IDC network.

    labels     a family of `bridges.LABELS`; positions: of the bridge; inter: weight of the inter-class loss
    scrambled  pixels of all labels permuted alike: every distance and cosine stays, all structure of the pictures goes
    """

    def build(beginning: Beginning) -> idc.Translator:
        if beginning.widths and name != "PrunedUNet":
            raise ValueError(
                f"expected no widths for {name}, got {beginning.widths}; they are those of a U-Net."
            )
        own = several_widths(beginning.widths) if beginning.widths else {}
        pictures = bridges.LABELS[labels](beginning.classes, beginning.shape, beginning.seed)
        if scrambled:
            pictures = permuted(pictures, beginning.seed)
        return idc.build(name, pictures, Bridge(positions), beginning.seed, **own)

    def config(model: idc.Translator) -> dict:
        return dict(network=name, bridge=asdict(model.bridge), **model.network.config)

    return Recipe(
        world,
        method,
        build=build,
        loss=from_data(losses.translation_loss(inter)),
        measure=measures.translation_accuracy,
        save=partial(idc.save_translator, dtype=stored),
        config=config,
        says=dict(
            recipe=dict(
                network=name, labels=labels, positions=positions, inter=inter, scrambled=scrambled
            )
        ),
        **settings,
    )


def permuted(labels: Tensor, seed: int) -> Tensor:
    """Images whose pixels are permuted, all alike. Shapes: [K,C,H,W] -> the same. Randomness: from `seed`."""
    order = torch.randperm(labels[0].numel(), generator=torch.Generator().manual_seed(seed))
    return labels.flatten(1)[:, order].reshape(labels.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The table

# the ablations' too
DIGITS_IDC = partial(translator, "digits", "idc", "DigitNet", steps=1200, batch=128, rate=2e-3)
DIGITS_TRUTH = partial(
    truth_maximised,
    "digits",
    steps=400,
    batch=64,
    rate=1e-3,
    ema=0.98,
    levels=16,
    rank=4,
    kept=100,
)
FOOLING_ANOTHER = Inner(0.1, 7, 0.25)
FOOLING_ITSELF = Inner(0.1, 2, 0.8)
CONTRASTED = dict(contrast=1.0, transferred=False)
_DIGITS_STUDENT = fresh("MultiHeadDenoiser", "DigitNet")
_DIGITS_NET = built(cnn.ConvClassifier, widths=(32, 64))
_DIGITS_CNN = dict(network=_DIGITS_NET, steps=400, batch=128, rate=2e-3, attacked=400)
# WRN-10-2, and one without norms
_WIDE = partial(built, cnn.WideClassifier, widths=(16, 32, 64, 128), blocks=1)
_DIGITS_WIDE = dict(
    network=_WIDE(),
    steps=400,
    batch=128,
    rate=2e-3,
    attacked=400,
    save=partial(cnn.save, dtype=torch.float16),
)
# Attention knows nothing of neighbours, and digits that are moved by a pixel do not teach it: after 1000 steps at rate 2e-3
# it names 375 of 400 with them.
_DIGITS_VIT = dict(
    network=built(attention.AttentionClassifier, one_width, width=96, layers=2, patch=2),
    steps=600,
    batch=128,
    rate=1e-3,
    attacked=400,
    save=partial(cnn.save, dtype=torch.float16),
)
_CIFAR_NET = dict(
    batch=128,
    rate=3e-3,
    crop=4,
    mirror=True,
    ema=0.998,
    precision="bf16",
)
_CIFAR_CNN = dict(
    network=built(cnn.ConvClassifier, widths=(32, 64, 128)), **_CIFAR_NET, attacked=1000
)
_CIFAR_STORED = dict(attacked=1000, save=partial(cnn.save, dtype=torch.float16))
_CIFAR_WIDE = dict(network=_WIDE(), **_CIFAR_NET, **_CIFAR_STORED)
_CIFAR_VIT = dict(
    network=built(attention.AttentionClassifier, one_width, width=96, layers=5, patch=4),
    **{**_CIFAR_NET, "rate": 1e-3},
    **_CIFAR_STORED,
)
# Several copies and steps of an attack cost as many passes: those methods take fewer steps.
_DIGITS_SMOOTHED = dict(network=_DIGITS_NET, batch=128, rate=2e-3, voted=400)
_DIGITS_SMOOTHED_STEPS = dict(cohen=2000, smoothadv=800, macer=800, consistency=1500)
# Under much noise the usual weight of agreement, 10, leaves classes unlearned: after 400 steps at sigma 0.5 votes name
# 384 of 400 digits by 5, 386 by 3 and 391 by 1; after 1500 steps 212 by 10.
_DIGITS_AGREEMENT = {0.5: 5.0, 1.0: 5.0}
_CIFAR_SMOOTHED = dict(network=_CIFAR_CNN["network"], **_CIFAR_NET, steps=4000, voted=200)
_CIFAR = dict(mirror=True, precision="bf16", stored=torch.float16)
_CIFAR_DENOISER = dict(**_CIFAR, compiled=True, measured=1000, watched=256)
# Adapters of photographs are what one core carries in an hour each; `--batch` and `--steps` ask a GPU for more.
_CIFAR_TRUTH = dict(batch=32, rate=1e-3, ema=0.98, mirror=True, levels=6, rank=4, kept=100)
_CIFAR_TEACHER = networks.MODELS["cifar10"]["teacher"]

RECIPES: dict[str, Recipe] = {
    networks.TEACHER: denoiser(
        "digits",
        "diffusion",
        fresh("ConditionalDenoiser", "DigitNet"),
        from_data(losses.denoising_loss()),
        says=origin(),
        steps=500,
        batch=256,
        rate=2e-3,
        levels=16,
    ),
    networks.STUDENT: denoiser(
        "digits",
        "diffusion",
        _DIGITS_STUDENT,
        copying,
        needs=networks.TEACHER,
        says=origin(teacher=networks.TEACHER),
        steps=3000,
        batch=128,
        rate=3e-3,
        levels=16,
    ),
    _CIFAR_TEACHER: denoiser(
        "cifar10",
        "diffusion",
        fresh(
            "ConditionalDenoiser",
            "UNet",
            several_widths,
            widths=(96, 192, 192),
            layers=2,
            dropout=0.1,
        ),
        from_data(losses.denoising_loss()),
        says=origin(),
        steps=15_000,
        batch=1024,
        rate=8e-4,
        ema=0.999,
        levels=36,
        **_CIFAR_DENOISER,
    ),
    networks.MODELS["cifar10"]["student"]: denoiser(
        "cifar10",
        "diffusion",
        fresh(
            "MultiHeadDenoiser",
            "UNet",
            several_widths,
            widths=(32, 64, 96),
            layers=2,
            attention=False,
        ),
        copying,
        needs=_CIFAR_TEACHER,
        says=origin(teacher=_CIFAR_TEACHER),
        steps=12_000,
        batch=512,
        rate=1e-3,
        ema=0.999,
        levels=36,
        **_CIFAR_DENOISER,
    ),
    networks.CONTRASTIVE["digits"]: denoiser(
        "digits",
        "contrastive",
        _DIGITS_STUDENT,
        from_data(losses.contrastive_loss(*networks.RANGES["digits"])),
        says=origin(contrastive=True),
        steps=1000,
        batch=128,
        rate=3e-3,
        levels=16,
    ),
    networks.CONTRASTIVE["cifar10"]: denoiser(
        "cifar10",
        "contrastive",
        fresh(
            "MultiHeadDenoiser",
            "UNet",
            several_widths,
            widths=(96, 192, 256),
            layers=1,
            attention=False,
            patch=2,
            sigma_range=networks.NARROW_RANGE,
        ),
        from_data(
            losses.contrastive_loss(
                *networks.NARROW_RANGE, temperature=300.0, denoising=0.3, shift=3
            )
        ),
        says=origin(contrastive=True),
        steps=6000,
        batch=1024,
        rate=2e-3,
        ema=0.998,
        levels=6,
        span=networks.NARROW_RANGE,
        **_CIFAR_DENOISER,
    ),
    networks.HARDENED["digits"]: hardened(
        "digits",
        networks.STUDENT,
        Inner(0.1, 2, 0.8),
        steps=400,
        batch=64,
        rate=1e-3,
        ema=0.98,
        levels=16,
    ),
    networks.HARDENED["cifar10"]: hardened(
        "cifar10",
        networks.CONTRASTIVE["cifar10"],
        Inner(8 / 255, 2, 0.75),
        choices=dict(levels=2, temperature=300.0, denoising=0.3, clean=0.25, shift=3, held=True),
        steps=7000,
        batch=512,
        rate=1.5e-3,
        ema=0.998,
        levels=6,
        **_CIFAR_DENOISER,
    ),
    networks.TRUTH["digits"]["tmdc"]: DIGITS_TRUTH("tmdc", FOOLING_ANOTHER),
    networks.TRUTH["digits"]["tmdc-contrastive"]: DIGITS_TRUTH(
        "tmdc-contrastive", FOOLING_ITSELF, choices=CONTRASTED
    ),
    networks.TRUTH["cifar10"]["tmdc"]: truth_maximised(
        "cifar10",
        "tmdc",
        Inner(8 / 255, 7, 0.25),
        choices=dict(levels=2),
        steps=400,
        **_CIFAR_TRUTH,
    ),
    networks.TRUTH["cifar10"]["tmdc-contrastive"]: truth_maximised(
        "cifar10",
        "tmdc-contrastive",
        Inner(8 / 255, 2, 0.75),
        choices=CONTRASTED | dict(levels=2, temperature=300.0),
        steps=160,
        **_CIFAR_TRUTH,
    ),
    networks.BASELINES["digits"]["cnn"]: plain("digits", **_DIGITS_CNN),
    networks.BASELINES["digits"]["adversarial"]: adversarial(
        "digits", Inner(0.1, 7, 0.25), **_DIGITS_CNN
    ),
    networks.BASELINES["cifar10"]["cnn"]: plain("cifar10", steps=4000, **_CIFAR_CNN),
    networks.BASELINES["cifar10"]["adversarial"]: adversarial(
        "cifar10", Inner(8 / 255, 1, 1.25), steps=6000, **_CIFAR_CNN
    ),
    networks.BASELINES["digits"]["wide"]: plain("digits", "wide", **_DIGITS_WIDE),
    networks.BASELINES["digits"]["adversarial-wide"]: adversarial(
        "digits", Inner(0.1, 7, 0.25), "adversarial-wide", **_DIGITS_WIDE
    ),
    networks.BASELINES["digits"]["vit"]: plain("digits", "vit", **_DIGITS_VIT),
    # From its first weights attention learns nothing of attacked digits: after 135 steps the loss is still log 10.
    networks.BASELINES["digits"]["adversarial-vit"]: adversarial_from(
        "digits",
        Inner(0.1, 7, 0.25),
        "adversarial-vit",
        networks.BASELINES["digits"]["vit"],
        **{**_DIGITS_VIT, "steps": 300},
    ),
    networks.BASELINES["cifar10"]["wide"]: plain("cifar10", "wide", steps=4000, **_CIFAR_WIDE),
    networks.BASELINES["cifar10"]["adversarial-wide"]: adversarial(
        "cifar10", Inner(8 / 255, 1, 1.25), "adversarial-wide", steps=6000, **_CIFAR_WIDE
    ),
    networks.BASELINES["cifar10"]["vit"]: plain("cifar10", "vit", steps=8000, **_CIFAR_VIT),
    networks.BASELINES["cifar10"]["adversarial-vit"]: adversarial_from(
        "cifar10",
        Inner(8 / 255, 1, 1.25),
        "adversarial-vit",
        networks.BASELINES["cifar10"]["vit"],
        steps=8000,
        **_CIFAR_VIT,
    ),
    # The paper has 10 000 chains for 50 000 pictures, and batches of 64.
    networks.JOINT["digits"]: jem(
        "digits",
        Chains(),
        network=_WIDE(normed=False),
        replay=1000,
        steps=800,
        batch=64,
        rate=1e-3,
        ema=0.99,
        attacked=400,
    ),
    # A small one, for one core and an hour: half of the paper's steps a chain, and hardly more than one epoch.
    networks.JOINT["cifar10"]: jem(
        "cifar10",
        Chains(steps=10),
        network=_WIDE(normed=False),
        replay=2000,
        written=200,
        steps=1000,
        batch=64,
        rate=1e-3,
        ema=0.99,
        mirror=True,
        attacked=1000,
    ),
    networks.TRANSLATORS["digits"][0]: DIGITS_IDC(),
    networks.TRANSLATORS["cifar10"][0]: translator(
        "cifar10",
        "idc",
        "PrunedUNet",
        steps=20_000,
        batch=256,
        rate=5e-4,
        ema=0.999,
        compiled=True,
        **_CIFAR,
    ),
    networks.TRANSLATORS["cifar10"][1]: translator(
        "cifar10", "idc-small", "PatchNet", steps=3600, batch=128, rate=2e-3, ema=0.998, **_CIFAR
    ),
}


def _digits_choices(method: str, sigma: float) -> dict:
    if method != "consistency" or sigma not in _DIGITS_AGREEMENT:
        return {}
    return dict(agreement=_DIGITS_AGREEMENT[sigma])


for _method in networks.SMOOTHING:
    for _sigma in networks.SMOOTHING_SIGMAS:
        RECIPES[networks.smoothing_file("digits", _method, _sigma)] = smoothed(
            "digits",
            _method,
            _sigma,
            steps=_DIGITS_SMOOTHED_STEPS[_method],
            choices=_digits_choices(_method, _sigma),
            **_DIGITS_SMOOTHED,
        )
        RECIPES[networks.smoothing_file("cifar10", _method, _sigma)] = smoothed(
            "cifar10", _method, _sigma, **_CIFAR_SMOOTHED
        )


def methods() -> tuple[str, ...]:
    """The ways to train a network, by name."""
    return tuple(dict.fromkeys(recipe.method for recipe in RECIPES.values()))


def worlds_of(method: str) -> tuple[str, ...]:
    """The worlds that have a network of this method."""
    return tuple(
        dict.fromkeys(recipe.world for recipe in RECIPES.values() if recipe.method == method)
    )


def sigmas_of(world: str, method: str) -> tuple[float, ...]:
    """The noises, in pixels, for which a method has a network of a world each; none for most methods."""
    found = [
        recipe for recipe in RECIPES.values() if (recipe.world, recipe.method) == (world, method)
    ]
    return tuple(recipe.sigma for recipe in found if recipe.sigma is not None)


def files_of(world: str, method: str, sigma: float | None = None) -> list[str]:
    """The networks that a method makes of a world, in the order in which they are trained.

    Units       sigma of the noise in pixels, for a method of `sigmas_of`
    """
    wanted = (world, method, sigma)
    return [
        name
        for name, recipe in RECIPES.items()
        if (recipe.world, recipe.method, recipe.sigma) == wanted
    ]
