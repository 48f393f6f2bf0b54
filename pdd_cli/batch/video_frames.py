"""Videos that `pdd evaluate` scores frame by frame: their frames as images."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pdd_cli.errors import InputError
from pdd_cli.imaging.encode import write_image
from pdd_cli.imaging.image import MOST_PIXELS, DecodedImage, from_float, to_float
from pdd_cli.settings.evaluate import EvaluateConfig
from pdd_cli.video.decode import FrameReader, is_video, read_clip

# Frames that are scored of a longer video.
_MOST = 300


def with_frames(settings: EvaluateConfig, say: Callable[[str], None]) -> tuple[EvaluateConfig, Mapping[Path, Path]]:
    """`settings` in which a folder of frames, as PNG files, stands for each video; and the videos by these folders.

    The folders are removed when the process ends. Of a video with more than 300 frames, every second, third and so on
    is taken, of all videos the same ones.

    Raises InputError if the videos do not have the same frames at the same times, because these can't be paired.
    """
    named = [settings.sr_dir, settings.gt_dir, settings.lr_dir, *settings.baseline]
    videos = [path for path in named if path is not None and is_video(path) and path.is_file()]
    if not videos:
        return settings, {}
    folder = Path(tempfile.mkdtemp(prefix="pdd-frames-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    every = -(-read_clip(videos[0], most_pixels=MOST_PIXELS).frames // _MOST) or 1
    folders: dict[Path, Path] = {}
    first: list[float] = []
    for number, video in enumerate(dict.fromkeys(videos)):
        target = folder / str(number) / video.name  # the name of the folder is shown
        times = _write_frames(video, target, every)
        folders[video] = target
        first = first or times
        _check_times(videos[0], first, video, times)
    scored = -(-len(first) // every)
    say(f"{scored} of {len(first)} frames of each video are scored" + (f": one in {every}" if every > 1 else ""))
    changes = {
        name: folders.get(path, path) for name in ("sr_dir", "gt_dir", "lr_dir") if (path := getattr(settings, name))
    }
    baseline = tuple(folders.get(path, path) for path in settings.baseline)
    of_folder = {frames: video for video, frames in folders.items()}
    return settings.model_copy(update={**changes, "baseline": baseline}), of_folder


def _write_frames(video: Path, target: Path, every: int) -> list[float]:
    """Write the frames as PNG files, numbered from 1. Returns the times of all frames in seconds; the first is 0."""
    clip = read_clip(video, most_pixels=MOST_PIXELS)
    times = []
    for number, frame in FrameReader(clip, skip=0).sampled(every):
        times.append(float(frame.time * clip.time_base))
        if frame.pixels is not None:
            pixels = clip.part(frame.pixels)
            write_image(
                target / f"{number + 1:08d}.png",
                DecodedImage(from_float(to_float(pixels), 8 if clip.bits == 8 else 16)),
            )
    return [time - times[0] for time in times]


def _check_times(first: Path, expected: list[float], video: Path, times: list[float]) -> None:
    if len(times) != len(expected):
        raise InputError(
            f"{video} has {len(times)} frames, {first} has {len(expected)}: they can't be paired",
            "Compare videos that were made from the same video.",
        )
    step = expected[-1] / max(1, len(expected) - 1)
    for number, (one, other) in enumerate(zip(expected, times, strict=True), 1):
        if abs(one - other) > step / 2:
            raise InputError(
                f"frame {number} of {video} is at {other:.3f} s, that of {first} at {one:.3f} s: they can't be paired",
                "Compare videos that were made from the same video.",
            )
