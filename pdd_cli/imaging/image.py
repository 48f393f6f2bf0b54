"""The decoded image, its shape in a file, and an image whose rows come in chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pdd_cli.errors import InputError
from pdd_cli.imaging.metadata import Metadata, Notes

Array = npt.NDArray[Any]
MOST_PIXELS = 178_956_970
"""Pillow's limit against decompression bombs. Larger images are rejected unless the caller sets another limit."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded image, upright.

    `pixels`: (H, W, C) uint8 or uint16, C = 1 (gray) or 3 (RGB). `alpha`: (H, W) of the same type, straight (not
    premultiplied), or None. `metadata`: its profile fits the channels. `frames`: number of pages or frames in
    the file; `duration` of this frame of an animation in milliseconds. `notes`: problems of the file. `share`: the
    size of this frame in memory, divided by that of all frames.
    """

    pixels: Array
    alpha: Array | None = None
    metadata: Metadata = field(default_factory=Metadata)
    frames: int = 1
    duration: float | None = None
    notes: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def spec(self) -> ImageSpec:
        """The shape of the image in a file."""
        return ImageSpec(self.width, self.height, self.channels, self.alpha is not None, self.bits)

    @property
    def interleaved(self) -> Array:
        """(H, W, 1 to 4): the pixels, then alpha."""
        return self.pixels if self.alpha is None else np.dstack([self.pixels, self.alpha])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def channels(self) -> int:
        """1 (gray) or 3 (RGB)."""
        return int(self.pixels.shape[2])

    @property
    def bits(self) -> int:
        """Bits per channel: 8 or 16."""
        return self.pixels.dtype.itemsize * 8

    def to_float(self) -> npt.NDArray[np.float32]:
        """The pixels as float32 (H, W, C) in 0..1."""
        return to_float(self.pixels)

    def to_rgb8(self) -> Array:
        """The pixels as uint8 (H, W, 3): gray is repeated, 16 bits are rounded, alpha is ignored."""
        pixels = self.pixels if self.bits == 8 else from_float(self.to_float(), 8)
        return np.array(np.broadcast_to(pixels, (self.height, self.width, 3)))

    def alpha_to_float(self) -> npt.NDArray[np.float32] | None:
        """The alpha channel as float32 (H, W) in 0..1, or None."""
        return None if self.alpha is None else to_float(self.alpha)

    @classmethod
    def from_float(cls, pixels: Array, *, alpha: Array | None = None, bits: int = 8) -> DecodedImage:
        """A picture of `bits` 8 or 16 from (H, W, C) or (H, W), and alpha (H, W), in 0..1: clipped, rounded.

        Raises ValueError for values that aren't finite.
        """
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        return cls(from_float(pixels, bits), None if alpha is None else from_float(alpha, bits))


@dataclass(frozen=True)
class Header:
    """The header of an image file: the upright (width, height), number of frames, and the spec of the pixels."""

    size: tuple[int, int]
    frames: int
    spec: ImageSpec


def check_pixels(size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        raise InputError(
            f"too large ({size[0]}x{size[1]} pixels; at most {most / 1e6:.0f} megapixels)",
            "Only `pdd upscale` with --max-memory reads larger images.",
        )


def from_samples(
    channels: Array, icc: object, metadata: Metadata, *, frames: int = 1, duration: object = None, notes: Notes = ()
) -> DecodedImage:
    """A picture of upright (H, W), or (H, W, 1 to 4), and a profile where it fits those."""
    if channels.ndim == 2:
        channels = channels[:, :, None]
    count = channels.shape[2]
    pixels = np.ascontiguousarray(channels[:, :, : count - (count in (2, 4))])
    alpha = np.ascontiguousarray(channels[:, :, -1]) if count in (2, 4) else None
    space = b"GRAY" if pixels.shape[2] == 1 else b"RGB "
    fitting = icc if isinstance(icc, bytes) and icc[16:20] == space else None
    shown = float(duration) if isinstance(duration, int | float) else None
    return DecodedImage(pixels, alpha, replace(metadata, icc=fitting), frames, shown, tuple(dict.fromkeys(notes)))


_CACHED = 1 << 16


@dataclass(frozen=True)
class ImageSpec:
    """The shape of an image in a file: `channels` 1 (gray) or 3 (RGB), then alpha; `bits` per sample 8 or 16."""

    width: int
    height: int
    channels: int
    alpha: bool = False
    bits: int = 8

    @property
    def samples(self) -> int:
        """Values per pixel, 1 to 4."""
        return self.channels + self.alpha

    @property
    def bytes(self) -> int:
        """Bytes of all pixels."""
        return self.width * self.height * self.samples * self.bits // 8


@dataclass(frozen=True, eq=False)
class ImageStream:
    """One image of a file, whose rows come in `row_chunks` (rows, width, samples) from top to bottom.

    `duration`: of a frame of an animation, in milliseconds. `share`: as in `DecodedImage`.
    """

    spec: ImageSpec
    row_chunks: Iterable[Array]
    metadata: Metadata = field(default_factory=Metadata)
    duration: float | None = None
    share: float = 1.0


def to_float(values: Array) -> npt.NDArray[np.float32]:
    """Unsigned integers to 0..1."""
    return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)


def from_float(values: Array, bits: int) -> Array:
    """0..1, clipped, to unsigned integers of 8 or 16 bits, rounded. Raises ValueError for values that aren't finite."""
    top = (1 << bits) - 1
    found = np.empty(values.shape, np.uint16 if bits == 16 else np.uint8)
    if not values.size:
        return found
    # In chunks that fit the CPU's cache.
    rows = max(1, _CACHED // values[0].size) if values.ndim > 1 else _CACHED
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        if not np.isfinite(part).all():
            raise ValueError("pixel values that are not finite")
        # float64 for 16 bits, because float32 is too coarse for rounding there.
        scaled = np.multiply(part, top, dtype=np.float64 if bits == 16 else np.float32)
        np.clip(np.rint(scaled, out=scaled), 0, top, out=scaled)
        found[start : start + rows] = scaled
    return found


def collect_rows(stream: ImageStream) -> Array:
    """All rows of `stream` in one array."""
    spec = stream.spec
    whole = np.empty((spec.height, spec.width, spec.samples), np.uint16 if spec.bits == 16 else np.uint8)
    row = 0
    for rows in stream.row_chunks:
        whole[row : row + len(rows)] = rows
        row += len(rows)
    return whole
