"""Pixels of any mode as gray or RGB with straight alpha, upright."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, from_float, to_float
from pdd_cli.imaging.metadata import NO_NOTES, Notes


def plain_mode(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """`image` as L, LA, I;16, RGB or RGBA, and its colour profile."""
    icc = image.info.get("icc_profile")
    match image.mode:
        case "L" | "RGB" if "transparency" in image.info:
            return image.convert("LA" if image.mode == "L" else "RGBA"), icc
        case "L" | "LA" | "RGB" | "RGBA" | "I;16":
            return image, icc
        case "1":
            return image.convert("L"), icc
        case "I;16B" | "I;16L" | "I;16N":
            return Image.fromarray(np.asarray(image).astype(np.uint16)), icc
        case "P" | "PA":
            return _from_palette(image), icc
        case "La":
            return image.convert("LA"), icc
        case "RGBa" | "RGBX":
            return image.convert("RGBA" if image.mode == "RGBa" else "RGB"), icc
        case "CMYK":
            return _from_cmyk(image, icc), None
        case "YCbCr" | "LAB" | "HSV":
            return image.convert("RGB"), None
        case mode:
            raise InputError(f"pixels of kind {mode} (32-bit or floating point) are not supported")


def _from_palette(image: Image.Image) -> Image.Image:
    with_alpha = image.mode == "PA" or "transparency" in image.info
    colours = image.convert("RGBA" if with_alpha else "RGB")
    return Image.fromarray(without_copies(np.asarray(colours)))


def without_copies(array: Array) -> Array:
    """Reduce RGB (H, W, 3) or RGBA (H, W, 4) that is gray to (H, W) or (H, W, 2); other arrays are unchanged."""
    if not (array[..., 0] == array[..., 1]).all() or not (array[..., 1] == array[..., 2]).all():
        return array
    return array[..., (0, 3)] if array.shape[2] == 4 else array[..., 0]


def _from_cmyk(image: Image.Image, icc: object) -> Image.Image:
    """Convert to sRGB by the image's profile, or by a simple formula if it has no usable one."""
    if isinstance(icc, bytes):
        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # the profile is damaged or for another colour space
    return image.convert("RGB")


def from_cmyk_samples(channels: Array, icc: bytes | None) -> tuple[Array, None, Notes]:
    """(H, W, 4), or 5 with alpha, as RGB, or RGBA: in 16 bits by the plain formula, by a profile in 8."""
    inks, alpha, notes = channels[..., :4], channels[..., 4:], NO_NOTES
    if channels.dtype == np.uint16 and icc is None:
        rest = np.float32(1) - to_float(inks)
        return np.dstack([from_float(rest[..., :3] * rest[..., 3:], 16), alpha]), None, ()
    if channels.dtype == np.uint16:
        inks, alpha = (np.rint(values / 257).astype(np.uint8) for values in (inks, alpha))
        notes = ("its 16 bits of CMYK are read as 8, for its profile",)
    image = Image.frombytes("CMYK", (inks.shape[1], inks.shape[0]), np.ascontiguousarray(inks).tobytes())
    return np.dstack([np.asarray(_from_cmyk(image, icc)), alpha]), None, notes


def upright(channels: Array, orientation: int) -> Array:
    """Apply the EXIF orientation 1..8 (anything else counts as 1)."""
    match orientation:
        case 2:
            return channels[:, ::-1]
        case 3:
            return np.rot90(channels, 2)
        case 4:
            return channels[::-1]
        case 5:
            return channels.swapaxes(0, 1)
        case 6:
            return np.rot90(channels, -1)
        case 7:
            return np.rot90(channels, 2).swapaxes(0, 1)
        case 8:
            return np.rot90(channels, 1)
        case _:
            return channels
