"""Preserve the colours of the input: two corrections of the output, and colour for transparent pixels."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float32]
Correction = Literal["none", "mean-std", "low-frequency"]

# Standard deviation of the low-pass filter in LR pixels: lower frequencies are taken from the LR, higher from the SR.
_LOW_PASS = 5.0


def correct(sr: FloatArray, lr: FloatArray, correction: Correction, visible: FloatArray | None = None) -> FloatArray:
    """`sr` (H, W, C) with the colours of `lr` (h, w, C), both in 0..1 or a little outside.

    `mean-std`: each channel is shifted and scaled to its mean and standard deviation in the LR, as in the paper.
    `low-frequency`: the low frequencies of the difference are added, which removes a tint and keeps edges and texture.
    `visible` (h, w): alpha, which weights the pixels.
    """
    match correction:
        case "mean-std":
            return _match_moments(sr, lr, visible)
        case "low-frequency":
            return _match_low_frequencies(sr, lr, visible)
        case "none":
            return sr


def bleed(pixels: npt.NDArray[np.generic], alpha: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """`pixels` (h, w, C), in which pixels with `alpha` (h, w) 0 have the colour of the nearest visible pixel.

    The hidden colour of transparent pixels, often black, would cause a halo when edges are upscaled.
    """
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return pixels
    from scipy import ndimage

    _, (rows, columns) = ndimage.distance_transform_edt(hidden, return_indices=True)
    filled: npt.NDArray[np.generic] = pixels[rows, columns]
    return filled


def _match_moments(sr: FloatArray, lr: FloatArray, visible: FloatArray | None) -> FloatArray:
    weights = None if visible is None else visible.ravel()
    if weights is not None and weights.sum() == 0:
        return sr
    shown = None if visible is None else _resized(visible, sr.shape).clip(0).ravel()
    result = np.empty_like(sr)
    for c in range(sr.shape[2]):
        mean, deviation = _moments(sr[..., c], shown)
        wanted_mean, wanted_deviation = _moments(lr[..., c], weights)
        gain = wanted_deviation / deviation if deviation > 1e-6 else 1.0
        result[..., c] = (sr[..., c] - mean) * gain + wanted_mean
    return result


def _moments(plane: FloatArray, weights: FloatArray | None) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = plane.ravel()
    if weights is None:
        return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    mean = float(np.average(values, weights=weights.astype(np.float64)))
    return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=weights.astype(np.float64))))


def _match_low_frequencies(sr: FloatArray, lr: FloatArray, visible: FloatArray | None) -> FloatArray:
    seen = None if visible is None else _low_pass(visible)
    result = np.empty_like(sr)
    for c in range(sr.shape[2]):
        missing = lr[..., c] - _resized(sr[..., c], lr.shape)
        low = _low_pass(missing if visible is None else missing * visible)
        if seen is not None:
            low /= np.maximum(seen, 1e-3)
        result[..., c] = sr[..., c] + _resized(low, sr.shape)
    return result


def _low_pass(plane: FloatArray) -> FloatArray:
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(plane, _LOW_PASS, mode="nearest"), np.float32)


def _resized(plane: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR), np.float32)
