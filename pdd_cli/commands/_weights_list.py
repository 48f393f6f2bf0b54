"""The tables of `pdd fetch-weights --list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdd_cli.console import Console

if TYPE_CHECKING:
    from pdd_cli.weights.catalog import CatalogEntry
    from pdd_cli.weights.store import Card, Store


def show_list(store: Store, console: Console) -> None:
    """Print all weights and image sets, and which of them are installed."""
    from rich.markup import escape
    from rich.table import Column, Table

    from pdd_cli.weights.catalog import CATALOG
    from pdd_cli.weights.fetch_images import installed_set
    from pdd_cli.weights.image_sets import IMAGE_SETS

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
    photographs = Table(Column("name", no_wrap=True), "images", "size", "licence", "installed", "from")
    photographs.title, photographs.title_justify = "image sets for pdd adapt --hr-dir NAME", "left"
    image_sets = []
    for image_set in IMAGE_SETS:
        folder = installed_set(image_set, store)
        image_sets.append({**image_set.as_document(), "installed": folder})
        size = f"{image_set.size / 1e6:.0f} MB"
        cells = (image_set.name, str(len(image_set.images)), size, image_set.licence, "yes" if folder else "")
        photographs.add_row(*map(escape, (*cells, image_set.origin)))
    console.table(photographs)
    console.say(f"kept in {store.images}")
    console.result(
        {
            "folder": store.root,
            "known": known,
            "own": [adapted.as_document() for adapted in own.values()],
            "image_sets": image_sets,
        }
    )
