"""Is the attack working? Checks 7 to 17: budgets, steps, restarts, black boxes, losses, a weak model, targets."""

import torch
from torch import Tensor, nn

from diffclass import attacks
from diffclass.audit.base import (
    AMBER,
    GREEN,
    RED,
    CannotJudge,
    Case,
    Picture,
    Verdict,
    check,
    outweighs,
    proven,
    worst,
)
from diffclass.classifiers.base import Classifier, Noise

GROUP = "attack"
RESTARTS = 5
PASSES = 1000  # of a black box over the images that are left, at least 50 and at most 1000 queries an image


def _accuracy(fell: Tensor) -> float:
    return 1 - float(fell.double().mean())


def _largest(case: Case) -> float:
    """The budget in which every image of [0,1] lies."""
    return 1.0 if case.norm == "linf" else case.x[0].numel() ** 0.5


@check(
    7,
    GROUP,
    "the attack is broken or the gradient is masked: do the checks of the object first",
    lambda case: case.cost(len(case.few)),
)
def unbounded_reaches_zero(case: Case) -> Verdict:
    """Whether nothing survives a budget at which every image can be made grey: 0.5 in L-inf, 0.5 sqrt(D) in L2.

    Passes when at most 1 % survive; red when survivors prove more than 1 %, for a random classifier more than chance.
    """
    epsilon = 0.5 * _largest(case)
    places = case.few
    fell = case.falls(case.attacked(places, epsilon=epsilon).x, places)
    left = int((~fell).sum())
    chance = 0.01 if case.deterministic else 1 / case.classifier.num_classes
    light = proven(left, len(fell), chance)
    return light, f"{left} of {len(fell)} images survive {case.norm} {epsilon:.3g}"


@check(
    8,
    GROUP,
    "let a budget of 0 return the images themselves, and compute accuracy in one place",
    lambda case: case.cost(len(case.few), steps=1),
)
def zero_budget_is_clean(case: Case) -> Verdict:
    """Whether an attack without budget changes no pixel and no verdict."""
    places = case.few
    attacked = case.attacked(places, epsilon=0.0, steps=1)
    moved = float((attacked.x - case.x[places]).abs().max())
    evidence = f"with epsilon = 0 pixels move by at most {moved:.1e}"
    if not case.deterministic:
        return (GREEN if moved == 0 else RED), evidence
    other = int((attacked.flagged != case.clean_falls[places]).sum())
    light = GREEN if moved == 0 and not other else RED
    return light, f"{evidence}, and {other} of {len(places)} verdicts change"


@check(
    9,
    GROUP,
    "strengthen the attack (smaller steps at larger budgets, warm starts) until the curve falls",
    lambda case: 2 * case.cost(len(case.few)),
)
def monotone_in_budget(case: Case) -> Verdict:
    """Whether accuracy falls as the budget grows.

    Passes when at no step of the curve more images recover than fall; red when they do so beyond the sign test's 1 %.
    """
    places = case.few
    shares = [share for share in (0.5, 1, 2) if share * case.epsilon <= _largest(case)]
    budgets = sorted({share * case.epsilon for share in shares})
    curve = [case.clean_falls[places]]
    for epsilon in budgets:
        if epsilon == case.epsilon:
            curve.append(case.fallen[places])
        else:
            curve.append(case.falls(case.attacked(places, epsilon=epsilon).x, places))
    red = False
    for before, after in zip(curve[:-1], curve[1:], strict=True):
        recover = int((before & ~after).sum())
        fall = int((after & ~before).sum())
        red = red or outweighs(recover, fall)
    accuracy = tuple(map(_accuracy, curve))
    points = [f"{a:.0%} at {e:.3g}" for e, a in zip([0, *budgets], accuracy, strict=True)]
    picture = Picture((0.0, *budgets), {"accuracy": accuracy}, "budget / pixels", "accuracy")
    evidence = f"accuracy {', '.join(points)} ({len(places)} images)"
    return (RED if red else GREEN), evidence, picture


