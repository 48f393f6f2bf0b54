"""The use case of `pdd upscale`: upscales all inputs of a run and writes manifest and log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from pdd_cli.batch.devices import output_pixels, partition, run_on_devices
from pdd_cli.batch.grouping import Group, group_jobs
from pdd_cli.batch.lists import checksums, failed_list, only_listed, read_list
from pdd_cli.batch.loading import LoadedUpscalers, Loader, fetch_all, load_upscalers
from pdd_cli.batch.plan import Plan, manifest_folder, plan_jobs
from pdd_cli.errors import InputError, Interrupted, PartialFailure, PddError, ResourceError
from pdd_cli.files import append_line, check_log, remove_leftovers
from pdd_cli.imaging.encode import Encoding
from pdd_cli.imaging.provenance import DEFAULTS
from pdd_cli.last_run import LastRun, UpscaledPair, save_last_run
from pdd_cli.observer import Observer
from pdd_cli.own_files import check_own_file, write_own_file
from pdd_cli.ranks import SINGLE_PROCESS, Ranks
from pdd_cli.settings.upscale import FormatChoice, UpscaleConfig
from pdd_cli.upscaling.archives import is_archive, preview_archives, run_archives
from pdd_cli.upscaling.jobs import Job, Output, Result, check_own, results_from_json, results_to_json
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.upscaling.pipeline import preview_jobs, run_jobs
from pdd_cli.upscaling.upscaler import Upscaler
from pdd_cli.version import __version__, versions
from pdd_cli.video.decode import is_video
from pdd_cli.video.encoders import check_encoder, default_encoder
from pdd_cli.video.frames import gives_frames
from pdd_cli.video.options import VideoOptions
from pdd_cli.video.pipeline import preview_videos, run_videos
from pdd_cli.weights.sources import file_sha256

# The settings that determine an output. Tiles, engine and precision make no visible difference.
_RECIPE = {"scale", "width", "height", "long_side", "fit", "color_correction", "quality", "lossless", "strip_metadata"}
# Those of videos, which are recorded if they are set, so that outputs of earlier versions stay current.
_VIDEO_RECIPE = {
    "start",
    "end",
    "crop",
    "preview",
    "encoder",
    "crf",
    "preset",
    "fps",
    "audio",
    "deinterlace",
    "temporal",
    "keep_audio",
}
# Those of later versions of pdd: at their defaults they are left out, so that earlier outputs stay current.
_LATER = {"tta", "mix", "snap_flats", "seamless", "normal_map"}


@dataclass(frozen=True)
class BatchResult:
    """The result of each job, with the settings, plan and models of the run.

    `seconds`: duration of the run without loading. `stopped`: the error, such as a full disk, that ended the run before
    all jobs were done. `recorded`: `pdd evaluate` without a folder will score this run.
    """

    settings: UpscaleConfig
    plan: Plan
    results: Sequence[Result]
    loaded: LoadedUpscalers
    seconds: float
    dry_run: bool = False
    stopped: ResourceError | None = None
    recorded: bool = False

    def count(self, status: str) -> int:
        """The number of jobs with this status: done, skipped, failed or planned."""
        return sum(result.status == status for result in self.results)

    @property
    def pixels(self) -> int:
        """The pixels of all outputs that were made, in all their frames."""
        return sum(
            math.prod(result.size_out) * max(result.frames, 1)
            for result in self.results
            if result.status == "done" and result.size_out
        )

    def raise_for_failures(self) -> None:
        """Raise ResourceError if the run was stopped, PartialFailure if some inputs failed."""
        if self.stopped is not None:
            raise self.stopped
        failed = self.count("failed")
        if failed:
            verb = "would fail" if self.dry_run else "failed"
            hint = "The others are done." if self.count("done") else ""
            raise PartialFailure(f"{failed} of {len(self.results)} files {verb}", hint)
        if self.plan.problems:
            first, *others = self.plan.problems
            more = f" (and {len(others)} more problems)" if others else ""
            raise PartialFailure(f"{first}{more}", "Everything else is done.")

    def as_document(self) -> dict[str, object]:
        """The result as `pdd upscale --json` prints it."""
        settings, upscalers = self.settings, self.loaded.upscalers
        engine = upscalers[0].engine
        return {
            "input": settings.input[0] if len(settings.input) == 1 else settings.input or settings.from_list,
            "output": settings.output,
            "weights": settings.weights,
            "architecture": engine.model.architecture,
            "scale": upscalers[0].scale,
            "strength": self.loaded.strength,
            "versions": versions("torch", "openvino", "numpy", "pillow", "av"),
            **({"to_fetch": self.loaded.to_fetch} if self.loaded.to_fetch else {}),
            "engine": engine.name,
            "device": ",".join(str(upscaler.engine.runtime.device_name) for upscaler in upscalers),
            "precision": engine.runtime.precision,
            **{status: self.count(status) for status in ("done", "skipped", "failed", "planned")},
            "seconds": round(sum(result.seconds for result in self.results), 3),
            "model_seconds": round(sum(result.model_seconds for result in self.results), 3),
            "other_kinds": dict(sorted(self.plan.others.items())),
            "earlier_outputs": self.plan.outputs,
            "problems": self.plan.problems,
            "files": [_file_document(result) for result in self.results],
        }


@dataclass(frozen=True)
class _Batch:
    """The jobs of this process with everything they need."""

    jobs: Sequence[Job]
    upscalers: Sequence[Upscaler]
    output: Output
    options: VideoOptions
    recipe: dict[str, object]
    manifest: Manifest | None
    format: FormatChoice

    @property
    def images(self) -> list[Job]:
        return [job for job in self.jobs if not is_clip(job) and not is_archive(job.source)]

    @property
    def archives(self) -> list[Job]:
        return [job for job in self.jobs if is_archive(job.source)]

    @property
    def videos(self) -> list[Job]:
        return [job for job in self.jobs if is_clip(job)]


def is_clip(job: Job) -> bool:
    """Whether a job is done frame by frame: its input or its output is a video."""
    return is_video(job.source) or is_video(job.target)


def run(
    settings: UpscaleConfig,
    *,
    jobs: Sequence[Job] | None = None,
    fixed: Collection[str] = (),
    dry_run: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    observer: Observer = Observer(),
    load: Loader = load_upscalers,
    on_result: Callable[[Result], None] = lambda result: None,
) -> BatchResult:
    """Upscale images and videos.

    Args:
        settings: The settings of `pdd upscale`.
        jobs: Inputs and outputs; by default they are found from the settings. If given, `settings.output` must be the
            folder of all outputs, and the run is not recorded as the last run.
        fixed: Names of settings that a pdd.yaml in a folder of the input doesn't change, because this call gave them.
        dry_run: Only estimate sizes, memory and time; nothing is written or fetched.
        ranks: The processes that share the jobs.
        observer: Receives messages and progress.
        load: Loads the weights.
        on_result: Called when a job of this process has ended.

    Returns:
        The result of each job of all processes. A failed job does not stop the others; `raise_for_failures` raises.

    Raises:
        InputError: bad paths or settings, before anything is written.
        DownloadError: the weights can't be fetched.
        Interrupted: Ctrl-C or SIGTERM; finished outputs are kept.
    """
    # Report wrong paths before a model is fetched and loaded.
    plan = Plan(jobs=list(jobs)) if jobs is not None else _plan(settings)
    folder = manifest_folder(settings.input, settings.output, plan.jobs, strip=settings.strip_metadata)
    if folder is None and not plan.jobs[0].target.is_dir():  # a folder of frames is checked when its job starts
        check_own(plan.jobs[0].target)
    if jobs is None:
        check_video_options(settings, plan.jobs)
    check_side_files(settings, plan)
    if settings.log is not None and not dry_run:
        check_log(settings.log)
    groups = [Group(settings, plan.jobs)] if jobs is not None else group_jobs(settings, plan.jobs, fixed, observer)
    if len(groups) > 1 and not dry_run:  # an unknown name is reported before anything is upscaled
        ranks.first_per_machine(partial(fetch_all, [group.settings for group in groups], observer))
    if ranks.is_first and not dry_run:
        # Remove the temporary files of killed runs before anything is written.
        remove_leftovers({job.target.parent for job in plan.jobs})
    results: list[Result] = []
    first: LoadedUpscalers | None = None
    seconds, stopped = 0.0, None
    for group in groups:
        with load(group.settings, ranks, observer, dry_run=dry_run) as loaded:
            first = first or loaded
            batch = _batch(group.settings, group.jobs, folder, loaded, ranks, dry_run=dry_run)
            started = time.perf_counter()
            if dry_run:
                found = [replace(result, weights=group.settings.weights) for result in _preview(batch)]
                if loaded.to_fetch and group.settings.weights in loaded.to_fetch:
                    # Tiles, memory and time depend on the model.
                    found = [replace(result, tiles=0, memory=0, seconds=0.0, model_seconds=0.0) for result in found]
            else:
                found, stopped = _run(batch, group.settings, observer, on_result)
            results += _gather_results(found, group.jobs, ranks)
            seconds += time.perf_counter() - started
        if len(groups) > 1 and any(ranks.gather("stopped" if stopped else "")):
            break
    assert first is not None
    order = {job: index for index, job in enumerate(plan.jobs)}
    results.sort(key=lambda result: order[result.job])
    outcome = BatchResult(settings, plan, results, first, seconds, dry_run, stopped)
    if ranks.is_first and not dry_run:
        try:
            if jobs is None and record_last_run(outcome):
                outcome = replace(outcome, recorded=True)
            if folder is not None and ranks.size > 1:
                Manifest(folder, {}).tidy()
        except PddError as error:  # the outputs are complete
            observer.warn(
                f"{error.message}. The outputs are complete, but this run is not recorded for `pdd evaluate`."
            )
        try:
            _write_lists(outcome)
        except PddError as error:
            plan.problems.append(f"{error.message}. The outputs are complete.")
    return outcome


def check_side_files(settings: UpscaleConfig, plan: Plan) -> None:
    """Raise InputError if a list of the run would replace an input, an output or another file."""
    outputs = {job.target.resolve() for job in plan.jobs}
    seen: dict[Path, str] = {}
    for option, path in (
        ("--log", settings.log),
        ("--failed-list", settings.failed_list),
        ("--checksums", settings.checksums),
    ):
        if path is None:
            continue
        real = path.resolve()
        if real in outputs:
            raise InputError(f"{option} {path} is also an output", "Choose another file.")
        if real in seen:
            raise InputError(f"{seen[real]} and {option} are the same file {path}", "Choose two files.")
        seen[real] = option
        if option != "--log":  # which is appended to
            check_own_file(path, option)


def _write_lists(outcome: BatchResult) -> None:
    """Write the lists that the settings name."""
    settings, results = outcome.settings, outcome.results
    if settings.failed_list is not None:
        write_own_file(settings.failed_list, failed_list(outcome.plan, results), "--failed-list")
    if settings.checksums is not None:
        targets = [result.job.target for result in results if result.status in ("done", "skipped")]
        write_own_file(settings.checksums, checksums(targets, settings.checksums), "--checksums")


def _plan(settings: UpscaleConfig) -> Plan:
    listed = None if settings.from_list is None else read_list(settings.from_list)
    plan = plan_jobs(
        settings.input or tuple(listed or ()),
        settings.output,
        listed=not settings.input,
        format=settings.format,
        suffix=settings.suffix,
        recursive=settings.recursive,
        stills=settings.preview is not None,
        as_frames=settings.fps is not None,
    )
    if settings.input and settings.from_list is not None and listed is not None:
        return only_listed(plan, listed, settings.from_list)
    return plan


def check_video_options(settings: UpscaleConfig, jobs: Sequence[Job]) -> None:
    """Raise InputError if an option of videos is given without a video, or the encoder can't be used."""
    given = sorted(name.replace("_", "-") for name in settings.model_dump(include=_VIDEO_RECIPE, exclude_defaults=True))
    videos = [job for job in jobs if is_clip(job)]
    if settings.audio is not None:
        if any(is_video(job.source) for job in videos):
            raise InputError("--audio is for folders of frames and animations; videos keep their own", "Leave it out.")
        if not settings.audio.is_file():
            raise InputError(f"--audio {settings.audio}: no such file")
    if settings.fps is not None and any(not job.source.is_dir() for job in jobs):
        raise InputError("--fps is for folders of frames; files have their own times", "Give a folder, or omit --fps.")
    if given and not videos:
        raise InputError(f"--{given[0]} is for videos; there is none among the inputs", "Leave it out.")
    for option, needing in (
        ("preview", jobs if settings.preview is not None else ()),
        ("deinterlace", videos if settings.deinterlace else ()),
    ):
        if other := next((job.source for job in needing if not is_video(job.source)), None):
            raise InputError(
                f"--{option} is for videos; {other} is not a video", "Leave it out, or give only the video."
            )
    suffixes = sorted({job.target.suffix.lower() for job in videos})
    encoding = [name for name in ("encoder", "crf", "preset") if getattr(settings, name) is not None]
    if encoding and settings.preview is None and any(gives_frames(job) for job in videos):
        raise InputError(f"--{encoding[0]} is for videos, and --format {settings.format} makes images", "Leave it out.")
    if encoding and settings.preview is None:
        for suffix in suffixes:
            encoder = settings.encoder or default_encoder(suffix, deep=False)
            check_encoder(encoder, settings.quality, settings.crf, settings.preset, suffix)


