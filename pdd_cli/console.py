"""The only module that prints. Results go to stdout, everything else to stderr; `--json` prints one document."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from pdd_cli.errors import PddError


def prepare_streams() -> None:
    """Make stdout and stderr escape characters that their encoding (cp1252, ASCII) lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Field(ProgressColumn):
    """A field of the task: a text, or a function that gives it anew at each refresh. Never wrapped."""

    def __init__(self, name: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._name = name

    def render(self, task: Task) -> Text:
        value = task.fields.get(self._name, "")
        return Text(value() if callable(value) else value)


class Console:
    """Messages, tables, progress and the JSON document of one command."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        # A pipe has no width; rich would cut lines to 80 columns.
        self.err = RichConsole(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)
        self._out = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 160)

    def say(self, text: str) -> None:
        """Print a message (stderr)."""
        self.err.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning (stderr)."""
        self.err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def fail(self, error: PddError) -> None:
        """Print an error and its hint (stderr)."""
        self.err.print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            self.err.print(f"       {escape(error.hint)}", soft_wrap=True)

    def leave(self, text: str) -> None:
        """Print the last message of a process that ends while a progress bar is shown (stderr)."""
        self.say(text)
        self.err.show_cursor(True)

    def table(self, table: Table) -> None:
        """Print a result table: to stdout, or with `--json` to stderr."""
        (self.err if self.json else self._out).print(table)

    def result(self, document: Mapping[str, object]) -> None:
        """Print the JSON document of the command, with `--json` only."""
        if self.json:
            # Escape non-ASCII characters unless stdout can encode all of them.
            ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
            text = json.dumps(document, ensure_ascii=ascii_only, indent=2, default=str, allow_nan=False)
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def progress(self, *, transient: bool = False) -> Progress:
        """Labelled bars with the fields `count`, `left` and `note` (stderr); a context manager.

        In a narrow terminal the bar itself gives way, not the texts.
        """
        return Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24),
            _Field("count"),
            _Field("left"),
            _Field("note"),
            console=self.err,
            transient=transient,
        )

    def downloads(self) -> Progress:
        """Progress bars that count bytes and disappear at the end (stderr); a context manager."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
        )
