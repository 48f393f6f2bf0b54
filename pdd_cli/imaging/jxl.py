"""The header of a JPEG XL file, which Pillow's plugin returns only after decoding the whole file."""

from __future__ import annotations

from collections.abc import Iterator

_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_CODESTREAM = b"\xff\x0a"
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def is_jxl(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is JPEG XL."""
    return head.startswith((_CONTAINER, _CODESTREAM))


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright image, from the codestream (ISO/IEC 18181-1, D.2 and D.3).

    Raises ValueError for a file without a codestream.
    """
    start = data[:64]
    if not data.startswith(_CODESTREAM):
        # Each part of a file in parts begins with its number.
        parts = (body[4 if kind == b"jxlp" else 0 :][:64] for kind, body in _boxes(data) if kind in (b"jxlc", b"jxlp"))
        start = next(parts, b"")
    if not start.startswith(_CODESTREAM):
        raise ValueError("no JPEG XL codestream in it")
    bits = int.from_bytes(start[2:], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    ratio = take(3)
    width = side() if ratio == 0 else height * _RATIOS[ratio][0] // _RATIOS[ratio][1]
    defaults = take(1)
    turned = not defaults and take(1) and take(3) >= 4
    return (height, width) if turned else (width, height)


def xmp_of(data: bytes) -> bytes | None:
    """The XMP of a file, if it has any that isn't compressed."""
    return next((bytes(body) for kind, body in _boxes(data) if kind == b"xml "), None)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of the boxes of the container (ISO/IEC 18181-2)."""
    at = 0 if data.startswith(_CONTAINER) else len(data)
    while at + 8 <= len(data):
        length, head = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if length == 0:  # to the end
            length = len(data) - at
        yield data[at + 4 : at + 8], data[at + head : at + length]
        at += max(length, head)
