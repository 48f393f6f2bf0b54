"""Frames → video file, in parts, and everything else of the input's file beside them, by PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.encoding import Array, Encoding, from_float, to_float
from pdd_cli.errors import InputError, PddError
from pdd_cli.files import atomic_write
from pdd_cli.inference.clips import CONTAINERS, FULL_RANGE, RGB, SUBSAMPLINGS, Clip, opened, plane_array, pyav
from pdd_cli.inference.yuv import Coding, from_rgb

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Statistics and marks of the old file that the new one's muxer or encoder writes, or that would be stale.
_STALE_TAGS = ("encoder", "major_brand", "minor_version", "compatible_brands", "duration", "bps", "number_of_")

_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True)
class Codec:
    """How frames are encoded: FFmpeg's names of encoder and pixel format, bits, and the encoder's options.

    `chroma`: luma samples per chroma sample; width and height must be multiples of them.
    """

    name: str
    pixel_format: str
    bits: int
    chroma: tuple[int, int]
    options: tuple[tuple[str, str], ...]
    lossless: bool = False

    @property
    def reorders(self) -> int:
        """By how many frames the order of decoding may differ from that of display."""
        return 2 if self.name in ("libx264", "libx265") else 0


def choose_codec(clip: Clip, target: Path, encoding: Encoding) -> tuple[Codec, list[str]]:
    """The encoder for `target`, with the chroma and bits of the clip as far as it has them; and what it hasn't.

    Raises InputError where the container can't hold what is asked.
    """
    suffix = target.suffix.lower()
    if suffix == ".webm" and clip.aspect not in (0, 1):
        raise InputError(f"{target}: .webm can't say that the pixels are not square, as here", "Use .mkv or .mp4.")
    if encoding.lossless:
        if suffix != ".mkv":
            raise InputError(
                f"{target}: {suffix} videos can't be written losslessly", "Use --format mkv, or leave --lossless out."
            )
        bits = next(bits for bits in (8, 10, 12, 16) if bits >= clip.bits)
        format = "bgr0" if bits == 8 else f"gbrp{bits}le"
        return Codec("ffv1", format, bits, (1, 1), (("level", "3"), ("g", "1")), lossless=True), []
    # 95 is the 17 that the well-known scripts take for "visually lossless", 80 about x264's own 23.
    quality = 15 + 0.36 * (100 - encoding.quality)
    chroma = {(1, 1): (1, 1), (2, 1): (2, 1), (1, 2): (1, 1)}.get(clip.chroma, (2, 2))
    bits = 8 if clip.bits == 8 else 10 if clip.bits <= 10 else 12
    options: dict[str, str]
    if suffix == ".webm" and bits == 8:
        name = "libvpx-vp9"
        options = {"crf": f"{quality * 63 / 51:.0f}", "deadline": "good", "cpu-used": "3", "row-mt": "1"}
    elif suffix == ".webm":
        name, bits, chroma = "libsvtav1", 10, (2, 2)
        options = {"crf": f"{quality * 63 / 51:.0f}", "preset": "6"}
    elif bits == 8:
        name, options = "libx264", {"crf": f"{quality:.1f}"}
    else:
        name, options = "libx265", {"crf": f"{quality + 2:.1f}", "x265-params": "log-level=none"}
    notes = []
    if bits < clip.bits:
        notes.append(f"{clip.bits} bits become {bits}, the most that {name} has")
    if chroma[0] > clip.chroma[0]:
        notes.append(f"its colours are halved to 4:2:0, all that {name} has")
    format = f"yuv{SUBSAMPLINGS[chroma]}p{'' if bits == 8 else f'{bits}le'}"
    return Codec(name, format, bits, chroma, tuple(options.items())), notes


class PartWriter:
    """Encodes frames into one part of a video, a file that is there whole or not at all: `close` makes it so.

    A part begins with a frame that needs no other, and numbers its frames in milliseconds: the times of the clip,
    whatever their unit, stay out of it. `target` is for messages.
    """

    def __init__(self, path: Path, target: Path, clip: Clip, codec: Codec, size: tuple[int, int]) -> None:
        self._clip, self._codec = clip, codec
        self._coding = clip.colours.coding(codec.bits)
        self._numbers: dict[int, int] = {}  # time in the part → number of the frame
        self._start = self._coded = 0
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 writes its settings to stderr; this leaves errors
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(path))
            stack.enter_context(_told(target))
            self._container = stack.enter_context(pyav().open(f"file:{temporary}", "w", format="matroska"))
            self._stream = self._container.add_stream(codec.name, rate=clip.rate, options=dict(codec.options))
            self._stream.width, self._stream.height = size
            self._stream.pix_fmt = codec.pixel_format
            self._stream.codec_context.time_base = clip.time_base
            self._stream.codec_context.thread_type = "AUTO"  # by PyAV's default x264 would cut frames into slices
            _tag(self._stream, clip, codec)
            self._files = stack.pop_all()

    def add(self, time: int, pixels: Array) -> None:
        """Encode a frame, (H, W, 3) in 0..65535, that is shown at `time` of the clip."""
        if not self._numbers:
            self._start = time
        self._numbers[time - self._start] = len(self._numbers)
        try:
            frame = _video_frame(pixels, self._codec, self._coding)
            frame.pts, frame.time_base = time - self._start, self._clip.time_base
            self._mux(frame)
        except BaseException:
            with self._files:  # which say what the matter is
                raise

    def close(self) -> None:
        """Put the part where it belongs. Raises ResourceError when the disk is full."""
        with self._files:
            self._mux(None)

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(_Abandoned), self._files:
            raise _Abandoned

    def _mux(self, frame: VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            assert packet.pts is not None
            number = self._numbers[packet.pts]
            if self._coded - number > self._codec.reorders:
                raise PddError(f"{self._codec.name} reorders frames further than it is known to")
            packet.time_base = _MILLISECOND
            packet.pts, packet.dts, packet.duration = number, self._coded - self._codec.reorders, 1
            self._coded += 1
            self._container.mux(packet)


class _Abandoned(Exception):  # noqa: N818 - not a failure of its own
    """What is being written won't be finished."""


