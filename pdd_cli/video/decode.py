"""Video file → what it is and its frames, by PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import heapq
import itertools
import re
import struct
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, from_float, to_float
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
"""Suffix → FFmpeg's name of the container; what is written."""

_ALSO_READ = (
    *(".avi", ".divx", ".dv", ".mxf", ".ts", ".m2t", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".flv"),
    *(".f4v", ".3g2", ".qt", ".ogv", ".ivf", ".y4m", ".m1v", ".m2v", ".h264", ".264", ".h265", ".265", ".hevc"),
)

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
_UNSPECIFIED_RANGE, _LIMITED, FULL_RANGE = 0, 1, 2

SUBSAMPLINGS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (1, 2): "440", (4, 1): "411", (4, 4): "410"}
_NO_FRAME_A_PACKET = ("vp8", "vp9", "libvpx", "libvpx-vp9")  # may hold packets that show nothing

# FFmpeg's names of chroma sites → how far a chroma sample is from the first to the last luma sample that it covers,
# across and down.
_SITES = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}

# What frames carry beside their pixels and can't be kept. The rest says how the input was encoded.
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

_DEINTERLACE = "deinterlace it first: ffmpeg -i FILE -vf bwdif OUT"

_LOOK = 32  # packets, to find how they are timed

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
    RGB. `site`: of chroma (`yuv.to_rgb`). `aspect`: of a pixel, 0 where unknown. `declared`: frames, 0 where unknown;
    `frames`: about how many. `end`: the time when the last one ends, 0 where unknown. The file is cut short where that
    is before `until`, or where all its streams end before `lasts`, seconds; both are 0 where unknown. `shift`: seconds
    to take off all timestamps. `coded`: they are in the order of decoding; `timeless`: there are none. `side`: the
    kinds of side data of the first frame; `mastering` and `light`: FFmpeg's numbers of the mastering display and the
    content light level, or empty. `notes`: what to know of the input.
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
    coded: bool
    timeless: bool
    interlaced: bool
    alpha: bool
    side: frozenset[str]
    mastering: tuple[int, ...]
    light: tuple[int, ...]
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
    coded = _times_are_of_decoding(path)
    with opened(path) as container:
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
            raise InputError(
                f"{path}: its colours are coded by a matrix that pdd doesn't know (number {colours.matrix} of H.273)"
            )
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
        notes = []
        if frame.interlaced_frame:
            notes.append(f"it is interlaced, which will show; {_DEINTERLACE}")
        timeless = bool(container.format.flags & pyav().format.Flags.no_timestamps.value)
        if timeless:
            notes.append(f"it has no timestamps: {float(rate):g} frames a second are assumed")
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
            site=_site_of(described),
            aspect=stream.sample_aspect_ratio or Fraction(0),
            quarters=round(frame.rotation / 90) % 4,
            display=display,
            rate=rate,
            time_base=time_base,
            declared=0 if coded else stream.frames,
            frames=stream.frames or round(seconds * rate),
            end=end,
            until=until,
            lasts=lasts,
            shift=start if container.format.flags & pyav().format.Flags.ts_discont.value else Fraction(0),
            coded=coded,
            timeless=timeless,
            interlaced=frame.interlaced_frame,
            alpha=any(part.is_alpha for part in form.components),
            side=_kinds_of_side_data(frame),
            mastering=_numbers(frame, HDR10[0], "=22i"),
            light=_numbers(frame, HDR10[1], "=2I"),
            notes=tuple(notes),
        )


def video_pixels(path: Path) -> int:
    """About how many pixels all frames have, from the head of the file. Raises InputError as `read_clip` does."""
    with opened(path) as container:
        stream = _video_of(container, path)
        context = stream.codec_context
        seconds = Fraction(container.duration or 0, 1_000_000)
        return round((stream.frames or seconds * (stream.average_rate or 25)) * context.width * context.height)


