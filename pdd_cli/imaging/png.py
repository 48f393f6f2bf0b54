"""The chunks of a PNG file: those that pixels are made of, for a decoder, and those beside them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND")
_MOST_INFLATED = 64 << 20


@dataclass(frozen=True)
class Chunks:
    """`pixels`: a PNG file of nothing but the pixels. `beside`: (kind, content) of the other chunks, in their order.

    `key`: of a file of 16 bits the gray or RGB value that is transparent, which is not in `pixels` then. `notes`: what
    was wrong with those that aren't there.
    """

    pixels: bytes
    beside: tuple[tuple[bytes, bytes], ...]
    key: tuple[int, ...] | None
    notes: tuple[str, ...]

    def first(self, kind: bytes) -> bytes | None:
        """The content of the first chunk of this kind."""
        return next((content for name, content in self.beside if name == kind), None)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk as it is in a file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def split(file: BinaryIO, *, whole: bool = True) -> Chunks:
    """The chunks of a file that begins with the SIGNATURE; what comes behind its end isn't looked at.

    Damage beside the pixels is noted, in them it raises ValueError. Not `whole`: without the pixels themselves.
    """
    pixels, beside, notes = [file.read(len(SIGNATURE))], [], []
    kind, bits, colour, key, cut = b"", 0, 0, None, False
    while kind != b"IEND" and len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in (b"IDAT", b"fdAT") and not whole:
            file.seek(length + 4, 1)
            pixels += [chunk(kind, b"")] if kind == b"IDAT" else []
            continue
        content, checksum = file.read(length), file.read(4)
        cut = len(checksum) < 4
        sound = not cut and zlib.crc32(kind + content) == int.from_bytes(checksum, "big")
        name = ascii(kind.decode("latin-1"))
        if kind in _PIXELS:
            if not sound and not cut:
                raise ValueError(f"the checksum of its {name} chunk is wrong")
            if kind == b"IHDR" and len(content) >= 10:
                bits, colour = content[8], content[9]
            if kind == b"tRNS" and bits == 16 and colour in (0, 2) and len(content) >= colour + 2:
                key = struct.unpack_from(f">{colour + 1}H", content)
                continue
            pixels.append(head + content + checksum)
        elif not sound:
            notes.append(f"its {name} chunk is damaged and left out")
        elif kind[0] & 0x20:
            beside.append((kind, content))
        else:
            raise ValueError(f"an unknown chunk {name}")
    if kind != b"IEND" or cut:
        notes.append("its end mark is missing")
        pixels.append(chunk(b"IEND", b""))
    return Chunks(b"".join(pixels), tuple(beside), key, tuple(notes))


def inflate(content: bytes) -> bytes:
    """zlib's decompression, of what isn't a bomb. Raises ValueError, zlib.error."""
    stream = zlib.decompressobj()
    found = stream.decompress(content, _MOST_INFLATED)
    if stream.unconsumed_tail or not stream.eof:
        raise ValueError("a decompression bomb, or cut short")
    return found


@dataclass(frozen=True)
class Frame:
    """A frame of an animation as it is stored: `file`, a PNG of its own, and where and how it is put on the canvas.

    `is_over`: blended with what is there, else in place of it. `disposal`: what becomes of its rectangle when the next
    one comes: 0 it stays, 1 it is cleared, 2 it is what it was before. `duration` in milliseconds.
    """

    file: bytes
    left: int
    top: int
    width: int
    height: int
    disposal: int
    is_over: bool
    duration: float


def frames(pixels: bytes) -> Iterator[Frame]:
    """The frames of an animated PNG (PNG, third edition, 11.3.7), without an image that isn't part of it."""
    at = len(SIGNATURE)
    header, shared, control, content = b"", b"", b"", b""
    while at + 8 <= len(pixels):
        length, kind = int.from_bytes(pixels[at : at + 4], "big"), pixels[at + 4 : at + 8]
        body = pixels[at + 8 : at + 8 + length]
        at += 12 + length
        match kind:
            case b"IHDR":
                header = body
            case b"PLTE" | b"tRNS":
                shared += chunk(kind, body)
            case b"IDAT":
                content += body if control else b""
            case b"fdAT":
                content += body[4:]
            case b"fcTL" | b"IEND":
                if control:
                    _, width, height, left, top, delay, unit, disposal, blending = struct.unpack(">5I2H2B", control)
                    start = SIGNATURE + chunk(b"IHDR", control[4:12] + header[8:]) + shared
                    file = start + chunk(b"IDAT", content) + chunk(b"IEND", b"")
                    yield Frame(file, left, top, width, height, disposal, blending == 1, 1000 * delay / (unit or 100))
                control, content = body, b""
