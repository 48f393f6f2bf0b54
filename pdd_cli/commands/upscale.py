"""`pdd upscale`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pdd_cli.console import Console
from pdd_cli.errors import Interrupted, PartialFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pdd_cli.config import UpscaleConfig
    from pdd_cli.inference.batch import Job, Result
    from pdd_cli.inference.upscaler import Upscaler


def upscale(
    input: Annotated[Path, typer.Argument(help="Image, or folder of images.", show_default=False)],
    output: Annotated[str, typer.Argument(help="Image, or folder for the outputs.", show_default=False)],
    weights: Annotated[str | None, typer.Option(help="NAME or FILE of the model. [default: realesrgan]")] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="Longest side of a tile in LR pixels; 0: the whole image; auto: by memory. [default: auto]"),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Overlap of tiles in LR pixels; at most half a tile is used. [default: 32]")
    ] = None,
    format: Annotated[
        Literal["keep", "png", "jpg", "webp", "tiff", "bmp"] | None,
        typer.Option(help="Format of the outputs. [default: keep, the input's]"),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of JPEG and WebP, 1 to 100. [default: 95]")] = None,
    suffix: Annotated[str | None, typer.Option(help="Text to put behind each output's name. [default: none]")] = None,
    recursive: Annotated[
        bool | None, typer.Option("--recursive/--no-recursive", help="Go into subfolders. [default: recursive]")
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--skip-existing", help="What to do with outputs that exist. [default: skip]"),
    ] = None,
    engine: Annotated[
        Literal["auto", "torch", "openvino"] | None,
        typer.Option(help="auto: OpenVINO on a CPU where it is installed, else PyTorch. [default: auto]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]")] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(help="[default: auto: what is fastest here]")
    ] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an `upscale:` section. [default: ./pdd.yaml]")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Upscale an image or a folder of images (PNG, JPEG, WebP, TIFF, BMP).

    Outputs that exist are skipped, so the same command again goes on where the last one stopped. An image that can't
    be read is reported at the end; the others are done (exit code 3).
    """
    from pdd_cli.config import UpscaleConfig, resolve

    console = Console(json=json)
    settings = resolve(
        UpscaleConfig,
        "upscale",
        options={
            "input": input,
            "output": output,
            "weights": weights,
            "tile": int(tile) if tile is not None and tile.isdecimal() else tile,
            "overlap": overlap,
            "format": format,
            "quality": quality,
            "suffix": suffix,
            "recursive": recursive,
            "overwrite": overwrite,
            "engine": engine,
            "device": device,
            "precision": precision,
            "offline": offline,
        },
        overrides=set_ or (),
        file=config,
    )

    from pdd_cli.inference.batch import plan_jobs, preview_jobs

    # What can be wrong with the paths is told before a model is fetched and loaded.
    jobs = plan_jobs(
        settings.input,
        settings.output,
        format=settings.format,
        suffix=settings.suffix,
        recursive=settings.recursive,
    )
    upscaler = _load(settings, console)
    if dry_run:
        results = list(preview_jobs(jobs, upscaler, overwrite=settings.overwrite))
        _show_preview(results, console)
    else:
        results = _run(jobs, upscaler, settings, console)
        _remember(results, settings, upscaler.scale)
    console.result(_document(results, settings, upscaler))
    _report(results, settings, console, dry_run=dry_run)


def _load(settings: UpscaleConfig, console: Console) -> Upscaler:
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.device import choose_runtime
    from pdd_cli.inference.engines import choose_engine
    from pdd_cli.inference.upscaler import Upscaler
    from pdd_cli.models.loading import load_sr_model
    from pdd_cli.weights.fetch import ensure
    from pdd_cli.weights.store import Store

    runtime = choose_runtime(settings.device, settings.precision)
    with fetch_progress(console) as on_event:
        path = ensure(settings.weights, store=Store.default(), offline=settings.offline, on_event=on_event)
    model = load_sr_model(path)
    engine = choose_engine(model, runtime, settings.engine)
    console.say(f"{settings.weights}: {model.architecture} x{model.scale} on {runtime}, {engine.name}")
    return Upscaler(engine, tile=settings.tile, overlap=settings.overlap, notify=console.warn)


