"""The size of an output, the number of model passes for it, and resampling to the exact size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float32]

# Radius of the Lanczos filter in pixels of the coarser grid.
_RADIUS = 3
# Output rows that are resampled at once.
_ROWS = 256
# Values that are converted at once.
_CACHED = 1 << 16
# Resampling may enlarge by this factor before another pass of the model, many times the work, is worth it.
_STRETCH = 1.1


@dataclass(frozen=True)
class SizeRequest:
    """The requested size of an output. At most one field is set; without one it is the model's own scale.

    `scale`: a multiple of the input; `width`, `height`, `long_side`: pixels; `fit`: the largest size inside this
    (width, height). The aspect ratio is always kept.
    """

    scale: float | None = None
    width: int | None = None
    height: int | None = None
    long_side: int | None = None
    fit: tuple[int, int] | None = None

    def size_of(self, width: int, height: int, native: int) -> tuple[int, int]:
        """(width, height) of the output for an image of this size and a model of scale `native`; at least 1 x 1."""
        if self.width is not None:
            return self.width, max(1, round(height * self.width / width))
        if self.height is not None:
            return max(1, round(width * self.height / height)), self.height
        if self.long_side is not None:
            if width >= height:
                return self.long_side, max(1, round(height * self.long_side / width))
            return max(1, round(width * self.long_side / height)), self.long_side
        if self.fit is not None:
            factor = min(self.fit[0] / width, self.fit[1] / height)
            return (
                min(self.fit[0], max(1, round(width * factor))),
                min(self.fit[1], max(1, round(height * factor))),
            )
        factor = native if self.scale is None else self.scale
        return max(1, round(width * factor)), max(1, round(height * factor))


def passes(source: tuple[int, int], target: tuple[int, int], native: int) -> int:
    """The number of passes of a model of scale `native` before the resampling to `target` (width, height); at least 1.

    The passes reach the target, or fall short of it by at most a tenth.
    """
    if native == 1:
        return 1
    needed = max(target[0] / source[0], target[1] / source[1]) / _STRETCH
    count = 1
    while native**count < needed:
        count += 1
    return count


def resize_row_chunks(
    row_chunks: Iterable[FloatArray],
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    alpha: bool,
    margins: tuple[int, int] = (0, 0),
    linear: bool = True,
) -> Iterator[FloatArray]:
    """Resample the rows of an image from `source` to `target` (width, height) with antialiased Lanczos.

    `row_chunks`: (rows, width, C) from top to bottom, sRGB-encoded, in 0..1; `alpha`: the last channel is alpha. Only
    the rows that the filter needs are kept in memory. Images are reduced in linear light, which preserves brightness,
    and enlarged as encoded, where Lanczos rings least; `linear` False: always as encoded, for values that are no light.
    `margins`: (columns, rows) on each side of `source` that the filter sees and the result doesn't contain.
    """
    if source == target:
        yield from _cropped(row_chunks, source, margins)
        return
    reduces = linear and target[0] * target[1] < source[0] * source[1]
    left, above = margins
    total = source[1] + 2 * above
    colours = slice(None, -1) if alpha else slice(None)
    step = source[1] / target[1]
    margin = math.ceil(_RADIUS * max(step, 1)) + 1
    incoming = iter(row_chunks)
    held: list[FloatArray] = []
    first = stop = 0  # the range of source rows in `held`
    for start in range(0, target[1], _ROWS):
        end = min(start + _ROWS, target[1])
        while stop < min(math.ceil(above + end * step) + margin, total):
            rows = np.clip(next(incoming), 0, 1)
            if reduces:
                rows[..., colours] = to_linear(rows[..., colours])
            held.append(rows)
            stop += len(rows)
        keep = max(math.floor(above + start * step) - margin, 0)
        while held and first + len(held[0]) <= keep:
            first += len(held.pop(0))
        slab = np.concatenate(held) if len(held) > 1 else held[0]
        held = [slab]
        # Only the rows that these need: Pillow copies all that it is given.
        part = slab[keep - first : min(math.ceil(above + end * step) + margin, total) - first]
        box = (left, above + start * step - keep, left + source[0], min(above + end * step - keep, len(part)))
        rows = np.stack([_resample(part[..., c], (target[0], end - start), box) for c in range(part.shape[2])], axis=-1)
        np.clip(rows, 0, 1, out=rows)
        if reduces:
            rows[..., colours] = from_linear(rows[..., colours])
        yield rows


def _cropped(row_chunks: Iterable[FloatArray], size: tuple[int, int], margins: tuple[int, int]) -> Iterator[FloatArray]:
    """The rows without `margins` (columns, rows) on each side; `size` is what remains."""
    if margins == (0, 0):
        yield from row_chunks
        return
    left, above = margins
    row = -above
    for rows in row_chunks:
        part = rows[max(-row, 0) : max(size[1] - row, 0), left : left + size[0]]
        row += len(rows)
        if len(part):
            yield part


def _resample(plane: FloatArray, size: tuple[int, int], box: tuple[float, float, float, float]) -> FloatArray:
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box), np.float32)


def to_linear(encoded: FloatArray) -> FloatArray:
    """Decode sRGB values in 0..1 to linear light (IEC 61966-2-1)."""

    def decode(values: FloatArray) -> FloatArray:
        curve = _power((np.maximum(values, 0.04045) + 0.055) / 1.055, 2.4)
        return np.where(values <= 0.04045, values / 12.92, curve)

    return _in_chunks(decode, encoded)


def from_linear(linear: FloatArray) -> FloatArray:
    """Encode linear light in 0..1 as sRGB, the inverse of `to_linear`."""

    def encode(values: FloatArray) -> FloatArray:
        curve = 1.055 * _power(np.maximum(values, 0.0031308), 1 / 2.4) - 0.055
        return np.where(values <= 0.0031308, values * 12.92, curve)

    return _in_chunks(encode, linear)


def _power(values: npt.NDArray[np.floating[Any]], exponent: float) -> FloatArray:
    """Positive values to a power. NumPy computes these two functions several values at a time, its power doesn't."""
    found: FloatArray = np.exp(np.log(values) * exponent)
    return found


def _in_chunks(curve: Callable[[FloatArray], FloatArray], values: FloatArray) -> FloatArray:
    """Apply `curve` to rows that fit the CPU's cache."""
    found = np.empty(values.shape, np.float32)
    rows = max(1, _CACHED // max(1, values[:1].size))
    for start in range(0, len(values), rows):
        found[start : start + rows] = curve(values[start : start + rows])
    return found
