"""HEIC and AVIF: more than 8 bits per channel, colours, and the HEIC writer."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from pdd_cli.imaging.formats import load_plugin
from pdd_cli.imaging.image import Array, ImageStream, collect_rows, to_float
from pdd_cli.imaging.metadata import Notes


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether a HEIC or AVIF image has 10 or 12 bits."""
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8)) > 8
    return image.format == "AVIF" and _avif_bits(data) > 8


def _avif_bits(data: bytes) -> int:
    """Bits of the first AV1 configuration: 8, 10 or 12."""
    at = data.find(b"av1C")
    flags = data[at + 6] if 0 <= at < len(data) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def decode_avif(data: bytes) -> Array:
    """Decode AVIF of 10 or 12 bits, which Pillow reduces to 8, to 16 bits (H, W, C)."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16:
        raise ValueError("AVIF of more than 8 bits that can't be decoded")
    decoded = decoded.reshape(*decoded.shape[:2], -1)
    values = decoded[:, :, (2, 1, 0, 3)[: decoded.shape[2]]] if decoded.shape[2] > 1 else decoded
    return np.asarray(np.rint(values * (65535 / ((1 << _avif_bits(data)) - 1))), np.uint16)


def lost_of_heif(image: Image.Image) -> Notes:
    if image.format != "HEIF":
        return ()
    more = int(getattr(image, "n_frames", 1)) - 1
    lost = [f"{more} more images in it"] if more else []
    lost += ["depth map"] if image.info.get("depth_images") else []
    lost += ["auxiliary images (a gain map, for example)"] if image.info.get("aux") else []
    return tuple(lost)


def read_cicp(image: Image.Image, data: bytes) -> tuple[int, int, int, int] | None:
    """The colour space of a HEIC or AVIF file unless it is sRGB, for pixels that are decoded to full-range RGB."""
    primaries, transfer = 2, 2
    if image.format == "HEIF":
        nclx = image.info.get("nclx_profile") or {}
        primaries = int(nclx.get("color_primaries", 2))
        transfer = int(nclx.get("transfer_characteristics", 2))
    elif image.format == "AVIF":
        at = data.find(b"colrnclx")
        if at >= 0 and len(data) >= at + 12:
            primaries, transfer = struct.unpack_from(">HH", data, at + 8)
    if primaries in (1, 2) and transfer in (1, 2, 6, 13):
        return None
    return primaries, transfer, 0, 1


def decode_heif(data: bytes) -> Array:
    """Decode the main image of HEIC of 10 or 12 bits, which Pillow's plugin reduces to 8, to 16 bits (H, W, C)."""
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    image = file[file.primary_index]
    shifted = np.frombuffer(image.data, "<u2").reshape(-1, image.stride // 2)
    (width, height), count, bits = image.size, len(image.mode.split(";")[0]), int(image.info["bit_depth"])
    values = shifted[:height, : width * count].reshape(height, width, count) >> (16 - bits)
    return np.asarray(np.rint(values * (65535 / ((1 << bits) - 1))), np.uint16)


_NCLX = ("color_primaries", "transfer_characteristics", "matrix_coefficients", "full_range_flag")
_MATRIX = 9  # of the luma of BT.2020, not of constant luminance
_BITS = 10  # of 16: what devices read; x265 has 12, too


def write_heif(path: Path, stream: ImageStream, quality: int) -> None:
    """Write HEIC without Pillow, which has no 16-bit images of several channels."""
    load_plugin("HEIF")
    import pillow_heif

    spec, metadata = stream.spec, stream.metadata
    pixels, mode = collect_rows(stream), ("L", "LA", "RGB", "RGBA")[spec.samples - 1]
    if spec.bits == 16:
        top = (1 << _BITS) - 1
        pixels, mode = np.rint(to_float(pixels) * top).astype(np.uint16), f"{mode};{_BITS}"
    file = pillow_heif.from_bytes(mode, (spec.width, spec.height), pixels.tobytes())
    if metadata.icc:
        file.info["icc_profile"] = metadata.icc
    elif metadata.cicp:
        file.info["nclx_profile"] = dict(zip(_NCLX, (*metadata.cicp[:2], _MATRIX, 1), strict=True))
    # Chroma at full resolution, as in JPEG.
    options = {"quality": quality, "chroma": 444, "bit_depth": _BITS}
    with path.open("wb") as target:
        file.save(target, exif=metadata.exif, xmp=metadata.xmp, **options)
