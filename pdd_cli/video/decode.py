"""Reads the properties and frames of video files with PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import heapq
import itertools
import re
import struct
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, from_float, to_float
from pdd_cli.video.options import Box, VideoOptions
from pdd_cli.video.yuv import Coding, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream
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
"""Suffix → FFmpeg's name of the container, for output."""

_ALSO_READ = (
    *(".avi", ".divx", ".dv", ".mxf", ".ts", ".m2t", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".flv"),
    *(".f4v", ".3g2", ".qt", ".ogv", ".ivf", ".y4m", ".m1v", ".m2v", ".h264", ".264", ".h265", ".265", ".hevc"),
)

# Matrix number of ITU-T H.273 → weights of red and blue in Y'.
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
_UNSPECIFIED_RANGE, LIMITED, FULL_RANGE = 0, 1, 2

SUBSAMPLINGS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (1, 2): "440", (4, 1): "411", (4, 4): "410"}
_CODECS_WITH_HIDDEN_FRAMES = ("vp8", "vp9", "libvpx", "libvpx-vp9")  # may hold packets that show nothing

# FFmpeg's chroma location → horizontal and vertical position of a chroma sample between the first (0) and the last (1)
# luma sample that it covers.
_SITES = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}

# Side data of frames that can't be kept, with readable names. Other side data only describes the encoding of the input.
_SIDE_DATA = {
    "A53_CC": "closed captions",
    "MASTERING_DISPLAY_METADATA": "the mastering display",
    "CONTENT_LIGHT_LEVEL": "the content light level",
    "DYNAMIC_HDR_PLUS": "HDR10+ metadata",
    "DYNAMIC_HDR_VIVID": "HDR Vivid metadata",
    "DYNAMIC_HDR_SMPTE_2094_APP5": "dynamic HDR metadata",
    "DOVI_METADATA": "Dolby Vision metadata",
    "DOVI_RPU_BUFFER": "Dolby Vision metadata",
    "DOVI_RPU_BUFFER_T35": "Dolby Vision metadata",
    "AMBIENT_VIEWING_ENVIRONMENT": "the ambient viewing environment",
    "STEREO3D": "the stereo 3D layout",
    "VIEW_ID": "the second view of stereo 3D",
    "SPHERICAL": "the spherical (360 degrees) projection",
    "ICC_PROFILE": "the ICC profile",
    "AFD": "the active format",
    "S12M_TIMECODE": "timecodes inside the frames",
    "DETECTION_BBOXES": "detected objects",
    "LCEVC": "the LCEVC enhancement layer",
    "EXIF": "EXIF",
}
HDR10 = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL")

_DEINTERLACE = "--deinterlace makes progressive frames of its fields"

_PROBED_PACKETS = 32  # packets that are read to find out which timestamps they have

_MAX_BACKWARD_JUMP = 1  # seconds; a larger backward jump of the timestamps means the start of another recording

_SEEK_MARGIN = 3  # seconds; decoding starts at a keyframe at least this long before the first frame that is wanted


@dataclass(frozen=True)
class Colours:
    """The colour tags of the output: primaries, transfer and matrix as in H.273, range as in FFmpeg."""

    primaries: int
    transfer: int
    matrix: int
    range: int

    @property
    def full(self) -> bool:
        """Whether the range is full."""
        return self.range == FULL_RANGE

    def coding(self, bits: int) -> Coding:
        """The coding of RGB as Y', Cb, Cr with `bits` bits."""
        return Coding(*_WEIGHTS[self.matrix], bits, self.full)


