"""`pdd` as tests run it: in this process, in another, and held at a chosen moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pdd_cli.cli import app
from pdd_cli.errors import PddError

STEPS = 12


@dataclass(frozen=True)
class Outcome:
    """What a command did: `err` ends with the error's message and hint."""

    code: int
    out: str
    err: str


class Hold:
    """A moment at which `pdd`, started with `command` in place of "-m pdd_cli", waits for `let_go` (`held.py`)."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.command = ["-m", "tests.helpers.held", name, str(count), str(folder)]
        self.path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))  # PYTHONPATH

    def wait(self, process: subprocess.Popen[str]) -> None:
        """Until it is there."""
        while not (self.folder / "held").exists():
            assert process.poll() is None, "it ended before"
            time.sleep(0.01)

    def let_go(self) -> None:
        (self.folder / "go").touch()


def command(ground, *more, steps=STEPS):
    return [
        sys.executable, "-m", "pdd_cli", "adapt",
        "--real-dir", str(ground / "realLR"), "--hr-dir", str(ground / "hr"),
        "--base", str(ground / "base.safetensors"),
        "--features", "efficientnet-lite0", "--feature-weights", str(ground / "features.safetensors"),
        "--steps", str(steps), "--batch-size", "1", "--device", "cpu", "--precision", "fp32",
        "--set", "crop=16", "--set", "checkpoint_every=4", "--set", "preview_every=6", *more,
    ]  # fmt: skip


def environment(folder):
    return {**os.environ, "PDD_HOME": str(folder / "home")}


def run(*arguments: object) -> tuple[int, str, str, BaseException | None]:
    """Exit code, stdout, stderr with the message of the error, and the error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    if isinstance(error, PddError):
        return error.exit_code, result.stdout, f"{result.stderr}\n{error.message}\n{error.hint}", error
    assert error is None or isinstance(error, SystemExit), error
    return result.exit_code, result.stdout, result.stderr, None


def evaluate(*arguments: object) -> tuple[int, dict[str, object], str]:
    code, out, err, _ = run("evaluate", *arguments, "--json")
    return code, json.loads(out) if out else {}, err


def run_upscale(*arguments: object) -> tuple[dict[str, Any], BaseException | None]:
    result = CliRunner().invoke(
        app, ["upscale", "--precision", "fp32", *map(str, arguments), "--engine", "torch", "--json"]
    )
    return (json.loads(result.stdout) if result.stdout else {}), result.exception
