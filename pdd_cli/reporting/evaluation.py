"""The report of an evaluation as one self-contained HTML page: tables, plots, and the best and worst images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.errors import InputError, PddError
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.image import Array
from pdd_cli.iqa.compare import Comparison
from pdd_cli.iqa.metrics import Item, MetricInfo
from pdd_cli.own_files import check_own_file, write_own_file
from pdd_cli.reporting.html import (
    GALLERY,
    anchor,
    card,
    figure,
    lr_views,
    number,
    page,
    scroll,
    short,
    spaced,
    view,
    window,
)
from pdd_cli.reporting.tables import as_latex, as_markdown

if TYPE_CHECKING:
    from pdd_cli.iqa.report import Report

FORMATS = (".csv", ".json", ".html", ".md", ".tex")
_SHOWN = 6  # number of best images, and of worst images
_FIDELITY = ("psnr", "psnry", "ssim", "ssimc", "ms_ssim", "cw_ssim", "fsim", "vif", "vsi", "downscale_consistency")


def as_page(report: Report) -> str:
    """The page. Of large images it shows the part in which the sets differ most, at full resolution."""
    metric, ranked = _ranking(report)
    several = len(ranked) > 2 * _SHOWN
    groups = {"best": ranked[:_SHOWN], "worst": ranked[: -_SHOWN - 1 : -1]} if several else {"all": ranked}
    cards = []
    for group, names in groups.items():
        cards += [made for name in names if (made := _card(report, name, group))]
    by = f"<p>By {escape(metric.name)}{', by difference' if report.baselines else ''}.</p>" if metric else ""
    return page(
        f"{report.main.name}: scores of {len(report.main.images)} images",
        "\n".join(
            [
                _summary(report),
                scroll("Means", f'<table id="means">{_means(report)}</table>'),
                _plots(report),
                "<h2>Images</h2>",
                by,
                GALLERY,
                "<h2>All images</h2>",
                scroll("All images", f'<table id="all">{_table(report, {one["name"] for one in cards})}</table>'),
                _problems(report),
                f"<footer><p>{_about(report)}</p></footer>",
            ]
        ),
        cards,
    )


# --- text and tables --------------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    if report.baselines:
        lines = [report.verdict(baseline) for baseline in report.baselines]
    else:
        shown = (f"{metric.name} {number(report.main.mean(metric))} {metric.arrow}" for metric in report.metrics)
        lines = [f"Means: {', '.join(shown)}"]
    return "".join(f'<p class="verdict">{escape(line)}</p>' for line in lines)


def _means(report: Report) -> str:
    """The means of all metrics (rows) and sets (columns), and the differences with their confidence intervals."""
    sets = [*report.baselines, report.main]
    titles = [*(one.name for one in sets), *(f"{report.main.name} − {baseline.name}" for baseline in report.baselines)]
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    known = {(one.metric, one.theirs): one for one in report.comparisons}
    rows = [
        f'<tr><th scope="row">{_title(metric)}</th>'
        + "".join(_mean(one.mean(metric), best=one.name in report.best(metric)) for one in sets)
        + "".join(_difference(known.get((metric, baseline.name))) for baseline in report.baselines)
        + "</tr>"
        for metric in report.metrics
    ]
    return f"<thead><tr><th>mean</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"


def _mean(value: float | None, *, best: bool) -> str:
    return f'<td class="best"><b>{number(value)}</b></td>' if best else f"<td>{number(value)}</td>"


def _difference(one: Comparison | None) -> str:
    if one is None:
        return "<td>–</td>"
    kind = {"better": "better", "worse": "worse"}.get(one.verdict, "")
    return (
        f'<td class="{kind}"><b>{number(one.mean, signed=True)}</b> ({escape(one.change)})<br>'
        f"<small>95 %: {number(one.low, signed=True)} … {number(one.high, signed=True)}<br>"
        f"better on {one.wins}, worse on {one.losses} of {len(one.differences)}: {one.verdict}</small></td>"
    )


def _table(report: Report, shown: set[str]) -> str:
    """The table of all images, sortable by each column."""
    columns: list[tuple[str, Mapping[str, float]]] = [
        (_title(metric), report.main.values(metric)) for metric in report.metrics
    ]
    for baseline in report.baselines:
        columns += [
            (f"{_title(metric)}<br><small>{escape(baseline.name)}</small>", baseline.values(metric))
            for metric in report.metrics
        ]
    columns += [
        (f"Δ {_title(one.metric)}<br><small>− {escape(one.theirs)}</small>", one.differences)
        for one in report.comparisons
    ]
    head = "".join(
        f'<th scope="col"><button type="button">{title}</button></th>' for title in ("image", *(t for t, _ in columns))
    )
    rows = []
    for name in report.main.images:
        link = f'<a href="#{escape(anchor(name))}">{escape(name)}</a>' if name in shown else escape(name)
        cells = "".join(
            f'<td data-value="{values[name]!r}">{number(values[name])}</td>' if name in values else "<td>–</td>"
            for _, values in columns
        )
        rows.append(f'<tr><th scope="row" data-value="{escape(name)}">{link}</th>{cells}</tr>')
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"


def _problems(report: Report) -> str:
    if not report.unscored:
        return ""
    return f"<h2>Not scored</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in report.unscored)}</ul>"


def _about(report: Report) -> str:
    about = escape(
        f"{report.about} Intervals: 95 %, bootstrap over images. The images here are compressed; the scores are "
        "those of the files. JSON and CSV reports contain the same numbers."
    )
    return "<br>".join([about, *map(escape, report.origin_lines)])


def _title(metric: MetricInfo) -> str:
    return f'<span title="{metric.better} is better">{escape(metric.name)} {metric.arrow}</span>'


# --- images ------------------------------------------------------------------------------------------------------


def _ranking(report: Report) -> tuple[MetricInfo | None, list[str]]:
    """The metric by which images are ranked, and the images, best first."""
    if report.comparisons:
        first = report.comparisons[0]
        values, metric = first.differences, first.metric
    else:
        scored = [metric for metric in report.metrics if report.main.values(metric)]
        if not scored:
            return None, []
        metric = scored[0]
        values = report.main.values(metric)
    return metric, sorted(values, key=lambda name: values[name], reverse=not metric.lower_better)


def _card(report: Report, name: str, group: str) -> dict[str, Any] | None:
    """One image with all its views, cropped to the same window; None if it can no longer be read."""
    item = report.main.images[name].item
    sr = _read(item)
    if sr is None:
        return None
    size = sr.shape[:2]
    views = [
        (baseline.name, pixels)
        for baseline in report.baselines
        if name in baseline.images and (pixels := _read(baseline.images[name].item)) is not None
    ]
    hr = _read(Item(item.reference)) if item.reference else None
    views = [(label, pixels) for label, pixels in [*views, (report.main.name, sr)] if pixels.shape[:2] == size]
    if hr is not None and hr.shape[:2] == size:
        views.append(("HR", hr))
    x, y, width, height = window(sr, next((pixels for _, pixels in views if pixels is not sr), None))
    encoded = [view(label, np.ascontiguousarray(pixels[y : y + height, x : x + width])) for label, pixels in views]
    lr = _read(Item(item.lr)) if item.lr else None
    if lr is not None and lr.shape[0] < size[0]:
        across, down = lr.shape[1] / size[1], lr.shape[0] / size[0]
        box = (x * across, y * down, (x + width) * across, (y + height) * down)
        encoded = lr_views(lr, (width, height), box) + encoded
    whole = (width, height) == (size[1], size[0])
    return card(
        name,
        encoded,
        (width, height),
        main=report.main.name,
        group=group,
        note="" if whole else f"{width}x{height} of {size[1]}x{size[0]} pixels, from {x}, {y}",
        scores=[
            {"set": one.name, "values": [one.images[name].values.get(metric.name) for metric in report.metrics]}
            for one in [*report.baselines, report.main]
            if name in one.images
        ],
        metrics=[metric.title for metric in report.metrics],
    )


def _read(item: Item) -> Array | None:
    try:
        return read_image(item.image).to_rgb8()
    except PddError:
        return None  # already listed among the problems


# --- plots ------------------------------------------------------------------------------------------------------


def _plots(report: Report) -> str:
    drawn = "".join([*(_bars(one) for one in report.comparisons), _scatter(report)])
    return f'<h2>Plots</h2><div class="plots">{drawn}</div>' if drawn else ""


def _bars(one: Comparison) -> str:
    """A bar chart of the sorted differences of all images, with the mean and its confidence interval."""
    width, height, left, top = 340, 180, 62, 12
    ranked = sorted(one.differences.items(), key=lambda pair: pair[1])
    low, high = min(0.0, ranked[0][1]), max(0.0, ranked[-1][1])
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return top + (high - value) / span * (height - 2 * top)

    step = (width - left - 8) / len(ranked)
    bars = []
    for index, (name, value) in enumerate(ranked):
        kind = "same" if value == 0 else "good" if (value < 0) == one.metric.lower_better else "bad"
        bars.append(
            f'<rect class="{kind}" x="{left + index * step:.2f}" y="{min(at(0), at(value)):.2f}" '
            f'width="{max(step * 0.85, 0.3):.2f}" height="{max(abs(at(value) - at(0)), 0.5):.2f}">'
            f"<title>{escape(name)}: {number(value, signed=True)}</title></rect>"
        )
    marks = "".join(
        f'<text x="{left - 6}" y="{at(value) + 4:.1f}" text-anchor="end">{short(value)}</text>'
        for value in spaced([0.0, low, high], span * 0.12)
    )
    interval = (
        f'<rect class="interval" x="{left}" y="{at(one.high):.2f}" width="{width - left - 8}" '
        f'height="{max(at(one.low) - at(one.high), 1):.2f}"><title>95 % interval of the mean: '
        f"{number(one.low, signed=True)} … {number(one.high, signed=True)}</title></rect>"
        f'<line class="mean" x1="{left}" x2="{width - 8}" y1="{at(one.mean):.2f}" y2="{at(one.mean):.2f}"/>'
    )
    label = (
        f"{one.metric.name} {one.metric.arrow}: {one.ours} − {one.theirs}, "
        f"better on {one.wins} of {len(one.differences)}"
    )
    axis = f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{at(0):.2f}" y2="{at(0):.2f}"/>'
    return figure(label, (width, height), f"{''.join(bars)}{axis}{interval}{marks}")


def _scatter(report: Report) -> str:
    """A scatter plot of perception against fidelity: a dot for each image, a ring for the mean of each set.

    Empty if no metric of one of the two kinds was computed.
    """
    across = next((metric for metric in report.metrics if metric.name in _FIDELITY), None)
    learned = [metric for metric in report.metrics if metric.name not in _FIDELITY and metric.reference != "lr"]
    up = next((metric for metric in learned), None)
    if across is None or up is None:
        return ""
    points = [
        (index, one.name, name, x, one.values(up)[name])
        for index, one in enumerate(report.sets)
        for name, x in one.values(across).items()
        if name in one.values(up)
    ]
    if not points:
        return ""
    width, height, left, bottom, top = 340, 260, 52, 40, 26
    xs, ys = [x for *_, x, _ in points], [y for *_, y in points]

    def at(x: float, y: float) -> tuple[float, float]:
        horizontal = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        vertical = (y - min(ys)) / ((max(ys) - min(ys)) or 1)
        return left + horizontal * (width - left - 14), height - bottom - vertical * (height - bottom - top)

    drawn = []
    for index, of, name, x, y in points:
        cx, cy = at(x, y)
        drawn.append(
            f'<circle class="dot set{index % 4}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{escape(of)}, {escape(name)}:'
            f" {across.name} {number(x)}, {up.name} {number(y)}</title></circle>"
        )
    for index, one in enumerate(report.sets):
        mine = [(x, y) for i, _, _, x, y in points if i == index]
        if not mine:
            continue
        cx, cy = at(float(np.mean([x for x, _ in mine])), float(np.mean([y for _, y in mine])))
        drawn.append(
            f'<circle class="ring set{index % 4}" cx="{cx:.1f}" cy="{cy:.1f}" r="7"><title>mean of {escape(one.name)}'
            "</title></circle>"
        )
    legend = "".join(
        f'<circle class="dot set{i % 4}" cx="{left + 8}" cy="{top - 14 + 14 * i}" r="4"/>'
        f'<text x="{left + 16}" y="{top - 10 + 14 * i}">{escape(one.name)}</text>'
        for i, one in enumerate(report.sets)
    )
    axes = (
        f'<path class="axis" fill="none" d="M{left - 6} {top - 6}V{height - bottom + 6}H{width - 6}"/>'
        f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">{escape(across.name)} {across.arrow}: '
        f"{short(min(xs))} to {short(max(xs))}</text>"
        f'<text x="12" y="{height - bottom}" transform="rotate(-90 12 {height - bottom})">{escape(up.name)} '
        f"{up.arrow}: {short(min(ys))} to {short(max(ys))}</text>"
    )
    label = f"perception ({up.name}) against fidelity ({across.name}); rings are means"
    return figure(label, (width, height), f"{axes}{''.join(drawn)}{legend}")


def check_format(path: Path) -> None:
    """Raise InputError if there is no report format with this suffix, or a file that pdd didn't write is there."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--output {path}: not a report format", f"The name must end in {', '.join(FORMATS)}.")
    check_own_file(path, "--output")


def write_report(path: Path, report: Report) -> None:
    """Write `report` atomically in the format of the suffix."""
    check_format(path)
    match path.suffix.lower():
        case ".csv":
            text = report.as_csv()
        case ".json":
            text = json.dumps(report.as_document(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        case ".md":
            text = as_markdown(report)
        case ".tex":
            text = as_latex(report)
        case _:
            text = as_page(report)
    write_own_file(path, text, "--output")
