"""`pdd evaluate`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pdd_cli.console import Console
from pdd_cli.errors import CheckFailed, DownloadError, InputError, PartialFailure, PddError

if TYPE_CHECKING:
    from pdd_cli.config import EvaluateConfig
    from pdd_cli.iqa.datasets import Dataset
    from pdd_cli.iqa.inputs import ImageSet, Inputs
    from pdd_cli.iqa.metrics import ImageScores, MetricInfo
    from pdd_cli.iqa.report import Report, ScoredSet
    from pdd_cli.upscaling.jobs import Job

_ROWS = 60  # of the table on screen; the rest is in --output


def evaluate(
    sr_dir: Annotated[
        Path | None,
        typer.Argument(help="Image or folder to score. [default: what the latest `pdd upscale` made]"),
    ] = None,
    gt_dir: Annotated[
        Path | None, typer.Option(help="Ground truth (HR originals), image or folder; paired by name.")
    ] = None,
    lr_dir: Annotated[
        Path | None,
        typer.Option(help="The LR inputs, image or folder: adds downscale consistency and colour drift."),
    ] = None,
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Other SR images of the same inputs to compare with; repeatable.")
    ] = None,
    fail_if_worse: Annotated[
        str | None,
        typer.Option(help="Exit code 6 when a baseline is clearly better by one of these metrics.", metavar="A,B,…"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics of pyiqa, for example niqe,psnr,lpips; `list` shows all. [default: niqe]", metavar="A,B,…"
        ),
    ] = None,
    dataset: Annotated[
        Literal["realsr", "drealsr", "ntire20", "dped", "videolq"] | None,
        typer.Option(help="LR and HR images from --root in the layout this data set is published in."),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that --dataset was unpacked into.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Upscale the LR images (--lr-dir or --dataset) with each of these, then score; the last one is "
            "compared with the others.",
            metavar="A,B,…",
        ),
    ] = None,
    upscaled_dir: Annotated[
        Path | None, typer.Option(help="Where --weights puts the images, a folder a model. [default: upscaled]")
    ] = None,
    crop_border: Annotated[
        int | None, typer.Option(help="Pixels to leave out at each side. [default: 0]", show_default=False)
    ] = None,
    luma: Annotated[
        Literal["full", "matlab"] | None,
        typer.Option(
            help="Luma of psnry, ssim, ms_ssim and cw_ssim: full (0..255), or matlab (16..235, as papers have it). "
            "[default: full]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the report: a page to look at (.html), or all scores (.csv, .json).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an `evaluate:` section. [default: ./pdd.yaml]")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Score images with any metric of pyiqa, with ground truth or without, and compare them with others.

    A metric that needs ground truth is passed over where there is none. Images that can't be read or compared
    are named; the others are scored (exit code 3).
    """
    from pdd_cli.config import EvaluateConfig, resolve

    console = Console(json=json)
    settings = resolve(
        EvaluateConfig,
        "evaluate",
        options={
            "sr_dir": sr_dir,
            "gt_dir": gt_dir,
            "lr_dir": lr_dir,
            "baseline": tuple(baseline) if baseline else None,
            "fail_if_worse": _names(fail_if_worse),
            "metrics": _names(metrics),
            "dataset": dataset,
            "root": root,
            "weights": _names(weights),
            "upscaled_dir": upscaled_dir,
            "crop_border": crop_border,
            "luma": luma,
            "output": output,
            "device": device,
            "offline": offline,
        },
        overrides=set_ or (),
        file=config,
    )
    if settings.metrics == ("list",):
        _list_metrics(console)
        return

    from pdd_cli.iqa.metrics import LUMA_METRICS, load_metrics, metric_infos
    from pdd_cli.iqa.report import Report
    from pdd_cli.reporting.evaluation import check_format, write_report
    from pdd_cli.runtime import choose_runtime

    # Wrong options are reported before anything is upscaled or fetched.
    if settings.output is not None:
        check_format(settings.output)
    infos = metric_infos(settings.metrics)
    target = str(choose_runtime(settings.device).device)
    inputs = _upscaled(settings, console) if settings.weights else _gathered(settings)
    for note in inputs.notes:
        console.say(note)
    wanted, skipped = _computable(infos, inputs)
    for name, reason in skipped.items():
        console.warn(f"{name} is skipped: it {reason}")
    if not wanted:
        raise InputError(
            f"nothing to compute: {', '.join(skipped)} compare with images that aren't given",
            "Add --gt-dir DIR, or a metric without reference, such as niqe.",
        )
    if settings.luma == "matlab" and not any(info.name in LUMA_METRICS for info in wanted):
        console.warn(f"--luma matlab changes nothing here: it is for {', '.join(LUMA_METRICS)}")
    missing = [name for name in settings.fail_if_worse if name not in [info.name for info in wanted]]
    if missing:
        raise InputError(f"--fail-if-worse {', '.join(missing)}: not computed", "Name it in --metrics, too.")

    from pdd_cli.commands._fetching import fetch_progress

    with fetch_progress(console) as on_event:
        loaded, lacking = load_metrics(
            wanted, device=target, luma=settings.luma, offline=settings.offline, on_event=on_event
        )
    if not loaded:
        raise _summed(lacking.values())
    lost = {
        info.name: "lacks its weights" if isinstance(error, DownloadError) else "could not be loaded"
        for info, error in lacking.items()
    }
    failures = list(inputs.problems)
    (main, *baselines), interrupted = _score_all(inputs.sets, loaded, settings, console, failures)
    report = Report(
        list(loaded), main, baselines, settings.crop_border, {**skipped, **lost}, failures, luma=settings.luma
    )
    _show(report, console)
    console.result(report.as_document())
    if settings.output is not None:  # last: where it can't be written, the scores are shown all the same
        write_report(settings.output, report)
        console.say(f"report written to {settings.output}")
    if interrupted:
        raise KeyboardInterrupt
    _conclude(report, settings, console, list(lacking.values()))


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


