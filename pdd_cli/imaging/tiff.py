"""TIFF: pages described by their tags, decoded by tifffile or else by libtiff, and a writer that streams rows."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, DecodedImage, Header, ImageSpec, ImageStream, check_pixels, from_samples
from pdd_cli.imaging.metadata import (
    EXIF_IFD,
    GEO_TAGS,
    GPS_IFD,
    NO_NOTES,
    ExifText,
    GeoTag,
    Metadata,
    dpi_of,
    load_exif,
    true_exif,
    true_xmp,
)
from pdd_cli.imaging.pixels import from_cmyk_samples, plain_mode, upright, without_copies

_EXTRA_SAMPLES, _INK_SET, _ORIENTATION, _COLOUR_MAP, _ICC = 338, 332, 274, 320, 34675
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, PALETTE, CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
PLAIN = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, PALETTE: 1, CMYK: 4, _YCBCR: 3, _LAB: 3}
_CAMERA_RAW = (32803, 34892)  # a colour filter array, and linear raw
_OTHER_COLOURS = {4: "a transparency mask", 9: "ICC Lab", 10: "ITU Lab", 32844: "LogL", 32845: "LogLuv"}
_DNG_VERSION = 50706
_PREMULTIPLIED, _STRAIGHT = 1, 2
CAMERA_RAW = InputError(
    "a camera RAW file, of which pdd could read only a small preview",
    "Develop it first, for example with darktable, RawTherapee or Adobe DNG Converter, and save a 16-bit TIFF.",
)


@dataclass(frozen=True)
class Page:
    """The description of a page, from its tags.

    Attributes:
        width, height: Size in pixels, as stored.
        photometric: PhotometricInterpretation: the colour space.
        colours: Number of colour samples per pixel.
        bits: Bits per sample.
        planar: Whether each sample has a plane of its own.
        compression: Name of the compression, for messages.
        orientation: EXIF orientation, 1 to 8.
        alpha: Index of alpha among the samples after the colours. None without alpha.
        premultiplied: Whether the colours are multiplied by alpha.
        extra: Number of samples that are neither colour nor alpha.
        icc: ICC profile.
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
        """Whether libtiff must convert the colours: YCbCr (which may be subsampled) and Lab."""
        return self.photometric in (_YCBCR, _LAB)


@contextmanager
def open_tiff(source: BinaryIO) -> Iterator[Any]:
    """Open `source` with tifffile. Raises InputError for a camera RAW file."""
    import logging

    import tifffile

    logging.getLogger("tifffile").disabled = True  # it would log the problems of damaged files
    with tifffile.TiffFile(source) as file:
        first = file.pages[0]
        inner = first.pages or ()
        kinds = {_photometric(page) for page in (first, *inner)}
        if _DNG_VERSION in first.tags or kinds & set(_CAMERA_RAW):
            raise CAMERA_RAW
        yield file


def full_pages(file: Any) -> list[int]:
    """Indices of the pages that are full images, not reduced copies (overviews, thumbnails) or masks."""
    # By index: iteration would not end if a page links back to an earlier one.
    found = [index for index in range(len(file.pages)) if not file.pages[index].aspage().subfiletype & 0b101]
    return found or [0]


