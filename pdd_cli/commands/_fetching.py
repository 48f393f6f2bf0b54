"""Fetches weights, image sets and the files of metrics, and shows the progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.errors import PddError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pdd_cli.settings.fetch import FetchConfig
    from pdd_cli.weights.catalog import CatalogEntry
    from pdd_cli.weights.fetch import FetchEvent
    from pdd_cli.weights.fetch_images import InstalledSet
    from pdd_cli.weights.image_sets import ImageSet
    from pdd_cli.weights.store import Entry, Store


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


@dataclass
class Fetched:
    """The weights, image sets and metrics that are installed now, and the errors of those that can't be fetched."""

    entries: list[Entry] = field(default_factory=list)
    image_sets: list[InstalledSet] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    failures: list[PddError] = field(default_factory=list)

    def next_command(self) -> str:
        """A command that uses what was fetched."""
        if models := [entry.card.name for entry in self.entries if entry.card.kind == "sr"]:
            return f"pdd upscale IN OUT --weights {models[0]}, or pdd adapt --real-dir DIR --base {models[0]}"
        if self.metrics:
            return f"pdd evaluate OUT --metrics {','.join(self.metrics)}"
        return " --hr-dir ".join(["pdd adapt --real-dir DIR", *(one.image_set.name for one in self.image_sets[:1])])

    def as_document(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "weights": [entry.as_document() for entry in self.entries],
            "image_sets": [image_set.as_document() for image_set in self.image_sets],
            "metrics": self.metrics,
        }


def fetch_all(
    wanted: list[CatalogEntry | ImageSet], settings: FetchConfig, store: Store, console: Console, *, overwrite: bool
) -> Fetched:
    """Install the weights, image sets and metrics, and print a line for each."""
    from pdd_cli.weights.fetch import install
    from pdd_cli.weights.fetch_images import install_set
    from pdd_cli.weights.image_sets import ImageSet

    found = Fetched()
    source, from_path, offline = settings.source, settings.from_path, settings.offline
    with fetch_progress(console) as on_event:
        for known in wanted:
            try:
                if isinstance(known, ImageSet):
                    images = install_set(
                        known, store=store, source=source, from_path=from_path, offline=offline, overwrite=overwrite,
                        on_event=on_event,
                    )  # fmt: skip
                    size = f"{len(known.images)} images in {images.folder} (licence: {known.licence})"
                    console.say(f"{known.name}: {size if images.is_new else f'already installed ({images.folder})'}")
                    found.image_sets.append(images)
                    continue
                weights = install(
                    known, store=store, source=source, from_path=from_path, offline=offline, overwrite=overwrite,
                    on_event=on_event,
                )  # fmt: skip
            except PddError as error:
                found.failures.append(error)
                continue
            entry = weights.entry
            size = f"{entry.card.tensors} tensors, {entry.card.parameters:,} parameters in {entry.path}"
            console.say(f"{known.name}: {size if weights.is_new else f'already installed ({entry.path})'}")
            found.entries.append(entry)
        for name in settings.metrics:
            from pdd_cli.iqa.pyiqa_adapter import fetch_metric_weights

            try:
                fetch_metric_weights([name], offline=offline, from_path=from_path, on_event=on_event)
                found.metrics.append(name)
            except PddError as error:
                found.failures.append(error)
    return found
