"""TIFF: its pages by their tags, decoded by tifffile, else by libtiff; and the streamed writer."""

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
def open_tiff(source: BinaryIO) -> Iterator[Any]:
    """The file by tifffile. Raises InputError for a camera's RAW file."""
    import logging

    import tifffile

    logging.getLogger("tifffile").disabled = True  # tifffile logs problems of damaged files
    with tifffile.TiffFile(source) as file:
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
    """Divide premultiplied colours by alpha, the last channel."""
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


def probe(source: BinaryIO, most_pixels: int) -> Header:
    """The header of the first full page, and how many there are. Raises InputError for one that is too large."""
    with open_tiff(source) as file:
        pages = full_pages(file)
        page = describe(file.pages[pages[0]])
    check_pixels(page.size, most_pixels)
    return Header(page.size, len(pages), _spec(page))


def _spec(page: Page) -> ImageSpec:
    channels = 1 if page.colours == 1 and page.photometric != PALETTE else 3
    return ImageSpec(*page.size, channels, page.alpha is not None, 8 if page.bits <= 8 else 16)


def read_pages(data: bytes, most_pixels: int) -> Iterator[DecodedImage]:
    """The full pages, decoded. Raises InputError for one that is too large or of a kind that is not supported."""
    with open_tiff(io.BytesIO(data)) as file:
        pages = full_pages(file)
        for index in pages:
            page = file.pages[index]
            spec = describe(page)
            # What more than four samples take is counted, too.
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
            yield from_samples(channels, icc, metadata, frames=len(pages), notes=(*notes, *more))


def _by_pillow(data: bytes, index: int) -> tuple[Array, bytes | None]:
    """A page of at most 8 bits whose compression, or colour space, only libtiff knows: it comes upright."""
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        image.seek(index)
        image.load()
        plain, icc = plain_mode(image)
        return np.asarray(plain), icc


def _by_opencv(data: bytes, index: int, spec: Page) -> Array:
    """A page of 9 to 16 bits whose compression only libtiff knows: it comes upright."""
    import cv2

    samples = spec.colours + (spec.alpha is not None) + spec.extra
    decoded = None
    if spec.photometric in PLAIN and not spec.planar and samples in (1, 3, 4):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # OpenCV prints problems of damaged files
        buffer = np.frombuffer(data, np.uint8)
        pages = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(index, index + 1))[1]
        decoded = pages[0] if pages else None
    if decoded is None or decoded.dtype != np.uint16:
        raise InputError(
            f"{samples} samples of {spec.bits} bits with {spec.compression} compression need a package more",
            "Save it with Deflate compression, or run pip install imagecodecs.",
        )
    if decoded.ndim == 3:
        decoded = decoded[:, :, (2, 1, 0, 3)[: decoded.shape[2]]]
    # OpenCV has brought the values to 16 bits.
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
    if isinstance(iptc, tuple):  # as numbers of four bytes
        iptc = np.array(iptc, f"{file.byteorder}u4").tobytes()
    lost += gone
    lost += (f"{spec.extra} more bands",) if spec.extra else ()
    lost += (f"{left_pages} reduced copies or masks",) if left_pages else ()
    lost += (f"{len(page.pages)} reduced copies",) if page.pages else ()
    resolution = [page.tags.valueof(tag) for tag in (0x011A, 0x011B)]
    unit = {2: 1.0, 3: 2.54}.get(int(page.tags.valueof(0x0128, 2)))
    dpi = dpi_of([value[0] / value[1] * unit for value in resolution]) if unit and all(resolution) else None
    return Metadata(exif=kept, xmp=packet, dpi=dpi, iptc=iptc, geo=geo, lost=lost), notes


_TILE = 256
_BIG_TIFF = 3_900_000_000


def write_tiff(path: Path, streams: Iterable[ImageStream]) -> None:
    import tifffile

    pointers: list[dict[int, dict[int, Any]]] = []
    writer: Any = None
    try:
        for stream in streams:
            spec, metadata = stream.spec, stream.metadata
            # Classic TIFF holds 4 GiB; beyond it the variant with 64-bit offsets, which not every program reads.
            writer = writer or tifffile.TiffWriter(path, byteorder="<", bigtiff=spec.bytes > _BIG_TIFF)
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
    """The rows as tiles of `_TILE` rows and columns, row by row; those at the border are smaller."""
    for rows in _of_height(row_chunks, _TILE):
        rows = rows[..., 0] if rows.shape[2] == 1 else rows
        for x in range(0, rows.shape[1], _TILE):
            yield np.ascontiguousarray(rows[:, x : x + _TILE])


def _of_height(row_chunks: Iterable[Array], height: int) -> Iterator[Array]:
    """The same rows in chunks of `height`; the last one may be less."""
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
    """The metadata as tags of the page, and the EXIF and GPS folders that it points to."""
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
    """Data type, count and value of a tag of the image itself, as tifffile takes them."""
    if isinstance(value, str):
        return 2, 0, value.encode("utf-8", "replace") + b"\0"
    if isinstance(value, bytes):
        return 1, len(value), value
    values = value if isinstance(value, tuple) else (value,)
    if all(isinstance(one, int) for one in values):
        kind = 1 if len(values) > 4 else 3 if max(values) < 65536 else 4
        return kind, len(values), bytes(values) if kind == 1 else value
    pairs = [pair for one in values for pair in (one.numerator, one.denominator)]
    return 5, len(values), tuple(pairs)


def _append_folders(path: Path, pages: list[dict[int, dict[int, Any]]]) -> None:
    """Put the EXIF and GPS folders of each page behind the file, and the page's pointers on them."""
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
        folder[tag] = value
    return bytes(folder.tobytes(offset))
