"""The exercises of the notebooks, with their cases and the classic mistakes that `course.grade` recognises."""

from diffclass.exercises.attacking import DLR_LOSS, EOT_DRAWS, MARGIN_LOSS, STEEPEST_STEP
from diffclass.exercises.auditing import (
    DIAGNOSIS,
    HONEST_INTERVAL,
    PER_IMAGE_MINIMUM,
    WORST_OF_DRAWS,
)
from diffclass.exercises.base import Exercise, Mistake, NotYet
from diffclass.exercises.bayes import (
    BAYES_POSTERIOR,
    EMPIRICAL_DENOISER,
    MIXTURE_DENOISER,
    PRIOR_SHIFT,
    TEMPERATURE,
    TWEEDIE,
)
from diffclass.exercises.certify import CERTIFIED_RADIUS
from diffclass.exercises.cost import LEVEL_WEIGHTS, NEYMAN, PAIRED_VARIANCE
from diffclass.exercises.forward import (
    FORWARD_NOISE,
    KL_GAUSSIANS,
    POSTERIOR_MEAN,
    Q_SAMPLE,
    SIGMA_OF_ABAR,
    SNR_SCHEDULE,
    UNITS,
    VE_WEIGHT,
)
from diffclass.exercises.losses import DC_LOGITS, LEAVE_ONE_OUT, MCNEMAR
from diffclass.exercises.maximisation import CONTRACTION, LOSS_GRADIENT, STRAIGHT_THROUGH
from diffclass.exercises.translation import DISTANCE_LOGITS, WRONG_POSTERIOR, ZERO_COSINE_LABELS

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
