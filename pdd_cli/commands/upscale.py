"""`pdd upscale`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pdd_cli.console import Console

if TYPE_CHECKING:
    from pdd_cli.batch.run import BatchResult


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
    from pdd_cli.settings.resolve import resolve
    from pdd_cli.settings.upscale import UpscaleConfig

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

    from pdd_cli.batch.run import run
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.distributed import World
    from pdd_cli.meeting import Meeting

    meeting = Meeting(World.from_environment())
    outcome = run(settings, dry_run=dry_run, meeting=meeting, observer=ConsoleObserver(console))
    if dry_run:
        _show_preview(outcome, console)
    console.result(outcome.as_document())
    _describe(outcome, console)
    # torchrun ends the others as soon as one exits with a failure: not before the first has reported it.
    meeting.gather("reported")
    meeting.end()
    outcome.raise_for_failures()


def _show_preview(outcome: BatchResult, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    columns = ("input", "output", "size in", "size out", "tiles", "memory", "time", "note")
    table = Table(*columns, title="dry run: nothing is written")
    for result in outcome.results:
        sizes = ["{}x{}".format(*size) if size else "" for size in (result.size_in, result.size_out)]
        note = result.problem or ("made already, skipped" if result.status == "skipped" else "")
        memory = f"{result.memory / 2**30:.1f} GiB" if result.memory else ""
        seconds = f"{result.seconds:.0f} s" if result.memory else ""
        tiles = str(result.tiles) if result.tiles else ""
        names = [escape(str(path)) for path in (result.job.source, result.job.target)]
        table.add_row(*names, *sizes, tiles, memory, seconds, escape(note))
    console.table(table)


def _describe(outcome: BatchResult, console: Console) -> None:
    """The outcome in words."""
    plan = outcome.plan
    if plan.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.others.items()))
        console.say(f"files of other kinds, not read: {kinds}")
    if plan.outputs:
        console.say(f"{len(plan.outputs)} outputs of earlier runs lie between the inputs and are not upscaled again")
    done, skipped = outcome.count("done"), outcome.count("skipped")
    failed = [result for result in outcome.results if result.status == "failed"]
    for result in outcome.results:
        if result.status in ("done", "skipped") and result.problem and not outcome.dry_run:
            console.warn(f"{result.job.source}: {result.problem}")
    if skipped:
        console.say(f"{skipped} skipped: made already (--overwrite makes them again)")
    if done:
        console.say(f"{done} upscaled to {outcome.settings.output} in {outcome.seconds:.1f} s")
    for problem in plan.problems:
        console.warn(problem)
    if failed:
        console.say(f"{len(failed)} failed:")
        for result in failed:
            console.say(f"  {result.problem}")
