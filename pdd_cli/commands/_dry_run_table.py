"""The table of `pdd adapt --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdd_cli.observer import duration

if TYPE_CHECKING:
    from rich.table import Table

    from pdd_cli.adaptation.estimate import DryRun
    from pdd_cli.adaptation.sources import Source


def dry_run_table(found: DryRun) -> Table:
    """One row for each finding."""
    from rich.markup import escape
    from rich.table import Table

    rows = Table("what", "found", title="dry run: nothing is written", title_justify="left")
    run, estimate = found.run, found.estimate
    for source in found.sources:
        rows.add_row(source.option, escape(_source(source)))
    if run is not None:
        rows.add_row("source", run.properties.describe())
        rows.add_row("HR from", run.hr_from)
        rows.add_row("judged on", f"{run.judged_on}; trained on: {run.lr_images}")
        if pairs := run.judge.pairs:
            rows.add_row("pairs", f"{pairs.found} with ground truth, {len(pairs.lr)} of them are scored")
        base = run.models.base
        millions = sum(parameter.numel() for parameter in base.module.parameters()) / 1e6
        name = escape(found.settings.base)
        rows.add_row("base", f"{name}: {base.architecture} x{base.scale}, {millions:.1f} million weights")
        if run.teacher is not None:
            rows.add_row("teacher", f"{escape(run.teacher.name)}: {run.teacher.model.architecture}")
        rows.add_row("features", run.features_name)
        rows.add_row("device", str(run.models.runtime))
    if found.to_fetch:
        rows.add_row("to be fetched", ", ".join(found.to_fetch))
    if estimate is not None:
        rows.add_row(
            "time",
            f"{duration(estimate.seconds)} at most: "
            f"{estimate.steps} steps of {estimate.seconds_per_step:.2g} s, "
            f"{estimate.judgements} judgements of {estimate.seconds_per_judgement:.2g} s"
            + (
                f", {estimate.teacher_crops} crops of the teacher of {estimate.seconds_per_teacher_crop:.2g} s"
                if estimate.teacher_crops
                else ""
            ),
        )
        if estimate.memory:
            rows.add_row("memory", f"{_size(estimate.memory)} at most; another {_size(estimate.free_memory)} is free")
        for event in estimate.events:
            rows.add_row("trial steps", escape(event))
    elif run is None:
        rows.add_row("time, memory", "unknown until all weights are installed")
    for use in found.disk:
        rows.add_row("disk", escape(f"{_size(use.needed)} into {use.folder} ({_size(use.free)} free)"))
    for error in found.problems:
        rows.add_row("would fail", escape(error.message))
    return rows


def _source(source: Source) -> str:
    smallest, largest = ("x".join(map(str, size)) for size in (source.smallest, source.largest))
    sizes = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels"
    small = f", {source.small} of them smaller than a crop" if source.small else ""
    left_out = f"; {len(source.left_out)} left out" if source.left_out else ""
    return f"{source.folder}: {source.used} images, {sizes}{small}{left_out}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
