"""File ↔ array: bit depth, alpha, orientation, colour profile, EXIF and XMP; and the images below a folder."""

from __future__ import annotations

import io
import itertools
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from pdd_cli.encoding import (
    FORMATS,
    Encoding,
    Layout,
    Metadata,
    Sheet,
    fresh_xmp,
    from_float,
    load_plugin,
    to_float,
    write_sheets,
)
from pdd_cli.errors import InputError
from pdd_cli.jxl import is_jxl, size_of, xmp_of

Array = npt.NDArray[Any]

MOST_PIXELS = 178_956_970
"""Pillow's limit against decompression bombs: what is larger is refused where the caller sets no limit of its own."""

_KINDS = "PNG, JPEG, WebP, TIFF, BMP, AVIF, HEIC or JPEG XL"

# EXIF tags that stay true when the pixels change: who, when, with what, where. Everything else (sizes, strips, the
# thumbnail, the orientation that has been applied) would be stale.
_KEPT_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F)
_EXIF_IFD, _GPS_IFD, _ORIENTATION = 0x8769, 0x8825, 0x0112
_BITS_PER_SAMPLE, _EXTRA_SAMPLES, _PLANES = 258, 338, 284
_STALE_EXIF_TAGS = (0xA002, 0xA003, 0xA005)  # pixel width and height, the interoperability pointer


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image, upright.

    `pixels`: (H, W, C) uint8 or uint16, C = 1 (gray) or 3 (RGB). `alpha`: (H, W) of the same type, straight (not
    premultiplied), or None. `icc`: a profile that fits the channels. `exif`: without orientation, sizes and thumbnail.
    `xmp`: with orientation 1 and without sizes. `dpi`: horizontal, vertical. `frames`: how many pages or frames the
    file holds; `duration`: how long an animation shows this one, in milliseconds.
    """

    pixels: Array
    alpha: Array | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    frames: int = 1
    xmp: bytes | None = None
    duration: float | None = None

    @property
    def layout(self) -> Layout:
        """The shape of the image in a file."""
        return Layout(self.width, self.height, self.channels, self.alpha is not None, self.bits)

    @property
    def metadata(self) -> Metadata:
        """What the file says beside the pixels."""
        return Metadata(self.icc, self.exif, self.xmp, self.dpi)

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
    def from_float(cls, pixels: Array, *, alpha: Array | None = None, bits: int = 8) -> Picture:
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


def read_image(path: Path) -> Picture:
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


def decode_pages(path: Path, data: bytes, *, most_pixels: int = MOST_PIXELS) -> Iterator[Picture]:
    """The pages of a TIFF or frames of an animation, of another file the one image in it; `path` is for messages.

    Raises InputError as `read_image` does; `most_pixels` is the largest size that a page may have.
    """
    index, frames = 0, 1
    while index < frames:
        with _told(path), _STRICT_PILLOW:
            picture = _decode(data, index, most_pixels)
        yield picture
        index, frames = index + 1, picture.frames


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone. Raises InputError as `read_image` does."""
    return probe(path).size


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: the upright (width, height), frames, and the layout of the pixels."""

    size: tuple[int, int]
    frames: int
    layout: Layout


def probe(path: Path, *, most_pixels: int = MOST_PIXELS) -> Header:
    """Look at the header of an image file alone. Raises InputError as `read_image` does."""
    _check_kind(path)
    with _told(path):
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if is_jxl(head):
            size = size_of(path.read_bytes())
            _check_pixels(size, most_pixels)
            return Header(size, 1, Layout(*size, 3, True))  # the most that it may hold
    with _told(path), _STRICT_PILLOW, Image.open(path, formats=_formats(head)) as image:
        _check_pixels(image.size, most_pixels)
        # A TIFF's size is that of the upright image already; for a PNG without EXIF getexif would decode it all.
        known = image.format not in ("TIFF", "HEIF") and (
            image.format != "PNG" or "exif" in image.info or "xmp" in image.info
        )
        turned = known and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        size = (image.height, image.width) if turned else (image.width, image.height)
        alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info
        channels = 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16") else 3
        bits = 16 if image.mode.startswith("I;16") or ";16" in _stored(image) or _is_deep_heif(image) else 8
        return Header(size, _frames(image), Layout(*size, channels, alpha, bits))


def write_image(path: Path, picture: Picture, *, quality: int = 95, lossless: bool = False) -> None:
    """Write `picture` in the format of the suffix of `path`, whole or not at all.

    PNG and TIFF keep 16 bits, other formats are rounded to 8; JPEG has no alpha: the picture is laid on white.
    `quality` 1..100 is for JPEG, AVIF and lossy WebP. Raises InputError when the format can't hold the size.
    """
    sheet = Sheet(picture.layout, [picture.interleaved], picture.metadata)
    write_sheets(path, [sheet], encoding=Encoding(quality, lossless))


# --- reading ----------------------------------------------------------------------------------------------------

_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "AVIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
# Bytes that tell the format.
_HEAD = 64


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever goes wrong while `path` is decoded, as an InputError that names it and the reason."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"can't read {path}: not a {_KINDS} image, or damaged") from error
    except InputError as error:
        raise InputError(f"can't read {path}: {error.message}") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or f'damaged: {error}'}") from error
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError…, by where the file is broken.
        what = re.split(r"\.\s|\n", str(error))[0]
        raise InputError(f"can't read {path}: damaged: {what}") from error


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
            f"too large ({size[0]}x{size[1]} pixels; at most {most / 1e6:.0f} megapixels; --max-memory may allow more)"
        )


class _StrictPillow:
    """Within it, Pillow reports a file cut short, prints no warnings and opens TIFFs of 16-bit gray with alpha.

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
                for prefix, extra in itertools.product((b"II", b"MM"), _GRAY_ALPHA):
                    key = (prefix, 1, (1,), 1, (16, 16), (extra,))
                    TiffImagePlugin.OPEN_INFO[key] = ("LA", _GRAY_ALPHA[extra])
                    self._before.callback(TiffImagePlugin.OPEN_INFO.pop, key)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.close()


