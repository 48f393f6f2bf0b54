"""TGA files (Truevision) of all types, depths and origins; Pillow lacks some, and drops the alpha bit of 16 bits."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, DecodedImage, Header, ImageSpec, check_pixels, from_samples
from pdd_cli.imaging.metadata import Metadata
from pdd_cli.imaging.pixels import without_copies

_MAPPED, _COLOURS, _GRAY = 1, 2, 3  # types; 8 more: run-length encoded
_RLE = 8
_DEPTHS = {_MAPPED: (8, 15, 16), _COLOURS: (15, 16, 24, 32), _GRAY: (8, 16)}
_FROM_RIGHT, _FROM_TOP = 0x10, 0x20
_HEADER = struct.Struct("<BBBHHBHHHHBB")
_FOOTER = b"TRUEVISION-XFILE.\0"
_FOOTER_BYTES = 26
# Attributes type of the extension area: what the alpha bits mean.
_ATTRIBUTES_AT = 494
_TEXTS = slice(2, 367)  # of the extension area: author and comments
_NO_ALPHA, _PREMULTIPLIED = 0, 4


@dataclass(frozen=True)
class _Tga:
    """The header: `kind` without run-length encoding; `attributes` is the number of alpha bits of a pixel."""

    start: int  # of the colour map, which comes before the pixels
    kind: int
    compressed: bool
    first: int
    colours: int
    colour_bits: int
    width: int
    height: int
    bits: int
    attributes: int
    from_right: bool
    from_top: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def is_tga(head: bytes) -> bool:
    """Whether a file that begins like this, and like no other format, is a TGA."""
    return _parse(head) is not None


def _parse(head: bytes) -> _Tga | None:
    if len(head) < _HEADER.size or head[4:8] in (b"ftyp", b"JXL "):
        return None
    length, mapped, kind, first, colours, colour_bits, _, _, width, height, bits, flags = _HEADER.unpack_from(head)
    compressed, kind = bool(kind & _RLE), kind & ~_RLE
    if bits not in _DEPTHS.get(kind, ()) or mapped > 1 or not width or not height or flags & 0xC0:
        return None
    if kind == _MAPPED and (not mapped or not colours or colour_bits not in (15, 16, 24, 32)):
        return None
    start = _HEADER.size + length
    return _Tga(
        start, kind, compressed, first, colours if mapped else 0, colour_bits, width, height, bits,
        flags & 15, bool(flags & _FROM_RIGHT), bool(flags & _FROM_TOP),
    )  # fmt: skip


def probe(file: BinaryIO, most_pixels: int) -> Header:
    """The header of a TGA file, with the largest spec that its pixels may have."""
    tga = _parse(file.read(_HEADER.size))
    assert tga is not None
    check_pixels(tga.size, most_pixels)
    channels = 1 if tga.kind == _GRAY else 3
    return Header(
        tga.size, 1, ImageSpec(*tga.size, channels, alpha=tga.bits in (16, 32) or tga.colour_bits in (16, 32))
    )


def read(data: bytes, most_pixels: int) -> DecodedImage:
    """Decode a TGA file. Raises ValueError for one that is damaged or cut short."""
    tga = _parse(data[: _HEADER.size])
    assert tga is not None
    check_pixels(tga.size, most_pixels)
    map_bytes = -(-tga.colour_bits // 8) * tga.colours
    values = _values(data[tga.start + map_bytes :], tga)
    extension = _extension(data)
    attributes = extension[_ATTRIBUTES_AT] if extension else None
    texts = data[_HEADER.size : tga.start] + extension[_TEXTS]
    if tga.kind == _MAPPED:
        entries = _samples(_palette(data, tga), tga.colour_bits)
        values = values.view(np.uint8)[..., 0] if tga.bits == 8 else values.view("<u2")[..., 0]
        indices = values.astype(int) - tga.first
        if indices.min() < 0 or indices.max() >= len(entries):
            raise ValueError("an index outside its colour map")
        pixels = entries[indices]
        has_alpha = tga.colour_bits in (16, 32) and bool(pixels[..., 3].any()) and tga.attributes > 0
        pixels = without_copies(pixels if has_alpha else pixels[..., :3])
    elif tga.kind == _GRAY:
        pixels = values if tga.bits == 16 and (tga.attributes or values[..., 1].any()) else values[..., :1]
        has_alpha = pixels.shape[2] == 2
    else:
        pixels = _samples(values, tga.bits)
        # Many programs write alpha and leave its number of bits 0; where it is 0 everywhere, it is not meant.
        stated = tga.attributes > 0 or (tga.bits == 32 and bool(pixels[..., 3].any()))
        has_alpha = tga.bits in (16, 32) and stated and attributes != _NO_ALPHA
        pixels = pixels if has_alpha else pixels[..., :3]
    if has_alpha and attributes == _PREMULTIPLIED:
        pixels = _straight(pixels)
    if tga.from_right:
        pixels = pixels[:, ::-1]
    if not tga.from_top:
        pixels = pixels[::-1]
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return from_samples(pixels, None, Metadata(lost=("texts of the TGA",) if texts.strip(b"\0 ") else ()))


def _values(data: bytes, tga: _Tga) -> Array:
    """(H, W, bytes per pixel) as stored."""
    width = -(-tga.bits // 8)
    count = tga.width * tga.height
    if tga.compressed:
        if count > 128 * (len(data) // (1 + width) + 1):  # a packet holds at most 128 pixels
            raise ValueError("image file is truncated")
        # One row, because some programs let a run go on in the next row; Pillow's decoder only counts bytes.
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[width]
        image = Image.frombytes(mode, (count, 1), data, "tga_rle", mode, 1, 8 * width)
        return np.asarray(image).reshape(tga.height, tga.width, width)
    if len(data) < count * width:
        raise ValueError("image file is truncated")
    return np.frombuffer(data, np.uint8, count * width).reshape(tga.height, tga.width, width)


def _palette(data: bytes, tga: _Tga) -> Array:
    width = -(-tga.colour_bits // 8)
    if len(data) < tga.start + width * tga.colours:
        raise ValueError("image file is truncated")
    return np.frombuffer(data, np.uint8, width * tga.colours, tga.start).reshape(tga.colours, width)


def _samples(stored: Array, bits: int) -> Array:
    """(…, 3), or 4 with the alpha bits, in 8 bits, of values as stored (…, bytes)."""
    if bits in (24, 32):
        return stored[..., [2, 1, 0, 3][: bits // 8]]
    values = np.ascontiguousarray(stored).view("<u2")[..., 0]
    fives = [np.rint((values >> shift & 31) * (255 / 31)).astype(np.uint8) for shift in (10, 5, 0)]
    return np.stack([*fives, ((values >> 15) * 255).astype(np.uint8)], axis=-1)[..., : 3 if bits == 15 else 4]


def _extension(data: bytes) -> bytes:
    """The extension area of a TGA of version 2; empty without one."""
    at = int.from_bytes(data[-_FOOTER_BYTES:][:4], "little")
    if not data.endswith(_FOOTER) or not at or at + _ATTRIBUTES_AT >= len(data):
        return b""
    return data[at : at + _ATTRIBUTES_AT + 1]


def _straight(pixels: Array) -> Array:
    """Premultiplied colours divided by their alpha."""
    colours, alpha = pixels[..., :-1].astype(np.float32), pixels[..., -1:]
    divided = np.rint(colours * 255 / np.maximum(alpha, 1)).clip(0, 255).astype(np.uint8)
    return np.concatenate([np.where(alpha > 0, divided, 0), alpha], axis=-1).astype(np.uint8)


def write(path: Path, pixels: Array, record: str = "") -> None:
    """Write (H, W) or (H, W, 2 to 4) uint8 uncompressed, from the bottom, which every program reads.

    Gray with alpha is written as colours with alpha: ImageMagick and others take 16 bits for 5 bits of each colour.
    `record`: text behind the pixels, where readers find nothing.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 2:
        pixels = pixels[..., [0, 0, 0, 1]]
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    height, width = pixels.shape[:2]
    if max(width, height) > 65_535:
        raise InputError(f"{path}: {width}x{height} is too large for TGA (at most 65535 pixels a side)")
    kind = _GRAY if samples == 1 else _COLOURS
    alpha_bits = 8 if samples == 4 else 0
    if samples > 2:
        pixels = pixels[..., [2, 1, 0, 3][:samples]]
    with path.open("wb") as file:
        file.write(_HEADER.pack(0, 0, kind, 0, 0, 0, 0, 0, width, height, 8 * samples, alpha_bits))
        file.write(np.ascontiguousarray(pixels[::-1], np.uint8).data)
        if record:
            file.write(b"\0" + record.encode(errors="replace") + b"\0")
        file.write(struct.pack("<II", 0, 0) + _FOOTER)
