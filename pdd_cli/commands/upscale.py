"""`pdd upscale`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError, Interrupted, PartialFailure, PddError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pdd_cli.batch.plan import Plan
    from pdd_cli.config import UpscaleConfig
    from pdd_cli.distributed import World
    from pdd_cli.imaging.provenance import Provenance
    from pdd_cli.meeting import Meeting
    from pdd_cli.models.loading import SRModel
    from pdd_cli.upscaling.jobs import Job, Output, Result
    from pdd_cli.upscaling.manifest import Manifest
    from pdd_cli.upscaling.upscaler import Upscaler


def upscale(
    input: Annotated[
        list[Path],
        typer.Argument(
            help="Images, videos, folders of them, or patterns in quotes ('in/**/*.png').", show_default=False
        ),
    ],
    output: Annotated[
        str, typer.Argument(help="Folder for the outputs; for one input a file, too.", show_default=False)
    ],
    weights: Annotated[str | None, typer.Option(help="NAME or FILE of the model. [default: realesrgan]")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Output size as a multiple of the input's. [default: the model's]")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Output width in pixels; the aspect is kept.")] = None,
    height: Annotated[int | None, typer.Option(help="Output height in pixels; the aspect is kept.")] = None,
    long_side: Annotated[int | None, typer.Option(help="Longer side of the output in pixels.")] = None,
    fit: Annotated[str | None, typer.Option(help="WxH: the largest output inside this box.", metavar="WxH")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Of adapted weights: 0 is their base, 1 the adapted. [default: as pdd adapt says]"),
    ] = None,
    color_correction: Annotated[
        Literal["none", "mean-std", "low-frequency"] | None,
        typer.Option(help="Give the output the input's colours. [default: none]"),
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="Longest side of a tile in LR pixels; 0: the whole image; auto: by memory. [default: auto]"),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="LR pixels around a tile that the model sees, too. [default: 64]")
    ] = None,
    format: Annotated[
        Literal["keep", "png", "jpg", "webp", "tiff", "bmp", "avif", "heic", "jxl", "mp4", "mov", "mkv", "webm"] | None,
        typer.Option(help="Format of the outputs: images or videos. [default: keep, the input's]"),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of lossy formats, 1 to 100. [default: 95]")] = None,
    lossless: Annotated[
        bool | None, typer.Option("--lossless", help="Refuse lossy formats; WebP, JPEG XL and .mkv lossless.")
    ] = None,
    strip_metadata: Annotated[
        bool | None,
        typer.Option("--strip-metadata", help="Keep no EXIF, XMP, text, dpi or tags; only the colour profile."),
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Text to put behind each output's name. [default: none]")] = None,
    recursive: Annotated[
        bool | None, typer.Option("--recursive/--no-recursive", help="Go into subfolders. [default: recursive]")
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--skip-existing", help="Make pdd's own outputs again. [default: skip]"),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Add a line of JSON to this file for each input as it ends.", metavar="FILE")
    ] = None,
    engine: Annotated[
        Literal["auto", "torch", "openvino", "winograd"] | None,
        typer.Option(help="What computes; auto: the fastest that agrees with PyTorch. [default: auto]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps; several: cuda:0,cuda:1. [default: auto]")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(help="[default: auto: what is fastest here]")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory that the process takes, as 800M or 2G. [default: what is free]")
    ] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an `upscale:` section. [default: ./pdd.yaml]")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Upscale images and videos, single files or folders of them.

    PNG, JPEG, WebP, TIFF, BMP, AVIF, HEIC, JPEG XL; MP4, MOV, MKV, WebM and others.

    The same command again makes what is missing, and what has changed: inputs, weights, settings. A file that can't
    be read is reported at the end; the others are done (exit code 3).
    """
    from pdd_cli.config import UpscaleConfig, resolve
    from pdd_cli.distributed import World
    from pdd_cli.meeting import Meeting

    world = World.from_environment()
    console = Console(json=json)
    settings = resolve(
        UpscaleConfig,
        "upscale",
        options={
            "input": tuple(input),
            "output": output,
            "weights": weights,
            "tile": int(tile) if tile is not None and tile.isdecimal() else tile,
            "overlap": overlap,
            "scale": scale,
            "width": width,
            "height": height,
            "long_side": long_side,
            "fit": fit,
            "strength": strength,
            "color_correction": color_correction,
            "format": format,
            "quality": quality,
            "lossless": lossless,
            "strip_metadata": strip_metadata,
            "suffix": suffix,
            "recursive": recursive,
            "overwrite": overwrite,
            "log": log,
            "engine": engine,
            "device": device,
            "precision": precision,
            "max_memory": max_memory,
            "offline": offline,
        },
        overrides=set_ or (),
        file=config,
    )

    from pdd_cli.batch.devices import share_of
    from pdd_cli.batch.plan import manifest_folder, plan_jobs
    from pdd_cli.files import check_writable, remove_leftovers
    from pdd_cli.imaging.encode import Encoding
    from pdd_cli.upscaling.jobs import Output, check_own
    from pdd_cli.upscaling.manifest import Manifest

    # Wrong paths are reported before a model is fetched and loaded.
    plan = plan_jobs(
        settings.input,
        settings.output,
        format=settings.format,
        suffix=settings.suffix,
        recursive=settings.recursive,
    )
    jobs = plan.jobs
    folder = manifest_folder(settings.input, settings.output, jobs, strip=settings.strip_metadata)
    if folder is None:
        check_own(jobs[0].target)
    if settings.log is not None and not dry_run:
        check_writable(settings.log)
    meeting = Meeting(world)
    loaded = _load(settings, world, meeting, console, dry_run=dry_run)
    upscalers, provenance = loaded.upscalers, loaded.provenance
    upscaler = upscalers[0]
    files = Output(
        Encoding(settings.quality, settings.lossless),
        overwrite=settings.overwrite,
        strip=settings.strip_metadata,
        provenance=provenance,
    )
    # What a run that died has left is put in order before others write.
    if world.is_first and not dry_run:
        remove_leftovers({job.target.parent for job in jobs})
    # What an output is meant to be. How it is computed (tiles, engine, precision) is not: that changes nothing
    # which could be seen.
    recipe = settings.model_dump(
        include={"scale", "width", "height", "long_side", "fit", "color_correction", "quality", "lossless"}
        | {"strip_metadata"}
    )
    recipe["weights"] = upscaler.engine.weights_sha256
    manifest = None
    if folder is not None:
        if world.is_first and not dry_run:
            Manifest(folder, recipe).tidy()
        meeting.gather("tidied")
        part = world.rank if world.size > 1 else None
        manifest = Manifest(folder, recipe, provenance=provenance, part=part)
    # Nobody begins before all have found the inputs and read the manifest.
    meeting.gather("planned")
    share = share_of(jobs, world)
    started = time.perf_counter()
    stopped = None
    if dry_run:
        results = _preview(share, upscaler, files, manifest, recipe)
        if loaded.to_fetch and settings.weights in loaded.to_fetch:  # tiles, memory and time depend on the model
            results = [replace(result, tiles=0, memory=0, seconds=0.0, model_seconds=0.0) for result in results]
    else:
        results, stopped = _run(share, upscalers, files, manifest, recipe, settings.log, console)
    results = _of_all(results, jobs, meeting)
    if world.is_first and not dry_run:
        try:
            _remember(results, settings, upscaler.scale)
            if folder is not None and world.size > 1:
                Manifest(folder, recipe).tidy()
        except PddError as error:  # all outputs are there
            console.warn(
                f"{error.message}. The outputs are complete, but this run is not remembered for `pdd evaluate`."
            )
    if dry_run:
        _show_preview(results, console)
    console.result(_document(results, plan, settings, loaded))
    _tell(results, plan, settings, time.perf_counter() - started, console, dry_run=dry_run)
    # torchrun ends the others as soon as one exits with a failure: not before the first has reported it.
    meeting.gather("reported")
    meeting.end()
    if stopped is not None:
        raise stopped
    _judge(results, plan, dry_run=dry_run)


