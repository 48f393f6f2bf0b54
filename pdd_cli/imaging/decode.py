"""Read image files: the header (`probe`) and the pages (`decode_pages`), with limits and errors."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from pdd_cli.errors import InputError, package_load_error
from pdd_cli.imaging import dds, gif, jxl, png, tga, tiff
from pdd_cli.imaging.bmp import bit_fields, decode_bit_fields
from pdd_cli.imaging.formats import load_plugin
from pdd_cli.imaging.heif import decode_avif, decode_heif, is_deep, lost_of_heif, read_cicp
from pdd_cli.imaging.image import MOST_PIXELS, Array, DecodedImage, Header, ImageSpec, check_pixels, from_samples
from pdd_cli.imaging.jxl import is_jxl, size_of
from pdd_cli.imaging.metadata import (
    EXIF_IFD,
    GPS_IFD,
    ORIENTATION,
    Metadata,
    Notes,
    dpi_of,
    dpi_of_exif,
    true_exif,
    true_xmp,
)
from pdd_cli.imaging.pixels import plain_mode, upright, without_copies
from pdd_cli.imaging.png import (
    EXIF_PROFILES,
    XMP_KEYWORD,
    decode_png16,
    play_frames,
    raw_profile,
    read_profile,
    read_texts,
    with_chunks,
    with_key,
)

_KINDS = "PNG, JPEG, WebP, TIFF, BMP, TGA, DDS, AVIF, HEIC, JPEG XL or GIF"


def read_image(path: Path) -> DecodedImage:
    """Read an image, or the first page or frame, in any of the FORMATS, whatever its suffix.

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
    """Raise InputError for a pipe or a device, which would be read forever."""
    if path.exists() and not path.is_file():
        raise InputError(f"can't read {path}: not a file")


def decode_pages(path: Path, data: bytes, *, most_pixels: int = MOST_PIXELS) -> Iterator[DecodedImage]:
    """Yield the pages of a TIFF, the frames of an animation, or the image of another file; `path` is for messages.

    Raises InputError as `read_image` does; `most_pixels` is the largest size that a page may have.
    """
    pages: Iterator[DecodedImage] | None = None
    while True:
        with decode_errors(path), _STRICT_PILLOW:
            pages = pages or _decoder(path, data[:_HEAD]).read(data, most_pixels)
            picture = next(pages, None)
        if picture is None:
            return
        yield picture


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone. Raises InputError as `read_image` does."""
    return probe(path).size


def probe(path: Path, data: bytes | None = None, *, most_pixels: int = MOST_PIXELS) -> Header:
    """Read the header of an image file, of its content `data` where that was read already.

    Raises InputError as `read_image` does.
    """
    _check_kind(path)
    with decode_errors(path), _STRICT_PILLOW, path.open("rb") if data is None else io.BytesIO(data) as file:
        head = file.read(_HEAD)
        file.seek(0)
        return _decoder(path, head).probe(file, most_pixels)


def _probe_bit_fields(file: BinaryIO, most_pixels: int) -> Header:
    fields = bit_fields(file.read(_HEAD))
    assert fields is not None
    size = (fields.width, fields.height)
    check_pixels(size, most_pixels)
    return Header(size, 1, ImageSpec(*size, 3, bool(fields.masks[3])))


def _probe_jxl(file: BinaryIO, most_pixels: int) -> Header:
    size = size_of(file.read())
    check_pixels(size, most_pixels)
    return Header(size, 1, ImageSpec(*size, 3, True))  # the maximum that it may hold


def _probe_with_pillow(file: BinaryIO, most_pixels: int) -> Header:
    head = file.read(_HEAD)
    file.seek(0)
    chunks = png.split(file, whole=False) if head.startswith(png.SIGNATURE) else None
    source = file if chunks is None else io.BytesIO(chunks.pixels)
    with Image.open(source, formats=_formats(head)) as image:
        check_pixels(image.size, most_pixels)
        turned = _exif(image, chunks)[1] in (5, 6, 7, 8)
        size = (image.height, image.width) if turned else (image.width, image.height)
        alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info
        alpha = alpha or image.format == "GIF" or (chunks is not None and chunks.key is not None)
        channels = 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16") else 3
        bits = 16 if image.mode.startswith("I;16") or ";16" in _stored(image) or is_deep(image, head) else 8
        return Header(size, _frames(image)[1], ImageSpec(*size, channels, alpha, bits))


_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Number of bytes that identify the format.
_HEAD = 160

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
def decode_errors(path: Path) -> Iterator[None]:
    """Convert decoding errors to an InputError that names `path` and the reason."""
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        raise package_load_error(error) from error
    except UnidentifiedImageError as error:
        raise InputError(f"can't read {path}: not a {_KINDS} image, or damaged") from error
    except InputError as error:
        raise InputError(f"can't read {path}: {error.message}", error.hint) from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or f'damaged: {error}'}") from error
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and others, depending on the damage.
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


class _StrictPillow:
    """Within it, Pillow reports a file cut short and prints no warnings.

    If several threads use it, the last one to leave restores the settings.
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
                # `check_pixels` does it, before anything is decoded, by the limit that its caller has the memory for.
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


