"""Encodes frames in parts and assembles them with the other streams of the input, with PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import BeforeRename, atomic_write
from pdd_cli.imaging.encode import Encoding
from pdd_cli.imaging.image import Array, from_float, to_float
from pdd_cli.imaging.provenance import seal
from pdd_cli.system import without_real_time_scheduling
from pdd_cli.video import encoders
from pdd_cli.video.audio import AudioConverter, add_audio, audio_encoder
from pdd_cli.video.decode import (
    CONTAINERS,
    FULL_RANGE,
    HDR10,
    RGB,
    Clip,
    codec_name_of,
    describe_streams,
    open_container,
    plane_array,
    pyav,
)
from pdd_cli.video.matroska import PLACEHOLDER, set_display_size
from pdd_cli.video.options import VideoOptions
from pdd_cli.video.yuv import Coding, from_rgb

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Tags of the input that the muxer or encoder writes itself, or that are wrong for the output.
_STALE_TAGS = ("encoder", "major_brand", "minor_version", "compatible_brands", "duration", "bps", "number_of_")

_MILLISECOND = Fraction(1, 1000)

# Size of the trial frame, and number of input packets, that test what a container supports.
_SAMPLE = (256, 256)  # encoders in hardware have a minimum
_PROBED_PACKETS = 400

_CONVERT_AUDIO = "--keep-audio convert encodes it anew."


@dataclass(frozen=True)
class Codec:
    """The encoding of frames: FFmpeg's names of encoder and pixel format, bits, and the options of the encoder.

    `chroma`: luma samples per chroma sample; width and height must be multiples of these.
    """

    name: str
    pixel_format: str
    bits: int
    chroma: tuple[int, int]
    options: tuple[tuple[str, str], ...]
    lossless: bool = False

    @property
    def kept_side_data(self) -> frozenset[str]:
        """FFmpeg's names of the side data that is passed to the encoder."""
        hdr = "x265-params" in dict(self.options) or "svtav1-params" in dict(self.options)
        return frozenset(HDR10 if hdr else ())

    @property
    def reorders(self) -> int:
        """The maximum distance in frames between decoding order and display order."""
        return 2 if self.name in encoders.REORDERING else 0


def choose_codec(
    clip: Clip, target: Path, encoding: Encoding, options: VideoOptions = VideoOptions()
) -> tuple[Codec, list[str]]:
    """The encoder for `target`, with the clip's chroma and bits if it supports them, and notes on what it doesn't.

    Raises InputError if the container can't be used with these settings.
    """
    suffix = target.suffix.lower()
    if encoding.lossless:
        if suffix != ".mkv":
            raise InputError(
                f"{target}: {suffix} videos can't be written losslessly", "Use --format mkv, or omit --lossless."
            )
        bits = next(bits for bits in (8, 10, 12, 16) if bits >= clip.bits)
        format = "bgr0" if bits == 8 else f"gbrp{bits}le"
        return Codec("ffv1", format, bits, (1, 1), (("level", "3"), ("g", "1")), lossless=True), []
    name = options.encoder or encoders.default_encoder(suffix, deep=clip.bits > 8)
    bits = 8 if clip.bits == 8 else 10 if clip.bits <= 10 else 12
    wanted = {(1, 1): (1, 1), (2, 1): (2, 1), (1, 2): (1, 1)}.get(clip.chroma, (2, 2))
    format, bits, chroma = encoders.pixel_format(name, bits, wanted)
    settings = encoders.settings(name, encoding.quality, options.rate_factor, options.preset)
    if name == "libx265":
        settings["x265-params"] = f"log-level=none{_hdr_of_h265(clip)}"
    elif name == "libsvtav1" and (clip.mastering or clip.light):
        settings["svtav1-params"] = _hdr_of_av1(clip)
    notes = []
    if bits < clip.bits:
        notes.append(f"{clip.bits} bits become {bits}, the most that {name} supports")
    if chroma[0] > clip.chroma[0]:
        notes.append(f"its chroma is reduced to 4:2:{2 if chroma[1] == 1 else 0}, the most that {name} supports")
    return Codec(name, format, bits, chroma, tuple(settings.items())), notes


