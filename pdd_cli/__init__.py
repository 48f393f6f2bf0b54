"""pdd: adapt a super-resolution model to one real image domain, upscale with it, score it.

The functions below are the public Python interface (docs/api.md). They never print. Every failure is a subclass of
`PddError`; its `message` and `hint` are the text that the command line prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pdd_cli.errors import InputError, Interrupted, PddError
from pdd_cli.observer import Observer, Progress
from pdd_cli.version import __version__

if TYPE_CHECKING:
    from pdd_cli.adaptation.publish import PublishResult
    from pdd_cli.batch.comparison import Comparison
    from pdd_cli.batch.model import Array, Model
    from pdd_cli.iqa.report import Report
    from pdd_cli.weights.store import Entry

__all__ = [
    "Observer", "PddError", "Progress", "__version__", "adapt", "compare", "evaluate", "fetch_weights",
    "installed_weights", "load_model", "upscale",
]  # fmt: skip


def load_model(weights: str | PathLike[str] = "realesrgan", *, settings: Mapping[str, Any] = {}) -> Model:
    """Load a super-resolution model, to upscale many arrays with it.

    Args:
        weights: A name listed by `pdd fetch-weights --list`, the name of adapted weights, or a weights file. Weights
            that are not installed are downloaded.
        settings: Settings of `pdd upscale` by name, such as `{"scale": 2, "device": "cpu", "offline": True}`.

    Returns:
        The model. `model.upscale(array)` upscales an array; `model.scale` and `model.architecture` describe the model.
        `model.close()`, or a `with` statement, frees its memory and threads.

    Raises:
        InputError: the weights or a setting can't be used.
        DownloadError: the weights can't be downloaded.
    """
    from pdd_cli.batch.model import open_model

    return open_model({**settings, "weights": str(weights)})


@overload
def upscale(
    source: Array,
    output: None = None,
    *,
    weights: str | PathLike[str] = ...,
    settings: Mapping[str, Any] = ...,
    observer: Observer = ...,
) -> Array: ...
@overload
def upscale(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    weights: str | PathLike[str] = ...,
    settings: Mapping[str, Any] = ...,
    observer: Observer = ...,
) -> list[Path]: ...
def upscale(
    source: Array | str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str] | None = None,
    *,
    weights: str | PathLike[str] = "realesrgan",
    settings: Mapping[str, Any] = {},
    observer: Observer = Observer(),
) -> Array | list[Path]:
    """Upscale an array, or upscale files as `pdd upscale` does.

    Args:
        source: A NumPy array (H, W) or (H, W, C) of uint8 (0 to 255) or uint16 (0 to 65535), where C is 1 (gray),
            2 (gray, alpha), 3 (RGB) or 4 (RGB and straight, not premultiplied, alpha). Or the path of an image, video
            or folder, or a pattern, or a sequence of these.
        output: Required for files: a folder, or the output file of a single input. Outputs that exist and are up to
            date are skipped.
        weights: A name or a file, as for `load_model`.
        settings: Settings of `pdd upscale` by name, such as `{"scale": 2, "device": "cpu", "overwrite": True}`.
        observer: Receives the messages and the progress of files.

    Returns:
        For an array: an array (H', W') or (H', W', C) of the same type. For files: the paths of all outputs.

    Raises:
        InputError: the array's shape or type, a path, the weights or a setting can't be used; nothing is written.
        DownloadError: the weights can't be downloaded.
        ResourceError: out of memory or disk space.
        PartialFailure: some files failed; the message names each. The other files are finished.
    """
    import numpy as np

    from pdd_cli.batch.model import upscale_files

    if isinstance(source, np.ndarray):
        with load_model(weights, settings=settings) as model:
            return model.upscale(source)
    sources = [source] if isinstance(source, str | PathLike) else source
    if output is None:
        raise InputError("files need an output", "Give a folder, or a file name for a single input.")
    values = {**settings, "weights": str(weights)}
    return upscale_files([Path(path) for path in sources], str(output), values, observer)


def compare(
    source: str | PathLike[str],
    versions: Sequence[str],
    output: str | PathLike[str] = "compare.html",
    *,
    crop: str | None = None,
    settings: Mapping[str, Any] = {},
) -> Comparison:
    """Show a part of one image by several versions on a page, as `pdd upscale --compare` does.

    Args:
        source: The image.
        versions: Weights (a name or a file), each also with "@STRENGTH"; "bicubic", "lanczos" or "nearest".
        output: The page. A contact sheet (.png) is written beside it.
        crop: The part, "WxH+X+Y" in pixels of the image. Default: where the versions differ most.
        settings: Settings of `pdd upscale` by name, such as `{"scale": 2, "device": "cpu"}`.

    Returns:
        The comparison. `versions` holds the pixels and the seconds of each version, `crop` the part.

    Raises:
        InputError: a version, the image, the crop or a path can't be used; nothing is written.
        DownloadError: weights can't be downloaded.
    """
    from pdd_cli.batch.comparison import compare_versions
    from pdd_cli.settings.resolve import settings_from
    from pdd_cli.settings.upscale import UpscaleConfig

    config = settings_from(UpscaleConfig, {**settings, "input": (source,), "output": str(output)})
    return compare_versions(config, tuple(versions), page=Path(output), crop=crop)


def adapt(
    real_dir: str | PathLike[str] | None = None,
    *,
    base: str | PathLike[str] = "realesrgan",
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] = {},
    observer: Observer = Observer(),
) -> PublishResult:
    """Adapt a model to real LR images as `pdd adapt` does.

    Args:
        real_dir: A folder of real LR images from one source. It may be missing if the settings name aligned pairs,
            `{"pairs_lr": "lr", "pairs_hr": "hr"}`.
        base: The weights to start from, a name or a file.
        name: Name of the run and of its weights. Default: the name of that folder.
        resume: Continue the run of this name from its checkpoint. The settings must be the same.
        overwrite: Replace an earlier run and weights of this name.
        settings: Settings of `pdd adapt` by name, such as `{"steps": 300, "losses.intra": 0.5, "device": "cpu"}`.
        observer: Receives the messages and the progress in steps, and may request a stop.

    Returns:
        The result. Pass `result.weights.name` to `upscale(..., weights=NAME)`. `result.verdict` says whether the
        adapted weights are better than their base; `result.report` is the path of the report.

    Raises:
        InputError: images, weights or settings can't be used; nothing is written.
        DownloadError: weights can't be downloaded.
        ResourceError: out of memory or disk space.
        PartialFailure: training is finished, but a later step failed.
        Interrupted: `observer.stop_requested()` was true; the state is saved, and `resume=True` continues.
    """
    from pdd_cli.adaptation.loop import train
    from pdd_cli.adaptation.prepare import default_name
    from pdd_cli.adaptation.publish import publish
    from pdd_cli.adaptation.run import start
    from pdd_cli.settings.adapt import AdaptConfig
    from pdd_cli.settings.resolve import settings_from
    from pdd_cli.weights.store import Store

    given = {"real_dir": real_dir, "base": str(base), "name": name}
    arguments = {key: value for key, value in given.items() if value is not None}
    config = settings_from(AdaptConfig, {**settings, **arguments})
    run_name = config.name or default_name(config.lr_dir, observer.say)
    run = start(config, name=run_name, resume=resume, overwrite=overwrite, observer=observer)
    with observer.progress("steps", run.config.steps) as progress:
        progress.step(0, run.state.step, run.config.steps)
        for report in train(run, observer.stop_requested):
            progress.step(0, report.step, run.config.steps)
            if report.event:
                observer.warn(report.event)
    if not run.finished:
        raise Interrupted(
            f"stopped after step {run.state.step} of {run.config.steps}; the state is saved in {run.folder.checkpoint}",
            f"To continue: {run.resume_command}",
        )
    result = publish(run, Store.default(), observer)
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
        gt: Ground truth, an image or a folder. Images are paired by name.
        lr: The LR inputs. They add downscale consistency and colour drift.
        baselines: Other SR images of the same inputs, for comparison.
        metrics: Names of pyiqa metrics; `pdd evaluate --metrics list` prints them.
        settings: Settings of `pdd evaluate` by name, such as `{"crop_border": 4, "offline": True}`.

    Returns:
        The report. `report.main.images` holds the scores of each image, `report.as_document()` returns everything as
        plain values, and `report.problems` names the images and metrics without a score.

    Raises:
        InputError: a path or a setting can't be used, or no metric can be computed from these images.
        DownloadError: the weights of a metric are missing and can't be downloaded.
    """
    from pdd_cli.batch.evaluation import evaluate as run_evaluation
    from pdd_cli.settings.evaluate import EvaluateConfig
    from pdd_cli.settings.resolve import settings_from

    arguments = {"sr_dir": sr, "gt_dir": gt, "lr_dir": lr, "baseline": tuple(baselines), "metrics": tuple(metrics)}
    evaluation = run_evaluation(settings_from(EvaluateConfig, {**settings, **arguments}))
    if evaluation.not_loaded:
        evaluation.raise_for_failures()
    if evaluation.interrupted:
        raise KeyboardInterrupt
    return evaluation.report


