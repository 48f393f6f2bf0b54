"""Pages of a TIFF → samples: what is stored, by its tags, and decoded by tifffile where it has the compression."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdd_cli.errors import InputError

Array = npt.NDArray[Any]

_EXTRA_SAMPLES, _INK_SET, _ORIENTATION, _COLOUR_MAP, _ICC = 338, 332, 274, 320, 34675
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, PALETTE, CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
PLAIN = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, PALETTE: 1, CMYK: 4, _YCBCR: 3, _LAB: 3}
_CAMERA_RAW = (32803, 34892)  # a colour filter array, and linear raw
_OTHER_COLOURS = {4: "a transparency mask", 9: "ICC Lab", 10: "ITU Lab", 32844: "LogL", 32845: "LogLuv"}
_DNG_VERSION = 50706
_PREMULTIPLIED, _STRAIGHT = 1, 2
CAMERA_RAW = InputError(
    "a camera RAW file: what can be read of it is a small preview",
    "Develop it first, for example with darktable, RawTherapee or Adobe DNG Converter, and save a 16-bit TIFF.",
)


@dataclass(frozen=True)
class Page:
    """What the tags of a page say: its size as it is stored, and what its samples mean.

    `alpha`: which of the samples behind the colours it is, None without one; `extra`: how many others there are.
    """

    width: int
    height: int
    photometric: int
    colours: int
    bits: int
    planar: bool
    compression: str
    orientation: int
    alpha: int | None
    premultiplied: bool
    extra: int
    icc: bytes | None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return (self.height, self.width) if self.orientation in (5, 6, 7, 8) else (self.width, self.height)

    @property
    def needs_libtiff(self) -> bool:
        """Whether what it means is left to libtiff: subsampled colours, Lab."""
        return self.photometric in (_YCBCR, _LAB)


@contextmanager
def open_tiff(source: Path | bytes) -> Iterator[Any]:
    """The file by tifffile. Raises InputError for a camera's RAW file."""
    import logging

    import tifffile

    logging.getLogger("tifffile").disabled = True  # it writes about damaged files
    with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        first = file.pages[0]
        inner = first.pages or ()
        kinds = {_photometric(page) for page in (first, *inner)}
        if _DNG_VERSION in first.tags or kinds & set(_CAMERA_RAW):
            raise CAMERA_RAW
        yield file


def full_pages(file: Any) -> list[int]:
    """Which pages are images of their own: not reduced copies (an overview, a thumbnail) or masks of another."""
    # By numbers: iterated, a chain of pages that leads back to itself has no end.
    found = [index for index in range(len(file.pages)) if not file.pages[index].aspage().subfiletype & 0b101]
    return found or [0]


def describe(page: Any) -> Page:
    """What `page` of tifffile holds. Raises InputError for pixels of a kind that pdd doesn't read, with the reason."""
    photometric = _photometric(page)
    bits, kind = page.bitspersample, page.sampleformat
    if not isinstance(bits, int) or not isinstance(kind, int):
        raise InputError(f"samples of different kinds in one pixel ({bits} bits) are not supported")
    if kind not in (1, 4) or bits > 16:
        what = {2: "signed integers", 3: "floating-point values", 5: "complex numbers", 6: "complex numbers"}
        raise InputError(
            f"pixels that are {bits}-bit {what.get(kind, 'integers')} are not supported: "
            "which of the values is white isn't known",
            "Save it with 8- or 16-bit unsigned integers.",
        )
    if page.imagedepth > 1:
        raise InputError("a TIFF of volumes is not supported", "Save its slices as pages.")
    colours = _COLOURS.get(photometric)
    if colours is None or (photometric == CMYK and page.tags.valueof(_INK_SET, 1) != 1):
        name = "inks other than CMYK" if colours else _OTHER_COLOURS.get(photometric, f"kind {photometric}")
        raise InputError(f"a TIFF whose colours are {name} is not supported", "Save it as RGB.")
    if photometric in (_YCBCR, _LAB) and bits != 8:
        raise InputError(f"a TIFF of {bits}-bit Lab or YCbCr is not supported", "Save it as RGB.")
    if page.samplesperpixel < colours:
        raise ValueError(f"{page.samplesperpixel} samples per pixel, where {colours} are needed")
    behind = page.samplesperpixel - colours
    # Without the tag one more sample is taken for alpha, as other programs do.
    declared = page.tags.valueof(_EXTRA_SAMPLES, (_STRAIGHT,) if behind == 1 else ())
    declared = (declared if isinstance(declared, tuple) else (declared,))[:behind]
    alpha = next((index for index, extra in enumerate(declared) if extra in (_PREMULTIPLIED, _STRAIGHT)), None)
    return Page(
        page.imagewidth,
        page.imagelength,
        photometric,
        colours,
        bits,
        page.planarconfig == 2 and page.samplesperpixel > 1,
        getattr(page.compression, "name", str(page.compression)),
        int(page.tags.valueof(_ORIENTATION, 1)),
        alpha,
        alpha is not None and declared[alpha] == _PREMULTIPLIED,
        behind - (alpha is not None),
        page.tags.valueof(_ICC),
    )