@check(
    10,
    GROUP,
    "choose smaller steps and more of them; a gradient that points wrong far from the image is masked",
    lambda case: case.cost(len(case.x), steps=1),
)
def iterative_beats_single(case: Case) -> Verdict:
    """Whether the attack fells what one step of the whole budget fells; judged by the paired sign test."""
    one = case.attacked(case.everyone, attack=attacks.pgd, steps=1, step_size=case.epsilon)
    fell = case.falls(one.x, case.everyone)
    only_one = int((fell & ~case.fallen).sum())
    only_many = int((case.fallen & ~fell).sum())
    evidence = (
        f"accuracy {_accuracy(case.fallen):.1%} under the attack, {_accuracy(fell):.1%} under one step; {only_one} "
        f"images fall to the single step alone, {only_many} to the attack alone"
    )
    return (RED if outweighs(only_one, only_many) else GREEN), evidence


@check(
    11,
    GROUP,
    "take more steps, until twice as many find nothing more",
    lambda case: case.cost(len(case.few), steps=2 * case.steps),
)
def steps_converged(case: Case) -> Verdict:
    """Whether twice the steps fell less than 1 % more of all images."""
    longer = case.attacked(case.left, steps=2 * case.steps)
    light, _, words = case.beyond(case.falls(longer.x, case.left))
    film = 1 - case.main.film.double().mean(1)
    picture = Picture(
        tuple(range(len(film))),
        {"accuracy by the attack's own count": tuple(film.tolist())},
        "steps",
        "accuracy",
    )
    return light, f"{2 * case.steps} steps instead of {case.steps} fell {words}", picture


@check(
    12,
    GROUP,
    "restart from random points, and count an image as robust only if it survives them all",
    lambda case: RESTARTS * case.cost(len(case.few)) + case.repeats * len(case.few),
)
def restarts_converged(case: Case) -> Verdict:
    """Whether five random starts fell less than 1 % more of all images."""
    places = case.left
    start = case.generator(12)
    tries = [case.attacked(places, start=start).x for _ in range(RESTARTS)]
    light, _, words = case.beyond(case.falls_to_any(tries, places))
    return light, f"{RESTARTS} random starts fell {words}"


# ---------------------------------------------------------------------------------------------------------------------
# Without gradients, and from elsewhere


def random_search(case: Case, places: Tensor, queries: int, draw: torch.Generator) -> Tensor:
    """Adversarial images by random squares, without a gradient: the best of noise at first, then squares on top of it.

    Formula     x <- project(x + push) where a push of +-epsilon in a random square (at first the whole image) raises
                the margin; the square shrinks from the image to one pixel
    Source      after Andriushchenko et al. 2020 (Square)
    Shapes      places [m] -> [m,C,H,W];  costs queries x m forward passes
    """
    x0 = case.x[places]
    y = case.y[places]
    best = x0
    height = torch.full((len(x0),), -torch.inf, dtype=torch.float64)
    rows, columns = x0.shape[2:]
    asked = case.asked(case.target)
    for query in range(queries):
        # a quarter of the queries is plain noise
        side = 1 - max(0.0, 2 * query / queries - 0.5) / 1.5
        h = max(1, round(side * rows))
        w = max(1, round(side * columns))
        top = int(torch.randint(rows - h + 1, (), generator=draw))
        left = int(torch.randint(columns - w + 1, (), generator=draw))
        sign = torch.randint(2, (len(x0), x0.shape[1], h, w), generator=draw).to(x0) * 2 - 1
        push = torch.zeros_like(x0)
        push[:, :, top : top + h, left : left + w] = sign
        if case.norm == "l2":
            push = push / push.flatten(1).norm(dim=1)[:, None, None, None]
        if side == 1:
            x = x0 + case.epsilon * push
        else:
            x = best + 2 * case.epsilon * push
        x = attacks.project(x, x0, case.epsilon, case.norm)
        margin = _margins(asked, x, y, case.batch)
        higher = margin > height
        best = torch.where(higher.to(x0.device)[:, None, None, None], x, best)
        height = torch.maximum(margin, height)
    return best


def _margins(asked: nn.Module, x: Tensor, y: Tensor, batch: int) -> Tensor:
    """How far the best wrong class is ahead of the label, in double precision, on the CPU. Shapes: -> [m]."""
    parts = []
    with torch.no_grad():
        for some, label in zip(x.split(batch), y.split(batch), strict=True):
            parts.append(attacks.margin_loss(asked(some), label))
    return torch.cat(parts).double().cpu()


