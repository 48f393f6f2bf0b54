"""All metrics that can be computed, and whether their weights are installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from pdd_cli.iqa.metrics import CONSISTENCY, DRIFT, MetricInfo, metric_infos
from pdd_cli.iqa.pyiqa_adapter import WeightsState, metric_names, weights_states

_COMPARES_WITH = {"none": "no reference", "full": "ground truth", "lr": "LR input"}


@dataclass(frozen=True)
class AvailableMetric:
    """A metric, and whether it can be computed offline."""

    info: MetricInfo
    weights: WeightsState

    @property
    def compares_with(self) -> str:
        """The images that the scored images are compared with."""
        if self.info.of_sets and self.info.reference == "full":
            return "HR, as a set"
        return _COMPARES_WITH[self.info.reference]

    def as_document(self) -> dict[str, str]:
        """Plain values for JSON."""
        return {
            "name": self.info.name,
            "reference": self.info.reference,
            "better": self.info.better,
            "range": self.info.value_range,
            "weights": self.weights,
        }


def available_metrics() -> list[AvailableMetric]:
    """pyiqa's metrics by name, then pdd's own."""
    states = weights_states()
    return [
        *(AvailableMetric(info, states[info.name]) for info in metric_infos(metric_names())),
        AvailableMetric(CONSISTENCY, "needs none"),
        AvailableMetric(DRIFT, "needs none"),
    ]


def as_document(metrics: Sequence[AvailableMetric]) -> dict[str, object]:
    """`metrics` as plain values for JSON, with pyiqa's version and licence."""
    return {
        "pyiqa": version("pyiqa"),
        "licence": "PolyForm Noncommercial 1.0.0 and S-Lab 1.0 (parts)",
        "metrics": [metric.as_document() for metric in metrics],
    }
