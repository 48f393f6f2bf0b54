"""File ↔ array: bit depth, alpha, orientation, colour profile and EXIF; and the images below a folder."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from pdd_cli.errors import InputError
from pdd_cli.files import atomic_write

Array = npt.NDArray[Any]

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix → the name of its format; what pdd reads and writes."""

_LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383, "BMP": 2**31 - 1, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_MOST_BYTES = {"BMP": 2**32 - 1, "TIFF": 2**32 - 1}
_SIXTEEN_BIT = ("PNG", "TIFF")
_WITH_ALPHA = ("PNG", "WEBP", "TIFF", "BMP")

# EXIF tags that stay true when the pixels change: who, when, with what, where. Everything else (sizes, strips, the
# thumbnail, the orientation that has been applied) would be stale.
_KEPT_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298)
_EXIF_IFD, _GPS_IFD, _ORIENTATION = 0x8769, 0x8825, 0x0112
_STALE_EXIF_TAGS = (0xA002, 0xA003, 0xA005)  # pixel width and height, the interoperability pointer


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image, upright.

    `pixels`: (H, W, C) uint8 or uint16, C = 1 (gray) or 3 (RGB). `alpha`: (H, W) of the same type, straight (not
    premultiplied), or None. `icc`: a profile that fits the channels. `exif`: without orientation, sizes and thumbnail.
    `dpi`: horizontal, vertical. `frames`: how many the file holds; the pixels are the first one's.
    """

    pixels: Array
    alpha: Array | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    frames: int = 1

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
        return _to_float(self.pixels)

    def alpha_to_float(self) -> npt.NDArray[np.float32] | None:
        """The alpha channel as float32 (H, W) in 0..1, or None."""
        return None if self.alpha is None else _to_float(self.alpha)

    @classmethod
    def from_float(cls, pixels: Array, *, alpha: Array | None = None, bits: int = 8) -> Picture:
        """A picture of `bits` 8 or 16 from (H, W, C) or (H, W), and alpha (H, W), in 0..1: clipped, rounded.

        Raises ValueError for values that aren't finite.
        """
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        return cls(_from_float(pixels, bits), None if alpha is None else _from_float(alpha, bits))

    def with_bits(self, bits: int) -> Picture:
        """The same picture with 8 or 16 bits per channel, rounded."""
        if bits == self.bits:
            return self
        alpha = self.alpha_to_float()
        pixels = _from_float(self.to_float(), bits)
        return Picture(
            pixels, None if alpha is None else _from_float(alpha, bits), self.icc, self.exif, self.dpi, self.frames
        )


def find_images(folder: Path, *, recursive: bool = True) -> list[Path]:
    """The images below `folder`, by suffix, sorted; hidden files and folders are passed over, links followed once.

    Raises InputError when `folder` isn't a folder that can be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found: list[Path] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise InputError(f"can't read the folder {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that was visited, or a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".") and is_image(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def is_image(path: Path | str) -> bool:
    """Whether the suffix is one of a format that pdd reads."""
    return Path(path).suffix.lower() in FORMATS


def read_image(path: Path) -> Picture:
    """Read PNG, JPEG, WebP, TIFF or BMP, whatever the suffix says.

    The orientation is applied. Palette images become RGB (gray where the palette is), CMYK becomes RGB; 16 bits per
    channel stay 16. Raises InputError that names the file and the reason for one that is damaged, cut short, too
    large (179 megapixels, Pillow's limit against decompression bombs) or of another kind.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    if not data:
        raise InputError(f"can't read {path}: the file is empty")
    try:
        with _strict_pillow():
            return _decode(data)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"can't read {path}: not a PNG, JPEG, WebP, TIFF or BMP image, or damaged") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"can't read {path}: too large ({error})") from error
    except InputError as error:
        raise InputError(f"can't read {path}: {error.message}") from error
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError…, by where the file is broken.
        raise InputError(f"can't read {path}: damaged: {error}") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone. Raises InputError as `read_image` does."""
    try:
        with _strict_pillow(), Image.open(path, formats=_PILLOW_FORMATS) as image:
            # A TIFF's size is that of the upright image already; for a PNG without EXIF getexif would decode it all.
            known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            turned = known and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else (image.width, image.height)
    except UnidentifiedImageError as error:
        raise InputError(f"can't read {path}: not a PNG, JPEG, WebP, TIFF or BMP image, or damaged") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"can't read {path}: too large ({error})") from error
    except Exception as error:  # as in read_image
        raise InputError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error


