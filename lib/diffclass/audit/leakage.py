"""Does the classifier know its test pictures already? Check 40: in its memory, in its training, by what it answers."""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from diffclass.audit.base import (
    AMBER,
    GREEN,
    RED,
    Case,
    Picture,
    Verdict,
    check,
    gap,
    outweighs,
    proven,
    quiet,
    worst,
)
from diffclass.audit.object import GROUP
from diffclass.classifiers.base import decided

ALIKE = 0.02  # of a picture's contrast: eight bits stay below it, another picture does not
PIXELS = 16  # below which a picture is too small to be told from chance
VISITED = 20_000  # objects inside a classifier that are looked at
CHUNK = 4096  # rows that are compared at once
FAINT = 1e-6  # in pixels: no picture is another one for so little
SLIGHT = 1e-4
JUMP = 0.01  # of the spread of the logits
HALF_A_STEP = 0.5 / 255  # of eight bits
SIMPLE = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def _standard(rows: Tensor) -> Tensor:
    """Rows less their mean, of length one; rows without contrast become zero. Shapes: [N,D] -> the same."""
    rows = rows.detach().cpu().float()
    rows = rows - rows.mean(1, keepdim=True)
    return torch.nan_to_num(rows / rows.norm(dim=1, keepdim=True))


def found(pictures: Tensor, rows: Iterable[Tensor]) -> Tensor:
    """Which pictures are among some rows, in whatever brightness and contrast.

    Formula     sqrt(1 - r^2) < 0.02 for the correlation r of a picture with a row: what a line a x + b leaves of it
    Shapes      pictures [n,C,H,W], each rows [N,D] -> [n]
    """
    wanted = _standard(pictures.flatten(1))
    best = torch.zeros(len(wanted))
    for some in rows:
        for part in some.split(CHUNK):
            best = torch.maximum(best, (wanted @ _standard(part).T).abs().amax(1))
    return best > (1 - ALIKE**2) ** 0.5


def tensors_inside(model: nn.Module) -> list[Tensor]:
    """Every tensor and array that can be reached from a model: attributes, containers, and what its functions refer to.

    Code of torch, NumPy and this library is not entered; what it holds for the model is.
    """
    reached = []
    met = {}  # by address: kept, as the address of what is gone is given to another
    waiting = [model]
    while waiting and len(met) < VISITED:
        one = waiting.pop()
        if id(one) in met or isinstance(one, SIMPLE):
            continue
        met[id(one)] = one
        if isinstance(one, np.ndarray):
            if one.dtype.kind in "fiub":
                reached.append(torch.from_numpy(one.astype(np.float32)))
            continue
        if isinstance(one, Tensor):
            reached.append(one)
            continue
        waiting.extend(_parts(one))
    return reached


def _parts(one) -> Iterator:
    if isinstance(one, dict):
        yield from one.keys()
        yield from one.values()
    elif isinstance(one, (list, tuple, set, frozenset)):
        yield from one
    elif isinstance(one, functools.partial):
        yield from (one.func, one.args, one.keywords)
    elif inspect.ismethod(one):
        yield from (one.__func__, one.__self__)
    elif inspect.isfunction(one):
        if not _of_a_library(one.__module__):
            names = inspect.getclosurevars(one)
            yield from (names.nonlocals, names.globals, one.__defaults__, one.__kwdefaults__)
    elif isinstance(one, type):
        if not _of_a_library(one.__module__):
            yield from vars(one).values()
    elif not inspect.ismodule(one):
        with contextlib.suppress(TypeError):  # what has slots alone, or nothing
            yield vars(one)
        yield type(one)


def _of_a_library(name: str | None) -> bool:
    library = (name or "").partition(".")[0]
    return library in ("torch", "numpy", "diffclass", "builtins", "functools", "collections", "abc")