def _hdr_of_h265(clip: Clip) -> str:
    """x265's parameters for the mastering display (in 0.00002 and 0.0001 cd/m2) and the content light level."""
    text = ""
    if clip.mastering:
        (red, green, blue, white), (least, most) = _mastering(clip)
        points = "".join(
            f"{name}({round(x * 50_000)},{round(y * 50_000)})"
            for name, (x, y) in zip(("G", "B", "R", "WP"), (green, blue, red, white), strict=True)
        )
        text += f":master-display={points}L({round(most * 10_000)},{round(least * 10_000)})"
    if clip.light:
        text += f":max-cll={clip.light[0]},{clip.light[1]}"
    return text


def _hdr_of_av1(clip: Clip) -> str:
    """SVT-AV1's parameters for the same."""
    parts = []
    if clip.mastering:
        (red, green, blue, white), (least, most) = _mastering(clip)
        points = "".join(
            f"{name}({float(x):.5f},{float(y):.5f})"
            for name, (x, y) in zip(("G", "B", "R", "WP"), (green, blue, red, white), strict=True)
        )
        parts.append(f"mastering-display={points}L({float(most):.4f},{float(least):.4f})")
    if clip.light:
        parts.append(f"content-light={clip.light[0]},{clip.light[1]}")
    return ":".join(parts)


def _mastering(clip: Clip) -> tuple[list[tuple[Fraction, Fraction]], tuple[Fraction, Fraction]]:
    """The points of red, green, blue and white, and the least and the most luminance."""
    numbers = clip.mastering
    values = [Fraction(numbers[n], numbers[n + 1] or 1) for n in range(0, 20, 2)]
    return [(values[n], values[n + 1]) for n in range(0, 8, 2)], (values[8], values[9])


class PartWriter:
    """Encodes frames into one part of a video. The file appears only when `close` has completed it.

    A part starts with a keyframe. Its timestamps are frame numbers in milliseconds, because Matroska can't store the
    times of the clip exactly. `target` is the name for messages.
    """

    def __init__(self, path: Path, target: Path, clip: Clip, codec: Codec, size: tuple[int, int]) -> None:
        self._clip, self._codec = clip, codec
        self._coding = clip.colours.coding(codec.bits)
        self._numbers: dict[int, int] = {}  # time in the part → number of the frame
        self._start = self._coded = 0
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 writes its settings to stderr; this leaves errors
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(path))
            stack.enter_context(_ffmpeg_errors(target))
            self._container = stack.enter_context(pyav().open(f"file:{temporary}", "w", format="matroska"))
            self._stream = self._container.add_stream(codec.name, rate=clip.rate, options=dict(codec.options))
            self._stream.width, self._stream.height = size
            self._stream.pix_fmt = codec.pixel_format
            self._stream.codec_context.time_base = clip.time_base
            self._stream.codec_context.thread_type = "AUTO"  # by PyAV's default x264 would cut frames into slices
            if codec.name not in encoders.REORDERING:
                self._stream.codec_context.max_b_frames = 0
            _tag(self._stream, clip, codec)
            with without_real_time_scheduling():
                self._stream.codec_context.open()
            self._files = stack.pop_all()

    def add(self, time: int, pixels: Array) -> None:
        """Encode a frame, (H, W, 3) in 0..65535, for display at `time` of the clip."""
        if not self._numbers:
            self._start = time
        self._numbers[time - self._start] = len(self._numbers)
        try:
            frame = _video_frame(pixels, self._codec, self._coding)
            frame.pts, frame.time_base = time - self._start, self._clip.time_base
            self._mux(frame)
        except BaseException:
            with self._files:  # converts the error
                raise

    def close(self) -> None:
        """Complete the part. Raises ResourceError if the disk is full."""
        with self._files:
            self._mux(None)

    def abandon(self) -> None:
        """Delete the incomplete part."""
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