def _photometric(page: Any) -> int:
    return int(page.photometric)


def decode(page: Any, spec: Page) -> Array | None:
    """The samples (H, W, C): gray, RGB or CMYK, and then alpha; 8 or 16 bits, black is zero, alpha straight.

    As they are stored, not upright. None where tifffile has no decoder. Raises ValueError for a file cut short.
    """
    _check_complete(page)
    if spec.needs_libtiff:
        return None
    try:
        stored = page.asarray()
    except (ValueError, ImportError, KeyError, NotImplementedError) as error:
        if "imagecodecs" not in str(error) and not isinstance(error, ImportError):
            raise
        return None
    if spec.planar:
        stored = np.moveaxis(stored, 0, -1)
    samples = stored.reshape(spec.height, spec.width, -1)
    last = [] if spec.alpha is None else [spec.colours + spec.alpha]
    return from_stored(samples[..., [*range(spec.colours), *last]], spec, page.tags.valueof(_COLOUR_MAP))


def from_stored(samples: Array, spec: Page, colour_map: Any = None) -> Array:
    """`samples` (H, W, C) as the file has them, with black as zero, in 8 or 16 bits, alpha straight."""
    values = samples
    if spec.photometric == PALETTE:
        colours = np.asarray(colour_map, np.uint16).reshape(3, -1)
        # Old programs wrote 8 bits.
        colours = colours if (colours < 256).all() else np.rint(colours / 257)
        index = np.minimum(values[..., 0], colours.shape[1] - 1)
        return np.dstack([colours.T[index].astype(np.uint8), values[..., 1:]])
    wide = np.uint8 if spec.bits <= 8 else np.uint16
    if spec.bits not in (8, 16):
        top = (1 << spec.bits) - 1
        values = np.rint(values.astype(np.float32) * (np.float32(np.iinfo(wide).max) / top))
    values = values.astype(wide)
    if spec.photometric == _WHITE_IS_ZERO:
        values[..., 0] = np.iinfo(wide).max - values[..., 0]
    return straight(values) if spec.premultiplied else values


def straight(channels: Array) -> Array:
    """Colours that were multiplied by their alpha, the last channel, as they were before."""
    top = np.iinfo(channels.dtype).max
    values = channels.astype(np.float64)
    values[..., :-1] *= top / np.maximum(values[..., -1:], 1)
    return np.asarray(np.rint(values.clip(0, top)), channels.dtype)


def _check_complete(page: Any) -> None:
    """Raise ValueError where strips or tiles lie behind the end, for which tifffile would give zeros."""
    end = page.parent.filehandle.size
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(parts) < math.prod(page.chunked):
        raise ValueError("pixels are missing")
    if any(offset + count > end for offset, count in parts):
        raise ValueError("image file is truncated")
