"""Every attack by name: one table, one entry a name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diffclass import attacks, units
from diffclass.attacks import AttackStep
from diffclass.classifiers.base import Classifier, Held, Noise, decided

NEEDS = ("gradient", "logits")


def one_call_a_step(steps: int, targets: int) -> int:
    """What most attacks cost: a call at the start and after every step."""
    return steps + 1


@dataclass(frozen=True)
class AttackEntry:
    """One attack by name.

    run         (classifier, x, y, epsilon, *, noise, norm, steps, loss, draws, generator, ...) -> `AttackStep`s
    needs       "gradient", or "logits" for a black box
    norms       what its budget may be measured in
    step_size   whether it is told the length of its steps, in budgets
    steps       the only number of steps that it has, or None if it is told
    usual       its number of steps where nobody says another
    own_loss    whether it has a loss of its own, instead of being told one
    targeted    whether it is told the ranks of the classes that it goes towards
    held        whether it needs one held noise for all images, steps and draws
    prior       whether it is for classifiers that maximise a likelihood first, by the gradient of the identity
    random      whether it draws at random wherever it starts, and so is always given a generator
    classes     the fewest classes that it can attack
    calls       (steps, number of targets) -> how often it asks about an image at most
    Errors      ValueError for an entry that lacks a function, a source or a sentence
    """

    name: str
    run: Callable[..., Iterator[AttackStep]]
    needs: str
    norms: tuple[str, ...]
    source: str
    sentence: str
    step_size: bool = False
    steps: int | None = None
    usual: int = 100
    own_loss: bool = False
    targeted: bool = False
    held: bool = False
    prior: bool = False
    random: bool = False
    classes: int = 2
    calls: Callable[[int, int], int] = one_call_a_step

    def __post_init__(self):
        if not callable(self.run):
            raise ValueError(
                f"expected the attack {self.name!r} to have a function that runs it, got {self.run!r}."
            )
        if not (self.name and self.source and self.sentence):
            raise ValueError(
                f"expected an attack with a name, a source and a sentence, got {self.name!r}, {self.source!r} and "
                f"{self.sentence!r}."
            )
        if self.needs not in NEEDS or not self.norms:
            raise ValueError(
                f"expected the attack {self.name!r} to need one of {', '.join(NEEDS)} and to name its norms, got "
                f"{self.needs!r} and {self.norms!r}."
            )


ENTRIES: dict[str, AttackEntry] = {}


def register(entry: AttackEntry) -> None:
    """Add an attack to the table. Errors: ValueError for a name that is taken, in whatever case."""
    if entry.name.lower() in map(str.lower, ENTRIES):
        raise ValueError(f"expected a new name for an attack, got {entry.name!r}, which is taken.")
    ENTRIES[entry.name] = entry


def attack(name: str) -> AttackEntry:
    """An attack by name, whatever its case. Errors: ValueError that lists the names."""
    return units.chosen(name, ENTRIES, "the attack")


# ---------------------------------------------------------------------------------------------------------------------
# Attacks of torchattacks


class Shown(nn.Module):
    """What a library gets: a view of a held classifier, behind a module that has no parts.

    Shapes      x [B,C,H,W] -> [B,K]
    Why         the library switches every part of a model into the mode that it finds in the outermost one, and asks a
                parameter for the device
    """

    def __init__(self, classifier: Classifier, x: Tensor, noise: Noise):
        super().__init__()
        held = Held(classifier, noise)
        self.views = (attacks.AttackView.calibrated(held, x),)  # a tuple hides it from `modules`
        self.anchor = nn.Parameter(torch.zeros((), device=x.device), requires_grad=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the view."""
        self.calls += 1
        return self.views[0](x)