def _summed(errors: Collection[PddError]) -> PddError:
    """All of `errors` as one of the first's kind."""
    first = next(iter(errors))
    return type(first)("\n".join(error.message for error in errors), "\n       ".join(error.hint for error in errors))


# --- what is scored ---------------------------------------------------------------------------------------------


def _gathered(settings: EvaluateConfig) -> Inputs:
    from pdd_cli.iqa.inputs import gather

    return gather(
        settings.sr_dir,
        gt=settings.gt_dir,
        lr=settings.lr_dir,
        baselines=settings.baseline,
        dataset=_dataset(settings),
    )


def _dataset(settings: EvaluateConfig) -> Dataset | None:
    from pdd_cli.iqa.datasets import find_dataset

    if settings.dataset is None or settings.root is None:
        return None
    return find_dataset(settings.dataset, settings.root)


def _upscaled(settings: EvaluateConfig, console: Console) -> Inputs:
    """The sets that --weights make; the last named is the one that is judged."""
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.engines.cache import fingerprint
    from pdd_cli.engines.select import open_engine
    from pdd_cli.iqa.inputs import Inputs, folders_as_dataset, upscaled_sets
    from pdd_cli.models.loading import load_sr_model
    from pdd_cli.runtime import choose_runtime
    from pdd_cli.upscaling.jobs import Output, provenance_of
    from pdd_cli.upscaling.pipeline import run_jobs
    from pdd_cli.upscaling.upscaler import Upscaler
    from pdd_cli.weights.fetch import ensure
    from pdd_cli.weights.store import Store

    dataset = _dataset(settings) or folders_as_dataset(settings.lr_dir or Path(), settings.gt_dir)
    planned = _planned(settings, dataset)
    runtime = choose_runtime(settings.device)
    with fetch_progress(console) as on_event:
        files = [
            ensure(name, store=Store.default(), offline=settings.offline, on_event=on_event)
            for name in settings.weights
        ]
    outputs: dict[str, dict[Path, Path]] = {}
    problems = list(dataset.problems)
    for (name, jobs), file in zip(planned.items(), files, strict=True):
        engine = open_engine(partial(load_sr_model, file), fingerprint([file], 1.0), runtime, "auto", free=True)
        upscaler = Upscaler(engine, tile="auto", overlap=64, notify=console.warn)
        made = outputs.setdefault(name, {})
        with console.progress(transient=True) as progress:
            task = progress.add_task(f"upscale with {name}", total=len(jobs), note="")
            # Always anew: what lies there may be from an earlier training of the same name.
            output = Output(overwrite=True, provenance=provenance_of(file, upscaler.scale))
            for result in run_jobs(jobs, upscaler, output=output):
                progress.update(task, advance=1, note=result.job.source.name)
                if result.status == "failed":
                    problems.append(f"{name}: {result.problem}")
                else:
                    made[result.job.source] = result.job.target
        console.say(f"{len(made)} of {len(jobs)} images upscaled with {name} to {settings.upscaled_dir / name}")
        if not made:
            raise InputError("none of the LR images could be upscaled:\n" + "\n".join(problems))
    *others, main = upscaled_sets(dataset, outputs)
    return Inputs((main, *others), problems=tuple(problems))


