"""Shows the messages and progress of the core on the console."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdd_cli.commands._fetching import fetch_progress
from pdd_cli.console import Console
from pdd_cli.observer import Observer, Progress, duration, pixel_rate

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from pdd_cli.weights.fetch import FetchEvent

_NAME_LENGTH = 24


class ConsoleObserver(Observer):
    """Messages as lines, progress as bars; `transient` bars disappear when they are complete."""

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        self._console = console
        self._transient = transient

    @property
    def shows_progress(self) -> bool:
        return self._console.err.is_terminal

    def say(self, text: str) -> None:
        self._console.say(text)

    def warn(self, text: str) -> None:
        self._console.warn(text)

    def debug(self, text: str) -> None:
        if "--debug" in sys.argv:
            self._console.say(text)

    def fetching(self) -> contextlib.AbstractContextManager[Callable[[FetchEvent], None]]:
        return fetch_progress(self._console)

    @contextlib.contextmanager
    def progress(self, description: str, total: int, *, workers: int = 1, pixels: int = 0) -> Iterator[Progress]:
        with self._console.progress(transient=self._transient) as bars:
            shown = _BarProgress(bars, description, total, workers, pixels)
            yield shown
            shown.close()


@dataclass
class _Current:
    """The file of a worker: its size and the computed fraction."""

    size: int = 0
    fraction: float = 0.0


class _BarProgress(Progress):
    """A bar for all files, whose time left follows from the pixels, and one for each current file of several tiles.

    Without a number of pixels every file counts the same. The methods may be called from several threads.
    """

    def __init__(self, bars: Bars, description: str, files: int, workers: int, pixels: int) -> None:
        self._bars, self._lock = bars, threading.Lock()
        self._files, self._finished = files, 0
        self._by_pixels, self._total = pixels > 0, pixels or files
        self._ended = 0  # size of the files that are no longer computed
        self._current = [_Current() for _ in range(workers)]
        self._started: float | None = None
        self._bar = bars.add_task(description, total=self._total, count=self._count, left=self._left, note="")
        self._workers = [bars.add_task("", visible=False, count="", left="", note="") for _ in range(workers)]

    def start(self, worker: int, name: str, unit: str = "", pixels: int = 0) -> None:
        with self._lock:
            if self._started is None:
                self._started = time.monotonic()
            self._ended += self._current[worker].size
            self._current[worker] = _Current(pixels if self._by_pixels else 1)
            self._bars.reset(self._workers[worker], total=None, visible=False, description=f"  {unit}", note="")
            if len(self._workers) > 1:
                self._bars.update(self._workers[worker], note=_shortened(name))
            self._bars.update(self._bar, completed=self._done, note=_shortened(name))

    def step(self, worker: int, done: int, total: int) -> None:
        with self._lock:
            self._current[worker].fraction = done / total
            self._bars.update(
                self._workers[worker], completed=done, total=total, visible=1 < total != done, count=f"{done}/{total}"
            )
            self._bars.update(self._bar, completed=self._done)

    def advance(self, *, not_computed: int = 0) -> None:
        with self._lock:
            self._finished += 1
            self._total -= not_computed if self._by_pixels else 0
            completed = self._total if self._finished == self._files else self._done
            self._bars.update(self._bar, total=self._total, completed=completed)

    def close(self) -> None:
        """Hide what is of interest only while files are computed."""
        for bar in self._workers:
            self._bars.update(bar, visible=False)
        self._bars.update(self._bar, note="")

    @property
    def _done(self) -> float:
        """The computed size."""
        return self._ended + sum(one.size * one.fraction for one in self._current)

    def _count(self) -> str:
        return f"{self._finished}/{self._files}"

    def _left(self) -> str:
        """The rate and the remaining time."""
        seconds = time.monotonic() - self._started if self._started is not None else 0.0
        done = self._done
        if not done or not seconds:
            return ""
        rate = pixel_rate(done, seconds) if self._by_pixels else ""
        left = (self._total - done) * seconds / done
        return "  ".join(filter(None, [rate, f"{duration(left)} left" if self._finished < self._files else ""]))


def _shortened(name: str) -> str:
    half = _NAME_LENGTH // 2 - 1
    return name if len(name) <= _NAME_LENGTH else f"{name[:half]}…{name[-half:]}"
