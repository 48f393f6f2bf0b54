"""The result of an evaluation: scores, means, comparisons; as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pdd_cli.iqa.compare import Comparison, compare, in_words
from pdd_cli.iqa.metrics import LUMA_METRICS, ImageScores, Luma, MetricInfo
from pdd_cli.version import __version__


@dataclass(frozen=True)
class ScoredSet:
    """One set of SR images: scores by the image's name, and `set_scores` of the whole set by metric."""

    name: str
    images: Mapping[str, ImageScores]
    set_scores: Mapping[str, float] = field(default_factory=dict)

    def values(self, metric: MetricInfo) -> dict[str, float]:
        """The scores by image, of those that have one."""
        return {
            image: scores.values[metric.name] for image, scores in self.images.items() if metric.name in scores.values
        }

    def mean(self, metric: MetricInfo) -> float | None:
        """The mean over the images that have a score, or the score of the whole set; None where there is none."""
        if metric.of_sets:
            return self.set_scores.get(metric.name)
        values = self.values(metric).values()
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Origin:
    """How a report came about. `command` is empty if it was made through the Python interface."""

    date: str  # UTC, ISO 8601
    command: str
    machine: str
    versions: Mapping[str, str]
    weights: Mapping[str, Sequence[str]]  # set → name and SHA-256 of the weights that made its images, where known


