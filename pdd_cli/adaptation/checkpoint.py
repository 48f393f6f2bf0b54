"""The checkpoint of a run: a dict of tensors and plain values in one file."""

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
    """The statistics from which divergence of the training is detected."""

    rate_factor: float = 1.0  # halved at each rollback
    rollbacks: int = 0
    skipped: int = 0  # steps in a row whose loss was not finite
    recent: list[float] = field(default_factory=list)  # supervised losses of the last steps
    best: float = math.inf  # the lowest mean of `recent` so far


@dataclass(eq=False)
class TrainState:
    """Everything that training changes."""

    specialist: nn.Module
    generalist: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    # Initial steps that are different. Their numbers stay when the run is extended.
    warmup_steps: int  # only the discriminator is trained; or, of a student, all steps without adversarial losses
    imitation_steps: int = 0  # of a student, which learns only the pixels of its teacher's SR
    step: int = 0  # steps done
    monitor: DivergenceMonitor = field(default_factory=DivergenceMonitor)
    judgements: list[dict[str, Any]] = field(default_factory=list)  # step, which weights, score, measured values


def save_checkpoint(path: Path, state: TrainState, settings: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Write `state`, the settings of the run and the checksums of its `inputs` to `path` atomically."""
    content = {
        "version": _VERSION,
        "step": state.step,
        "warmup_steps": state.warmup_steps,
        "imitation_steps": state.imitation_steps,
        "inputs": inputs,
        "guard": asdict(state.monitor),
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
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
    ):  # a file, because torch hides the OSError of a path
        torch.save(content, file)


def load_checkpoint(path: Path, state: TrainState, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Load the checkpoint `path`, a file of the first process, into the `state` of every process.

    Raises InputError if it can't be read or doesn't match the networks of this run.
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
        saved = content["settings"]  # a file without `warmup_steps` belongs to a run that was never extended
        state.warmup_steps = content.get("warmup_steps", round(saved["discriminator_warmup"] * saved["steps"]))
        state.imitation_steps = content.get("imitation_steps", round(saved.get("imitation", 0) * saved["steps"]))
        state.monitor = DivergenceMonitor(**content["guard"])
        state.judgements = content["judgements"] if "judgements" in content else _older_judgements(path, state.step)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} doesn't fit this run: {error}", "Start a new run under another --name.") from error


def checkpoint_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote `path`."""
    return dict(_read(path, path)["settings"])


def checkpoint_inputs(path: Path) -> dict[str, Any] | None:
    """The checksums of the inputs of the run that wrote `path`; None if the file is older than they are."""
    return _read(path, path).get("inputs")


def _older_judgements(checkpoint: Path, step: int) -> list[dict[str, Any]]:
    """The judgements up to `step` of a run of pdd 0.1, whose checkpoints don't contain them."""
    path = checkpoint.with_name("judgements.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [judged for judged in found if judged["step"] <= step]


def _read(path: Path, source: Path | io.BytesIO) -> dict[str, Any]:
    try:
        content = torch.load(source, "cpu", weights_only=True, mmap=source is path)
    except Exception as error:
        # torch.load raises UnpicklingError, RuntimeError, EOFError or others, depending on where the file is damaged.
        raise InputError(
            f"can't read the checkpoint {path}: {error}", "Start a new run under another --name."
        ) from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise InputError(f"{path} is not a checkpoint of this version of pdd", "Start a new run under another --name.")
    return content
