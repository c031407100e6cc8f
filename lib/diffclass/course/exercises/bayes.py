"""Exercises of notebooks 03 and 04: from likelihoods to posteriors, and the best possible denoiser."""

import math

import torch

from diffclass.course.exercises.base import Exercise, Mistake, normal


def _tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# 03 Bayes' rule


def _likelihood_cases() -> list[tuple]:
    prior = _tensor(0.2, 0.5, 0.3).log()
    huge = _tensor([1e4, 1e4 - 1, 0.0], [-1e4, -1e4 - 2, -1e4 + 1])
    return [(normal(0, 2, 3), prior), (huge, prior)]


BAYES_POSTERIOR = Exercise(
    key="03-bayes-posterior",
    prompt="Return p(k given x) [B,K] from log p(x given k) [B,K] and log p(k) [K]; log-likelihoods reach 10 000 nats.",
    reference=lambda log_likelihood, log_prior: (log_likelihood + log_prior).softmax(-1),
    cases=_likelihood_cases,
    mistakes=(
        Mistake(
            lambda log_likelihood, log_prior: (
                (log_likelihood + log_prior).exp()
                / (log_likelihood + log_prior).exp().sum(-1, keepdim=True)
            ),
            "right on small numbers, but exp(10 000) overflows and exp(-10 000) is zero: subtract the largest of "
            "each row first, which changes nothing else",
        ),
        Mistake(
            lambda log_likelihood, log_prior: log_likelihood.softmax(-1),
            "the prior is missing: the posterior is likelihood times prior, divided by their sum",
        ),
        Mistake(
            lambda log_likelihood, log_prior: (log_likelihood + log_prior.exp()).softmax(-1),
            "the prior was added as a probability; in log space a product is a sum of logarithms",
        ),
        Mistake(
            lambda log_likelihood, log_prior: (log_likelihood + log_prior).softmax(0),
            "normalised over the images; the probabilities of the classes must add up to 1 for each image",
        ),
        Mistake(
            lambda log_likelihood, log_prior: (log_likelihood + log_prior).log_softmax(-1),
            "that is the logarithm of the posterior; return probabilities",
        ),
    ),
    meaning="A generative model for each class, and one line of Bayes: that is a diffusion classifier.",
)


def _loss_cases() -> list[tuple]:
    losses = 0.12 + 5e-4 * normal(0, 3, 4)  # losses of real networks differ in the fourth digit
    return [(losses, 3072), (losses, 48)]


TEMPERATURE = Exercise(
    key="03-temperature",
    prompt="losses [B,K] hold the weighted diffusion loss of each class as a mean over the D values of an image; "
    "return the posterior p(k given x) [B,K] under a uniform prior.",
    reference=lambda losses, dimensions: (-dimensions * losses).softmax(-1),
    cases=_loss_cases,
    mistakes=(
        Mistake(
            lambda losses, dimensions: (-losses).softmax(-1),
            "nearly uniform: a mean over D values divides every nat by D, like a temperature of D",
        ),
        Mistake(
            lambda losses, dimensions: (dimensions * losses).softmax(-1),
            "the class with the largest loss wins: the log-likelihood is minus the loss",
        ),
        Mistake(
            lambda losses, dimensions: (-losses / dimensions).softmax(-1),
            "divided by D once more: undo the mean, do not repeat it",
        ),
        Mistake(
            lambda losses, dimensions: (-math.sqrt(dimensions) * losses).softmax(-1),
            "scaled by sqrt(D), as if losses were lengths; log-likelihoods of coordinates add, so D of them",
        ),
        Mistake(
            lambda losses, dimensions: -dimensions * losses,
            "those are the logits in nats; the posterior is their softmax",
        ),
    ),
    meaning="Mean and sum give the same winner and very different confidence; only the sum is in nats.",
    tol=1e-10,
)


def _prior_cases() -> list[tuple]:
    posterior = _tensor([0.7, 0.2, 0.1], [0.05, 0.9, 0.05])
    return [(posterior, _tensor(0.5, 0.3, 0.2), _tensor(0.1, 0.1, 0.8))]