def _planned(settings: EvaluateConfig, dataset: Dataset) -> dict[str, list[Job]]:
    """What --weights makes of the LR images, a folder a model. Raises InputError where it would replace images."""
    from pdd_cli.batch.plan import refuse_collisions
    from pdd_cli.upscaling.jobs import Job

    planned = {}
    for weights in settings.weights:
        name = Path(weights).stem if Path(weights).suffix else weights
        if name in planned:
            raise InputError(
                f"--weights {','.join(settings.weights)}: two of them are named {name}", "Rename one of the files."
            )
        folder = settings.upscaled_dir / name
        planned[name] = [Job(lr, folder / png) for lr, png in _png_names(dataset).items()]
    refuse_collisions(
        [job for jobs in planned.values() for job in jobs], dataset.hr.values(), "Choose another --upscaled-dir."
    )
    return planned


def _png_names(dataset: Dataset) -> dict[Path, str]:
    """Where each output goes: PNG whatever the input was, for what is scored must be what the model drew."""
    from collections import Counter

    plain = {lr: str(Path(name).with_suffix(".png")) for lr, name in dataset.name_of.items()}
    counts = Counter(plain.values())
    return {lr: name if counts[name] == 1 else f"{dataset.name_of[lr]}.png" for lr, name in plain.items()}


def _computable(infos: Sequence[MetricInfo], inputs: Inputs) -> tuple[list[MetricInfo], dict[str, str]]:
    """The metrics to compute (ours too, where LR inputs are known), and why the others can't be."""
    from pdd_cli.iqa.metrics import CONSISTENCY, DRIFT

    items = inputs.sets[0].items.values()
    lacking = {}
    if not any(item.reference for item in items):
        lacking["full"] = "needs ground truth: add --gt-dir DIR"
    if not any(item.lr for item in items):
        lacking["lr"] = "needs the LR inputs: add --lr-dir DIR"
    wanted = list(dict.fromkeys([*infos, *([] if "lr" in lacking else [CONSISTENCY, DRIFT])]))
    return (
        [info for info in wanted if info.reference not in lacking],
        {info.name: lacking[info.reference] for info in wanted if info.reference in lacking},
    )


# --- scoring and telling ----------------------------------------------------------------------------------------


def _score_all(
    sets: Sequence[ImageSet],
    loaded: dict[MetricInfo, object],
    settings: EvaluateConfig,
    console: Console,
    failures: list[str],
) -> tuple[list[ScoredSet], bool]:
    """The scores of each set, and whether Ctrl-C ended it before the last; then what is scored by then is kept."""
    scored: list[ScoredSet] = []
    for one in sets:
        found = _score(one, loaded, settings, console, failures)
        if found.images:
            scored.append(found)
        if len(found.images) < len(one.items):
            failures.append(f"interrupted: {len(found.images)} of {len(one.items)} images of {one.name} are scored")
            if not scored:
                raise KeyboardInterrupt
            return scored, True
    return scored, False


def _score(
    images: ImageSet,
    loaded: dict[MetricInfo, object],
    settings: EvaluateConfig,
    console: Console,
    failures: list[str],
) -> ScoredSet:
    """The scores of one set, of fewer images after Ctrl-C; `failures` gets what can't be computed of it as a whole."""
    from pdd_cli.iqa.metrics import score, score_set
    from pdd_cli.iqa.report import ScoredSet

    items = list(images.items.values())
    scored: list[ImageScores] = []
    with console.progress(transient=True) as progress, contextlib.suppress(KeyboardInterrupt):
        task = progress.add_task(f"score {images.name}", total=len(items), note="")
        scoring = score(
            items,
            loaded,
            crop_border=settings.crop_border,
            on_start=lambda item: progress.update(task, note=item.image.name),
        )
        with contextlib.closing(scoring):
            for scores in scoring:
                scored.append(scores)
                progress.update(task, advance=1)
    together = {}
    for info, metric in loaded.items():
        if info.of_sets and len(scored) == len(items):
            try:
                together[info.name] = score_set(items, info, metric)
            except PddError as error:
                failures.append(f"{images.name}: {error.message}")
    return ScoredSet(images.name, dict(zip(images.items, scored, strict=False)), together)