@dataclass(frozen=True)
class Clip:
    """The properties of a video. The stream `index` is the one that is upscaled.

    `width`, `height`: as stored. `quarters`: counterclockwise quarter turns that make it upright. `display`: FFmpeg's
    display matrix. `chroma`: luma samples per chroma sample, horizontally and vertically. `coding`: None for RGB.
    `site`: chroma location, see `yuv.to_rgb`. `aspect`: of a pixel; 0: unknown. `declared`: number of frames; 0:
    unknown. `frames`: approximate number of frames. `end`: end time of the last frame; 0: unknown. The file is cut
    short if the frames end before `until` or all streams end before `lasts` (seconds); 0: unknown. `shift`: seconds to
    subtract from all timestamps, unless the video is cut: frames and packets from `start` on and before `stop` are
    used (seconds as in the file; None: not cut there). `crop`: the part of each upright frame that is used.
    `coded`: timestamps are in decoding order. `timeless`: there are no timestamps. `interlaced`: the first frame is.
    `deinterlace`: frames are deinterlaced when they are read. `side`: kinds of side data of the first frame.
    `mastering`, `light`: FFmpeg's values of the mastering display and the content light level, or empty. `notes`:
    messages about the input. `streams`: the file that has the audio, for frames that are images (`index` -1);
    otherwise it is `path`.
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
    site: tuple[float, float]
    aspect: Fraction
    quarters: int
    display: tuple[int, ...]
    rate: Fraction
    time_base: Fraction
    declared: int
    frames: int
    end: int
    until: int
    lasts: Fraction
    shift: Fraction
    start: Fraction | None
    stop: Fraction | None
    crop: Box | None
    coded: bool
    timeless: bool
    interlaced: bool
    deinterlace: bool
    alpha: bool
    side: frozenset[str]
    mastering: tuple[int, ...]
    light: tuple[int, ...]
    notes: tuple[str, ...]
    streams: Path | None = None

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the part that is used, as displayed."""
        if self.crop is not None:
            return self.crop.width, self.crop.height
        return (self.width, self.height) if self.quarters % 2 == 0 else (self.height, self.width)

    def part(self, pixels: Array) -> Array:
        """The part of a stored frame that is used, upright."""
        upright = np.rot90(pixels, self.quarters)
        if self.crop is not None:
            box = self.crop
            upright = upright[box.top : box.top + box.height, box.left : box.left + box.width]
        return np.ascontiguousarray(upright)

    @property
    def is_cut(self) -> bool:
        """Whether only the frames of a range of time are used."""
        return self.start is not None or self.stop is not None

    @property
    def offset(self) -> Fraction:
        """Seconds to subtract from all timestamps: where the output starts."""
        return self.shift if self.start is None else self.start

    @property
    def uncut(self) -> Clip:
        """The whole video."""
        return replace(self, start=None, stop=None)

    def in_range(self, time: Fraction) -> bool:
        """Whether a time in seconds, after `offset` was subtracted, is in the range that is used."""
        return (self.start is None or time >= 0) and (self.stop is None or time + self.offset < self.stop)


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame. `time` is in units of the clip's time base; `pixels` are (h, w, 3) in 0..65535, as stored."""

    time: int
    pixels: Array | None


def is_video(path: Path | str) -> bool:
    """Whether the suffix is that of a video format that pdd reads."""
    return Path(path).suffix.lower() in (*CONTAINERS, *_ALSO_READ)


def check_video_name(path: Path) -> None:
    """Raise InputError if pdd doesn't write containers with the suffix of `path`."""
    if path.suffix.lower() not in CONTAINERS:
        raise InputError(f"{path}: can't write a video of this kind", f"Use one of {', '.join(CONTAINERS)}.")


# --- reading ----------------------------------------------------------------------------------------------------