class _Abandoned(Exception):  # noqa: N818 - not a failure
    """The file that is being written will not be finished."""


def _video_frame(pixels: Array, codec: Codec, coding: Coding) -> VideoFrame:
    """A frame for the encoder from (H, W, 3) in 0..65535."""
    from av.video.frame import VideoFrame

    height, width = pixels.shape[:2]
    format = encoders.PLANAR.get(codec.pixel_format, codec.pixel_format)
    frame = VideoFrame(width, height, format)
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
    if format != codec.pixel_format:  # the same samples, interleaved
        frame.color_range = 1  # swscale converts nothing between equal ranges
        frame = frame.reformat(format=codec.pixel_format, src_color_range=1, dst_color_range=1)
    return frame


def _tag(stream: VideoStream, clip: Clip, codec: Codec) -> None:
    """Tag `stream` with the colours and the pixel aspect ratio of the clip."""
    context, colours = stream.codec_context, clip.colours
    context.color_primaries = colours.primaries
    context.color_trc = colours.transfer
    context.colorspace = RGB if codec.lossless else colours.matrix
    context.color_range = FULL_RANGE if codec.lossless else colours.range
    if clip.aspect:
        context.sample_aspect_ratio = clip.aspect


@dataclass(frozen=True)
class Extras:
    """The other streams of the input, by index, that are copied into the output.

    `any_codec`: some have a codec that PyAV rejects for Matroska, although its muxer supports it. `converted`: those
    whose audio is encoded anew.
    """

    streams: tuple[int, ...] = ()
    any_codec: bool = False
    converted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Target:
    """An output. `strip`: write no tags; `comment`: a line for the tag `comment`."""

    path: Path
    strip: bool = False
    comment: str = ""

    @property
    def container(self) -> str:
        """FFmpeg's name of the container."""
        return CONTAINERS[self.path.suffix.lower()]


def assemble(
    clip: Clip,
    codec: Codec,
    target: Target,
    extras: Extras,
    parts: Sequence[Path],
    times: Sequence[int],
    end: int,
    *,
    length: int,
    before_rename: BeforeRename,
) -> None:
    """Write `target` by `atomic_write` from the encoded parts and the other streams of the clip's file.

    `times` of all frames and the `end` of the last one are in the clip's time base. Each part has `length` frames; the
    last one may have fewer.
    """
    with (
        _open_streams(clip) as source,
        open_container(parts[0]) as first,
        atomic_write(target.path, before_rename) as temporary,
        _ffmpeg_errors(target.path),
    ):
        encoded = first.streams.video[0]
        with _output(temporary, target, source, extras, last=True) as out:
            streams = _add_streams(clip, codec, target, extras, source, encoded, out)
            inputs = [source.streams.get(index)[0] for index in streams if index != clip.index] if source else []
            others = source.demux(*inputs) if source and inputs else iter(())
            packets = heapq.merge(
                _video_packets(clip, codec, parts, [*times, end], length, streams[clip.index]),
                _other_packets(clip, others, streams, target, extras.converted),
                key=lambda timed: timed[0],
            )
            for _, packet in packets:
                out.mux_one(packet)
        if target.container in ("matroska", "webm"):
            set_display_size(temporary, (encoded.width, encoded.height), clip.aspect)
        seal(temporary)


