"""Attacks that follow gradients, frame by frame; written to be read."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import units
from diffclass.attacks.losses import AttackLoss, Penalty, margin_loss
from diffclass.classifiers.base import Classifier, Noise, NoiseSource, UndecidedError, decided
from diffclass.classifiers.foreign import flat_scores


@dataclass(frozen=True)
class AttackStep:
    """One frame of an attack's film: where each image of the batch stands.

    Shapes      x [B,C,H,W] in [0,1]; logits [B,K]; fooled [B] at this frame; size [B], the norm of x - x0
    """

    step: int
    x: Tensor
    logits: Tensor
    fooled: Tensor
    size: Tensor


def size_of(delta: Tensor, norm: str) -> Tensor:
    """L-inf or L2 norm of each perturbation. Shapes: [B,C,H,W] -> [B]. Units: pixels.

    Meaning     the size of a perturbation that is not finite is not finite either, which whoever verifies one has to see
    Errors      those of `units.check_norm` and `units.check_reals`; ValueError for another shape
    """
    units.check_norm(norm)
    delta = units.check_reals(delta, "perturbations")
    if delta.ndim != 4:
        raise ValueError(f"expected perturbations [B,C,H,W], got shape {list(delta.shape)}.")
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def project(x: Tensor, x0: Tensor, epsilon: float, norm: str) -> Tensor:
    """The perturbed image brought back into the budget around x0, and into [0,1]. Shapes: [B,C,H,W] -> the same.

    Errors      those of `units.check_budget`, `units.check_images`
    """
    units.check_images(x0)
    units.check_images(x, tuple(x0.shape[1:]), pixel_range=False)
    epsilon = units.check_budget(epsilon, norm, math.prod(x0.shape[1:]))
    delta = x - x0
    if norm == "linf":
        delta = delta.clamp(-epsilon, epsilon)
    else:
        delta = (
            delta
            * (epsilon / size_of(delta, "l2").clamp_min(1e-12)).clamp(max=1)[:, None, None, None]
        )
    return (x0 + delta).clamp(0, 1)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The steepest direction of a norm: sign(g) for L-inf, g/||g|| for L2. Shapes: [B,C,H,W] -> the same.

    Errors      those of `units.check_norm`, `units.check_images`
    """
    units.check_norm(norm)
    units.check_images(gradient, pixel_range=False)
    if norm == "linf":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]