def read_clip(path: Path, *, most_pixels: int, options: VideoOptions = VideoOptions()) -> Clip:
    """Read the properties of a video from its header and its first frame.

    Raises InputError if the file is damaged, contains no video, or has an unknown colour matrix, or if the range or the
    part of `options` is not in it.
    """
    coded = _has_only_dts(path)
    with open_container(path) as container:
        stream = _video_of(container, path)
        described = describe_streams(container).get(stream.index, "")
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
            raise InputError(f"{path}: unsupported colour matrix (number {colours.matrix} of H.273)")
        display = _display_of(frame)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        rate = rate if 0 < rate <= 1000 else Fraction(25)
        time_base = stream.time_base or Fraction(1, 90_000)
        seconds = Fraction(container.duration or 0, 1_000_000)
        end = until = 0
        lasts = Fraction(0)
        if stream.duration:
            seconds = stream.duration * time_base
            end = (stream.start_time or 0) + stream.duration
            if coded and stream.frames:  # AVI, which counts the times at which a frame stays, too
                until = end - round(2 / (rate * time_base))
            elif coded:  # ASF, which has one duration for all streams
                lasts = Fraction(container.duration or 0, 1_000_000) - 1
        elif tag := stream.metadata.get("DURATION"):
            end = round(_seconds_of(tag) / time_base)
            until = end - round(2 / (rate * time_base))
        else:
            lasts = seconds - 1
        start = Fraction(container.start_time or 0, 1_000_000)
        frames = stream.frames or round(seconds * rate)
        cut_from = options.start if options.preview is None else options.preview
        is_cut = cut_from is not None or options.end is not None
        if is_cut:
            whole = max(seconds, stream.frames / rate)
            # That may be too short an estimate, as in MPEG program streams.
            longest = max(whole, Fraction(container.duration or 0, 1_000_000)) if whole else whole
            first, after = cut_from or Fraction(0), min(options.end or whole, whole) if whole else options.end
            if whole and first >= longest:
                name = "--start" if options.preview is None else "--preview"
                raise InputError(f"{path}: {name} {float(first):g} is after its end, at {float(longest):g} seconds")
            frames = max(1, round(((after or first) - first) * rate))
            until, lasts = 0, Fraction(0)
        notes = []
        if options.deinterlace and not frame.interlaced_frame:
            notes.append("its first frame is not marked as interlaced: all are deinterlaced")
        elif frame.interlaced_frame and not options.deinterlace:
            notes.append(f"it is interlaced, which will be visible; {_DEINTERLACE}")
        timeless = bool(container.format.flags & pyav().format.Flags.no_timestamps.value)
        if timeless:
            notes.append(f"it has no timestamps: {float(rate):g} frames per second are assumed")
        return Clip(
            path=path,
            index=stream.index,
            codec=stream.codec_context.name,
            width=frame.width,
            height=frame.height,
            bits=bits,
            chroma=chroma,
            coding=None if rgb else colours.coding(bits),
            colours=replace(colours, matrix=_BT709, range=LIMITED) if rgb else colours,
            site=_site_of(described),
            aspect=stream.sample_aspect_ratio or Fraction(0),
            quarters=round(frame.rotation / 90) % 4,
            display=display,
            rate=rate,
            time_base=time_base,
            declared=0 if coded or is_cut else stream.frames,
            frames=frames,
            end=end,
            until=until,
            lasts=lasts,
            shift=start if container.format.flags & pyav().format.Flags.ts_discont.value else Fraction(0),
            start=None if cut_from is None else start + cut_from,
            stop=None if options.end is None else start + options.end,
            crop=_checked_crop(path, frame, options.crop),
            coded=coded,
            timeless=timeless,
            interlaced=frame.interlaced_frame,
            deinterlace=options.deinterlace,
            # FFmpeg's decoders of VP8 and VP9 drop it.
            alpha=any(part.is_alpha for part in form.components) or stream.metadata.get("alpha_mode") == "1",
            side=_kinds_of_side_data(frame),
            mastering=_numbers(frame, HDR10[0], "=22i"),
            light=_numbers(frame, HDR10[1], "=2I"),
            notes=tuple(notes),
        )


def _checked_crop(path: Path, frame: VideoFrame, box: Box | None) -> Box | None:
    """`box`, or InputError if it is not in the upright frame."""
    turned = round(frame.rotation / 90) % 2
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    if box is not None and (box.left + box.width > width or box.top + box.height > height):
        raise InputError(f"{path}: --crop {box} is not inside the frames, which are {width}x{height} pixels")
    return box


def video_size(path: Path) -> tuple[int, int, int]:
    """Width, height and the approximate number of frames, from the header. Raises InputError as `read_clip` does."""
    with open_container(path) as container:
        stream = _video_of(container, path)
        context = stream.codec_context
        seconds = Fraction(container.duration or 0, 1_000_000)
        return context.width, context.height, round(stream.frames or seconds * (stream.average_rate or 25))


