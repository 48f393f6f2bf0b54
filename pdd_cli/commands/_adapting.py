"""The output of `pdd adapt`: a finished run and a dry run, as tables and documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from pdd_cli.adaptation.estimate import DryRun
    from pdd_cli.adaptation.prepare import Run
    from pdd_cli.adaptation.publish import PublishResult
    from pdd_cli.adaptation.sources import Source


def run_document(run: Run, done: PublishResult, losses: Mapping[str, float]) -> dict[str, object]:
    """A finished run, for --json."""
    return {
        "name": run.name,
        "weights": done.weights and done.weights.path,
        "run": run.folder.path,
        "report": done.report,
        "exported": done.exported,
        "steps": run.state.step,
        "features": run.features_name,
        "losses": losses,
        "verdict": {"keep": done.verdict.keep, "reason": done.verdict.reason, "strength": done.verdict.strength},
        "truth": done.conclusion and done.conclusion.validation_document(),
        "card": done.weights and done.weights.card.model_dump(),
        "failures": [{"message": failure.message, "hint": failure.hint} for failure in done.failures],
    }


def dry_run_table(found: DryRun) -> Table:
    """One row for each finding."""
    from rich.markup import escape
    from rich.table import Table

    rows = Table("what", "found", title="dry run: nothing is written", title_justify="left")
    run, estimate = found.run, found.estimate
    for source in found.sources:
        rows.add_row(source.option, escape(_source(source)))
    if run is not None:
        if not found.settings.hr_dir:
            rows.add_row("HR", "made of the real images")
        rows.add_row("judged on", f"{len(run.judge.images)} real images, {len(run.sampler.real)} are trained on")
        if pairs := run.judge.pairs:
            rows.add_row("pairs", f"{pairs.found} with ground truth, {len(pairs.lr)} of them are scored")
        base = run.models.base
        millions = sum(parameter.numel() for parameter in base.module.parameters()) / 1e6
        name = escape(found.settings.base)
        rows.add_row("base", f"{name}: {base.architecture} x{base.scale}, {millions:.1f} million weights")
        rows.add_row("features", run.features_name)
        rows.add_row("device", str(run.models.runtime))
    if found.to_fetch:
        rows.add_row("to be fetched", ", ".join(found.to_fetch))
    if estimate is not None:
        rows.add_row(
            "time",
            f"{_duration(estimate.seconds)} at the most: "
            f"{estimate.steps} steps of {estimate.seconds_per_step:.2g} s, "
            f"{estimate.judgements} judgements of {estimate.seconds_per_judgement:.2g} s",
        )
        if estimate.memory:
            rows.add_row("memory", f"{_size(estimate.memory)} at the most, {_size(estimate.free_memory)} more are free")
        for event in estimate.events:
            rows.add_row("trial steps", escape(event))
    elif run is None:
        rows.add_row("time, memory", "not known before all weights are installed")
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def dry_run_document(found: DryRun) -> dict[str, object]:
    """The dry run, for --json."""
    run, estimate = found.run, found.estimate
    return {
        "dry_run": True,
        "name": found.name,
        "run": found.folder,
        "images": [
            {
                "option": source.option,
                "folder": source.folder,
                "used": source.used,
                "smallest": source.smallest,
                "largest": source.largest,
                "smaller_than_a_crop": source.small,
                "left_out": source.left_out,
            }
            for source in found.sources
        ],
        **(
            {
                "trained_on": len(run.sampler.real),
                "judged_on": len(run.judge.images),
                "pairs": run.judge.pairs.found if run.judge.pairs else 0,
                "architecture": run.models.base.architecture,
                "scale": run.models.base.scale,
                "features": run.features_name,
                "device": str(run.models.runtime.device),
                "precision": run.models.runtime.precision,
            }
            if run
            else {}
        ),
        "to_fetch": found.to_fetch,
        **(
            {
                "steps": estimate.steps,
                "judgements": estimate.judgements,
                "seconds_per_step": estimate.seconds_per_step,
                "seconds_per_judgement": estimate.seconds_per_judgement,
                "seconds": estimate.seconds,
                "memory": estimate.memory,
            }
            if estimate
            else {}
        ),
        "disk": [{"folder": use.folder, "needed": use.needed, "free": use.free} for use in found.disk],
        "problems": [
            {"message": error.message, "hint": error.hint, "exit_code": error.exit_code} for error in found.problems
        ],
    }
