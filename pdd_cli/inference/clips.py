"""Video file → what it is and its frames, by PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.encoding import Array, from_float, to_float
from pdd_cli.errors import InputError
from pdd_cli.inference.yuv import Coding, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".3gp": "3gp",
}
"""Suffix → FFmpeg's name of the container; what is written."""

_ALSO_READ = (".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".wmv", ".flv", ".ogv", ".y4m")

# ITU-T H.273's numbers of matrices → the weights of red and blue in Y'.
_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
RGB, _BT709, _UNSPECIFIED, _BT601 = 0, 1, 2, 6
FULL_RANGE, _LIMITED = 2, 1

SUBSAMPLINGS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (1, 2): "440", (4, 1): "411", (4, 4): "410"}
_NO_FRAME_A_PACKET = ("vp8", "vp9", "libvpx", "libvpx-vp9")  # may hold packets that show nothing

_HDR = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL", "DYNAMIC_HDR_PLUS", "DOVI_METADATA", "DOVI_RPU_BUFFER")

_MOST_BACK = 1  # seconds that timestamps may go back: a flaw of one frame, not another recording


@dataclass(frozen=True)
class Colours:
    """H.273's numbers of primaries, transfer and matrix, and FFmpeg's of the range, as the output is tagged."""

    primaries: int
    transfer: int
    matrix: int
    range: int

    @property
    def full(self) -> bool:
        """Whether all codes are used."""
        return self.range == FULL_RANGE

    def coding(self, bits: int) -> Coding:
        """How Y', Cb, Cr of so many bits stand for RGB."""
        return Coding(*_WEIGHTS[self.matrix], bits, self.full)


@dataclass(frozen=True)
class Clip:
    """What a file says of its video; the stream `index` is the one that is upscaled.

    `width`, `height` as stored; `quarters`: turns counterclockwise that make it upright; `display`: the whole
    matrix for that, as FFmpeg has it. `chroma`: luma samples per chroma sample, across and down; `coding` is None for
    RGB. `left`: where chroma is sited. `aspect`: of a pixel, 0 where unknown. `declared`: frames, 0 where unknown;
    `frames`: about how many. `end`: the time when the last one ends, 0 where unknown; where that is before `until` the
    file is cut short. `shift`: seconds to take off all timestamps. `notes`: what to know of the input.
    """

    path: Path
    index: int
    codec: str
    width: int
    height: int
    bits: int
    chroma: tuple[int, int]
    coding: Coding | None
    colours: Colours
    left: bool
    aspect: Fraction
    quarters: int
    display: tuple[int, ...]
    rate: Fraction
    time_base: Fraction
    declared: int
    frames: int
    end: int
    until: int
    shift: Fraction
    notes: tuple[str, ...]

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as it is seen."""
        return (self.width, self.height) if self.quarters % 2 == 0 else (self.height, self.width)


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: `time` in units of the clip's time base; `pixels` (h, w, 3) in 0..65535, as stored."""

    time: int
    pixels: Array | None


def is_video(path: Path | str) -> bool:
    """Whether the suffix is one of a video that pdd reads."""
    return Path(path).suffix.lower() in (*CONTAINERS, *_ALSO_READ)


def check_video_name(path: Path) -> None:
    """Raise InputError where the suffix of an output isn't that of a container that pdd writes."""
    if path.suffix.lower() not in CONTAINERS:
        raise InputError(f"{path}: can't write a video of this kind", f"Use one of {', '.join(CONTAINERS)}.")


# --- reading ----------------------------------------------------------------------------------------------------


def read_clip(path: Path, *, most_pixels: int) -> Clip:
    """What the file says of its video, and its first frame with it.

    Raises InputError for a file that is damaged, holds no video, or colours that pdd doesn't know.
    """
    with opened(path) as container:
        stream = _video_of(container, path)
        frame = _first_frame(container, stream)
        if frame is None:
            raise InputError(f"can't read {path}: no frame in it can be decoded")
        if frame.width * frame.height > most_pixels:
            raise InputError(f"{path}: {frame.width}x{frame.height} is too large for the memory")
        form = frame.format
        rgb = form.is_rgb or form.has_palette
        bits = min(max(*(part.bits for part in form.components), 8), 16)
        chroma = (2, 2) if len(form.components) < 3 and not rgb else _chroma_of(frame)
        colours = _colours_of(frame, rgb)
        if not rgb and colours.matrix not in _WEIGHTS:
            raise InputError(
                f"{path}: its colours are coded by a matrix that pdd doesn't know (number {colours.matrix} of H.273)"
            )
        display = _display_of(frame)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        rate = rate if 0 < rate <= 1000 else Fraction(25)
        time_base = stream.time_base or Fraction(1, 90_000)
        seconds = Fraction(container.duration or 0, 1_000_000)
        end = until = 0
        if stream.duration:
            seconds = stream.duration * time_base
            end = (stream.start_time or 0) + stream.duration
        elif tag := stream.metadata.get("DURATION"):
            end = round(_seconds_of(tag) / time_base)
            until = end - round(2 / (rate * time_base))
        else:  # may be that of the audio
            until = round((seconds - 1) / time_base)
        start = Fraction(container.start_time or 0, 1_000_000)
        notes = []
        if frame.interlaced_frame:
            notes.append("it is interlaced, which will show; deinterlace it first: ffmpeg -i FILE -vf bwdif OUT")
        if any(part.is_alpha for part in form.components):
            notes.append("its transparency is not kept")
        if any(data.type.name in _HDR for data in _side_data(frame)):
            notes.append("its HDR metadata (mastering display, Dolby Vision) is not kept, but its colours are")
        return Clip(
            path=path,
            index=stream.index,
            codec=stream.codec_context.name,
            width=frame.width,
            height=frame.height,
            bits=bits,
            chroma=chroma,
            coding=None if rgb else colours.coding(bits),
            colours=replace(colours, matrix=_BT709, range=_LIMITED) if rgb else colours,
            left=stream.codec_context.name not in ("mjpeg", "mpeg1video"),
            aspect=stream.sample_aspect_ratio or Fraction(0),
            quarters=round(frame.rotation / 90) % 4,
            display=display,
            rate=rate,
            time_base=time_base,
            declared=stream.frames,
            frames=stream.frames or round(seconds * rate),
            end=end,
            until=until,
            shift=start if container.format.flags & pyav().format.Flags.ts_discont.value else Fraction(0),
            notes=tuple(notes),
        )