@dataclass(frozen=True)
class _Loaded:
    """An upscaler for each device, and what outputs say of it; `to_fetch`: weights that a dry run didn't fetch."""

    upscalers: list[Upscaler]
    provenance: Provenance
    strength: float
    to_fetch: Sequence[str]


def _load(settings: UpscaleConfig, world: World, meeting: Meeting, console: Console, *, dry_run: bool) -> _Loaded:
    """The models; the weights are fetched by one process on each machine, by a dry run not at all."""
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.engines.cache import fingerprint
    from pdd_cli.engines.select import open_engine
    from pdd_cli.imaging.provenance import Provenance
    from pdd_cli.runtime import choose_runtime, resident_memory
    from pdd_cli.upscaling.jobs import provenance_of
    from pdd_cli.upscaling.resizing import SizeRequest
    from pdd_cli.upscaling.strength import at_strength, files_at_strength, recommended
    from pdd_cli.upscaling.upscaler import Upscaler
    from pdd_cli.weights.fetch import ensure
    from pdd_cli.weights.store import Store

    runtimes = [choose_runtime(name, settings.precision) for name in world.devices(settings.device)]
    to_fetch: list[str] = []
    path, weights = None, None
    strength = 1.0 if settings.strength is None else settings.strength
    if world.local_rank != 0:
        meeting.gather("fetched")
    with fetch_progress(console) as on_event:

        def find(name: str) -> Path:
            try:
                return ensure(name, store=Store.default(), offline=settings.offline or dry_run, on_event=on_event)
            except DownloadError:
                if dry_run and not settings.offline and name not in to_fetch:
                    to_fetch.append(name)
                raise

        try:
            path = find(settings.weights)
        except DownloadError:
            if not to_fetch:
                raise
        if path is not None:
            recommendation = recommended(path)
            if recommendation.rejected:
                console.warn(f"pdd adapt rejected the weights {settings.weights}: {recommendation.rejected}")
            if settings.strength is None and recommendation.strength != 1:
                strength = recommendation.strength
                console.say(f"{settings.weights}: strength {strength:g}, as pdd adapt recommends (--strength 1: all)")
            files = files_at_strength(path, strength, find)
            strength = 1.0 if to_fetch else strength  # which changes nothing that a dry run shows
            weights = fingerprint(files, strength)
    if world.local_rank == 0:
        meeting.gather("fetched")
    for name in to_fetch:
        console.say(f"dry run: the weights {name} are not installed; the run would fetch them ({_published(name)})")

    def load() -> SRModel:
        from pdd_cli.models.loading import load_sr_model, stand_in

        if path is None:
            return stand_in(settings.weights)
        try:
            return at_strength(load_sr_model(path), strength, name=settings.weights, find=find)
        except InputError as error:
            if settings.strength is None and strength != 1:
                error.hint += " Or give --strength 1, which needs no base."
            raise

    free = settings.precision == "auto"
    engine_choice = settings.engine if path is not None else "torch"
    engines = [open_engine(load, weights, runtime, engine_choice, free=free) for runtime in runtimes]
    places = "; ".join(f"{engine.runtime}, {engine.name}" for engine in engines)
    processes = f", {world.size} processes" if world.size > 1 else ""
    model = engines[0].model
    console.say(f"{settings.weights}: {model.architecture} x{model.scale} on {places}{processes}")
    fit = None
    if settings.fit is not None:
        fit_width, fit_height = settings.fit.split("x")
        fit = (int(fit_width), int(fit_height))
    most_memory = settings.most_memory
    if most_memory is not None:
        # What the models leave of it is shared by the devices.
        models_take = min(resident_memory(), most_memory)
        most_memory = models_take + (most_memory - models_take) // len(engines)
    upscalers = [
        Upscaler(
            engine,
            tile=settings.tile,
            overlap=settings.overlap,
            notify=console.warn,
            size=SizeRequest(settings.scale, settings.width, settings.height, settings.long_side, fit),
            correction=settings.color_correction,
            max_memory=most_memory,
        )
        for engine in engines
    ]
    if path is None:
        provenance = Provenance(settings.weights, "")
    else:
        provenance = provenance_of(path, model.scale, strength, settings.color_correction)
    return _Loaded(upscalers, provenance, strength, to_fetch)


