"""`pdd upscale`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdd_cli.commands._compare import compare
from pdd_cli.console import Console
from pdd_cli.errors import InputError
from pdd_cli.observer import pixel_rate
from pdd_cli.options import Call, command
from pdd_cli.settings.upscale import UpscaleConfig, UpscaleFlags

if TYPE_CHECKING:
    from pdd_cli.batch.run import BatchResult


def _upscale(call: Call[UpscaleConfig, UpscaleFlags]) -> None:
    """Upscale images and videos: single files or whole folders.

    PNG, JPEG, WebP, GIF, TIFF, BMP, TGA, DDS, AVIF, HEIC, JPEG XL; MP4, MOV, MKV,
    WebM and more; archives of images (.cbz, .zip).

    Running the same command again makes only outputs that are missing, or whose
    input, weights or settings have changed. Files that can't be read are
    reported at the end; the others are done (exit code 3).

    Examples:
      pdd upscale photo.jpg photo-x4.png
      pdd upscale in/ out/ --weights realesrgan --fit 3840x2160
      pdd upscale photo.jpg --compare realesrgan,bicubic --output compare.html
    """
    if call.flags.compare:
        compare(call)
        return
    listed = call.options["from_list"]
    if (
        call.options["output"] and not call.options["input"] and not listed
    ):  # click takes a single argument for the last one
        raise InputError(f"no output for {call.options['output']}", "Give a file or folder after it.")
    console, settings, dry_run = call.console, call.settings(), call.flags.dry_run

    from pdd_cli.batch.run import run
    from pdd_cli.batch.watching import watch
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.ranks import Ranks

    ranks = Ranks.from_environment()
    if call.flags.watch:
        if dry_run:
            raise InputError("--watch and --dry-run can't be combined", "Leave one of them out.")
        outcome = watch(settings, fixed=call.given(), ranks=ranks, observer=ConsoleObserver(console, transient=True))
    else:
        outcome = run(settings, fixed=call.given(), dry_run=dry_run, ranks=ranks, observer=ConsoleObserver(console))
    if dry_run:
        _show_preview(outcome, console)
    console.result(outcome.as_document())
    _describe(outcome, console)
    # When one process fails, torchrun ends all others: wait until the first has reported the failure.
    ranks.leave()
    outcome.raise_for_failures()
    if dry_run:
        console.say("next: the same command without --dry-run")
    elif outcome.recorded:
        console.say("next: pdd evaluate --output scores.html")


upscale = command(UpscaleConfig, "upscale", UpscaleFlags, _upscale)


def _show_preview(outcome: BatchResult, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    columns = ("input", "output", "size in", "size out", "tiles", "memory", "time", "note")
    table = Table(*columns, title="dry run: nothing is written")
    for result in outcome.results:
        sizes = ["{}x{}".format(*size) if size else "" for size in (result.size_in, result.size_out)]
        note = result.problem or ("up to date, skipped" if result.status == "skipped" else "")
        memory = f"{result.memory / 2**30:.1f} GiB" if result.memory else ""
        seconds = f"{result.seconds:.0f} s" if result.memory else ""
        tiles = str(result.tiles) if result.tiles else ""
        names = [escape(str(path)) for path in (result.job.source, result.job.target)]
        table.add_row(*names, *sizes, tiles, memory, seconds, escape(note))
    console.table(table)


def _describe(outcome: BatchResult, console: Console) -> None:
    """Print a summary."""
    plan = outcome.plan
    if plan.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.others.items()))
        console.say(f"files of other kinds, not read: {kinds}")
    if plan.outputs:
        console.say(f"{len(plan.outputs)} outputs of earlier runs are among the inputs and are not upscaled again")
    done, skipped = outcome.count("done"), outcome.count("skipped")
    failed = [result for result in outcome.results if result.status == "failed"]
    for result in outcome.results:
        if result.status in ("done", "skipped") and result.problem and not outcome.dry_run:
            console.warn(f"{result.job.source}: {result.problem}")
    if skipped:
        # Of an output that was made otherwise, a warning has said how.
        is_current = all(not result.problem for result in outcome.results if result.status == "skipped")
        console.say(f"{skipped} skipped: {'up to date' if is_current else 'exists'} (--overwrite makes them again)")
    if done:
        rate = pixel_rate(outcome.pixels, outcome.seconds)
        console.say(f"{done} upscaled to {outcome.settings.output} in {outcome.seconds:.1f} s ({rate})")
    for problem in plan.problems:
        console.warn(problem)
    if failed:
        console.say(f"{len(failed)} failed:")
        for result in failed:
            console.say(f"  {result.problem}")