def write_image(path: Path, picture: Picture, *, quality: int = 95) -> None:
    """Write `picture` in the format of the suffix of `path`, whole or not at all.

    PNG and TIFF keep 16 bits, other formats are rounded to 8; JPEG has no alpha: the picture is laid on white.
    `quality` 1..100 is for JPEG and lossy WebP. Raises InputError when the format can't hold the size.
    """
    format = format_of(path)
    check_size(path, picture.width, picture.height)
    if format not in _SIXTEEN_BIT:
        picture = picture.with_bits(8)
    if picture.alpha is not None and format not in _WITH_ALPHA:
        picture = _flattened(picture)
    with atomic_write(path) as temporary:
        channels = _interleaved(picture)
        if picture.bits == 16 and channels.ndim == 3 and format == "PNG":
            temporary.write_bytes(_png16(channels, picture))
        elif picture.bits == 16 and channels.ndim == 3:
            _write_tiff16(temporary, channels, picture)
        else:
            _save(temporary, Image.fromarray(channels), format, picture, quality)


def format_of(path: Path) -> str:
    """The format that the suffix of `path` names: PNG, JPEG, WEBP, TIFF or BMP. Raises InputError for another."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: can't write this format", f"Use one of {', '.join(FORMATS)}.") from None


def check_size(path: Path, width: int, height: int) -> None:
    """Raise InputError when the format of `path` can't hold an image of this size."""
    format = format_of(path)
    longest = _LONGEST_SIDE[format]
    if max(width, height) > longest:
        raise InputError(
            f"{path}: {width}x{height} is too large for {format} (at most {longest} pixels a side)", "Use --format png."
        )
    if width * height * 4 > _MOST_BYTES.get(format, 2**62):
        raise InputError(f"{path}: {width}x{height} is too large for {format} (at most 4 GiB)", "Use --format png.")


# --- reading ----------------------------------------------------------------------------------------------------

_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow that reports a file cut short, and doesn't print warnings."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    # pyiqa switches this on for the whole process when it is imported.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decode(data: bytes) -> Picture:
    with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
        frames = int(getattr(image, "n_frames", 1))
        # What Pillow is about to reduce to 8 bits: "RGB;16B" and the like, but not the one mode of its own.
        # (Asked first: a PNG may be loaded by getexif, and then has no tiles any more.)
        stored = "" if image.mode.startswith("I;16") else " ".join(str(tile.args) for tile in image.tile)
        orientation = image.getexif().get(_ORIENTATION, 1)
        image.load()
        exif, dpi = image.getexif(), _dpi(image)
        if ";16" in stored:
            channels, icc = _decode16(data, gray="LA;16" in stored), image.info.get("icc_profile")
        else:
            plain, icc = _plain_mode(image)
            channels = np.asarray(plain)
    if image.format != "TIFF":  # Pillow and OpenCV turn TIFFs upright by themselves
        channels = _upright(channels, orientation)
    if channels.ndim == 2:
        channels = channels[:, :, None]
    count = channels.shape[2]
    pixels = np.ascontiguousarray(channels[:, :, : count - (count in (2, 4))])
    alpha = np.ascontiguousarray(channels[:, :, -1]) if count in (2, 4) else None
    space = b"GRAY" if pixels.shape[2] == 1 else b"RGB "
    fitting = icc if isinstance(icc, bytes) and icc[16:20] == space else None
    return Picture(pixels, alpha, fitting, _kept_exif(exif), dpi, frames)


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
    array = np.asarray(colours)
    if not (array[..., 0] == array[..., 1]).all() or not (array[..., 1] == array[..., 2]).all():
        return colours
    return Image.fromarray(array[..., (0, 3)] if with_alpha else array[..., 0])


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


