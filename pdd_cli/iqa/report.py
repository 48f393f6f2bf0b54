"""Scores → means, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pdd_cli import __version__
from pdd_cli.errors import InputError
from pdd_cli.files import write_text
from pdd_cli.iqa.metrics import ImageScores, MetricInfo

FORMATS = (".csv", ".json")


@dataclass(frozen=True)
class Report:
    """One evaluation: all scores, and what they were computed with."""

    metrics: Sequence[MetricInfo]
    images: Sequence[ImageScores]
    crop_border: int
    skipped: dict[str, str]  # metrics that were not computed, and why

    def mean(self, metric: MetricInfo) -> float | None:
        """The mean over the images that have a score; None where none has."""
        values = [scores.values[metric.name] for scores in self.images if metric.name in scores.values]
        return sum(values) / len(values) if values else None

    def as_document(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "pdd": __version__,
            "pyiqa": version("pyiqa"),
            "colour_space": "RGB",
            "crop_border": self.crop_border,
            "metrics": [
                {
                    "name": metric.name,
                    "reference": "full" if metric.full_reference else "none",
                    "better": "lower" if metric.lower_better else "higher",
                    "range": metric.value_range,
                    "mean": self.mean(metric),
                    "images": sum(metric.name in scores.values for scores in self.images),
                }
                for metric in self.metrics
            ],
            "skipped": self.skipped,
            "images": [
                {
                    "image": str(scores.item.image),
                    "reference": str(scores.item.reference) if scores.item.reference else None,
                    "scores": scores.values,
                    "problems": scores.problems,
                }
                for scores in self.images
            ],
        }

    def as_csv(self) -> str:
        """A row an image, a column a metric; the last row holds the means."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [metric.name for metric in self.metrics]
        writer.writerow(["image", "reference", *names])
        for scores in self.images:
            values = [scores.values.get(name, "") for name in names]
            writer.writerow([scores.item.image, scores.item.reference or "", *values])
        means = [self.mean(metric) for metric in self.metrics]
        writer.writerow(["mean", "", *("" if mean is None else mean for mean in means)])
        return text.getvalue()


def check_format(path: Path) -> None:
    """Raises InputError for a suffix that no report is written in."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--output {path}: not a kind of report", f"Its name must end with {' or '.join(FORMATS)}.")


def write_report(path: Path, report: Report) -> None:
    """Write `report` in the format of the suffix, whole or not at all."""
    check_format(path)
    if path.suffix.lower() == ".csv":
        write_text(path, report.as_csv())
    else:
        write_text(path, json.dumps(report.as_document(), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
