"""Write image files: PNG and TIFF row by row, other formats from the whole image."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import BeforeRename, atomic_write, no_check
from pdd_cli.imaging import tga
from pdd_cli.imaging.formats import check_size, format_of, keeps_frames, load_plugin, stored_spec
from pdd_cli.imaging.gif import write_gif
from pdd_cli.imaging.heif import write_heif
from pdd_cli.imaging.image import Array, DecodedImage, ImageSpec, ImageStream, collect_rows, from_float, to_float
from pdd_cli.imaging.metadata import Metadata, photoshop_block
from pdd_cli.imaging.png import write_png
from pdd_cli.imaging.provenance import (
    Provenance,
    append_to_bmp,
    seal,
    sealed_text,
    stamped_exif,
    stamped_xmp,
)
from pdd_cli.imaging.tiff import write_tiff


def write_image(path: Path, picture: DecodedImage, *, quality: int = 95, lossless: bool = False) -> None:
    """Write `picture` in the format of the suffix of `path`, whole or not at all.

    16 bits are rounded to 8 if the format has no more; JPEG has no alpha, so the picture is composited on white.
    `quality` 1..100 is for JPEG, AVIF and lossy WebP. Raises InputError if the format can't hold the size.
    """
    stream = ImageStream(picture.spec, [picture.interleaved], picture.metadata)
    write_images(path, [stream], encoding=Encoding(quality, lossless))


@dataclass(frozen=True)
class Encoding:
    """Encoding options: `quality` 1 to 100 for lossy formats; `lossless` for WebP and JPEG XL."""

    quality: int = 95
    lossless: bool = False


def write_images(
    path: Path,
    streams: Iterable[ImageStream],
    *,
    count: int = 1,
    encoding: Encoding = Encoding(),
    provenance: Provenance | None = None,
    before_rename: BeforeRename = no_check,
) -> None:
    """Write `count` images as one file of the suffix's format, whole or not at all.

    The rows of a stream are read before the next stream. What the format can't hold is reduced:
    16 bits to 8, alpha to a white background, several images to the first. `provenance` is written to the metadata.
    `before_rename` is that of `atomic_write`.

    Raises InputError if the format can't hold the size, PddError if rows or images are missing in the finished file.
    """
    format = format_of(path)
    if not keeps_frames(path):
        streams, count = itertools.islice(streams, 1), 1
    if provenance is not None:
        streams = (replace(stream, metadata=_stamped(stream.metadata, provenance)) for stream in streams)
    counted = _Counted(_fitted(path, stream) for stream in streams)
    streams = iter(counted)
    with atomic_write(path, before_rename) as temporary:
        if format == "TIFF":
            write_tiff(temporary, streams, count)
        elif format == "PNG":
            with temporary.open("wb") as file:
                write_png(file, streams, count)
        elif format == "GIF":
            write_gif(temporary, streams, _as_srgb)
        elif format == "HEIF":
            write_heif(temporary, next(streams), encoding.quality)
        else:
            record = sealed_text(provenance) if format == "TGA" and provenance is not None else ""
            _write_whole(temporary, format, streams, encoding, record)
        counted.check(path, count)
        if count > 1:
            _check_images(path, temporary, format, counted.streams)
        if provenance is not None:
            if format == "BMP":
                append_to_bmp(temporary, provenance)
            seal(temporary)


def _stamped(metadata: Metadata, provenance: Provenance) -> Metadata:
    exif, software = stamped_exif(metadata.exif, provenance)
    # The program that a PNG names moves to the history, as EXIF's does.
    software = next((text.text for text in metadata.text if text.keyword == "Software"), software)
    return replace(
        metadata,
        exif=exif,
        xmp=stamped_xmp(metadata.xmp, provenance, software),
        text=tuple(text for text in metadata.text if text.keyword != "Software"),
        software=str(provenance),
    )


class _Counted:
    """Iterates over `streams` and counts the rows that are read; each is read to its end before the next."""

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
            # A writer that knows the height stops at the last row; read on, for the check below.
            for _ in row_chunks:
                pass

    def _counting(self, row_chunks: Iterable[Array]) -> Iterator[Array]:
        for rows in row_chunks:
            self._rows += len(rows)
            yield rows

    def check(self, path: Path, count: int) -> None:
        """Raise PddError unless all rows of `count` images were read."""
        for _ in self._left:
            pass
        if (len(self.streams), self._rows) != (count, self._expected):
            raise PddError(
                f"{path}: {len(self.streams)} of {count} images and {self._rows} of {self._expected} rows were written",
                "This is a bug in pdd: please report it. The output was removed.",
            )


def _check_images(path: Path, written: Path, format: str, streams: Sequence[ImageStream]) -> None:
    """Raise PddError if the file `written` lacks some of the `streams` or has other durations."""
    if format == "TIFF":
        import tifffile

        with tifffile.TiffFile(written) as file:
            sizes = [(page.imagewidth, page.imagelength) for page in map(tifffile.TiffPage.aspage, file.pages)]
        complete = sizes == [(stream.spec.width, stream.spec.height) for stream in streams]
    else:
        # Encoders merge equal frames and add their durations.
        shown = 0.0
        with Image.open(written, formats=[format]) as image:
            for index in range(int(getattr(image, "n_frames", 1))):
                image.seek(index)
                image.load()
                shown += image.info.get("duration") or 0
        tolerance = max(len(streams), 10 if format == "GIF" else 0)  # GIF counts hundredths of a second
        complete = abs(shown - sum(round(stream.duration or 0) for stream in streams)) < tolerance
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
    """Names of what the format of `path` can't hold of one of `count` streams.

    Raises InputError for colours that it can't hold.
    """
    names = stream.metadata.held_by(format_of(path), gray=stream.spec.channels == 1, animated=count > 1)[1]
    if count > 1 and format_of(path) == "TIFF" and stream.duration:
        names += ("times of the frames",)
    is_reduced = stored_spec(path, stream.spec).bits < stream.spec.bits
    return (*names, f"all but 8 of {stream.spec.bits} bits") if is_reduced else names


def as_shown(picture: DecodedImage) -> Array:
    """(H, W, 3) uint8 as a screen shows `picture`: in sRGB, on white where it is transparent."""
    rows = picture.pixels if picture.alpha is None else _on_white(picture.interleaved)
    rows = from_float(to_float(rows), 8)
    image = Image.fromarray(rows[..., 0] if rows.shape[2] == 1 else rows)
    if picture.metadata.icc:
        image = _as_srgb(image, picture.metadata.icc)
    return np.asarray(image.convert("RGB"))


def _on_white(rows: Array) -> Array:
    values = to_float(rows)
    alpha = values[..., -1:]
    return from_float(values[..., :-1] * alpha + (1 - alpha), rows.dtype.itemsize * 8)


def _write_whole(path: Path, format: str, streams: Iterable[ImageStream], encoding: Encoding, record: str = "") -> None:
    """Write arrays of whole images with Pillow, or as TGA with `record`."""
    images: list[Image.Image] = []
    durations: list[int] = []
    first: ImageStream | None = None
    for stream in streams:
        first = first or stream
        if (stream.spec.width, stream.spec.height) != (first.spec.width, first.spec.height):
            raise InputError(f"pages of different sizes can't be frames of one {format}", "Use --format tiff.")
        whole = collect_rows(stream)
        image = Image.fromarray(whole[..., 0] if stream.spec.samples == 1 else whole)
        if format == "JXL":
            load_plugin(format)
        if stream.metadata.icc and not _has_profile(format, stream.spec):
            image = _as_srgb(image, stream.metadata.icc)
        if format == "TGA":
            tga.write(path, np.asarray(image), record)
            return
        images.append(image.convert("RGBA") if image.mode == "LA" else image)
        durations.append(round(stream.duration or 0))
    assert first is not None
    options = _pillow_options(format, first, encoding)
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:], "duration": durations}
        options |= {"loop": first.metadata.plays} if format == "WEBP" else {}
    images[0].save(path, format, **options)


def _has_profile(format: str, spec: ImageSpec) -> bool:
    """Whether a file can hold a colour profile for such pixels; without one it is sRGB."""
    return format in ("JPEG", "TIFF", "PNG", "HEIF") or (format in ("WEBP", "AVIF") and spec.channels == 3)


def _as_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Convert `image` to sRGB."""
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


def _pillow_options(format: str, stream: ImageStream, encoding: Encoding) -> dict[str, Any]:
    options: dict[str, Any] = {}
    metadata = stream.metadata
    match format:
        case "JPEG":
            # Chroma at full resolution, to keep the detail that the model adds.
            options = {"quality": encoding.quality, "subsampling": 0, "optimize": True}
            if metadata.iptc:
                content = b"Photoshop 3.0\0" + photoshop_block(metadata.iptc)
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