def side_data_names(side: Iterable[str]) -> list[str]:
    """Readable names of the side data in `side` (FFmpeg's names) that can't be kept."""
    return list(dict.fromkeys(_SIDE_DATA[kind] for kind in _SIDE_DATA if kind in side))


class FrameReader:
    """Yields the frames of a clip in order; frames before `skip` have no pixels.

    `times` collects the times of the frames. After the last frame, `end` is its end time, and `notes` describes lost
    data. Raises InputError if the size of the frames changes or the timestamps restart.
    """

    def __init__(self, clip: Clip, skip: int) -> None:
        self.times: list[int] = []
        self._clip = clip
        self._skip = skip
        self._packets = self._discarded = self._undecodable = self._damaged = self._untimed = self._interlaced = 0
        self._corrupt = 0
        self._cut = False
        self._reached = Fraction(0)  # end of the last packet of any stream in seconds
        self._side: frozenset[str] = frozenset()
        self._waiting: list[int] = []  # heap of the times of packets that are not decoded yet
        self._one_frame_per_packet = clip.codec not in _CODECS_WITH_HIDDEN_FRAMES and not clip.is_cut
        self._shift = round(clip.offset / clip.time_base)
        self._step = self._last = max(1, round(1 / (clip.rate * clip.time_base)))
        self._latest: int | None = None  # time of the latest decoded frame

    def __iter__(self) -> Generator[Frame, None, None]:
        clip = self._clip
        for frame, time, source in self.timed():
            if clip.start is not None and time < 0:
                continue
            if clip.stop is not None and time * clip.time_base + clip.offset >= clip.stop:
                break
            self._last = source.duration or self._step
            self._damaged += source.is_corrupt
            self._interlaced += source.interlaced_frame
            self._side |= _kinds_of_side_data(source)
            pixels = _pixels(frame, clip) if len(self.times) >= self._skip else None
            self.times.append(time)
            yield Frame(time, pixels)
        if not self.times:
            raise InputError(f"{clip.path}: no frame between --start and --end can be decoded")

    def sampled(self, every: int) -> Iterator[tuple[int, Frame]]:
        """All frames with their numbers. Only those whose number is a multiple of `every` have pixels."""
        for number, (frame, time, _) in enumerate(self.timed()):
            yield number, Frame(time, None if number % every else _pixels(frame, self._clip))

    def timed(self) -> Iterator[tuple[VideoFrame, int, VideoFrame]]:
        """All frames with their times, and as they were before they were deinterlaced.

        They begin at the start of the file or at a keyframe well before the range.
        """
        clip = self._clip
        ahead = 0 if clip.start is None or clip.coded or clip.timeless else clip.start - _SEEK_MARGIN
        if ahead > 0:
            with open_container(clip.path) as container:
                stream = container.streams.get(clip.index)[0]
                try:
                    container.seek(round(ahead / clip.time_base), stream=stream)
                except pyav().error.FFmpegError:  # not every file can
                    ahead = Fraction(0)
                frames = self._timed(container) if ahead else iter(())
                first = next(frames, None)
                if first is not None and first[1] <= 0:
                    yield first
                    yield from frames
                    return
            self._waiting.clear()
            self._latest = None
            self._packets = self._discarded = self._undecodable = self._corrupt = self._untimed = 0
            self._cut = False
        with open_container(clip.path) as container:
            yield from self._timed(container)

    def _timed(self, container: InputContainer) -> Iterator[tuple[VideoFrame, int, VideoFrame]]:
        frames = self._with_times(container)
        if self._clip.deinterlace:
            yield from _deinterlaced(frames, self._clip)
        else:
            for frame, time in frames:
                yield frame, time, frame

    def _with_times(self, container: InputContainer) -> Iterator[tuple[VideoFrame, int]]:
        clip = self._clip
        for number, frame in enumerate(self._decoded(container)):
            if (frame.width, frame.height) != (clip.width, clip.height):
                raise InputError(
                    f"{clip.path}: frame {number} is {frame.width}x{frame.height}, those before it "
                    f"{clip.width}x{clip.height}",
                    "Split the file where its size changes.",
                )
            self._latest = self._time(frame, number)
            yield frame, self._latest

    @property
    def end(self) -> int:
        """The end time of the last frame: the declared one if the file is complete."""
        end, stop = self._clip.end - self._shift, self._clip.stop
        if end <= self.times[-1] or self._lost:
            end = self.times[-1] + self._last
        if stop is not None:
            end = max(self.times[-1] + 1, min(end, round(stop / self._clip.time_base) - self._shift))
        return end

    def notes(self) -> list[str]:
        """Messages about the frames that were read."""
        notes = []
        count, expected = len(self.times), self._expected
        if self._lost:
            of = f" of {expected}" if expected > count else ""
            notes.append(f"the file is damaged or truncated: only {count}{of} frames could be decoded")
        elif self._corrupt:
            notes.append(f"damaged packets in the input: {self._corrupt}")
        if self._damaged:
            notes.append(f"damaged frames in the input: {self._damaged}")
        if self._untimed and not self._clip.timeless:
            notes.append(f"frames without a usable timestamp, placed after the previous frame: {self._untimed}")
        if self._interlaced and not self._clip.interlaced and not self._clip.deinterlace:
            notes.append(f"{self._interlaced} of its frames are interlaced, which will be visible; {_DEINTERLACE}")
        if self.left_out:
            notes.append(f"properties of its frames that are not kept: {', '.join(self.left_out)}")
        return notes

    @property
    def left_out(self) -> list[str]:
        """Names of the side data of later frames, not of the first one, that can't be kept."""
        return side_data_names(self._side - self._clip.side)

    @property
    def _expected(self) -> int:
        declared = self._clip.declared - self._discarded
        return max(declared, self._packets) if self._one_frame_per_packet and not self._interlaced else declared

    @property
    def _lost(self) -> bool:
        clip = self._clip
        ends = self.times[-1] + self._last
        short = ends < clip.until or max(self._reached - clip.offset, ends * clip.time_base) < clip.lasts
        return self._undecodable > 0 or self._cut or short or self._expected > len(self.times)

    def _time(self, frame: VideoFrame, number: int) -> int:
        stamp = frame.dts if frame.pts is None else frame.pts
        if self._clip.coded and self._waiting:
            stamp = heapq.heappop(self._waiting)
        last = self._latest
        if last is None:
            return (0 if stamp is None else stamp) - (self._shift if stamp is not None or self._clip.is_cut else 0)
        if stamp is not None and stamp - self._shift > last:
            return stamp - self._shift
        if stamp is not None and (last - stamp + self._shift) * self._clip.time_base > _MAX_BACKWARD_JUMP:
            raise InputError(
                f"{self._clip.path}: the timestamps restart at frame {number}",
                "Repair them first: ffmpeg -i FILE -c copy repaired.mkv",
            )
        self._untimed += 1
        return last + (self._step if stamp is None else 1)

    def _decoded(self, container: InputContainer) -> Iterator[VideoFrame]:
        errors = pyav().error
        stream: Any = container.streams.get(self._clip.index)[0]
        packets: Iterator[Any] = container.demux(stream, *(container.streams.audio if self._clip.lasts else ()))
        while True:
            try:
                packet = next(packets, None)
            except errors.FFmpegError:
                self._cut = True
                packet = None
            if packet is not None and not packet.size:
                continue  # PyAV's mark of the end, or an empty one, which would end the decoding
            if packet is not None and packet.stream_index != self._clip.index:
                if packet.pts is not None:
                    self._reached = max(self._reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
                continue
            if packet is not None:
                if packet.dts is not None:
                    heapq.heappush(self._waiting, packet.dts)
                self._packets += not packet.is_discard
                self._discarded += packet.is_discard
                self._corrupt += packet.is_corrupt
            try:
                yield from stream.decode(packet)
            except errors.FFmpegError:
                self._undecodable += 1
            if packet is None:
                return


def _deinterlaced(frames: Iterator[tuple[VideoFrame, int]], clip: Clip) -> Iterator[tuple[VideoFrame, int, VideoFrame]]:
    """Deinterlace frames with FFmpeg's bwdif: one frame of each. Yields it, its time, and the original."""
    graph: Any = None
    waiting: deque[tuple[int, VideoFrame]] = deque()
    errors = pyav().error
    # Progressive frames between interlaced ones stay as they are.
    which = "interlaced" if clip.interlaced else "all"

    def finished() -> Iterator[tuple[VideoFrame, int, VideoFrame]]:
        while waiting:
            try:
                frame = graph.pull()
            except (errors.BlockingIOError, errors.EOFError):
                return
            time, source = waiting.popleft()
            yield frame, time, source

    for number, (frame, time) in enumerate(frames):
        if graph is None:
            graph = pyav().filter.Graph()
            graph.link_nodes(
                graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1, 25)
                ),
                graph.add("bwdif", f"mode=send_frame:deint={which}"),
                graph.add("buffersink"),
            ).configure()
        waiting.append((time, frame))
        frame.pts, frame.time_base = number, Fraction(1, 25)
        graph.push(frame)
        yield from finished()
    if graph is not None:
        graph.push(None)
        yield from finished()