def _batch(
    settings: UpscaleConfig,
    jobs: Sequence[Job],
    folder: Path | None,
    loaded: LoadedUpscalers,
    ranks: Ranks,
    *,
    dry_run: bool,
) -> _Batch:
    """The part of the jobs for this process."""
    recipe = settings.model_dump(include=_RECIPE)
    recipe |= settings.model_dump(include=_VIDEO_RECIPE | _LATER, exclude_defaults=True)
    recipe["weights"] = loaded.upscalers[0].engine.weights_sha256
    if settings.audio is not None:
        recipe["audio"] = file_sha256(settings.audio)
    manifest = None
    if folder is not None:
        if ranks.is_first and not dry_run:
            Manifest(folder, recipe).tidy()
        ranks.barrier()
        part = ranks.rank if ranks.size > 1 else None
        manifest = Manifest(folder, recipe, provenance=loaded.provenance, part=part)
    # No process starts before all have found the inputs and read the manifest.
    ranks.barrier()
    output = Output(
        Encoding(settings.quality, settings.lossless),
        overwrite=settings.overwrite,
        strip=settings.strip_metadata,
        provenance=replace(loaded.provenance, options=_options(settings, recipe, loaded.strength)),
    )
    options = VideoOptions.of(settings)
    return _Batch(partition(jobs, ranks), loaded.upscalers, output, options, recipe, manifest, settings.format)


