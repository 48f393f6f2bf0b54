"""The positions of an image's tiles and their weights where they overlap: planning only, no pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]

# LR pixels over which neighbouring tiles are blended, in the middle of their overlap.
_BLENDED = 16


@dataclass(frozen=True)
class Span:
    """The LR pixels start ≤ i < stop of one axis."""

    start: int
    stop: int

    def at(self, scale: int) -> slice:
        """The same span in an image `scale` times as large."""
        return slice(self.start * scale, self.stop * scale)


@dataclass(frozen=True)
class TilePlan:
    """The grid of tiles of one image: each row span with each column span. All tiles have the same shape."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) of each tile in LR pixels."""
        row, column = self.rows[0], self.columns[0]
        return row.stop - row.start, column.stop - column.start

    def tiles(self, scale: int) -> Iterator[tuple[Span, Span, Weights, Weights]]:
        """(row span, column span, row weights (h*scale), column weights (w*scale)) of each tile.

        The products of the weights sum to 1 at every output pixel.
        """
        down, across = feather(self.rows, scale), feather(self.columns, scale)
        for row, row_weights in zip(self.rows, down, strict=True):
            for column, column_weights in zip(self.columns, across, strict=True):
                yield row, column, row_weights, column_weights


def plan_tiles(height: int, width: int, *, tile: tuple[int, int] | None, overlap: int, multiple: int = 1) -> TilePlan:
    """Cover `height` x `width` LR pixels with tiles of at most `tile` (height, width); None is the whole image.

    Neighbours overlap by at least `overlap` pixels, or by half a tile if that is less. Sizes must be multiples of
    `multiple`. Every tile starts and ends at a multiple, so that a network that pools pixels sees the same groups in
    every tile.
    """
    tile_height, tile_width = tile or (height, width)
    return TilePlan(
        _spans(height, tile_height, overlap, multiple),
        _spans(width, tile_width, overlap, multiple),
    )


def fit_tile(height: int, width: int, pixels: int) -> tuple[int, int] | None:
    """The largest tile (height, width) of at most `pixels` LR pixels, as square as the image allows.

    None when the whole image fits.
    """
    if height * width <= pixels:
        return None
    tile_height = min(height, max(1, math.isqrt(pixels)))
    tile_width = min(width, max(1, pixels // tile_height))
    return min(height, max(1, pixels // tile_width)), tile_width


def feather(spans: Sequence[Span], scale: int) -> list[Weights]:
    """A weight for each output pixel of each span, summing to 1 where spans overlap.

    In the middle of an overlap, over at most 16 LR pixels, a tile's weight rises as sin² from 0 to 1. Nearer to its
    edge, where the network lacks context, its weight is 0: the other tile is further from its own edge there.
    """
    weights = []
    for index, span in enumerate(spans):
        weight = np.ones((span.stop - span.start) * scale)
        if index > 0:
            ramp = _ramp(spans[index - 1].stop - span.start, scale)
            weight[: len(ramp)] *= ramp
        if index + 1 < len(spans):
            ramp = _ramp(span.stop - spans[index + 1].start, scale)
            weight[len(weight) - len(ramp) :] *= ramp[::-1]
        weights.append(weight)
    total = np.zeros(max(span.stop for span in spans) * scale)
    for span, weight in zip(spans, weights, strict=True):
        total[span.at(scale)] += weight
    return [(weight / total[span.at(scale)]).astype(np.float32) for span, weight in zip(spans, weights, strict=True)]


def _ramp(overlap: int, scale: int) -> npt.NDArray[np.float64]:
    """The weights along an overlap: 0, rising in the middle, then 1."""
    blended = min(overlap, _BLENDED)
    before = (overlap - blended) // 2
    position = (np.arange(overlap * scale) + 0.5) / scale - before
    ramp: npt.NDArray[np.float64] = np.sin((position / max(blended, 1)).clip(0, 1) * np.pi / 2) ** 2
    return ramp


def _spans(length: int, tile: int, overlap: int, multiple: int) -> tuple[Span, ...]:
    if length % multiple:
        raise ValueError(f"{length} is not a multiple of {multiple}")
    if tile >= length:
        return (Span(0, length),)
    # In units of `multiple` from here on.
    units, tile = length // multiple, max(1, tile // multiple)
    overlap = min(-(-overlap // multiple), tile // 2)
    count = -(-(units - overlap) // (tile - overlap))
    # Tiles are as small as their number allows, so that no pixel is computed needlessly.
    tile = -(-(units + (count - 1) * overlap) // count)
    starts = [min(index * (tile - overlap), units - tile) for index in range(count)]
    return tuple(Span(start * multiple, (start + tile) * multiple) for start in starts)
