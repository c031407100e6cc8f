"""Is it the same object for everybody? Checks 37 to 39: in both modes, for every caller, and at every time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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
    checksums,
    gap,
    quiet,
    worst,
)
from diffclass.audit.elsewhere import (
    PATIENCE,
    FailedElsewhere,
    NoAnswer,
    in_a_process,
    in_a_thread,
    put_clocks_forward,
)
from diffclass.audit.object import GROUP
from diffclass.classifiers.base import Classifier, Noise

SLOPE = 1e-2  # of the largest slope: rounding in another order stays below it
WATCHED = 2  # calls of an attack that are asked again
ELSEWHERE = "in another process"
COMPILING = 300  # seconds that a compiler may take
FURTHER = 40  # calls after which the answer has to be the same

# ---------------------------------------------------------------------------------------------------------------------
# Both modes


class InTraining(Classifier):
    """A classifier whose parts are put into training mode for each call, and back: buffers keep what they were.

    Shapes      those of the classifier
    Why         an attack refuses a classifier in training mode, as its answers may be chance; an audit looks at it
    """

    def __init__(self, classifier: Classifier, wanted: Callable[[nn.Module], bool]):
        super().__init__()
        self.classifier = classifier
        self.wanted = wanted
        self.moved = False  # whether a call has changed a buffer
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel
        self.scale = classifier.scale

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.classifier.sample_noise(images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; in training mode."""
        with self._mode():
            return self.classifier.logits(x, noise)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        parts = [part for part in self.classifier.modules() if not part.training]
        parts = [part for part in parts if self.wanted(part)]
        kept = [
            (part, name, buffer)
            for part in parts
            for name, buffer in part.named_buffers(recurse=False)
        ]
        for part, name, buffer in kept:
            setattr(
                part, name, buffer.clone()
            )  # what a graph has kept may not be put back in place
        for part in parts:
            part.training = True
        try:
            yield
        finally:
            for part in parts:
                part.training = False
            for part, name, buffer in kept:
                self.moved = self.moved or not torch.equal(getattr(part, name), buffer)
                setattr(part, name, buffer)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls


def _written_by_others(part: nn.Module) -> bool:
    return not type(part).__module__.startswith("torch.nn.modules.")