def _video_frame(pixels: Array, codec: Codec, coding: Coding) -> VideoFrame:
    """A frame for the encoder from (H, W, 3) in 0..65535."""
    from av.video.frame import VideoFrame

    height, width = pixels.shape[:2]
    frame = VideoFrame(width, height, codec.pixel_format)
    if codec.pixel_format == "bgr0":
        rows = np.frombuffer(memoryview(frame.planes[0]), np.uint8).reshape(height, -1)
        packed = np.zeros((height, width, 4), np.uint8)
        packed[..., :3] = from_float(to_float(pixels), 8)[..., ::-1]
        rows[:, : 4 * width] = packed.reshape(height, -1)
        return frame
    if codec.lossless:
        top = (1 << codec.bits) - 1
        planes = [np.rint(pixels[..., c] * (top / 65_535)) for c in (1, 2, 0)]
    else:
        planes = from_rgb(pixels, coding, codec.chroma)
    for n, plane in enumerate(planes):
        plane_array(frame, n)[:] = plane
    return frame


def _tag(stream: VideoStream, clip: Clip, codec: Codec) -> None:
    """Say in `stream` what the colours of the clip are, and the aspect of its pixels."""
    context, colours = stream.codec_context, clip.colours
    context.color_primaries = colours.primaries
    context.color_trc = colours.transfer
    context.colorspace = RGB if codec.lossless else colours.matrix
    context.color_range = FULL_RANGE if codec.lossless else colours.range
    if clip.aspect:
        context.sample_aspect_ratio = clip.aspect


def assemble(
    clip: Clip,
    codec: Codec,
    target: Path,
    parts: Sequence[Path],
    times: Sequence[int],
    end: int,
    *,
    length: int,
    strip: bool,
) -> None:
    """Write `target`, whole or not at all, from encoded parts and everything else that the clip's file holds.

    `times` of all frames and the `end` of the last one are in the clip's time base; a part has `length` frames, the
    last one may have less. `strip`: no tags.
    """
    with (
        opened(clip.path) as source,
        opened(parts[0]) as first,
        atomic_write(target) as temporary,
        _told(target),
        _output(temporary, target, source) as out,
    ):
        streams, _ = _carry(clip, source, target, out, first.streams.video[0])
        video = streams[clip.index]
        _tag(video, clip, codec)
        video.time_base = clip.time_base
        video.codec_context.framerate = clip.rate
        if clip.display:
            video.set_display_matrix(clip.display)
        if codec.name == "libx265" and out.format.name != "matroska":
            video.codec_context.codec_tag = "hvc1"  # what Apple's players ask for
        for index, stream in streams.items():
            origin = source.streams.get(index)[0]
            stream.disposition = origin.disposition
            stream.metadata.update(_fresh(origin.metadata, strip))
        out.metadata.update(_fresh(source.metadata, strip))
        out.set_chapters(_chapters(clip, source))
        packets = heapq.merge(
            _video_packets(clip, codec, parts, [*times, end], length, video),
            _other_packets(clip, source, streams, out),
            key=lambda timed: timed[0],
        )
        for _, packet in packets:
            out.mux_one(packet)


def _output(path: Path, target: Path, source: InputContainer) -> OutputContainer:
    """A container of the kind of `target` at `path`; the file is made with the first packet."""
    kind = CONTAINERS[target.suffix.lower()]
    options = {}
    if kind in ("mp4", "mov"):
        # Playable while it downloads; a phone's own tags have no other place.
        phone = any(tag.startswith("com.") for tag in source.metadata)
        options = {"movflags": "+faststart+use_metadata_tags" if phone else "+faststart"}
    out: OutputContainer = pyav().open(
        f"file:{path}", "w", format=kind, container_options=options, metadata_errors="surrogateescape"
    )
    return out


def check_streams(clip: Clip, target: Path) -> list[str]:
    """What of the clip's file `target` can't hold. Raises InputError where that is sound."""
    with opened(clip.path) as source:
        return _carry(clip, source, target, _output(target, target, source))[1]


