"""BMP files whose pixels are bit fields of 16 or 32 bits. Pillow supports only some of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BIT_FIELDS, _ALPHA_BIT_FIELDS = 3, 6
_FIVE_BITS = (0x7C00, 0x03E0, 0x001F, 0)


@dataclass(frozen=True)
class BitFields:
    """The header of such a file: `masks` of red, green, blue and alpha; rows come from the bottom unless `top_down`."""

    width: int
    height: int
    bits: int
    masks: tuple[int, ...]
    start: int
    top_down: bool


def bit_fields(head: bytes) -> BitFields | None:
    """Parse the first 128 bytes of a file; None for another kind of file or of pixels."""
    if len(head) < 54 or not head.startswith(b"BM"):
        return None
    start, size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", head, 10)
    if size < 40 or bits not in (16, 32) or width <= 0 or height == 0:
        return None
    if compression == 0 and bits == 16:
        masks: tuple[int, ...] = _FIVE_BITS
    elif compression in (_BIT_FIELDS, _ALPHA_BIT_FIELDS):
        # Behind a header of 40 bytes come three masks, or four; longer ones have four in them.
        count = 4 if size >= 56 or compression == _ALPHA_BIT_FIELDS else 3
        masks = (*struct.unpack_from(f"<{count}I", head.ljust(128, b"\0"), 54), 0)[:4]
    else:
        return None
    if not all(masks[:3]):
        return None
    return BitFields(width, abs(height), bits, masks, start, height < 0)


def decode_bit_fields(data: bytes, fields: BitFields) -> Array:
    """(H, W, 3), or 4 with alpha, in 8 bits. Raises ValueError for a file cut short."""
    stride = -(-fields.width * fields.bits // 32) * 4
    if len(data) < fields.start + stride * fields.height:
        raise ValueError("image file is truncated")
    rows = np.frombuffer(data, np.uint8, stride * fields.height, fields.start).reshape(fields.height, stride)
    values = np.ascontiguousarray(rows).view(f"<u{fields.bits // 8}")[:, : fields.width].astype(np.uint32)
    planes = []
    for mask in fields.masks:
        if mask:
            shift = (mask & -mask).bit_length() - 1
            top = mask >> shift
            planes.append(np.rint(((values & mask) >> shift) * (255 / top)).astype(np.uint8))
    pixels = np.dstack(planes)
    return pixels if fields.top_down else pixels[::-1]