def describe(page: Any) -> Page:
    """Describe a page of tifffile. Raises InputError, with the reason, if pdd doesn't support its pixels."""
    photometric = _photometric(page)
    bits, kind = page.bitspersample, page.sampleformat
    if not isinstance(bits, int) or not isinstance(kind, int):
        raise InputError(f"samples of different kinds in one pixel ({bits} bits) are not supported")
    if kind not in (1, 4) or bits > 16:
        what = {2: "signed integers", 3: "floating-point values", 5: "complex numbers", 6: "complex numbers"}
        raise InputError(
            f"pixels that are {bits}-bit {what.get(kind, 'integers')} are not supported: "
            "the value of white is not known",
            "Save it with 8- or 16-bit unsigned integers.",
        )
    if page.imagedepth > 1:
        raise InputError("a TIFF with volumes is not supported", "Save the slices as pages.")
    colours = _COLOURS.get(photometric)
    if colours is None or (photometric == CMYK and page.tags.valueof(_INK_SET, 1) != 1):
        name = "inks other than CMYK" if colours else _OTHER_COLOURS.get(photometric, f"kind {photometric}")
        raise InputError(f"a TIFF whose colours are {name} is not supported", "Save it as RGB.")
    if photometric in (_YCBCR, _LAB) and bits != 8:
        raise InputError(f"a TIFF of {bits}-bit Lab or YCbCr is not supported", "Save it as RGB.")
    if page.samplesperpixel < colours:
        raise ValueError(f"{page.samplesperpixel} samples per pixel instead of {colours}")
    behind = page.samplesperpixel - colours
    # Without the tag, a single additional sample is read as alpha, as in other programs.
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
    """Decode a page, as stored (not upright).

    Returns:
        Samples (H, W, C): gray, RGB or CMYK, then alpha if any, in uint8 or uint16. Zero is black (no ink in CMYK).
        Colours are not premultiplied. None if tifffile has no decoder for the page.

    Raises:
        ValueError: the file is truncated or damaged.
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
    """Convert stored samples (H, W, C) to uint8 or uint16, with zero as black and without premultiplied colours."""
    values = samples
    if spec.photometric == PALETTE:
        colours = np.asarray(colour_map, np.uint16).reshape(3, -1)
        # Some old programs wrote 8-bit values.
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
    """Divide premultiplied colours by alpha, which is the last channel."""
    top = np.iinfo(channels.dtype).max
    values = channels.astype(np.float64)
    values[..., :-1] *= top / np.maximum(values[..., -1:], 1)
    return np.asarray(np.rint(values.clip(0, top)), channels.dtype)


def _check_complete(page: Any) -> None:
    """Raise ValueError if strips or tiles are missing or lie beyond the end of the file: tifffile would give zeros."""
    end = page.parent.filehandle.size
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(parts) < math.prod(page.chunked):
        raise ValueError("pixels are missing")
    if any(offset + count > end for offset, count in parts):
        raise ValueError("image file is truncated")


def probe(source: BinaryIO, most_pixels: int) -> Header:
    """The header of the first full page, with the number of full pages. Raises InputError if the page is too large."""
    with open_tiff(source) as file:
        pages = full_pages(file)
        page = describe(file.pages[pages[0]])
    check_pixels(page.size, most_pixels)
    return Header(page.size, len(pages), _spec(page))


def _spec(page: Page) -> ImageSpec:
    channels = 1 if page.colours == 1 and page.photometric != PALETTE else 3
    return ImageSpec(*page.size, channels, page.alpha is not None, 8 if page.bits <= 8 else 16)


def read_pages(data: bytes, most_pixels: int) -> Iterator[DecodedImage]:
    """Decode the full pages. Raises InputError if a page is too large or not supported."""
    with open_tiff(io.BytesIO(data)) as file:
        pages = full_pages(file)
        sizes = {index: _bytes(file.pages[index].aspage()) for index in pages}
        for index in pages:
            page = file.pages[index]
            spec = describe(page)
            # Samples beyond four take memory, too: count them as additional pixels.
            check_pixels((spec.width * -(-(spec.colours + spec.extra) // 4), spec.height), most_pixels)
            channels, icc, notes = decode(page, spec), spec.icc, NO_NOTES
            if channels is not None:
                if spec.photometric == CMYK:
                    channels, icc, notes = from_cmyk_samples(channels, spec.icc)
                channels = upright(channels, spec.orientation)
            elif spec.bits <= 8:
                channels, icc = _by_pillow(data, index)
            else:
                channels = _by_opencv(data, index, spec)
            if spec.photometric == PALETTE:
                channels = without_copies(channels) if channels.ndim == 3 else channels
            metadata, more = _metadata(data, file, page, spec, len(file.pages) - len(pages))
            picture = from_samples(channels, icc, metadata, frames=len(pages), notes=(*notes, *more))
            yield replace(picture, share=sizes[index] / sum(sizes.values()))


def _bytes(page: Any) -> int:
    """About the size of the page's pixels once decoded."""
    samples = 3 if page.photometric == PALETTE else min(page.samplesperpixel, 4)
    return int(page.imagewidth * page.imagelength * samples * (2 if np.max(page.bitspersample) > 8 else 1))


def _by_pillow(data: bytes, index: int) -> tuple[Array, bytes | None]:
    """Decode a page of at most 8 bits with libtiff, for compressions and colour spaces that tifffile can't decode.

    The result is upright.
    """
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        image.seek(index)
        image.load()
        plain, icc = plain_mode(image)
        return np.asarray(plain), icc


