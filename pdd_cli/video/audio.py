"""Encodes audio that a container can't hold as it is: `--keep-audio convert`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pdd_cli.video.decode import CONTAINERS, Clip, pyav

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.packet import Packet

_ENCODERS = {"webm": "libopus", "matroska": "flac"}
_BIT_RATE = 96_000  # per channel of a lossy encoder; transparent for AAC and Opus
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
_MOST_AAC = 96_000  # Hz


def audio_encoder(suffix: str) -> str:
    """FFmpeg's name of the audio encoder for containers with this suffix."""
    return _ENCODERS.get(CONTAINERS[suffix], "aac")


def add_audio(origin: Any, encoder: str, out: OutputContainer) -> Any:
    """Add a stream for the audio of `origin`, with its channels, and its rate if the encoder supports it."""
    source = origin.codec_context
    rate = source.sample_rate
    if (encoder == "libopus" and rate not in _OPUS_RATES) or (encoder == "aac" and rate > _MOST_AAC):
        rate = 48_000
    stream: Any = out.add_stream(encoder, rate=rate, layout=source.layout.name)
    if encoder == "flac":
        stream.codec_context.format = "s16" if source.format.bytes <= 2 else "s32"
    else:
        stream.codec_context.bit_rate = _BIT_RATE * source.layout.nb_channels
    return stream


class AudioConverter:
    """Decodes the packets of an audio stream and encodes them for `stream`, in the range of the clip."""

    def __init__(self, clip: Clip, stream: Any) -> None:
        self._clip, self._stream = clip, stream
        self._source: Any = None

    def convert(self, packet: Packet[Any] | None) -> Iterator[tuple[float, Packet[Any]]]:
        """The encoded packets with their decoding times in seconds; None ends the stream."""
        if packet is not None:
            self._source = packet.stream
        try:
            frames = [] if self._source is None else self._source.decode(packet)
        except pyav().error.FFmpegError:  # damaged: the sound pauses
            frames = []
        for frame in frames:
            if frame.pts is not None:
                frame.pts -= round(self._clip.offset / frame.time_base)
                if self._clip.is_cut and not self._clip.in_range(frame.pts * frame.time_base):
                    continue
            yield from self._encoded(frame)
        if packet is None:
            yield from self._encoded(None)

    def _encoded(self, frame: Any) -> Iterator[tuple[float, Packet[Any]]]:
        for packet in self._stream.encode(frame):
            packet.stream = self._stream
            yield float((packet.pts if packet.dts is None else packet.dts) * packet.time_base), packet