def choose_extras(
    clip: Clip, codec: Codec, target: Target, *, convert_audio: bool = False
) -> tuple[Extras, dict[str, str], list[str]]:
    """Find the streams that `target` supports by a trial without an output file.

    Also returns what is left out → why, and notes on audio that is converted.
    Raises InputError if `target` doesn't support the audio and it is not converted.
    """
    from av.stream import Discard, Disposition

    wanted, videos, unknown = [], [], []
    kinds: dict[int, str] = {}
    types: dict[int, str] = {}
    covers: set[int] = set()
    has_chapters = False
    with _open_streams(clip) as source:
        if source is not None:
            described = describe_streams(source)
            has_chapters = bool(source.chapters())
            kinds = {stream.index: codec_name_of(stream, described) for stream in source.streams}
            types = {stream.index: stream.type for stream in source.streams}
            covers = {stream.index for stream in source.streams if stream.disposition & Disposition.attached_pic}
            for stream in source.streams:
                if stream.index == clip.index or stream.discard == Discard.all or "timecode" in stream.metadata:
                    continue  # chapters and timecodes are written by the muxer
                if clip.index < 0 and stream.type != "audio":
                    continue
                if stream.type == "video" and stream.index not in covers:
                    videos.append(stream.index)
                elif stream.codec_context is None and stream.type not in ("data", "attachment"):
                    unknown.append(stream.index)
                else:
                    wanted.append(stream.index)
    left_out = {f"other video ({kinds[index]})": "one is upscaled" for index in videos}
    left_out |= {f"{types[index]} ({kinds[index]})": "nothing here knows it" for index in unknown}
    with _sample(clip, codec) as sample:
        if not _is_supported(clip, codec, target, Extras(), sample):
            standard = encoders.standard_of(codec.name)
            raise InputError(f"{target.path}: {target.path.suffix} can't hold {standard} ({codec.name})", "Use .mkv.")
        extras = _select_supported(clip, codec, target, sample, wanted)
        left = [index for index in wanted if index not in extras.streams]
        matroska = replace(target, path=target.path.with_suffix(".mkv"))
        elsewhere = (
            _select_supported(clip, codec, matroska, sample, left).streams if target.container != "matroska" else ()
        )
    if extras.any_codec and has_chapters:
        left_out["chapters"] = "they can't go with such audio"
    suffix = target.path.suffix.lower()
    notes = []
    for index in left:
        if types[index] == "audio" and convert_audio:
            extras = replace(extras, converted=(*extras.converted, index))
            notes.append(f"its audio ({kinds[index]}) is converted to {audio_encoder(suffix)}: {suffix} can't hold it")
            continue
        if types[index] == "audio":
            raise InputError(
                f"{target.path}: {suffix} can't hold the audio of {clip.streams or clip.path} ({kinds[index]})",
                f"Use .mkv. {_CONVERT_AUDIO}" if index in elsewhere else _CONVERT_AUDIO,
            )
        name = "cover" if index in covers else types[index]
        instead = ", .mkv can" if index in elsewhere else ""
        left_out[f"{name} ({kinds[index]})"] = f"{suffix} can't hold it{instead}"
    return extras, left_out, notes


def _select_supported(clip: Clip, codec: Codec, target: Target, sample: Path, wanted: Sequence[int]) -> Extras:
    """Those of the streams `wanted` that `target` supports."""
    forms = [False, True] if target.container == "matroska" else [False]
    for any_codec in forms:
        extras = Extras(tuple(wanted), any_codec)
        if _is_supported(clip, codec, target, extras, sample):
            return extras
    extras = Extras()
    for index in wanted:
        for any_codec in forms[extras.any_codec :]:
            more = Extras((*extras.streams, index), any_codec)
            if _is_supported(clip, codec, target, more, sample):
                extras = more
                break
    return extras


def _is_supported(clip: Clip, codec: Codec, target: Target, extras: Extras, sample: Path) -> bool:
    """Whether an output with these streams, and the first packets of each, can be written."""
    clip = clip.uncut
    with _open_streams(clip) as source, open_container(sample) as first:
        try:
            with _output(Path(os.devnull), target, source, extras, last=False) as out:
                streams = _add_streams(clip, codec, target, extras, source, first.streams.video[0], out)
                out.start_encoding()
                for _, packet in _video_packets(clip, codec, [sample], [0, 1], 1, streams[clip.index]):
                    out.mux_one(packet)
                others = streams.keys() - {clip.index}
                probed = islice(source.demux(), _PROBED_PACKETS) if source else iter(())
                some = (packet for packet in probed if packet.stream_index in others)
                for _, packet in _other_packets(clip, some, streams, target):
                    out.mux_one(packet)
        except (pyav().error.FFmpegError, ValueError):
            return False
    return True


