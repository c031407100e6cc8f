"""Numbers side by side: turning answers into arrays, and guessing which slip turns one into the other."""

import math

import numpy as np
import torch


def numbers(value, what: str) -> np.ndarray:
    """Any tensor, array, list, number or truth value, in double precision."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_conj()
        value = value.numpy() if value.is_complex() else value.to(torch.float64).numpy()
    elif isinstance(value, (list, tuple)):
        value = [numbers(v, what) for v in value]
    elif value is None or isinstance(value, str):  # numpy would read None as NaN and "3" as 3
        raise TypeError(f"expected numbers as {what}, got {value!r}.")
    try:
        if np.iscomplexobj(value):
            raise TypeError("complex numbers are not compared")
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected numbers as {what}, got {type(value).__name__}.") from error


def index_text(flat: int, shape) -> str:
    """The index of a flattened position, such as [2, 0]."""
    return str([int(i) for i in np.unravel_index(int(flat), shape)])


_FACTORS = (
    (
        2.0,
        "twice too large: is a factor 1/2 missing, or a length in model units where pixel units are meant?",
    ),
    (
        0.5,
        "half of it: is a factor 1/2 too many, or a length in pixel units where model units are meant?",
    ),
    (4.0, "four times too large: a squared error in model units is four times that in pixels"),
    (0.25, "a quarter of it: a squared error in pixels is a quarter of that in model units"),
    (math.sqrt(2), "too large by sqrt(2): are two noises added where one is meant?"),
    (
        math.sqrt(0.5),
        "too small by sqrt(2): is a variance halved where a standard deviation is meant?",
    ),
    (math.sqrt(2 * math.pi), "too large by sqrt(2 pi): is the Gaussian's normalisation missing?"),
)


def likely_cause(g: np.ndarray, w: np.ndarray, allowed: np.ndarray) -> str:
    """What kind of slip turns `want` into `got`; an empty string where nothing simple does."""
    if not (np.isfinite(g).all() and np.isfinite(w).all()) or not np.any(w):
        return (
            "" if np.isfinite(g).all() else "got infinite values: a division by zero or an overflow"
        )
    if float(allowed.max()) > 0.1 * float(np.abs(w).max()):
        return ""  # so wide a tolerance would see patterns everywhere

    def same(a, b) -> bool:
        return a.shape == b.shape and bool((np.abs(a - b) <= allowed).all())

    if same(g, w):
        return (
            "right to three digits: single precision where double is meant, or too coarse a grid?"
        )
    if same(-g, w):
        return "the sign is flipped: a loss where a log-likelihood is meant?"
    for factor, text in _FACTORS:
        if same(g / factor, w):
            return text
    if g.ndim == 2 and same(g.T, w):
        return "it is transposed: the two axes are swapped"
    return _curved_pattern(g, w, same) or _constant_pattern(g, w, same)


def _curved_pattern(g, w, same) -> str:
    """A square, root, reciprocal, logarithm or complement."""
    positive_g = bool((g > 0).all())
    positive_w = bool((w > 0).all())
    if positive_g and positive_w:
        if same(np.sqrt(g), w):
            return "it is the square of what is wanted: a variance where a standard deviation is meant?"
        if same(g**2, w):
            return "it is the square root of what is wanted: a standard deviation where a variance is meant?"
        if same(1 / g, w):
            return "it is upside down: the reciprocal of what is wanted"
    if positive_g and same(np.log(g), w):
        return "it is the exponential of what is wanted: a probability where a logarithm is meant?"
    if positive_w and same(np.exp(np.minimum(g, 700.0)), w):
        return "it is the logarithm of what is wanted"
    if positive_w and float(w.max()) <= 1 and same(1 - g, w):
        return "it is one minus what is wanted"
    return ""


def _constant_pattern(g, w, same) -> str:
    ratio = float((g * w).sum() / (w * w).sum())
    if ratio and same(g / ratio, w):
        dimension = round(ratio) if ratio > 1 else round(1 / ratio) if ratio > 0 else 0
        if dimension > 2 and abs(max(ratio, 1 / ratio) - dimension) < min(1e-3 * dimension, 0.02):
            return (
                f"{dimension} times too large: a sum where a mean is meant?"
                if ratio > 1
                else f"{dimension} times too small: a mean where a sum is meant?"
            )
        return f"all values are off by the factor {ratio:.4g}" if g.size > 1 else ""
    if g.size > 1:
        if g.ndim and same(np.sort(g, None).reshape(g.shape), np.sort(w, None).reshape(w.shape)):
            return "the values are right but in another order"
        offset = float((g - w).mean())
        if same(g - offset, w):
            return f"all values are off by the same constant {offset:.4g}"
    return ""