def read_still(clip: Clip, at: Fraction) -> tuple[Array, Fraction]:
    """The pixels of the frame that is shown at `at` (seconds from the start), (h, w, 3) in 0..65535, and its time.

    `clip` must start at `at`. Raises InputError if the video ends before.
    """
    shown = None
    reader = FrameReader(clip, skip=0)
    for frame, time, source in reader.timed():
        if time > 0 and shown is not None:
            break
        shown = frame, time, source
        if time > 0:  # the first frame is later
            break
    else:
        if shown is None or -shown[1] > max(shown[2].duration or 0, round(1 / (clip.rate * clip.time_base))):
            last = f", its last frame is at {float(at + shown[1] * clip.time_base):.3f}" if shown else ""
            raise InputError(f"{clip.path}: nothing is shown at {float(at):g} seconds{last}")
    return _pixels(shown[0], clip), at + shown[1] * clip.time_base


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
    return to_rgb(_planes(frame, f"yuv{SUBSAMPLINGS[clip.chroma]}p{depth}", 3), clip.coding, clip.site)


def _planes(frame: VideoFrame, format: str, count: int) -> list[Array]:
    """The first `count` planes of `frame` in `format`, which has the same samples in another arrangement."""
    if frame.format.name.replace("yuva", "yuv").replace("yuvj", "yuv").replace("gbra", "gbr") != format:
        same = frame.color_range
        frame = frame.reformat(format=format, src_color_range=same, dst_color_range=same)
    return [plane_array(frame, n) for n in range(count)]


