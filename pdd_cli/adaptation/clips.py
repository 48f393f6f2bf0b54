"""Frames of videos as training images: chosen where there is detail, without near-duplicates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pdd_cli.data.datasets import RGB, texture
from pdd_cli.errors import InputError
from pdd_cli.imaging.encode import write_image
from pdd_cli.imaging.find import find_images
from pdd_cli.imaging.image import MOST_PIXELS, Array, DecodedImage, from_float, to_float
from pdd_cli.video.decode import FrameReader, is_video, read_clip

# Images of all clips together, and of one.
_MOST, _MOST_PER_CLIP, _LEAST_PER_CLIP = 240, 60, 4
# Frames that are examined for each one that is chosen.
_CANDIDATES = 6
# Frames whose thumbnails differ by less, in 8-bit levels, show the same.
_DIFFERENCE = 3.0
_THUMBNAIL = (32, 32)
# Frames with less texture are flat: black, a fade, a title.
_LEAST_TEXTURE = 1.0


@dataclass(frozen=True)
class ClipFrames:
    """The images that were made of clips: PNG files below `folder`, in a subfolder for each clip.

    The folder exists as long as this object.
    """

    folder: tempfile.TemporaryDirectory[str]
    paths: Sequence[Path]


def clips_in(source: Path) -> list[Path]:
    """The videos of `--real-dir`: the file itself, or those in the folder and below."""
    if source.is_file():
        return [source] if is_video(source) else []
    return find_images(source, wanted=is_video) if source.is_dir() else []


def sample_clips(
    source: Path, clips: Sequence[Path], warn: Callable[[str], None], say: Callable[[str], None]
) -> ClipFrames:
    """Choose frames of the clips and write them to a temporary folder.

    The choice depends only on the clips. A clip that can't be read is reported to `warn` and skipped.
    """
    folder = tempfile.TemporaryDirectory(prefix="pdd-frames-", ignore_cleanup_errors=True)
    most = max(_LEAST_PER_CLIP, min(_MOST_PER_CLIP, _MOST // len(clips)))
    paths: list[Path] = []
    for clip in clips:
        name = clip.name if source.is_file() else "_".join(clip.relative_to(source).parts)
        while (Path(folder.name) / name).exists():  # a_b.mp4 beside a/b.mp4
            name += "_"
        try:
            chosen = choose_frames(clip, most, warn)
        except InputError as error:
            warn(f"--real-dir: left out: {error.message}")
            continue
        for number, pixels in chosen:
            path = Path(folder.name) / name / f"{number:08d}.png"
            write_image(path, DecodedImage(pixels))
            paths.append(path)
    say(f"{len(paths)} frames of {len(clips)} videos in --real-dir {source}, chosen by detail and without duplicates")
    return ClipFrames(folder, paths)


def choose_frames(path: Path, most: int, warn: Callable[[str], None]) -> list[tuple[int, RGB]]:
    """At most `most` frames of a video with their numbers: the most detailed one of each part of its length.

    Frames that show almost the same as one before, and flat ones, are left out.
    """
    clip = read_clip(path, most_pixels=MOST_PIXELS)
    for note in clip.notes:
        warn(f"--real-dir: {path}: {note}")
    count = max(1, clip.frames)
    every = max(1, count // (most * _CANDIDATES))
    parts = min(most, count)
    best: dict[int, tuple[float, int, Array]] = {}
    for number, frame in FrameReader(clip, skip=0).sampled(every):
        if frame.pixels is None:
            continue
        upright = clip.part(from_float(to_float(frame.pixels), 8))
        detail, part = texture(upright), min(parts - 1, number * parts // count)
        if detail >= _LEAST_TEXTURE and (part not in best or detail > best[part][0]):
            best[part] = detail, number, upright
    chosen: list[tuple[int, RGB]] = []
    thumbnails: list[Array] = []
    for _, number, pixels in (best[part] for part in sorted(best)):
        small = cv2.resize(pixels, _THUMBNAIL, interpolation=cv2.INTER_AREA).astype(np.float32)
        if all(np.abs(small - other).mean() >= _DIFFERENCE for other in thumbnails):
            thumbnails.append(small)
            chosen.append((number, pixels))
    return chosen
