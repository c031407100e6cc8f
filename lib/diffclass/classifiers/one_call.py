"""Bayes' rule from one call of the network: where the answer without a class lies among those with one."""

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.noised import carried_sigma
from diffclass.denoisers.base import Denoiser

ROUNDS = 40  # of Newton's method, at most; about 15 are needed
FLOOR = 1e-12  # where the barrier ends: the product of a share and of what it costs, in units of the mean square


def barycentric(heads: Tensor, null: Tensor) -> Tensor:
    """The shares of a convex combination of the heads that comes nearest to the answer without a class.

    Formula     p = argmin over the simplex of ||D_null - sum_k p_k D_k||^2 = p^T G p,  G_jk = <D_j - D_null, D_k - D_null>
    Source      D_null = E[x0 | x_sigma] = sum_k p(k | x_sigma) D_k: the tower rule, so p is the posterior
    Method      Newton's method on the simplex with a logarithmic barrier, in float64 (Boyd & Vandenberghe 2004, 11.7);
                one more step is differentiated, which is the implicit function's derivative
    Shapes      heads [B,K,D], null [B,D] -> log p [B,K], float64; a head that has no share gets a small one, whose
                logarithm falls with its distance
    Unique      where the heads are affinely independent, K <= D + 1 in general position
    """
    away = (heads - null[:, None]).double()
    gram = away @ away.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    gram = gram / scale[:, None, None]
    with torch.no_grad():
        share, cost = _central(gram.detach())
    step = _newton(gram, share, cost, torch.full_like(share[:, :1], FLOOR))
    return (share * (1 + (step[0] / share).clamp_min(-0.5))).log()


