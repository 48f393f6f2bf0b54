"""Rows of pixels → a file, as they come: PNG and TIFF are never held whole, the other formats are."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, TiffImagePlugin

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import atomic_write
from pdd_cli.imaging import png
from pdd_cli.imaging.metadata import EXIF_IFD, GPS_IFD, Metadata, Text, load_exif
from pdd_cli.imaging.provenance import Provenance, append_to_bmp, seal, stamped_exif, stamped_xmp

Array = npt.NDArray[Any]

FORMATS = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".jif": "JPEG",
    ".jfi": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".avif": "AVIF",
    ".avifs": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jxl": "JXL",
}
"""Suffix → the name of its format; what pdd reads and writes, HEIF and JXL with Pillow's plugins for them."""

STREAMED = ("PNG", "TIFF")
"""The formats that are written row by row."""

_LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383, "AVIF": 65_535}
# For HEIF what libheif, and so most programs, would read.
_MOST_BYTES = {"BMP": 2**32 - 1, "HEIF": 2**32}
_SIXTEEN_BIT = ("PNG", "TIFF", "HEIF")
_WITH_ALPHA = ("PNG", "WEBP", "TIFF", "BMP", "AVIF", "HEIF", "JXL")
_LOSSY_ONLY = ("JPEG", "AVIF", "HEIF")
_NCLX = ("color_primaries", "transfer_characteristics", "matrix_coefficients", "full_range_flag")
_HEIF_MATRIX = 9  # of the luma of BT.2020, not of constant luminance
_HEIF_BITS = 10  # of 16: what devices read; x265 has 12, too
_ANIMATED = ("PNG", "WEBP", "AVIF")

_TILE = 256
# Rows that a PNG is filtered by at once, and values that are computed with at once: as the CPU's cache holds them.
_PNG_ROWS = 16
_LONG_TEXT = 1024  # bytes of a text that is compressed
_CACHED = 1 << 16
_BIG_TIFF = 3_900_000_000


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
    """One image of a file: its rows come in `row_chunks` (rows, width, samples) from top to bottom.

    `duration`: how long a frame of an animation is shown, in milliseconds.
    """

    spec: ImageSpec
    row_chunks: Iterable[Array]
    metadata: Metadata = field(default_factory=Metadata)
    duration: float | None = None


@dataclass(frozen=True)
class Encoding:
    """How files are written: `quality` 1 to 100 is for JPEG, AVIF and lossy WebP; `lossless` is for WebP."""

    quality: int = 95
    lossless: bool = False


def format_of(path: Path) -> str:
    """The format that the suffix of `path` names. Raises InputError for one that pdd doesn't write."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: can't write this format", f"Use one of {', '.join(FORMATS)}.") from None


def load_plugin(format: str) -> None:
    """Let Pillow know HEIF or JXL. Raises InputError where the plugin isn't installed."""
    try:
        if format == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener()
        elif format == "JXL":
            import pillow_jxl  # noqa: F401 - registers itself
    except ImportError as error:
        name = {"HEIF": "HEIC", "JXL": "JPEG XL"}[format]
        raise InputError(f"{name} needs a plugin that isn't installed: run pip install 'pdd-cli[formats]'") from error


def check_size(path: Path, width: int, height: int) -> None:
    """Raise InputError when the format of `path` can't hold an image of this size."""
    format = format_of(path)
    longest = _LONGEST_SIDE.get(format, 2**31 - 1)
    if max(width, height) > longest:
        raise InputError(
            f"{path}: {width}x{height} is too large for {format} (at most {longest} pixels a side)",
            "Use --format png or tiff.",
        )
    if width * height * 4 > _MOST_BYTES.get(format, 2**62):
        raise InputError(
            f"{path}: {width}x{height} is too large for {format} (at most 4 GiB)", "Use --format png or tiff."
        )


def check_lossless(path: Path) -> None:
    """Raise InputError when the format of `path` always loses something."""
    if format_of(path) in _LOSSY_ONLY:
        raise InputError(
            f"{path}: {format_of(path)} can't be written losslessly",
            "Use --format png, tiff, webp or jxl, or leave --lossless out.",
        )


