"""What one has to know of a super-resolution network to use it, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec:
    """Scale, channels and size needs: inputs are multiples of `size_multiple` and at least `size_minimum` a side."""

    scale: int
    in_channels: int
    out_channels: int
    architecture: str
    size_multiple: int = 1
    size_minimum: int = 1

    def lacking(self, side: int) -> int:
        """Pixels that a side of an input lacks to the minimum and the next multiple."""
        return max(self.size_minimum - side, 0) + -max(side, self.size_minimum) % self.size_multiple
