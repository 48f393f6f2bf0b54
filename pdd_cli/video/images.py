"""Images as the frames of a video: a folder of frames, or an animation (GIF, APNG, WebP, AVIF)."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import decode_pages, probe, read_bytes
from pdd_cli.imaging.find import find_images
from pdd_cli.imaging.image import Array, DecodedImage, from_float, to_float
from pdd_cli.upscaling.pipeline import NO_TIMES, PAGE_DURATION
from pdd_cli.video.decode import LIMITED, Clip, Colours, Frame, open_container
from pdd_cli.video.options import VideoOptions

# Times of animations are in units of 10 microseconds. A frame of 10 ms or less is shown for 100 ms, as browsers and
# FFmpeg do.
_UNIT = Fraction(1, 100_000)
_SHORTEST = 10.0

_BT709 = 1


def is_image_sequence(source: Path) -> bool:
    """Whether the frames of `source` are read here: it is a folder, or a file that is no video."""
    from pdd_cli.video.decode import is_video

    return not is_video(source)


def frame_files(folder: Path) -> list[Path]:
    """The images in `folder`, in the order of the numbers in their names."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(find_images(folder, recursive=False), key=order)


def read_image_clip(source: Path, *, most_pixels: int, options: VideoOptions) -> Clip:
    """The properties of a folder of frames, or of an animation, as those of a video.

    Raises InputError if the frames have different sizes, can't be read, or if a file is not an animation.
    """
    notes = []
    if source.is_dir():
        assert options.fps is not None
        files = frame_files(source)
        if not files:
            raise InputError(f"{source}: no images in it")
        headers = [probe(path, most_pixels=most_pixels) for path in files]
        size = headers[0].size
        for path, header in zip(files, headers, strict=True):
            if header.size != size:
                raise InputError(
                    f"{path} is {header.size[0]}x{header.size[1]}, the frames before it {size[0]}x{size[1]}",
                    "All frames of a video have one size.",
                )
        count, rate, unit = len(files), options.fps, 1 / options.fps
        bits = max(header.spec.bits for header in headers)
        gap = _gap(files)
        if gap:
            notes.append(gap)
    else:
        header = probe(source, most_pixels=most_pixels)
        if header.frames == 1:
            raise InputError(f"{source}: one image, not an animation, can't become a video", "Give an image as output.")
        size, count, bits, unit = header.size, header.frames, 8, _UNIT
        durations = []
        for page in decode_pages(source, read_bytes(source), most_pixels=most_pixels):
            durations.append(_shown(page))
            notes += [NO_TIMES] if page.duration is None and not notes else []
        rate = Fraction(1000 * count / sum(durations)).limit_denominator(1001)
    shift = Fraction(0)
    if options.audio is not None:
        with open_container(options.audio) as container:
            if not container.streams.audio:
                raise InputError(f"--audio {options.audio}: there is no audio in it")
            shift = Fraction(container.start_time or 0, 1_000_000)
    start, stop = (None if time is None else time + shift for time in (options.start, options.end))
    first, last = options.start or Fraction(0), count / rate if options.end is None else options.end
    if first >= count / rate:
        raise InputError(f"{source}: --start {float(first):g} is after its end, at {float(count / rate):g} seconds")
    box = options.crop
    if box is not None and (box.left + box.width > size[0] or box.top + box.height > size[1]):
        raise InputError(f"{source}: --crop {box} is not inside the frames, which are {size[0]}x{size[1]} pixels")
    return Clip(
        path=source,
        index=-1,
        codec="",
        width=size[0],
        height=size[1],
        bits=bits,
        chroma=(2, 2),  # which all players can show
        coding=None,
        colours=Colours(_BT709, _BT709, _BT709, LIMITED),
        site=(0.0, 0.5),
        aspect=Fraction(0),
        quarters=0,
        display=(),
        rate=rate,
        time_base=unit,
        declared=0,
        frames=round((min(last, count / rate) - first) * rate),
        end=0,
        until=0,
        lasts=Fraction(0),
        shift=shift,
        start=start,
        stop=stop,
        crop=box,
        coded=False,
        timeless=False,
        interlaced=False,
        deinterlace=False,
        alpha=False,
        side=frozenset(),
        mastering=(),
        light=(),
        notes=tuple(notes),
        streams=options.audio,
    )


def _gap(files: list[Path]) -> str:
    """The first gap in the numbers of frames, as a message."""
    numbers = [int(found[-1]) if (found := re.findall(r"\d+", path.stem)) else None for path in files]
    for before, after, path in zip(numbers, numbers[1:], files[1:], strict=False):
        if before is not None and after is not None and after > before + 1:
            return f"frames are missing before {path.name}: the frames after it move up"
    return ""


def _shown(page: DecodedImage) -> float:
    """Milliseconds for which a frame of an animation is shown."""
    return PAGE_DURATION if page.duration is None or page.duration <= _SHORTEST else page.duration


class ImageSequenceReader:
    """Yields images as the frames of a clip, as `FrameReader` does."""

    def __init__(self, clip: Clip, skip: int) -> None:
        self.times: list[int] = []
        self._clip, self._skip = clip, skip
        self._lost: dict[str, None] = {}
        self._last = 1

    def __iter__(self) -> Generator[Frame, None, None]:
        clip = self._clip
        offset = round((clip.offset - clip.shift) / clip.time_base)
        for time, duration, page in self._pages():
            shown = time - offset
            if clip.start is not None and shown < 0:
                continue
            if clip.stop is not None and shown * clip.time_base + clip.offset >= clip.stop:
                break
            pixels = None if len(self.times) < self._skip else self._pixels(page)
            self.times.append(shown)
            self._last = duration
            yield Frame(shown, pixels)
        if not self.times:
            raise InputError(f"{clip.path}: no frame is between --start and --end")

    def _pages(self) -> Iterator[tuple[int, int, DecodedImage]]:
        """Each frame with its time and duration in units of the clip's time base."""
        clip = self._clip
        if clip.path.is_dir():
            for number, path in enumerate(frame_files(clip.path)):
                yield number, 1, next(decode_pages(path, read_bytes(path)))
            return
        elapsed = 0.0
        for page in decode_pages(clip.path, read_bytes(clip.path)):
            start, end = (round(Fraction(ms) / 1000 / clip.time_base) for ms in (elapsed, elapsed + _shown(page)))
            yield start, end - start, page
            elapsed += _shown(page)
            if page.metadata.plays != 1 and page.duration is not None:
                self._lost["repetitions"] = None

    def _pixels(self, page: DecodedImage) -> Array:
        """(h, w, 3) in 0..65535."""
        if (page.width, page.height) != (self._clip.width, self._clip.height):
            raise InputError(f"{self._clip.path}: frame {len(self.times)} is {page.width}x{page.height}")
        if page.metadata.icc or page.metadata.cicp:
            self._lost["colour profile"] = None
        values, alpha = to_float(page.pixels), page.alpha
        if alpha is not None and (alpha != np.iinfo(alpha.dtype).max).any():
            self._lost["transparency (laid on white)"] = None
            opacity = to_float(alpha)[..., None]
            values = values * opacity + (1 - opacity)
        return from_float(np.broadcast_to(values, (*values.shape[:2], 3)), 16)

    @property
    def end(self) -> int:
        """The end time of the last frame."""
        return self.times[-1] + self._last

    def notes(self) -> list[str]:
        """Messages about the frames that were read."""
        return [f"not kept: {', '.join(self.left_out)}"] if self.left_out else []

    @property
    def left_out(self) -> list[str]:
        """Names of what the frames have and a video lacks."""
        return list(self._lost)
