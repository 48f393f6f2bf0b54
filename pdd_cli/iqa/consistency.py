"""What can be said of an SR image with nothing but the LR image it was made from. Pure functions over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

MOST_DECIBELS = 100.0
"""What `downscale_consistency` gives for images that are equal, so that it is always a number."""

# sRGB (IEC 61966-2-1) to CIE XYZ of the D65 white, and that white.
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)


def downscale_consistency(sr: Array, lr: Array) -> float:
    """PSNR in dB, 0 to 100, between `sr` brought back to the size of `lr` (bicubic with antialiasing) and `lr`.

    `sr` (H, W, 3), `lr` (h, w, 3), both in 0..1. Low where SR changed colours, moved edges or drew what the LR
    excludes; sharpening a blurred LR lowers it too, so compare it between models rather than with a threshold.

    Raises ValueError that says why where `sr` can't be an enlargement of `lr`.
    """
    _check(sr, lr)
    height, width = lr.shape[:2]
    brought_back = np.stack([_resized(sr[:, :, channel], width, height) for channel in range(3)], axis=2)
    error = float(np.mean((np.clip(brought_back, 0, 1).astype(np.float64) - lr) ** 2))
    return min(MOST_DECIBELS, -10 * float(np.log10(max(error, 1e-30))))


def colour_drift(sr: Array, lr: Array) -> float:
    """CIELAB ΔE (1976) between the mean colours of `sr` (H, W, 3) and `lr` (h, w, 3), sRGB in 0..1.

    0 is none; about 2 is what an eye notices side by side. Raises ValueError as `downscale_consistency` does.
    """
    _check(sr, lr)
    ours, theirs = (lab(image.reshape(-1, 3).mean(axis=0, dtype=np.float64)) for image in (sr, lr))
    return float(np.linalg.norm(ours - theirs))


def lab(colour: Array) -> Array:
    """An sRGB colour (3,) in 0..1 as CIELAB (L 0..100, a, b) of the D65 white."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    x, y, z = (
        np.cbrt(part) if part > (6 / 29) ** 3 else part / (3 * (6 / 29) ** 2) + 4 / 29
        for part in _TO_XYZ @ linear / _WHITE
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _check(sr: Array, lr: Array) -> None:
    (height, width), (small_height, small_width) = sr.shape[:2], lr.shape[:2]
    sizes = f"the image is {width}x{height}, its LR {small_width}x{small_height}"
    if small_width > width or small_height > height:  # equal: a model that restores without enlarging
        raise ValueError(f"{sizes}: larger, so not what it was made from")
    # Sizes are rounded, once by the upscaler and once by who cut the LR: a pixel of LR may be missing.
    across, down = width / small_width, height / small_height
    if abs(across * small_height - height) > across + 1 and abs(down * small_width - width) > down + 1:
        raise ValueError(f"{sizes}: of another shape, so not what it was made from")


def _resized(channel: Array, width: int, height: int) -> Array:
    image = Image.fromarray(np.ascontiguousarray(channel, np.float32))  # mode F: no rounding
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
