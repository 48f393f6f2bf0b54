"""Metrics that compare an SR image with the LR image it was made from. Pure functions over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

MAX_DECIBELS = 100.0
"""The value of `downscale_consistency` for equal images, whose PSNR is infinite."""

# sRGB (IEC 61966-2-1) to CIE XYZ of the D65 white, and that white.
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)


def downscale_consistency(sr: Array, lr: Array) -> float:
    """PSNR in dB, 0 to 100, between `lr` and `sr` downscaled to its size (bicubic with antialiasing).

    `sr` (H, W, 3), `lr` (h, w, 3), both in 0..1. Low where the SR image has other colours, moved edges or detail that
    the LR excludes. Sharpening a blurred LR lowers it too: compare models by it, and set no threshold.

    Raises ValueError, with the reason, where `sr` can't be an enlargement of `lr`.
    """
    _check(sr, lr)
    height, width = lr.shape[:2]
    downscaled = np.stack([_resized(sr[:, :, channel], width, height) for channel in range(3)], axis=2)
    error = float(np.mean((np.clip(downscaled, 0, 1).astype(np.float64) - lr) ** 2))
    return min(MAX_DECIBELS, -10 * float(np.log10(max(error, 1e-30))))


def colour_drift(sr: Array, lr: Array) -> float:
    """CIELAB ΔE (1976) between the mean colours of `sr` (H, W, 3) and `lr` (h, w, 3), sRGB in 0..1.

    0 means equal; a difference of about 2 is visible side by side. Raises ValueError as `downscale_consistency` does.
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
    if small_width > width or small_height > height:  # equal sizes are valid: a model that restores without enlarging
        raise ValueError(f"{sizes}: the LR is larger, so the image wasn't made from it")
    # The upscaler rounds sizes, and so does the program that made the LR: they may differ by one LR pixel.
    across, down = width / small_width, height / small_height
    if abs(across * small_height - height) > across + 1 and abs(down * small_width - width) > down + 1:
        raise ValueError(f"{sizes}: the aspect ratios differ, so the image wasn't made from this LR")


def _resized(channel: Array, width: int, height: int) -> Array:
    image = Image.fromarray(np.ascontiguousarray(channel, np.float32))  # mode F: no rounding
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