def _published(name: str) -> str:
    """The file and first source of weights in the catalogue."""
    from pdd_cli.weights.catalog import find

    entry = find(name)
    size = f", {entry.size / 1e6:.0f} MB" if entry.size else ""
    return f"{entry.file}{size}, from {entry.sources[0]}"


def _of_all(results: Sequence[Result], jobs: Sequence[Job], meeting: Meeting) -> list[Result]:
    """The results of all processes, in the order of the jobs."""
    from pdd_cli.upscaling.jobs import results_from_json, results_to_json

    found = [result for text in meeting.gather("done", results_to_json(results)) for result in results_from_json(text)]
    place = {job: index for index, job in enumerate(jobs)}
    return sorted(found, key=lambda result: place[result.job])


def _preview(
    jobs: Sequence[Job], upscaler: Upscaler, files: Output, manifest: Manifest | None, recipe: Mapping[str, object]
) -> list[Result]:
    from pdd_cli.upscaling.pipeline import preview_jobs
    from pdd_cli.video.pipeline import preview_videos

    images, videos = _by_kind(jobs)
    return [
        *preview_jobs(images, upscaler, output=files, manifest=manifest),
        *preview_videos(videos, upscaler, recipe=recipe, output=files, manifest=manifest),
    ]


def _run(
    jobs: Sequence[Job],
    upscalers: Sequence[Upscaler],
    files: Output,
    manifest: Manifest | None,
    recipe: Mapping[str, object],
    log: Path | None,
    console: Console,
) -> tuple[list[Result], ResourceError | None]:
    """The results; and what ended the run before all jobs were done, a full disk."""
    from functools import partial
    from itertools import chain

    from pdd_cli.batch.devices import run_on_devices
    from pdd_cli.files import append_line
    from pdd_cli.upscaling.pipeline import run_jobs
    from pdd_cli.video.pipeline import run_videos

    images, videos = _by_kind(jobs)
    results: list[Result] = []
    with console.progress() as progress:
        total = progress.add_task("files", total=len(jobs), note="")
        steps = [progress.add_task("tiles", total=None, note="") for _ in upscalers]

        def on_start(device: int, job: Job) -> None:
            what = "frames" if job in videos else "tiles"
            progress.reset(steps[device], total=None, description=what, note=job.source.name)

        def on_step(device: int, done: int, total: int) -> None:
            progress.update(steps[device], completed=done, total=total)

        run_images = partial(run_jobs, output=files, manifest=manifest)
        run_clips = partial(run_videos, recipe=recipe, output=files, manifest=manifest)
        try:
            for result in chain(
                run_on_devices(run_images, images, upscalers, on_start=on_start, on_tile=on_step),
                run_on_devices(run_clips, videos, upscalers, on_start=on_start, on_tile=on_step),
            ):
                results.append(result)
                if log is not None:
                    try:
                        append_line(log, _log_line(result))
                    except PddError as error:
                        console.warn(f"{error.message}. The log ends here; the batch continues.")
                        log = None
                progress.update(total, advance=1)
                if result.status == "failed":
                    console.warn(f"{result.job.source}: failed; the batch continues")
                if result.traceback and "--debug" in sys.argv:
                    console.say(result.traceback)
        except KeyboardInterrupt:
            finished = sum(job.target.exists() for job in jobs)
            raise Interrupted(
                f"interrupted: {finished} of {len(jobs)} outputs are there, whole",
                "The same command again goes on from there.",
            ) from None
        except ResourceError as error:
            error.hint += " The same command again makes what is missing."
            return results, error
    return results, None