def video_pixels(path: Path) -> int:
    """About how many pixels all frames have, from the head of the file. Raises InputError as `read_clip` does."""
    with opened(path) as container:
        stream = _video_of(container, path)
        context = stream.codec_context
        seconds = Fraction(container.duration or 0, 1_000_000)
        return round((stream.frames or seconds * (stream.average_rate or 25)) * context.width * context.height)


class FrameReader:
    """The frames of a clip in order; those before `skip` come without their pixels.

    `times` grows as they come. When all have, `end` is when the last one ends, and `notes` tells what was lost. Raises
    InputError where the frames change their size, or the timestamps start anew.
    """

    def __init__(self, clip: Clip, skip: int) -> None:
        self.times: list[int] = []
        self._clip = clip
        self._skip = skip
        self._packets = self._discarded = self._undecodable = self._damaged = self._untimed = self._interlaced = 0
        self._cut = self._captioned = False
        self._one_a_packet = clip.codec not in _NO_FRAME_A_PACKET
        self._shift = round(clip.shift / clip.time_base)
        self._step = self._last = max(1, round(1 / (clip.rate * clip.time_base)))

    def __iter__(self) -> Iterator[Frame]:
        clip = self._clip
        with opened(clip.path) as container:
            for frame in self._decoded(container):
                if (frame.width, frame.height) != (clip.width, clip.height):
                    raise InputError(
                        f"{clip.path}: frame {len(self.times)} is {frame.width}x{frame.height}, those before it "
                        f"{clip.width}x{clip.height}",
                        "Split the file where its size changes.",
                    )
                time = self._time(frame)
                self._last = frame.duration or self._step
                self._damaged += frame.is_corrupt
                self._interlaced += frame.interlaced_frame
                self._captioned |= any(data.type.name == "A53_CC" for data in _side_data(frame))
                pixels = _pixels(frame, clip) if len(self.times) >= self._skip else None
                self.times.append(time)
                yield Frame(time, pixels)

    @property
    def end(self) -> int:
        """When the last frame ends: as the file says, where it is whole."""
        end = self._clip.end - self._shift
        return end if end > self.times[-1] and not self._lost else self.times[-1] + self._last

    def notes(self) -> list[str]:
        """What to know of the frames that have come."""
        notes = []
        count, expected = len(self.times), self._expected
        if self._lost:
            of = f" of {expected}" if expected > count else ""
            notes.append(f"the file is damaged or cut short: only {count}{of} frames could be decoded")
        if self._damaged:
            notes.append(f"frames that are damaged in the input: {self._damaged}")
        if self._untimed:
            notes.append(f"frames without a usable timestamp, which follow the one before: {self._untimed}")
        if self._captioned:
            notes.append("the closed captions inside its frames are not kept")
        return notes

    @property
    def _expected(self) -> int:
        declared = self._clip.declared - self._discarded
        return max(declared, self._packets) if self._one_a_packet and not self._interlaced else declared

    @property
    def _lost(self) -> bool:
        short = self.times[-1] + self._last < self._clip.until
        return self._undecodable > 0 or self._cut or short or self._expected > len(self.times)

    def _time(self, frame: VideoFrame) -> int:
        stamp = frame.dts if frame.pts is None else frame.pts
        if not self.times:
            return 0 if stamp is None else stamp - self._shift
        last = self.times[-1]
        if stamp is not None and stamp - self._shift > last:
            return stamp - self._shift
        if stamp is not None and (last - stamp + self._shift) * self._clip.time_base > _MOST_BACK:
            raise InputError(
                f"{self._clip.path}: the timestamps start anew at frame {len(self.times)}",
                "Mend them first: ffmpeg -i FILE -c copy mended.mkv",
            )
        self._untimed += 1
        return last + (self._step if stamp is None else 1)

    def _decoded(self, container: InputContainer) -> Iterator[VideoFrame]:
        errors = pyav().error
        stream: Any = container.streams.get(self._clip.index)[0]
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except errors.FFmpegError:
                self._cut = True
                packet = None
            if packet is not None and not packet.size:
                continue  # PyAV's mark of the end, or an empty one, which would end the decoding
            if packet is not None:
                self._packets += not packet.is_discard
                self._discarded += packet.is_discard
                self._cut |= packet.is_corrupt
            try:
                yield from stream.decode(packet)
            except errors.FFmpegError:
                self._undecodable += 1
            if packet is None:
                return