def _central(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Shares and costs of the point where all of their products are FLOOR. Shapes: [B,K,K] -> [B,K], [B,K]."""
    batch, count, _ = gram.shape
    share = gram.new_full((batch, count), 1 / count)
    cost = gram.new_ones((batch, count))
    for _ in range(ROUNDS):
        gap = (share * cost).mean(1, keepdim=True)
        barrier = (0.1 * gap).clamp_min(FLOOR)
        more_share, more_cost = _newton(gram, share, cost, barrier)
        length = torch.minimum(_reach(share, more_share), _reach(cost, more_cost))
        share = share + length * more_share
        cost = cost + length * more_cost
        if bool((gap <= 1.001 * FLOOR).all()) and bool((length > 0.999).all()):
            break
    return share, cost


def _newton(gram: Tensor, share: Tensor, cost: Tensor, barrier: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards  G p + lambda = cost,  sum p = 1,  p cost = barrier.  Shapes: -> [B,K], [B,K]."""
    slope = (gram @ share[:, :, None])[:, :, 0]
    matrix = gram + torch.diag_embed(cost / share)
    ones = torch.ones_like(share)
    right = torch.stack([barrier / share - slope, ones], 2)
    solved = torch.linalg.solve(matrix, right)
    lag = (solved[:, :, 0].sum(1) + share.sum(1) - 1) / solved[:, :, 1].sum(1)
    more_share = solved[:, :, 0] - lag[:, None] * solved[:, :, 1]
    more_cost = barrier / share - cost - cost / share * more_share
    return more_share, more_cost


def _reach(value: Tensor, change: Tensor) -> Tensor:
    """How much of a step keeps a value positive. Shapes: [B,K], [B,K] -> [B,1]."""
    limits = torch.where(change < 0, -0.99 * value / change, torch.ones_like(value))
    return limits.amin(1, keepdim=True).clamp_max(1.0)


class _AmongHeads(Classifier):
    """What classifiers have in common that ask a network once, at one level, under every class and under none."""

    def __init__(self, denoiser: Denoiser, sigma: float, follow: str):
        super().__init__()
        if not denoiser.has_null:
            raise ValueError(
                "expected a denoiser that also answers without a class, among whose heads that answer lies; this "
                f"{type(denoiser).__name__} was trained without a null class."
            )
        self.denoiser = denoiser
        self.sigma = sigma
        self.follow = units.chosen(follow, ("all", "null", "heads"), "what gradients follow")
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape

    @abstractmethod
    def noised(self, x: Tensor, noise: Noise) -> Tensor:
        """The noised picture that the network is asked about, in model space. Shapes: x [B,C,H,W] -> the same."""

    @abstractmethod
    def following(self, follow: str) -> Self:
        """The same values, the gradient of one side of the difference alone: "null" or "heads"."""

    @abstractmethod
    def of_answers(self, heads: Tensor, null: Tensor) -> Tensor:
        """Logits from denoised pictures. Shapes: heads [B,K,C,H,W], null [B,C,H,W] -> [B,K]."""

    def answers(self, x: Tensor, noise: Noise = ()) -> tuple[Tensor, Tensor]:
        """The denoised pictures under each class, and without one. Shapes: -> [B,K,C,H,W], [B,C,H,W]."""
        drawn = self.prepared(x, noise)
        return self._answers(x, drawn)

    def _answers(self, x: Tensor, drawn: Noise) -> tuple[Tensor, Tensor]:
        every = list(range(self.num_classes + 1))
        denoised = self.denoiser(self.noised(x, drawn), self.sigma, every)
        return denoised[:, :-1], denoised[:, -1]

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        heads, null = self._answers(x, noise)
        if self.follow == "null":
            heads = heads.detach()
        if self.follow == "heads":
            null = null.detach()
        return self.of_answers(heads, null)

    def routes(self) -> dict[str, Classifier]:
        """The gradient of the null head alone, and that of the heads alone: each may be masked by the other."""
        if self.follow != "all":
            return {}
        return {
            "the null head alone": self.following("null"),
            "the heads alone": self.following("heads"),
        }

    @property
    def calls(self) -> int:
        """See `Classifier.calls`: one, where the network has a head for each class."""
        return self.denoiser.calls(self.num_classes + 1)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, gradients of {self.follow}"


class OneCallClassifier(_AmongHeads):
    """p(y | x_sigma) from one noised picture and one call of a network with a head for each class and one for none.

    Formula     logit_k(x) = ln p_k,  p the barycentric coordinates of D_null(x_sigma) among the D_k(x_sigma), with
                x_sigma = 2x - 1 + sigma eps (see `barycentric`)
    Meaning     neither the clean picture nor a temperature is needed: the logits are log-probabilities. Exact for an exact
                denoiser, whose classes have the prior of its D_null; a network's D_null need not lie among its heads
    Source      this course, notebook 06b
    Shapes      x [B,C,H,W] in [0,1], noise [B or 1,C,H,W] -> [B,K] in nats
    Units       sigma in model space
    Errors      ValueError for a denoiser without a null class, or a level outside its range
    """

    def __init__(self, denoiser: Denoiser, sigma: float, *, follow: str = "all"):
        super().__init__(denoiser, float(denoiser.check_levels(units.check_sigma(sigma))), follow)

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `Classifier.sample_noise`. Shapes: -> [images,C,H,W]."""
        shape = (images, *self.image_shape)
        return torch.randn(shape, generator=generator, device=generator.device)

    def noised(self, x: Tensor, noise: Noise) -> Tensor:
        """2x - 1 + sigma eps."""
        return units.to_model(x) + self.sigma * noise

    def following(self, follow: str) -> "OneCallClassifier":
        """The same values, other gradients."""
        return OneCallClassifier(self.denoiser, self.sigma, follow=follow)

    def of_answers(self, heads: Tensor, null: Tensor) -> Tensor:
        """Log-probabilities from denoised pictures. Shapes: heads [B,K,C,H,W], null [B,C,H,W] -> [B,K] in nats."""
        return barycentric(heads.flatten(2), null.flatten(1)).to(heads)


class NoisedOneCallClassifier(_AmongHeads):
    """p(y | x + sigma_pixel eps) from one call: of a picture that already carries the noise, no other is added.

    Formula     logit_k(x_tau) = ln p_k,  p the barycentric coordinates of D_null(z_tau, sigma_tau) among the
                D_k(z_tau, sigma_tau),  z_tau = 2 x_tau - 1,  sigma_tau = 2 sigma_pixel (see `barycentric`)
    Meaning     that of `OneCallClassifier`: the whole posterior of a noised picture for one call, without randomness
    Source      this course, notebook 06b
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value -> [B,K] in nats
    Randomness  none
    Errors      ValueError for a denoiser without a null class; those of `carried_sigma`
    """

    def __init__(self, denoiser: Denoiser, sigma_pixel: float, *, follow: str = "all"):
        super().__init__(denoiser, carried_sigma(denoiser, sigma_pixel), follow)
        self.sigma_pixel = units.sigma_to_pixel(self.sigma)

    def noised(self, x: Tensor, noise: Noise) -> Tensor:
        """2 x_tau - 1, which carries its noise."""
        return units.to_model(x)

    def following(self, follow: str) -> "NoisedOneCallClassifier":
        """The same values, other gradients."""
        return NoisedOneCallClassifier(self.denoiser, self.sigma_pixel, follow=follow)

    def of_answers(self, heads: Tensor, null: Tensor) -> Tensor:
        """Log-probabilities from denoised pictures. Shapes: heads [B,K,C,H,W], null [B,C,H,W] -> [B,K] in nats."""
        return barycentric(heads.flatten(2), null.flatten(1)).to(heads)


class NearestHeadClassifier(_AmongHeads):
    """The class whose answer is nearest to the one without a class, for a picture that already carries noise.

    Formula     logit_k(x_tau) = -||D_k(z_tau, sigma_tau) - D_null(z_tau, sigma_tau)||^2 / sigma_tau^2,
                z_tau = 2 x_tau - 1,  sigma_tau = 2 sigma_pixel
    Meaning     D_k - D_null = sigma_tau^2 grad log p(k | z_tau), so the logit is -sigma_tau^2 ||grad log p(k | z_tau)||^2:
                the class whose posterior is flattest, on the scale of the noise, wins. Bayes' answer for two classes, where
                ||D_1 - D_null|| = (1 - p_1) ||D_1 - D_2||; not always for more. Scores, no log-probabilities
    Source      this course, notebook 06b
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value -> [B,K]
    Randomness  none
    Errors      those of `NoisedOneCallClassifier`
    """

    scale = "scores"

    def __init__(self, denoiser: Denoiser, sigma_pixel: float, *, follow: str = "all"):
        super().__init__(denoiser, carried_sigma(denoiser, sigma_pixel), follow)
        self.sigma_pixel = units.sigma_to_pixel(self.sigma)

    def noised(self, x: Tensor, noise: Noise) -> Tensor:
        """2 x_tau - 1, which carries its noise."""
        return units.to_model(x)

    def following(self, follow: str) -> "NearestHeadClassifier":
        """The same values, other gradients."""
        return NearestHeadClassifier(self.denoiser, self.sigma_pixel, follow=follow)

    def of_answers(self, heads: Tensor, null: Tensor) -> Tensor:
        """Scores from denoised pictures. Shapes: heads [B,K,C,H,W], null [B,C,H,W] -> [B,K]."""
        return -((heads - null[:, None]) ** 2).flatten(2).sum(-1) / self.sigma**2
