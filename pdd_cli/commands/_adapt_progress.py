"""The progress of `pdd adapt`: one line of 80 columns."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.observer import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from pdd_cli.adaptation.loop import StepReport
    from pdd_cli.adaptation.prepare import Run

_STEPS = 20  # from whose mean duration the time left follows


class AdaptProgress:
    """Step, time left and the verdict so far; with `verbose` also a line with the losses of each step."""

    def __init__(self, bars: Bars, console: Console, run: Run, *, verbose: bool) -> None:
        self._bars, self._console, self._run, self._verbose = bars, console, run, verbose
        self._step = run.state.step
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._at = time.monotonic()  # of the last step
        self._judged = len(run.state.judgements)
        self._bar = bars.add_task(
            "adapt", total=self._steps, completed=self._step, count=self._count, left=self._left, note=self._verdict
        )

    def update(self, report: StepReport) -> None:
        """Show the step of `report`."""
        self._step, self._at = report.step, time.monotonic()
        self._seconds.append(report.seconds)
        self._bars.update(self._bar, completed=report.step, total=self._steps)
        if report.event:
            self._console.warn(report.event)
        if self._verbose:
            losses = "  ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
            self._console.say(f"step {report.step}, {report.seconds:.2f} s: {losses}")
        judgements = self._run.state.judgements
        if len(judgements) > self._judged and not self._console.err.is_terminal:
            self._judged = len(judgements)
            step = judgements[-1]["step"]
            self._console.say(f"judged at step {step} of {self._steps}: {self._verdict()}; {self._left()}")

    @property
    def _steps(self) -> int:
        """The last step, which --minutes may change."""
        return self._run.config.steps

    def _count(self) -> str:
        return f"step {self._step}/{self._steps}"

    def _left(self) -> str:
        if not self._seconds or self._step >= self._steps:
            return ""
        if self._step < self._run.state.imitation_steps:
            return "imitation"  # in shorter steps than the others
        left = (self._steps - self._step) * sum(self._seconds) / len(self._seconds) - (time.monotonic() - self._at)
        return f"{duration(max(left, 0))} left"

    def _verdict(self) -> str:
        return self._run.verdict_so_far


@contextlib.contextmanager
def adapt_progress(console: Console, run: Run, *, verbose: bool) -> Iterator[AdaptProgress]:
    """Shows the progress of `run` while the block runs."""
    with console.progress() as bars:
        yield AdaptProgress(bars, console, run, verbose=verbose)
