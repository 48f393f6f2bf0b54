"""The use case of `pdd evaluate`: scores images, or upscales with weights and scores the results."""

from __future__ import annotations

import functools
import platform
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from pdd_cli.batch.loading import check_denoise
from pdd_cli.batch.plan import check_collisions
from pdd_cli.batch.run import run
from pdd_cli.batch.video_frames import with_frames
from pdd_cli.engines.devices import choose_inference
from pdd_cli.errors import InputError
from pdd_cli.iqa.datasets import Dataset, find_dataset
from pdd_cli.iqa.inputs import Inputs, folders_as_dataset, gather, upscaled_sets
from pdd_cli.iqa.metrics import metric_infos
from pdd_cli.iqa.report import Origin, ScoredSet
from pdd_cli.iqa.run import Evaluation, score_inputs
from pdd_cli.observer import Observer
from pdd_cli.reporting.evaluation import check_format
from pdd_cli.runtime import choose_runtime
from pdd_cli.settings.evaluate import SWITCHES, EvaluateConfig
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.system import cpu_name, usable_cpus
from pdd_cli.upscaling.jobs import Job
from pdd_cli.upscaling.manifest import NAME, Manifest
from pdd_cli.upscaling.strength import split_strength
from pdd_cli.version import versions
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.states import HUB_PREFIX, is_file_reference
from pdd_cli.weights.store import Store


def evaluate(settings: EvaluateConfig, observer: Observer = Observer(), *, command: str = "") -> Evaluation:
    """Score the images that `settings` name, or those that its weights make from the LR images.

    `command`: the command line, for the report.

    Raises InputError for bad paths and settings, before anything is upscaled or fetched; DownloadError if weights, or
    the files of all metrics, can't be fetched. Images that can't be scored are in the report's `problems`.
    """
    if settings.output is not None:
        check_format(settings.output)
    metric_infos(settings.metrics)
    settings, videos = with_frames(settings, observer.say)
    runtime = choose_runtime(settings.metric_device)
    if settings.weights:
        choose_inference(settings.engine, settings.device, settings.precision)
        inputs = _upscale_sets(settings, observer)
    else:
        inputs = gather(
            settings.sr_dir,
            gt=settings.gt_dir,
            lr=settings.lr_dir,
            baselines=settings.baseline,
            dataset=_dataset(settings),
        )
    evaluation = score_inputs(settings, inputs, observer)
    origin = Origin(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=f"{cpu_name()}, {usable_cpus()} cores, {platform.platform()}; metrics on {runtime.device_name}",
        versions=versions("torch", "torchvision", "pyiqa", "numpy", "pillow"),
        weights={one.name: _weights_of(one) for one in evaluation.report.sets},
    )
    return replace(evaluation, report=replace(evaluation.report, origin=origin, videos=videos))


def _weights_of(scored: ScoredSet) -> list[str]:
    """Name and SHA-256 of the weights that made these images, as far as manifests record them."""

    @functools.cache
    def manifest(folder: Path) -> Manifest | None:
        return Manifest(folder, {}) if (folder / NAME).is_file() else None

    found: dict[str, None] = {}
    for scores in scored.images.values():
        image = scores.item.image
        nearest = next((known for parent in image.parents if (known := manifest(parent))), None)
        if nearest is not None and (weights := nearest.weights_of(image)):
            found[weights] = None
    return list(found)


def _dataset(settings: EvaluateConfig) -> Dataset | None:
    if settings.dataset is None or settings.root is None:
        return None
    return find_dataset(settings.dataset, settings.root)


def _upscale_sets(settings: EvaluateConfig, observer: Observer) -> Inputs:
    """Upscale the LR images with each of --weights. The last weights are the main set, the others its baselines."""
    dataset = _dataset(settings) or folders_as_dataset(settings.lr_dir or Path(), settings.gt_dir)
    planned = _plan_jobs(settings, dataset)
    for upscaling, _ in planned.values():
        check_denoise(upscaling)
    with observer.fetching() as on_event:
        find = partial(ensure, store=Store.default(), offline=settings.offline, on_event=on_event)
        for upscaling, _ in planned.values():
            find(upscaling.weights)
    outputs: dict[str, dict[Path, Path]] = {}
    problems = list(dataset.problems)
    for name, (upscaling, jobs) in planned.items():
        outcome = run(upscaling, jobs=jobs, observer=observer)
        if outcome.stopped is not None:
            raise outcome.stopped
        problems += [f"{name}: {result.problem}" for result in outcome.results if result.status == "failed"]
        done = {result.job.source: result.job.target for result in outcome.results if result.status == "done"}
        outputs[name] = done
        observer.say(f"{len(done)} of {len(jobs)} images upscaled with {name} to {settings.upscaled_dir / name}")
        if not done:
            raise InputError("none of the LR images could be upscaled:\n" + "\n".join(problems))
    *others, main = upscaled_sets(dataset, outputs)
    return Inputs((main, *others), problems=tuple(problems))


def _plan_jobs(settings: EvaluateConfig, dataset: Dataset) -> dict[str, tuple[UpscaleConfig, list[Job]]]:
    """The settings and jobs for each of --weights, with a folder for each.

    Raises InputError if they would replace images.
    """
    planned: dict[str, tuple[UpscaleConfig, list[Job]]] = {}
    for given in settings.weights:
        weights, strength = split_strength(given)
        strength = settings.strength if strength is None else strength
        name = Path(weights).stem if is_file_reference(weights) else weights
        if weights.startswith(HUB_PREFIX):
            name = re.sub(r"[/@]", "-", weights.removeprefix(HUB_PREFIX))
        if strength is not None:
            name += f"@{strength:g}"
        if name in planned:
            raise InputError(
                f"--weights {','.join(settings.weights)}: two files are named {name}", "Rename one of the files."
            )
        folder = settings.upscaled_dir / name
        jobs = [Job(lr, folder / png) for lr, png in _png_names(dataset).items()]
        upscaling = UpscaleConfig(
            input=tuple(job.source for job in jobs),
            output=str(folder),
            weights=weights,
            engine=settings.engine,
            device=settings.device,
            precision=settings.precision,
            offline=settings.offline,
            overwrite=True,  # existing images may come from earlier weights of the same name
            **{**settings.model_dump(include=set(SWITCHES)), "strength": strength},
        )
        planned[name] = upscaling, jobs
    check_collisions(
        [job for _, jobs in planned.values() for job in jobs], dataset.hr.values(), "Choose another --upscaled-dir."
    )
    return planned


def _png_names(dataset: Dataset) -> dict[Path, str]:
    """The names of the outputs. They are PNG, so that the scores are those of the unchanged output of the model."""
    plain = {lr: str(Path(name).with_suffix(".png")) for lr, name in dataset.name_of.items()}
    counts = Counter(plain.values())
    return {lr: name if counts[name] == 1 else f"{dataset.name_of[lr]}.png" for lr, name in plain.items()}