def plane_array(frame: VideoFrame, n: int) -> Array:
    """A plane of `frame` as an array that shares its memory."""
    plane = frame.planes[n]
    kind = np.dtype("<u2" if frame.format.components[0].bits > 8 else "u1")
    rows = np.frombuffer(memoryview(plane), kind).reshape(-1, plane.line_size // kind.itemsize)
    part: Array = rows[: plane.height, : plane.width]
    return part


def _seconds_of(tag: str) -> Fraction:
    """The seconds of a duration in Matroska's format, 00:00:10.500000000; 0 if it is invalid."""
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

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    for stream in videos:
        if stream.codec_context is not None:
            return stream
    if videos:
        kind = codec_name_of(videos[0], describe_streams(container))
        raise InputError(f"can't read {path}: there is no decoder for its video ({kind})")
    raise InputError(f"can't read {path}: it contains no video")


def codec_name_of(stream: Stream, described: Mapping[int, str]) -> str:
    """FFmpeg's name of the codec of a stream, or the file's name for it; the file name of an attachment."""
    if stream.type == "attachment":
        return stream.metadata.get("filename", "without a name")
    if stream.codec_context is not None:
        return str(stream.codec_context.codec.canonical_name)
    tag = re.search(r"\((\w{4}) / 0x", described.get(stream.index, ""))
    name = getattr(stream, "name", None) if stream.type == "data" else None
    return tag[1] if tag else name or "unknown"


def describe_streams(container: InputContainer) -> dict[int, str]:
    """FFmpeg's description of each stream by index. PyAV gives chroma locations and unknown codecs in no other way."""
    log = pyav().logging
    log.set_libav_level(log.VERBOSE)
    log.set_level(log.VERBOSE)
    try:
        text: str = container.dumps_format()  # type: ignore[attr-defined]
    finally:
        log.set_level(None)
        log.set_libav_level(log.INFO)
    return {int(found[1]): found[0] for found in re.finditer(r"Stream #0:(\d+).*", text)}


def _has_only_dts(path: Path) -> bool:
    """Whether the file has only decoding timestamps (DTS), as AVI has.

    The display times that FFmpeg derives from them are wrong if there are B-frames.
    """
    with open_container(path, options={"fflags": "nofillin"}) as container:
        packets = container.demux(_video_of(container, path))
        some = [packet for packet in itertools.islice(packets, _PROBED_PACKETS) if packet.size]
        return all(packet.pts is None for packet in some) and any(packet.dts is not None for packet in some)


def _chroma_of(frame: VideoFrame) -> tuple[int, int]:
    from av.video.format import VideoFormat

    if len(frame.format.components) < 3 or frame.format.is_rgb:
        return (1, 1)
    part = VideoFormat(frame.format.name, 64, 64).components[1]
    return 64 // part.width, 64 // part.height


def _colours_of(frame: VideoFrame, rgb: bool) -> Colours:
    """The colour tags of the frame. Missing ones are chosen as players do: matrix by size, full range for gray."""
    matrix = frame.colorspace
    if not rgb and matrix in (RGB, _UNSPECIFIED, 3):
        matrix = _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601
    codes = FULL_RANGE if frame.format.name.startswith("yuvj") else frame.color_range
    if not rgb and len(frame.format.components) < 3 and codes == _UNSPECIFIED_RANGE:
        codes = FULL_RANGE
    return Colours(frame.color_primaries, frame.color_trc, matrix, codes)


def _site_of(described: str) -> tuple[float, float]:
    """The chroma location, from FFmpeg's description of the stream."""
    found = (site for name, site in _SITES.items() if re.search(rf"[(, ]{name}[,)]", described))
    return next(found, _SITES["left"])


def _display_of(frame: VideoFrame) -> tuple[int, ...]:
    for data in _side_data(frame):
        if data.type.name == "DISPLAYMATRIX":
            return struct.unpack("=9i", bytes(data))
    return ()


def _side_data(frame: Any) -> list[Any]:
    return list(frame.side_data)


def _kinds_of_side_data(frame: VideoFrame) -> frozenset[str]:
    return frozenset(data.type.name for data in _side_data(frame))


def _numbers(frame: VideoFrame, kind: str, form: str) -> tuple[int, ...]:
    """The values of an FFmpeg structure in the side data; empty if it is absent."""
    for data in _side_data(frame):
        if data.type.name == kind and len(bytes(data)) >= struct.calcsize(form):
            return struct.unpack_from(form, bytes(data))
    return ()


# --- PyAV -------------------------------------------------------------------------------------------------------


def library_versions() -> str:
    """The versions of PyAV and FFmpeg, on which encoded frames depend."""
    av = pyav()
    return f"{av.__version__} {sorted(av.library_versions.items())}"


def pyav() -> Any:
    """The module `av`. Raises InputError if it isn't installed."""
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV, which is not installed", "pip install 'av>=17.1,<19'") from error
    return av


@contextmanager
def open_container(path: Path, options: dict[str, str] | None = None) -> Iterator[InputContainer]:
    """Open `path` for reading. Raises InputError that names the file if FFmpeg can't read it."""
    av = pyav()
    try:
        with av.open(f"file:{path}", options=options, metadata_errors="surrogateescape") as container:
            yield container
    except av.error.FFmpegError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