def _show(report: Report, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        Column("image", overflow="fold", footer="mean"),
        *(
            Column(f"{metric.name} {metric.arrow}", justify="right", footer=_number(report.main.mean(metric)))
            for metric in report.metrics
        ),
        show_footer=True,
        title=escape(report.main.name) if report.baselines else None,
    )
    for name, scores in list(report.main.images.items())[:_ROWS]:
        table.add_row(escape(name), *(_number(scores.values.get(metric.name)) for metric in report.metrics))
    console.table(table)
    if len(report.main.images) > _ROWS:
        console.say(f"{len(report.main.images) - _ROWS} more images are not shown: --output scores.csv has them all")
    if report.baselines:
        _show_comparison(report, console)
    console.say(report.about)


def _show_comparison(report: Report, console: Console) -> None:
    """Models x metrics; below, the difference to each baseline with its interval; then the verdicts in words."""
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        "mean over images",
        *(Column(f"{metric.name} {metric.arrow}", justify="right") for metric in report.metrics),
        title="comparison, with 95 % intervals of the mean difference",
    )
    for one in [*report.baselines, report.main]:
        table.add_row(escape(one.name), *(_number(one.mean(metric)) for metric in report.metrics))
    for baseline in report.baselines:
        known = {one.metric: one for one in report.against(baseline)}
        cells = [
            f"{known[metric].mean:+.4f}\n{known[metric].low:+.4f} … {known[metric].high:+.4f}\n"
            f"better {known[metric].wins}, worse {known[metric].losses}"
            if metric in known
            else "–"
            for metric in report.metrics
        ]
        table.add_section()
        table.add_row(escape(f"{report.main.name} − {baseline.name}"), *cells)
    console.table(table)
    for baseline in report.baselines:
        console.say(report.verdict(baseline))


def _conclude(
    report: Report,
    settings: EvaluateConfig,
    console: Console,
    lacking: Sequence[PddError],
) -> None:
    """Name what went wrong, and raise what the exit code asks for."""
    for problem in report.problems:
        console.warn(problem)
    if lacking:
        raise _summed(lacking)
    checked = [one for one in report.comparisons if one.metric.name in settings.fail_if_worse]
    worse = [one for one in checked if one.verdict == "worse"]
    if worse:
        named = ", ".join(f"{one.metric.name} than {one.theirs} ({one.change})" for one in worse)
        raise CheckFailed(f"--fail-if-worse: {report.main.name} is worse by {named}")
    if any(one.verdict == "too few" for one in checked):
        console.warn("--fail-if-worse: too few images to tell, so nothing failed")
    if report.problems:
        count = len(report.problems)
        named = "1 problem, named above" if count == 1 else f"{count} problems, each named above"
        scored = any(scores.values for one in report.sets for scores in one.images.values())
        raise PartialFailure(named, "The rest is scored." if scored else "Nothing could be scored.")


def _list_metrics(console: Console) -> None:
    from importlib.metadata import version

    from rich.table import Column, Table

    from pdd_cli.iqa.metrics import CONSISTENCY, DRIFT, metric_infos
    from pdd_cli.iqa.pyiqa_adapter import metric_names, weights_here

    kinds = {"none": "no reference", "full": "ground truth", "lr": "LR input"}
    here = weights_here()
    rows = [
        *((info, here[info.name]) for info in metric_infos(metric_names())),
        (CONSISTENCY, "needs none"),
        (DRIFT, "needs none"),
    ]
    table = Table("metric", "compares with", "better", "range", Column("weights", overflow="fold"))
    for info, state in rows:
        compares = "HR, as a set" if info.of_sets and info.reference == "full" else kinds[info.reference]
        table.add_row(info.name, compares, "lower" if info.lower_better else "higher", info.value_range, state)
    console.table(table)
    console.say(
        f"pyiqa {version('pyiqa')}, for non-commercial use (PolyForm Noncommercial; parts: S-Lab). Ranges are rough. "
        "Weights are brought by pdd fetch-weights --metrics A,B."
    )
    console.result(
        {
            "pyiqa": version("pyiqa"),
            "licence": "PolyForm Noncommercial 1.0.0 and S-Lab 1.0 (parts)",
            "metrics": [
                {
                    "name": info.name,
                    "reference": info.reference,
                    "better": "lower" if info.lower_better else "higher",
                    "range": info.value_range,
                    "weights": state,
                }
                for info, state in rows
            ],
        }
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