def library(
    build: Callable[..., Callable[[Tensor, Tensor], Tensor]],
) -> Callable[..., Iterator[AttackStep]]:
    """The function of an entry that hands a view of the held classifier to torchattacks.

    Shapes      build (shown, epsilon, norm, steps, targets, seed) -> an attack (x, y) -> x; one `AttackStep` is yielded
    Units       what leaves the budget (CW has none) is brought back into it, and judged there
    Randomness  torch's global generator, which the library seeds, is put back as it was
    Errors      ValueError for noise that is not held, a budget or labels that cannot be meant, or a classifier in
                training mode
    """

    def run(
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        epsilon: float,
        *,
        noise: Noise = (),
        norm: str = "linf",
        steps: int,
        targets: int = 0,
        generator: torch.Generator | None = None,
    ) -> Iterator[AttackStep]:
        units.check_images(x, classifier.image_shape)
        units.check_labels(y, len(x), classifier.num_classes)
        classifier.check_mode()
        epsilon = units.check_budget(epsilon, norm, x[0].numel())
        if callable(noise):
            raise ValueError(
                "expected one held noise for an attack of torchattacks, which knows no other, got noise that is drawn "
                "anew at every call; hold it."
            )
        seed = 0 if generator is None else generator.initial_seed() % 2**31
        shown = Shown(classifier, x, noise)
        # the library draws from the global state: within the attack alone, that state follows the seed
        accelerators = [] if x.device.type == "cpu" else [x.device]
        with torch.random.fork_rng(accelerators, device_type=x.device.type):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            for device in accelerators:
                state = torch.Generator(device).manual_seed(seed).get_state()
                torch.get_device_module(device).set_rng_state(state, device)
            attacked = build(shown, epsilon, norm, steps, targets, seed)(x, y)
        attacked = attacks.project(attacked.detach(), x, epsilon, norm)
        with torch.no_grad():
            logits = classifier(attacked, noise)
        size = attacks.size_of(attacked - x, norm)
        yield AttackStep(shown.calls, attacked, logits, decided(logits) != y, size)

    return run


def _mifgsm(shown, epsilon, norm, steps, targets, seed):
    import torchattacks

    # steps of a quarter of the budget, as 2/255 is of 8/255
    return torchattacks.MIFGSM(shown, eps=epsilon, alpha=epsilon / 4, steps=steps, decay=1.0)


def _cw(shown, epsilon, norm, steps, targets, seed):
    import torchattacks

    chosen = torchattacks.CW(shown, c=1, kappa=0, steps=steps, lr=0.01)
    # its own indexes a tensor on the CPU with labels on a GPU; for logits >= 0, as those of a view, this is the same
    chosen.f = lambda logits, y: (-attacks.margin_loss(logits, y)).clamp(min=-chosen.kappa)
    return chosen


def _autoattack(shown, epsilon, norm, steps, targets, seed, version="standard"):
    import torchattacks

    height, width = shown.views[0].image_shape[1:]
    if norm == "l2" and min(height, width) < 5:
        raise ValueError(
            f"expected images of 5x5 pixels or more for AutoAttack in L2, got {height}x{width}: its Square lays five squares "
            "beside each other."
        )
    chosen = torchattacks.AutoAttack(
        shown,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=epsilon,
        version=version,
        n_classes=targets + 1,
        seed=seed,
    )
    for part in chosen._autoattack.attacks:
        if not isinstance(part, torchattacks.Square):  # which has queries
            part.steps = steps
    return chosen


def _autoattack_calls(steps: int, targets: int) -> int:
    """APGD, APGD-T, FAB-T and Square of 5000 queries, each with a look before it and after it."""
    return (steps + 4) + (targets * (steps + 3) + 2) + (targets * (2 * steps + 7) + 2) + 5004


def _plus_calls(steps: int, targets: int) -> int:
    """The same, APGD with five starts, and with five starts each APGD with DLR and FAB."""
    return _autoattack_calls(steps, targets) + 9 * (steps + 4) + 5 * (2 * steps + 7) + 2


