"""The interface through which the core reports messages and progress to its caller. The core never prints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdd_cli.weights.fetch import FetchEvent


class Progress:
    """The progress of one phase. This base class ignores it."""

    def start(self, worker: int, name: str, unit: str = "") -> None:
        """A worker starts the file `name`, whose steps are counted in `unit`."""

    def step(self, worker: int, done: int, total: int) -> None:
        """A worker has finished `done` of `total` steps of its file."""

    def advance(self) -> None:
        """One file is finished."""


class Observer:
    """Receives messages and progress. This base class ignores them; the commands print them."""

    def say(self, text: str) -> None:
        """A message."""

    def warn(self, text: str) -> None:
        """A warning."""

    def debug(self, text: str) -> None:
        """A traceback, for `--debug`."""

    def fetching(self) -> AbstractContextManager[Callable[[FetchEvent], None]]:
        """A context that yields a function that receives download events."""
        return nullcontext(lambda event: None)

    def progress(self, description: str, total: int, *, workers: int = 0) -> AbstractContextManager[Progress]:
        """A context for one phase of `total` files. Each of `workers` also reports the steps of its current file."""
        return nullcontext(Progress())
