"""The interface through which the core reports messages and progress to its caller. The core never prints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdd_cli.weights.fetch import FetchEvent


class Progress:
    """The progress of one phase. This base class ignores it."""

    def start(self, worker: int, name: str, unit: str = "", pixels: int = 0) -> None:
        """A worker starts the file `name`, which has `pixels` and whose steps are counted in `unit`."""

    def step(self, worker: int, done: int, total: int) -> None:
        """A worker has finished `done` of `total` steps of its file."""

    def advance(self, *, not_computed: int = 0) -> None:
        """One file is finished. `not_computed`: its pixels, if it was never started."""


class Observer:
    """Receives messages and progress. This base class ignores them; the commands print them."""

    @property
    def shows_progress(self) -> bool:
        """Whether someone sees the progress, so that counting pixels in advance is worth its time."""
        return False

    def stop_requested(self) -> bool:
        """Whether `pdd_cli.adapt` is to save its state and stop; asked after each step."""
        return False

    def say(self, text: str) -> None:
        """A message."""

    def warn(self, text: str) -> None:
        """A warning."""

    def debug(self, text: str) -> None:
        """A traceback, for `--debug`."""

    def fetching(self) -> AbstractContextManager[Callable[[FetchEvent], None]]:
        """A context that yields a function that receives download events."""
        return nullcontext(lambda event: None)

    def progress(
        self, description: str, total: int, *, workers: int = 1, pixels: int = 0
    ) -> AbstractContextManager[Progress]:
        """A context for one phase of `total` files, of `pixels` all together if that is known.

        Each of `workers` reports the steps of its current file.
        """
        return nullcontext(Progress())


def pixel_rate(pixels: float, seconds: float) -> str:
    """A rate in words, such as "1.23 MP/s" (megapixels per second)."""
    rate = pixels / max(seconds, 1e-9) / 1e6
    return f"{rate:.2g} MP/s" if rate < 10 else f"{rate:.0f} MP/s"


def duration(seconds: float) -> str:
    """A duration in words, such as "45 s", "12 min" or "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