def keeps_frames(path: Path) -> bool:
    """Whether the format of `path` holds several pages or frames."""
    return format_of(path) in (*_ANIMATED, "TIFF")


def stored_spec(path: Path, spec: ImageSpec) -> ImageSpec:
    """`spec` as it is written to `path`: JPEG has no alpha; 16 bits only PNG, TIFF and HEIF, and JPEG XL for gray."""
    format = format_of(path)
    deep = format in _SIXTEEN_BIT or (format == "JXL" and spec.samples == 1)
    return replace(
        spec,
        bits=spec.bits if deep else 8,
        alpha=spec.alpha and format in _WITH_ALPHA,
    )


def write_images(
    path: Path,
    streams: Iterable[ImageStream],
    *,
    count: int = 1,
    encoding: Encoding = Encoding(),
    provenance: Provenance | None = None,
) -> None:
    """Write the images `streams`, of which there are `count`, as one file of the suffix's format, whole or not at all.

    The rows of a stream are taken before the next stream is asked for. What the format can't hold is reduced:
    16 bits to 8, alpha to a white background, several images to the first. `provenance` is written to the metadata.

    Raises InputError when the format can't hold the size, PddError when the file doesn't hold every row and image in
    the end.
    """
    format = format_of(path)
    if not keeps_frames(path):
        streams, count = itertools.islice(streams, 1), 1
    if provenance is not None:
        streams = (replace(stream, metadata=_stamped(stream.metadata, provenance)) for stream in streams)
    counted = _Counted(_fitted(path, stream) for stream in streams)
    streams = iter(counted)
    with atomic_write(path) as temporary:
        if format == "TIFF":
            _write_tiff(temporary, streams)
        elif format == "PNG":
            with temporary.open("wb") as file:
                _write_png(file, streams, count)
        elif format == "HEIF":
            _write_heif(temporary, next(streams), encoding)
        else:
            _write_whole(temporary, format, streams, encoding)
        counted.check(path, count)
        if count > 1:
            _check_images(path, temporary, format, counted.streams)
        if provenance is not None:
            if format == "BMP":
                append_to_bmp(temporary, provenance)
            seal(temporary)


def _stamped(metadata: Metadata, provenance: Provenance) -> Metadata:
    exif, software = stamped_exif(metadata.exif, provenance)
    # Where a PNG names the program that made the input, that moves into the history like EXIF's.
    software = next((text.text for text in metadata.text if text.keyword == "Software"), software)
    return replace(
        metadata,
        exif=exif,
        xmp=stamped_xmp(metadata.xmp, provenance, software),
        text=tuple(text for text in metadata.text if text.keyword != "Software"),
        software=str(provenance),
    )


class _Counted:
    """Passes `streams` on and counts the rows taken from them; each one is read to its end before the next."""

    def __init__(self, streams: Iterable[ImageStream]) -> None:
        self._given = streams
        self._expected = 0
        self._rows = 0
        self._left: Iterator[Array] = iter(())
        self.streams: list[ImageStream] = []

    def __iter__(self) -> Iterator[ImageStream]:
        for stream in self._given:
            row_chunks = self._counting(stream.row_chunks)
            self._left, self._expected = row_chunks, self._expected + stream.spec.height
            self.streams.append(replace(stream, row_chunks=()))
            yield replace(stream, row_chunks=row_chunks)
            # A writer that knows the height doesn't ask for more than the last row: the check below does.
            for _ in row_chunks:
                pass

    def _counting(self, row_chunks: Iterable[Array]) -> Iterator[Array]:
        for rows in row_chunks:
            self._rows += len(rows)
            yield rows

    def check(self, path: Path, count: int) -> None:
        """Raise PddError where not all rows of `count` images were taken."""
        for _ in self._left:
            pass
        if (len(self.streams), self._rows) != (count, self._expected):
            raise PddError(
                f"{path}: {len(self.streams)} of {count} images and {self._rows} of {self._expected} rows were written",
                "This is a bug in pdd: please report it. The output was removed.",
            )