PRIOR_SHIFT = Exercise(
    key="03-prior-shift",
    prompt="Return the posterior [B,K] under new_prior [K], given the posterior [B,K] under old_prior [K].",
    reference=lambda posterior, old_prior, new_prior: (
        posterior
        * new_prior
        / old_prior
        / (posterior * new_prior / old_prior).sum(-1, keepdim=True)
    ),
    cases=_prior_cases,
    mistakes=(
        Mistake(
            lambda posterior, old_prior, new_prior: posterior * new_prior / old_prior,
            "the rows do not add up to 1: divide by their sum",
        ),
        Mistake(
            lambda posterior, old_prior, new_prior: (
                posterior * new_prior / (posterior * new_prior).sum(-1, keepdim=True)
            ),
            "the old prior is still inside the posterior: take it out before putting the new one in",
        ),
        Mistake(
            lambda posterior, old_prior, new_prior: (
                posterior
                * old_prior
                / new_prior
                / (posterior * old_prior / new_prior).sum(-1, keepdim=True)
            ),
            "the ratio is upside down: a class that becomes more frequent must gain",
        ),
        Mistake(
            lambda posterior, old_prior, new_prior: (
                posterior * new_prior / old_prior / (posterior * new_prior / old_prior).sum(0)
            ),
            "normalised over the images instead of the classes",
        ),
    ),
    meaning="A generative classifier moves to another prior without retraining: the likelihood stays.",
)


# ---------------------------------------------------------------------------------------------------------------------
# 04 The optimal denoiser


def _mixture(x_sigma, sigma, means, scale, weights, *, spread=None, log_weights=None):
    """E[x0] of a one-dimensional mixture; `spread` and `log_weights` let the mistakes replace one ingredient."""
    total = scale**2 + sigma**2
    log_weights = weights.log() if log_weights is None else log_weights
    distance = (x_sigma[:, None] - means) ** 2
    share = (log_weights - distance / (2 * (total if spread is None else spread))).softmax(-1)
    return share, (scale**2 * x_sigma[:, None] + sigma**2 * means) / total


def _mixture_mean(*args, **kwargs):
    share, component = _mixture(*args, **kwargs)
    return (share * component).sum(-1)


def _mixture_cases() -> list[tuple]:
    x_sigma = torch.linspace(-3, 3, 9, dtype=torch.float64)
    return [
        (x_sigma, 0.8, _tensor(-1.0, 1.5), 0.5, _tensor(0.3, 0.7)),
        (x_sigma, 3.0, _tensor(-2.0, 1.0), 0.2, _tensor(0.8, 0.2)),
    ]


MIXTURE_DENOISER = Exercise(
    key="04-mixture-denoiser",
    prompt="x0 comes from two Gaussians with means [2], standard deviation scale and weights [2]; return "
    "E[x0 given x_sigma] for x_sigma [N].",
    reference=_mixture_mean,
    cases=_mixture_cases,
    mistakes=(
        Mistake(
            lambda x_sigma, sigma, means, scale, weights: _mixture_mean(
                x_sigma, sigma, means, scale, weights, spread=sigma**2
            ),
            "the responsibilities forget the width of the components: x_sigma has the variance scale^2 + sigma^2",
        ),
        Mistake(
            lambda x_sigma, sigma, means, scale, weights: _mixture_mean(
                x_sigma, sigma, means, scale, weights, log_weights=torch.zeros_like(weights)
            ),
            "the weights of the components do not enter; they are the prior of this little classifier",
        ),
        Mistake(
            lambda x_sigma, sigma, means, scale, weights: (
                _mixture(x_sigma, sigma, means, scale, weights)[0] * means
            ).sum(-1),
            "within a component x0 is not its mean: the best guess lies between the mean and x_sigma",
        ),
        Mistake(
            lambda x_sigma, sigma, means, scale, weights: (
                _mixture(x_sigma, sigma, means, scale, weights)[0]
                * (sigma**2 * x_sigma[:, None] + scale**2 * means)
                / (scale**2 + sigma**2)
            ).sum(-1),
            "within a component the shares of x_sigma and the mean are swapped: much noise means trust the mean",
        ),
        Mistake(
            lambda x_sigma, sigma, means, scale, weights: _mixture(
                x_sigma, sigma, means, scale, weights
            )[1].gather(
                1, _mixture(x_sigma, sigma, means, scale, weights)[0].argmax(-1, keepdim=True)
            )[:, 0],
            "only the likelier component is used; an expectation averages over both",
        ),
    ),
    meaning="The best denoiser classifies softly, then shrinks: the classifier was inside the denoiser all along.",
)