@check(
    37,
    GROUP,
    "let training mode change nothing but torch's own layers, and claim the mode in which it is the weaker",
    lambda case: 5 * len(case.few) + 2 * case.cost(len(case.few)),
)
def same_in_both_modes(case: Case) -> Verdict:
    """Whether a classifier in training mode is the same, or no weaker, and shows no gradient that eval mode hides.

    Passes when its own code answers alike in both modes, torch's layers (dropout, batch norm) left in eval mode, and an
    attack through training mode fells at most 1 % more in eval mode. Red when its own code is another function in training
    mode that falls where the claim holds; amber when that function draws or keeps statistics, or falls no more.
    """
    x = case.x[case.few]
    plain = quiet(case.once(case.target), x)
    own = InTraining(case.target, _written_by_others)
    whole = InTraining(case.target, lambda part: True)
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices, device_type=x.device.type):
        # what layers in training mode draw from; put back afterwards
        torch.set_rng_state(case.generator(37).get_state())
        try:
            by_own = quiet(case.once(own), x)
            again = quiet(case.once(own), x)
            by_all = quiet(case.once(whole), x)
        except Exception as error:
            raise CannotJudge(
                f"in training mode it cannot be asked: {type(error).__name__}: {error}"
            ) from error
        differs = gap(by_own, plain)
        in_all = gap(by_all, plain)
        evidence = (
            f"in training mode the logits of {len(x)} images differ by {in_all:.1e} of their spread, and by "
            f"{differs:.1e} where torch's own layers stay in eval mode"
        )
        picture = Picture(
            ("its own code", "all of it"),
            {"difference": (differs, in_all)},
            "in training mode",
            "difference / spread",
        )
        if max(differs, in_all) <= SAME:
            return GREEN, evidence, picture
        through = case.attacked(case.left, target=whole)
        light, _, words = case.beyond(case.falls(through.x, case.left))
        evidence = f"{evidence}; an attack through training mode fells {words}"
        if differs <= SAME:
            return light, evidence, picture
        draws = gap(again, by_own) > SAME
        if draws or own.moved:
            what = "draws noise" if draws else "keeps statistics"
            return (
                worst([light, AMBER]),
                f"{evidence}; its own code {what} in training mode, as a layer such as dropout or batch norm would",
                picture,
            )
        other = replace(case, classifier=own, view=own)
        weaker, _, words = case.beyond(other.falls(other.attacked(case.left).x, case.left))
    return (
        worst([light, weaker, AMBER]),
        f"{evidence}; its own code is another function in training mode, to which {words} of eval mode fall",
        picture,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Every caller


@dataclass
class Call:
    """What a classifier was asked, what it answered, and, of an attack's gradient, what came in and what came out.

    Shapes      x [B,C,H,W], logits [B,K];  upstream [B,K] and slope [B,C,H,W], or None without a gradient
    """

    x: Tensor
    noise: Noise
    logits: Tensor
    upstream: Tensor | None = None
    slope: Tensor | None = None

    def keep_upstream(self, gradient: Tensor) -> None:
        """Remember the gradient at the logits."""
        self.upstream = gradient

    def keep_slope(self, gradient: Tensor) -> None:
        """Remember the gradient at the pixels."""
        self.slope = gradient

    def repeated(self, ask: Callable[[Tensor, Noise], Tensor]) -> list[Tensor]:
        """The logits, and the slope where there was one, of somebody else who asks the same. Shapes: [B,K], [B,C,H,W]."""
        if self.slope is None:
            return [ask(self.x, self.noise).detach()]
        leaf = self.x.clone().requires_grad_()
        logits = ask(leaf, self.noise)
        return [logits.detach(), torch.autograd.grad(logits, leaf, self.upstream)[0]]

    def differs(self, answer: list[Tensor]) -> tuple[float, float]:
        """By how much an answer differs: logits in spreads, slopes in shares of the largest one; 0 where there is none."""
        logits, *slopes = answer
        of_logits = gap(logits.to(self.logits), self.logits)
        if not slopes:
            return of_logits, 0.0
        largest = float(self.slope.abs().max())
        apart = float((slopes[0].to(self.slope) - self.slope).abs().max())
        return of_logits, apart / max(largest, torch.finfo(self.slope.dtype).tiny)


class Watched(Classifier):
    """A classifier that is asked through a window: its first calls are kept as they were.

    Shapes      those of the classifier
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
        self.seen: list[Call] = []
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel
        self.scale = classifier.scale

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.classifier.sample_noise(images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        logits = self.classifier.logits(x, noise)
        if len(self.seen) < WATCHED:
            call = Call(x.detach().clone(), noise, logits.detach().clone())
            self.seen.append(call)
            if x.requires_grad and logits.requires_grad:
                logits.register_hook(call.keep_upstream)
                x.register_hook(call.keep_slope)
        return logits

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls


def _without_a_trace(model: nn.Module, x: Tensor, noise: Noise) -> Tensor:
    with torch.inference_mode():
        return model(x, noise).clone()


@check(
    38,
    GROUP,
    "let the classifier not look at who asks: no stack, process, thread, environment or compiler in its forward",
    lambda case: case.cost(len(case.few), steps=1, draws=1) * 4,
)
def same_for_every_caller(case: Case) -> Verdict:
    """Whether what an attack is told, logits and gradient, is what everybody else is told who asks the same.

    The first calls of the case's attack are asked again in a thread whose stack shows nobody who judges or attacks, in
    another process without environment, under inference mode and, where the case says so, compiled. Passes when logits
    differ by less than 1e-3 of their spread, and slopes by less than 1 % of the largest; amber without another process.
    """
    watched = Watched(case.target)
    case.attacked(case.few, target=watched, steps=1, draws=1)
    if not watched.seen:
        raise CannotJudge("the attack asks nothing, so nobody else can be told otherwise.")
    model = case.target
    compiler = torch.compile(model, backend="eager") if case.compiled else None
    faces = {}
    unasked = []

    def among_others(*arguments) -> Tensor:
        return in_a_thread(model, *arguments)

    def compiled(*arguments) -> Tensor:
        return in_a_thread(compiler, *arguments)

    def compare(name: str, answers: Callable[[], list[list[Tensor]]], excused=NoAnswer) -> None:
        try:
            told = answers()
        except excused as error:
            unasked.append(f"{name} ({error})")
            return
        apart = [call.differs(answer) for call, answer in zip(watched.seen, told, strict=True)]
        faces[name] = tuple(max(column) for column in zip(*apart, strict=True))

    def repeated(ask: Callable) -> list[list[Tensor]]:
        return [call.repeated(ask) for call in watched.seen]

    def by_another(ask: Callable, patience: float) -> list[list[Tensor]]:
        if case.x.device.type != "cpu":
            raise NoAnswer("the classifier is on an accelerator")
        flat = in_a_process(lambda: sum(repeated(ask), []), patience)
        return [[flat.pop(0) for _ in (0, *_slopes(call))] for call in watched.seen]

    def traceless() -> list[list[Tensor]]:
        return [[_without_a_trace(model, call.x, call.noise)] for call in watched.seen]

    start = time.perf_counter()
    compare("in a thread", lambda: repeated(among_others))
    patience = _patience(start)
    compare(ELSEWHERE, lambda: by_another(among_others, patience))
    # what needs gradients inside, or Python that no compiler follows, cannot be asked so: that is no other answer
    compare("in inference mode", traceless, RuntimeError)
    if compiler is not None:
        compare(
            "compiled",
            lambda: by_another(compiled, COMPILING + patience),
            (NoAnswer, FailedElsewhere),
        )
    evidence = (
        f"{len(watched.seen)} calls of the attack, asked again: "
        + "; ".join(
            f"{name} logits differ by {a:.1e}, slopes by {b:.1e}" for name, (a, b) in faces.items()
        )
        + " (of the logits' spread, of the largest slope)"
    )
    if unasked:
        evidence = f"{evidence}; not asked: {', '.join(unasked)}"
    picture = Picture(
        tuple(faces),
        {
            "logits": tuple(a for a, _ in faces.values()),
            "slopes": tuple(b for _, b in faces.values()),
        },
        "",
        "difference / spread",
    )
    if not all(a <= SAME and b <= SLOPE for a, b in faces.values()):
        return RED, evidence, picture
    return (GREEN if ELSEWHERE in faces else AMBER), evidence, picture


def _patience(start: float) -> float:
    """How long to wait for a process that does what took from `start` until now, on a machine that others use too."""
    return PATIENCE + 20 * (time.perf_counter() - start)


def _slopes(call: Call) -> tuple[int, ...]:
    return () if call.slope is None else (1,)


# ---------------------------------------------------------------------------------------------------------------------
# Every time


@check(
    39,
    GROUP,
    "let the classifier keep nothing of what it was asked, and read no clock: its answer is of pixels and noise alone",
    lambda case: 5 * len(case.few) + FURTHER,
    first=lambda case: case.opening,
)
def same_at_every_time(case: Case) -> Verdict:
    """Whether it answers as it did when the audit began: after all other checks, after 40 more calls, a day later.

    Passes when logits of one noise differ by less than 1e-3 of their spread, also beside those of a process whose clocks
    are put forward, and no weight or buffer has changed; amber where no such process can be made.
    """
    x = case.x[case.few]
    before, sums = case.opening
    model = case.once(case.target)
    start = time.perf_counter()
    faces = {"after the other checks": gap(quiet(model, x), before)}
    patience = _patience(start)
    for call in range(FURTHER):
        quiet(model, x[call % len(x)][None])
    faces[f"after {FURTHER} more calls"] = gap(quiet(model, x), before)
    unasked = ""

    def later() -> list[Tensor]:
        now = quiet(model, x)
        put_clocks_forward(model)
        return [now, in_a_thread(quiet, model, x)]

    try:
        if x.device.type != "cpu":
            raise NoAnswer("the classifier is on an accelerator")
        now, tomorrow = in_a_process(later, patience)
        faces["a day later"] = gap(tomorrow, now)
    except NoAnswer as reason:
        unasked = f"; not asked a day later ({reason})"
    changed = [name for name, value in checksums(case.target).items() if sums.get(name) != value]
    evidence = (
        "the same images, asked again: "
        + ", ".join(f"{name} logits differ by {value:.1e}" for name, value in faces.items())
        + f" of their spread; {len(changed)} of {len(sums)} weights and buffers have changed"
        + (f" ({changed[0]})" if changed else "")
        + unasked
    )
    picture = Picture(
        tuple(faces), {"difference": tuple(faces.values())}, "", "difference / spread"
    )
    if max(faces.values()) > SAME or changed:
        return RED, evidence, picture
    return (AMBER if unasked else GREEN), evidence, picture