def fetch_weights(name: str, *, offline: bool = False) -> Path:
    """Install weights, or an image set for the setting `hr_dir` of `adapt`, unless they are already installed.

    Args:
        name: A name listed by `pdd fetch-weights --list`.
        offline: Never use the network.

    Returns:
        The weights file, or the folder of the image set.

    Raises:
        InputError: the name is unknown.
        DownloadError: no source has the weights, or the checksum is wrong. Nothing is installed.
    """
    from pdd_cli.weights.fetch import ensure
    from pdd_cli.weights.fetch_images import install_set
    from pdd_cli.weights.image_sets import find_set
    from pdd_cli.weights.store import Store

    store, image_set = Store.default(), find_set(name)
    if image_set is not None and store.get(name) is None:
        return install_set(image_set, store=store, offline=offline).folder
    return ensure(name, store=store, offline=offline, on_event=lambda event: None)


def installed_weights() -> list[Entry]:
    """The installed super-resolution models, adapted ones first.

    Returns:
        Entries with `name`, `path` and `card`, which describes the model and its origin.
    """
    from pdd_cli.weights.store import Store

    models = [entry for entry in Store.default().entries() if entry.card.kind == "sr"]
    return sorted(models, key=lambda entry: (entry.card.adapted is None, entry.name))
