"""What the latest `pdd upscale` made, so that `pdd evaluate` without a folder can score it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pdd_cli.files import write_text
from pdd_cli.weights.store import home


class UpscaledPair(BaseModel):
    """One input and its output, absolute."""

    model_config = ConfigDict(frozen=True)

    lr: Path
    sr: Path


class LatestUpscale(BaseModel):
    """One run of `pdd upscale`; `pairs` holds the outputs that were there already, too."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    input: Path
    output: Path
    weights: str
    scale: int
    time: str  # UTC, ISO 8601
    pairs: tuple[UpscaledPair, ...]


def latest_upscale() -> LatestUpscale | None:
    """The latest run; None where there was none, or its record can't be read."""
    try:
        return LatestUpscale.model_validate(json.loads(_path().read_bytes()))
    except (OSError, ValueError):  # of JSON and of pydantic
        return None


def remember_upscale(run: LatestUpscale) -> None:
    """Make `run` the latest one."""
    # Not by pydantic, whose JSON has no names that aren't UTF-8.
    write_text(_path(), json.dumps(run.model_dump(mode="json"), indent=2))


def _path() -> Path:
    return home() / "latest_upscale.json"
