"""Runs a function on a model in another process, because compiled libraries crash on some networks of spandrel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from pdd_cli.errors import InputError, PddError
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.weights.wiring import wiring_of

Function = Callable[..., bytes]
"""Takes a model and texts."""


def may_crash(model: SRModel) -> bool:
    """Whether the network is one of spandrel's, other than RRDBNet and SRVGGNetCompact, which are known to be safe."""
    network = getattr(model.module, "network", model.module)
    return type(network).__module__.startswith("spandrel.") and wiring_of(model.module.state_dict()) is None


def run_apart(function: Function, model: SRModel, *texts: str) -> bytes:
    """The result of `function(model, *texts)`, a function of a module of pdd, computed in another process.

    Raises the InputError that it raises, or one that says that the process crashed.
    """
    with tempfile.TemporaryDirectory(prefix="pdd-") as folder:
        torch.save(model.module.state_dict(), Path(folder) / "state")
        command = [
            sys.executable, "-c", f"from {__name__} import child; child()",
            folder, function.__module__, function.__name__, *texts,
        ]  # fmt: skip
        path = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        failed, result = Path(folder) / "failure.json", Path(folder) / "result"
        if failed.exists():
            raise InputError(*json.loads(failed.read_text(encoding="utf-8")))
        if not result.exists():
            raise InputError(f"the process crashes with a {model.architecture} model (exit code {done.returncode})")
        return result.read_bytes()


def child() -> None:
    """The other process: reads `state` in the folder that is named first, and writes `result` or `failure.json`."""
    folder, (module, name, *texts) = Path(sys.argv[1]), sys.argv[2:]
    model = model_from_state(torch.load(folder / "state", weights_only=True), origin="the model")
    try:
        result = getattr(import_module(module), name)(model, *texts)
    except PddError as error:
        (folder / "failure.json").write_text(json.dumps([error.message, error.hint]), encoding="utf-8")
    else:
        (folder / "result").write_bytes(result)
