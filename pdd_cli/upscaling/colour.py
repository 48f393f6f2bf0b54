"""Preserve the colours of the input: two corrections of the output, and colour for transparent pixels."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float32]
Correction = Literal["none", "mean-std", "low-frequency", "wavelet"]

# Standard deviation of the low-pass filter in LR pixels: lower frequencies are taken from the LR, higher from the SR.
_LOW_PASS = 5.0
# Levels of the wavelet decomposition at the size of the output, whose coarsest part is taken from the LR.
_LEVELS = 5


def correct(
    sr: FloatArray,
    lr: FloatArray,
    correction: Correction,
    visible: FloatArray | None = None,
    wrap: tuple[bool, bool] = (False, False),
) -> FloatArray:
    """`sr` (H, W, C) with the colours of `lr` (h, w, C), both in 0..1 or a little outside.

    `mean-std`: each channel is shifted and scaled to its mean and standard deviation in the LR, as in the paper.
    `low-frequency`: the low frequencies of the difference are added, which removes a tint and keeps edges and texture.
    `wavelet`: the same with the coarsest part of a wavelet decomposition of 5 levels at the size of the output (à
    trous, as in StableSR).
    `visible` (h, w): alpha, which weights the pixels. `wrap`: whether opposite edges join (rows, columns).
    """
    match correction:
        case "mean-std":
            return _match_moments(sr, lr, visible)
        case "low-frequency":
            return _match_low_frequencies(sr, lr, visible, wrap)
        case "wavelet":
            return _match_wavelet(sr, lr, visible, wrap)
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


def _match_low_frequencies(
    sr: FloatArray, lr: FloatArray, visible: FloatArray | None, wrap: tuple[bool, bool]
) -> FloatArray:
    seen = None if visible is None else _low_pass(visible, wrap)
    result = np.empty_like(sr)
    for c in range(sr.shape[2]):
        missing = lr[..., c] - _resized(sr[..., c], lr.shape)
        low = _low_pass(missing if visible is None else missing * visible, wrap)
        if seen is not None:
            low /= np.maximum(seen, 1e-3)
        result[..., c] = sr[..., c] + _resized(low, sr.shape)
    return result


def _match_wavelet(sr: FloatArray, lr: FloatArray, visible: FloatArray | None, wrap: tuple[bool, bool]) -> FloatArray:
    shown = None if visible is None else _resized(visible, sr.shape).clip(0, 1)
    seen = None if shown is None else _coarsest(shown, wrap)
    result = np.empty_like(sr)
    for c in range(sr.shape[2]):
        missing = _resized(lr[..., c], sr.shape) - sr[..., c]
        low = _coarsest(missing if shown is None else missing * shown, wrap)
        if seen is not None:
            low /= np.maximum(seen, 1e-3)
        result[..., c] = sr[..., c] + low
    return result


def _coarsest(plane: FloatArray, wrap: tuple[bool, bool]) -> FloatArray:
    """The coarsest part of an à trous wavelet decomposition: (1 2 1)/4 on both axes, with growing distances."""
    for level in range(_LEVELS):
        distance = 2**level
        for axis in (0, 1):
            width = [(0, 0), (0, 0)]
            width[axis] = (distance, distance)
            padded = np.pad(plane, width, mode="wrap" if wrap[axis] else "edge")
            before, _ = np.split(padded, [plane.shape[axis]], axis=axis)
            _, after = np.split(padded, [2 * distance], axis=axis)
            plane = (before + 2 * plane + after) / np.float32(4)
    return plane


def _low_pass(plane: FloatArray, wrap: tuple[bool, bool]) -> FloatArray:
    from scipy import ndimage

    mode = ["wrap" if joined else "nearest" for joined in wrap]
    return np.asarray(ndimage.gaussian_filter(plane, _LOW_PASS, mode=mode), np.float32)


def _resized(plane: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR), np.float32)