def fgsm(
    classifier: Classifier, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 1, **options
) -> Iterator[AttackStep]:
    """One step of the whole budget along the gradient. Options, shapes and errors: those of `attacks.pgd`."""
    if steps != 1:
        raise ValueError(f"expected one step of fgsm, which has no more, got {steps}; use pgd.")
    return attacks.pgd(classifier, x, y, epsilon, steps=1, step_size=epsilon, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The table

BOTH = ("linf", "l2")
LIBRARY = dict(own_loss=True, held=True)
register(
    AttackEntry(
        "fgsm",
        fgsm,
        "gradient",
        BOTH,
        "Goodfellow et al. 2015",
        "One step of the whole budget along the gradient: the cheapest attack, and far from the strongest.",
        steps=1,
    )
)
register(
    AttackEntry(
        "pgd",
        attacks.pgd,
        "gradient",
        BOTH,
        "Madry et al. 2018",
        "Projected gradient ascent with steps of one length; its last image is judged.",
        step_size=True,
    )
)
register(
    AttackEntry(
        "apgd",
        attacks.apgd,
        "gradient",
        BOTH,
        "Croce & Hein 2020",
        "Projected gradient ascent that halves its steps where the loss no longer rises.",
    )
)
register(
    AttackEntry(
        "square",
        attacks.square,
        "logits",
        BOTH,
        "Andriushchenko et al. 2020",
        "Random search by squares, without a gradient: what falls to it alone has masked gradients.",
        usual=1000,
        random=True,
        held=True,
    )
)
register(
    AttackEntry(
        "lagrange",
        attacks.lagrange,
        "gradient",
        BOTH,
        "Chen et al. 2024 (RDC)",
        "Gradient ascent that keeps the image likely, so that likelihood maximisation has nothing left to undo; for "
        "classifiers that begin with it.",
        step_size=True,
        prior=True,
    )
)
register(
    AttackEntry(
        "stadv",
        attacks.stadv,
        "gradient",
        ("flow",),
        "Xiao et al. 2018 (StAdv)",
        "Bends the image by a smooth flow field instead of adding to it; the budget is how far anything moves, in pixel "
        "widths.",
        step_size=True,
    )
)
register(
    AttackEntry(
        "bend",
        attacks.bend,
        "gradient",
        ("flow",),
        "this course, after Xiao et al. 2018",
        "The same without a wish for smooth flows, which decides the steps where the classifier's logits are small.",
        step_size=True,
    )
)
register(
    AttackEntry(
        "mifgsm",
        library(_mifgsm),
        "gradient",
        ("linf",),
        "Dong et al. 2018, by torchattacks",
        "Signs of gradients that are summed up over the steps, as torchattacks has it.",
        usual=10,
        calls=lambda steps, targets: steps + 2,
        **LIBRARY,
    )
)
register(
    AttackEntry(
        "cw",
        library(_cw),
        "gradient",
        ("l2",),
        "Carlini & Wagner 2017, by torchattacks",
        "The smallest L2 perturbation by Adam, as torchattacks has it (c = 1); cut to the budget, and judged there.",
        usual=50,
        calls=lambda steps, targets: steps + 2,
        **LIBRARY,
    )
)
_VERSIONS = {  # version -> the name's beginning, its attacks, its calls
    "standard": ("autoattack", "APGD, APGD-T, FAB-T of", _autoattack_calls),
    "plus": ("autoattack-plus", "APGD with two losses, FAB, APGD-T, FAB-T of", _plus_calls),
}
for version, (begins, listed, calls) in _VERSIONS.items():
    for count, said in ((10, "as torchattacks ships it"), (100, "as its authors run it")):
        register(
            AttackEntry(
                f"{begins}-{count}",
                library(partial(_autoattack, version=version)),
                "gradient",
                BOTH,
                "Croce & Hein 2020, by torchattacks",
                f"{listed} {count} steps and Square of 5000 queries, {said}; for 4 classes or more.",
                steps=count,
                usual=count,
                targeted=True,
                random=True,
                classes=4,
                calls=calls,
                **LIBRARY,
            )
        )
