"""The command line is made from the settings models: nothing stands twice, nothing is missing."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from pdd_cli import __version__
from pdd_cli.cli import app
from pdd_cli.options import Call, command
from pdd_cli.settings.adapt import AdaptConfig, AdaptFlags, Generalist
from pdd_cli.settings.base import Option, Settings
from pdd_cli.settings.evaluate import EvaluateConfig
from pdd_cli.settings.export import ExportConfig, ExportFlags
from pdd_cli.settings.fetch import FetchConfig, FetchFlags
from pdd_cli.settings.upscale import UpscaleConfig, UpscaleFlags

COMMANDS: dict[str, tuple[type[Settings], type[Settings]]] = {
    "adapt": (AdaptConfig, AdaptFlags),
    "upscale": (UpscaleConfig, UpscaleFlags),
    "evaluate": (EvaluateConfig, Settings),
    "fetch-weights": (FetchConfig, FetchFlags),
    "export": (ExportConfig, ExportFlags),
}


def options_of(model: type[BaseModel]) -> Iterator[tuple[str, Option, object]]:
    """Name, option and default of each field that has an option."""
    for name, field in model.model_fields.items():
        yield from ((name, part, field.default) for part in field.metadata if isinstance(part, Option))
        parts = [field.annotation, *(inner for part in get_args(field.annotation) for inner in (part, *get_args(part)))]
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from options_of(part)


def help_of(name: str, columns: int) -> str:
    found = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert found.exit_code == 0
    return found.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_with_its_default(name):
    lines = [line for line in help_of(name, 300).splitlines() if line.startswith("│")]
    for model in COMMANDS[name]:
        for field, option, default in options_of(model):
            shown = [option.metavar or field] if option.argument else []
            shown += option.flags or ([] if option.argument else ["--" + field.replace("_", "-")])
            for flag in (part for form in shown for part in form.split("/")):
                row = next(line for line in lines if re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", line[:100]))
                if isinstance(default, (int, float)) and not isinstance(default, bool):
                    assert float(re.findall(r"\[default: (.*?)\]", row)[0]) == default
                elif default and isinstance(default, (str, Path)):
                    assert f"[default: {default}]" in row


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns(name):
    text = help_of(name, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "<bool>" not in text
    parser = typer.main.get_command(app).commands[name]
    for parameter in parser.params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert flag in text or parameter.param_type_name == "argument"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_are_valid(name):
    parser = typer.main.get_command(app).commands[name]
    examples = re.findall(rf"^ +pdd {name} (.+)$", help_of(name, 80), re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        assert parser.make_context(name, shlex.split(example)).params


class Inner(Settings):
    mode: Annotated[Literal["b"], Field(description="Which."), Option("Method", flags=("--mode",))] = "b"


class Other(Settings):
    mode: Literal["c"]


class Toy(Settings):
    files: Annotated[tuple[Path, ...], Option("Input", argument=True, metavar="FILE")] = ()
    names: Annotated[tuple[str, ...], Option("Input", comma_separated=True)] = ()
    number: Annotated[Literal["auto"] | int, Option("Method")] = "auto"
    deep: Annotated[bool, Option("Method", flags=("--deep/--flat",))] = True
    both: Inner | Other = Inner()
    secret: int = 3


class ToyFlags(Settings):
    dry: Annotated[bool, Option("Run")] = False


@pytest.mark.parametrize(
    ("arguments", "settings", "dry"),
    [
        ("", Toy(), False),
        ("a b --dry", Toy(files=(Path("a"), Path("b"))), True),
        ("--names x,y, --number 4", Toy(names=("x", "y"), number=4), False),
        ("--number auto --flat", Toy(deep=False), False),
        ("--mode c --set secret=5", Toy(both=Other(mode="c"), secret=5), False),
    ],
)
def test_options_reach_the_settings(arguments, settings, dry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls: list[Call[Toy, ToyFlags]] = []
    toy = typer.Typer()
    toy.command()(command(Toy, "upscale", ToyFlags, calls.append))
    found = CliRunner().invoke(toy, arguments.split(), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert calls[0].settings() == settings
    assert calls[0].flags.dry == dry


def test_values_that_are_not_allowed_are_a_usage_error():
    found = CliRunner().invoke(app, ["adapt", "--mode", "other"])
    assert found.exit_code == 2
    for mode in (get_args(branch)[0].model_fields["mode"].annotation for branch in get_args(get_args(Generalist)[0])):
        assert get_args(mode)[0] in found.output


@pytest.mark.parametrize("arguments", [["--json", "fetch-weights", "--list"], ["fetch-weights", "--json", "--list"]])
def test_json_may_stand_before_and_after_the_command(pdd, arguments):
    assert json.loads(pdd(*arguments).out)["known"]


@pytest.mark.parametrize("arguments", [["--debug", "fetch-weights", "none"], ["fetch-weights", "none", "--debug"]])
def test_debug_may_stand_before_and_after_the_command(arguments, tmp_path):
    found = subprocess.run([sys.executable, "-m", "pdd_cli", *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "Traceback" in found.stderr
    assert "none" in found.stderr


def test_the_version():
    for flag in ("--version", "-V"):
        assert CliRunner().invoke(app, [flag]).output == f"pdd {__version__}\n"


def test_shells_complete_commands_options_and_values():
    for words, expected in (("pdd ad", "adapt"), ("pdd adapt --prec", "--precision"), ("pdd adapt --mode s", "static")):
        environment = {"_PDD_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
        found = CliRunner().invoke(app, [], prog_name="pdd", env=environment)
        assert expected in found.output


def test_help_needs_no_heavy_library():
    code = "import sys, pdd_cli.cli; print({'torch', 'cv2', 'pyiqa', 'scipy', 'av', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