def _pixels(frame: VideoFrame, clip: Clip) -> Array:
    """(h, w, 3) in 0..65535."""
    depth = "" if clip.bits == 8 else f"{clip.bits}le"
    if clip.coding is None and clip.bits == 8:
        return from_float(to_float(frame.reformat(format="rgb24").to_ndarray()), 16)
    if clip.coding is None:
        green, blue, red = _planes(frame, f"gbrp{depth}", 3)
        return from_float(np.stack([red, green, blue], axis=2) / np.float32((1 << clip.bits) - 1), 16)
    if len(frame.format.components) < 3:
        return to_rgb(_planes(frame, f"gray{depth}", 1), clip.coding)
    return to_rgb(_planes(frame, f"yuv{SUBSAMPLINGS[clip.chroma]}p{depth}", 3), clip.coding, left=clip.left)


def _planes(frame: VideoFrame, format: str, count: int) -> list[Array]:
    """The first `count` planes of `frame` in `format`, which differs from its own by the arrangement alone."""
    if frame.format.name.replace("yuva", "yuv").replace("yuvj", "yuv").replace("gbra", "gbr") != format:
        same = frame.color_range
        frame = frame.reformat(format=format, src_color_range=same, dst_color_range=same)
    return [plane_array(frame, n) for n in range(count)]


def plane_array(frame: VideoFrame, n: int) -> Array:
    """A plane of `frame` as an array on its memory."""
    plane = frame.planes[n]
    kind = np.dtype("<u2" if frame.format.components[0].bits > 8 else "u1")
    rows = np.frombuffer(memoryview(plane), kind).reshape(-1, plane.line_size // kind.itemsize)
    part: Array = rows[: plane.height, : plane.width]
    return part


def _seconds_of(tag: str) -> Fraction:
    """A duration as Matroska's tags have it, 00:00:10.500000000; 0 where it isn't one."""
    try:
        hours, minutes, seconds = tag.split(":")
        return (int(hours) * 60 + int(minutes)) * 60 + Fraction(seconds)
    except ValueError:
        return Fraction(0)


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    errors = pyav().error
    for packet in container.demux(stream):
        try:
            for frame in stream.decode(packet if packet.size else None):
                return frame
        except errors.FFmpegError:
            continue
    return None


def _video_of(container: InputContainer, path: Path) -> VideoStream:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise InputError(f"can't read {path}: nothing here decodes its video")
            return stream
    raise InputError(f"can't read {path}: there is no video in it")


def _chroma_of(frame: VideoFrame) -> tuple[int, int]:
    from av.video.format import VideoFormat

    if len(frame.format.components) < 3 or frame.format.is_rgb:
        return (1, 1)
    part = VideoFormat(frame.format.name, 64, 64).components[1]
    return 64 // part.width, 64 // part.height


def _colours_of(frame: VideoFrame, rgb: bool) -> Colours:
    """What the frame is tagged as; a matrix that isn't told is that which players take for its size."""
    matrix = frame.colorspace
    if not rgb and matrix in (RGB, _UNSPECIFIED, 3):
        matrix = _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601
    codes = FULL_RANGE if frame.format.name.startswith("yuvj") else frame.color_range
    return Colours(frame.color_primaries, frame.color_trc, matrix, codes)


def _display_of(frame: VideoFrame) -> tuple[int, ...]:
    for data in _side_data(frame):
        if data.type.name == "DISPLAYMATRIX":
            return struct.unpack("=9i", bytes(data))
    return ()


def _side_data(frame: Any) -> list[Any]:
    return list(frame.side_data)


# --- PyAV -------------------------------------------------------------------------------------------------------


def library_versions() -> str:
    """What encoded frames may depend on, beside pdd."""
    av = pyav()
    return f"{av.__version__} {sorted(av.library_versions.items())}"


def pyav() -> Any:
    """The module `av`. Raises InputError where it isn't installed."""
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV, which is not installed", "pip install 'av>=17.1,<19'") from error
    return av


@contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """The file at `path`, opened for reading. Raises InputError that names it for what FFmpeg can't read."""
    av = pyav()
    try:
        with av.open(f"file:{path}", metadata_errors="surrogateescape") as container:
            yield container
    except av.error.FFmpegError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
