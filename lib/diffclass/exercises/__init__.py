"""The exercises of the notebooks, with their cases and the classic mistakes that `course.grade` recognises."""

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

EXERCISES: dict[str, Exercise] = {
    exercise.key: exercise
    for exercise in (
        FORWARD_NOISE, UNITS,
        Q_SAMPLE, SIGMA_OF_ABAR, SNR_SCHEDULE,
        VE_WEIGHT, KL_GAUSSIANS, POSTERIOR_MEAN,
        BAYES_POSTERIOR, TEMPERATURE, PRIOR_SHIFT,
        MIXTURE_DENOISER, TWEEDIE, EMPIRICAL_DENOISER,
        CERTIFIED_RADIUS,
    )
}

__all__ = [
    "EXERCISES", "Exercise", "Mistake", "NotYet",
    "FORWARD_NOISE", "UNITS",
    "Q_SAMPLE", "SIGMA_OF_ABAR", "SNR_SCHEDULE",
    "VE_WEIGHT", "KL_GAUSSIANS", "POSTERIOR_MEAN",
    "BAYES_POSTERIOR", "TEMPERATURE", "PRIOR_SHIFT",
    "MIXTURE_DENOISER", "TWEEDIE", "EMPIRICAL_DENOISER",
    "CERTIFIED_RADIUS",
]
