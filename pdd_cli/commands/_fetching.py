"""Shows the progress of downloads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pdd_cli.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pdd_cli.weights.fetch import FetchEvent


@contextlib.contextmanager
def fetch_progress(console: Console) -> Iterator[Callable[[FetchEvent], None]]:
    """Yields the `on_event` for a fetch: it prints a line for each source, and shows a bar while bytes arrive."""
    with contextlib.ExitStack() as shown:
        bar: tuple[Progress, TaskID] | None = None

        def on_event(event: FetchEvent) -> None:
            nonlocal bar
            if event.kind == "progress":
                if bar is None:
                    progress = shown.enter_context(console.downloads())
                    bar = progress, progress.add_task(event.name)
                bar[0].update(bar[1], completed=event.done, total=event.total)
                return
            if bar is not None:
                shown.pop_all().close()
                bar = None
            if event.kind == "trying":
                console.say(f"{event.name}: trying {event.text}")
            elif event.kind == "waiting":
                console.say(f"{event.name}: waiting: {event.text}")
            elif event.kind == "failed":
                console.say(f"{event.name}: failed: {event.text}")
            else:
                console.say(f"{event.name}: installed from {event.text}")

        yield on_event
