"""`pdd doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from pdd_cli.console import Console

_LIST_BELOW = ("folders", "environment")


def doctor(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel="General")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback when something fails.", rich_help_panel="General")
    ] = False,
) -> None:
    """Show versions, devices, engines and folders, to paste into a bug report.

    Uses no network. For information that can't be determined, shows the reason.
    Passwords and the name of your home folder are left out.

    Examples:
      pdd doctor
      pdd doctor --json
    """
    from rich.markup import escape
    from rich.table import Table

    from pdd_cli.doctor import examine

    console = Console(json=as_json or bool(context.find_root().params.get("json")))
    facts = examine()
    table = Table(box=None, show_header=False, pad_edge=False, width=min(100, console.err.width))
    for label, value in facts.items():
        if isinstance(value, str):
            table.add_row(escape(label), escape(value))
        elif label in _LIST_BELOW:
            table.add_row(escape(label), escape("\n".join(f"{name}: {text}" for name, text in value.items())))
        else:
            table.add_row(escape(label), escape(", ".join(f"{name} {text}" for name, text in value.items())))
    if not console.json:
        console.table(table)
    console.result(facts)
