"""The exercises of the notebooks, with their cases and the classic mistakes that `course.grade` recognises."""

from diffclass.course.exercises.attacking import DLR_LOSS, EOT_DRAWS, MARGIN_LOSS, STEEPEST_STEP
from diffclass.course.exercises.auditing import (
    DIAGNOSIS,
    HONEST_INTERVAL,
    PER_IMAGE_MINIMUM,
    WORST_OF_DRAWS,
)
from diffclass.course.exercises.base import Exercise, Mistake, NotYet
from diffclass.course.exercises.bayes import (
    BAYES_POSTERIOR,
    EMPIRICAL_DENOISER,
    MIXTURE_DENOISER,
    PRIOR_SHIFT,
    TEMPERATURE,
    TWEEDIE,
)
from diffclass.course.exercises.certify import CERTIFIED_RADIUS
from diffclass.course.exercises.cost import LEVEL_WEIGHTS, NEYMAN, PAIRED_VARIANCE, TWO_HEADS
from diffclass.course.exercises.forward import (
    FORWARD_NOISE,
    KL_GAUSSIANS,
    POSTERIOR_MEAN,
    Q_SAMPLE,
    SIGMA_OF_ABAR,
    SNR_SCHEDULE,
    UNITS,
    VE_WEIGHT,
)
from diffclass.course.exercises.losses import DC_LOGITS, LEAVE_ONE_OUT, MCNEMAR
from diffclass.course.exercises.maximisation import CONTRACTION, LOSS_GRADIENT, STRAIGHT_THROUGH
from diffclass.course.exercises.translation import (
    DISTANCE_LOGITS,
    WRONG_POSTERIOR,
    ZERO_COSINE_LABELS,
)

EXERCISES: dict[str, Exercise] = {
    exercise.key: exercise
    for exercise in (
        FORWARD_NOISE,
        UNITS,
        Q_SAMPLE,
        SIGMA_OF_ABAR,
        SNR_SCHEDULE,
        VE_WEIGHT,
        KL_GAUSSIANS,
        POSTERIOR_MEAN,
        BAYES_POSTERIOR,
        TEMPERATURE,
        PRIOR_SHIFT,
        MIXTURE_DENOISER,
        TWEEDIE,
        EMPIRICAL_DENOISER,
        DC_LOGITS,
        LEAVE_ONE_OUT,
        MCNEMAR,
        PAIRED_VARIANCE,
        LEVEL_WEIGHTS,
        NEYMAN,
        TWO_HEADS,
        CONTRACTION,
        LOSS_GRADIENT,
        STRAIGHT_THROUGH,
        STEEPEST_STEP,
        MARGIN_LOSS,
        DLR_LOSS,
        EOT_DRAWS,
        PER_IMAGE_MINIMUM,
        WORST_OF_DRAWS,
        HONEST_INTERVAL,
        DIAGNOSIS,
        ZERO_COSINE_LABELS,
        WRONG_POSTERIOR,
        DISTANCE_LOGITS,
        CERTIFIED_RADIUS,
    )
}

__all__ = [
    "EXERCISES",
    "Exercise",
    "Mistake",
    "NotYet",
    "FORWARD_NOISE",
    "UNITS",
    "Q_SAMPLE",
    "SIGMA_OF_ABAR",
    "SNR_SCHEDULE",
    "VE_WEIGHT",
    "KL_GAUSSIANS",
    "POSTERIOR_MEAN",
    "BAYES_POSTERIOR",
    "TEMPERATURE",
    "PRIOR_SHIFT",
    "MIXTURE_DENOISER",
    "TWEEDIE",
    "EMPIRICAL_DENOISER",
    "DC_LOGITS",
    "LEAVE_ONE_OUT",
    "MCNEMAR",
    "PAIRED_VARIANCE",
    "LEVEL_WEIGHTS",
    "NEYMAN",
    "TWO_HEADS",
    "CONTRACTION",
    "LOSS_GRADIENT",
    "STRAIGHT_THROUGH",
    "STEEPEST_STEP",
    "MARGIN_LOSS",
    "DLR_LOSS",
    "EOT_DRAWS",
    "PER_IMAGE_MINIMUM",
    "WORST_OF_DRAWS",
    "HONEST_INTERVAL",
    "DIAGNOSIS",
    "ZERO_COSINE_LABELS",
    "WRONG_POSTERIOR",
    "DISTANCE_LOGITS",
    "CERTIFIED_RADIUS",
]