TWEEDIE = Exercise(
    key="04-tweedie",
    prompt="Return the denoiser's answer E[x0 given x_sigma] from x_sigma, sigma and the score, the gradient of "
    "log p_sigma at x_sigma.",
    reference=lambda x_sigma, sigma, score: x_sigma + sigma**2 * score,
    cases=lambda: [(normal(0, 2, 3), 0.5, normal(1, 2, 3)), (normal(2, 4), 3.0, normal(3, 4))],
    mistakes=(
        Mistake(
            lambda x_sigma, sigma, score: x_sigma + sigma * score,
            "the step has the wrong units: a score is 1/length, so it takes a squared length to make a step",
        ),
        Mistake(
            lambda x_sigma, sigma, score: x_sigma - sigma**2 * score,
            "this walks away from the data: the score points to where the density grows",
        ),
        Mistake(
            lambda x_sigma, sigma, score: x_sigma + sigma**2 / 2 * score,
            "half a step: the 1/2 belongs to Langevin dynamics, not to Tweedie's formula",
        ),
        Mistake(
            lambda x_sigma, sigma, score: sigma**2 * score,
            "that is the step; the answer is where it leads from x_sigma",
        ),
    ),
    meaning="Denoiser and score are one function: whoever can denoise knows the gradient of the log-density.",
)


def _distance(x_sigma, data):
    return ((x_sigma[:, None] - data) ** 2).sum(-1)  # [B,N]


EMPIRICAL_DENOISER = Exercise(
    key="04-empirical-denoiser",
    prompt="The data are exactly the N rows of data [N,D], all equally likely; return E[x0 given x_sigma] for "
    "x_sigma [B,D].",
    reference=lambda x_sigma, sigma, data: (
        (-_distance(x_sigma, data) / (2 * sigma**2)).softmax(-1) @ data
    ),
    cases=lambda: [
        (normal(0, 4, 3), 0.7, normal(1, 6, 3)),
        (normal(2, 2, 5), 1.6, normal(3, 4, 5)),
    ],
    mistakes=(
        Mistake(
            lambda x_sigma, sigma, data: (
                (-_distance(x_sigma, data) / (2 * sigma)).softmax(-1) @ data
            ),
            "the temperature is 2 sigma; a squared distance is compared with a variance, so sigma enters squared "
            "(this slip has been published)",
        ),
        Mistake(
            lambda x_sigma, sigma, data: (-_distance(x_sigma, data) / sigma**2).softmax(-1) @ data,
            "the factor 1/2 of the Gaussian's exponent is missing",
        ),
        Mistake(
            lambda x_sigma, sigma, data: (
                (-_distance(x_sigma, data) / (2 * sigma**2)).softmax(0) @ data
            ),
            "the weights are normalised over the noisy images; for each of them, the data's weights add up to 1",
        ),
        Mistake(
            lambda x_sigma, sigma, data: (
                (-_distance(x_sigma, data).sqrt() / (2 * sigma**2)).softmax(-1) @ data
            ),
            "the distance must be squared, as in the Gaussian density",
        ),
        Mistake(
            lambda x_sigma, sigma, data: (
                (-_distance(x_sigma, data) / data.shape[1] / (2 * sigma**2)).softmax(-1) @ data
            ),
            "the squared distance is averaged over the D coordinates; log-densities add up",
        ),
        Mistake(
            lambda x_sigma, sigma, data: data[_distance(x_sigma, data).argmin(-1)],
            "only the nearest row is returned: that is the limit sigma -> 0, not the mean",
        ),
    ),
    meaning="The best denoiser of a finite data set recites it; a network is useful because it does not.",
)
