"""Crops that a test changes on their way into training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pdd_cli.data.datasets import Batch, CropSampler


@dataclasses.dataclass(frozen=True, eq=False)
class Disturbed(CropSampler):
    """Crops whose batches `disturb` changes."""

    disturb: Callable[[int, Batch], Batch] = lambda step, batch: batch

    def batch(self, step: int, size: int, first: int = 0) -> Batch:
        return self.disturb(step, super().batch(step, size, first))