@contextmanager
def _sample(clip: Clip, codec: Codec) -> Iterator[Path]:
    """A video of one small gray frame, encoded as the output will be."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sample.mkv"
        writer = PartWriter(path, path, clip, codec, _SAMPLE)
        writer.add(0, np.full((_SAMPLE[1], _SAMPLE[0], 3), 1 << 15, np.uint16))
        writer.close()
        yield path


@contextmanager
def _open_streams(clip: Clip) -> Iterator[InputContainer | None]:
    """Open the file with the other streams, if there is one."""
    path = clip.streams if clip.index < 0 else clip.path
    if path is None:
        yield None
        return
    with open_container(path) as container:
        yield container


def _output(
    path: Path, target: Target, source: InputContainer | None, extras: Extras, *, last: bool
) -> OutputContainer:
    """Open a container of the format of `target` at `path`. `last`: it is the final output, not a trial."""
    kind, url = target.container, f"file:{path}"
    options = {}
    if kind in ("mp4", "mov"):
        # faststart: playable during download (a second pass over the file). Tags of phones need use_metadata_tags.
        flags = "+faststart" if last else ""
        if source is not None and any(tag.startswith("com.") for tag in source.metadata):
            flags += "+use_metadata_tags"
        options = {"movflags": flags} if flags else {}
    elif kind in ("matroska", "webm"):
        options = {"write_crc32": "0"}
    if extras.any_codec:
        # PyAV checks codecs by the muxer's name; through `tee` it accepts any, and so does Matroska's muxer.
        settings = "".join(f":{key}={value}" for key, value in options.items())
        kind, url, options = "tee", f"[f={kind}{settings}]" + re.sub(r"([\\'|\[\] ])", r"\\\1", url), {}
    out: OutputContainer = pyav().open(
        url, "w", format=kind, container_options=options, metadata_errors="surrogateescape"
    )
    return out


def _add_streams(
    clip: Clip,
    codec: Codec,
    target: Target,
    extras: Extras,
    source: InputContainer | None,
    encoded: VideoStream,
    out: OutputContainer,
) -> dict[int, Any]:
    """Add the streams and tags of `source` to `out`, the clip's as it was `encoded`: by their index in `source`."""
    from av.stream import Disposition

    streams: dict[int, Any] = {}
    if clip.index < 0:
        streams[clip.index] = out.add_stream_from_template(encoded, opaque=True)
    for origin in source.streams if source is not None else ():
        if origin.index == clip.index:
            streams[origin.index] = out.add_stream_from_template(encoded, opaque=True)
        elif origin.index in extras.converted:
            streams[origin.index] = add_audio(origin, audio_encoder(target.path.suffix.lower()), out)
        elif origin.index not in extras.streams:
            continue
        elif origin.disposition & Disposition.attached_pic and target.container == "matroska":
            _attach_cover(clip, origin, out)
        elif origin.type == "attachment" and target.container != "matroska":
            raise ValueError
        else:
            streams[origin.index] = out.add_stream_from_template(origin, opaque=True)
    for index, stream in streams.items():
        if source is None or index < 0:
            continue
        origin = source.streams.get(index)[0]
        stream.disposition = origin.disposition
        stream.metadata.update(_current_tags(origin.metadata, target.strip))
    video = streams[clip.index]
    _tag(video, clip, codec)
    video.time_base = clip.time_base
    video.codec_context.framerate = clip.rate
    if clip.display:
        video.set_display_matrix(clip.display)
    if encoders.standard_of(codec.name) == "hevc" and target.container not in ("matroska", "webm"):
        video.codec_context.codec_tag = "hvc1"  # required by Apple's players
    if target.container in ("matroska", "webm"):
        video.metadata["title"] = video.metadata.get("title", "") + PLACEHOLDER
    if source is not None and clip.index >= 0:
        out.metadata.update(_current_tags(source.metadata, target.strip))
    if target.comment:
        key = next((name for name in out.metadata if name.lower() == "comment"), "comment")
        out.metadata[key] = "\n".join(filter(None, [out.metadata.get(key), target.comment]))
    if source is not None and clip.index >= 0:
        out.set_chapters(_chapters(clip, source))
    return streams