def side_data_names(side: Iterable[str]) -> list[str]:
    """What the frames carry beside their pixels and is lost, from FFmpeg's names of it."""
    return list(dict.fromkeys(_SIDE_DATA[kind] for kind in _SIDE_DATA if kind in side))


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
        self._corrupt = 0
        self._cut = False
        self._reached = Fraction(0)  # seconds at which the last packet of any stream ends
        self._side: frozenset[str] = frozenset()
        self._waiting: list[int] = []  # times of packets whose frames haven't come, a heap
        self._one_a_packet = clip.codec not in _NO_FRAME_A_PACKET
        self._shift = round(clip.shift / clip.time_base)
        self._step = self._last = max(1, round(1 / (clip.rate * clip.time_base)))

    def __iter__(self) -> Generator[Frame, None, None]:
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
                self._side |= _kinds_of_side_data(frame)
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
        elif self._corrupt:
            notes.append(f"packets that are damaged in the input: {self._corrupt}")
        if self._damaged:
            notes.append(f"frames that are damaged in the input: {self._damaged}")
        if self._untimed and not self._clip.timeless:
            notes.append(f"frames without a usable timestamp, which follow the one before: {self._untimed}")
        if self._interlaced and not self._clip.interlaced:
            notes.append(f"{self._interlaced} of its frames are interlaced, which will show; {_DEINTERLACE}")
        if self.left_out:
            notes.append(f"not kept of its frames: {', '.join(self.left_out)}")
        return notes

    @property
    def left_out(self) -> list[str]:
        """What later frames carry beside their pixels, not the first, and is lost."""
        return side_data_names(self._side - self._clip.side)

    @property
    def _expected(self) -> int:
        declared = self._clip.declared - self._discarded
        return max(declared, self._packets) if self._one_a_packet and not self._interlaced else declared

    @property
    def _lost(self) -> bool:
        clip = self._clip
        ends = self.times[-1] + self._last
        short = ends < clip.until or max(self._reached - clip.shift, ends * clip.time_base) < clip.lasts
        return self._undecodable > 0 or self._cut or short or self._expected > len(self.times)

    def _time(self, frame: VideoFrame) -> int:
        stamp = frame.dts if frame.pts is None else frame.pts
        if self._clip.coded and self._waiting:
            stamp = heapq.heappop(self._waiting)
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

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    for stream in videos:
        if stream.codec_context is not None:
            return stream
    if videos:
        kind = kind_of(videos[0], describe_streams(container))
        raise InputError(f"can't read {path}: nothing here decodes its video ({kind})")
    raise InputError(f"can't read {path}: there is no video in it")


def kind_of(stream: Stream, described: Mapping[int, str]) -> str:
    """FFmpeg's name of what a stream holds, or the file's own where FFmpeg has none; an attachment's file name."""
    if stream.type == "attachment":
        return stream.metadata.get("filename", "without a name")
    if stream.codec_context is not None:
        return str(stream.codec_context.codec.canonical_name)
    tag = re.search(r"\((\w{4}) / 0x", described.get(stream.index, ""))
    name = getattr(stream, "name", None) if stream.type == "data" else None
    return tag[1] if tag else name or "unknown"


def describe_streams(container: InputContainer) -> dict[int, str]:
    """By index, FFmpeg's line on each stream. PyAV has no other way to chroma sites and names of unknown codecs."""
    log = pyav().logging
    log.set_libav_level(log.VERBOSE)
    log.set_level(log.VERBOSE)
    try:
        text: str = container.dumps_format()  # type: ignore[attr-defined]
    finally:
        log.set_level(None)
        log.set_libav_level(log.INFO)
    return {int(found[1]): found[0] for found in re.finditer(r"Stream #0:(\d+).*", text)}


def _times_are_of_decoding(path: Path) -> bool:
    """Whether the video's timestamps, as the file has them, are those of decoding alone, as in AVI.

    What FFmpeg makes of these for display is wrong with B-frames.
    """
    with opened(path, options={"fflags": "nofillin"}) as container:
        packets = container.demux(_video_of(container, path))
        some = [packet for packet in itertools.islice(packets, _LOOK) if packet.size]
        return all(packet.pts is None for packet in some) and any(packet.dts is not None for packet in some)


def _chroma_of(frame: VideoFrame) -> tuple[int, int]:
    from av.video.format import VideoFormat

    if len(frame.format.components) < 3 or frame.format.is_rgb:
        return (1, 1)
    part = VideoFormat(frame.format.name, 64, 64).components[1]
    return 64 // part.width, 64 // part.height


def _colours_of(frame: VideoFrame, rgb: bool) -> Colours:
    """What the frame is tagged as; without a tag what players take: the matrix by its size, all codes for gray."""
    matrix = frame.colorspace
    if not rgb and matrix in (RGB, _UNSPECIFIED, 3):
        matrix = _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601
    codes = FULL_RANGE if frame.format.name.startswith("yuvj") else frame.color_range
    if not rgb and len(frame.format.components) < 3 and codes == _UNSPECIFIED_RANGE:
        codes = FULL_RANGE
    return Colours(frame.color_primaries, frame.color_trc, matrix, codes)


def _site_of(described: str) -> tuple[float, float]:
    """Where chroma is sited, from FFmpeg's line on the stream."""
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
    """The numbers of a structure of FFmpeg's in the side data; none where there is no such."""
    for data in _side_data(frame):
        if data.type.name == kind and len(bytes(data)) >= struct.calcsize(form):
            return struct.unpack_from(form, bytes(data))
    return ()


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
def opened(path: Path, options: dict[str, str] | None = None) -> Iterator[InputContainer]:
    """The file at `path`, opened for reading. Raises InputError that names it for what FFmpeg can't read."""
    av = pyav()
    try:
        with av.open(f"file:{path}", options=options, metadata_errors="surrogateescape") as container:
            yield container
    except av.error.FFmpegError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