def _decode16(data: bytes, *, gray: bool) -> Array:
    """16 bits of several channels, which Pillow reduces to 8: (H, W, C), alpha last; `gray` is gray and alpha."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise InputError("16-bit pixels in this layout are not supported")
    count = decoded.shape[2]
    return np.asarray(decoded[:, :, (0, count - 1) if gray else (2, 1, 0, 3)[:count]])


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


# --- writing ----------------------------------------------------------------------------------------------------


def _interleaved(picture: Picture) -> Array:
    """(H, W) for gray, else (H, W, 2 to 4) with alpha last."""
    if picture.alpha is not None:
        return np.ascontiguousarray(np.dstack([picture.pixels, picture.alpha]))
    return np.ascontiguousarray(picture.pixels[:, :, 0] if picture.channels == 1 else picture.pixels)


def _flattened(picture: Picture) -> Picture:
    assert picture.alpha is not None
    alpha = _to_float(picture.alpha)[:, :, None]
    pixels = _from_float(picture.to_float() * alpha + (1 - alpha), picture.bits)
    return Picture(pixels, None, picture.icc, picture.exif, picture.dpi, picture.frames)


def _save(path: Path, image: Image.Image, format: str, picture: Picture, quality: int) -> None:
    """8 bits, and 16-bit gray, with Pillow."""
    if image.mode == "LA" and format in ("WEBP", "BMP"):
        image = image.convert("RGBA")
    options: dict[str, Any] = {}
    match format:
        case "JPEG":
            # Chroma at full resolution: nothing that the model drew is thrown away again.
            options = {"quality": quality, "subsampling": 0, "optimize": True}
        case "WEBP":
            options = {"quality": quality, "method": 4, "exact": True}
        case "TIFF":
            options = {"compression": "tiff_adobe_deflate"}
        case "PNG":
            options = {"compress_level": 4}
    if picture.icc and format != "BMP" and (format != "WEBP" or picture.channels == 3):
        options["icc_profile"] = picture.icc
    if picture.exif and format != "BMP":
        options["exif"] = picture.exif
    if picture.dpi and format != "WEBP":
        options["dpi"] = picture.dpi
    image.save(path, format, **options)


def _png16(channels: Array, picture: Picture) -> bytes:
    """A 16-bit PNG of gray+alpha, RGB or RGBA, which no library here writes with its metadata."""
    height, width, count = channels.shape
    rows = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.zeros((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2  # the filter "up": each byte less the one above it
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0))]
    if picture.icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc)))
    if picture.dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in picture.dpi), 1)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(filtered.data, 4)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _write_tiff16(path: Path, channels: Array, picture: Picture) -> None:
    """A 16-bit TIFF of gray+alpha, RGB or RGBA; EXIF is not kept."""
    import tifffile

    tifffile.imwrite(
        path,
        channels,
        photometric="rgb" if picture.channels == 3 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if picture.alpha is not None else None,
        compression="zlib",
        iccprofile=picture.icc,
        resolution=picture.dpi,
        resolutionunit="INCH" if picture.dpi else None,
        metadata=None,
        software=False,
    )


def _to_float(values: Array) -> npt.NDArray[np.float32]:
    return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)


def _from_float(values: Array, bits: int) -> Array:
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    top = (1 << bits) - 1
    # In float64 for 16 bits: float32 has no half steps left there.
    scaled = values.astype(np.float64 if bits == 16 else np.float32) * top
    rounded: Array = np.clip(np.rint(scaled), 0, top).astype(np.uint16 if bits == 16 else np.uint8)
    return rounded