def _attach_cover(clip: Clip, cover: Any, out: OutputContainer) -> None:
    """Attach a cover image under its own name, if it has one. Raises ValueError if it is empty."""
    kind = cover.codec_context.codec.canonical_name
    ending = {"mjpeg": "jpg"}.get(kind, kind)
    name = cover.metadata.get("filename", f"cover.{ending}")
    mime = cover.metadata.get("mimetype", f"image/{'jpeg' if kind == 'mjpeg' else kind}")
    with open_container(clip.path) as source:
        packets = source.demux(source.streams.get(cover.index)[0])
        data = next((bytes(packet) for packet in packets if packet.size), b"")
    if not data:
        raise ValueError
    out.add_attachment(name, mime, data)


def _current_tags(tags: dict[str, str], strip: bool) -> dict[str, str]:
    """The tags that are still valid; with `strip` only the language."""
    if strip:
        return {key: value for key, value in tags.items() if key == "language"}
    return {key: value for key, value in tags.items() if not key.lower().lstrip("_").startswith(_STALE_TAGS)}


def _chapters(clip: Clip, source: InputContainer) -> list[Any]:
    chapters: list[Any] = []
    chapter: Any
    for chapter in source.chapters():
        unit = chapter["time_base"]
        shift = round(clip.offset / unit)
        start, end = max(0, chapter["start"] - shift), chapter["end"] - shift
        if clip.stop is not None:
            end = min(end, round((clip.stop - clip.offset) / unit))
        if end > start:
            chapters.append({**chapter, "start": start, "end": end})
    return chapters


def _video_packets(
    clip: Clip,
    codec: Codec,
    parts: Sequence[Path],
    times: Sequence[int],
    length: int,
    stream: VideoStream,
) -> Iterator[tuple[float, Packet[Any]]]:
    """The encoded frames in decoding order with their decoding times in seconds. `times`: of all frames, and end."""
    step = times[1] - times[0]
    coded = 0
    for part, path in enumerate(parts):
        with open_container(path) as container:
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
    clip: Clip, packets: Iterator[Packet[Any]], streams: dict[int, Any], target: Target, converted: Sequence[int] = ()
) -> Iterator[tuple[float, Packet[Any]]]:
    """The `packets` of other streams, unchanged except for decreasing timestamps, which no container accepts.

    The audio of the streams `converted` is encoded anew.
    """
    av = pyav()
    converters = {index: AudioConverter(clip, streams[index]) for index in converted}
    form = av.format
    step = 0 if form.ContainerFormat(target.container, "w").flags & form.Flags.ts_nonstrict.value else 1
    latest: dict[int, int] = {}
    due = 0.0
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # cut short, which the frames have shown
            packet = None
        if packet is None:
            for converter in converters.values():
                yield from converter.convert(None)
            return
        if not packet.size:
            continue
        index = packet.stream_index
        if index in converters:
            yield from converters[index].convert(packet)
            continue
        shift = round(clip.offset / packet.time_base)
        if clip.is_cut and packet.pts is not None and not _cut_packet(clip, packet, shift, streams[index]):
            continue
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


def _cut_packet(clip: Clip, packet: Packet[Any], shift: int, stream: Any) -> bool:
    """Whether a packet is in the range of the clip. A subtitle that is shown when the range starts is shortened."""
    assert packet.pts is not None
    time = packet.pts - shift
    if clip.start is not None and time < 0 < time + (packet.duration or 0) and stream.type == "subtitle":
        packet.duration = time + (packet.duration or 0)
        packet.pts = packet.dts = shift
        return True
    return clip.in_range(time * packet.time_base)


@contextmanager
def _ffmpeg_errors(path: Path) -> Iterator[None]:
    """Convert errors of FFmpeg while `path` is written to PddError. Errors of the system are left to `atomic_write`."""
    try:
        yield
    except (pyav().error.FFmpegError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise PddError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from error