def _carry(
    clip: Clip, source: InputContainer, target: Path, out: OutputContainer, encoded: VideoStream | None = None
) -> tuple[dict[int, Any], list[str]]:
    """Add the streams of `source` to `out`, the clip's as it was `encoded`: (by index in `source`, what can't be).

    Raises InputError for audio that the container can't hold.
    """
    from av.stream import Disposition

    streams: dict[int, Any] = {}
    notes = []
    suffix = target.suffix.lower()
    for stream in source.streams:
        what = stream.type
        kind = stream.codec_context.codec.canonical_name if stream.codec_context else stream.name or "unknown"
        if stream.index == clip.index:
            if encoded is not None:
                streams[stream.index] = out.add_stream_from_template(encoded, opaque=True)
            continue
        if what == "video" and not stream.disposition & Disposition.attached_pic:
            notes.append("its second video is not kept")
            continue
        if what == "data":
            if "timecode" not in stream.metadata and kind != "bin_data":  # the muxer writes timecode, chapters itself
                notes.append(f"its data ({kind}) is not kept")
            continue
        try:
            if what == "video" and out.format.name == "matroska":
                _attach_cover(clip, stream.index, kind, out)
            elif what == "attachment" and out.format.name != "matroska":
                raise ValueError
            else:
                streams[stream.index] = out.add_stream_from_template(stream, opaque=True)
        except ValueError:
            if what == "audio":
                hint = (
                    "Use .mkv." if suffix != ".mkv" else "Give it other audio first: ffmpeg -i FILE -c:v copy -c:a flac"
                )
                raise InputError(f"{target}: {suffix} can't hold the audio of {clip.path} ({kind})", hint) from None
            name = {"video": "cover"}.get(what, what)
            notes.append(
                f"its {name} ({kind}) is not kept: {suffix} can't hold it" + (", .mkv can" if suffix != ".mkv" else "")
            )
    return streams, notes


def _attach_cover(clip: Clip, index: int, kind: str, out: OutputContainer) -> None:
    name, mime = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}[kind]
    with opened(clip.path) as source:
        data = next(bytes(packet) for packet in source.demux(source.streams.get(index)[0]) if packet.size)
    out.add_attachment(name, mime, data)


def _fresh(tags: dict[str, str], strip: bool) -> dict[str, str]:
    """The tags that stay true; of a stripped file the language alone."""
    if strip:
        return {key: value for key, value in tags.items() if key == "language"}
    return {key: value for key, value in tags.items() if not key.lower().lstrip("_").startswith(_STALE_TAGS)}


def _chapters(clip: Clip, source: InputContainer) -> list[Any]:
    chapters: list[Any] = []
    chapter: Any
    for chapter in source.chapters():
        shift = round(clip.shift / chapter["time_base"])
        chapters.append({**chapter, "start": chapter["start"] - shift, "end": chapter["end"] - shift})
    return chapters


def _video_packets(
    clip: Clip,
    codec: Codec,
    parts: Sequence[Path],
    times: Sequence[int],
    length: int,
    stream: VideoStream,
) -> Iterator[tuple[float, Packet[Any]]]:
    """The encoded frames in the order of decoding, with the second when each is due; `times`: theirs, and the end."""
    step = times[1] - times[0]
    coded = 0
    for part, path in enumerate(parts):
        with opened(path) as container:
            for packet in container.demux(container.streams.video[0]):
                if not packet.size or packet.pts is None:
                    continue
                number = part * length + packet.pts
                due = coded - codec.reorders
                packet.time_base = clip.time_base
                packet.pts = times[number]
                packet.dts = times[due] if due >= 0 else times[0] + due * step
                packet.duration = times[number + 1] - times[number]
                packet.stream = stream
                coded += 1
                yield float(packet.dts * clip.time_base), packet


def _other_packets(
    clip: Clip, source: InputContainer, streams: dict[int, Any], out: OutputContainer
) -> Iterator[tuple[float, Packet[Any]]]:
    """The packets of all other streams, as they are but for timestamps that go back, which no container takes."""
    av = pyav()
    step = 0 if out.format.flags & av.format.Flags.ts_nonstrict.value else 1
    inputs = [source.streams.get(index)[0] for index in streams if index != clip.index]
    packets = source.demux(*inputs) if inputs else iter(())
    latest: dict[int, int] = {}
    due = 0.0
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # cut short, which the frames have told
            return
        if packet is None:
            return
        if not packet.size:
            continue
        index = packet.stream_index
        shift = round(clip.shift / packet.time_base)
        dts = packet.pts if packet.dts is None else packet.dts
        dts = latest.get(index, 0) + 1 if dts is None else dts - shift
        pts = dts if packet.pts is None else packet.pts - shift
        if index in latest:
            dts = max(dts, latest[index] + step)
        latest[index] = dts
        packet.dts, packet.pts = dts, max(pts, dts)
        packet.stream = streams[index]
        due = float(dts * packet.time_base)
        yield due, packet


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What FFmpeg says while `path` is written as a PddError; what the system says is for `atomic_write`."""
    try:
        yield
    except (pyav().error.FFmpegError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise PddError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from error