def rows_of(value: Tensor, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """A tensor as rows of as many numbers as a picture has, in every order in which pictures are kept.

    Shapes      any -> [N,D], as channels first, as channels last, and as columns
    """
    pixels = shape[0] * shape[1] * shape[2]
    if value.is_complex() or value.is_sparse or value.numel() == 0:
        return
    if value.numel() % pixels == 0:
        rows = value.reshape(-1, pixels)
        yield rows
        if shape[0] > 1:
            last = rows.reshape(-1, shape[1], shape[2], shape[0])
            yield last.permute(0, 3, 1, 2).reshape(-1, pixels)
    if value.ndim == 2 and value.shape[0] == pixels:
        yield value.T


def _stored(case: Case) -> tuple[str, str]:
    shape = tuple(case.x.shape[1:])
    inside = tensors_inside(case.classifier)
    stored = found(case.x, (rows for value in inside for rows in rows_of(value, shape)))
    count = int(stored.sum())
    n = len(case.x)
    words = f"{count} of {n} pictures are stored in the classifier ({len(inside)} tensors searched)"
    return proven(count, n, 0.01), words


def _trained(case: Case) -> tuple[str, str]:
    if case.training is None:
        return GREEN, "what it was trained on is not known"
    training = case.training()
    count = int(found(case.x, [training.flatten(1)]).sum())
    n = len(case.x)
    words = f"{count} are among the {len(training)} that it was trained on"
    return proven(count, n, 0.01), words


def _recognised(case: Case) -> tuple[str, str, Picture]:
    """Whether answers change where pictures hardly do: at once, or from right to wrong within half a grey level."""
    draw = case.generator(40)
    model = case.once(case.classifier)
    x = case.x[case.few]
    push = torch.rand(x.shape, generator=draw, dtype=torch.float64).to(x) * 2 - 1
    plain = quiet(model, x)
    faint = quiet(model, (x + FAINT * push).clamp(0, 1))
    slight = quiet(model, (x + SLIGHT * push).clamp(0, 1))
    jumps = [gap(a[None], b[None]) for a, b in zip(faint, plain, strict=True)]
    rises = [gap(a[None], b[None]) for a, b in zip(slight, plain, strict=True)]
    # a slope rises a hundred times as far over a hundred times the way
    at_once = sum(a > JUMP and a > b / 10 for a, b in zip(jumps, rises, strict=True))
    lost = 0
    won = 0
    for some, labels in zip(case.x.split(case.batch), case.labels.split(case.batch), strict=True):
        push = torch.rand(some.shape, generator=draw, dtype=torch.float64).to(some) * 2 - 1
        right = decided(quiet(model, some)).cpu() == labels
        still = decided(quiet(model, (some + HALF_A_STEP * push).clamp(0, 1))).cpu() == labels
        lost += int((right & ~still).sum())
        won += int((still & ~right).sum())
    n = len(case.x)
    light = proven(lost, n, 0.05)
    if light == RED and not outweighs(lost, won):
        light = AMBER
    words = (
        f"the logits of {at_once} of {len(x)} jump when pixels move by {FAINT:g}, and {lost} of {n} are right only on the "
        f"very picture, not within half a grey level ({won} the other way)"
    )
    picture = Picture(
        tuple(range(len(x))),
        {f"moved by {FAINT:g}": tuple(jumps), f"moved by {SLIGHT:g}": tuple(rises)},
        "image",
        "difference / spread",
    )
    return worst([proven(at_once, len(x), 0.01), light]), words, picture


@check(
    40,
    GROUP,
    "take the test pictures out of the classifier and of its training, and measure it on pictures that it never met",
    lambda case: 3 * len(case.few) + 2 * len(case.x),
)
def nothing_leaked(case: Case) -> Verdict:
    """Whether the pictures of the claim are stored in the classifier, were trained on, or are recognised.

    Passes when at most 1 % of them are in its memory, at most 1 % among `training` where that is given, in whatever
    brightness and contrast; when no logits jump (by 1 % of their spread) as pixels move by 1e-6; and when at most 5 % are
    right only on the very picture, and wrong within half a grey level.
    """
    recognised, sentence, picture = _recognised(case)
    lights = [recognised]
    sentences = [sentence]
    if case.x[0].numel() < PIXELS:
        sentences.append(f"pictures of {case.x[0].numel()} numbers are too small to be found again")
    else:
        for light, words in (_stored(case), _trained(case)):
            lights.append(light)
            sentences.append(words)
    return worst(lights), "; ".join(sentences), picture
