"""What every check stands on: the case that is audited, the light with its evidence, and how counts are judged."""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffclass import attacks, units
from diffclass.certify.certificates import Certificate, Votes, smoothing_radius
from diffclass.certify.soft import SoftCertificate, SoftTally
from diffclass.classifiers.base import Classifier, Fresh, Held, NoiseSource, decided
from diffclass.intervals import lower_bound
from diffclass.noise import generator_of
from diffclass.storage.results import Record

GREEN, RED, AMBER = LIGHTS = ("green", "red", "amber")
SAME = 1e-3  # of the spread of the logits: float32 stays far below it, another function does not
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
        """Whether there are numbers in every line, and all can be drawn: what was not measured (None) cannot."""
        return bool(self.lines) and all(
            line and all(value is not None and math.isfinite(value) for value in line)
            for line in self.lines.values()
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


Verdict = tuple[str, str] | tuple[str, str, Picture]  # light, evidence, and what there is to draw
Look = Callable[["Case"], Verdict]


REGISTERED: list[Callable[["Case"], Check]] = []  # every check, as its module is imported


def check(
    number: int,
    group: str,
    advice: str,
    cost: Callable[["Case"], int] | None = None,
    first: Callable[["Case"], object] | None = None,
) -> Callable[[Look], Callable[["Case"], Check]]:
    """Make a check of a function from a case to a light and its evidence; what it raises becomes a light as well.

    cost        at most how often it asks the classifier about an image, what `Case` keeps for all checks aside; None for
                a check that does not ask
    first       what it has to see before any other check asks
    """

    def decorate(look: Look) -> Callable[["Case"], Check]:
        @functools.wraps(look)
        def judged(case: "Case") -> Check:
            start = time.perf_counter()
            picture = []
            try:
                light, evidence, *picture = look(case)
            except CannotJudge as reason:
                light = AMBER
                evidence = str(reason)
            except Exception as error:  # an audit goes on: the next checks say what else is wrong
                light = RED
                sentence = " ".join(str(error).split())
                evidence = f"the check could not be made: {type(error).__name__}: {sentence}"
            drawn = next((one for one in picture if one.finite), None)
            seconds = time.perf_counter() - start
            return Check(number, look.__name__, group, light, evidence, advice, drawn, seconds)

        judged.number = number
        judged.group = group
        judged.cost = cost
        judged.first = first
        REGISTERED.append(judged)
        return judged

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# How answers are compared


def spread(logits: Tensor) -> float:
    """The median distance between the best and the worst class, the unit of all differences. Shapes: [B,K] -> a number."""
    tiny = torch.finfo(torch.float32).tiny
    return float((logits.amax(1) - logits.amin(1)).median().clamp_min(tiny))


def gap(logits: Tensor, plain: Tensor) -> float:
    """The largest difference, in spreads of the plain logits. Shapes: [B,K], [B,K] -> a number."""
    return float((logits - plain).abs().max()) / spread(plain)


def checksums(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every weight and buffer, by name."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: hashlib.sha256(bytes_of(value)).hexdigest() for name, value in state.items()}


def bytes_of(value: Tensor) -> memoryview:
    """The numbers of a tensor as they are in memory, whatever their type."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def quiet(model: nn.Module, *arguments) -> Tensor:
    """What a model answers without gradients."""
    with torch.no_grad():
        return model(*arguments)


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

    classifier  what decides;  held: whether the claim is about one noise, drawn from `seed` and the same for every image
                and call, or about new noise at every call
    view        what attacks differentiate, such as an `AttackView`; it takes the classifier's own noise (None: the
                classifier itself, or the surrogate of its votes)
    x, y        images [n,C,H,W] in [0,1] and labels [n];  epsilon: budget in pixels, in `norm` "linf" or "l2"
    attack      `attacks.pgd`, `attacks.apgd` or what is called alike; with `steps`, `loss`, `draws` averaged (EOT), and
                `starts`: once from the image, then from random points for what survives
    routes      other gradients of the same classifier by name, such as BPDA for the exact one (check 23)
    levels      the same classifier with other numbers of noise levels or steps (check 24)
    sources     other classifiers whose adversarial images are transferred (check 14)
    votes       of a smoothed classifier, one for each of the first images, hard or soft ones;  certify: what makes
                certificates of them, such as `soft.soft_radius`
    records     reported numbers; rows, deltas: of each image the stored hits of every attack, and its perturbation,
                which then is the attack that is audited
    statement   what would break this, and what was tried (check 25)
    training    what gives the pictures that the classifier was trained on, [N,C,H,W], where they are known (check 40)
    compiled    whether check 38 also asks the classifier after `torch.compile`, which takes seconds
    batch       images at once;  closer: how many images the expensive checks look at
    seed        of the held noise, and of all of the audit's own
    """

    classifier: Classifier
    x: Tensor
    y: Tensor
    epsilon: float
    norm: str = "linf"
    held: bool = True
    view: Classifier | None = None
    attack: Callable[..., Iterator[attacks.AttackStep]] = attacks.apgd
    steps: int = 20
    loss: attacks.AttackLoss = attacks.margin_loss
    draws: int = 1
    starts: int = 1
    routes: Mapping[str, Classifier] = field(default_factory=dict)
    levels: Mapping[int, Classifier] = field(default_factory=dict)
    sources: Mapping[str, Classifier] = field(default_factory=dict)
    votes: Sequence[Votes] | Sequence[SoftTally] = ()
    certify: Callable[..., Certificate | SoftCertificate] = smoothing_radius
    records: Sequence[Record] = ()
    rows: Sequence[Mapping] = ()
    deltas: Tensor | None = None
    statement: str = ""
    training: Callable[[], Tensor] | None = None
    compiled: bool = False
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
        if self.held and self.draws > 1:
            raise ValueError(
                f"expected one draw of noise that is held, got draws={self.draws}, which would all be the same; say "
                "held=False (--fresh) for a claim about new noise at every call."
            )
        if self.deltas is not None and (
            len(self.rows) < len(self.x) or len(self.deltas) < len(self.x)
        ):
            raise ValueError(
                f"expected a row and a perturbation for each of {len(self.x)} images, got "
                f"{len(self.rows)} and {len(self.deltas)}; audit no more images than were attacked."
            )

    @property
    def target(self) -> Classifier:
        """What attacks differentiate."""
        return self.classifier.surrogate() if self.view is None else self.view

    @property
    def labels(self) -> Tensor:
        """The labels where verdicts are counted, which is not where attacks run. Shapes: -> [n]."""
        return self.y.cpu()

    @property
    def deterministic(self) -> bool:
        """Whether the claim is about a function of the pixels alone."""
        return self.held or self.classifier.deterministic

    @property
    def repeats(self) -> int:
        """How many answers are behind one judgement."""
        return 1 if self.deterministic else REPEATS

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

    @functools.cached_property
    def stream(self) -> torch.Generator:
        """What new noise is drawn from, one draw after the other."""
        return generator_of(self.seed, "new noise")

    @property
    def claimed(self) -> Classifier:
        """The classifier that the claim is about: with its noise held, or as it is."""
        return Held.seeded(self.classifier, self.seed) if self.held else self.classifier

    def asked(self, classifier: Classifier) -> nn.Module:
        """A classifier as this claim asks it, a function of the pixels alone: held noise, or new noise at every call.

        Shapes      x [B,C,H,W] -> [B,K]
        """
        if self.held:
            return Held.seeded(classifier, self.seed)
        return Fresh(classifier, self.stream)

    def once(self, classifier: Classifier) -> Held:
        """A classifier with one noise of the audit's seed, whatever the claim is about. Shapes: [B,C,H,W] -> [B,K]."""
        return Held.seeded(classifier, self.seed)

    def noise_for(self, classifier: Classifier, images: int) -> NoiseSource:
        """What attacks on a classifier are given: the noise that is held, or a function of step and draw."""
        if self.held:
            return classifier.sample_noise(1, torch.Generator().manual_seed(self.seed))
        return lambda step, draw: classifier.sample_noise(images, self.stream)

    def attacked(
        self,
        places: Tensor,
        *,
        target: Classifier | None = None,
        attack=None,
        epsilon: float | None = None,
        start: torch.Generator | None = None,
        towards: Tensor | None = None,
        **options,
    ) -> Outcome:
        """Run the case's attack on some of its images, with whatever is to be different.

        Shapes      places [m]; towards [m]: the class that each image is to be taken for, or None for any other
        """
        if not len(places):
            nobody = torch.zeros(0, dtype=torch.bool)
            return Outcome(self.x[:0], nobody, nobody[None])
        own = dict(norm=self.norm, steps=self.steps, loss=self.loss, draws=self.draws)
        options = {**own, **options}
        run = attack or self.attack
        target = self.target if target is None else target
        epsilon = self.epsilon if epsilon is None else epsilon
        x = []
        flagged = []
        film = []
        for some in torch.arange(len(places)).split(self.batch):
            if towards is not None:
                options["loss"] = attacks.targeted_loss(towards[some].to(self.y))
            part = places[some]
            noise = self.noise_for(target, len(part))
            frames = list(
                run(
                    target,
                    self.x[part],
                    self.y[part],
                    epsilon,
                    noise=noise,
                    generator=start,
                    **options,
                )
            )
            x.append(frames[-1].x)
            flagged.append(frames[-1].fooled.cpu())
            film.append(torch.stack([frame.fooled.cpu() for frame in frames]))
        return Outcome(torch.cat(x), torch.cat(flagged), torch.cat(film, 1))

    def cost(self, images: int, *, steps: int | None = None, draws: int | None = None) -> int:
        """How often one attack on some images, and the judgement of what it left, ask a classifier about an image."""
        steps = self.steps if steps is None else steps
        draws = self.draws if draws is None else draws
        return images * ((steps + 1) * draws + self.repeats)

    def pace(self) -> float:
        """Seconds that one image takes now, asked with its gradient beside the other images of the expensive checks."""
        few = self.few
        noise = self.target.sample_noise(1, self.generator(0))
        for _ in range(2):  # the first call also loads and reserves what all others need
            start = time.perf_counter()
            attacks.expected_gradient(
                self.target, self.x[few], self.y[few], noise=noise, loss=self.loss
            )
            took = time.perf_counter() - start
        return took / len(few)

    @property
    def shared_cost(self) -> int:
        """At most how often what is kept for all checks asks: clean images, the main attack, and luck."""
        everyone = len(self.x)
        judgements = 2 * everyone * self.repeats  # the clean images, and what the attack left
        luck = 0 if self.deterministic else self.cost(len(self.few))
        main = 0 if self.deltas is not None else self.starts * self.cost(everyone)
        return judgements + main + luck

    def answers(self, x: Tensor, repeats: int = 1, asked: nn.Module | None = None) -> Tensor:
        """What the classifier says, `repeats` times.

        Shapes      x [m,C,H,W] -> [repeats,m]
        Errors      those of `classifiers.base.decided`: of NaN no class is the largest
        """
        asked = self.asked(self.classifier) if asked is None else asked
        if not len(x):
            return torch.zeros(repeats, 0, dtype=torch.long)
        answers = []
        with torch.no_grad():
            for _ in range(repeats):
                parts = [decided(asked(part)).cpu() for part in x.split(self.batch)]
                answers.append(torch.cat(parts))
        return torch.stack(answers)

    def wrong(self, x: Tensor, places: Tensor) -> Tensor:
        """How often images are answered wrongly, in [0,1]; a random classifier is asked REPEATS times. Shapes: [m]."""
        return (self.answers(x, self.repeats) != self.labels[places]).double().mean(0)

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
    def opening(self) -> tuple[Tensor, dict[str, str]]:
        """What attacks climb answers to the first images, and checksums of its weights and buffers, when first asked.

        Shapes      logits [m,K]
        """
        return quiet(self.once(self.target), self.x[self.few]), checksums(self.target)

    @functools.cached_property
    def clean_falls(self) -> Tensor:
        """Which images are wrong before any attack. Shapes: -> [n]."""
        return self.falls(self.x, self.everyone)

    @functools.cached_property
    def main(self) -> Outcome:
        """The attack that is audited, on all images: the stored perturbations, else what the case's attack does."""
        if self.deltas is not None:
            return self._stored(self.deltas)
        first = self.attacked(self.everyone)
        start = self.generator(0)
        x = first.x
        flagged = first.flagged
        wrong = self.wrong(x, self.everyone)
        for _ in range(self.starts - 1):
            places = self.everyone[wrong <= 0.5]
            again = self.attacked(places, start=start)
            share = self.wrong(again.x, places)
            better = share > wrong[places]
            where = (places[better],)
            x = x.index_put(where, again.x[better])
            flagged = flagged.index_put(where, again.flagged[better])
            wrong = wrong.index_put(where, share[better])
        return Outcome(x, flagged, first.film)

    def _stored(self, deltas: Tensor) -> Outcome:
        count = len(self.x)
        draws = self.records[0].settings.get("draws", 1) if self.records else 1
        flagged = torch.tensor([2 * row["hits"] < draws for row in self.rows[:count]])
        x = (self.x + deltas[:count].to(self.x)).clamp(0, 1)
        return Outcome(x, flagged, flagged[None])

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
        words = f"{more} of {len(fell)} survivors"
        if survivors > len(fell):
            words = f"{words} (of {survivors})"
        if lucky:
            words = f"{words}, {lucky} by luck alone"
        return light, more, words
