"""Write GIF files: one palette for all frames, so that still areas do not flicker."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from PIL import GifImagePlugin, Image

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, ImageStream, collect_rows
from pdd_cli.imaging.metadata import Metadata

# Colours of the palette; the last of 256 entries is the transparent one.
_COLOURS = 255
# Pixels of all frames from which the palette is chosen.
_SAMPLED = 1 << 18
# Milliseconds for which a frame can be shown; a longer one is written several times.
_LONGEST = 655_350
# An XMP packet stands in an application extension, whole and not in blocks. Of what follows it, each byte is the
# distance to the end: a program that expects blocks, and takes any byte of the packet for a length, arrives there, too.
_XMP = b"!\xff\x0bXMP DataXMP"
_AFTER_XMP = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"


def write_gif(path: Path, streams: Iterable[ImageStream], to_srgb: Callable[[Image.Image, bytes], Image.Image]) -> None:
    """Write the frames as a GIF. Pixels whose alpha is below one half become transparent.

    `to_srgb` converts an image with its profile, because a GIF has none. The frames are kept in a temporary file beside
    `path` until the palette of all of them is known.

    Raises InputError if the frames have different sizes.
    """
    ends: list[float] = []
    first: ImageStream | None = None
    colours = _Colours()
    has_clear = False
    with TemporaryFile(dir=path.parent) as kept, path.open("wb") as file:
        for stream in streams:
            first = first or stream
            if (stream.spec.width, stream.spec.height) != (first.spec.width, first.spec.height):
                raise InputError("pages of different sizes can't be frames of one GIF", "Use --format tiff.")
            frame = _as_rgba(stream, to_srgb)
            has_clear = has_clear or not frame[..., 3].all()
            colours.add(frame)
            _append(kept, frame)
            ends.append((ends[-1] if ends else 0.0) + (stream.duration or 0))
        assert first is not None
        kept.seek(0)
        # Rounded to hundredths of a second where each frame ends, so that errors do not add up.
        marks = [0, *(10 * round(end / 10) for end in ends)]
        durations = [after - before for before, after in itertools.pairwise(marks)] if len(ends) > 1 else []
        times = [_parts(duration) for duration in durations]
        frames = (_next(kept, (first.spec.height, first.spec.width, 4)) for _ in ends)
        if times:
            frames = (frame for frame, parts in zip(frames, times, strict=True) for _ in parts)
        shown = list(itertools.chain.from_iterable(times))
        _write_frames(file, frames, colours.palette(), shown, first.metadata, transparent=has_clear)


def xmp_of(data: bytes) -> bytes | None:
    """The XMP packet of a GIF; None if it has none."""
    start = data.find(_XMP) + len(_XMP)
    end = data.find(_AFTER_XMP, start)
    return data[start:end] if len(_XMP) <= start < end else None


def _write_frames(
    file: IO[bytes],
    frames: Iterable[Array],
    palette: Image.Image,
    durations: Sequence[int],
    metadata: Metadata,
    *,
    transparent: bool,
) -> None:
    """Write the frames, (H, W, 4) uint8, one after the other; of each frame only the part that changes.

    Args:
        file: The GIF.
        frames: Their alpha is 0 or 255.
        palette: An image with the palette.
        durations: Milliseconds of each frame; none for a single frame.
        metadata: That of the first frame.
        transparent: Whether some pixels are.
    """
    options = {"transparency": _COLOURS} if transparent else {}
    shown: Array | None = None
    for number, frame in enumerate(frames):
        indices = np.array(_rgb(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
        indices[indices == _COLOURS] = 0  # the same colour
        indices[frame[..., 3] == 0] = _COLOURS
        image = Image.fromarray(indices)
        image.putpalette(palette.getpalette() or [])
        timing = {"duration": durations[number], "disposal": 2 if transparent else 1} if durations else {}
        box = (0, 0, *image.size)
        if shown is None:
            general: dict[str, Any] = {**options, **timing}
            if durations and metadata.plays != 1:
                general["loop"] = max(0, metadata.plays - 1)  # the number of repetitions; 0: endless
            if metadata.comment:
                general["comment"] = metadata.comment
            file.writelines(GifImagePlugin.getheader(image, info=general)[0])
            if metadata.xmp:
                file.write(_XMP + metadata.xmp + _AFTER_XMP)
        else:
            before = _COLOURS if transparent else shown  # transparent frames are cleared before the next
            # Without a change one pixel is written, so that the frame keeps its time.
            box = Image.fromarray(indices != before).getbbox() or (0, 0, 1, 1)
        file.writelines(GifImagePlugin.getdata(image.crop(box), box[:2], **options, **timing))
        shown = indices
    file.write(b";")


def _parts(duration: int) -> list[int]:
    """`duration` as a sum of times that a frame can be shown."""
    whole, rest = divmod(duration, _LONGEST)
    return [_LONGEST] * whole + ([rest] if rest or not whole else [])


def _as_rgba(stream: ImageStream, to_srgb: Callable[[Image.Image, bytes], Image.Image]) -> Array:
    """(H, W, 4) uint8 in sRGB with an alpha of 0 or 255."""
    whole = collect_rows(stream)
    frame = np.full((*whole.shape[:2], 4), 255, np.uint8)
    frame[..., :3] = whole[..., : stream.spec.channels]
    if stream.metadata.icc and stream.spec.channels == 3:
        frame[..., :3] = np.asarray(to_srgb(_rgb(frame), stream.metadata.icc))
    if stream.spec.alpha:
        frame[..., 3] = np.where(whole[..., -1] < 128, 0, 255)
    return frame


def _rgb(frame: Array) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame[..., :3]))


def _append(file: IO[bytes], frame: Array) -> None:
    """Write a frame, compressed, so that `_next` reads it."""
    data = zlib.compress(frame.tobytes(), 1)
    file.write(len(data).to_bytes(8, "little") + data)


def _next(file: IO[bytes], shape: tuple[int, ...]) -> Array:
    size = int.from_bytes(file.read(8), "little")
    return np.frombuffer(zlib.decompress(file.read(size)), np.uint8).reshape(shape)


class _Colours:
    """The colours of all frames, or, if they have too many pixels, of a random sample of these."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._sampled: list[Array] = []
        self._every = 1  # one pixel of so many is in the sample

    def add(self, frame: Array) -> None:
        """Add the visible pixels of a frame, (H, W, 4) uint8."""
        pixels = frame.reshape(-1, 4)
        if self._every > 1:
            pixels = pixels[self._random.integers(0, len(pixels), len(pixels) // self._every)]
        self._sampled.append(pixels[pixels[:, 3] > 0, :3])
        while sum(map(len, self._sampled)) > 2 * _SAMPLED:
            self._every *= 2
            self._sampled = [pixels[self._random.random(len(pixels)) < 0.5] for pixels in self._sampled]

    def palette(self) -> Image.Image:
        """An image with the palette."""
        sampled = np.concatenate(self._sampled)
        if not len(sampled):
            sampled = np.zeros((1, 3), np.uint8)
        image = Image.fromarray(sampled[None]).quantize(_COLOURS, Image.Quantize.MEDIANCUT, kmeans=1)
        colours = (image.getpalette() or [])[: 3 * _COLOURS]
        image.putpalette(colours + colours[:3] * (256 - len(colours) // 3))
        return image