def _check_images(path: Path, written: Path, format: str, streams: Sequence[ImageStream]) -> None:
    """Raise PddError where the file `written` doesn't hold all of the `streams`, or not for as long."""
    if format == "TIFF":
        import tifffile

        with tifffile.TiffFile(written) as file:
            sizes = [(page.imagewidth, page.imagelength) for page in map(tifffile.TiffPage.aspage, file.pages)]
        complete = sizes == [(stream.spec.width, stream.spec.height) for stream in streams]
    else:
        # Encoders join frames that are equal, which then are shown for as long as both.
        shown = 0.0
        with Image.open(written, formats=[format]) as image:
            for index in range(int(getattr(image, "n_frames", 1))):
                image.seek(index)
                image.load()
                shown += image.info.get("duration") or 0
        complete = abs(shown - sum(round(stream.duration or 0) for stream in streams)) < len(streams)
    if not complete:
        raise PddError(
            f"{path}: not all of the {len(streams)} images are in the file that was written",
            "This is a bug in pdd: please report it. The output was removed.",
        )


def _fitted(path: Path, stream: ImageStream) -> ImageStream:
    spec = stored_spec(path, stream.spec)
    check_size(path, spec.width, spec.height)
    row_chunks: Iterable[Array] = stream.row_chunks
    if spec.bits != stream.spec.bits:
        row_chunks = (from_float(to_float(rows), spec.bits) for rows in row_chunks)
    if spec.alpha != stream.spec.alpha:
        row_chunks = (_on_white(rows) for rows in row_chunks)
    metadata, _ = stream.metadata.held_by(format_of(path), gray=spec.channels == 1)
    return replace(stream, spec=spec, row_chunks=row_chunks, metadata=metadata)


def left_out(path: Path, stream: ImageStream, *, count: int = 1) -> tuple[str, ...]:
    """Names of what a file of the suffix of `path` can't hold of one of `count` streams.

    Raises InputError for colours that it can't hold.
    """
    names = stream.metadata.held_by(format_of(path), gray=stream.spec.channels == 1, animated=count > 1)[1]
    if count > 1 and format_of(path) == "TIFF" and stream.duration:
        names += ("times of the frames",)
    is_reduced = stored_spec(path, stream.spec).bits < stream.spec.bits
    return (*names, f"all but 8 of {stream.spec.bits} bits") if is_reduced else names


def _on_white(rows: Array) -> Array:
    values = to_float(rows)
    alpha = values[..., -1:]
    return from_float(values[..., :-1] * alpha + (1 - alpha), rows.dtype.itemsize * 8)


def to_float(values: Array) -> npt.NDArray[np.float32]:
    """Unsigned integers to 0..1."""
    return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)


