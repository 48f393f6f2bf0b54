"""Sets the display size of a Matroska or WebM file, which FFmpeg marks as unknown when it is used through PyAV.

The title of the track is padded with a placeholder, whose space is then used for the new elements, so that no other
byte of the file moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

_SEGMENT, _TRACKS, _ENTRY, _VIDEO = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
_NAME, _VOID = b"\x53\x6e", b"\xec"
_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT = b"\x54\xb0", b"\x54\xba", b"\x54\xb2"
_HEAD = 1 << 20  # bytes at the start of the file, which contain the tracks

PLACEHOLDER = "\x7f" * 32
"""Appended to the title of the video track; `set_display_size` removes it."""


def set_display_size(path: Path, size: tuple[int, int], aspect: Fraction) -> None:
    """Set the display size in the file at `path`, written without checksums, for pixels with this `aspect` ratio.

    An unknown aspect ratio, 0, means square pixels.
    """
    aspect = aspect or Fraction(1)
    width, height = size
    shown = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    with path.open("r+b") as file:
        head = file.read(_HEAD)
        for start, end in _inside(head, (_SEGMENT, _TRACKS, _ENTRY), 0, len(head)):
            children = [(kind, head[begin:stop]) for kind, begin, stop in _elements(head, start, end)]
            if any(kind == _NAME and body.endswith(PLACEHOLDER.encode()) for kind, body in children):
                file.seek(start)
                file.write(_with_size(children, shown, end - start))


def _with_size(children: list[tuple[bytes, bytes]], shown: tuple[int, int], length: int) -> bytes:
    """The elements of a track with the display size, padded to `length` bytes."""
    parts = []
    for kind, body in children:
        if kind == _NAME:
            body = body.removesuffix(PLACEHOLDER.encode())
        elif kind == _VIDEO:
            sizes = {_DISPLAY_WIDTH: shown[0].to_bytes(4, "big"), _DISPLAY_HEIGHT: shown[1].to_bytes(4, "big")}
            kept = {name: body[begin:stop] for name, begin, stop in _elements(body, 0, len(body))}
            kept.pop(_DISPLAY_UNIT, None)  # "unknown", where pixels are the default
            body = b"".join(_element(name, value) for name, value in {**kept, **sizes}.items())
        if kind != _NAME or body:
            parts.append(_element(kind, body))
    left = length - sum(map(len, parts))
    return b"".join(parts) + _element(_VOID, bytes(left - 2))


def _inside(data: bytes, names: tuple[bytes, ...], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of the contents of the elements at the path `names`."""
    if not names:
        yield start, end
        return
    for kind, begin, stop in _elements(data, start, end):
        if kind == names[0]:
            yield from _inside(data, names[1:], begin, stop)


def _elements(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(ID, start and end of the contents) of each element; elements are cut at `end`."""
    while start + 2 <= end:
        id_length = 9 - data[start].bit_length()
        at = start + id_length
        size_length = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + size_length], "big") - (1 << 7 * size_length)
        unknown = size == (1 << 7 * size_length) - 1
        begin = at + size_length
        stop = end if unknown else min(begin + size, end)
        yield data[start : start + id_length], begin, stop
        start = stop


def _element(kind: bytes, body: bytes) -> bytes:
    """An element whose size is stored in one or two bytes."""
    size = bytes([0x80 | len(body)]) if len(body) < 127 else (0x4000 | len(body)).to_bytes(2, "big")
    return kind + size + body
