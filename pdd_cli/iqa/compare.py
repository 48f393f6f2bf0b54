"""Compares two sets of images by a metric: paired differences, their interval, a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pdd_cli.iqa.metrics import MetricInfo

MIN_IMAGES = 6
"""The fewest images for a verdict: by chance alone, five of five agree once in sixteen."""
_RESAMPLES = 10_000

Verdict = Literal["better", "worse", "unclear", "too few"]


@dataclass(frozen=True)
class Comparison:
    """How `ours` differs from `theirs` by one metric, over the images that have a score in both.

    `differences`: ours − theirs by image. `low`, `high`: 95 % interval of their mean (percentile bootstrap). `wins` and
    `losses` count images on which ours is better and worse. `relative`: the mean difference as a fraction of
    the magnitude of theirs; None where that is 0.
    """

    metric: MetricInfo
    ours: str
    theirs: str
    differences: Mapping[str, float]
    mean: float
    low: float
    high: float
    relative: float | None
    wins: int
    losses: int

    @property
    def verdict(self) -> Verdict:
        """Better or worse where the interval excludes 0."""
        if len(self.differences) < MIN_IMAGES:
            return "too few"
        if self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.mean < 0) == self.metric.lower_better else "worse"

    @property
    def summary(self) -> str:
        """Three lines: the mean difference, its interval, and on how many images it is better and worse."""
        return f"{self.mean:+.4f}\n{self.low:+.4f} … {self.high:+.4f}\nbetter {self.wins}, worse {self.losses}"

    @property
    def change(self) -> str:
        """The mean difference as text: in the metric's unit where it has one, else in percent."""
        if self.metric.unit or self.relative is None:
            return f"{_signed(self.mean, 2 if abs(self.mean) >= 0.1 else 4)} {self.metric.unit}".rstrip()
        return f"{_signed(100 * self.relative, 1 if abs(self.relative) < 0.1 else 0)} %"


def compare(
    metric: MetricInfo, ours: str, theirs: str, our_scores: Mapping[str, float], their_scores: Mapping[str, float]
) -> Comparison | None:
    """Compare the scores by image of the sets named `ours` and `theirs`; None where no image has both.

    The bootstrap is seeded: the same scores give the same interval.
    """
    differences = {image: score - their_scores[image] for image, score in our_scores.items() if image in their_scores}
    if not differences:
        return None
    values = np.array(list(differences.values()))
    mean, before = float(values.mean()), float(np.mean([their_scores[image] for image in differences]))
    low, high = bootstrap_interval(values)
    gains = -values if metric.lower_better else values
    return Comparison(
        metric, ours, theirs, differences, mean, low, high, mean / abs(before) if before else None,
        wins=int((gains > 0).sum()), losses=int((gains < 0).sum()),
    )  # fmt: skip


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` (n,)."""
    from scipy.stats import bootstrap  # here: importing it takes most of a second

    if len(values) == 1:  # bootstrap asks for two
        return float(values[0]), float(values[0])
    low, high = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, batch=_RESAMPLES // 10, confidence_level=level,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(low), float(high)


def in_words(comparisons: Sequence[Comparison]) -> str:
    """One sentence on all metrics: better on lpips (−12 %, 28 of 32), no clear difference on niqe."""
    parts = []
    for verdict in ("better", "worse"):
        names = [
            f"{one.metric.name} ({one.change}, {one.wins if verdict == 'better' else one.losses} of "
            f"{len(one.differences)})"
            for one in comparisons
            if one.verdict == verdict
        ]
        if names:
            parts.append(f"{verdict} on {_listed(names)}")
    for verdict, words in (("unclear", "no clear difference on"), ("too few", "too few images for")):
        names = [one.metric.name for one in comparisons if one.verdict == verdict]
        if names:
            parts.append(f"{words} {_listed(names)}")
    return ", ".join(parts) or "nothing to compare"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