def _read_bit_fields(data: bytes, most_pixels: int) -> Iterator[DecodedImage]:
    fields = bit_fields(data[:_HEAD])
    assert fields is not None
    check_pixels((fields.width, fields.height), most_pixels)
    yield from_samples(decode_bit_fields(data, fields), None, Metadata())


def _pillow_pages(data: bytes, most_pixels: int, notes: Notes = ()) -> Iterator[DecodedImage]:
    if is_jxl(data):
        check_pixels(size_of(data), most_pixels)
    chunks = png.split(io.BytesIO(data)) if data.startswith(png.SIGNATURE) else None
    source = chunks.pixels if chunks else data
    with Image.open(io.BytesIO(source), formats=_formats(data[:_HEAD])) as image:
        check_pixels(image.size, most_pixels)
        first, frames = _frames(image)
        # Asked before it is loaded, and then has no tiles any more.
        deep = ";16" in _stored(image)
        played = play_frames(chunks.pixels, image.size) if chunks and frames > 1 else None
        for index in range(first, first + frames):
            if played is None:
                image.seek(index)
                check_pixels(image.size, most_pixels)
            exif, orientation, damage = _exif(image, chunks)
            icc = image.info.get("icc_profile")
            if deep and frames == 1:
                assert chunks is not None
                image.load()  # detects files cut short; OpenCV only prints them
                channels = decode_png16(chunks)
            elif is_deep(image, data) and frames == 1:
                channels = decode_heif(data) if image.format == "HEIF" else decode_avif(data)
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
                plain, icc = plain_mode(image) if frames == 1 or image.format == "MPO" else _frame(image)
                channels = np.asarray(plain)
                if chunks is not None and chunks.key is not None:  # 16 bits of gray
                    channels = with_key(channels, chunks.key)
            if image.format == "HEIF" and channels.shape[-1] == 4 and "chroma" not in image.info:
                channels = without_copies(channels)  # libheif gives gray with alpha as RGBA
            if image.format == "JXL" and not getattr(image, "jpeg", False):
                orientation = 1  # the decoder has turned it; not where it gives back a JPEG
            channels = upright(channels, orientation)
            size = (channels.shape[1], channels.shape[0])
            metadata, more = _metadata(image, data, chunks, exif, orientation, size)
            if frames > 1 and (deep or is_deep(image, data)):
                metadata = replace(metadata, lost=(*metadata.lost, "more than 8 bits of an animation"))
            if chunks is not None:
                icc, more = read_profile(chunks, more)
            # A frame of a GIF may have none; the pages of an MPO are no animation.
            duration = image.info.get("duration", None if image.format == "MPO" else 0) if frames > 1 else None
            notes_here = (*notes, *damage, *more)
            yield from_samples(channels, icc, metadata, frames=frames, duration=duration, notes=notes_here)


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


def _frame(image: Image.Image) -> tuple[Image.Image, object]:
    """A frame of an animation: of one kind with the others."""
    alpha = image.format == "GIF" or image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    return image.convert("RGBA" if alpha else "RGB"), image.info.get("icc_profile")


_FILLING = 4096