def _options(settings: UpscaleConfig, recipe: Mapping[str, object], strength: float) -> str:
    """The settings that determine an output besides its input and the weights, as options on the command line."""
    values = settings.model_dump(include=_RECIPE | _VIDEO_RECIPE | _LATER | {"denoise"}, exclude_defaults=True)
    if settings.audio is not None:
        values["audio"] = f"sha256:{str(recipe['audio'])[:8]}"
    if strength != 1:
        values["strength"] = strength
    given = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    texts = [name if value is True else f"{name} {value}".removesuffix(".0") for name, value in given]
    return " ".join(sorted(texts)) or DEFAULTS


def _preview(batch: _Batch) -> list[Result]:
    upscaler = batch.upscalers[0]
    return [
        *preview_jobs(batch.images, upscaler, output=batch.output, manifest=batch.manifest),
        *preview_archives(batch.archives, upscaler, format=batch.format, output=batch.output, manifest=batch.manifest),
        *preview_videos(
            batch.videos,
            upscaler,
            recipe=batch.recipe,
            options=batch.options,
            output=batch.output,
            manifest=batch.manifest,
        ),
    ]


def _run(
    batch: _Batch, settings: UpscaleConfig, observer: Observer, on_result: Callable[[Result], None]
) -> tuple[list[Result], ResourceError | None]:
    """Run the jobs. Returns the results, and the error that ended the run before all jobs were done."""
    log = settings.log
    results: list[Result] = []
    sizes: dict[Job, int] = {}
    parts = (settings.start, settings.end, settings.crop, settings.preview)
    if observer.shows_progress and parts == (None,) * 4:  # the header doesn't tell the size of a part
        sizes = {job: output_pixels(job, batch.upscalers[0]) for job in batch.jobs}
    workers, pixels = len(batch.upscalers), sum(sizes.values())
    started: set[Job] = set()
    with observer.progress("files", len(batch.jobs), workers=workers, pixels=pixels) as progress:

        def on_start(device: int, job: Job) -> None:
            started.add(job)
            unit = "frames" if is_clip(job) else "tiles"
            progress.start(device, job.source.name, unit, sizes.get(job, 0))

        try:
            # Its threads end before the engines are closed.
            with closing(_results(batch, on_start, progress.step)) as ended:
                for result in (replace(one, weights=settings.weights) for one in ended):
                    results.append(result)
                    if log is not None:
                        try:
                            check_log(log)
                            append_line(log, _log_line(result))
                        except PddError as error:
                            observer.warn(f"{error.message}. The log ends here; the batch continues.")
                            log = None
                    progress.advance(not_computed=0 if result.job in started else sizes.get(result.job, 0))
                    if result.status == "failed":
                        observer.warn(f"{result.job.source}: failed; the batch continues")
                    if result.traceback:
                        observer.debug(result.traceback)
                    on_result(result)
        except KeyboardInterrupt:
            finished = sum(job.target.exists() for job in batch.jobs)
            raise Interrupted(
                f"interrupted: {finished} of {len(batch.jobs)} outputs are complete",
                "" if batch.output.overwrite else "Run the same command again to make the missing outputs.",
            ) from None
        except ResourceError as error:
            error.hint += " Run the same command again to make the missing outputs."
            return results, error
    return results, None


