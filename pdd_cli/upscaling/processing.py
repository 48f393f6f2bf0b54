"""How an image is upscaled besides its size and colours, and the steps of it that are plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Seamless = Literal["none", "x", "y", "both"]

# How far from 0 or 1 the values of a flat may be, and the radius of the square that must be flat, in output pixels.
_NEAR_EXTREME = 10 / 255
_FLAT_RADIUS = 3


@dataclass(frozen=True)
class Processing:
    """Switches at inference; the default changes nothing.

    `seamless`: the axes along which opposite edges join. `normal_map`: the colours are unit vectors. `tta`: the mean
    over the 8 flips and transposes of the input. `mix`: fraction of a plain resize in the output. `snap_flats`:
    near-black and near-white flats become black and white.
    """

    seamless: Seamless = "none"
    normal_map: bool = False
    tta: bool = False
    mix: float = 0.0
    snap_flats: bool = False

    @property
    def needs_whole(self) -> bool:
        """Whether a step needs all rows of the output at once."""
        return self.mix > 0 or self.snap_flats

    @property
    def passes(self) -> int:
        """Passes of the model for each tile."""
        return 8 if self.tta else 1

    def margins(self, margin: int) -> tuple[int, int]:
        """Pixels to add on each side, from the opposite edge: (left and right, top and bottom)."""
        return (
            margin if self.seamless in ("x", "both") else 0,
            margin if self.seamless in ("y", "both") else 0,
        )

    def __str__(self) -> str:
        """The switches that are used, in words; "" for none."""
        words = [f"seamless {self.seamless}"] if self.seamless != "none" else []
        words += [name for name, used in (("normal map", self.normal_map), ("tta", self.tta)) if used]
        words += [f"mix {self.mix:g}"] if self.mix else []
        return ", ".join([*words, "flats snapped"] if self.snap_flats else words)


def self_ensemble(run: Callable[[FloatArray], FloatArray], lr: FloatArray) -> FloatArray:
    """The mean of `run` over the 8 flips and transposes of `lr` (N, C, h, w), each turned back."""
    total: FloatArray | None = None
    for turned, back in _symmetries():
        sr = back(run(turned(lr).copy()))  # a view of one row or column counts as contiguous, whatever its strides
        total = sr.astype(np.float32) if total is None else total + sr
    assert total is not None
    return total / np.float32(8)


def _symmetries() -> Iterator[tuple[Callable[[FloatArray], FloatArray], Callable[[FloatArray], FloatArray]]]:
    """The symmetries of a square on the last two axes, with their inverses."""
    for transposed in (False, True):
        for rows in (1, -1):
            for columns in (1, -1):

                def turn(x: FloatArray, t: bool = transposed, r: int = rows, c: int = columns) -> FloatArray:
                    x = x[..., ::r, ::c]
                    return x.swapaxes(-1, -2) if t else x

                def back(x: FloatArray, t: bool = transposed, r: int = rows, c: int = columns) -> FloatArray:
                    x = x.swapaxes(-1, -2) if t else x
                    return x[..., ::r, ::c]

                yield turn, back


def unit_vectors(rows: FloatArray) -> FloatArray:
    """(h, w, 3 or more) in 0..1, whose first three values are vectors of length 1 in -1..1; the others are kept.

    A vector without a direction stays as it is.
    """
    vectors = rows[..., :3] * 2 - 1
    length = np.sqrt((vectors**2).sum(axis=2, keepdims=True))
    unit = np.where(length > 1e-3, vectors / np.maximum(length, 1e-3), vectors)
    return np.concatenate([(unit + 1) / 2, rows[..., 3:]], axis=2).astype(np.float32)


def with_blue(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A normal map (h, w, 3) that stores x and y only, its third channel all 0, with the z that gives length 1."""
    if pixels[..., 2].any():
        return pixels
    top = np.iinfo(pixels.dtype).max
    xy = pixels[..., :2].astype(np.float64) / top * 2 - 1
    z = np.sqrt(np.clip(1 - (xy**2).sum(axis=2), 0, 1))
    blue = np.rint((z + 1) / 2 * top).astype(pixels.dtype)
    return np.dstack([pixels[..., :2], blue])


def snap_flats(sr: FloatArray, colours: int) -> FloatArray:
    """`sr` (h, w, C) in 0..1, in which flats that are nearly black or white in the first `colours` channels are exact.

    A pixel belongs to a flat if all pixels around it are nearly black, or all nearly white. Others are unchanged.
    """
    from scipy import ndimage

    result = sr.copy()
    size = 2 * _FLAT_RADIUS + 1
    lightest = ndimage.maximum_filter(sr[..., :colours].max(axis=2), size, mode="nearest")
    darkest = ndimage.minimum_filter(sr[..., :colours].min(axis=2), size, mode="nearest")
    result[lightest <= _NEAR_EXTREME, :colours] = 0
    result[darkest >= 1 - _NEAR_EXTREME, :colours] = 1
    return result
