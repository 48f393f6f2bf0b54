"""The resume state of a run: one explicit dict of tensors and plain values in one file."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdd_cli.errors import InputError
from pdd_cli.files import atomic_write
from pdd_cli.ranks import SINGLE_PROCESS, Ranks

_VERSION = 2


@dataclass
class DivergenceMonitor:
    """What is watched so that a run can't go wrong unseen."""

    rate_factor: float = 1.0  # halved at each rollback
    rollbacks: int = 0
    skipped: int = 0  # steps in a row whose loss was not finite
    recent: list[float] = field(default_factory=list)  # supervised losses of the last steps
    best: float = math.inf  # the lowest mean that `recent` has had


@dataclass(eq=False)
class TrainState:
    """All that training changes."""

    specialist: nn.Module
    generalist: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    warmup_steps: int  # at the start, in which only the discriminator learns; a run that is made longer keeps them
    step: int = 0  # steps done
    guard: DivergenceMonitor = field(default_factory=DivergenceMonitor)
    judgements: list[dict[str, Any]] = field(default_factory=list)  # step, which weights, score, what was measured


def save_checkpoint(path: Path, state: TrainState, settings: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Write `state`, the run's settings and checksums of its `inputs` to `path`, whole or not at all."""
    content = {
        "version": _VERSION,
        "step": state.step,
        "warmup_steps": state.warmup_steps,
        "inputs": inputs,
        "guard": asdict(state.guard),
        "judgements": state.judgements,
        "settings": settings,
        "specialist": state.specialist.state_dict(),
        "generalist": state.generalist.state_dict(),
        "discriminator": state.discriminator.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "discriminator_optimizer": state.discriminator_optimizer.state_dict(),
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # torch tells a file's errors, not a path's
        torch.save(content, file)


def load_checkpoint(path: Path, state: TrainState, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Put what `path`, the first process's file, holds into the `state` of every process.

    Raises InputError where it can't be read or is of another kind of run.
    """
    content = _read(path, ranks.broadcast_file(path))
    try:
        state.specialist.load_state_dict(content["specialist"])
        state.generalist.load_state_dict(content["generalist"])
        state.discriminator.load_state_dict(content["discriminator"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.discriminator_optimizer.load_state_dict(content["discriminator_optimizer"])
        torch.set_rng_state(content["rng"]["cpu"])
        if content["rng"]["cuda"] and torch.cuda.device_count() == len(content["rng"]["cuda"]):
            torch.cuda.set_rng_state_all(content["rng"]["cuda"])
        state.step = content["step"]
        before = content["settings"]  # a file without its own count is of a run that was never made longer
        state.warmup_steps = content.get("warmup_steps", round(before["discriminator_warmup"] * before["steps"]))
        state.guard = DivergenceMonitor(**content["guard"])
        state.judgements = content["judgements"] if "judgements" in content else _older_judgements(path, state.step)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} doesn't fit this run: {error}", "Start anew under another --name.") from error


def checkpoint_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote `path`."""
    return dict(_read(path, path)["settings"])


def checkpoint_inputs(path: Path) -> dict[str, Any] | None:
    """Checksums of what the run that wrote `path` was given; None in an older file."""
    return _read(path, path).get("inputs")


def _older_judgements(checkpoint: Path, step: int) -> list[dict[str, Any]]:
    """The judgements up to `step` of a run of pdd 0.1, whose checkpoint doesn't hold them."""
    path = checkpoint.with_name("judgements.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [judged for judged in found if judged["step"] <= step]


def _read(path: Path, source: Path | io.BytesIO) -> dict[str, Any]:
    try:
        content = torch.load(source, "cpu", weights_only=True, mmap=source is path)
    except Exception as error:
        # torch.load raises UnpicklingError, RuntimeError, EOFError and others, by where the file is broken.
        raise InputError(f"can't read the checkpoint {path}: {error}", "Start anew under another --name.") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise InputError(f"{path} is not a checkpoint of this version of pdd", "Start anew under another --name.")
    return content