def _has_no_tags(exif: bytes) -> bool:
    """Whether the first directory of `exif` is a sound one without tags, as beside a thumbnail alone."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II*\0") else "big"
    at = int.from_bytes(exif[4:8], order)
    return exif.startswith((b"II*\0", b"MM\0*")) and exif[at : at + 2] == b"\0\0"


def _exif(image: Image.Image, chunks: png.Chunks | None) -> tuple[Image.Exif, int, Notes]:
    """The EXIF of a file, its orientation, and what was wrong with it."""
    if chunks is not None:
        texts = {text.keyword: text.text for text in read_texts(chunks)[0]}
        found = chunks.first(b"eXIf") or next(
            (raw_profile(texts[name]) for name in EXIF_PROFILES if name in texts), None
        )
        image.info |= {"exif": found.removeprefix(b"Exif\0\0") if found else b""}
        if XMP_KEYWORD in texts:
            image.info["xmp"] = texts[XMP_KEYWORD].encode()
    try:
        exif = image.getexif()
        orientation = int(exif.get(ORIENTATION, 1))
        for ifd in (EXIF_IFD, GPS_IFD):
            exif.get_ifd(ifd)
        content = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
        if len(content) > 8 and not len(exif) and not _has_no_tags(content):
            raise ValueError("no tags in it")
        return exif, orientation, ()
    except Exception:
        # Of whatever kind: the picture is worth more than its EXIF.
        return Image.Exif(), 1, ("its EXIF is damaged and left out",)


def _metadata(
    image: Image.Image,
    data: bytes,
    chunks: png.Chunks | None,
    exif: Image.Exif,
    orientation: int,
    size: tuple[int, int],
) -> tuple[Metadata, Notes]:
    info = image.info
    kept, lost, notes = true_exif(exif, size)
    packet = gif.xmp_of(data) if image.format == "GIF" else jxl.xmp_of(data) or info.get("xmp")
    packet, gone = true_xmp(packet, orientation, size)
    comment = info.get("comment")
    metadata = Metadata(
        exif=kept,
        xmp=packet,
        dpi=dpi_of(info.get("dpi")) or dpi_of_exif(exif),
        comment=comment if isinstance(comment, bytes) and image.format in ("JPEG", "MPO", "GIF") else None,
        plays=_plays(image),
        cicp=read_cicp(image, data),
        lost=(*lost, *gone, *_lost_of_jpeg(image), *lost_of_heif(image)),
    )
    if image.format in ("JPEG", "MPO"):
        metadata = replace(metadata, iptc=info.get("photoshop", {}).get(0x0404))
    if chunks is not None:
        metadata, more = with_chunks(metadata, chunks)
        notes += more
    return metadata, notes


def _plays(image: Image.Image) -> int:
    """How often an animation is played; 0: forever."""
    loop = image.info.get("loop")
    if image.format == "GIF":  # the number of repetitions
        return 1 if loop is None else loop + 1 if loop else 0
    return int(loop or 0)


def _lost_of_jpeg(image: Image.Image) -> Notes:
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


@dataclass(frozen=True)
class _Decoder:
    """A decoder: `recognises` the first bytes of a file, probes its header, and reads its pages."""

    recognises: Callable[[bytes], bool]
    probe: Callable[[BinaryIO, int], Header]
    read: Callable[[bytes, int], Iterator[DecodedImage]]


_DECODERS = (
    _Decoder(lambda head: head.startswith(_TIFF_HEADS), tiff.probe, tiff.read_pages),
    _Decoder(lambda head: bit_fields(head) is not None, _probe_bit_fields, _read_bit_fields),
    _Decoder(is_jxl, _probe_jxl, _pillow_pages),
    _Decoder(dds.is_dds, dds.probe, lambda data, most_pixels: iter([dds.read(data, most_pixels)])),
    # TGA has no mark at its beginning: only a header that makes sense.
    _Decoder(tga.is_tga, tga.probe, lambda data, most_pixels: iter([tga.read(data, most_pixels)])),
    _Decoder(lambda head: True, _probe_with_pillow, _pillow_pages),
)


def _decoder(path: Path, head: bytes) -> _Decoder:
    """The decoder for a file with this beginning. Raises InputError for a camera's RAW file."""
    _refuse_camera_raw(path, head)
    return next(decoder for decoder in _DECODERS if decoder.recognises(head))
