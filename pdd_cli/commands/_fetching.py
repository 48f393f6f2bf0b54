"""How the commands show that weights are being fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pdd_cli.console import Console

if TYPE_CHECKING:
    from pdd_cli.weights.fetch import FetchEvent


@contextlib.contextmanager
def fetch_progress(console: Console) -> Iterator[Callable[[FetchEvent], None]]:
    """Yields what to hand to a fetch as `on_event`: a line for each source tried, a bar while bytes arrive."""
    with console.downloads() as progress:
        task = None

        def on_event(event: FetchEvent) -> None:
            nonlocal task
            if event.kind == "progress":
                if task is None:
                    task = progress.add_task(event.name)
                progress.update(task, completed=event.done, total=event.total)
                return
            if task is not None:
                progress.remove_task(task)
                task = None
            if event.kind == "trying":
                console.say(f"{event.name}: trying {event.text}")
            elif event.kind == "failed":
                console.say(f"{event.name}: failed: {event.text}")
            else:
                console.say(f"{event.name}: installed from {event.text}")

        yield on_event