@check(
    13,
    GROUP,
    "gradients are masked: find the function whose gradient is real (BPDA, EOT, another loss)",
    lambda case: max(PASSES, 50 * len(case.few)) + case.repeats * len(case.few),
)
def white_beats_black(case: Case) -> Verdict:
    """Whether any survivor falls to a search without gradients: noise first, then Square; 0.2 % are tolerated."""
    places = case.left
    if not len(places):
        return GREEN, "no image survives the gradient, so none is left for a black box"
    queries = max(50, min(1000, PASSES // len(places)))
    x = random_search(case, places, queries, case.generator(13))
    light, _, words = case.beyond(case.falls(x, places), 0.002)
    return light, f"{queries} queries of noise and random squares fell {words}"


class Fitted(Classifier):
    """An undefended model: the linear classifier of least squares, fitted to the images it is attacked on.

    Formula     f = W x + b, the least-norm solution of f(x_i) = one_hot(y_i)
    Shapes      x [B,C,H,W] in [0,1] -> [B,K]
    Randomness  none
    Why         which images fall is known in closed form, so an attack that spares them is not working
    """

    scale = "scores"
    calls = 1

    def __init__(self, x: Tensor, y: Tensor, classes: int):
        super().__init__()
        rows = torch.cat([x.flatten(1), torch.ones_like(x[:, 0, 0, :1])], 1).double()
        matrix = torch.linalg.pinv(rows) @ nn.functional.one_hot(y, classes).to(rows)
        self.register_buffer("matrix", matrix.to(x))
        self.num_classes = classes
        self.image_shape = tuple(x.shape[1:])

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return x.flatten(1) @ self.matrix[:-1] + self.matrix[-1]

    def radius(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """The distance to the nearest other class, the pixel range aside.

        Formula     min_k (f_y - f_k) / ||w_y - w_k||_q, q = 1 for L-inf, 2 for L2; below 0 where it errs already
        Shapes      -> [n]
        """
        logits = self(x)
        gap = logits.gather(1, y[:, None]) - logits
        apart = (self.matrix[:-1, y].T[:, None] - self.matrix[:-1].T).norm(
            p=1 if norm == "linf" else 2, dim=2
        )
        return (gap / apart).masked_fill(apart == 0, torch.inf).amin(1)


@check(
    14,
    GROUP,
    "a transferred image that fools where the gradient does not is a sign of masking; attack by transfer",
    lambda case: max(1, len(case.sources)) * case.cost(len(case.few)),
)
def transfer_sanity(case: Case) -> Verdict:
    """Whether images made on other classifiers fool less often than the white-box attack does, paired sign test."""
    few = case.few
    lights = []
    sentences = []
    sources = case.sources or {"a linear fit": Fitted(case.x, case.y, case.classifier.num_classes)}
    for name, source in sources.items():
        fell = case.falls(case.attacked(few, target=source).x, few)
        from_it = int((fell & ~case.fallen[few]).sum())
        white = int((case.fallen[few] & ~fell).sum())
        lights.append(RED if outweighs(from_it, white) else GREEN)
        sentences.append(
            f"{int(fell.sum())} of {len(few)} fall to images made on {name}, {from_it} of them alone"
        )
    white_box = int(case.fallen[few].sum())
    return worst(lights), f"{'; '.join(sentences)}; {white_box} fall to the white-box attack"


def masked_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Carlini & Wagner's margin as a library writes it: masks by products, so negative logits lose to the zeros.

    Formula     max_k ((1 - onehot_k) f_k) - max_k (onehot_k f_k)
    Source      torchattacks 3.x, `CW.f`
    """
    right = nn.functional.one_hot(y, logits.shape[1]).to(logits)
    return ((1 - right) * logits).amax(1) - (right * logits).amax(1)


def _losses(case: Case) -> list[attacks.AttackLoss]:
    losses = [attacks.margin_loss, attacks.cross_entropy_loss, masked_loss]
    if case.classifier.num_classes >= 3:
        losses.append(attacks.dlr_loss)
    return losses


@check(
    15,
    GROUP,
    "rescale the logits (AttackView), then attack with the strongest loss",
    lambda case: len(_losses(case)) * case.cost(2 * len(case.few), steps=max(1, case.steps // 2)),
)
def loss_agnostic(case: Case) -> Verdict:
    """Whether margin, cross-entropy, DLR and CW's masked margin fell alike: none adds, or spares, more than 2 %.

    Every loss gets one run from the images themselves, of half the steps. Passes when none fells survivors worth more
    than 2 % of all images, and none spares more than 2 % of those that fall to another. Of a random classifier the
    spared ones also have to win the paired sign test.
    """
    few = case.few
    places = torch.cat([case.few, case.left]).unique()
    steps = max(1, case.steps // 2)
    fell = {}
    lights = []
    for loss in _losses(case):
        all_of = torch.zeros(len(case.x), dtype=torch.bool)
        all_of[places] = case.falls(case.attacked(places, loss=loss, steps=steps).x, places)
        fell[loss.__name__] = all_of[few]
        lights.append(case.beyond(all_of[case.left], 0.02)[0])
    together = torch.stack(list(fell.values())).any(0)
    spared = {}
    for name, one in fell.items():
        spared[name] = int((together & ~one).sum())
        light = proven(spared[name], len(few), 0.02)
        luckier = int((one & ~case.fallen[few]).sum())
        sure = case.deterministic or outweighs(int((case.fallen[few] & ~one).sum()), luckier)
        lights.append(AMBER if light == RED and not sure else light)
    evidence = f"of {len(few)} images {int(together.sum())} fall to some loss; " + ", ".join(
        f"{name} spares {count}" for name, count in spared.items()
    )
    accuracy = tuple(map(_accuracy, fell.values()))
    return worst(lights), evidence, Picture(tuple(fell), {"accuracy": accuracy}, "", "accuracy")


@check(16, GROUP, "mend the attack: it does not even break a model without any defence")
def weak_model_falls(case: Case) -> Verdict:
    """Whether the same attack takes an undefended linear model to 1 %, at a budget where the closed form says 0 %."""
    weak = Fitted(case.x, case.y, case.classifier.num_classes)
    few = case.few
    reach = weak.radius(case.x[few], case.y[few], case.norm).max()
    if not bool(torch.isfinite(reach)):
        raise CannotJudge(
            "the images have one label only, so no linear model can be fooled on them."
        )
    epsilon = min(_largest(case), max(case.epsilon, 2 * float(reach)))
    attacked = case.attacked(few, target=weak, epsilon=epsilon)
    left = int((case.answers(attacked.x, asked=weak)[0] == case.labels[few]).sum())
    evidence = (
        f"{left} of {len(few)} images survive on a linear model fitted to them, at {case.norm} {epsilon:.3g}, "
        "where none should"
    )
    return proven(left, len(few), 0.01), evidence


def _targeted_cost(case: Case) -> int:
    few = len(case.few)
    towards = case.cost(few, steps=max(1, case.steps // 4))
    again = case.cost(few, steps=max(1, case.steps // 2))
    answers = len(case.x) + few * case.repeats
    return (case.classifier.num_classes - 1) * towards + again + answers


@check(
    17,
    GROUP,
    "attack towards each class as well: the untargeted gradient is stuck or masked",
    _targeted_cost,
)
def targeted_too(case: Case) -> Verdict:
    """Whether attacks towards every other class fell 1 % more, or spare what the untargeted one sends to their class.

    Passes when they add at most 1 % of all images, and the attack towards the class that an image was sent to spares
    at most 10 % of those images.
    """
    classes = case.classifier.num_classes
    left = case.left
    steps = max(1, case.steps // 4)
    tries = [
        case.attacked(left, towards=(case.labels[left] + k) % classes, steps=steps).x
        for k in range(1, classes)
    ]
    light, _, words = case.beyond(case.falls_to_any(tries, left))
    evidence = f"attacks towards {classes - 1} other classes fell {words}"
    reached = case.answers(case.main.x)[0]
    few = case.few[(case.fallen & ~case.clean_falls & (reached != case.labels))[case.few]]
    if not len(few):
        return light, evidence
    again = case.attacked(few, towards=reached[few], steps=max(1, case.steps // 2))
    spared = int((~case.falls(again.x, few)).sum())
    return (
        worst([light, proven(spared, len(few), 0.1)]),
        f"{evidence}, and spare {spared} of {len(few)} that the untargeted attack sent to their class",
    )
