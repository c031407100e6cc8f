"""How the learning rate and the running average change along a run, by its steps or by its time."""

import math
from dataclasses import dataclass

WARM_STEPS = 20
WARM_PART = 0.04  # of a run by time
LEAST = 0.01  # of the rate, at the end


@dataclass(frozen=True)
class Schedule:
    """Up, then linearly down to a hundredth; the average is short at first.

    Formula     part = step / steps, or seconds / (60 minutes);  rate(part) = rate warm max(0.01, 1 - part),
                warm = min(1, (step + 1) / 20), by time min(1, (part + 0.001) / 0.04);
                keep = min(ema^(steps part / step), (step + 1) / (step + 10)),  where the exponent is 1 by steps
    Why         a run by time ends annealed on any machine, and its average reaches back over the same share of it:
                each of its steps stands for as many of the recipe's as it takes of the time
    Units       seconds: of training, all its parts together; measuring, writing and compiling are not counted
    """

    rate: float
    ema: float
    steps: int
    minutes: float | None = None

    def part(self, step: int, seconds: float) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.minutes is None:
            return min(1.0, step / self.steps)
        return min(1.0, seconds / (60 * self.minutes))

    def rate_at(self, step: int, seconds: float) -> float:
        """The learning rate of the step that comes after `step` others."""
        part = self.part(step, seconds)
        if self.minutes is None:
            warm = min(1.0, (step + 1) / WARM_STEPS)
        else:
            warm = min(1.0, (part + 0.001) / WARM_PART)
        return self.rate * warm * max(LEAST, 1 - part)

    def keep_at(self, step: int, seconds: float) -> float:
        """How much of the average that step keeps."""
        stands_for = 1.0
        if self.minutes is not None and step:
            stands_for = self.steps * self.part(step, seconds) / step
        return min(self.ema**stands_for, (step + 1) / (step + 10))

    def steps_at(self, step: int, seconds: float) -> int:
        """The steps of the whole run; by time as many as its pace lets expect, and `step` only once it is over."""
        if self.minutes is None:
            return self.steps
        part = self.part(step, seconds)
        if part >= 1:
            return step
        return max(step + 1, math.ceil(step / part)) if part else step + 1