def _by_opencv(data: bytes, index: int, spec: Page) -> Array:
    """Decode a page of 9 to 16 bits with libtiff, for compressions that tifffile can't decode.

    The result is upright.
    """
    import cv2

    samples = spec.colours + (spec.alpha is not None) + spec.extra
    decoded = None
    if spec.photometric in PLAIN and not spec.planar and samples in (1, 3, 4):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # no prints for damaged files
        buffer = np.frombuffer(data, np.uint8)
        pages = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(index, index + 1))[1]
        decoded = pages[0] if pages else None
    if decoded is None or decoded.dtype != np.uint16:
        raise InputError(
            f"{samples} samples of {spec.bits} bits with {spec.compression} compression need another package",
            "Save it with Deflate compression, or run pip install imagecodecs.",
        )
    if decoded.ndim == 3:
        decoded = decoded[:, :, (2, 1, 0, 3)[: decoded.shape[2]]]
    # OpenCV has scaled the values to 16 bits.
    return from_stored(decoded.reshape(*decoded.shape[:2], -1), replace(spec, bits=16))


def _metadata(data: bytes, file: Any, page: Any, spec: Page, left_pages: int) -> tuple[Metadata, tuple[str, ...]]:
    exif = Image.Exif()
    exif.bigtiff, exif.endian = file.is_bigtiff, file.byteorder
    exif.load_from_fp(io.BytesIO(data), page.offset)
    kept, lost, notes = true_exif(exif, spec.size)
    packet, gone = true_xmp(page.tags.valueof(0x02BC), spec.orientation, spec.size)
    geo = tuple(
        GeoTag(tag.code, int(tag.dtype), tag.value if isinstance(tag.value, str | tuple) else (tag.value,))
        for tag in (page.tags.get(code) for code in GEO_TAGS)
        if tag is not None
    )
    if geo and spec.orientation != 1:
        geo, gone = (), (*gone, "GeoTIFF tags")
    iptc = page.tags.valueof(0x83BB)
    if isinstance(iptc, tuple):  # stored as 32-bit numbers
        iptc = np.array(iptc, f"{file.byteorder}u4").tobytes()
    lost += gone
    lost += (f"{spec.extra} additional bands",) if spec.extra else ()
    lost += (f"{left_pages} reduced copies or masks",) if left_pages else ()
    lost += (f"{len(page.pages)} reduced copies",) if page.pages else ()
    resolution = [page.tags.valueof(tag) for tag in (0x011A, 0x011B)]
    unit = {2: 1.0, 3: 2.54}.get(int(page.tags.valueof(0x0128, 2)))
    dpi = dpi_of([value[0] / value[1] * unit for value in resolution]) if unit and all(resolution) else None
    return Metadata(exif=kept, xmp=packet, dpi=dpi, iptc=iptc, geo=geo, lost=lost), notes


_TILE = 256
_BIG_TIFF = 3_900_000_000


def write_tiff(path: Path, streams: Iterable[ImageStream], count: int = 1) -> None:
    """Write each of the `count` streams as a page of a TIFF at `path`: tiled, with Deflate compression, streamed."""
    import tifffile

    pointers: list[dict[int, dict[int, Any]]] = []
    writer: Any = None
    try:
        for stream in streams:
            spec, metadata = stream.spec, stream.metadata
            # A classic TIFF holds at most 4 GiB. Larger files are BigTIFF, which not every program reads.
            total = max(count * spec.bytes, round(spec.bytes / stream.share))
            writer = writer or tifffile.TiffWriter(path, byteorder="<", bigtiff=total > _BIG_TIFF)
            tags, folders = _tags(metadata)
            shape = (spec.height, spec.width, spec.samples)
            writer.write(
                _tiles(stream.row_chunks),
                shape=shape if spec.samples > 1 else shape[:2],
                dtype=np.uint16 if spec.bits == 16 else np.uint8,
                tile=(_TILE, _TILE),
                photometric="rgb" if spec.channels == 3 else "minisblack",
                planarconfig="contig" if spec.samples > 1 else None,
                extrasamples=["unassalpha"] if spec.alpha else None,
                compression="zlib",
                predictor=True,
                iccprofile=metadata.icc,
                resolution=metadata.dpi,
                resolutionunit="INCH" if metadata.dpi else None,
                extratags=tags,
                metadata=None,
                software=False,
                maxworkers=1,
            )
            pointers.append(folders)
    finally:
        if writer is not None:
            writer.close()
    _append_folders(path, pointers)