def _results(
    batch: _Batch, on_start: Callable[[int, Job], None], on_tile: Callable[[int, int, int], None]
) -> Generator[Result]:
    """Yield the result of each job as it ends, images first."""
    run_images = partial(run_jobs, output=batch.output, manifest=batch.manifest)
    run_packed = partial(
        run_archives, recipe=batch.recipe, format=batch.format, output=batch.output, manifest=batch.manifest
    )
    run_clips = partial(
        run_videos, recipe=batch.recipe, options=batch.options, output=batch.output, manifest=batch.manifest
    )
    for runner, jobs in ((run_images, batch.images), (run_packed, batch.archives), (run_clips, batch.videos)):
        yield from run_on_devices(runner, jobs, batch.upscalers, on_start=on_start, on_tile=on_tile)


def _gather_results(results: Sequence[Result], jobs: Sequence[Job], ranks: Ranks) -> list[Result]:
    """The results of all processes in the order of the jobs."""
    gathered = [result for text in ranks.gather(results_to_json(results)) for result in results_from_json(text)]
    order = {job: index for index, job in enumerate(jobs)}
    return sorted(gathered, key=lambda result: order[result.job])


def _log_line(result: Result) -> str:
    values = {"time": _now(), "pdd": __version__, **_file_document(result), "reason": result.problem}
    return json.dumps(
        {key: value for key, value in values.items() if key != "problem"}, ensure_ascii=False, default=str
    )


