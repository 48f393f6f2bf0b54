"""`pdd upscale IMAGE --compare A,B,…`: several versions of one image on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdd_cli.errors import InputError
from pdd_cli.settings.upscale import UpscaleConfig, UpscaleFlags

if TYPE_CHECKING:
    from pdd_cli.batch.comparison import Comparison
    from pdd_cli.console import Console
    from pdd_cli.options import Call


# The settings that a comparison has; it writes no outputs, and each version names its weights.
_USED = (
    "input", "output", "tile", "overlap", "scale", "width", "height", "long_side", "fit", "denoise", "color_correction",
    "tta", "mix", "snap_flats", "normal_map", "crop", "engine", "device", "precision", "max_memory", "offline",
)  # fmt: skip


def compare(call: Call[UpscaleConfig, UpscaleFlags]) -> None:
    """Write the page and the contact sheet, and show the seconds of each version."""
    flags, console = call.flags, call.console
    for option, is_given in (("dry-run", flags.dry_run), ("watch", flags.watch)):
        if is_given:
            raise InputError(f"--compare can't be combined with --{option}", "Leave one of them out.")
    if other := sorted(call.given() - set(_USED)):
        raise InputError(f"--compare can't be combined with --{other[0].replace('_', '-')}", "Leave one of them out.")
    # Without an output folder, click takes the only argument for OUTPUT.
    given = (call.options["input"], call.options["output"])
    inputs = [path for value in given if value for path in (value if isinstance(value, tuple) else (value,))]
    settings = call.settings({"input": tuple(inputs) or None, "output": str(flags.page)})

    from pdd_cli.batch.comparison import compare_versions
    from pdd_cli.commands._observer import ConsoleObserver

    observer = ConsoleObserver(console, transient=True)
    comparison = compare_versions(settings, flags.compare, page=flags.page, crop=settings.crop, observer=observer)
    console.result(comparison.as_document())
    _describe(comparison, console)


def _describe(comparison: Comparison, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("version", Column("this part", justify="right"), Column("whole image, about", justify="right"))
    for version in comparison.versions:
        table.add_row(escape(version.label), f"{version.seconds:.1f} s", f"{version.whole_seconds:.0f} s")
    console.table(table)
    console.say(f"part of {comparison.source}: {comparison.crop}")
    console.say(f"page: {comparison.page}; contact sheet: {comparison.sheet}")
