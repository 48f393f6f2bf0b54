"""DDS textures: BC1 to BC5 and BC7 through Pillow's decoder, and uncompressed pixels of 8 to 64 bits.
Signed values from -1 to 1 become those from 0 to the largest, as unsigned normal maps store them.

Pillow itself rejects most headers of DirectX 10, among them those that say sRGB, and all 16-bit pixels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, DecodedImage, Header, ImageSpec, check_pixels, from_samples
from pdd_cli.imaging.metadata import Metadata

HEAD = 148
"""Bytes of the longest header."""

_ALPHA_PIXELS, _FOURCC, _RGB, _LUMINANCE = 0x1, 0x4, 0x40, 0x20000
_SIGNED = 0x80000
_CUBE, _VOLUME, _CUBE_DX10 = 0x200, 0x200000, 0x4

# Pillow's mode, number and name of each block compression, and the bytes of a block of 4 x 4 pixels.
_BLOCKS = {
    "BC1": ("RGBA", 1, 8), "BC2": ("RGBA", 2, 16), "BC3": ("RGBA", 3, 16), "BC4": ("L", 4, 8), "BC4S": ("L", 4, 8),
    "BC5": ("RGB", 5, 16),
    "BC5S": ("RGB", 5, 16), "BC7": ("RGBA", 7, 16),
}  # fmt: skip
_FOURCCS = {
    b"DXT1": "BC1", b"DXT2": "BC2", b"DXT3": "BC2", b"DXT4": "BC3", b"DXT5": "BC3", b"ATI1": "BC4", b"BC4U": "BC4",
    b"ATI2": "BC5", b"BC5U": "BC5", b"BC4S": "BC4S", b"BC5S": "BC5S",
}  # fmt: skip
_PREMULTIPLIED = (b"DXT2", b"DXT4")
_DXGI_BLOCKS = {
    **dict.fromkeys((70, 71, 72), "BC1"), **dict.fromkeys((73, 74, 75), "BC2"), **dict.fromkeys((76, 77, 78), "BC3"),
    **dict.fromkeys((79, 80), "BC4"), 81: "BC4S", **dict.fromkeys((82, 83), "BC5"), 84: "BC5S",
    **dict.fromkeys((97, 98, 99), "BC7"),
}  # fmt: skip
_HDR = (2, 6, 10, 16, 26, 34, 41, 54, 67, 94, 95, 96)

# Bits per pixel and the masks of red, green, blue and alpha; one mask: gray.
_Masks = tuple[int, tuple[int, ...]]
_RGBA8 = (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000))
_BGRA8 = (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000))
_RGBA16 = (64, (0xFFFF, 0xFFFF << 16, 0xFFFF << 32, 0xFFFF << 48))
_DXGI_MASKS: dict[int, _Masks] = {
    11: _RGBA16, 24: (32, (0x3FF, 0x3FF << 10, 0x3FF << 20, 0x3 << 30)), 27: _RGBA8, 28: _RGBA8, 29: _RGBA8,
    35: (32, (0xFFFF, 0xFFFF << 16, 0)), 49: (16, (0xFF, 0xFF00, 0)), 56: (16, (0xFFFF,)), 61: (8, (0xFF,)),
    85: (16, (0xF800, 0x7E0, 0x1F)), 86: (16, (0x7C00, 0x3E0, 0x1F, 0x8000)), 87: _BGRA8, 88: (32, _BGRA8[1][:3]),
    90: _BGRA8, 91: _BGRA8, 92: (32, _BGRA8[1][:3]), 93: (32, _BGRA8[1][:3]), 115: (16, (0xF00, 0xF0, 0xF, 0xF000)),
}  # fmt: skip
_DXGI_SIGNED: dict[int, _Masks] = {
    13: _RGBA16, 31: _RGBA8, 37: _DXGI_MASKS[35], 51: _DXGI_MASKS[49], 58: _DXGI_MASKS[56], 63: _DXGI_MASKS[61],
}  # fmt: skip


@dataclass(frozen=True)
class _Dds:
    """The header: either `blocks` or `masks` says how the pixels are stored; `lost`: what isn't the first image.

    `signed`: the values that `masks` select are two's complements.
    """

    width: int
    height: int
    start: int
    blocks: str = ""
    masks: _Masks | None = None
    signed: bool = False
    premultiplied: bool = False
    lost: tuple[str, ...] = ()

    @property
    def spec(self) -> ImageSpec:
        if self.masks is None:
            mode = _BLOCKS[self.blocks][0]
            return ImageSpec(self.width, self.height, 1 if mode == "L" else 3, mode == "RGBA")
        masks = self.masks[1]
        bits = 16 if max(mask.bit_count() for mask in masks) > 8 else 8
        return ImageSpec(self.width, self.height, 1 if len(masks) < 3 else 3, len(masks) in (2, 4), bits)


def is_dds(head: bytes) -> bool:
    """Whether a file that begins like this is a DDS."""
    return head.startswith(b"DDS ")


def _parse(head: bytes) -> _Dds:
    if len(head) < 128 or struct.unpack_from("<I", head, 4)[0] != 124:
        raise ValueError("its header is cut short or of another size")
    height, width, _, depth, mipmaps = struct.unpack_from("<5I", head, 12)
    flags, fourcc, bits, *all_masks = struct.unpack_from("<I4s5I", head, 80)
    caps = struct.unpack_from("<I", head, 112)[0]
    if not width or not height:
        raise ValueError("it has no pixels")
    cube, slices, textures, start = bool(caps & _CUBE), depth if caps & _VOLUME else 1, 1, 128
    blocks, masks, signed, premultiplied = "", None, bool(flags & _SIGNED), False
    if flags & _FOURCC and fourcc == b"DX10":
        if len(head) < HEAD:
            raise ValueError("its header is cut short")
        dxgi, _, misc, textures = struct.unpack_from("<4I", head, 128)
        cube, start = cube or bool(misc & _CUBE_DX10), HEAD
        if dxgi in _HDR:
            raise InputError("floating-point pixels (HDR) of a DDS are not supported")
        signed = dxgi in _DXGI_SIGNED
        blocks, masks = _DXGI_BLOCKS.get(dxgi, ""), {**_DXGI_MASKS, **_DXGI_SIGNED}.get(dxgi)
        if not blocks and masks is None:
            raise InputError(f"pixels of the DXGI format {dxgi} are not supported", "Save it as BC7 or RGBA8.")
    elif flags & _FOURCC:
        blocks, premultiplied = _FOURCCS.get(fourcc, ""), fourcc in _PREMULTIPLIED
        signed = fourcc == struct.pack("<I", 110)
        masks = _RGBA16 if signed or fourcc == struct.pack("<I", 36) else None
        if not blocks and masks is None:
            name = fourcc.decode("latin-1") if fourcc.isalnum() else str(struct.unpack("<I", fourcc)[0])
            raise InputError(f"pixels of the kind {name} are not supported", "Save it as DXT5, BC7 or RGBA8.")
    elif flags & (_RGB | _LUMINANCE | _SIGNED) and bits in (8, 16, 24, 32):
        used = all_masks[: 1 if flags & _LUMINANCE else 3]
        has_alpha = flags & (_ALPHA_PIXELS | _SIGNED) and all_masks[3]
        masks = (bits, tuple(used) + ((all_masks[3],) if has_alpha else ()))
        if not all(masks[1][:1]):
            raise ValueError("its header has no mask for red")
    else:
        raise InputError("pixels with a palette, or of alpha alone, are not supported", "Save it as RGBA8.")
    lost = (
        *(("mipmaps",) if mipmaps > 1 else ()),
        *(("the other faces of a cube map",) if cube else ()),
        *((f"{slices - 1} more slices of a volume",) if slices > 1 else ()),
        *((f"{textures - 1} more textures of an array",) if textures > 1 else ()),
    )
    return _Dds(width, height, start, blocks, masks, signed, premultiplied, lost)


def probe(file: BinaryIO, most_pixels: int) -> Header:
    """The header of a DDS file."""
    dds = _parse(file.read(HEAD))
    check_pixels((dds.width, dds.height), most_pixels)
    return Header((dds.width, dds.height), 1, dds.spec)


def read(data: bytes, most_pixels: int) -> DecodedImage:
    """Decode the first image of a DDS file. Raises ValueError for one that is damaged or cut short."""
    dds = _parse(data[:HEAD])
    check_pixels((dds.width, dds.height), most_pixels)
    pixels = _masked(data, dds) if dds.masks is not None else _from_blocks(data, dds)
    if dds.premultiplied:
        alpha = pixels[..., 3:].astype(np.float32)
        colours = np.rint(pixels[..., :3].astype(np.float32) * 255 / np.maximum(alpha, 1)).clip(0, 255) * (alpha > 0)
        pixels = np.concatenate([colours.astype(np.uint8), pixels[..., 3:]], axis=2)
    return from_samples(pixels, None, Metadata(lost=dds.lost))


def _from_blocks(data: bytes, dds: _Dds) -> Array:
    mode, number, block_bytes = _BLOCKS[dds.blocks]
    size = -(-dds.width // 4) * -(-dds.height // 4) * block_bytes
    if len(data) < dds.start + size:
        raise ValueError("image file is truncated")
    blocks = data[dds.start : dds.start + size]
    if dds.blocks == "BC4S":  # as the red of BC5S: Pillow takes BC4 for unsigned
        blocks = b"".join(2 * blocks[at : at + 8] for at in range(0, size, 8))
        mode, number = _BLOCKS["BC5S"][:2]
    name = "BC5S" if dds.blocks == "BC4S" else dds.blocks
    pixels = np.asarray(Image.frombytes(mode, (dds.width, dds.height), blocks, "bcn", number, name))
    if name == "BC5S":  # Pillow adds 128; -127 to 127 are -1 to 1, and so is -128
        pixels = np.rint((np.maximum(pixels, 1) - 1.0) * (255 / 254)).astype(np.uint8)
        if dds.blocks == "BC4S":
            return np.asarray(pixels[..., 0])
        pixels[..., 2] = 0  # as of BC5: it isn't stored
    # These say of each block whether it has alpha.
    is_opaque = dds.blocks in ("BC1", "BC7") and (pixels[..., 3] == 255).all()
    return np.asarray(pixels[..., :3] if is_opaque else pixels)


def _masked(data: bytes, dds: _Dds) -> Array:
    assert dds.masks is not None
    bits, masks = dds.masks
    count, width = dds.width * dds.height, bits // 8
    if len(data) < dds.start + count * width:
        raise ValueError("image file is truncated")
    stored = np.frombuffer(data, np.uint8, count * width, dds.start).reshape(dds.height, dds.width, width)
    values = np.zeros((dds.height, dds.width), np.uint64)
    for index in range(width):
        values |= stored[..., index].astype(np.uint64) << np.uint64(8 * index)
    top, kind = (65_535, np.uint16) if dds.spec.bits == 16 else (255, np.uint8)
    planes = []
    for mask in masks:
        if not mask:  # a third colour that two channels lack
            planes.append(np.zeros((dds.height, dds.width), kind))
            continue
        shift = (mask & -mask).bit_length() - 1
        plane = ((values & np.uint64(mask)) >> np.uint64(shift)).astype(np.float64)
        most = mask >> shift
        if dds.signed:
            half = most // 2
            plane = np.maximum(np.where(plane > half, plane - (most + 1), plane), -half) + half
            most = 2 * half
        planes.append(np.rint(plane * (top / most)).astype(kind))
    return np.dstack(planes) if len(planes) > 1 else planes[0]