def from_float(values: Array, bits: int) -> Array:
    """0..1, clipped, to unsigned integers of 8 or 16 bits, rounded. Raises ValueError for values that aren't finite."""
    top = (1 << bits) - 1
    found = np.empty(values.shape, np.uint16 if bits == 16 else np.uint8)
    if not values.size:
        return found
    # In parts that stay in the CPU's cache.
    rows = max(1, _CACHED // values[0].size) if values.ndim > 1 else _CACHED
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        if not np.isfinite(part).all():
            raise ValueError("pixel values that are not finite")
        # In float64 for 16 bits: float32 has no half steps left there.
        scaled = np.multiply(part, top, dtype=np.float64 if bits == 16 else np.float32)
        np.clip(np.rint(scaled, out=scaled), 0, top, out=scaled)
        found[start : start + rows] = scaled
    return found


# --- PNG --------------------------------------------------------------------------------------------------------


def _write_png(file: BinaryIO, streams: Iterator[ImageStream], count: int) -> None:
    """Any PNG of 8 or 16 bits, an animation of several streams: Pillow holds all of it, and has no 16 bits of RGB."""
    sequence = itertools.count()
    first: ImageSpec | None = None
    for stream in streams:
        spec = stream.spec
        if first is None:
            first = spec
            colour = {1: 0, 2: 4, 3: 2, 4: 6}[spec.samples]
            file.write(png.SIGNATURE)
            header = struct.pack(">IIBBBBB", spec.width, spec.height, spec.bits, colour, 0, 0, 0)
            file.write(png.chunk(b"IHDR", header))
            if count > 1:
                file.write(png.chunk(b"acTL", struct.pack(">II", count, stream.metadata.plays)))
            for kind, content in _png_metadata(stream.metadata):
                file.write(png.chunk(kind, content))
        elif spec != first:
            raise InputError("pages of different sizes or kinds can't be frames of one PNG", "Use --format tiff.")
        if count > 1:
            # The whole canvas, in place of what was there.
            shown = round(stream.duration or 0)
            delay = (shown, 1000) if shown < 65536 else (min(65535, round(shown / 1000)), 1)
            control = struct.pack(">IIIIIHHBB", next(sequence), spec.width, spec.height, 0, 0, *delay, 0, 0)
            file.write(png.chunk(b"fcTL", control))
        for data in _png_data(stream):
            if spec is first:
                file.write(png.chunk(b"IDAT", data))
            else:
                file.write(png.chunk(b"fdAT", struct.pack(">I", next(sequence)) + data))
    file.write(png.chunk(b"IEND", b""))


def _png_metadata(metadata: Metadata) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of it, (kind, content)."""
    if metadata.cicp:
        yield b"cICP", bytes(metadata.cicp)
    if metadata.icc:
        yield b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)
    yield from metadata.colour
    if metadata.dpi:
        yield b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in metadata.dpi), 1)
    if metadata.exif:
        yield b"eXIf", metadata.exif.removeprefix(b"Exif\0\0")
    if metadata.xmp:
        yield b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp
    if metadata.iptc:
        # As ImageMagick and exiftool have it.
        block = _photoshop(metadata.iptc)
        yield b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(f"\niptc\n{len(block):8}\n{block.hex()}\n".encode())
    texts = metadata.text
    if metadata.comment:
        texts += (Text("Comment", metadata.comment.decode("utf-8", "replace")),)
    if metadata.software:
        texts += (Text("Software", metadata.software),)
    for text in texts:
        yield _png_text(text)


def _png_text(text: Text) -> tuple[bytes, bytes]:
    keyword = text.keyword.encode("latin-1") + b"\0"
    try:
        plain = None if text.language is not None else text.text.encode("latin-1")
    except UnicodeEncodeError:
        plain = None
    if plain is None:
        content = text.text.encode()
        packed = len(content) > _LONG_TEXT
        places = f"{text.language or ''}\0{text.translated}\0".encode()
        return b"iTXt", keyword + bytes([packed, 0]) + places + (zlib.compress(content) if packed else content)
    if len(plain) > _LONG_TEXT:
        return b"zTXt", keyword + b"\0" + zlib.compress(plain)
    return b"tEXt", keyword + plain


def _png_data(stream: ImageStream) -> Iterator[bytes]:
    """The rows, filtered and compressed."""
    spec = stream.spec
    # Of filtered photographs only the statistics and flat areas can be used: to look for repetitions takes ten times as
    # long, and the short ones that are found make the file larger.
    compressor = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    above = np.zeros(spec.width * spec.samples * spec.bits // 8, np.uint8)
    for rows in stream.row_chunks:
        for start in range(0, len(rows), _PNG_ROWS):
            part = rows[start : start + _PNG_ROWS].astype(f">u{spec.bits // 8}")
            values = part.view(np.uint8).reshape(-1, len(above))
            data = compressor.compress(_filtered(values, above, spec.samples * spec.bits // 8).tobytes())
            above = values[-1]
            if data:
                yield data
    yield compressor.flush()


def _filtered(rows: Array, above: Array, step: int) -> Array:
    """The rows (n, bytes) after the one `above`, each by the PNG filter whose differences are smallest (n, 1 + bytes).

    `step`: bytes per pixel. PNG specification, section 9; the choice is the heuristic that it recommends.
    """
    up = np.vstack([above, rows[:-1]])
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
    # In 8 bits throughout, which a CPU does 64 at a time. Paeth: where left and up differ from the corner to the same
    # side, |left + up - 2 corner| is the sum of both differences, more than either.
    to_left, to_up = _distance(up, corner), _distance(left, corner)
    to_corner = _distance(to_left, to_up) | _mask((left > corner) == (up > corner))
    is_left = _mask((to_left <= to_up) & (to_left <= to_corner))
    is_up = _mask(to_up <= to_corner)
    paeth = (left & is_left) | (((up & is_up) | (corner & ~is_up)) & ~is_left)
    mean = (left & up) + ((left ^ up) >> 1)
    candidates = np.stack([rows, rows - left, rows - up, rows - mean, rows - paeth])
    cost = np.minimum(candidates, -candidates).sum(axis=2, dtype=np.uint32)
    best = cost.argmin(axis=0)
    return np.hstack([best[:, None].astype(np.uint8), candidates[best, np.arange(len(rows))]])


def _distance(a: Array, b: Array) -> Array:
    distance: Array = np.maximum(a, b) - np.minimum(a, b)
    return distance


def _mask(condition: npt.NDArray[np.bool_]) -> Array:
    """255 where it holds, else 0."""
    mask: Array = -condition.view(np.uint8)
    return mask


# --- TIFF -------------------------------------------------------------------------------------------------------


def _write_tiff(path: Path, streams: Iterable[ImageStream]) -> None:
    import tifffile

    pointers: list[dict[int, dict[int, Any]]] = []
    writer: Any = None
    try:
        for stream in streams:
            spec, metadata = stream.spec, stream.metadata
            # Classic TIFF holds 4 GiB; beyond it the variant with 64-bit offsets, which not every program reads.
            writer = writer or tifffile.TiffWriter(path, byteorder="<", bigtiff=spec.bytes > _BIG_TIFF)
            tags, folders = _tiff_tags(metadata)
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
    _append_tiff_folders(path, pointers)


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


def _tiff_tags(metadata: Metadata) -> tuple[list[tuple[object, ...]], dict[int, dict[int, Any]]]:
    """The metadata as tags of the page, and the EXIF and GPS folders that it points to."""
    tags: list[tuple[object, ...]] = [(tag.code, tag.type, *_counted(tag.values), True) for tag in metadata.geo]
    folders: dict[int, dict[int, Any]] = {}
    for code, kind, content in ((0x02BC, 1, metadata.xmp), (0x83BB, 7, metadata.iptc)):
        if content:
            tags.append((code, kind, len(content), content, True))
    exif = load_exif(metadata.exif)
    for tag, value in exif.items():
        if tag not in (EXIF_IFD, GPS_IFD):
            tags.append((tag, *_tiff_value(value), True))
    for tag, name in ((EXIF_IFD, "ExifTag"), (GPS_IFD, "GPSTag")):
        folder = exif.get_ifd(tag)
        if folder:
            folders[tag] = dict(folder)
            tags.append((name, 4, 1, 0, True))
    return tags, folders


def _counted(values: tuple[float, ...] | str) -> tuple[int, object]:
    return (0, values) if isinstance(values, str) else (len(values), values if len(values) > 1 else values[0])


def _tiff_value(value: Any) -> tuple[int, int, object]:
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


def _append_tiff_folders(path: Path, pages: list[dict[int, dict[int, Any]]]) -> None:
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
                    file.write(_tiff_folder(folders[tag], offset, big))
                    file.seek(first + index * entry + (12 if big else 8))
                    file.write(struct.pack(word, offset))
            (at,) = struct.unpack_from(word, table, entries * entry)


def _tiff_folder(values: dict[int, Any], offset: int, big: bool) -> bytes:
    header = b"II\x2b\x00\x08\x00\x00\x00" + b"\0" * 8 if big else b"II\x2a\x00\x08\x00\x00\x00"
    folder = TiffImagePlugin.ImageFileDirectory_v2(header)
    for tag, value in values.items():
        folder[tag] = value
    return bytes(folder.tobytes(offset))


# --- the other formats ------------------------------------------------------------------------------------------


def _write_whole(path: Path, format: str, streams: Iterable[ImageStream], encoding: Encoding) -> None:
    """With Pillow, from arrays of the whole image."""
    images: list[Image.Image] = []
    durations: list[int] = []
    first: ImageStream | None = None
    for stream in streams:
        first = first or stream
        if (stream.spec.width, stream.spec.height) != (first.spec.width, first.spec.height):
            raise InputError(f"pages of different sizes can't be frames of one {format}", "Use --format tiff.")
        whole = _whole(stream)
        image = Image.fromarray(whole[..., 0] if stream.spec.samples == 1 else whole)
        if format == "JXL":
            load_plugin(format)
        if stream.metadata.icc and not _has_profile(format, stream.spec):
            image = _as_srgb(image, stream.metadata.icc)
        images.append(image.convert("RGBA") if image.mode == "LA" else image)
        durations.append(round(stream.duration or 0))
    assert first is not None
    options = _pillow_options(format, first, encoding)
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:], "duration": durations}
        options |= {"loop": first.metadata.plays} if format == "WEBP" else {}
    images[0].save(path, format, **options)


def _has_profile(format: str, spec: ImageSpec) -> bool:
    """Whether a file can have a colour profile that fits such pixels; without one it means sRGB."""
    return format in ("JPEG", "TIFF", "PNG", "HEIF") or (format in ("WEBP", "AVIF") and spec.channels == 3)


def _whole(stream: ImageStream) -> Array:
    """All rows of `stream` in one array."""
    spec = stream.spec
    whole = np.empty((spec.height, spec.width, spec.samples), np.uint16 if spec.bits == 16 else np.uint8)
    row = 0
    for rows in stream.row_chunks:
        whole[row : row + len(rows)] = rows
        row += len(rows)
    return whole


def _as_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """`image` in sRGB."""
    bands = image.split()
    colours = image.convert("L") if image.mode == "LA" else image.convert("RGB") if image.mode == "RGBA" else image
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        return image  # 16 bits of gray
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(colours, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image  # a damaged profile
    assert converted is not None
    planes = converted.split() if len(bands) > 2 else (converted.getchannel("G"),)
    return Image.merge(image.mode, (*planes, *bands[len(planes) :]))


def _write_heif(path: Path, stream: ImageStream, encoding: Encoding) -> None:
    """Not with Pillow, which has no 16 bits of several channels."""
    load_plugin("HEIF")
    import pillow_heif

    spec, metadata = stream.spec, stream.metadata
    pixels, mode = _whole(stream), ("L", "LA", "RGB", "RGBA")[spec.samples - 1]
    if spec.bits == 16:
        top = (1 << _HEIF_BITS) - 1
        pixels, mode = np.rint(to_float(pixels) * top).astype(np.uint16), f"{mode};{_HEIF_BITS}"
    file = pillow_heif.from_bytes(mode, (spec.width, spec.height), pixels.tobytes())
    if metadata.icc:
        file.info["icc_profile"] = metadata.icc
    elif metadata.cicp:
        file.info["nclx_profile"] = dict(zip(_NCLX, (*metadata.cicp[:2], _HEIF_MATRIX, 1), strict=True))
    # Chroma at full resolution, as in JPEG.
    options = {"quality": encoding.quality, "chroma": 444, "bit_depth": _HEIF_BITS}
    with path.open("wb") as target:
        file.save(target, exif=metadata.exif, xmp=metadata.xmp, **options)


def _pillow_options(format: str, stream: ImageStream, encoding: Encoding) -> dict[str, Any]:
    options: dict[str, Any] = {}
    metadata = stream.metadata
    match format:
        case "JPEG":
            # Chroma at full resolution: nothing that the model drew is thrown away again.
            options = {"quality": encoding.quality, "subsampling": 0, "optimize": True}
            if metadata.iptc:
                content = b"Photoshop 3.0\0" + _photoshop(metadata.iptc)
                options["extra"] = b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
            options |= {"comment": metadata.comment} if metadata.comment else {}
        case "WEBP":
            options = {"quality": encoding.quality, "method": 4, "exact": True, "lossless": encoding.lossless}
        case "AVIF":
            options = {"quality": encoding.quality, "subsampling": "4:4:4"}
        case "JXL":
            return {
                "quality": encoding.quality,
                "lossless": encoding.lossless,
                "use_container": True,
                "exif": metadata.exif or b"",
                "xmp": metadata.xmp or b"",
            }
        case "BMP":
            return {"dpi": metadata.dpi} if metadata.dpi else {}
    if metadata.icc and _has_profile(format, stream.spec):
        options["icc_profile"] = metadata.icc
    for name in ("exif", "xmp"):
        if getattr(metadata, name):
            options[name] = getattr(metadata, name)
    if metadata.dpi and format == "JPEG":
        options["dpi"] = metadata.dpi
    return options


def _photoshop(iptc: bytes) -> bytes:
    """IPTC as a resource of Photoshop."""
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
