"""The report of a run as one HTML page: verdict, curves, images of the base and the adapted model, settings, events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from pdd_cli.data.datasets import RGB
from pdd_cli.reporting.html import GALLERY, card, figure, lr_views, number, page, scroll, short, spaced, view
from pdd_cli.reporting.weights import flatten
from pdd_cli.version import __version__

_LOSSES = ("pixel", "perceptual", "adversarial", "inter", "intra", "consistency", "feature_distance",
           "teacher", "lattice")  # fmt: skip
_MAX_POINTS = 150  # of a curve
_MAX_DOTS = 60  # curves with at most this many points get dots with tooltips
_VALIDATION = {"psnr": "PSNR (dB), higher is better", "ssim": "SSIM, higher is better",
          "distance": "feature distance, lower is better"}  # fmt: skip
_WITH_TRUTH = {"held_out_pairs": "held-out pairs", "truth": "ground truth"}

Series = Sequence[tuple[float, float]]  # (step, value)
Line = Mapping[str, Any]  # a line of log.jsonl or judgements.jsonl


@dataclass(frozen=True, eq=False)
class ReportImage:
    """One image: LR (h, w, 3), its upscaled versions by the base and the adapted weights, and HR if it is known."""

    name: str
    group: str
    lr: RGB
    base: RGB
    adapted: RGB
    hr: RGB | None = None


@dataclass(frozen=True, eq=False)
class RunReport:
    """The content of the page. `verdict` is the content of verdict.json; None if the run is not finished."""

    name: str
    steps: int  # done
    max_steps: int
    facts: Mapping[str, str]
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    log: Sequence[Line]
    judgements: Sequence[Line]
    base: Mapping[str, Any]  # scores of the base
    verdict: Mapping[str, Any] | None
    validation: str  # the validation scores as text
    images: Sequence[ReportImage]
    teacher: str = ""  # a student beside its teacher, as text


def as_page(report: RunReport) -> str:
    """The self-contained HTML page."""
    cards = [_card(image, _label(report)) for image in report.images]
    return page(
        f"{report.name}: {_outcome(report)}",
        "\n".join(
            [
                _summary(report),
                _strengths(report),
                *(["<h2>Images</h2>", GALLERY] if cards else ['<div id="gallery"></div>']),
                "<h2>Curves</h2>",
                f'<div class="plots">{"".join(_plots(report))}</div>',
                _events(report.log),
                "<h2>Judgements</h2>",
                scroll("Judgements", f'<table id="all">{_judgements(report.judgements)}</table>'),
                "<h2>Settings</h2>",
                '<p class="note">Values that differ from the default are bold.</p>',
                scroll("Settings", f'<table id="settings">{_settings(report)}</table>'),
                f"<footer><p>{_about(report)}</p></footer>",
            ]
        ),
        cards,
    )


# --- text and tables --------------------------------------------------------------------------------------------


def _outcome(report: RunReport) -> str:
    if report.verdict is None:
        return f"stopped after step {report.steps} of {report.max_steps}"
    return {True: "keep", False: "reject", None: "not judged"}[report.verdict["keep"]]


def _summary(report: RunReport) -> str:
    if report.verdict is None:
        lines = [
            f"Not finished: stopped after step {report.steps} of {report.max_steps}. "
            "The same command with --resume continues it."
        ]
    else:
        lines = [f"{_outcome(report).capitalize()}: {report.verdict['reason']}."]
    lines += [f"{text[0].upper()}{text[1:]}." for text in (report.teacher, report.validation) if text]
    lines_html = "".join(f'<p class="verdict">{escape(line)}</p>' for line in lines)
    if report.verdict is None:
        return lines_html
    if report.verdict["keep"] is not False:
        strength = report.verdict["strength"]
        more = f" --strength {strength:g}" if strength < 1 else ""
        lines_html += f"<p>Use it: <code>pdd upscale IN OUT --weights {escape(report.name)}{more}</code></p>"
    else:
        lines_html += (
            "<p>Look at the images before you use the weights. More images from the same source, or --hr-dir, may "
            "help.</p>"
        )
    if report.steps < report.max_steps:
        lines_html += (
            f"<p>Stopped early after step {report.steps} of {report.max_steps}: the judgements no longer improved.</p>"
        )
    return lines_html


def _strengths(report: RunReport) -> str:
    """The table of the base and of the best weights at each strength."""
    if report.verdict is None:
        return ""
    rows = [("base", {"score": 0.0, **report.verdict["base"]})]
    rows += [("teacher", report.verdict["teacher"])] if "teacher" in report.verdict else []
    rows += [(f"strength {found['strength']:g}", found) for found in report.verdict["adapted"]]
    columns = _columns(found for _, found in rows)
    chosen = f"strength {report.verdict['strength']:g}"
    body = "".join(
        f'<tr><th scope="row">{f"<b>{name}</b>" if name == chosen else name}</th>'
        + "".join(f"<td>{number(_value(found, key))}</td>" for key in columns)
        + "</tr>"
        for name, found in rows
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in columns.values())
    table = f'<table id="means"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    note = (
        '<p class="note">Means over the held-out images: consistency with the LR (dB), colour drift (ΔE), fine detail, '
        "grain, noise copied from the LR and fine error (8-bit levels). "
        + (
            "The score is the mean of the gains in PSNR and feature distance on the held-out pairs, in dB.</p>"
            if "held_out_pairs" in report.verdict["base"]
            else "The score is the gain in consistency, at most 2 dB, less lost detail, added grain, copied noise and "
            "a much smaller fine error, in dB.</p>"
        )
    )
    return scroll("By strength", table) + note


def _judgements(lines: Sequence[Line]) -> str:
    columns = _columns(lines)
    titles = ("step", "weights", *columns.values())
    head = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in titles)
    rows = "".join(
        f'<tr><th scope="row" data-value="{line["step"]}">{line["step"]}</th>'
        f'<td data-value="{len(line["which"])}">{_weights(line["which"])}</td>'
        + "".join(
            "<td>–</td>" if (value := _value(line, key)) is None else f'<td data-value="{value!r}">{number(value)}</td>'
            for key in columns
        )
        + "</tr>"
        for line in lines
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _columns(lines: Iterable[Line]) -> dict[str, str]:
    """Key → title of the columns for the values in the lines."""
    columns = {"score": "score", "consistency": "consistency", "drift": "colour drift"}
    columns |= {"texture": "fine detail", "grain": "grain", "copied_noise": "copied noise", "fine_error": "fine error"}
    if any("truth" in line for line in lines):
        columns |= {"truth.psnr": "PSNR", "truth.ssim": "SSIM", "truth.distance": "feature distance"}
    if any("held_out_pairs" in line for line in lines):
        columns |= {
            "held_out_pairs.psnr": "PSNR (held-out pairs)",
            "held_out_pairs.ssim": "SSIM (held-out pairs)",
            "held_out_pairs.distance": "feature distance (held-out pairs)",
        }
    return columns


def _value(line: Line, key: str) -> float | None:
    """The value at a dotted key."""
    value: Any = line
    for part in key.split("."):
        value = value.get(part) if value else None
    return None if value is None else float(value)


def _weights(which: str) -> str:
    return {"ema": "moving average"}.get(which, which)


def _events(log: Sequence[Line]) -> str:
    events = [line["event"] for line in log if line.get("event")]
    if not events:
        return ""
    return f"<h2>Events</h2><ul>{''.join(f'<li>{escape(event)}</li>' for event in events)}</ul>"


def _settings(report: RunReport) -> str:
    settings, defaults = flatten(report.settings), flatten(report.defaults)
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{_shown(value, changed=defaults.get(key) != value)}</td></tr>'
        for key, value in settings.items()
    )
    return f'<thead><tr><th scope="col">key</th><th scope="col">value</th></tr></thead><tbody>{rows}</tbody>'


def _shown(value: object, *, changed: bool) -> str:
    listed = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = escape({"None": "–", "False": "off", "True": "on"}.get(listed, listed))
    return f"<b>{text}</b>" if changed else text


def _about(report: RunReport) -> str:
    minutes = sum(line["seconds"] for line in report.log) / 60
    facts = "; ".join(f"{key}: {value}" for key, value in report.facts.items())
    return escape(f"pdd {__version__}. {facts}. {report.steps} steps in {minutes:.1f} minutes. Images are compressed.")


# --- images ------------------------------------------------------------------------------------------------------


def _label(report: RunReport) -> str:
    if report.verdict is None or not report.verdict["keep"]:
        return "adapted"
    return f"adapted, strength {report.verdict['strength']:g}"


def _card(image: ReportImage, label: str) -> dict[str, Any]:
    size = (image.base.shape[1], image.base.shape[0])
    views = [*lr_views(image.lr, size), view("base", image.base), view(label, image.adapted)]
    if image.hr is not None:
        views.append(view("HR", image.hr))
    return card(image.name, views, size, main=label, group=image.group)


# --- curves -----------------------------------------------------------------------------------------------------


def _plots(report: RunReport) -> list[str]:
    """Plots of the scores, validation scores, losses and learning rate, as far as they were measured."""
    log = list({line["step"]: line for line in report.log}.values())  # the last line of each repeated step
    plots = []
    if report.judgements:
        plots.append(
            _plot("score of the judgements (dB over the base, which has 0)", _by_weights(report, "score"), level=0)
        )
    for pairs, kind in _WITH_TRUTH.items():
        for measure, title in _VALIDATION.items():
            key = f"{pairs}.{measure}"
            if (base := _value(report.base, key)) is not None:
                plots.append(_plot(f"{kind}: {title}; base dashed", _by_weights(report, key), level=base))
    for name in _LOSSES:
        if values := _log_values(log, name):
            plots.append(_plot(f"loss: {name}", {"each step": _binned(values), "smoothed": _binned(_smoothed(values))}))
    both = {kind: _log_values(log, f"discriminator_{kind}") for kind in ("real", "fake")}
    if log:
        plots.append(_plot("loss: discriminator, on HR and on SR",
                           {kind: _binned(_smoothed(values)) for kind, values in both.items()}))  # fmt: skip
        plots.append(_plot("learning rate", {"": _log_values(log, "learning_rate")}, level=0))
    return plots


def _by_weights(report: RunReport, key: str) -> dict[str, Series]:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in report.judgements:
        if (value := _value(line, key)) is not None:
            series.setdefault(_weights(line["which"]), []).append((line["step"], value))
    return dict(series)


def _log_values(log: Sequence[Line], key: str) -> Series:
    return [(line["step"], line[key]) for line in log if key in line and np.isfinite(line[key])]


def _smoothed(values: Series) -> Series:
    """The moving average over a tenth of all steps."""
    span = max(4, len(values) // 10)
    sums = np.concatenate([[0.0], np.cumsum([value for _, value in values])])
    smoothed = []
    for index, (step, _) in enumerate(values, 1):
        start = max(0, index - span)
        smoothed.append((step, float(sums[index] - sums[start]) / (index - start)))
    return smoothed


def _binned(values: Series) -> Series:
    """Means of equal bins, so that a plot has at most `_MAX_POINTS` points."""
    if len(values) <= _MAX_POINTS:
        return values
    parts = np.array_split(np.array(values), _MAX_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _plot(label: str, series: Mapping[str, Series], *, level: float | None = None) -> str:
    """A line plot over the steps. `level` is a dashed reference line; a series named "each step" is drawn faintly."""
    width, height, left, right, top, bottom = 340, 190, 52, 8, 24, 24
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    steps, values = [step for step, _ in points], [value for _, value in points]
    values += [] if level is None else [level]
    low, high = min(values), max(values)
    first, last = min(steps), max(steps)

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / ((last - first) or 1)
        up = (value - low) / (high - low) if high > low else 0.5
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    drawn: list[str] = []
    legend: list[str] = []
    for index, (name, line) in enumerate(series.items()):
        kind = "set3 faint" if name == "each step" else f"set{index % 4}"
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in line)
        drawn.append(f'<polyline class="line {kind}" points="{path}"/>')
        if level is not None and len(line) <= _MAX_DOTS:
            drawn += [
                f'<circle class="dot {kind}" cx="{at(*point)[0]:.1f}" cy="{at(*point)[1]:.1f}" r="3">'
                f"<title>{escape(name)} step {point[0]:g}: {number(point[1])}</title></circle>"
                for point in line
            ]
        if len(series) > 1 and name != "each step":
            x = left + 4 + 110 * len(legend)
            legend.append(
                f'<circle class="dot {kind}" cx="{x}" cy="10" r="4"/><text x="{x + 8}" y="14">{escape(name)}</text>'
            )
    marks = spaced([*([] if level is None else [level]), low, high], (high - low) * 0.12)
    labels = "".join(
        f'<text x="{left - 6}" y="{at(first, value)[1] + 4:.1f}" text-anchor="end">{short(value)}</text>'
        for value in marks
    )
    labels += f'<text x="{left}" y="{height - 6}">step {first:g}</text>'
    labels += f'<text x="{width - right}" y="{height - 6}" text-anchor="end">{last:g}</text>'
    axis = f'<path class="axis" fill="none" d="M{left} {top - 4}V{height - bottom + 4}H{width - right}"/>'
    if level is not None:
        y = at(first, level)[1]
        axis += f'<line class="mean" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return figure(label, (width, height), f"{axis}{''.join(drawn)}{labels}{''.join(legend)}")
