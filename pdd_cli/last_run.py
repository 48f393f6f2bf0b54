"""The record of the last `pdd upscale`; `pdd evaluate` without a folder scores its outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pdd_cli.files import write_text
from pdd_cli.weights.store import home


class UpscaledPair(BaseModel):
    """Absolute paths of an input and its output."""

    model_config = ConfigDict(frozen=True)

    lr: Path
    sr: Path


class LastRun(BaseModel):
    """One run of `pdd upscale`. `pairs` includes outputs that were skipped because they existed."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    input: Path
    output: Path
    weights: str
    scale: int
    time: str  # UTC, ISO 8601
    pairs: tuple[UpscaledPair, ...]


def read_last_run() -> LastRun | None:
    """The last run; None if there was none, or its record can't be read."""
    try:
        return LastRun.model_validate(json.loads(_path().read_bytes()))
    except (OSError, ValueError):  # ValueError: invalid JSON, or an invalid record
        return None


def save_last_run(run: LastRun) -> None:
    """Record `run` as the last one."""
    # json, because pydantic can't write file names that aren't UTF-8.
    write_text(_path(), json.dumps(run.model_dump(mode="json"), indent=2))


def _path() -> Path:
    return home() / "latest_upscale.json"
