"""The means of an evaluation as a table in Markdown or LaTeX, for papers and wikis: a row for each set of images."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdd_cli.iqa.metrics import MetricInfo
    from pdd_cli.iqa.report import Report

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": "--", "–": "--", "Δ": r"$\Delta$", "…": r"\ldots{}",
}  # fmt: skip


def as_markdown(report: Report) -> str:
    """A table whose best values are bold, and how it was made."""
    head = ["model", *(metric.title for metric in report.metrics)]
    lines = [_row(map(_markdown, head)), _row(["---", *("---:" for _ in report.metrics)])]
    for one in [*report.baselines, report.main]:
        cells = (
            f"**{value}**" if one.name in report.best(metric) else value
            for metric in report.metrics
            for value in [_number(one.mean(metric), metric, "–")]
        )
        lines.append(_row([_markdown(one.name), *cells]))
    lines += ["", f"Means over {len(report.main.images)} images. {_markdown(report.about)}"]
    lines += [f"{_markdown(line)}  " for line in report.origin_lines]
    return "\n".join(lines).rstrip() + "\n"


def as_latex(report: Report) -> str:
    r"""A table for the package booktabs whose best values are bold. How it was made is in comments."""
    arrows = {True: r"$\downarrow$", False: r"$\uparrow$"}
    heads = [f"{_latex(metric.name)} {arrows[metric.lower_better]}" for metric in report.metrics]
    rows = []
    for one in [*report.baselines, report.main]:
        cells = (
            rf"\textbf{{{value}}}" if one.name in report.best(metric) else value
            for metric in report.metrics
            for value in [_number(one.mean(metric), metric, "--")]
        )
        rows.append(" & ".join([_latex(one.name), *cells]) + r" \\")
    comments = [f"Means over {len(report.main.images)} images. {report.about}", *report.origin_lines]
    return "\n".join(
        [
            *(f"% {' '.join(line.splitlines())}" for line in comments),
            rf"\begin{{tabular}}{{l{'r' * len(report.metrics)}}}",
            r"\toprule",
            " & ".join(["Model", *heads]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _number(value: float | None, metric: MetricInfo, none: str) -> str:
    """Two decimals for decibels, four for others, as papers write them."""
    return none if value is None else f"{value:.{2 if metric.unit == 'dB' else 4}f}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    """`text` with Markdown's special characters escaped, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