@dataclass(frozen=True)
class Report:
    """One evaluation: all scores, and what they were computed with. `baselines` are what `main` is compared with.

    `videos`: by the folder of their frames, which are files named by their numbers.
    """

    metrics: Sequence[MetricInfo]
    main: ScoredSet
    baselines: Sequence[ScoredSet]
    crop_border: int
    skipped: Mapping[str, str]  # metrics that were not computed, and why
    failures: Sequence[str] = ()  # that do not concern one image: files without a partner, metrics of a whole set
    luma: Luma = "full"  # of `LUMA_METRICS`
    origin: Origin | None = None
    videos: Mapping[Path, Path] = field(default_factory=dict)

    @property
    def sets(self) -> list[ScoredSet]:
        """All sets, `main` first."""
        return [self.main, *self.baselines]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """`main` with each baseline by each metric, in that order."""
        compared = (
            compare(metric, self.main.name, baseline.name, self.main.values(metric), baseline.values(metric))
            for baseline in self.baselines
            for metric in self.metrics
        )
        return [one for one in compared if one is not None]

    def against(self, baseline: ScoredSet) -> list[Comparison]:
        """The comparisons with one baseline."""
        return [one for one in self.comparisons if one.theirs == baseline.name]

    def verdict(self, baseline: ScoredSet) -> str:
        """The comparison of `main` with a baseline, in words."""
        return f"{self.main.name} against {baseline.name}: {in_words(self.against(baseline))}"

    @cached_property
    def problems(self) -> list[str]:
        """All that could not be paired, read or computed, each once."""
        of_images = (
            problem for one in self.sets for scores in one.images.values() for problem in scores.problems.values()
        )
        return list(dict.fromkeys([*self.failures, *of_images]))

    @property
    def unscored(self) -> list[str]:
        """The metrics that were skipped and why, and all problems."""
        return [*(f"{name} was skipped: it {reason}" for name, reason in self.skipped.items()), *self.problems]

    @property
    def about(self) -> str:
        """How the scores were computed: versions, colour space, crop; direction and range of each metric."""
        ranges = "; ".join(
            f"{metric.name}: {metric.better} is better, range {metric.value_range or '?'}" for metric in self.metrics
        )
        whole = [metric.name for metric in self.metrics if metric.reference == "lr"] if self.crop_border else []
        cropped = f"{self.crop_border} pixels left out at each side"
        cropped += f" ({', '.join(whole)}: none)" if whole else ""
        on_luma = [metric.name for metric in self.metrics if metric.name in LUMA_METRICS]
        of_luma = "0 to 255 (full range)" if self.luma == "full" else "16 to 235 (as MATLAB's rgb2ycbcr)"
        luma = f" Luma of {', '.join(on_luma)}: {of_luma}." if on_luma else ""
        return f"pdd {__version__}, pyiqa {self.pyiqa}. RGB in 0..1, {cropped}. {ranges}.{luma}"

    @property
    def origin_lines(self) -> list[str]:
        """Date, command, machine, versions and weights, a line each."""
        if self.origin is None:
            return []
        made_by = "; ".join(f"{name}: {', '.join(weights)}" for name, weights in self.origin.weights.items() if weights)
        facts = {
            "date": self.origin.date,
            "command": self.origin.command,
            "machine": self.origin.machine,
            "versions": ", ".join(f"{name} {version}" for name, version in self.origin.versions.items()),
            "weights": made_by,
        }
        return [f"{key}: {text}" for key, text in facts.items() if text]

    def best(self, metric: MetricInfo) -> set[str]:
        """The names of the sets whose mean is the best, by what is shown of it; empty if fewer than two have one."""
        means = {one.name: round(mean, 4) for one in self.sets if (mean := one.mean(metric)) is not None}
        if len(means) < 2:
            return set()
        best = (min if metric.lower_better else max)(means.values())
        return {name for name, mean in means.items() if mean == best}

    @property
    def pyiqa(self) -> str:
        """pyiqa's version."""
        return version("pyiqa")

    def as_document(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "pdd": __version__,
            "pyiqa": self.pyiqa,
            "origin": self.origin and asdict(self.origin),
            "colour_space": "RGB",
            "crop_border": self.crop_border,
            "luma": self.luma,
            "set": self.main.name,
            "metrics": [
                {
                    "name": metric.name,
                    "reference": metric.reference,
                    "of": "set" if metric.of_sets else "image",
                    "crop_border": 0 if metric.reference == "lr" else self.crop_border,
                    "better": metric.better,
                    "range": metric.value_range,
                    "unit": metric.unit,
                    "mean": self.main.mean(metric),
                    "images": len(self.main.values(metric)),
                    "baselines": {baseline.name: baseline.mean(metric) for baseline in self.baselines},
                    "best": sorted(self.best(metric)),
                }
                for metric in self.metrics
            ],
            "skipped": dict(self.skipped),
            "problems": self.problems,
            "verdicts": {baseline.name: self.verdict(baseline) for baseline in self.baselines},
            "comparisons": [
                {
                    "metric": one.metric.name,
                    "baseline": one.theirs,
                    "mean_difference": one.mean,
                    "interval_95": [one.low, one.high],
                    "relative": one.relative,
                    "wins": one.wins,
                    "losses": one.losses,
                    "images": len(one.differences),
                    "verdict": one.verdict,
                    "differences": dict(one.differences),
                }
                for one in self.comparisons
            ],
            "images": [
                {
                    "name": name,
                    **self._as_values(scores),
                    "baselines": {
                        baseline.name: self._as_values(baseline.images[name])
                        for baseline in self.baselines
                        if name in baseline.images
                    },
                }
                for name, scores in self.main.images.items()
            ],
        }

    def _as_values(self, scores: ImageScores) -> dict[str, Any]:
        item = scores.item
        paths = {"image": item.image, "reference": item.reference, "lr": item.lr}
        frames = [int(path.stem) for path in paths.values() if path is not None and path.parent in self.videos]
        return {
            **{key: str(self._source(path)) if path else None for key, path in paths.items()},
            **({"frame": frames[0]} if frames else {}),
            "scores": scores.values,
            "problems": scores.problems,
        }

    def _source(self, path: Path) -> Path:
        """The file itself, or the video of which it is a frame."""
        return self.videos.get(path.parent, path)

    def _in_words(self, path: Path | None) -> str:
        if path is None:
            return ""
        source = self._source(path)
        return str(path) if source is path else f"{source}, frame {int(path.stem)}"

    def as_csv(self) -> str:
        """One row for each image; columns: the metrics, the baselines' scores, the differences. The means are below.

        With baselines, rows with the differences' intervals, wins and losses, and verdicts follow; then what was not
        scored, and what the numbers are.
        """
        names = [metric.name for metric in self.metrics]
        columns = [f"{baseline.name}: {name}" for baseline in self.baselines for name in names]
        compared = self.comparisons
        titles = [f"{one.metric.name} − {one.theirs}" for one in compared]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "reference", "lr", *names, *columns, *titles])
        for name, scores in self.main.images.items():
            theirs = [baseline.images.get(name) for baseline in self.baselines]
            writer.writerow([
                *map(self._in_words, (scores.item.image, scores.item.reference, scores.item.lr)),
                *(one.values.get(metric, "") if one else "" for one in (scores, *theirs) for metric in names),
                *(one.differences.get(name, "") for one in compared),
            ])  # fmt: skip
        means = [one.mean(metric) for one in self.sets for metric in self.metrics]
        writer.writerow(
            ["mean", "", "", *("" if mean is None else mean for mean in means), *(c.mean for c in compared)]
        )
        if compared:
            empty = [""] * (2 + len(names) + len(columns))
            writer.writerow(["95 % interval, low", *empty, *(one.low for one in compared)])
            writer.writerow(["95 % interval, high", *empty, *(one.high for one in compared)])
            writer.writerow(["wins", *empty, *(one.wins for one in compared)])
            writer.writerow(["losses", *empty, *(one.losses for one in compared)])
            writer.writerow(["verdict", *empty, *(one.verdict for one in compared)])
        writer.writerows(["not scored", line] for line in self.unscored)
        writer.writerow(["about", " ".join([self.about, *(f"{line}." for line in self.origin_lines)])])
        return text.getvalue()
