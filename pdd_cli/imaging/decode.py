"""File ↔ array: bit depth, alpha, orientation and what is said beside the pixels; and the images below a folder."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from pdd_cli.errors import InputError, unloadable
from pdd_cli.imaging import png, tiff, xmp
from pdd_cli.imaging.bmp import bit_fields, decode_bit_fields
from pdd_cli.imaging.encode import (
    FORMATS,
    Encoding,
    ImageSpec,
    ImageStream,
    from_float,
    load_plugin,
    to_float,
    write_images,
)
from pdd_cli.imaging.jxl import is_jxl, size_of, xmp_of
from pdd_cli.imaging.metadata import EXIF_IFD, GEO_TAGS, GPS_IFD, ORIENTATION, GeoTag, Metadata, Text, kept_exif

Array = npt.NDArray[Any]

MOST_PIXELS = 178_956_970
"""Pillow's limit against decompression bombs: what is larger is refused where the caller sets no limit of its own."""

_KINDS = "PNG, JPEG, WebP, TIFF, BMP, AVIF, HEIC, JPEG XL or GIF"


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded image, upright.

    `pixels`: (H, W, C) uint8 or uint16, C = 1 (gray) or 3 (RGB). `alpha`: (H, W) of the same type, straight (not
    premultiplied), or None. `metadata`: with a profile that fits the channels. `frames`: how many pages or frames the
    file holds; `duration`: how long an animation shows this one, in milliseconds. `notes`: what was wrong with it.
    """

    pixels: Array
    alpha: Array | None = None
    metadata: Metadata = field(default_factory=Metadata)
    frames: int = 1
    duration: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> ImageSpec:
        """The shape of the image in a file."""
        return ImageSpec(self.width, self.height, self.channels, self.alpha is not None, self.bits)

    @property
    def interleaved(self) -> Array:
        """(H, W, 1 to 4): the pixels, and the alpha last."""
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


def find_images(
    folder: Path,
    *,
    recursive: bool = True,
    wanted: Callable[[str], bool] | None = None,
    problems: list[str] | None = None,
) -> list[Path]:
    """The images below `folder`, by suffix, sorted; hidden files and folders are passed over, links followed once.

    `wanted` says of a file's name whether it is looked for, in place of `is_image`. Folders below that can't be read
    are added to `problems`.

    Raises InputError when `folder`, or without `problems` one below, isn't a folder that can be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found: list[Path] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        text = f"can't read the folder {error.filename}: {error.strerror}"
        if problems is None or Path(error.filename) == folder:
            raise InputError(text) from error
        problems.append(text)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that was visited, or a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".") and (wanted or is_image)(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def is_image(path: Path | str) -> bool:
    """Whether the suffix is one of a format that pdd reads."""
    return Path(path).suffix.lower() in FORMATS


def read_image(path: Path) -> DecodedImage:
    """Read an image of any of the FORMATS, whatever the suffix says; of several pages or frames the first.

    The orientation is applied. Palette images become RGB (gray where the palette is), CMYK becomes RGB; 16 bits per
    channel stay 16. Raises InputError that names the file and the reason for one that is damaged, cut short, too
    large (MOST_PIXELS) or of another kind.
    """
    return next(decode_pages(path, read_bytes(path)))


def read_bytes(path: Path) -> bytes:
    """The content of an image file, not empty. Raises InputError for one that can't be read."""
    _check_kind(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    if not data:
        raise InputError(f"can't read {path}: the file is empty")
    return data


def _check_kind(path: Path) -> None:
    """Raise InputError for a pipe or a device, which would be read for ever."""
    if path.exists() and not path.is_file():
        raise InputError(f"can't read {path}: not a file")


def decode_pages(path: Path, data: bytes, *, most_pixels: int = MOST_PIXELS) -> Iterator[DecodedImage]:
    """The pages of a TIFF or frames of an animation, of another file the one image in it; `path` is for messages.

    Raises InputError as `read_image` does; `most_pixels` is the largest size that a page may have.
    """
    pages = _pages(path, data, most_pixels)
    while True:
        with _told(path), _STRICT_PILLOW:
            picture = next(pages, None)
        if picture is None:
            return
        yield picture


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone. Raises InputError as `read_image` does."""
    return probe(path).size


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: the upright (width, height), frames, and the spec of the pixels."""

    size: tuple[int, int]
    frames: int
    spec: ImageSpec


def probe(path: Path, *, most_pixels: int = MOST_PIXELS) -> Header:
    """Look at the header of an image file alone. Raises InputError as `read_image` does."""
    _check_kind(path)
    with _told(path):
        with path.open("rb") as file:
            head = file.read(_HEAD)
        _refuse_camera_raw(path, head)
        if is_jxl(head):
            size = size_of(path.read_bytes())
            _check_pixels(size, most_pixels)
            return Header(size, 1, ImageSpec(*size, 3, True))  # the most that it may hold
        if head.startswith(_TIFF_HEADS):
            with tiff.open_tiff(path) as file:
                pages = tiff.full_pages(file)
                page = tiff.describe(file.pages[pages[0]])
            _check_pixels(page.size, most_pixels)
            return Header(page.size, len(pages), _tiff_spec(page))
        fields = bit_fields(head)
        if fields is not None:
            _check_pixels((fields.width, fields.height), most_pixels)
            spec = ImageSpec(fields.width, fields.height, 3, bool(fields.masks[3]))
            return Header((fields.width, fields.height), 1, spec)
    with _told(path), _STRICT_PILLOW:
        source: io.BytesIO | Path = path
        chunks = None
        if head.startswith(png.SIGNATURE):
            with path.open("rb") as file:
                chunks = png.split(file, whole=False)
            source = io.BytesIO(chunks.pixels)
        with Image.open(source, formats=_formats(head)) as image:
            _check_pixels(image.size, most_pixels)
            turned = _exif(image, chunks)[1] in (5, 6, 7, 8)
            size = (image.height, image.width) if turned else (image.width, image.height)
            alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info
            alpha = alpha or image.format == "GIF" or (chunks is not None and chunks.key is not None)
            channels = 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16") else 3
            bits = 16 if image.mode.startswith("I;16") or ";16" in _stored(image) or _is_deep(image, head) else 8
            return Header(size, _frames(image)[1], ImageSpec(*size, channels, alpha, bits))


def write_image(path: Path, picture: DecodedImage, *, quality: int = 95, lossless: bool = False) -> None:
    """Write `picture` in the format of the suffix of `path`, whole or not at all.

    PNG and TIFF keep 16 bits, other formats are rounded to 8; JPEG has no alpha: the picture is laid on white.
    `quality` 1..100 is for JPEG, AVIF and lossy WebP. Raises InputError when the format can't hold the size.
    """
    stream = ImageStream(picture.spec, [picture.interleaved], picture.metadata)
    write_images(path, [stream], encoding=Encoding(quality, lossless))


# --- reading ----------------------------------------------------------------------------------------------------

_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Bytes that tell the format.
_HEAD = 128

# By these names and these beginnings; those that are TIFFs, DNG and others, by their tags.
# fmt: off
_RAW_SUFFIXES = frozenset([
    ".3fr", ".ari", ".arw", ".bay", ".cap", ".cr2", ".cr3", ".crw", ".dcr", ".dcs", ".dng", ".drf", ".eip", ".erf",
    ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".ptx",
    ".pxn", ".raf", ".raw", ".rw2", ".rwl", ".rwz", ".sr2", ".srf", ".srw", ".x3f",
])
# fmt: on
_RAW_HEADS = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM", b"II\x1a\0\0\0HEAPCCDR")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever goes wrong while `path` is decoded, as an InputError that names it and the reason."""
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        raise unloadable(error) from error
    except UnidentifiedImageError as error:
        raise InputError(f"can't read {path}: not a {_KINDS} image, or damaged") from error
    except InputError as error:
        raise InputError(f"can't read {path}: {error.message}", error.hint) from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or f'damaged: {error}'}") from error
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError…, by where the file is broken.
        what = re.split(r"\.\s|\n", str(error))[0]
        raise InputError(f"can't read {path}: damaged: {what}") from error


def _refuse_camera_raw(path: Path, head: bytes) -> None:
    """Raise InputError for a camera's RAW file, of which only a small preview could be read."""
    by_content = head.startswith(_RAW_HEADS) or head[8:10] == b"CR" or head[4:12] == b"ftypcrx "
    if by_content or path.suffix.lower() in _RAW_SUFFIXES:
        raise tiff.CAMERA_RAW


def _formats(head: bytes) -> tuple[str, ...]:
    """The formats that a file with this beginning may have, their plugins loaded. Raises InputError without those."""
    if is_jxl(head):
        load_plugin("JXL")
        return ("JXL",)
    brands = head[8 : int.from_bytes(head[:4], "big")] if head[4:8] == b"ftyp" else b""
    if any(brands[at : at + 4] in _HEIF_BRANDS for at in range(0, len(brands), 4)):
        load_plugin("HEIF")
        return ("HEIF",)
    return _PILLOW_FORMATS


def _check_pixels(size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        raise InputError(
            f"too large ({size[0]}x{size[1]} pixels; at most {most / 1e6:.0f} megapixels)",
            "Only pdd upscale reads larger ones, with --max-memory.",
        )


class _StrictPillow:
    """Within it, Pillow reports a file cut short and prints no warnings.

    Of several threads that are in it the last one to leave puts everything back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
                self._before.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                # pyiqa switches this on for the whole process when it is imported.
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                # `_check_pixels` does it, before anything is decoded, by the limit that its caller has the memory for.
                Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.close()


_STRICT_PILLOW = _StrictPillow()


def _stored(image: Image.Image) -> str:
    """The raw modes that Pillow is about to reduce to 8 bits: "RGB;16B" and the like, but not the one of its own."""
    if image.format != "PNG" or image.mode.startswith("I;16"):
        return ""
    return " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))


def _pages(path: Path, data: bytes, most_pixels: int) -> Iterator[DecodedImage]:
    head = data[:_HEAD]
    _refuse_camera_raw(path, head)
    if head.startswith(_TIFF_HEADS):
        yield from _tiff_pages(data, most_pixels)
        return
    fields = bit_fields(head)
    if fields is not None:
        _check_pixels((fields.width, fields.height), most_pixels)
        yield _picture(decode_bit_fields(data, fields), None, Metadata())
        return
    yield from _pillow_pages(data, most_pixels)


def _picture(
    channels: Array, icc: object, metadata: Metadata, *, frames: int = 1, duration: object = None, notes: _Notes = ()
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


_Notes = tuple[str, ...]
_NONE: _Notes = ()


# --- TIFF -------------------------------------------------------------------------------------------------------


def _tiff_spec(page: tiff.Page) -> ImageSpec:
    channels = 1 if page.colours == 1 and page.photometric != tiff.PALETTE else 3
    return ImageSpec(*page.size, channels, page.alpha is not None, 8 if page.bits <= 8 else 16)


def _tiff_pages(data: bytes, most_pixels: int) -> Iterator[DecodedImage]:
    with tiff.open_tiff(data) as file:
        pages = tiff.full_pages(file)
        for index in pages:
            page = file.pages[index]
            spec = tiff.describe(page)
            # What more than four samples take is counted, too.
            _check_pixels((spec.width * -(-(spec.colours + spec.extra) // 4), spec.height), most_pixels)
            channels, icc, notes = tiff.decode(page, spec), spec.icc, _NONE
            if channels is not None:
                if spec.photometric == tiff.CMYK:
                    channels, icc, notes = _from_cmyk_samples(channels, spec.icc)
                channels = _upright(channels, spec.orientation)
            elif spec.bits <= 8:
                channels, icc = _tiff_by_pillow(data, index)
            else:
                channels = _tiff_by_opencv(data, index, spec)
            if spec.photometric == tiff.PALETTE:
                channels = _without_copies(channels) if channels.ndim == 3 else channels
            metadata, more = _tiff_metadata(data, file, page, spec, len(file.pages) - len(pages))
            yield _picture(channels, icc, metadata, frames=len(pages), notes=(*notes, *more))


def _tiff_by_pillow(data: bytes, index: int) -> tuple[Array, bytes | None]:
    """A page of at most 8 bits whose compression, or colour space, only libtiff knows: it comes upright."""
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        image.seek(index)
        image.load()
        plain, icc = _plain_mode(image)
        return np.asarray(plain), icc


def _tiff_by_opencv(data: bytes, index: int, spec: tiff.Page) -> Array:
    """A page of 9 to 16 bits whose compression only libtiff knows: it comes upright."""
    import cv2

    samples = spec.colours + (spec.alpha is not None) + spec.extra
    decoded = None
    if spec.photometric in tiff.PLAIN and not spec.planar and samples in (1, 3, 4):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it prints what it finds in damaged files
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
    return tiff.from_stored(decoded.reshape(*decoded.shape[:2], -1), replace(spec, bits=16))


def _tiff_metadata(
    data: bytes, file: Any, page: Any, spec: tiff.Page, left_pages: int
) -> tuple[Metadata, tuple[str, ...]]:
    exif = Image.Exif()
    exif.bigtiff, exif.endian = file.is_bigtiff, file.byteorder
    exif.load_from_fp(io.BytesIO(data), page.offset)
    kept, lost, notes = _true_exif(exif, spec.size)
    packet, gone = _true_xmp(page.tags.valueof(0x02BC), spec.orientation, spec.size)
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
    dpi = _dpi([value[0] / value[1] * unit for value in resolution]) if unit and all(resolution) else None
    return Metadata(exif=kept, xmp=packet, dpi=dpi, iptc=iptc, geo=geo, lost=lost), notes


# --- the formats of Pillow --------------------------------------------------------------------------------------


def _pillow_pages(data: bytes, most_pixels: int, notes: _Notes = ()) -> Iterator[DecodedImage]:
    if is_jxl(data):
        _check_pixels(size_of(data), most_pixels)
    chunks = png.split(io.BytesIO(data)) if data.startswith(png.SIGNATURE) else None
    source = chunks.pixels if chunks else data
    with Image.open(io.BytesIO(source), formats=_formats(data[:_HEAD])) as image:
        _check_pixels(image.size, most_pixels)
        first, frames = _frames(image)
        # Asked before it is loaded, and then has no tiles any more.
        deep = ";16" in _stored(image)
        played = _played(chunks.pixels, image.size) if chunks and frames > 1 else None
        for index in range(first, first + frames):
            if played is None:
                image.seek(index)
                _check_pixels(image.size, most_pixels)
            exif, orientation, damage = _exif(image, chunks)
            icc = image.info.get("icc_profile")
            if deep and frames == 1:
                assert chunks is not None
                image.load()  # finds out whether it is cut short, which OpenCV prints
                channels = _decode_png16(chunks)
            elif _is_deep(image, data) and frames == 1:
                channels = _decode_heif(data) if image.format == "HEIF" else _decode_avif(data)
            elif played is not None:
                channels, image.info["duration"] = next(played)
            else:
                try:
                    image.load()
                except OSError:
                    if image.format not in ("JPEG", "MPO") or index:
                        raise
                    yield from _pillow_pages(_with_end(data), most_pixels, ("its end mark is missing",))
                    return
                plain, icc = _plain_mode(image) if frames == 1 or image.format == "MPO" else _frame(image)
                channels = np.asarray(plain)
                if chunks is not None and chunks.key is not None:  # 16 bits of gray
                    channels = _with_key(channels, chunks.key)
            if image.format == "HEIF" and channels.shape[-1] == 4 and "chroma" not in image.info:
                channels = _without_copies(channels)  # libheif gives gray with alpha as RGBA
            if image.format == "JXL" and not getattr(image, "jpeg", False):
                orientation = 1  # the decoder has turned it; not where it gives back a JPEG
            channels = _upright(channels, orientation)
            size = (channels.shape[1], channels.shape[0])
            metadata, more = _metadata(image, data, chunks, exif, orientation, size)
            if frames > 1 and (deep or _is_deep(image, data)):
                metadata = replace(metadata, lost=(*metadata.lost, "more than 8 bits of an animation"))
            if chunks is not None:
                icc, more = _png_profile(chunks, more)
            duration = image.info.get("duration") if frames > 1 else None
            yield _picture(channels, icc, metadata, frames=frames, duration=duration, notes=(*notes, *damage, *more))


def _with_end(data: bytes) -> bytes:
    """A JPEG that lacks its end mark and nothing else, with it. Raises OSError where pixels are missing, too.

    Those that are missing would be made of what comes behind.
    """
    body = data.rstrip(b"\xff")
    found: list[Array] = []
    for behind in (b"", b"\x55" * _FILLING, b"\xaa" * _FILLING, b"\xfe\x37\xc9\x92\x6d" * _FILLING):
        with Image.open(io.BytesIO(body + behind + b"\xff\xd9"), formats=("JPEG",)) as image:
            found.append(np.asarray(image))
    if not all(np.array_equal(found[0], other) for other in found):
        raise OSError("image file is truncated")
    return body + b"\xff\xd9"


def _played(pixels: bytes, size: tuple[int, int]) -> Iterator[tuple[Array, float]]:
    """The frames of an animated PNG as they are shown: (H, W, 3), or (H, W, 4) where there is alpha; and how long.

    Pillow blends the alpha of a frame like a colour, which makes holes, and restores nothing below the first frame.
    """
    stored = list(png.frames(pixels))
    canvas = Image.new("RGBA", size)
    with_alpha = any(frame.disposal == 1 for frame in stored[:-1])
    for frame in stored:
        if frame.left + frame.width > size[0] or frame.top + frame.height > size[1]:
            raise ValueError("a frame that is larger than the image")
        with Image.open(io.BytesIO(frame.file), formats=("PNG",)) as image:
            plain = _plain_mode(image)[0]
            with_alpha = with_alpha or plain.mode in ("LA", "RGBA")
            if plain.mode == "I;16":
                plain = Image.fromarray((np.asarray(plain) >> 8).astype(np.uint8))
            colours = plain.convert("RGBA")
        before, place = canvas.copy(), (frame.left, frame.top)
        if frame.is_over:
            canvas.alpha_composite(colours, place)
        else:
            canvas.paste(colours, place)
        yield np.asarray(canvas if with_alpha else canvas.convert("RGB")), frame.duration
        if frame.disposal == 1:
            canvas.paste((0, 0, 0, 0), (*place, frame.left + frame.width, frame.top + frame.height))
        elif frame.disposal == 2:
            canvas = before
    raise ValueError("fewer frames than it announces")


def _frame(image: Image.Image) -> tuple[Image.Image, object]:
    """A frame of an animation: of one kind with the others."""
    alpha = image.format == "GIF" or image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    return image.convert("RGBA" if alpha else "RGB"), image.info.get("icc_profile")


def _decode_png16(chunks: png.Chunks) -> Array:
    """16 bits of several channels, which Pillow reduces to 8: (H, W, C), alpha last."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it prints what it finds in damaged files
    decoded = cv2.imdecode(np.frombuffer(chunks.pixels, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise ValueError("16-bit pixels that can't be decoded")
    is_gray = chunks.pixels[25] == 4
    order = (0, decoded.shape[2] - 1) if is_gray else (2, 1, 0, 3)[: decoded.shape[2]]
    return _with_key(decoded[:, :, order], chunks.key)


def _with_key(channels: Array, key: tuple[int, ...] | None) -> Array:
    """(H, W) or (H, W, C) of 16 bits, with an alpha where one value is transparent."""
    if key is None or channels.dtype != np.uint16:
        return channels
    channels = channels.reshape(*channels.shape[:2], -1)
    clear = (channels == np.array(key, np.uint16)).all(axis=2)
    return np.dstack([channels, np.where(clear, 0, 65535).astype(np.uint16)])


def _png_profile(chunks: png.Chunks, notes: _Notes) -> tuple[object, _Notes]:
    content = chunks.first(b"iCCP")
    try:
        return (None if content is None else png.inflate(content[content.index(b"\0") + 2 :])), notes
    except (ValueError, zlib.error):
        return None, (*notes, "its colour profile is damaged and left out")


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether it is a HEIC or AVIF of 10 or 12 bits."""
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8)) > 8
    return image.format == "AVIF" and _avif_bits(data) > 8


def _avif_bits(data: bytes) -> int:
    """8, 10 or 12, by the first configuration of AV1 in it."""
    at = data.find(b"av1C")
    flags = data[at + 6] if 0 <= at < len(data) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _decode_avif(data: bytes) -> Array:
    """The image of an AVIF file of 10 or 12 bits, which Pillow reduces to 8, in 16: (H, W, C)."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16:
        raise ValueError("AVIF of more than 8 bits that can't be decoded")
    decoded = decoded.reshape(*decoded.shape[:2], -1)
    values = decoded[:, :, (2, 1, 0, 3)[: decoded.shape[2]]] if decoded.shape[2] > 1 else decoded
    return np.asarray(np.rint(values * (65535 / ((1 << _avif_bits(data)) - 1))), np.uint16)


# --- what is said beside the pixels -----------------------------------------------------------------------------

_COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"mDCV", b"cLLI", b"mDCv", b"cLLi")
# Chunks of a PNG that are read, and those that are true of the old pixels only.
_READ_CHUNKS = (b"iCCP", b"cICP", b"pHYs", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_STALE_CHUNKS = (b"bKGD", b"tIME", b"sBIT", b"hIST", b"vpAg", b"orNT", b"caNv")
_KNOWN_CHUNKS = (*_COLOUR_CHUNKS, *_READ_CHUNKS, *_STALE_CHUNKS)
_XMP_KEYWORD, _IPTC_PROFILES = "XML:com.adobe.xmp", ("Raw profile type iptc", "Raw profile type 8bim")
_EXIF_PROFILES = ("Raw profile type exif", "Raw profile type APP1")
_STALE_TEXTS = ("Thumb::", "Raw profile type", _XMP_KEYWORD)
_FILLING = 4096
_PHOTOSHOP_IPTC = b"8BIM\x04\x04"


def _exif(image: Image.Image, chunks: png.Chunks | None) -> tuple[Image.Exif, int, _Notes]:
    """The EXIF of a file, its orientation, and what was wrong with it."""
    if chunks is not None:
        texts = {text.keyword: text.text for text in _png_texts(chunks)[0]}
        found = chunks.first(b"eXIf") or next(
            (_raw_profile(texts[name]) for name in _EXIF_PROFILES if name in texts), None
        )
        image.info |= {"exif": found.removeprefix(b"Exif\0\0") if found else b""}
        if _XMP_KEYWORD in texts:
            image.info["xmp"] = texts[_XMP_KEYWORD].encode()
    try:
        exif = image.getexif()
        orientation = int(exif.get(ORIENTATION, 1))
        for ifd in (EXIF_IFD, GPS_IFD):
            exif.get_ifd(ifd)
        content = image.info.get("exif") or b""
        if len(content.removeprefix(b"Exif\0\0")) > 8 and not len(exif):
            raise ValueError("no tags in it")
        return exif, orientation, ()
    except Exception:
        # Of whatever kind: the picture is worth more than its EXIF.
        return Image.Exif(), 1, ("its EXIF is damaged and left out",)


def _true_exif(exif: Image.Exif, size: tuple[int, int]) -> tuple[bytes | None, _Notes, _Notes]:
    try:
        return (*kept_exif(exif, size), ())
    except Exception:
        # Values of a type that the tag doesn't have: the picture is worth more than its EXIF.
        return None, (), ("its EXIF is damaged and left out",)


def _true_xmp(packet: object, orientation: int, size: tuple[int, int]) -> tuple[bytes | None, _Notes]:
    if isinstance(packet, str):
        packet = packet.encode()
    if not isinstance(packet, bytes) or not packet.strip(b"\0 \n"):
        return None, ()
    return xmp.upright(packet, orientation, size)


def _metadata(
    image: Image.Image,
    data: bytes,
    chunks: png.Chunks | None,
    exif: Image.Exif,
    orientation: int,
    size: tuple[int, int],
) -> tuple[Metadata, _Notes]:
    info = image.info
    kept, lost, notes = _true_exif(exif, size)
    packet, gone = _true_xmp(xmp_of(data) or info.get("xmp"), orientation, size)
    comment = info.get("comment")
    metadata = Metadata(
        exif=kept,
        xmp=packet,
        dpi=_dpi(info.get("dpi")) or _dpi_of_exif(exif),
        comment=comment if isinstance(comment, bytes) and image.format in ("JPEG", "MPO", "GIF") else None,
        plays=_plays(image),
        cicp=_cicp(image, data),
        lost=(*lost, *gone, *_lost_of_jpeg(image), *_lost_of_heif(image)),
    )
    if image.format in ("JPEG", "MPO"):
        metadata = replace(metadata, iptc=info.get("photoshop", {}).get(0x0404))
    if chunks is not None:
        metadata, more = _with_chunks(metadata, chunks)
        notes += more
    return metadata, notes


def _plays(image: Image.Image) -> int:
    """How often an animation is shown; 0: for ever."""
    loop = image.info.get("loop")
    if image.format == "GIF":  # how often it is shown again
        return 1 if loop is None else loop + 1 if loop else 0
    return int(loop or 0)


def _lost_of_jpeg(image: Image.Image) -> _Notes:
    lost = []
    for marker, content in getattr(image, "applist", ()):
        if marker == "APP2" and content.startswith(b"urn:iso:std:iso:ts:21496:-1"):
            lost.append("HDR gain map")
        elif marker == "APP1" and content.startswith(b"http://ns.adobe.com/xmp/extension/"):
            lost.append("extended XMP")
        elif marker == "APP11" and content.startswith(b"JP"):
            lost.append("Content Credentials")
    others = _others(image)
    if others and _frames(image)[1] == 1 and "HDR gain map" not in lost and not _has_gain_map(image):
        lost.append(f"{others} more images in it (previews)")
    return tuple(lost)


def _others(image: Image.Image) -> int:
    return max(0, int(getattr(image, "n_frames", 1)) - 1) if image.format == "MPO" else 0


def _has_gain_map(image: Image.Image) -> bool:
    packet = image.info.get("xmp")
    return isinstance(packet, bytes) and b"http://ns.adobe.com/hdr-gain-map/" in packet


def _lost_of_heif(image: Image.Image) -> _Notes:
    if image.format != "HEIF":
        return ()
    more = int(getattr(image, "n_frames", 1)) - 1
    lost = [f"{more} more images in it"] if more else []
    lost += ["depth map"] if image.info.get("depth_images") else []
    lost += ["auxiliary images (a gain map, for example)"] if image.info.get("aux") else []
    return tuple(lost)


def _cicp(image: Image.Image, data: bytes) -> tuple[int, int, int, int] | None:
    """What a HEIC or AVIF says of its colours where that isn't sRGB, for pixels that are full-range RGB here."""
    primaries, transfer = 2, 2
    if image.format == "HEIF":
        nclx = image.info.get("nclx_profile") or {}
        primaries = int(nclx.get("color_primaries", 2))
        transfer = int(nclx.get("transfer_characteristics", 2))
    elif image.format == "AVIF":
        at = data.find(b"colrnclx")
        if at >= 0 and len(data) >= at + 12:
            primaries, transfer = struct.unpack_from(">HH", data, at + 8)
    if primaries in (1, 2) and transfer in (1, 2, 6, 13):
        return None
    return primaries, transfer, 0, 1


def _with_chunks(metadata: Metadata, chunks: png.Chunks) -> tuple[Metadata, _Notes]:
    texts, notes = _png_texts(chunks)
    raw = {text.keyword: text.text for text in texts}
    iptc = next((_raw_profile(raw[name]) for name in _IPTC_PROFILES if name in raw), None)
    if iptc is not None and iptc.startswith(_PHOTOSHOP_IPTC):
        iptc = iptc[12 : 12 + int.from_bytes(iptc[8:12], "big")]
    lost = [f"PNG chunk {kind.decode('latin-1')!a}" for kind, _ in chunks.beside if kind not in _KNOWN_CHUNKS]
    lost = ["Content Credentials" if "caBX" in name else name for name in lost]
    physical, cicp = chunks.first(b"pHYs"), chunks.first(b"cICP")
    dpi = metadata.dpi
    if physical is not None and len(physical) == 9:
        x, y, unit = struct.unpack(">IIB", physical)
        dpi = _dpi([x * 0.0254, y * 0.0254]) if unit == 1 else dpi
        lost += ["shape of the pixels (pHYs)"] if unit == 0 and x != y else []
    text = tuple(text for text in texts if not text.keyword.startswith(_STALE_TEXTS))
    colour = tuple((kind, content) for kind, content in chunks.beside if kind in _COLOUR_CHUNKS)
    metadata = replace(
        metadata,
        iptc=iptc,
        dpi=dpi,
        text=text,
        colour=colour,
        cicp=(cicp[0], cicp[1], cicp[2], cicp[3]) if cicp and len(cicp) == 4 else None,
        lost=(*metadata.lost, *lost),
    )
    return metadata, (*chunks.notes, *notes)


def _png_texts(chunks: png.Chunks) -> tuple[list[Text], _Notes]:
    found, notes = [], []
    for kind, content in chunks.beside:
        try:
            if kind == b"tEXt":
                keyword, text = content.split(b"\0", 1)
                found.append(Text(keyword.decode("latin-1"), text.decode("latin-1")))
            elif kind == b"zTXt":
                keyword, text = content.split(b"\0", 1)
                found.append(Text(keyword.decode("latin-1"), png.inflate(text[1:]).decode("latin-1")))
            elif kind == b"iTXt":
                keyword, rest = content.split(b"\0", 1)
                language, translated, text = rest[2:].split(b"\0", 2)
                text = png.inflate(text) if rest[0] else text
                found.append(
                    Text(keyword.decode("latin-1"), text.decode(), language.decode("latin-1"), translated.decode())
                )
        except (ValueError, IndexError, zlib.error):
            notes.append(f"its {kind.decode()!a} chunk is damaged and left out")
    return found, tuple(notes)


def _raw_profile(text: str) -> bytes | None:
    """What ImageMagick writes into a text of a PNG: a name, a length and hexadecimal digits, in lines."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return None


def _dpi(values: object) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 1e5 and 1 <= y < 1e5 else None


def _dpi_of_exif(exif: Image.Exif) -> tuple[float, float] | None:
    unit = {2: 1.0, 3: 2.54}.get(exif.get(0x0128, 2), 1.0)
    try:
        return _dpi([float(exif[0x011A]) * unit, float(exif[0x011B]) * unit])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


# --- pixels -----------------------------------------------------------------------------------------------------


def _plain_mode(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """`image` as L, LA, I;16, RGB or RGBA, and its colour profile."""
    icc = image.info.get("icc_profile")
    match image.mode:
        case "L" | "RGB" if "transparency" in image.info:
            return image.convert("LA" if image.mode == "L" else "RGBA"), icc
        case "L" | "LA" | "RGB" | "RGBA" | "I;16":
            return image, icc
        case "1":
            return image.convert("L"), icc
        case "I;16B" | "I;16L" | "I;16N":
            return Image.fromarray(np.asarray(image).astype(np.uint16)), icc
        case "P" | "PA":
            return _from_palette(image), icc
        case "La":
            return image.convert("LA"), icc
        case "RGBa" | "RGBX":
            return image.convert("RGBA" if image.mode == "RGBa" else "RGB"), icc
        case "CMYK":
            return _from_cmyk(image, icc), None
        case "YCbCr" | "LAB" | "HSV":
            return image.convert("RGB"), None
        case mode:
            raise InputError(f"pixels of kind {mode} (32-bit or floating point) are not supported")


def _from_palette(image: Image.Image) -> Image.Image:
    with_alpha = image.mode == "PA" or "transparency" in image.info
    colours = image.convert("RGBA" if with_alpha else "RGB")
    return Image.fromarray(_without_copies(np.asarray(colours)))


def _without_copies(array: Array) -> Array:
    """RGB (H, W, 3) or RGBA (H, W, 4) whose colours are all gray as (H, W) or (H, W, 2); others as they are."""
    if not (array[..., 0] == array[..., 1]).all() or not (array[..., 1] == array[..., 2]).all():
        return array
    return array[..., (0, 3)] if array.shape[2] == 4 else array[..., 0]


def _from_cmyk(image: Image.Image, icc: object) -> Image.Image:
    """sRGB by the image's own profile; without a usable one, by the plain formula."""
    if isinstance(icc, bytes):
        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that is damaged or for another colour space
    return image.convert("RGB")


def _from_cmyk_samples(channels: Array, icc: bytes | None) -> tuple[Array, None, _Notes]:
    """(H, W, 4), or 5 with alpha, as RGB, or RGBA: in 16 bits by the plain formula, by a profile in 8."""
    inks, alpha, notes = channels[..., :4], channels[..., 4:], _NONE
    if channels.dtype == np.uint16 and icc is None:
        rest = np.float32(1) - to_float(inks)
        return np.dstack([from_float(rest[..., :3] * rest[..., 3:], 16), alpha]), None, ()
    if channels.dtype == np.uint16:
        inks, alpha = (np.rint(values / 257).astype(np.uint8) for values in (inks, alpha))
        notes = ("its 16 bits of CMYK are read as 8, for its profile",)
    image = Image.frombytes("CMYK", (inks.shape[1], inks.shape[0]), np.ascontiguousarray(inks).tobytes())
    return np.dstack([np.asarray(_from_cmyk(image, icc)), alpha]), None, notes


def _decode_heif(data: bytes) -> Array:
    """The main image of a HEIC file of 10 or 12 bits, which Pillow's plugin reduces to 8, in 16: (H, W, C)."""
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    image = file[file.primary_index]
    shifted = np.frombuffer(image.data, "<u2").reshape(-1, image.stride // 2)
    (width, height), count, bits = image.size, len(image.mode.split(";")[0]), int(image.info["bit_depth"])
    values = shifted[:height, : width * count].reshape(height, width, count) >> (16 - bits)
    return np.asarray(np.rint(values * (65535 / ((1 << bits) - 1))), np.uint16)


def _frames(image: Image.Image) -> tuple[int, int]:
    """The first of the pages or frames, and how many there are.

    Of the images of a HEIC file, which are no sequence, the main one counts; of a JPEG with a gain map or previews too.
    """
    count = int(getattr(image, "n_frames", 1))
    if image.format == "HEIF" or (image.format == "MPO" and (_has_gain_map(image) or _has_previews(image))):
        return 0, 1
    # What programs show that know no animations.
    return (1, count - 1) if image.info.get("default_image") and count > 1 else (0, count)


def _has_previews(image: Image.Image) -> bool:
    entries = getattr(image, "mpinfo", {}).get(0xB002, ())
    kinds = [str(entry.get("Attribute", {}).get("MPType", "")) for entry in entries[1:]]
    return bool(kinds) and all("Thumbnail" in kind for kind in kinds)


def _upright(channels: Array, orientation: int) -> Array:
    """Apply the EXIF orientation 1..8 (anything else counts as 1)."""
    match orientation:
        case 2:
            return channels[:, ::-1]
        case 3:
            return np.rot90(channels, 2)
        case 4:
            return channels[::-1]
        case 5:
            return channels.swapaxes(0, 1)
        case 6:
            return np.rot90(channels, -1)
        case 7:
            return np.rot90(channels, 2).swapaxes(0, 1)
        case 8:
            return np.rot90(channels, 1)
        case _:
            return channels
