"""Attacks on whatever maps pixels to logits, written to be read; and the view of a classifier that libraries need."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffclass import units

AttackLoss = Callable[[Tensor, Tensor], Tensor]  # logits [B,K], labels [B] -> [B], to be maximised


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class is ahead. Formula: max_{k != y} f_k - f_y; positive when fooled. Shapes: -> [B]."""
    right = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def cross_entropy_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Formula: -log softmax(f)_y. Its gradient vanishes when logits are many nats apart. Shapes: -> [B]."""
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


class AttackView(nn.Module):
    """What attack libraries receive: the same decision, with logits shifted to be >= 0 and scaled to a margin of one.

    Formula     (f_k - min_k f_k) / temperature; the shift is not differentiated, so gradients are those of f
    Why         CW in torchattacks takes max((1 - onehot) * f), which is 0 for all-negative logits: it does nothing to a
                log-posterior; cross-entropy is flat when logits are thousands of nats apart
    Shapes      x [B,C,H,W] in [0,1] -> [B,K]
    """

    def __init__(self, classifier: nn.Module, temperature: float):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"expected a temperature > 0, got {temperature}; use AttackView.calibrated.")
        self.classifier, self.temperature = classifier, float(temperature)
        self.num_classes, self.image_shape = classifier.num_classes, classifier.image_shape
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # libraries ask it for the device

    @classmethod
    def calibrated(cls, classifier: nn.Module, x: Tensor) -> "AttackView":
        """A view whose median gap between the two best classes on `x` is one."""
        with torch.no_grad():
            top = classifier(x).topk(2, dim=1).values
        gap = float((top[:, 0] - top[:, 1]).median())
        return cls(classifier, max(gap, torch.finfo(torch.float32).tiny))

    def forward(self, x: Tensor) -> Tensor:
        """Shifted and scaled logits. Shapes: [B,C,H,W] -> [B,K]."""
        logits = self.classifier(x)
        return (logits - logits.detach().amin(1, keepdim=True)) / self.temperature


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
    """L-inf or L2 norm of each perturbation. Shapes: [B,C,H,W] -> [B]. Units: pixels."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def project(x: Tensor, x0: Tensor, epsilon: float, norm: str) -> Tensor:
    """The perturbed image brought back into the budget around x0, and into [0,1]. Shapes: [B,C,H,W] -> the same."""
    delta = x - x0
    if norm == "linf":
        delta = delta.clamp(-epsilon, epsilon)
    else:
        delta = delta * (epsilon / size_of(delta, "l2").clamp_min(1e-12)).clamp(max=1)[:, None, None, None]
    return (x0 + delta).clamp(0, 1)


def _ascent(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]


def pgd(classifier: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, norm: str = "linf", steps: int = 20,
        step_size: float | None = None, loss: AttackLoss = margin_loss, draws: int = 1,
        generator: torch.Generator | None = None) -> Iterator[AttackStep]:
    """Projected gradient ascent, frame by frame; frame 0 is the clean image (or the random start).

    Formula     x <- project(x + step * sign(g)) for L-inf, or step * g/||g|| for L2; g averages `draws` gradients (EOT)
    Source      Madry et al. 2018; EOT: Athalye et al. 2018
    Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `AttackStep`
    Units       epsilon and step_size in pixels; step_size defaults to 2.5 epsilon / steps
    Randomness  a random start if `generator` is given; a random classifier draws its own noise
    Errors      ValueError for a budget or labels that cannot be meant; FloatingPointError for a gradient that is not
                finite or logits that are NaN, whose argmax would count as a class; the frames before it stand
    """
    units.check_images(x, classifier.image_shape)
    units.check_labels(y, len(x), classifier.num_classes)
    epsilon = units.check_budget(epsilon, norm, x[0].numel())
    step_size = 2.5 * epsilon / max(1, steps) if step_size is None else step_size
    x0 = x
    if generator is not None:
        push = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        x = project(x0 + epsilon * _ascent(push, norm), x0, epsilon, norm)
    for step in range(steps + 1):
        x = x.detach().requires_grad_(step < steps)
        gradient, logits = torch.zeros_like(x), None
        for _ in range(draws):
            with torch.set_grad_enabled(step < steps):
                drawn = classifier(x)
                logits = drawn.detach() if logits is None else logits + drawn.detach()
                if step < steps:
                    gradient = gradient + torch.autograd.grad(loss(drawn, y).sum(), x)[0]
        if bool(torch.isnan(logits).any()):
            raise FloatingPointError(f"the classifier's logits became NaN at step {step}; the frames before it stand, "
                                     "and infinity minus infinity or 0/0 in the classifier is the likely cause.")
        yield AttackStep(step, x.detach(), logits / draws, (logits.argmax(1) != y), size_of(x.detach() - x0, norm))
        if step < steps:
            if not bool(torch.isfinite(gradient).all()):
                raise FloatingPointError(f"the attack's gradient became non-finite at step {step}; the frames so far "
                                         "stand, and the slope of a root or a logarithm at 0 is the likely cause.")
            x = project(x.detach() + step_size * _ascent(gradient, norm), x0, epsilon, norm)


def shrink(fooled: Callable[[Tensor], bool], x0: Tensor, x: Tensor, rounds: int = 8) -> Tensor | None:
    """The smallest fooling image found on the segment from x0 to x, by bisection; None if x itself does not fool.

    Shapes      x0, x [1,C,H,W] -> [1,C,H,W]
    Units       `fooled` decides for one image; what it accepted last is what is returned, never an untested point
    """
    if not fooled(x):
        return None
    best, low, high = x, 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        candidate = x0 + middle * (x - x0)
        if fooled(candidate):
            best, high = candidate, middle
        else:
            low = middle
    return best


def smallest_l2(classifier: nn.Module, x: Tensor, y: Tensor, *, fooled: Callable[[Tensor], bool] | None = None,
                budgets=(0.25, 0.5, 1.0, 2.0, 4.0), steps: int = 20, loss: AttackLoss = margin_loss, draws: int = 1,
                rounds: int = 8) -> Iterator[Tensor | None]:
    """Search one image's smallest L2 perturbation by PGD at growing budgets and bisection; yields the best so far.

    Shapes      x [1,C,H,W], y [1] -> yields the adversarial image [1,C,H,W], or None while there is none; the last
                one is the result: `*_, best = smallest_l2(...)`
    Units       budgets in pixels; the norm of the result is an *upper bound* of the distance to the decision boundary
    Why         `fooled` decides and `classifier` gives gradients: they differ when votes decide, which have no gradient
    """
    decide = fooled or (lambda image: bool(classifier(image).argmax(1) != y))
    best, largest = None, x[0].numel() ** 0.5
    for budget in budgets:
        *_, last = pgd(classifier, x, y, min(budget, largest), norm="l2", steps=steps, loss=loss, draws=draws)
        best = shrink(decide, x, last.x, rounds)
        yield best
        if best is not None:
            break
    if best is not None:  # once more from just inside what was found: the nearest boundary is often elsewhere
        radius = float(size_of(best - x, "l2"))
        *_, last = pgd(classifier, x, y, radius, norm="l2", steps=steps, step_size=radius / 8, loss=loss, draws=draws)
        closer = shrink(decide, x, last.x, rounds)
        yield min((b for b in (best, closer) if b is not None), key=lambda b: float(size_of(b - x, "l2")))
