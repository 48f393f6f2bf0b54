"""`pdd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pdd_cli.console import Console

if TYPE_CHECKING:
    from pdd_cli.iqa.report import Report

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
    from pdd_cli.settings.evaluate import EvaluateConfig
    from pdd_cli.settings.resolve import resolve

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

    from pdd_cli.batch.evaluation import evaluate as run_evaluation
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.reporting.evaluation import write_report

    evaluation = run_evaluation(settings, ConsoleObserver(console, transient=True))
    report = evaluation.report
    _show(report, console)
    console.result(report.as_document())
    if settings.output is not None:  # last: where it can't be written, the scores are shown all the same
        write_report(settings.output, report)
        console.say(f"report written to {settings.output}")
    if evaluation.interrupted:
        raise KeyboardInterrupt
    for problem in report.problems:
        console.warn(problem)
    if evaluation.too_few(settings.fail_if_worse):
        console.warn("--fail-if-worse: too few images to tell, so nothing failed")
    evaluation.raise_for_failures(settings.fail_if_worse)


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


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
