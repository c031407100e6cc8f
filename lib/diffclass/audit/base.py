"""What every check stands on: the case that is audited, the light with its evidence, and how counts are judged."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffclass import attacks, units
from diffclass.certify.certificates import Certificate, Votes, smoothing_radius
from diffclass.intervals import lower_bound

GREEN, RED, AMBER = LIGHTS = ("green", "red", "amber")
REPEATS = 11  # answers of a random classifier behind one judgement; odd, so that a majority exists


@dataclass(frozen=True)
class Picture:
    """The arrays of a small figure: `lines` over numbers x, or one bar for each name in x.

    Shapes      x of T numbers or names; each line T numbers
    """

    x: tuple
    lines: dict[str, tuple[float, ...]]
    xlabel: str
    ylabel: str

    @property
    def finite(self) -> bool:
        """Whether there are numbers in every line, and all of them can be drawn."""
        return bool(self.lines) and all(
            line and all(map(math.isfinite, line)) for line in self.lines.values()
        )


@dataclass(frozen=True)
class Check:
    """One row of the report: green, red, or amber where it cannot be judged here; evidence says why, with numbers.

    advice      what to do when it is red;  seconds: what it cost;  picture: arrays to draw, or None
    """

    number: int
    name: str
    group: str
    light: str
    evidence: str
    advice: str
    picture: Picture | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool | None:
        """True, False, or None where it cannot be judged."""
        return {GREEN: True, RED: False, AMBER: None}[self.light]


class CannotJudge(Exception):
    """The reason why a check has nothing to judge here: its light is amber."""


Found = tuple[str, str] | tuple[str, str, Picture]  # light, evidence, and what there is to draw


def check(
    number: int, group: str, advice: str
) -> Callable[[Callable[["Case"], Found]], Callable[["Case"], Check]]:
    """Make a check of a function from a case to a light and its evidence; what it raises becomes a light as well."""

    def decorate(look: Callable[["Case"], Found]) -> Callable[["Case"], Check]:
        @functools.wraps(look)
        def judged(case: "Case") -> Check:
            start = time.perf_counter()
            try:
                light, evidence, *picture = look(case)
            except CannotJudge as reason:
                light = AMBER
                evidence = str(reason)
                picture = []
            except Exception as error:  # an audit goes on: the next checks say what else is wrong
                light = RED
                picture = []
                evidence = f"the check could not be made: {type(error).__name__}: {' '.join(str(error).split())}"
            drawn = next((one for one in picture if one.finite), None)
            return Check(
                number,
                look.__name__,
                group,
                light,
                evidence,
                advice,
                drawn,
                time.perf_counter() - start,
            )

        judged.number = number
        judged.group = group
        return judged

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# How counts are judged


def proven(count: int, n: int, allowed: float, part: float = 1.0, chance: float = 0.01) -> str:
    """The light of `count` bad images among n, where a share of `allowed` is tolerated.

    Formula     red if part * lower_bound(count, n, chance) > allowed; green if part * count / n <= allowed; amber
                between, where the images are too few to tell. The n images stand for the share `part` of all
    Source      Clopper & Pearson 1934: of classifiers with the tolerated share, at most `chance` get a red light; 1 %
                and not 5, as an audit asks two dozen such questions
    """
    if part * lower_bound(count, n, chance) > allowed:
        return RED
    return GREEN if part * count <= allowed * n else AMBER


def outweighs(more: int, less: int, chance: float = 0.01) -> bool:
    """Whether paired images that changed one way outnumber those of the other way by more than luck.

    Formula     lower_bound(more, more + less, chance) > 1/2, the exact sign test (McNemar 1947)
    """
    return more > less and lower_bound(more, more + less, chance) > 0.5


def worst(lights: Sequence[str]) -> str:
    """Red if any is red, else amber if any is amber, else green."""
    return max(lights, key=(GREEN, AMBER, RED).index)


# ---------------------------------------------------------------------------------------------------------------------
# The case


def is_deterministic(module: nn.Module) -> bool:
    """What a classifier, or the one inside a view of it, declares; one that says nothing is taken at that."""
    inner = getattr(module, "classifier", None)
    own = getattr(module, "deterministic", None)
    return (
        own
        if own is not None
        else is_deterministic(inner)
        if isinstance(inner, nn.Module)
        else True
    )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attack left: the images, whether it called them fooled, and that at each of its steps.

    Shapes      x [n,C,H,W], flagged [n], film [steps + 1, n]
    """

    x: Tensor
    flagged: Tensor
    film: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """A claim of robustness and everything it rests on.

    classifier  what decides;  view: what attacks differentiate in its place, such as an `AttackView` of it or the voter
                behind a majority vote (None: the classifier itself)
    x, y        images [n,C,H,W] in [0,1] and labels [n];  epsilon: budget in pixels, in `norm` "linf" or "l2"
    attack      `attacks.pgd`, `attacks.apgd` or what is called alike; with `steps`, `loss`, `draws` averaged (EOT), and
                `starts`: once from the image, then from random points for what survives
    routes      other gradients of the same classifier by name, such as BPDA for the exact one (check 23)
    levels      the same classifier with other numbers of noise levels or steps (check 24)
    sources     other classifiers whose adversarial images are transferred (check 14)
    votes       of a smoothed classifier, one for each of the first images;  certify: what makes certificates of them
    records     reported numbers; rows, deltas: of each image the stored hits of every attack, and its perturbation,
                which then is the attack that is audited
    statement   what would break this, and what was tried (check 25)
    batch       images at once;  closer: how many images the expensive checks look at;  seed: all of the audit's noise
    """

    classifier: nn.Module
    x: Tensor
    y: Tensor
    epsilon: float
    norm: str = "linf"
    view: nn.Module | None = None
    attack: Callable[..., Iterator[attacks.AttackStep]] = attacks.apgd
    steps: int = 20
    loss: attacks.AttackLoss = attacks.margin_loss
    draws: int = 1
    starts: int = 1
    routes: Mapping[str, nn.Module] = field(default_factory=dict)
    levels: Mapping[int, nn.Module] = field(default_factory=dict)
    sources: Mapping[str, nn.Module] = field(default_factory=dict)
    votes: Sequence[Votes] = ()
    certify: Callable[[Votes], Certificate] = smoothing_radius
    records: Sequence = ()
    rows: Sequence[Mapping] = ()
    deltas: Tensor | None = None
    statement: str = ""
    batch: int = 64
    closer: int = 10
    seed: int = 0

    def __post_init__(self):
        units.check_images(self.x, self.classifier.image_shape)
        units.check_labels(self.y, len(self.x), self.classifier.num_classes)
        units.check_budget(self.epsilon, self.norm, self.x[0].numel())
        if min(len(self.x), self.batch, self.closer, self.steps, self.draws, self.starts) < 1:
            raise ValueError(
                f"expected at least one image, step, draw and start, got {len(self.x)} images, steps="
                f"{self.steps}, draws={self.draws}, starts={self.starts}, batch={self.batch}, closer="
                f"{self.closer}."
            )
        if self.deltas is not None and (
            len(self.rows) < len(self.x) or len(self.deltas) < len(self.x)
        ):
            raise ValueError(
                f"expected a row and a perturbation for each of {len(self.x)} images, got "
                f"{len(self.rows)} and {len(self.deltas)}; audit no more images than were attacked."
            )

    @property
    def target(self) -> nn.Module:
        """What attacks differentiate."""
        return self.view or self.classifier

    @property
    def labels(self) -> Tensor:
        """The labels where verdicts are counted, which is not where attacks run. Shapes: -> [n]."""
        return self.y.cpu()

    @property
    def deterministic(self) -> bool:
        """What the classifier declares."""
        return is_deterministic(self.classifier)

    @property
    def everyone(self) -> Tensor:
        """The places of all images. Shapes: -> [n]."""
        return torch.arange(len(self.x))

    @property
    def few(self) -> Tensor:
        """The places of the first `closer` images."""
        return torch.arange(min(self.closer, len(self.x)))

    def generator(self, salt: int) -> torch.Generator:
        """A generator of the audit's own for one purpose."""
        return torch.Generator().manual_seed(1000 * self.seed + salt)

    def attacked(
        self,
        places: Tensor,
        *,
        target: nn.Module | None = None,
        attack=None,
        epsilon: float | None = None,
        start: torch.Generator | None = None,
        towards: Tensor | None = None,
        **options,
    ) -> Outcome:
        """Run the case's attack on some of its images, with whatever is to be different.

        Shapes      places [m]; towards [m]: the class that each image is to be taken for, or None for any other
        """
        options = {
            **dict(norm=self.norm, steps=self.steps, loss=self.loss, draws=self.draws),
            **options,
        }
        run = attack or self.attack
        target = target or self.target
        found = []
        epsilon = self.epsilon if epsilon is None else epsilon
        if not len(places):
            nobody = torch.zeros(0, dtype=torch.bool)
            return Outcome(self.x[:0], nobody, nobody[None])
        for some in torch.arange(len(places)).split(self.batch):
            if towards is not None:
                options["loss"] = attacks.targeted_loss(towards[some].to(self.y))
            part = places[some]
            frames = list(
                run(target, self.x[part], self.y[part], epsilon, generator=start, **options)
            )
            found.append(
                (
                    frames[-1].x,
                    frames[-1].fooled.cpu(),
                    torch.stack([one.fooled.cpu() for one in frames]),
                )
            )
        x, flagged, film = zip(*found, strict=True)
        return Outcome(torch.cat(x), torch.cat(flagged), torch.cat(film, 1))

    def answers(self, x: Tensor, repeats: int = 1, classifier: nn.Module | None = None) -> Tensor:
        """What the classifier says, `repeats` times. Shapes: x [m,C,H,W] -> [repeats,m]."""
        judge = classifier or self.classifier
        if not len(x):
            return torch.zeros(repeats, 0, dtype=torch.long)
        with torch.no_grad():
            said = [
                torch.cat([judge(part).argmax(1).cpu() for part in x.split(self.batch)])
                for _ in range(repeats)
            ]
        return torch.stack(said)

    def wrong(self, x: Tensor, places: Tensor) -> Tensor:
        """How often images are answered wrongly, in [0,1]; a random classifier is asked REPEATS times. Shapes: [m]."""
        said = self.answers(x, 1 if self.deterministic else REPEATS)
        return (said != self.labels[places]).double().mean(0)

    def falls(self, x: Tensor, places: Tensor) -> Tensor:
        """Which images are answered wrongly, anew and with fresh noise, by the majority of answers. Shapes: -> [m]."""
        return self.wrong(x, places) > 0.5

    def falls_to_any(self, tries: Sequence[Tensor], places: Tensor) -> Tensor:
        """Which images fall to the best of several tries; it is chosen by some answers and judged by new ones.

        Shapes      each try [m,C,H,W] -> [m]
        """
        scores = torch.stack([self.wrong(x, places) for x in tries])
        best = torch.stack(list(tries))[scores.argmax(0), torch.arange(len(places))]
        return self.falls(best, places)

    @functools.cached_property
    def clean_falls(self) -> Tensor:
        """Which images are wrong before any attack. Shapes: -> [n]."""
        return self.falls(self.x, self.everyone)

    @functools.cached_property
    def main(self) -> Outcome:
        """The attack that is audited, on all images: the stored perturbations, else what the case's attack finds."""
        if self.deltas is not None:
            draws = self.records[0].settings.get("draws", 1) if self.records else 1
            flagged = torch.tensor([2 * row["hits"] < draws for row in self.rows[: len(self.x)]])
            return Outcome(
                (self.x + self.deltas[: len(self.x)].to(self.x)).clamp(0, 1), flagged, flagged[None]
            )
        found = self.attacked(self.everyone)
        draw = self.generator(0)
        x = found.x
        flagged = found.flagged
        wrong = self.wrong(found.x, self.everyone)
        for _ in range(self.starts - 1):
            places = self.everyone[wrong <= 0.5]
            again = self.attacked(places, start=draw)
            share = self.wrong(again.x, places)
            better = share > wrong[places]
            x, flagged, wrong = (
                whole.index_put((places[better],), part[better])
                for whole, part in ((x, again.x), (flagged, again.flagged), (wrong, share))
            )
        return Outcome(x, flagged, found.film)

    @functools.cached_property
    def fallen(self) -> Tensor:
        """Which images fall to the main attack. Shapes: -> [n]."""
        return self.falls(self.main.x, self.everyone)

    @property
    def left(self) -> Tensor:
        """The places of the first `closer` images that survive the main attack: the claim. Shapes: -> [m]."""
        return self.everyone[~self.fallen][: self.closer]

    @functools.cached_property
    def luck(self) -> Tensor:
        """Which survivors fall when only the noise is new: what a stronger attack has to beat. Shapes: -> [m]."""
        if self.deterministic or not len(self.left):
            return torch.zeros(len(self.left), dtype=torch.bool)
        return self.falls(self.attacked(self.left).x, self.left)

    def beyond(self, fell: Tensor, allowed: float = 0.01) -> tuple[str, int, str]:
        """The light of what else makes survivors fall, how many do beyond luck, and these in words.

        Formula     `proven` with the share of survivors: is more than `allowed` of all images lost to it?
        Shapes      fell [m], over `left`
        Meaning     of a random classifier, what falls also has to win the paired sign test against `luck`
        """
        more = int((fell & ~self.luck).sum())
        lucky = int((self.luck & ~fell).sum())
        survivors = int((~self.fallen).sum())
        light = proven(more, len(fell), allowed, survivors / len(self.x)) if len(fell) else GREEN
        if light == RED and not self.deterministic and not outweighs(more, lucky):
            light = AMBER
        told = f"{more} of {len(fell)} survivors" + (
            f" (of {survivors})" if survivors > len(fell) else ""
        )
        return light, more, told + (f", {lucky} by luck alone" if lucky else "")
