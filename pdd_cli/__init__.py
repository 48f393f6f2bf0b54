"""pdd: adapt a super-resolution model to one real image domain, upscale with it, score it.

The functions below are the public Python interface (docs/api.md). They never print; a failure is a subclass of
`PddError`, whose `message` and `hint` are the words of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pdd_cli.errors import InputError, PddError
from pdd_cli.version import __version__

if TYPE_CHECKING:
    from pdd_cli.adaptation.publish import Published
    from pdd_cli.batch.model import Array, Model
    from pdd_cli.iqa.report import Report

__all__ = ["PddError", "__version__", "adapt", "evaluate", "fetch_weights", "load_model", "upscale"]


def load_model(weights: str | PathLike[str] = "realesrgan", *, settings: Mapping[str, Any] = {}) -> Model:
    """Load a super-resolution model, to upscale many arrays with it.

    Args:
        weights: A name of `pdd fetch-weights --list` or of adapted weights, or a weights file. A name that is not
            installed is fetched.
        settings: Settings of `pdd upscale` by name, such as `{"scale": 2, "device": "cpu", "offline": True}`.

    Returns:
        The model: `model.upscale(array)` upscales, `model.scale` and `model.architecture` describe it.

    Raises:
        InputError: the weights or a setting are not usable.
        DownloadError: the weights can't be fetched.
    """
    from pdd_cli.batch.model import open_model

    return open_model({**settings, "weights": str(weights)})


@overload
def upscale(
    source: Array, output: None = None, *, weights: str | PathLike[str] = ..., settings: Mapping[str, Any] = ...
) -> Array: ...
@overload
def upscale(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    weights: str | PathLike[str] = ...,
    settings: Mapping[str, Any] = ...,
) -> list[Path]: ...
def upscale(
    source: Array | str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str] | None = None,
    *,
    weights: str | PathLike[str] = "realesrgan",
    settings: Mapping[str, Any] = {},
) -> Array | list[Path]:
    """Upscale an array, or files as `pdd upscale` does.

    Args:
        source: A NumPy array (H, W) or (H, W, C) of uint8 (0 to 255) or uint16 (0 to 65535), where C is 1 (gray),
            2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha; straight). Or an image, video, folder or pattern, or several.
        output: For files: a folder, or the output of a single file. Outputs that are there already and up to date
            are skipped.
        weights: A name or a file, as for `load_model`.
        settings: Settings of `pdd upscale` by name, such as `{"scale": 2, "device": "cpu", "overwrite": True}`.

    Returns:
        For an array: the array (H', W') or (H', W', C) of the same type. For files: the paths of all outputs.

    Raises:
        InputError: an array of another shape or type, bad paths, weights or settings; nothing is written.
        DownloadError: the weights can't be fetched.
        ResourceError: out of memory or disk.
        PartialFailure: some files failed, each named in the message; the others are finished.
    """
    import numpy as np

    from pdd_cli.batch.model import upscale_files

    if isinstance(source, np.ndarray):
        return load_model(weights, settings=settings).upscale(source)
    sources = [source] if isinstance(source, str | PathLike) else source
    if output is None:
        raise InputError("files need an output", "Name a folder; for one input a file, too.")
    return upscale_files([Path(path) for path in sources], str(output), {**settings, "weights": str(weights)})


def adapt(
    real_dir: str | PathLike[str],
    *,
    base: str | PathLike[str] = "realesrgan",
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] = {},
) -> Published:
    """Adapt a model to real LR images as `pdd adapt` does.

    Args:
        real_dir: A folder of real LR images of one source.
        base: The weights to start from, a name or a file.
        name: Name of the run and of its weights; without it the folder's.
        resume: Continue the run of this name from its checkpoint; the settings must be the same.
        overwrite: Replace an earlier run and weights of this name.
        settings: Settings of `pdd adapt` by name, such as `{"steps": 300, "losses.intra": 0.5, "device": "cpu"}`.

    Returns:
        The result: `result.weights.name` is for `upscale(..., weights=NAME)`, `result.verdict` says whether the
        weights are better than their base, `result.report` is the page.

    Raises:
        InputError: images, weights or settings are not usable; nothing is written.
        DownloadError: weights can't be fetched.
        ResourceError: out of memory or disk.
        PartialFailure: training is finished, but a later step failed.
    """
    from pdd_cli.adaptation.loop import train
    from pdd_cli.adaptation.prepare import derived_name
    from pdd_cli.adaptation.publish import publish
    from pdd_cli.adaptation.run import start
    from pdd_cli.settings.adapt import AdaptConfig
    from pdd_cli.settings.resolve import checked
    from pdd_cli.weights.store import Store

    def ignore(text: str) -> None:
        pass

    given = {"real_dir": real_dir, "base": str(base), **({} if name is None else {"name": name})}
    config = checked(AdaptConfig, {**settings, **given})
    run_name = config.name or derived_name(config.real_dir, ignore)
    run = start(config, name=run_name, resume=resume, overwrite=overwrite)
    for _ in train(run, lambda: False):
        pass
    result = publish(run, Store.default(), ignore, ignore)
    if error := result.failure(run):
        raise error
    return result


def evaluate(
    sr: str | PathLike[str],
    *,
    gt: str | PathLike[str] | None = None,
    lr: str | PathLike[str] | None = None,
    baselines: Sequence[str | PathLike[str]] = (),
    metrics: Sequence[str] = ("niqe",),
    settings: Mapping[str, Any] = {},
) -> Report:
    """Score images as `pdd evaluate` does.

    Args:
        sr: An image or a folder of images.
        gt: Ground truth, an image or a folder; paired by name.
        lr: The LR inputs; adds downscale consistency and colour drift.
        baselines: Other SR images of the same inputs, to compare with.
        metrics: Names of pyiqa's metrics; `pdd evaluate --metrics list` shows them.
        settings: Settings of `pdd evaluate` by name, such as `{"crop_border": 4, "offline": True}`.

    Returns:
        The report: `report.main.images` has the scores of each image, `report.as_document()` all as plain values,
        and `report.problems` names the images and metrics without a score.

    Raises:
        InputError: bad paths or settings, or no metric can be computed from these images.
        DownloadError: a metric lacks its weights and they can't be fetched.
    """
    from pdd_cli.batch.evaluation import evaluate as run_evaluation
    from pdd_cli.settings.evaluate import EvaluateConfig
    from pdd_cli.settings.resolve import checked

    given = {"sr_dir": sr, "gt_dir": gt, "lr_dir": lr, "baseline": tuple(baselines), "metrics": tuple(metrics)}
    evaluation = run_evaluation(checked(EvaluateConfig, {**settings, **given}))
    if evaluation.not_loaded:
        evaluation.raise_for_failures()
    if evaluation.interrupted:
        raise KeyboardInterrupt
    return evaluation.report


def fetch_weights(name: str, *, offline: bool = False) -> Path:
    """Install weights, if they are not installed yet.

    Args:
        name: A name of `pdd fetch-weights --list`.
        offline: Never use the network.

    Returns:
        The weights file.

    Raises:
        InputError: an unknown name.
        DownloadError: no source has the weights, or their checksum is wrong; nothing is installed then.
    """
    from pdd_cli.weights.fetch import ensure
    from pdd_cli.weights.store import Store

    return ensure(name, store=Store.default(), offline=offline, on_event=lambda event: None)
