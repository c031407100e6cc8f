"""Is the object attackable at all? Checks 1 to 6: one function, a correct and living gradient, logits, noise, range."""

import copy

import torch
from torch import Tensor, nn

from diffclass import attacks
from diffclass.audit.base import (
    AMBER,
    GREEN,
    RED,
    CannotJudge,
    Case,
    Found,
    Picture,
    check,
    is_deterministic,
)
from diffclass.audit.holding import Frozen

GROUP = "object"
SAME = 1e-3  # of the spread of the logits: float32 stays far below it, another function does not


def _spread(logits: Tensor) -> float:
    return float(
        (logits.amax(1) - logits.amin(1)).median().clamp_min(torch.finfo(torch.float32).tiny)
    )


def _quiet(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _in_double(model: nn.Module) -> nn.Module | None:
    """A copy in double precision; None for a module that cannot be copied or keeps single-precision parts."""
    try:
        return copy.deepcopy(model).double()
    except (RuntimeError, TypeError):
        return None


def _faces(case: Case, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same images answered in other circumstances."""
    faces = {
        "with gradients": model(x.clone().requires_grad_()).detach(),
        "in grad mode": model(x).detach(),
    }
    if is_deterministic(case.target):
        faces["one by one"] = torch.cat([_quiet(model, one) for one in x.split(1)])
        double = _in_double(model)
        if double is not None:
            faces["in double precision"] = _quiet(double, x.double()).to(x.dtype)
    return faces


@check(1, GROUP, "give the classifier one forward: no branch on gradients, precision or batch size")
def one_function(case: Case) -> Found:
    """Whether logits agree with and without gradients, in float64, one by one or in a batch; of held noise if random.

    Passes when every difference is below 1e-3 of the logits' spread, and the view decides as the classifier does.
    """
    x = case.x[case.few]
    model = Frozen(case.target)
    plain = _quiet(model, x)
    gaps = {
        name: float((face - plain).abs().max()) / _spread(plain)
        for name, face in _faces(case, model, x).items()
    }
    name = max(gaps, key=gaps.get)
    told = (
        f"logits of {len(x)} images differ by up to {gaps[name]:.1e} of their spread ({name}; compared: "
        f"{', '.join(gaps)})"
    )
    picture = Picture(tuple(gaps), {"difference": tuple(gaps.values())}, "", "difference / spread")
    if case.view is not None and is_deterministic(case.classifier) and is_deterministic(case.view):
        other = int((plain.argmax(1) != _quiet(case.classifier, x).argmax(1)).sum())
        told += f"; the view decides otherwise on {other}"
        if other:
            return RED, told, picture
    return (RED if not gaps[name] <= SAME else GREEN), told, picture


@check(
    2,
    GROUP,
    "differentiate the function that predicts; a stand-in gradient belongs in an attack, under its name",
)
def gradient_is_correct(case: Case, directions: int = 20, images: int = 4) -> Found:
    """Whether autograd agrees with central differences along random directions, in float64 where that is possible.

    Formula     <grad (v . f), d> = v . (f(x + h d) - f(x - h d)) / 2h for random d and centred v, so that any logit's
                gradient counts; passes when the median over images of the relative error is below 1e-3 (2e-2 in
                float32, whose rounding allows no more)
    """
    draw = case.generator(2)
    x = case.x[:images]
    model = _in_double(case.target)
    tolerance, step = (1e-3, 1e-5) if model is not None else (2e-2, 3e-3)
    model = Frozen(case.target if model is None else model)
    x = (x if tolerance > 1e-3 else x.double()) * 0.98 + 0.01  # room for the step inside [0,1]
    v = torch.randn(len(x), model.num_classes, generator=draw, dtype=torch.float64).to(x)
    v = v - v.mean(1, keepdim=True)
    leaf = x.clone().requires_grad_()
    found = []
    slope = torch.autograd.grad((model(leaf) * v).sum(), leaf)[0]
    for _ in range(directions):
        d = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
        rise = ((_quiet(model, x + step * d) - _quiet(model, x - step * d)) * v).sum(1) / (2 * step)
        found.append(torch.stack([(slope * d).flatten(1).sum(1), rise], 1))
    ours, theirs = torch.stack(found).unbind(2)  # [directions, images]
    size = torch.maximum(ours.norm(dim=0), theirs.norm(dim=0))
    if not bool((size > 0).any()):
        raise CannotJudge(
            "the logits do not change at all near these images, so there is no slope to compare; see "
            "gradient_is_alive."
        )
    error = (ours - theirs).norm(dim=0) / size.clamp_min(torch.finfo(torch.float64).tiny)
    middle = float(error.median())
    told = (
        f"along {directions} directions at {len(x)} images the gradient differs from finite differences by "
        f"{middle:.1e} (median; at most {float(error.max()):.1e}, allowed {tolerance:g})"
    )
    return (
        (GREEN if middle < tolerance else RED),
        told,
        Picture(
            tuple(range(len(error))),
            {"relative error": tuple(error.tolist())},
            "image",
            "relative error",
        ),
    )


@check(
    3,
    GROUP,
    "attack margins instead of a saturated cross-entropy, and remove what rounds, detaches or overflows",
)
def gradient_is_alive(case: Case) -> Found:
    """Whether the gradient of the attack's loss is finite and not zero on every image."""
    norms = []
    for part in case.everyone.split(case.batch):
        slope, _, _ = attacks.expected_gradient(
            case.target, case.x[part], case.y[part], loss=case.loss
        )
        norms.append(slope.flatten(1).double().norm(dim=1))
    norms = torch.cat(norms)
    finite = torch.isfinite(norms)
    dead = int((~finite | (norms == 0)).sum())
    living = norms[finite & (norms > 0)].log10()
    told = (
        f"{dead} of {len(norms)} images have a zero or non-finite gradient of {case.loss.__name__}"
    )
    if not len(living):
        return RED, told
    edges = torch.linspace(
        float(living.min()) - 0.05, float(living.max()) + 0.05, 11, dtype=torch.float64
    )
    counts = torch.histogram(living.cpu(), edges).hist
    told += f"; the others' norms reach from 10^{float(living.min()):.1f} to 10^{float(living.max()):.1f}"
    return (
        (RED if dead else GREEN),
        told,
        Picture(
            tuple(((edges[1:] + edges[:-1]) / 2).tolist()),
            {"images": tuple(counts.tolist())},
            "log10 of the norm",
            "images",
        ),
    )


@check(
    4,
    GROUP,
    "hand attack libraries an AttackView of the classifier: logits >= 0 with a median margin of one",
)
def logits_are_logits(case: Case) -> Found:
    """Whether common losses work on what attacks receive: no probabilities, not all negative, a margin near one.

    Passes when no row is a distribution, every image has a logit >= 0 (else a loss that masks by multiplication with
    zero is constant), and the median margin is in [0.1, 10] (else cross-entropy is flat). Amber for K < 4, which the
    targeted DLR loss needs.
    """
    logits = _quiet(Frozen(case.target), case.x[: case.batch])
    top = logits.topk(2, dim=1).values
    classes = logits.shape[1]
    margin = float((top[:, 0] - top[:, 1]).median())
    negative = int((top[:, 0] < 0).sum())
    told = (
        f"{negative} of {len(logits)} images have only negative logits, the median margin is {margin:.3g}, "
        f"K = {classes}"
    )
    if float(logits.min()) >= 0 and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        return RED, f"rows are probabilities, not logits; {told}"
    if negative or not 0.1 <= margin <= 10:
        return RED, told
    return (GREEN if classes >= 4 else AMBER), told


def _reseeds(model: nn.Module, x: Tensor) -> bool:
    """Whether a call leaves the global generator in one state, whatever it was before."""
    after = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            _quiet(model, x)
            after.append(torch.get_rng_state())
    return torch.equal(*after)


@check(
    5,
    GROUP,
    "declare `deterministic`, and draw noise from a generator that is passed in, never from a fixed seed",
)
def randomness_declared(case: Case, calls: int = 3) -> Found:
    """Whether repeated calls differ exactly when the classifier says it is random, with and without gradients.

    Asked on images and on blends of two, where a vote is not unanimous, of the classifier and of what attacks get: a
    vote over draws may hide noise that its voter shows.
    """
    x = case.x[case.few]
    x = torch.cat([x, (x + x.flip(0)) / 2])
    gaps = {"without gradients": 0.0, "with gradients": 0.0}
    for model in {id(one): one for one in (case.classifier, case.target)}.values():
        first = _quiet(model, x)
        for _ in range(calls):
            again = {
                "without gradients": _quiet(model, x),
                "with gradients": model(x.clone().requires_grad_()).detach(),
            }
            for name, logits in again.items():
                gaps[name] = max(gaps[name], float((logits - first).abs().max()) / _spread(first))
    declared = not case.deterministic
    told = (
        f"it says it is {'random' if declared else 'deterministic'}, and {calls} further answers differ by "
        + " and ".join(f"{gap:.1e} {name}" for name, gap in gaps.items())
        + " (of the logits' spread)"
    )
    if _reseeds(case.classifier, x[:1]):
        return RED, told + "; each call reseeds torch's global generator"
    return (GREEN if all((gap > 1e-6) == declared for gap in gaps.values()) else RED), told


@check(6, GROUP, "project onto the budget and clamp to [0,1] after every step, and name the norm")
def budget_and_range(case: Case) -> Found:
    """Whether attacked images lie in [0,1] and within epsilon of the clean ones, to 1e-6."""
    x = case.main.x
    size = float(attacks.size_of(x - case.x, case.norm).max())
    low = float(x.min())
    high = float(x.max())
    told = (
        f"{case.norm} perturbations reach {size:.6g} of the budget {case.epsilon:.6g}, pixels from {low:.3g} to "
        f"{high:.3g}"
    )
    inside = size <= case.epsilon + 1e-6 and low >= -1e-6 and high <= 1 + 1e-6
    return (GREEN if inside else RED), told