def _start(x0: Tensor, epsilon: float, norm: str, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return x0
    push = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
    return project(x0 + epsilon * ascent(push, norm), x0, epsilon, norm)


def _checked(
    classifier: Classifier, x: Tensor, y: Tensor, epsilon: float, norm: str, steps: int
) -> tuple[float, int]:
    """A budget and a number of steps, where pictures, labels and the classifier can be meant too."""
    units.check_images(x, classifier.image_shape)
    units.check_labels(y, len(x), classifier.num_classes)
    classifier.check_mode()
    steps = units.check_whole(steps, "steps")
    if steps < 0:
        raise ValueError(f"expected steps >= 0, got {steps}.")
    return units.check_budget(epsilon, norm, math.prod(x.shape[1:])), steps


def noise_at(noise: NoiseSource, step: int, draw: int) -> Noise:
    """The noise of one call: the one that is held, or that of this step and draw."""
    return noise(step, draw) if callable(noise) else noise


def expected_gradient(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    noise: NoiseSource = (),
    step: int = 0,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    penalty: Penalty | None = None,
    differentiate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of an attack's loss, the logits and the loss, averaged over draws of a random classifier (EOT).

    Formula     1/n sum_i grad_x [loss(f_i(x), y) - penalty(x)];  its variance falls as 1/n
    Source      Athalye et al. 2018
    Shapes      x [B,C,H,W], y [B] -> gradient [B,C,H,W] (zeros unless `differentiate`), logits [B,K], loss [B]
    Randomness  `noise`: one for every draw, or a function of the step and the draw
    Errors      TypeError for logits without a gradient in x; ValueError for draws < 1, or several draws of one noise
    """
    draws = units.check_whole(draws, "draws")
    if draws < 1:
        raise ValueError(f"expected at least one draw to average over, got {draws}.")
    if draws > 1 and not callable(noise):
        raise ValueError(
            f"expected a function of step and draw as the noise of {draws} draws, got one noise, of which all draws are "
            "the same; pass fresh_noise(classifier, pictures, seed)."
        )
    if differentiate and torch.is_inference_mode_enabled():
        raise TypeError(
            "expected to be asked for a gradient outside torch.inference_mode, under which there is none, got inside; "
            "torch.no_grad does not matter here."
        )
    units.check_images(x, classifier.image_shape, pixel_range=False)
    x = x.detach().requires_grad_(differentiate)
    gradient = torch.zeros_like(x)
    logits = 0.0
    value = 0.0
    for draw in range(draws):
        with torch.set_grad_enabled(differentiate):
            drawn = classifier(x, noise_at(noise, step, draw))
            height = loss(drawn, y) if penalty is None else loss(drawn, y) - penalty(x)
            total = height.sum()
        if differentiate:
            slope = (
                torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
            )
            if slope is None:
                raise TypeError(
                    "expected logits that depend on the image differentiably, got logits without a "
                    "gradient; the classifier detaches, counts votes, or runs under torch.no_grad."
                )
            gradient = gradient + slope / draws
        logits = logits + drawn.detach() / draws
        value = value + height.detach() / draws
    return gradient, logits, value


def _look(classifier, x, y, step: int, steps: int, **how) -> tuple[Tensor, Tensor, Tensor]:
    try:
        gradient, logits, value = expected_gradient(
            classifier, x, y, step=step, differentiate=step < steps, **how
        )
    except UndecidedError as error:
        raise UndecidedError(
            f"the classifier's logits became {error.kind} at step {step}; the frames before it stand, "
            "and infinity minus infinity, 0/0 or weights that are not finite are the likely cause.",
            error.kind,
        ) from error
    sentence = flat_scores(logits) if step == 0 else ""
    if sentence:
        raise ValueError(sentence)
    return gradient, logits, value


def _finite(gradient: Tensor, step: int) -> Tensor:
    if not bool(torch.isfinite(gradient).all()):
        raise FloatingPointError(
            f"the attack's gradient became non-finite at step {step}; the frames so far "
            "stand, and the slope of a root or a logarithm at 0 is the likely cause."
        )
    return gradient


def pgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    noise: NoiseSource = (),
    norm: str = "linf",
    steps: int = 20,
    step_size: float | None = None,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    penalty: Penalty | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[AttackStep]:
    """Projected gradient ascent, frame by frame; frame 0 is the clean image (or the random start).

    Formula     x <- project(x + step * sign(g)) for L-inf, or step * g/||g|| for L2; g averages `draws` gradients (EOT)
    Source      Madry et al. 2018; EOT: Athalye et al. 2018
    Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `AttackStep`
    Units       epsilon and step_size in pixels; step_size defaults to 2.5 epsilon / steps
    Randomness  a random start if `generator` is given; `noise`: one for all steps, or a function of the step and the draw
    Errors      ValueError for a budget, a step size or labels that cannot be meant, or a classifier in training mode;
                FloatingPointError for a gradient or logits that are not finite; the frames before it stand
    """
    epsilon, steps = _checked(classifier, x, y, epsilon, norm, steps)
    if step_size is None:
        step_size = 2.5 * epsilon / max(1, steps)
    else:
        step_size = units.check_step_size(step_size, epsilon, steps)
    x0 = x
    x = _start(x, epsilon, norm, generator)
    for step in range(steps + 1):
        gradient, logits, _ = _look(
            classifier, x, y, step, steps, noise=noise, loss=loss, draws=draws, penalty=penalty
        )
        yield AttackStep(
            step, x.detach(), logits, (decided(logits) != y), size_of(x.detach() - x0, norm)
        )
        if step < steps:
            x = project(
                x.detach() + step_size * ascent(_finite(gradient, step), norm), x0, epsilon, norm
            )


@dataclass(frozen=True)
class SearchStep(AttackStep):
    """One frame of `apgd`: an `AttackStep` at the best image so far, and where the search is.

    Shapes      at [B,C,H,W], where the search is; value [B], the loss there; step_size [B], in pixels
    """

    at: Tensor
    value: Tensor
    step_size: Tensor


class _Halving:
    """APGD's step sizes: each image's is halved when it climbs too rarely, or has stopped improving.

    Looks after 22 % of the steps, then after ever shorter stretches, of at least 6 %.
    """

    def __init__(self, epsilon: float, steps: int, first: Tensor, rate: float = 0.75):
        self.size = torch.full_like(first, 2 * epsilon)
        self.rate = rate
        self.rises = 0
        self.since = 0
        self.stretch, self.shorter, self.least = (
            max(1, int(share * steps)) for share in (0.22, 0.03, 0.06)
        )
        self.halved = torch.ones_like(first, dtype=torch.bool)
        self.best = first
        self.last = first

    def after(self, value: Tensor, best: Tensor) -> Tensor:
        """Take note of a step; the images that go on from their best point, with half the step. Shapes: [B] -> [B]."""
        self.rises = self.rises + (value > self.last)
        self.since = self.since + 1
        self.last = value
        if self.since < self.stretch:
            return torch.zeros_like(self.halved)
        self.halved = (self.rises <= self.rate * self.stretch) | (
            ~self.halved & (best <= self.best)
        )
        self.size = torch.where(self.halved, self.size / 2, self.size)
        self.rises = 0
        self.since = 0
        self.best = best
        self.stretch = max(self.stretch - self.shorter, self.least)
        return self.halved


def apgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    noise: NoiseSource = (),
    norm: str = "linf",
    steps: int = 100,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    penalty: Penalty | None = None,
    generator: torch.Generator | None = None,
    momentum: float = 0.25,
) -> Iterator[SearchStep]:
    """PGD that chooses its step sizes itself: from 2 epsilon, halved for each image whose loss no longer rises.

    Formula     z = project(x + step g);  x <- project(x + (1 - momentum)(z - x) + momentum (x - x_before))
    Source      Croce & Hein 2020, algorithm 1, with the checkpoints of its code
    Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `SearchStep`; its x is the image of the highest loss so far, which
                fools if any did for the margin and DLR losses, not always for cross-entropy or with a penalty
    Randomness  that of `pgd`. Under fresh noise the highest loss is partly luck: judge x anew, with other noise
    Errors      those of `pgd`
    """
    epsilon, steps = _checked(classifier, x, y, epsilon, norm, steps)
    momentum = units.check_real(momentum, "a momentum")
    if not 0 <= momentum < 1:
        raise ValueError(
            f"expected a momentum of at least 0 and below 1, got {momentum}; APGD uses 0.25."
        )
    x0 = x
    at = _start(x, epsilon, norm, generator)
    before = None
    again = torch.zeros_like(y, dtype=torch.bool)
    for step in range(steps + 1):
        seen = (
            at.detach(),
            *_look(
                classifier, at, y, step, steps, noise=noise, loss=loss, draws=draws, penalty=penalty
            ),
        )
        if step == 0:
            best = seen
            halving = _Halving(epsilon, steps, seen[-1])
        else:
            best = _where(seen[-1] > best[-1], seen, best)
            again = halving.after(seen[-1], best[-1])
        yield SearchStep(
            step,
            best[0],
            best[2],
            decided(best[2]) != y,
            size_of(best[0] - x0, norm),
            seen[0],
            seen[-1],
            halving.size,
        )
        if step < steps:
            at, gradient = _where(again, best[:2], seen[:2])
            push = halving.size[:, None, None, None] * ascent(_finite(gradient, step), norm)
            aim = project(at + push, x0, epsilon, norm)
            drift = 0 if before is None else momentum * (aim - at - (at - before))
            at, before = project(aim - drift, x0, epsilon, norm), at


def worst_case(runs: Iterable[Iterator[AttackStep]]) -> Iterator[AttackStep]:
    """The worst of several attacks for each image, after each attack: restarts, other losses, other targets.

    Formula     an image is robust if no attack fools it; what is fooled keeps the first image that did it
    Shapes      attacks on the same batch, e.g. `worst_case(pgd(..., generator=g) for _ in range(5))` -> `AttackStep`
    Why         the share of images that survive all is below the smallest share that survives one
    Randomness  for a random classifier every further attack is also another draw of luck: judge the result anew
    """
    worst = None
    for number, (*_, last) in enumerate(runs):
        new = (last.x, last.logits, last.fooled, last.size)
        worst = _where(worst[2], worst, new) if worst else new
        yield AttackStep(number, *worst)


def _where(chosen: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Row by row, for several tensors at once. Shapes: chosen [B], tensors [B,...] -> the same."""
    return tuple(
        torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(yes, no, strict=True)
    )


def shrink(
    fooled: Callable[[Tensor], bool], x0: Tensor, x: Tensor, rounds: int = 8
) -> Iterator[Tensor | None]:
    """Bisection for the smallest fooling image on the segment from x0 to x; yields the best so far after each decision.

    Shapes      x0, x [1,C,H,W] -> yields [1,C,H,W]; None, and nothing more, if x itself does not fool
    Units       `fooled` decides for one image; what it accepted last is what is yielded, never an untested point
    """
    rounds = units.check_whole(rounds, "rounds", least=0)
    if not fooled(x):
        yield None
        return
    best = x
    low = 0.0
    high = 1.0
    yield best
    for _ in range(rounds):
        middle = (low + high) / 2
        candidate = x0 + middle * (x - x0)
        if fooled(candidate):
            best = candidate
            high = middle
        else:
            low = middle
        yield best


def smallest_l2(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    noise: NoiseSource = (),
    fooled: Callable[[Tensor], bool] | None = None,
    budgets=(0.25, 0.5, 1.0, 2.0, 4.0),
    steps: int = 20,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    rounds: int = 8,
) -> Iterator[Tensor | None]:
    """Search one image's smallest L2 perturbation by PGD at growing budgets and bisection; yields the best so far.

    Shapes      x [1,C,H,W], y [1] -> yields the adversarial image [1,C,H,W], or None while there is none, after every
                frame of an attack and every decision of a bisection, at most `longest_search` times; the last one is
                the result: `*_, best = smallest_l2(...)`
    Units       budgets in pixels; the norm of the result is an *upper bound* of the distance to the decision boundary
    Why         `fooled` decides and `classifier` gives gradients: they differ when votes decide, which have no gradient
    """
    units.check_images(x, classifier.image_shape)
    budgets = units.check_numbers(budgets, "budgets").flatten().tolist()
    rounds = units.check_whole(rounds, "rounds", least=0)
    held = noise_at(noise, 0, 0)
    decide = fooled or (lambda image: bool(decided(classifier(image, held)) != y))
    largest = math.prod(x.shape[1:]) ** 0.5
    if len(x) != 1 or not len(budgets):
        raise ValueError(
            f"expected one image and at least one budget, got {len(x)} images and {len(budgets)} budgets."
        )

    def within(budget: float, step_size: float | None = None) -> Iterator[Tensor | None]:
        reached = x
        for frame in pgd(
            classifier,
            x,
            y,
            budget,
            noise=noise,
            norm="l2",
            steps=steps,
            step_size=step_size,
            loss=loss,
            draws=draws,
        ):
            reached = frame.x
            yield None
        yield from shrink(decide, x, reached, rounds)

    best = None
    for budget in budgets:
        for best in within(min(budget, largest)):
            yield best
        if best is not None:
            break
    radius = 0.0 if best is None else float(size_of(best - x, "l2"))
    if radius > 0:  # once more from just inside: the nearest boundary is often elsewhere
        for other in within(radius, radius / 8):
            if other is not None and bool(size_of(other - x, "l2") < size_of(best - x, "l2")):
                best = other
            yield best


def longest_search(budgets: int, steps: int, rounds: int) -> int:
    """How many items `smallest_l2` yields at most: the frames and decisions of each budget, and once more at the end."""
    return (budgets + 1) * (steps + 1 + rounds + 1)