# What the second sample may be (TIFF 6.0, ExtraSamples), and a raw mode that tells it; Pillow never decodes it.
_GRAY_ALPHA = {0: "LA;16B", 1: "La;16B", 2: "LA;16B"}
_STRICT_PILLOW = _StrictPillow()


def _stored(image: Image.Image) -> str:
    """The raw modes that Pillow is about to reduce to 8 bits: "RGB;16B" and the like, but not the one of its own."""
    tags = getattr(image, "tag_v2", {})
    if not image.mode.startswith("I;16") and 16 in tags.get(_BITS_PER_SAMPLE, ()):
        # Of planes that are stored one after the other Pillow forgets it.
        return f"{'a' if 1 in tags.get(_EXTRA_SAMPLES, ()) else 'A'};16"
    return "" if image.mode.startswith("I;16") else " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))


def _decode(data: bytes, index: int, most_pixels: int) -> Picture:
    if is_jxl(data):
        _check_pixels(size_of(data), most_pixels)
    with Image.open(io.BytesIO(data), formats=_formats(data[:_HEAD])) as image:
        _check_pixels(image.size, most_pixels)
        frames = _frames(image)
        if index:
            image.seek(index)
            _check_pixels(image.size, most_pixels)
        # Asked first: a PNG may be loaded by getexif, and then has no tiles any more.
        stored = _stored(image)
        orientation = image.getexif().get(_ORIENTATION, 1)
        if image.format == "JXL" and not getattr(image, "jpeg", False):
            orientation = 1  # the decoder has turned it; not where it gives back a JPEG
        apart = _is_beyond_pillow(image)
        if not _is_deep_heif(image) and not apart:
            image.load()
        exif, dpi, xmp = image.getexif(), _dpi(image), _xmp(xmp_of(data) or image.info.get("xmp"))
        duration = image.info.get("duration") if frames > 1 and image.format != "TIFF" else None
        if apart:
            channels, icc = _upright(_decode_tiff16(data, index), orientation), image.info.get("icc_profile")
        elif ";16" in stored and (index == 0 or image.format == "TIFF"):
            channels, icc = _decode16(data, index, gray="LA;16" in stored), image.info.get("icc_profile")
        elif _is_deep_heif(image):
            channels, icc = _decode_heif(data), image.info.get("icc_profile")
        else:
            plain, icc = _plain_mode(image)
            channels = np.asarray(plain)
        if image.format == "HEIF" and channels.shape[-1] == 4 and "chroma" not in image.info:
            channels = _without_copies(channels)  # libheif gives gray with alpha as RGBA
        if "a;16" in stored:
            channels = _straight(channels)
    if image.format != "TIFF":  # Pillow and OpenCV turn TIFFs upright by themselves
        channels = _upright(channels, orientation)
    if channels.ndim == 2:
        channels = channels[:, :, None]
    count = channels.shape[2]
    pixels = np.ascontiguousarray(channels[:, :, : count - (count in (2, 4))])
    alpha = np.ascontiguousarray(channels[:, :, -1]) if count in (2, 4) else None
    space = b"GRAY" if pixels.shape[2] == 1 else b"RGB "
    fitting = icc if isinstance(icc, bytes) and icc[16:20] == space else None
    return Picture(pixels, alpha, fitting, _kept_exif(exif), dpi, frames, xmp, duration)


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


