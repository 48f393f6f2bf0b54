"""Settings of `pdd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pdd_cli.gpus import is_pytorch_device
from pdd_cli.settings.base import (
    INFERENCE_DEVICES,
    ColorCorrection,
    Denoise,
    Device,
    Engine,
    Mix,
    Offline,
    Option,
    Precision,
    Settings,
    SnapFlats,
    Strength,
    Tta,
)

SWITCHES = ("strength", "denoise", "color_correction", "tta", "mix", "snap_flats")
"""The settings of `upscale` that determine the images of --weights."""

PAPER_METRICS = ("psnr", "ssim", "lpips", "dists", "niqe", "musiq")


class EvaluateConfig(Settings):
    """`pdd evaluate`."""

    sr_dir: Annotated[
        Path | None,
        Field(description="Image, video or folder to score."),
        Option("Input", argument=True, metavar="SR_DIR", default="the outputs of the last `pdd upscale`"),
    ] = None
    gt_dir: Annotated[
        Path | None,
        Field(description="Ground truth (HR originals): image, video or folder, paired by name."),
        Option("Input"),
    ] = None
    lr_dir: Annotated[
        Path | None,
        Field(description="LR inputs: image, video or folder. Adds downscale consistency and colour drift."),
        Option("Input"),
    ] = None
    baseline: Annotated[
        tuple[Path, ...],
        Field(description="Other SR images of the same inputs to compare with; repeatable."),
        Option("Comparison"),
    ] = ()
    fail_if_worse: Annotated[
        tuple[str, ...],
        Field(description="Exit code 6 when a baseline is clearly better by one of these metrics."),
        Option("Comparison", comma_separated=True),
    ] = ()
    dataset: Annotated[
        Literal["realsr", "drealsr", "ntire20", "dped", "videolq"] | None,
        Field(description="Use the LR and HR images of this published data set, in the folder --root."),
        Option("Input"),
    ] = None
    root: Annotated[
        Path | None,
        Field(description="Folder with the unpacked files of --dataset."),
        Option("Input"),
    ] = None
    weights: Annotated[
        tuple[str, ...],
        Field(
            description="Upscale the LR images (--lr-dir or --dataset) with each of these (NAME or NAME@STRENGTH) and "
            "score the results; the last one is compared with the others."
        ),
        Option("Model", flags=("--weights", "-n"), comma_separated=True),
    ] = ()
    upscaled_dir: Annotated[
        Path,
        Field(description="Folder for the images that --weights makes, with one subfolder per model."),
        Option("Model"),
    ] = Path("upscaled")
    strength: Strength = None
    denoise: Denoise = None
    color_correction: ColorCorrection = "none"
    tta: Tta = False
    mix: Mix = 0.0
    snap_flats: SnapFlats = False
    metrics: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="Metrics of pyiqa, for example niqe,psnr,lpips; list: show all; paper: "
            "psnr,ssim,lpips,dists,niqe,musiq with --crop-border 4.",
        ),
        Option("Metrics", comma_separated=True),
    ] = ("niqe",)
    crop_border: Annotated[
        Annotated[int, Field(ge=0)],
        Field(description="Pixels to ignore at each border."),
        Option("Metrics"),
    ] = 0
    luma: Annotated[
        Literal["full", "matlab"],
        Field(
            description="Luma range of psnry, ssim, ms_ssim, cw_ssim: full (0..255) or matlab (16..235, as in papers)."
        ),
        Option("Metrics"),
    ] = "full"
    output: Annotated[
        Path | None,
        Field(description="Write a report: a web page (.html), all scores (.csv, .json) or a table (.md, .tex)."),
        Option("Output", flags=("--output", "-o")),
    ] = None
    engine: Engine = "auto"
    device: Annotated[Device, Field(description=INFERENCE_DEVICES)] = "auto"
    precision: Precision = "auto"
    offline: Offline = False

    @model_validator(mode="before")
    @classmethod
    def _expand_paper(cls, values: Any) -> Any:
        """Replace the metric `paper` by those of papers on x4 models, which leave out 4 pixels at each border."""
        metrics = values.get("metrics") if isinstance(values, dict) else None
        if not isinstance(metrics, list | tuple) or "paper" not in metrics:
            return values
        expanded = [name for metric in metrics for name in (PAPER_METRICS if metric == "paper" else (metric,))]
        return {"crop_border": 4, **values, "metrics": tuple(dict.fromkeys(expanded))}

    @model_validator(mode="after")
    def _check_inputs(self) -> EvaluateConfig:
        if (self.dataset is None) != (self.root is None):
            raise ValueError("--dataset and --root DIR must be given together")
        if self.dataset is not None and (self.lr_dir is not None or self.gt_dir is not None):
            raise ValueError("--dataset already names LR and HR images: omit --lr-dir and --gt-dir")
        if self.weights and (self.sr_dir is not None or self.baseline):
            raise ValueError("--weights makes the images to score: omit SR_DIR and --baseline")
        if self.weights and self.dataset is None and self.lr_dir is None:
            raise ValueError("--weights needs images to upscale: add --lr-dir DIR, or --dataset NAME --root DIR")
        switches = ("engine", "precision", *SWITCHES)
        given = [name for name in switches if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.weights:
            raise ValueError(f"--{given[0].replace('_', '-')} applies to the images of --weights: add --weights NAME")
        if len(set(self.weights)) < len(self.weights):
            raise ValueError("--weights names the same weights twice")
        if self.fail_if_worse and not self.baseline and len(self.weights) < 2:
            raise ValueError("--fail-if-worse needs something to compare with: add --baseline DIR")
        return self

    @property
    def metric_device(self) -> str:
        """The `device`, or auto if only the engine of --weights can use it."""
        if self.weights and self.device != "cpu" and (self.engine == "onnx" or not is_pytorch_device(self.device)):
            return "auto"
        return self.device
