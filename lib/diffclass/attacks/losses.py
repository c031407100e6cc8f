"""What an attack maximises: functions of logits [B,K] and labels [B] -> [B]."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffclass import units

AttackLoss = Callable[[Tensor, Tensor], Tensor]  # logits [B,K], labels [B] -> [B], to be maximised
Penalty = Callable[[Tensor], Tensor]  # images [B,C,H,W] -> [B], subtracted from the loss


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class is ahead. Formula: max_{k != y} f_k - f_y; positive when fooled. Shapes: -> [B].

    Errors      ValueError for one class, beside which there is no wrong one
    """
    _check(logits, y)
    right = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def cross_entropy_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Formula: -log softmax(f)_y. Its gradient vanishes when logits are many nats apart. Shapes: -> [B]."""
    _check(logits, y)
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The difference-of-logits ratio: a margin that neither the scale nor the shift of the logits changes.

    Formula     (max_{k != y} f_k - f_y) / (f_(1) - f_(3)), f_(i) the i-th largest; positive when fooled
    Source      Croce & Hein 2020; ValueError for fewer than 3 classes
    """
    first, _, third = _largest(logits, 3, "margin_loss")
    return margin_loss(logits, y) / (first - third).clamp_min(1e-12)


def targeted_loss(target: Tensor) -> AttackLoss:
    """Towards one class for each image. Formula: f_target - f_y. Shapes: target [B] -> a loss of [B,K] and y [B]."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        _check(logits, y)
        units.check_labels(target, len(logits), logits.shape[1])
        if bool((target == y).any()):
            raise ValueError(
                "expected targets that differ from the labels, got an image that is to become what it is."
            )
        return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]

    return loss


def targeted_dlr_loss(target: Tensor) -> AttackLoss:
    """`targeted_loss` over f_(1) - (f_(3) + f_(4)) / 2 (Croce & Hein 2020); ValueError for fewer than 4 classes."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        first, _, third, fourth = _largest(logits, 4, "targeted_loss")
        return targeted_loss(target)(logits, y) / (first - (third + fourth) / 2).clamp_min(1e-12)

    return loss


def _check(logits: Tensor, y: Tensor) -> None:
    """Raise unless these are logits [B,K] of two classes or more, and a label for each row; NaN is the classifier's."""
    _check_rows(logits)
    units.check_class_count(logits.shape[1])
    units.check_labels(y, len(logits), logits.shape[1])


def _check_rows(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 2:
        got = (
            f"shape {list(logits.shape)} and dtype {str(logits.dtype).removeprefix('torch.')}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise TypeError(f"expected logits [B,K] of a floating-point dtype, got {got}.")


def _largest(logits: Tensor, count: int, instead: str) -> tuple[Tensor, ...]:
    _check_rows(logits)
    if logits.shape[1] < count:
        raise ValueError(
            f"expected at least {count} classes, as this loss divides by a gap between the {count} "
            f"largest logits, got {logits.shape[1]}; use {instead}, which needs two."
        )
    return logits.topk(count, dim=1).values.unbind(1)
