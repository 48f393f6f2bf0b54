"""Settings of `pdd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pdd_cli.settings.base import Device, Offline, Settings


class EvaluateConfig(Settings):
    """`pdd evaluate`."""

    sr_dir: Path | None = None
    gt_dir: Path | None = None
    lr_dir: Path | None = None
    baseline: tuple[Path, ...] = ()
    fail_if_worse: tuple[str, ...] = ()
    dataset: Literal["realsr", "drealsr", "ntire20", "dped", "videolq"] | None = None
    root: Path | None = None
    weights: tuple[str, ...] = ()
    upscaled_dir: Path = Path("upscaled")
    metrics: tuple[str, ...] = Field(default=("niqe",), min_length=1)
    crop_border: Annotated[int, Field(ge=0)] = 0
    luma: Literal["full", "matlab"] = "full"
    output: Path | None = None
    device: Device = "auto"
    offline: Offline = False

    @model_validator(mode="after")
    def _what_is_scored_is_clear(self) -> EvaluateConfig:
        if (self.dataset is None) != (self.root is None):
            raise ValueError("--dataset and --root DIR belong together")
        if self.dataset is not None and (self.lr_dir is not None or self.gt_dir is not None):
            raise ValueError("--dataset knows its LR and HR images: leave --lr-dir and --gt-dir out")
        if self.weights and (self.sr_dir is not None or self.baseline):
            raise ValueError("--weights makes the images to score: leave SR_DIR and --baseline out")
        if self.weights and self.dataset is None and self.lr_dir is None:
            raise ValueError("--weights needs images to upscale: add --lr-dir DIR, or --dataset NAME --root DIR")
        if len(set(self.weights)) < len(self.weights):
            raise ValueError("--weights names the same weights twice")
        if self.fail_if_worse and not self.baseline and len(self.weights) < 2:
            raise ValueError("--fail-if-worse needs something to compare with: add --baseline DIR")
        return self
