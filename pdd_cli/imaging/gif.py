"""Write GIF files: one palette for all frames, so that still areas do not flicker."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, ImageStream, collect_rows

# Colours of the palette; the last of 256 entries is the transparent one.
_COLOURS = 255
# Pixels of all frames from which the palette is chosen.
_SAMPLED = 1 << 18


def write_gif(path: Path, streams: Iterable[ImageStream], to_srgb: Callable[[Image.Image, bytes], Image.Image]) -> None:
    """Write the frames as a GIF. Pixels whose alpha is below one half become transparent.

    `to_srgb` converts an image with its profile, because a GIF has none.

    Raises InputError if the frames have different sizes.
    """
    pixels: list[Array] = []
    clear: list[Array] = []
    ends: list[float] = []
    first: ImageStream | None = None
    for stream in streams:
        first = first or stream
        if (stream.spec.width, stream.spec.height) != (first.spec.width, first.spec.height):
            raise InputError("pages of different sizes can't be frames of one GIF", "Use --format tiff.")
        whole = collect_rows(stream)
        colours = np.broadcast_to(whole[..., : stream.spec.channels], (*whole.shape[:2], 3))
        if stream.metadata.icc and stream.spec.channels == 3:
            colours = np.asarray(to_srgb(Image.fromarray(np.ascontiguousarray(colours)), stream.metadata.icc))
        pixels.append(np.ascontiguousarray(colours))
        clear.append(whole[..., -1] < 128 if stream.spec.alpha else np.zeros(whole.shape[:2], bool))
        ends.append((ends[-1] if ends else 0.0) + (stream.duration or 0))
    assert first is not None
    palette = _palette(pixels, clear)
    has_clear = any(mask.any() for mask in clear)
    frames = []
    for colours, mask in zip(pixels, clear, strict=True):
        index = Image.fromarray(colours).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        frame = index
        if has_clear:
            frame = Image.fromarray(np.where(mask, np.uint8(_COLOURS), np.asarray(index)).astype(np.uint8), "P")
            frame.putpalette(palette.getpalette() or [])
            frame.info["transparency"] = _COLOURS
        frames.append(frame)
    # Rounded to hundredths of a second where each frame ends, so that errors do not add up.
    marks = [0, *(10 * round(end / 10) for end in ends)]
    options: dict[str, object] = {"transparency": _COLOURS} if has_clear else {}
    if len(frames) > 1:
        plays = first.metadata.plays
        options |= {
            "save_all": True,
            "append_images": frames[1:],
            "duration": [after - before for before, after in itertools.pairwise(marks)],
            "disposal": 2 if has_clear else 1,
        }
        if plays != 1:
            options["loop"] = max(0, plays - 1)  # the number of repetitions; 0: endless
    if first.metadata.comment:
        options["comment"] = first.metadata.comment
    frames[0].save(path, "GIF", optimize=False, **options)


def _palette(pixels: list[Array], clear: list[Array]) -> Image.Image:
    """A palette of the colours of all visible pixels."""
    every = max(1, sum(mask.size for mask in clear) // _SAMPLED)
    sampled = np.concatenate([frame[~mask][::every] for frame, mask in zip(pixels, clear, strict=True)])
    if not len(sampled):
        sampled = np.zeros((1, 3), np.uint8)
    image = Image.fromarray(sampled[None]).quantize(_COLOURS, Image.Quantize.MEDIANCUT)
    colours = (image.getpalette() or [])[: 3 * _COLOURS]
    image.putpalette(colours + [0] * (768 - len(colours)))
    return image