def _decode16(data: bytes, index: int, *, gray: bool) -> Array:
    """16 bits of several channels, which Pillow reduces to 8: (H, W, C), alpha last; `gray` is gray and alpha."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it prints what it finds in damaged files
    buffer = np.frombuffer(data, np.uint8)
    if index:
        pages = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(index, index + 1))[1]
        decoded = pages[0] if pages else None
    else:
        decoded = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise InputError("16-bit pixels in this layout are not supported")
    count = decoded.shape[2]
    return np.asarray(decoded[:, :, (0, count - 1) if gray else (2, 1, 0, 3)[:count]])


def _is_beyond_pillow(image: Image.Image) -> bool:
    """Whether it is a page of a TIFF that neither Pillow nor OpenCV decodes: 16-bit gray with alpha, or in planes."""
    if image.format != "TIFF" or ";16" not in _stored(image):
        return False
    return image.mode in ("LA", "La") or getattr(image, "tag_v2", {}).get(_PLANES) == 2


def _decode_tiff16(data: bytes, index: int) -> Array:
    """A page of a TIFF of 16 bits by tifffile: (H, W, C), as stored."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        try:
            page = file.pages[index]
            channels = page.asarray()
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error) and not isinstance(error, ImportError):
                raise
            raise InputError(
                f"16-bit gray with alpha, or in planes, and {page.compression.name} compression: "
                "save it with Deflate, or pip install imagecodecs"
            ) from error
    return np.moveaxis(channels, 0, -1) if page.planarconfig == 2 else channels


def _straight(channels: Array) -> Array:
    """Colours that were multiplied by their alpha, the last of 16-bit channels, as they were before."""
    values = channels.astype(np.float64)
    values[..., :-1] *= 65535 / np.maximum(values[..., -1:], 1)
    return np.asarray(np.rint(values.clip(0, 65535)), np.uint16)


def _is_deep_heif(image: Image.Image) -> bool:
    return image.format == "HEIF" and int(image.info.get("bit_depth", 8)) > 8


def _decode_heif(data: bytes) -> Array:
    """The main image of a HEIC file of 10 or 12 bits, which Pillow's plugin reduces to 8, in 16: (H, W, C)."""
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    image = file[file.primary_index]
    shifted = np.frombuffer(image.data, "<u2").reshape(-1, image.stride // 2)
    (width, height), count, bits = image.size, len(image.mode.split(";")[0]), int(image.info["bit_depth"])
    values = shifted[:height, : width * count].reshape(height, width, count) >> (16 - bits)
    return np.asarray(np.rint(values * (65535 / ((1 << bits) - 1))), np.uint16)


def _frames(image: Image.Image) -> int:
    """How many pages or frames; of the images of a HEIC file, which are no sequence, the main one counts."""
    return 1 if image.format == "HEIF" else int(getattr(image, "n_frames", 1))


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


def _kept_exif(exif: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag in _KEPT_TAGS:
        if tag in exif:
            kept[tag] = exif[tag]
    for ifd in (_EXIF_IFD, _GPS_IFD):
        values = {tag: value for tag, value in exif.get_ifd(ifd).items() if tag not in _STALE_EXIF_TAGS}
        if values:
            kept[ifd] = values
    if not len(kept):
        return None
    try:
        return kept.tobytes()
    except Exception:
        # Values of a type that the tag doesn't have: the picture is worth more than its EXIF.
        return None


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 1e5 and 1 <= y < 1e5 else None


def _xmp(xmp: object) -> bytes | None:
    return fresh_xmp(xmp) if isinstance(xmp, bytes) and xmp.strip(b"\0 \n") else None