def _run(jobs: Sequence[Job], upscaler: Upscaler, settings: UpscaleConfig, console: Console) -> list[Result]:
    from pdd_cli.inference.batch import run_jobs

    results: list[Result] = []
    with console.progress() as progress:
        images = progress.add_task("images", total=len(jobs), note="")
        tiles = progress.add_task("tiles", total=None, note="")

        def on_start(job: Job) -> None:
            progress.update(images, note=job.source.name)
            progress.reset(tiles, total=None)

        try:
            for result in run_jobs(
                jobs,
                upscaler,
                overwrite=settings.overwrite,
                quality=settings.quality,
                on_start=on_start,
                on_tile=lambda done, total: progress.update(tiles, completed=done, total=total),
            ):
                results.append(result)
                progress.update(images, advance=1)
                if result.status == "failed":
                    console.warn(f"{result.job.source}: failed, going on")
        except KeyboardInterrupt:
            finished = sum(result.status != "failed" for result in results)
            raise Interrupted(
                f"interrupted: {finished} of {len(jobs)} outputs are there, whole",
                "The same command again goes on from there.",
            ) from None
    return results


def _remember(results: Sequence[Result], settings: UpscaleConfig, scale: int) -> None:
    from datetime import datetime, timezone

    from pdd_cli.latest import LatestUpscale, UpscaledPair, remember_upscale

    pairs = tuple(
        UpscaledPair(lr=result.job.source.absolute(), sr=result.job.target.absolute())
        for result in results
        if result.status in ("done", "skipped")
    )
    if pairs:
        remember_upscale(
            LatestUpscale(
                input=settings.input.absolute(),
                output=Path(settings.output).absolute(),
                weights=settings.weights,
                scale=scale,
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                pairs=pairs,
            )
        )


def _document(results: Sequence[Result], settings: UpscaleConfig, upscaler: Upscaler) -> dict[str, object]:
    engine = upscaler.engine
    return {
        "input": settings.input,
        "output": settings.output,
        "weights": settings.weights,
        "architecture": engine.model.architecture,
        "scale": upscaler.scale,
        "engine": engine.name,
        "device": str(engine.runtime.device),
        "precision": engine.runtime.precision,
        **{status: _count(results, status) for status in ("done", "skipped", "failed", "planned")},
        "seconds": round(sum(result.seconds for result in results), 3),
        "model_seconds": round(sum(result.model_seconds for result in results), 3),
        "files": [
            {
                "input": result.job.source,
                "output": result.job.target,
                "status": result.status,
                "problem": result.problem,
                "size_in": result.size_in,
                "size_out": result.size_out,
                "tiles": result.tiles,
                "seconds": round(result.seconds, 3),
                "model_seconds": round(result.model_seconds, 3),
            }
            for result in results
        ],
    }


def _show_preview(results: Sequence[Result], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("input", "output", "size in", "size out", "tiles", "note", title="dry run: nothing is written")
    for result in results:
        sizes = ["{}x{}".format(*size) if size else "" for size in (result.size_in, result.size_out)]
        note = result.problem or ("exists, skipped" if result.status == "skipped" else "")
        tiles = str(result.tiles) if result.tiles else ""
        names = [escape(str(path)) for path in (result.job.source, result.job.target)]
        table.add_row(*names, *sizes, tiles, escape(note))
    console.table(table)


def _report(results: Sequence[Result], settings: UpscaleConfig, console: Console, *, dry_run: bool) -> None:
    """Say what became of the run; raise what its exit code asks for."""
    done, skipped = _count(results, "done"), _count(results, "skipped")
    failed = [result for result in results if result.status == "failed"]
    for result in results:
        if result.status == "done" and result.problem:
            console.warn(f"{result.job.source}: {result.problem}")
    if skipped:
        console.say(f"{skipped} skipped: the output exists (--overwrite does them again)")
    if done:
        seconds = sum(result.seconds for result in results)
        console.say(f"{done} upscaled to {settings.output} in {seconds:.1f} s")
    if failed:
        console.say(f"{len(failed)} failed:")
        for result in failed:
            console.say(f"  {result.problem}")
        verb = "would fail" if dry_run else "failed"
        raise PartialFailure(f"{len(failed)} of {len(results)} images {verb}", "The others are done." if done else "")


def _count(results: Sequence[Result], status: str) -> int:
    return sum(result.status == status for result in results)
