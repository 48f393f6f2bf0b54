"""The parts of `pdd fetch-weights` that use no network: the list, descriptions, own models, removal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.errors import InputError

if TYPE_CHECKING:
    from pdd_cli.weights.store import Store

_WIDTH = 80


def show_list(store: Store, console: Console) -> None:
    """Print own models, the weights of the catalogue and the image sets, and which of them are installed."""
    from pdd_cli.weights.catalog import CATALOG
    from pdd_cli.weights.fetch_images import installed_set
    from pdd_cli.weights.image_sets import IMAGE_SETS

    own = {entry.name: entry for entry in store.entries()}
    installed = {known.name: own.pop(known.name, None) for known in CATALOG}
    if own:
        rows = (
            (
                entry.name,
                _scaled(entry.card.architecture, entry.card.scale),
                _megabytes(entry.path.stat().st_size),
                entry.card.created[:10],
                Path(entry.card.base).name if entry.card.base else entry.card.source,
                str((entry.card.adapted or {}).get("verdict", "")),
            )
            for entry in own.values()
        )
        _table(console, "your models", ("name", "what", "size", "date", "base or source", "verdict"), rows)
    for title, is_there in (("installed", True), ("not installed: pdd fetch-weights NAME", False)):
        chosen = [known for known in CATALOG if (installed[known.name] is not None) == is_there]
        catalogue = (
            (known.name, _scaled(known.architecture, known.scale), _megabytes(known.size), known.licence)
            for known in chosen
        )
        if chosen:
            _table(console, title, ("name", "what", "size", "licence"), catalogue)
    console.say(f"installed in {store.root}; details: pdd fetch-weights --info NAME")
    folders = {image_set.name: installed_set(image_set, store) for image_set in IMAGE_SETS}
    photographs = (
        (
            image_set.name,
            str(len(image_set.images)),
            _megabytes(image_set.size),
            "yes" if folders[image_set.name] else "",
            image_set.licence,
        )
        for image_set in sorted(IMAGE_SETS, key=lambda image_set: folders[image_set.name] is None)
    )
    columns = ("name", "images", "size", "installed", "licence")
    _table(console, "image sets for pdd adapt --hr-dir NAME", columns, photographs)
    console.say(f"installed in {store.images}")
    entries = ((known, installed[known.name]) for known in CATALOG)
    console.result(
        {
            "folder": store.root,
            "known": [{**known.as_document(), "installed": there and there.as_document()} for known, there in entries],
            "own": [entry.as_document() for entry in own.values()],
            "image_sets": [
                {**image_set.as_document(), "installed": folders[image_set.name]} for image_set in IMAGE_SETS
            ],
        }
    )


def show_info(references: Sequence[str], store: Store, console: Console, *, offline: bool) -> None:
    """Print what is known about weights, image sets or files."""
    from pdd_cli.reporting.weights import describe

    found = [describe(reference, store, offline=offline) for reference in references]
    for described in found:
        _table(console, described.title, ("", ""), described.rows, header=False)
    console.result({"weights": [described.document for described in found]})


def install_own(name: str, path: Path, store: Store, console: Console, *, overwrite: bool) -> None:
    """Install a model file under a name of the user's own."""
    from pdd_cli.models.installing import install_file

    entry = install_file(path, name, store=store, overwrite=overwrite)
    card = entry.card
    console.say(
        f"{name}: installed from {path.name}: {card.architecture} x{card.scale}, {card.parameters:,} parameters"
    )
    console.say(f"next: pdd upscale IN OUT --weights {name}")
    console.result({"weights": [entry.as_document()], "image_sets": [], "metrics": []})


def remove(names: Sequence[str], store: Store, console: Console, *, overwrite: bool) -> None:
    """Delete installed weights."""
    from pdd_cli.weights.image_sets import find_set

    for name in names:
        if find_set(name) and not store.path(name).exists():
            raise InputError(f"'{name}' is an image set, not weights", f"Delete its folder: {store.images / name}")
    removed = store.remove(names, overwrite=overwrite)
    for one in removed:
        console.say(f"{one.name}: removed, {_megabytes(one.freed)} freed")
    console.result({"removed": [{"name": one.name, "path": one.path, "bytes": one.freed} for one in removed]})


def _table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, header: bool = True
) -> None:
    """Print a table of 80 columns at most; long cells are wrapped."""
    from rich import box
    from rich.markup import escape
    from rich.table import Column, Table

    cells = list(rows)
    name_width = min(28, max(len(row[0]) for row in cells))
    first = Column(columns[0], width=name_width, overflow="fold")
    table = Table(
        first, *(Column(name, overflow="fold") for name in columns[1:]), title=title, title_justify="left",
        box=box.SIMPLE if header else None, pad_edge=False, show_header=header, padding=(0, 1),
    )  # fmt: skip
    for row in cells:
        table.add_row(*map(escape, row))
    if console.err.measure(table).maximum > _WIDTH:
        table.width = _WIDTH
    console.table(table)


def _scaled(architecture: str, scale: int | None) -> str:
    return f"{architecture} x{scale}" if scale else architecture


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.0f} MB" if size and size >= 1e6 else f"{size / 1e6:.2f} MB" if size else "?"
