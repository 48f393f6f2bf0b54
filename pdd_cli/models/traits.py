"""The properties of a super-resolution network that engines and upscaling need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec:
    """Scale, channels and size requirements.

    Sides are multiples of `size_multiple` and at least `size_minimum`; images are square if `square`.
    """

    scale: int
    in_channels: int
    out_channels: int
    architecture: str
    size_multiple: int = 1
    size_minimum: int = 1
    square: bool = False

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Pixels to add at the bottom and at the right of an image to meet the size requirements."""
        bottom, right = self.lacking(height), self.lacking(width)
        if self.square:
            side = max(height + bottom, width + right)
            return side - height, side - width
        return bottom, right

    def lacking(self, side: int) -> int:
        """Pixels to add to a side of this length to reach the minimum and a multiple."""
        return max(self.size_minimum - side, 0) + -max(side, self.size_minimum) % self.size_multiple
