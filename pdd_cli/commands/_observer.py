"""Shows the messages and progress of the core on the console."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pdd_cli.commands._fetching import fetch_progress
from pdd_cli.console import Console
from pdd_cli.observer import Observer, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from pdd_cli.weights.fetch import FetchEvent


class ConsoleObserver(Observer):
    """Messages as lines, progress as bars; `transient` bars disappear when they are complete."""

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        self._console = console
        self._transient = transient

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
    def progress(self, description: str, total: int, *, workers: int = 0) -> Iterator[Progress]:
        with self._console.progress(transient=self._transient) as bars:
            yield _BarProgress(bars, description, total, workers)


class _BarProgress(Progress):
    """One bar for all files, and one for each worker."""

    def __init__(self, bars: Bars, description: str, total: int, workers: int) -> None:
        self._bars = bars
        self._files = bars.add_task(description, total=total, note="")
        self._workers = [bars.add_task("", total=None, note="") for _ in range(workers)]

    def start(self, worker: int, name: str, unit: str = "") -> None:
        if self._workers:
            self._bars.reset(self._workers[worker], total=None, description=unit, note=name)
        else:
            self._bars.update(self._files, note=name)

    def step(self, worker: int, done: int, total: int) -> None:
        if self._workers:
            self._bars.update(self._workers[worker], completed=done, total=total)

    def advance(self) -> None:
        self._bars.update(self._files, advance=1)