def _tiles(row_chunks: Iterable[Array]) -> Iterator[Array]:
    """Split the rows into tiles of `_TILE` x `_TILE` pixels, row by row. Tiles at the edges may be smaller."""
    for rows in _of_height(row_chunks, _TILE):
        rows = rows[..., 0] if rows.shape[2] == 1 else rows
        for x in range(0, rows.shape[1], _TILE):
            yield np.ascontiguousarray(rows[:, x : x + _TILE])


def _of_height(row_chunks: Iterable[Array], height: int) -> Iterator[Array]:
    """The same rows in chunks of `height` rows; the last chunk may have fewer."""
    held: list[Array] = []
    count = 0
    for rows in row_chunks:
        held.append(rows)
        count += len(rows)
        if count >= height:
            whole = np.concatenate(held)
            for start in range(0, count - height + 1, height):
                yield whole[start : start + height]
            held, count = [whole[count - count % height :].copy()], count % height
    if count:
        yield np.concatenate(held)


def _tags(metadata: Metadata) -> tuple[list[tuple[object, ...]], dict[int, dict[int, Any]]]:
    """The metadata as tags of the page, and the EXIF and GPS directories (IFDs) to which its tags point."""
    tags: list[tuple[object, ...]] = [(tag.code, tag.type, *_counted(tag.values), True) for tag in metadata.geo]
    folders: dict[int, dict[int, Any]] = {}
    for code, kind, content in ((0x02BC, 1, metadata.xmp), (0x83BB, 7, metadata.iptc)):
        if content:
            tags.append((code, kind, len(content), content, True))
    exif = load_exif(metadata.exif)
    for tag, value in exif.items():
        if tag not in (EXIF_IFD, GPS_IFD):
            tags.append((tag, *_value(value), True))
    for tag, name in ((EXIF_IFD, "ExifTag"), (GPS_IFD, "GPSTag")):
        folder = exif.get_ifd(tag)
        if folder:
            folders[tag] = dict(folder)
            tags.append((name, 4, 1, 0, True))
    return tags, folders


def _counted(values: tuple[float, ...] | str) -> tuple[int, object]:
    return (0, values) if isinstance(values, str) else (len(values), values if len(values) > 1 else values[0])


def _value(value: Any) -> tuple[int, int, object]:
    """Data type, count and value of a tag, as tifffile expects them."""
    if isinstance(value, str):
        return 2, 0, ExifText(value).encode() + b"\0"
    if isinstance(value, bytes):
        return 1, len(value), value
    values = value if isinstance(value, tuple) else (value,)
    if all(isinstance(one, int) for one in values):
        kind = 1 if len(values) > 4 else 3 if max(values) < 65536 else 4
        return kind, len(values), bytes(values) if kind == 1 else value
    pairs = [pair for one in values for pair in (one.numerator, one.denominator)]
    return 5, len(values), tuple(pairs)


def _append_folders(path: Path, pages: list[dict[int, dict[int, Any]]]) -> None:
    """Append the EXIF and GPS directories of each page to the file, and set the page's pointers to them."""
    if not any(pages):
        return
    with path.open("rb+") as file:
        big = file.read(4)[2] == 43
        head, count, entry, word = (8, "<Q", 20, "<Q") if big else (4, "<H", 12, "<I")
        file.seek(head)
        (at,) = struct.unpack(word, file.read(struct.calcsize(word)))
        for folders in pages:
            file.seek(at)
            (entries,) = struct.unpack(count, file.read(struct.calcsize(count)))
            first = file.tell()
            table = file.read(entries * entry + struct.calcsize(word))
            for index in range(entries):
                (tag,) = struct.unpack_from("<H", table, index * entry)
                if tag in folders:
                    end = file.seek(0, 2)
                    file.write(b"\0" * (end % 2))
                    offset = file.tell()
                    file.write(_folder(folders[tag], offset, big))
                    file.seek(first + index * entry + (12 if big else 8))
                    file.write(struct.pack(word, offset))
            (at,) = struct.unpack_from(word, table, entries * entry)


def _folder(values: dict[int, Any], offset: int, big: bool) -> bytes:
    header = b"II\x2b\x00\x08\x00\x00\x00" + b"\0" * 8 if big else b"II\x2a\x00\x08\x00\x00\x00"
    folder = TiffImagePlugin.ImageFileDirectory_v2(header)
    for tag, value in values.items():
        folder[tag] = ExifText(value) if isinstance(value, str) else value
    return bytes(folder.tobytes(offset))
