"""The time limit of a run with `--minutes`: plans the steps, and plans again when the speed of the machine changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic

_JUDGING_FRACTION = 0.1  # of the time
_MAX_JUDGEMENTS = 20
_STEPS_PER_JUDGEMENT = 10  # at least
# Fractions of the time asked for: the plan changes when the run would end this much later, or earlier.
_LATE, _EARLY = 0.03, 0.08
# The speed is measured again after at least so many steps, which took at least this fraction of the time.
_RECENT_STEPS, _RECENT_FRACTION = 5, 0.05


@dataclass(frozen=True)
class Timing:
    """Measured seconds; `events`: problems in the trial steps."""

    per_step: float
    per_judgement: float  # of one model
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A run that fits into a time. `judged_every`: steps between judgements."""

    steps: int
    judged_every: int


def plan_steps(seconds: float, timing: Timing, candidates: int, final: float, judged_every: int | None = None) -> Plan:
    """The plan for the `seconds` that a run may still take.

    Args:
        seconds: Time for training, judgements and report.
        timing: The speed of the machine.
        candidates: Number of models that each judgement evaluates.
        final: The time of verdict and report, as a multiple of the judgement of one model.
        judged_every: Steps between judgements; None: as often as a tenth of the time allows, at most 20 times.
    """
    left = seconds - final * timing.per_judgement
    judging = candidates * timing.per_judgement
    if judged_every is not None:  # the last step is always judged
        steps = max(0, math.floor((left - judging) / (timing.per_step + judging / judged_every)))
    else:
        judgements = max(1, min(_MAX_JUDGEMENTS, math.floor(_JUDGING_FRACTION * seconds / max(judging, 1e-9))))
        steps = max(0, math.floor((left - judgements * judging) / timing.per_step))
        judgements = max(1, min(judgements, steps // _STEPS_PER_JUDGEMENT))
        judged_every = max(1, math.ceil(steps / judgements))
    return Plan(steps, judged_every)


class TimeLimit:
    """The time that a run may take, and the speed of its last steps.

    Args:
        minutes: The time asked for.
        started: The `time.monotonic()` at the start.
        timing: The speed of the machine at the start.
        candidates, final: As in `plan_steps`.
    """

    def __init__(self, minutes: float, started: float, timing: Timing, candidates: int, final: float) -> None:
        self.minutes, self.timing, self._started = minutes, timing, started
        self._candidates, self._final = candidates, final
        self.per_step = timing.per_step  # now
        self.announced = 0  # the last step as the user was told
        self._recent: list[float] = []

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return monotonic() - self._started

    def describe(self) -> str:
        """The time asked for and the time spent, in words."""
        return f"{self.minutes:g} minutes asked, {self.spent / 60:.1f} taken"

    def record(self, seconds: float) -> None:
        """Note the duration of a step."""
        self._recent.append(seconds)

    def last_step(self, step: int, planned: int, judged_every: int) -> int:
        """The last step of a run that has done `step` of `planned` steps.

        It is `planned` unless the run would end too late or too early: then the last step with which it ends in time.
        A judgement is taken to have become slower or faster by the same factor as a step.
        """
        recent, limit = self._recent, 60 * self.minutes
        if len(recent) < _RECENT_STEPS or sum(recent) < _RECENT_FRACTION * limit:
            return planned
        self.per_step = sum(recent) / len(recent)
        recent.clear()
        slower, spent = self.per_step / self.timing.per_step, self.spent
        timing = Timing(self.per_step, slower * self.timing.per_judgement)
        judgements = planned // judged_every - (step - 1) // judged_every + (planned % judged_every > 0)
        seconds = (planned - step) * timing.per_step
        seconds += (judgements * self._candidates + self._final) * timing.per_judgement
        if -_EARLY * limit <= spent + seconds - limit <= _LATE * limit:
            return planned
        return step + plan_steps(limit - spent, timing, self._candidates, self._final, judged_every).steps
