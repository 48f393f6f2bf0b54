"""The `pdd` command: registers the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import functools
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pdd_cli.commands.adapt import adapt
from pdd_cli.commands.doctor import doctor
from pdd_cli.commands.evaluate import evaluate
from pdd_cli.commands.export import export
from pdd_cli.commands.fetch_weights import fetch_weights
from pdd_cli.commands.ui import ui
from pdd_cli.commands.upscale import upscale
from pdd_cli.console import Console, prepare_streams
from pdd_cli.errors import Interrupted, PddError, package_load_error
from pdd_cli.interruption import EXIT_CODE as INTERRUPTED
from pdd_cli.interruption import ignore_signals, raise_on_signals, was_raised
from pdd_cli.ranks import Ranks
from pdd_cli.system import limit_thread_spinning
from pdd_cli.version import __version__


class _Help:
    """Help that shows no type for flags and lists `--help` with the general options."""

    def get_params(self, ctx: Any) -> Any:
        parameters: Any = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            if parameter.name == "help" and not isinstance(self, TyperGroup):
                parameter.rich_help_panel = "General"
        return parameters


class _Command(_Help, TyperCommand):
    pass


class _Group(_Help, TyperGroup):
    pass


app = typer.Typer(
    name="pdd",
    cls=_Group,
    help="Adapt a super-resolution model to your own images, upscale with it, and score the result.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("adapt", cls=_Command)(adapt)
app.command("upscale", cls=_Command)(upscale)
app.command("evaluate", cls=_Command)(evaluate)
app.command("fetch-weights", cls=_Command)(fetch_weights)
app.command("export", cls=_Command)(export)
app.command("ui", cls=_Command)(ui)
app.command("doctor", cls=_Command)(doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pdd {__version__}")
        raise typer.Exit


_FIRST_STEPS = """\
pdd adapts super-resolution models to your own images. First commands:
  pdd upscale photo.jpg photo-x4.png       enlarge an image, a video or a folder
  pdd adapt --real-dir ./realLR            fit a model to one camera or scanner
  pdd upscale in/ out/ --weights realLR    enlarge with your own model
  pdd evaluate out/ --metrics niqe         score the result
All commands: pdd --help. Options of a command: pdd upscale --help"""


@app.callback()
def _global(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(_FIRST_STEPS)


def main() -> NoReturn:
    """Run `pdd` on sys.argv and exit with its code (see docs/cli.md)."""
    raise_on_signals()
    prepare_streams()
    limit_thread_spinning()
    ranks = Ranks.from_environment()
    code: int | str | None
    try:
        with ranks.silence_unless_first():
            # Typer exits with 2 for its own usage errors, with 0 for `--help`, and with 130 for KeyboardInterrupt.
            code = app(standalone_mode=True)
    except SystemExit as exit:
        ignore_signals()
        code = exit.code
        if code == INTERRUPTED and was_raised():
            ranks.report_once(functools.partial(_print_failure, KeyboardInterrupt()))
    except BrokenPipeError:
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        ignore_signals()  # torchrun sends some when another process has failed
        if "--debug" in sys.argv:
            traceback.print_exception(error)
        if was_raised() and not isinstance(error, Interrupted):
            error = KeyboardInterrupt()  # a library has turned it into its own error
        elif isinstance(error, ImportError) and not (error.name or "").startswith("pdd_cli"):
            error = package_load_error(error)
        ranks.report_once(functools.partial(_print_failure, error))
        code = _exit_code(error)
    sys.exit(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, PddError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 5 if isinstance(error, MemoryError) else 1


def _print_failure(error: BaseException) -> None:
    console = Console()
    if isinstance(error, PddError):
        console.fail(error)
    elif isinstance(error, KeyboardInterrupt):
        console.say("interrupted")
    elif isinstance(error, MemoryError):
        console.fail(PddError("out of memory", "Close other programs, or use a smaller --tile or --batch-size."))
    else:
        console.fail(
            PddError(
                f"a bug in pdd: {type(error).__name__}: {error}",
                "Please report it with the output of the same command after `pdd --debug`.",
            )
        )


if __name__ == "__main__":
    main()
