"""Conversion between Y'CbCr, as stored in video, and R'G'B': matrix, range, bits and chroma location; rounded once.

FFmpeg's scaler converts 10-bit limited range through 8 bits and is off by up to one 8-bit step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pdd_cli.imaging.image import Array, from_float

FloatArray = npt.NDArray[np.float32]

_PAD = 2  # padding for the cubic filter in samples


@dataclass(frozen=True)
class Coding:
    """The coding of R'G'B' as Y', Cb, Cr.

    `red`, `blue`: weights in Y' (ITU-R BT.601, BT.709, BT.2020). `bits` per sample, 8 to 16. `full`: full range;
    otherwise Y' is in 16..235 and Cb, Cr in 16..240 (for 8 bits).
    """

    red: float
    blue: float
    bits: int
    full: bool

    @property
    def green(self) -> float:
        """The weight of green in Y'."""
        return 1 - self.red - self.blue

    @property
    def black(self) -> float:
        """The code of Y' = 0."""
        return 0 if self.full else 16 << self.bits - 8

    @property
    def luma_codes(self) -> float:
        """The number of codes between Y' = 0 and Y' = 1."""
        return (1 << self.bits) - 1 if self.full else 219 << self.bits - 8

    @property
    def neutral(self) -> float:
        """The code of Cb = Cr = 0."""
        return 1 << self.bits - 1

    @property
    def chroma_codes(self) -> float:
        """The number of codes between -0.5 and 0.5 of Cb and Cr."""
        return (1 << self.bits) - 1 if self.full else 224 << self.bits - 8


def to_rgb(planes: Sequence[Array], coding: Coding, site: tuple[float, float] = (0.0, 0.5)) -> Array:
    """Convert Y' (h, w), and Cb and Cr of that size or smaller, to (h, w, 3) in 0..65535. Y' alone gives gray.

    `site`: horizontal and vertical position of a chroma sample, from 0 (at the first luma sample that it covers) to 1
    (at the last). (0, 0.5) is left (MPEG-2 and later), (0.5, 0.5) centre (JPEG), (0, 0) top left (HDR10). Chroma is
    interpolated by a cubic filter.
    """
    luma = (planes[0].astype(np.float32) - coding.black) / coding.luma_codes
    if len(planes) == 1:
        rgb = np.repeat(luma[:, :, None], 3, axis=2)
    else:
        cb, cr = (
            _upsample_chroma((plane.astype(np.float32) - coding.neutral) / coding.chroma_codes, luma.shape, site)
            for plane in planes[1:3]
        )
        from_cr, from_cb = 2 * (1 - coding.red), 2 * (1 - coding.blue)
        green = luma - (coding.red * from_cr * cr + coding.blue * from_cb * cb) / coding.green
        rgb = np.stack([luma + from_cr * cr, green, luma + from_cb * cb], axis=2)
    return from_float(rgb, 16)


def from_rgb(pixels: Array, coding: Coding, chroma: tuple[int, int]) -> list[Array]:
    """Convert (H, W, 3) in 0..255 or 0..65535 to Y', Cb, Cr. `chroma`: luma samples per chroma sample in x and y.

    Each is 1 or 2 and divides the size. The chroma location is left (see `to_rgb`); the filter is 1 2 1 horizontally
    and a mean vertically.
    """
    import cv2

    top = np.iinfo(pixels.dtype).max
    kind = np.uint8 if coding.bits == 8 else np.uint16
    pixels = np.ascontiguousarray(pixels, np.uint16)
    luma = np.array([[coding.red, coding.green, coding.blue]]) * coding.luma_codes / top
    planes = [cv2.transform(pixels, np.hstack([luma, [[coding.black]]])).astype(kind)]
    across, down = chroma
    reduced = (
        pixels
        if down == 1
        else cv2.resize(pixels, (pixels.shape[1], pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    )
    if across == 2:
        filtered = cv2.filter2D(
            reduced.astype(np.float32), -1, np.array([[0.25, 0.5, 0.25]]), borderType=cv2.BORDER_REPLICATE
        )
        reduced = np.ascontiguousarray(filtered[:, ::2])
    matrix = np.array(
        [
            [-coding.red, -coding.green, 1 - coding.blue],
            [1 - coding.red, -coding.green, -coding.blue],
        ]
    ) / [[2 * (1 - coding.blue)], [2 * (1 - coding.red)]]
    offset = np.full((2, 1), coding.neutral)
    both = cv2.transform(reduced.astype(np.float32), np.hstack([matrix * coding.chroma_codes / top, offset]))
    both = np.rint(both).clip(0, (1 << coding.bits) - 1).astype(kind)
    return [*planes, both[..., 0], both[..., 1]]


def _upsample_chroma(plane: FloatArray, shape: tuple[int, ...], site: tuple[float, float]) -> FloatArray:
    """Upsample a chroma plane to the luma size (h, w); the factors are 1, 2 or 4."""
    if plane.shape == shape:
        return plane
    across, down = -(-shape[1] // plane.shape[1]), -(-shape[0] // plane.shape[0])
    x, y = (_PAD + 0.5 - (at * (factor - 1) + 0.5) / factor for at, factor in zip(site, (across, down), strict=True))
    image = Image.fromarray(np.pad(plane, _PAD, mode="edge"))
    box = (x, y, x + shape[1] / across, y + shape[0] / down)
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box), np.float32)
