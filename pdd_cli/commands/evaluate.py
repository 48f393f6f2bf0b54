"""`pdd evaluate`."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from pdd_cli.console import Console
from pdd_cli.options import Call, command
from pdd_cli.settings.base import Settings
from pdd_cli.settings.evaluate import EvaluateConfig

if TYPE_CHECKING:
    from pdd_cli.iqa.report import Report

_ROWS = 60  # of the table on screen; --output has all
_NEXT = "next: the same command with --output scores.html makes a page that shows the images"


def _evaluate(call: Call[EvaluateConfig, Settings]) -> None:
    """Score images with any metric of pyiqa, and compare them with other results.

    Ground truth is optional: metrics that need it are skipped without it.
    Images that can't be read or compared are listed; the others are scored
    (exit code 3).

    Examples:
      pdd evaluate out/ --metrics niqe,musiq
      pdd evaluate out/ --gt-dir hr/ --metrics psnr,lpips --output report.html
    """
    console, settings = call.console, call.settings()
    if settings.metrics == ("list",):
        from pdd_cli.commands._metrics_list import list_metrics

        list_metrics(console)
        return

    from pdd_cli.batch.evaluation import evaluate as run_evaluation
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.reporting.evaluation import write_report

    command_line = shlex.join(["pdd", *sys.argv[1:]])
    evaluation = run_evaluation(settings, ConsoleObserver(console, transient=True), command=command_line)
    report = evaluation.report
    _show(report, console)
    console.result(report.as_document())
    if settings.output is not None:  # last, so that a failure to write does not lose the scores
        write_report(settings.output, report)
        console.say(f"report written to {settings.output}")
    if evaluation.interrupted:
        raise KeyboardInterrupt
    for problem in report.problems:
        console.warn(problem)
    if evaluation.too_few(settings.fail_if_worse):
        console.warn("--fail-if-worse: there are too few images for a verdict, so the check passes")
    evaluation.raise_for_failures(settings.fail_if_worse)
    page = settings.output if str(settings.output).lower().endswith(".html") else None
    console.say(f"next: open {page} in a browser" if page else _NEXT)


evaluate = command(EvaluateConfig, "evaluate", Settings, _evaluate)


def _show(report: Report, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        Column("image", overflow="fold", footer="mean"),
        *(Column(metric.title, justify="right", footer=_number(report.main.mean(metric))) for metric in report.metrics),
        show_footer=True,
        title=escape(report.main.name) if report.baselines else None,
    )
    for name, scores in list(report.main.images.items())[:_ROWS]:
        table.add_row(escape(name), *(_number(scores.values.get(metric.name)) for metric in report.metrics))
    console.table(table)
    if (more := len(report.main.images) - _ROWS) > 0:
        console.say(f"{more} more images are not shown: --output scores.csv has them all")
    if report.baselines:
        _show_comparison(report, console)
    console.say(report.about)


def _show_comparison(report: Report, console: Console) -> None:
    """A table of models and metrics with the difference to each baseline, then the verdicts in words."""
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        "mean over images",
        *(Column(metric.title, justify="right") for metric in report.metrics),
        title="comparison, with 95 % intervals of the mean difference; * best",
    )
    for one in [*report.baselines, report.main]:
        cells = (_marked(_number(one.mean(metric)), one.name in report.best(metric)) for metric in report.metrics)
        table.add_row(escape(one.name), *cells)
    for baseline in report.baselines:
        summaries = {one.metric: one.summary for one in report.against(baseline)}
        cells = (summaries.get(metric, "–") for metric in report.metrics)
        table.add_section()
        table.add_row(escape(f"{report.main.name} − {baseline.name}"), *cells)
    console.table(table)
    for baseline in report.baselines:
        console.say(report.verdict(baseline))


def _marked(number: str, best: bool) -> str:
    return f"[bold]{number} *[/bold]" if best else number


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
