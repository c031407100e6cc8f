"""Results of jobs: each knows the settings that it was computed with, how far it came, and how it ended.

A scene draws what a result says of itself, never the present value of a control beside an older result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffclass.attacks.search import AttackStep

RUNNING = "running"
DONE = "done"
STOPPED = "stopped"
FAILED = "failed"


@dataclass(eq=False, kw_only=True)
class Result:
    """What a job has reached so far; `ending` is one of RUNNING, DONE, STOPPED and FAILED."""

    ending: str = RUNNING


@contextmanager
def recorded(result: Result) -> Iterator[None]:
    """Note in a result how the job that fills it ends.

    Why         a job is a generator: when it is stopped, Python raises GeneratorExit where it waits
    """
    try:
        yield
    except GeneratorExit:
        result.ending = STOPPED
        raise
    except Exception:
        result.ending = FAILED
        raise
    result.ending = DONE


@dataclass(eq=False, kw_only=True)
class AttackFilm(Result):
    """The frames of an attack with at most `steps` steps."""

    steps: int
    frames: list[AttackStep] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """How the attack ended and whether it has fooled the classifier, without claiming what was not tried."""
        fooling = [frame.step for frame in self.frames if bool(frame.fooled)]
        fooled = "not fooled so far"
        if fooling:
            fooled = f"fooled at step {fooling[0]}" if fooling[0] else "wrong without any change"
        reached = f"after step {self.frames[-1].step}" if self.frames else "before the first step"
        if self.ending == RUNNING:
            return f"running, {reached}: {fooled}"
        if self.ending != DONE:
            return f"{self.ending} {reached}: {fooled}"
        if fooling:
            return fooled
        words = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"not fooled in {words}, which is no proof"
