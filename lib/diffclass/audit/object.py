"""Is the object attackable at all? Checks 1 to 6: one function, a correct and living gradient, logits, noise, range."""

import copy

import torch
from torch import Tensor, nn

from diffclass import attacks
from diffclass.audit.base import (
    AMBER,
    GREEN,
    RED,
    SAME,
    CannotJudge,
    Case,
    Picture,
    Verdict,
    check,
    gap,
    quiet,
)
from diffclass.classifiers.base import Classifier, Held, decided, parts
from diffclass.classifiers.foreign import clamped_scores, flat_scores

GROUP = "object"
ROUNDING = 1e-6  # of the spread of the logits: less is no other answer
DIRECTIONS = 20
SLOPES = 4  # images whose gradient is compared with finite differences
LARGE = 256  # images of a large batch
CALLS = 3  # further answers with the same noise, and with other noise


def _in_double(classifier: Classifier) -> Classifier | None:
    """A copy in double precision; None for one that cannot be copied."""
    try:
        return copy.deepcopy(classifier).double()
    except (RuntimeError, TypeError):
        return None


def _faces(case: Case, model: Held, x: Tensor) -> dict[str, Tensor]:
    """The same images answered in other circumstances."""
    leaf = x.clone().requires_grad_()
    faces = {
        "with gradients": model(leaf).detach(),
        "in grad mode": model(x).detach(),
        "with gradients turned off": quiet(model, leaf),
        "as a step of a computation": model(leaf.view_as(leaf)).detach(),
    }
    if case.deterministic:
        copies = -(-LARGE // len(x))
        faces["in a large batch"] = quiet(model, x.repeat(copies, 1, 1, 1))[: len(x)]
        faces["in another order"] = quiet(model, x.flip(0)).flip(0)
        faces["one by one"] = torch.cat([quiet(model, one) for one in x.split(1)])
        # seeds may stand for other noise in another precision
        same_noise = all(part.is_floating_point() for part in parts(model.noise))
        double = _in_double(case.target) if same_noise else None
        if double is not None:
            faces["in double precision"] = quiet(case.once(double), x.double()).to(x.dtype)
    return faces


@check(
    1,
    GROUP,
    "give the classifier one forward: no branch on gradients, precision or batch size",
    lambda case: 10 * len(case.few) + LARGE,
)
def one_function(case: Case) -> Verdict:
    """Whether logits agree with and without gradients, in float64, one by one, in other order or in 256, under one noise.

    Passes when every difference is below 1e-3 of the logits' spread, and what attacks climb decides as the classifier
    does, unless that counts votes and attacks climb its surrogate.
    """
    x = case.x[case.few]
    model = case.once(case.target)
    plain = quiet(model, x)
    gaps = {name: gap(face, plain) for name, face in _faces(case, model, x).items()}
    largest = max(gaps, key=gaps.get)
    evidence = (
        f"logits of {len(x)} images differ by up to {gaps[largest]:.1e} of their spread ({largest}; compared: "
        f"{', '.join(gaps)})"
    )
    picture = Picture(tuple(gaps), {"difference": tuple(gaps.values())}, "", "difference / spread")
    if case.target is not case.classifier and case.classifier.surrogate() is case.classifier:
        answers = decided(quiet(case.once(case.classifier), x))
        other = int((decided(plain) != answers).sum())
        evidence = f"{evidence}; the view decides otherwise on {other}"
        if other:
            return RED, evidence, picture
    return (GREEN if gaps[largest] <= SAME else RED), evidence, picture


@check(
    2,
    GROUP,
    "differentiate the function that predicts; a stand-in gradient belongs in an attack, under its name",
    lambda case: SLOPES * (1 + 2 * DIRECTIONS),
)
def gradient_is_correct(case: Case) -> Verdict:
    """Whether autograd agrees with central differences along random directions, in float64 where that is possible.

    Formula     <grad (v . f), d> = v . (f(x + h d) - f(x - h d)) / 2h for random d and centred v, so that any logit's
                gradient counts; passes when the median over images of the relative error is below 1e-3 (2e-2 in
                float32, whose rounding allows no more)
    """
    draw = case.generator(2)
    x = case.x[:SLOPES]
    double = _in_double(case.target)
    if double is None:
        tolerance = 2e-2
        step = 3e-3
        model = case.once(case.target)
    else:
        tolerance = 1e-3
        step = 1e-5
        model = case.once(double)
        x = x.double()
    x = x * 0.98 + 0.01  # room for the step inside [0,1]
    v = torch.randn(len(x), model.num_classes, generator=draw, dtype=torch.float64).to(x)
    v = v - v.mean(1, keepdim=True)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad((model(leaf) * v).sum(), leaf)[0]
    along = []
    rises = []
    for _ in range(DIRECTIONS):
        d = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
        change = quiet(model, x + step * d) - quiet(model, x - step * d)
        rises.append((change * v).sum(1) / (2 * step))
        along.append((slope * d).flatten(1).sum(1))
    ours = torch.stack(along)  # [directions, images]
    theirs = torch.stack(rises)
    size = torch.maximum(ours.norm(dim=0), theirs.norm(dim=0))
    if not bool((size > 0).any()):
        raise CannotJudge(
            "the logits do not change at all near these images, so there is no slope to compare; see "
            "gradient_is_alive."
        )
    error = (ours - theirs).norm(dim=0) / size.clamp_min(torch.finfo(torch.float64).tiny)
    middle = float(error.median())
    evidence = (
        f"along {DIRECTIONS} directions at {len(x)} images the gradient differs from finite differences by "
        f"{middle:.1e} (median; at most {float(error.max()):.1e}, allowed {tolerance:g})"
    )
    picture = Picture(
        tuple(range(len(error))),
        {"relative error": tuple(error.tolist())},
        "image",
        "relative error",
    )
    return (GREEN if middle < tolerance else RED), evidence, picture


@check(
    3,
    GROUP,
    "attack margins instead of a saturated cross-entropy, and remove what rounds, detaches or overflows",
    lambda case: len(case.x),
)
def gradient_is_alive(case: Case) -> Verdict:
    """Whether the gradient of the attack's loss is finite and not zero on every image."""
    norms = []
    for part in case.everyone.split(case.batch):
        noise = case.noise_for(case.target, len(part))
        slope, _, _ = attacks.expected_gradient(
            case.target, case.x[part], case.y[part], noise=noise, loss=case.loss
        )
        norms.append(slope.flatten(1).double().norm(dim=1))
    norms = torch.cat(norms)
    finite = torch.isfinite(norms)
    dead = int((~finite | (norms == 0)).sum())
    living = norms[finite & (norms > 0)].log10()
    evidence = (
        f"{dead} of {len(norms)} images have a zero or non-finite gradient of {case.loss.__name__}"
    )
    if not len(living):
        return RED, evidence
    low = float(living.min())
    high = float(living.max())
    edges = torch.linspace(low - 0.05, high + 0.05, 11, dtype=torch.float64)
    counts = torch.histogram(living.cpu(), edges).hist
    picture = Picture(
        tuple(((edges[1:] + edges[:-1]) / 2).tolist()),
        {"images": tuple(counts.tolist())},
        "log10 of the norm",
        "images",
    )
    evidence = f"{evidence}; the others' norms reach from 10^{low:.1f} to 10^{high:.1f}"
    return (RED if dead else GREEN), evidence, picture


@check(
    4,
    GROUP,
    "hand attack libraries an AttackView of the classifier: logits >= 0 with a median margin of one",
    lambda case: 3 * min(case.batch, len(case.x)),
)
def logits_are_logits(case: Case) -> Verdict:
    """Whether common losses work on what attacks receive: no probabilities, not all negative, a margin near one.

    Passes when the classifier has nothing to complain of, such as training mode or logits in a tuple; what it answers
    before any view is no distribution, no percent, and not held at the ends of a range; every image has a logit >= 0 in
    the view (else a loss that masks by multiplication with zero is constant), and the median margin there is in [0.1, 10]
    (else cross-entropy is flat). Amber for K < 4, which the targeted DLR loss needs.
    """
    x = case.x[: case.batch]
    complaints = case.classifier.complaints(x[: case.closer])
    if complaints:
        return RED, " ".join(complaints)
    logits = quiet(case.once(case.target), x)
    top = logits.topk(2, dim=1).values
    classes = logits.shape[1]
    margin = float((top[:, 0] - top[:, 1]).median())
    negative = int((top[:, 0] < 0).sum())
    evidence = (
        f"{negative} of {len(logits)} images have only negative logits, the median margin is {margin:.3g}, "
        f"K = {classes}"
    )
    before = quiet(case.once(case.classifier.surrogate()), x)
    sentence = flat_scores(before) or clamped_scores(before) or _held_at_the_ends(before)
    if sentence:
        return RED, f"before any view: {sentence} {evidence}"
    sentence = flat_scores(logits)
    if sentence:
        return RED, f"as attacks receive them: {sentence} {evidence}"
    if negative or not 0.1 <= margin <= 10:
        return RED, evidence
    return (GREEN if classes >= 4 else AMBER), evidence


def _held_at_the_ends(scores: Tensor) -> str:
    """What is wrong with scores of which many are exactly the least or the largest one, in one sentence; "" for others.

    Shapes      [B,K]; a class whose score never changes, the one that others are compared with, says nothing
    Why         a clamp, and a sigmoid or tanh far out, leave the same number again and again, where their slope is zero
    """
    changing = scores[:, (scores != scores[:1]).any(0)]
    if not changing.numel():
        return ""
    least = changing.min()
    largest = changing.max()
    at_the_ends = int(((changing == least) | (changing == largest)).sum())
    if at_the_ends <= max(4, changing.numel() / 10):
        return ""
    return (
        f"expected logits, got scores of which {at_the_ends} of {changing.numel()} are exactly {float(least):.3g} or "
        f"{float(largest):.3g}, as a clamp, a sigmoid or tanh leaves them; return what goes into it."
    )


def _reseeds(model: nn.Module, x: Tensor) -> bool:
    """Whether a call leaves the global generator in one state, whatever it was before."""
    after = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            quiet(model, x)
            after.append(torch.get_rng_state())
    return torch.equal(*after)


@check(
    5,
    GROUP,
    "declare the noise in `sample_noise` and use what is passed in; never draw inside, nor from a fixed seed",
    lambda case: 2 * (2 + 3 * CALLS) * 2 * len(case.few) + 2,
)
def randomness_declared(case: Case) -> Verdict:
    """Whether the same noise gives the same answer, and other noise another one exactly where noise is declared.

    Asked on images and on blends of two, where a vote is not unanimous, of the classifier and of what attacks get: a
    vote over draws may hide noise that its voter shows. Answers with gradients are compared with one another: from those
    without, they may differ by rounding (check 1).
    """
    x = case.x[case.few]
    x = torch.cat([x, (x + x.flip(0)) / 2])
    draw = case.generator(5)
    same = {"without gradients": [], "with gradients": []}
    other = []
    for model in {id(one): one for one in (case.classifier, case.target)}.values():
        noise = model.sample_noise(len(x), draw)
        first = quiet(model, x, noise)
        climbed = model(x.clone().requires_grad_(), noise).detach()
        for _ in range(CALLS):
            again = quiet(model, x, noise)
            same["without gradients"].append(gap(again, first))
            again = model(x.clone().requires_grad_(), noise).detach()
            same["with gradients"].append(gap(again, climbed))
            new = quiet(model, x, model.sample_noise(len(x), draw))
            other.append(gap(new, first))
    declared = not case.classifier.deterministic
    evidence = (
        f"it declares {'noise' if declared else 'no noise'}; with the same noise {CALLS} further answers differ by "
        + " and ".join(f"{max(gaps):.1e} {name}" for name, gaps in same.items())
        + f", with other noise by {max(other):.1e} (of the logits' spread)"
    )
    if _reseeds(case.once(case.classifier), x[:1]):
        return RED, f"{evidence}; each call reseeds torch's global generator"
    repeats = all(gap <= ROUNDING for gaps in same.values() for gap in gaps)
    uses = any(gap > ROUNDING for gap in other)
    return (GREEN if repeats and uses == declared else RED), evidence


@check(
    6,
    GROUP,
    "project onto the budget and clamp to [0,1] after every step, and name the norm",
    lambda case: 0,
)
def budget_and_range(case: Case) -> Verdict:
    """Whether attacked images lie in [0,1] and within epsilon of the clean ones, to 1e-6."""
    x = case.main.x
    size = float(attacks.size_of(x - case.x, case.norm).max())
    low = float(x.min())
    high = float(x.max())
    evidence = (
        f"{case.norm} perturbations reach {size:.6g} of the budget {case.epsilon:.6g}, pixels from {low:.3g} to "
        f"{high:.3g}"
    )
    inside = size <= case.epsilon + 1e-6 and low >= -1e-6 and high <= 1 + 1e-6
    return (GREEN if inside else RED), evidence