def _file_document(result: Result) -> dict[str, object]:
    return {
        "input": result.job.source,
        "output": result.job.target,
        "weights": result.weights,
        "status": result.status,
        "problem": result.problem,
        "left_out": result.left_out,
        "size_in": result.size_in,
        "size_out": result.size_out,
        "tiles": result.tiles,
        "seconds": round(result.seconds, 3),
        "model_seconds": round(result.model_seconds, 3),
        **({"memory": result.memory} if result.memory else {}),
        **({"frames": result.frames} if result.frames else {}),
    }


def record_last_run(outcome: BatchResult) -> bool:
    """Record the run for `pdd evaluate` without a folder. Returns False if it has no images."""
    settings = outcome.settings
    pairs = tuple(
        UpscaledPair(lr=result.job.source.absolute(), sr=result.job.target.absolute())
        for result in outcome.results
        if result.status in ("done", "skipped") and not is_clip(result.job) and not is_archive(result.job.source)
    )
    if pairs:
        save_last_run(
            LastRun(
                input=(settings.input or (outcome.plan.jobs[0].source.parent,))[0].absolute(),
                output=Path(settings.output).absolute(),
                weights=settings.weights,
                scale=outcome.loaded.upscalers[0].scale,
                time=_now(),
                pairs=pairs,
            )
        )
    return bool(pairs)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