def _log_line(result: Result) -> str:
    from datetime import datetime, timezone
    from json import dumps

    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    values = {"time": time, **_file_document(result), "reason": result.problem}
    return dumps({key: value for key, value in values.items() if key != "problem"}, ensure_ascii=False, default=str)


def _by_kind(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """The images and the videos."""
    from pdd_cli.video.decode import is_video

    return [job for job in jobs if not is_video(job.source)], [job for job in jobs if is_video(job.source)]


def _remember(results: Sequence[Result], settings: UpscaleConfig, scale: int) -> None:
    from datetime import datetime, timezone

    from pdd_cli.last_run import LatestUpscale, UpscaledPair, remember_upscale
    from pdd_cli.video.decode import is_video

    pairs = tuple(
        UpscaledPair(lr=result.job.source.absolute(), sr=result.job.target.absolute())
        for result in results
        if result.status in ("done", "skipped") and not is_video(result.job.source)
    )
    if pairs:
        remember_upscale(
            LatestUpscale(
                input=settings.input[0].absolute(),
                output=Path(settings.output).absolute(),
                weights=settings.weights,
                scale=scale,
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                pairs=pairs,
            )
        )


def _document(results: Sequence[Result], plan: Plan, settings: UpscaleConfig, loaded: _Loaded) -> dict[str, object]:
    upscalers = loaded.upscalers
    engine = upscalers[0].engine
    return {
        "input": settings.input[0] if len(settings.input) == 1 else settings.input,
        "output": settings.output,
        "weights": settings.weights,
        "architecture": engine.model.architecture,
        "scale": upscalers[0].scale,
        "strength": loaded.strength,
        **({"to_fetch": loaded.to_fetch} if loaded.to_fetch else {}),
        "engine": engine.name,
        "device": ",".join(str(upscaler.engine.runtime.place) for upscaler in upscalers),
        "precision": engine.runtime.precision,
        **{status: _count(results, status) for status in ("done", "skipped", "failed", "planned")},
        "seconds": round(sum(result.seconds for result in results), 3),
        "model_seconds": round(sum(result.model_seconds for result in results), 3),
        "other_kinds": dict(sorted(plan.others.items())),
        "earlier_outputs": plan.outputs,
        "problems": plan.problems,
        "files": [_file_document(result) for result in results],
    }


def _file_document(result: Result) -> dict[str, object]:
    return {
        "input": result.job.source,
        "output": result.job.target,
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


def _show_preview(results: Sequence[Result], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    columns = ("input", "output", "size in", "size out", "tiles", "memory", "time", "note")
    table = Table(*columns, title="dry run: nothing is written")
    for result in results:
        sizes = ["{}x{}".format(*size) if size else "" for size in (result.size_in, result.size_out)]
        note = result.problem or ("made already, skipped" if result.status == "skipped" else "")
        memory = f"{result.memory / 2**30:.1f} GiB" if result.memory else ""
        seconds = f"{result.seconds:.0f} s" if result.memory else ""
        tiles = str(result.tiles) if result.tiles else ""
        names = [escape(str(path)) for path in (result.job.source, result.job.target)]
        table.add_row(*names, *sizes, tiles, memory, seconds, escape(note))
    console.table(table)


def _tell(
    results: Sequence[Result],
    plan: Plan,
    settings: UpscaleConfig,
    seconds: float,
    console: Console,
    *,
    dry_run: bool,
) -> None:
    """Say what became of the run."""
    if plan.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.others.items()))
        console.say(f"files of other kinds, not read: {kinds}")
    if plan.outputs:
        console.say(f"{len(plan.outputs)} outputs of earlier runs lie between the inputs and are not upscaled again")
    done, skipped = _count(results, "done"), _count(results, "skipped")
    failed = [result for result in results if result.status == "failed"]
    for result in results:
        if result.status in ("done", "skipped") and result.problem and not dry_run:
            console.warn(f"{result.job.source}: {result.problem}")
    if skipped:
        console.say(f"{skipped} skipped: made already (--overwrite makes them again)")
    if done:
        console.say(f"{done} upscaled to {settings.output} in {seconds:.1f} s")
    for problem in plan.problems:
        console.warn(problem)
    if failed:
        console.say(f"{len(failed)} failed:")
        for result in failed:
            console.say(f"  {result.problem}")


def _judge(results: Sequence[Result], plan: Plan, *, dry_run: bool) -> None:
    """Raise what the exit code asks for."""
    failed = _count(results, "failed")
    if failed:
        verb = "would fail" if dry_run else "failed"
        hint = "The others are done." if _count(results, "done") else ""
        raise PartialFailure(f"{failed} of {len(results)} files {verb}", hint)
    if plan.problems:
        raise PartialFailure(f"folders that can't be read: {len(plan.problems)}", "All else is done.")


def _count(results: Sequence[Result], status: str) -> int:
    return sum(result.status == status for result in results)
