"""Exercises of notebook 09: minima over attacks, luck over draws, intervals with a warning, and four diagnoses."""

from collections.abc import Callable

import torch
from scipy import stats

from diffclass.course.exercises.base import Exercise, Mistake, NotYet


def _survived(seed: int, attacks: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images survive which attack [A,N], and which are right without one [N]: attacks fail on different ones."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(attacks, 1, generator=generator) * 0.5 + 0.4
    return (
        torch.rand(attacks, images, generator=generator) < share,
        torch.rand(images, generator=generator) < 0.9,
    )


def _share(rows: torch.Tensor) -> float:
    return float(rows.double().mean())


PER_IMAGE_MINIMUM = Exercise(
    key="09-per-image-minimum",
    prompt="Given survived [A,N] (does image i survive attack a?) and clean [N] (is it right without one?), both of "
    "truth values, return the robust accuracy that all A attacks together leave.",
    reference=lambda survived, clean: _share(survived.all(0) & clean),
    cases=lambda: [_survived(0, 3, 40), _survived(1, 5, 25), _survived(2, 2, 60)],
    mistakes=(
        Mistake(
            lambda survived, clean: float((survived & clean).double().mean(1).min()),
            "that is the smallest average of one attack; each image may fall to another one",
        ),
        Mistake(
            lambda survived, clean: _share(survived.all(0)),
            "an image that is wrong without any attack is not robust, whatever an attack did to it",
        ),
        Mistake(
            lambda survived, clean: _share(survived.any(0) & clean),
            "an image that survives some attack is counted; it has to survive every one",
        ),
        Mistake(
            lambda survived, clean: _share(survived & clean),
            "averaged over attacks: the attacker has a choice, not a lottery ticket",
        ),
        Mistake(
            lambda survived, clean: _share(survived.all(0)[clean]),
            "divided by the images that were right: that share can rise when the classifier gets worse",
        ),
    ),
    meaning="The attacker chooses for each image: first the minimum over attacks, then the average over images.",
)


def _per_draw(seed: int, images: int) -> torch.Tensor:
    return torch.rand(images, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WORST_OF_DRAWS = Exercise(
    key="09-worst-of-draws",
    prompt="Image i is answered correctly with probability p[i] in every independent draw of the noise (p [n]); return "
    "the expected share of images that are correct in all N draws.",
    reference=lambda p, N: float((p**N).mean()),
    cases=lambda: [
        (_per_draw(0, 20), 10),
        (_per_draw(1, 50), 3),
        (0.5 + 0.5 * _per_draw(2, 30), 20),
    ],
    mistakes=(
        Mistake(
            lambda p, N: float(p.mean() ** N),
            "the power of the average: images differ, and the ones that are always right carry the share",
        ),
        Mistake(
            lambda p, N: float((1 - (1 - p) ** N).mean()),
            "that is the best of N draws, correct at least once; the attacker needs one failure",
        ),
        Mistake(
            lambda p, N: float(p.mean()),
            "one draw only: whoever may ask N times needs one lucky draw among them",
        ),
        Mistake(
            lambda p, N: float((1 - N * (1 - p)).clamp(min=0).mean()),
            "failures were added up; that is a bound for rare ones, the probability is a product",
        ),
        Mistake(
            lambda p, N: float(p.min() ** N),
            "the worst image speaks for all; an accuracy is an average over images",
        ),
    ),
    meaning="The worst of N falls with N even without an attack: show the clean worst of N beside it.",
)


def _exact(correct: int, n: int, tail: float = 0.025) -> list[float]:
    """The two-sided interval, with its ends in closed form."""
    low = 0.0 if correct == 0 else stats.beta.ppf(tail, correct, n - correct + 1)
    high = 1.0 if correct == n else stats.beta.ppf(1 - tail, correct + 1, n - correct)
    return [float(low), float(high)]


def _normal(correct: int, n: int) -> list[float]:
    p = correct / n
    half = 1.959963984540054 * (p * (1 - p) / n) ** 0.5
    return [p - half, p + half]


HONEST_INTERVAL = Exercise(
    key="09-honest-interval",
    prompt="correct of n images are answered correctly; return low, high and a warning: the two ends of the 95 % "
    "Clopper-Pearson interval, and True where n is below 500.",
    reference=lambda correct, n: [*_exact(correct, n), n < 500],
    cases=lambda: [(38, 48), (400, 500), (0, 24), (512, 512), (260, 499)],
    mistakes=(
        Mistake(
            lambda correct, n: [*_normal(correct, n), n < 500],
            "the normal approximation: near 0 and 1 it is too short, or leaves the range of a probability",
        ),
        Mistake(
            lambda correct, n: [*_exact(correct, n, 0.05), n < 500],
            "5 % were given to each side: that is an interval at 90 %",
        ),
        Mistake(
            lambda correct, n: [*_exact(correct, n), n <= 500],
            "500 images are enough: the warning is for fewer",
        ),
        Mistake(
            lambda correct, n: [*_exact(correct, n), n > 500],
            "the warning is turned around: few images need it, not many",
        ),
        Mistake(
            lambda correct, n: [
                *(stats.beta.ppf((0.025, 0.975), correct + 1, n - correct + 1)),
                n < 500,
            ],
            "those are the quantiles of one posterior (a uniform prior); Clopper and Pearson's two ends belong to "
            "two different beta laws",
        ),
    ),
    meaning="500 images leave about four points on either side at 70 %: differences of two points are not findings.",
)

# ---------------------------------------------------------------------------------------------------------------------
# Which fault does a mystery have?

FAULTS = (
    "honest",
    "two-faced",
    "saturated",
    "negative",
    "reseeded",
    "quantised",
    "noisy",
    "inflated",
    "peeked",
)
MYSTERIES = {1: "quantised", 2: "noisy", 3: "two-faced", 4: "reseeded"}
_UNLIKE = {  # what the diagnosis would have lit, where the lamps say otherwise
    "honest": "an honest classifier has no red lamp; look again at the rows of this one",
    "saturated": "large logits stop one loss (lamps 4 and 15) and no other, which is not what burns here",
    "negative": "negative logits light lamps 4 and 15 and leave everything else alone",
    "inflated": "inflated counts are a fault of certificates (lamps 27, 28 and 31), and these claim none",
    "peeked": "a bound that was read too often is a fault of certificates (lamps 27 and 31), and these claim none",
    "quantised": "a rounded input leaves no gradient at all (lamp 3) and every call alike; this one has a gradient",
    "two-faced": "two faces differ with and without gradients (lamps 1 and 2); those two agree here, or there is "
    "nothing to compare",
    "noisy": "a noisy classifier answers differently at every call (lamp 5), and its survivors fall once one draw is "
    "held (lamp 18); this one does neither",
    "reseeded": "a reseeded classifier says that it is random and answers twice the same (lamp 5); this one does not",
}


def _verify_diagnoses(diagnosis: Callable) -> None:
    for number, right in MYSTERIES.items():
        answer = diagnosis(number)
        if answer not in FAULTS:
            raise NotYet(
                f"09-diagnosis: expected one of {', '.join(FAULTS)} for mystery {number}, got {answer!r}."
            )
        if answer != right:
            raise NotYet(
                f"09-diagnosis: not yet: mystery {number} is not {answer!r}: {_UNLIKE[answer]}."
            )


def _confused(wrong: dict[int, str]) -> Callable:
    """A diagnosis that is right except for some mysteries, such as {2: "reseeded"}."""
    return lambda mystery: wrong.get(mystery, MYSTERIES[mystery])


DIAGNOSIS = Exercise(
    key="09-diagnosis",
    prompt="Given the number of a mystery (1 to 4), return the name of its fault as in planted.FAULTS, such as "
    "'saturated'.",
    reference=lambda mystery: MYSTERIES[mystery],
    cases=lambda: [],
    mistakes=tuple(
        Mistake(_confused(wrong), _UNLIKE[name])
        for name, wrong in (
            ("saturated", {1: "saturated"}),
            ("honest", {4: "honest"}),
            ("two-faced", {1: "two-faced"}),
            ("reseeded", {2: "reseeded", 4: "noisy"}),
            ("noisy", {4: "noisy"}),
            ("quantised", {3: "quantised"}),
            ("negative", {3: "negative"}),
            ("inflated", {2: "inflated"}),
        )
    ),
    meaning="Every fault has its own pattern of lamps: a red lamp is a place to look, not a verdict on the idea.",
    verify=_verify_diagnoses,
)
