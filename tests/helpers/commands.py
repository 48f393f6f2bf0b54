"""`pdd` as tests run it: in this process, in another, and held at a chosen moment."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdd_cli.cli import app
from pdd_cli.engines.winograd.kernel import Emitter, kernel
from pdd_cli.engines.winograd.training_kernel import TrainingEmitter
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


@functools.cache
def _machine_code() -> dict[str, bytes]:
    """The files of both Winograd kernels as a process caches them, compiled once: that takes seconds of a core."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PDD_HOME", folder)
        for emitter in (Emitter, TrainingEmitter):
            for compiled in kernel.__wrapped__(emitter), kernel(emitter):  # this process's own, too, if it has none yet
                if compiled is not None:
                    compiled.address("run")
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.kernel")}


def environment(folder: Path) -> dict[str, str]:
    """That of a process whose PDD_HOME is `folder`/home, where the kernels are compiled already."""
    home = folder / "home"
    for name, content in _machine_code().items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    return {**os.environ, "PDD_HOME": str(home)}


def invoke(*arguments: object) -> Outcome:
    """`pdd ARGUMENTS` in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    if isinstance(error, PddError):
        return Outcome(error.exit_code, result.stdout, f"{result.stderr}\n{error.message}\n{error.hint}")
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return Outcome(result.exit_code, result.stdout, result.stderr)


def invoke_in(folder: Path, *arguments: object) -> Outcome:
    """`pdd ARGUMENTS` in this process, in `folder`, whose `home` is PDD_HOME."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PDD_HOME", str(folder / "home"))
        return invoke(*arguments)


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
