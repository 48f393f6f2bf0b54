"""The only module that prints: results to stdout, everything else to stderr; `--json` leaves stdout to one document."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pdd_cli.errors import PddError


class Console:
    """Messages, tables, progress and the JSON document of one command."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self.err = RichConsole(stderr=True, highlight=False)
        self._out = RichConsole(highlight=False)

    def say(self, text: str) -> None:
        """A line for people (stderr)."""
        self.err.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning for people (stderr)."""
        self.err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def fail(self, error: PddError) -> None:
        """What went wrong and what to do (stderr)."""
        self.err.print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            self.err.print(f"       {escape(error.hint)}", soft_wrap=True)

    def table(self, table: Table) -> None:
        """A result table for people: stdout, or stderr beside `--json`."""
        target = self.err if self.json else self._out
        # A pipe has no width of its own: cells must not be cut to 80 columns there.
        target.print(table, width=None if target.is_terminal else 200)

    def result(self, document: Mapping[str, object]) -> None:
        """The JSON document of the command; printed with `--json` only."""
        if self.json:
            sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2, default=str, allow_nan=False) + "\n")
            sys.stdout.flush()

    def progress(self, *, transient: bool = False) -> Progress:
        """Progress bars (stderr), to be used as a context manager."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.err,
            transient=transient,
        )
