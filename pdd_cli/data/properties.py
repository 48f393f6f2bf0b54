"""Estimates of what a source does to its images, from its LR images alone: noise, compression and blur."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pdd_cli.data.datasets import RGB

Gray = NDArray[np.uint8]

NOISY = 2.0
"""Images with more noise (8-bit levels) look noisy, and so do HR images made from them by downscaling."""

_MAX_IMAGES = 24
_FLAT_QUANTILE = 0.1
_QUALITIES = range(5, 100)
_CROP = 256  # pixels; a multiple of the 8 of a JPEG block, from the image's corner
_NEIGHBOURS = (-6, -5, -4, -3, 3, 4, 5, 6)
_BLURS = np.arange(0, 2.01, 0.05)  # LR pixels
_MIN_SIDE = 16  # LR pixels; smaller images, and those with less contrast (levels), show no blur
_MIN_CONTRAST = 2.0
_DIP = 0.5  # the change by compressing with the same quality again, relative to the change with others


@dataclass(frozen=True)
class Properties:
    """What was found in `images` images.

    `noise`: standard deviation of the luminance in flat regions, in 8-bit levels; the median. `jpeg`: the lowest and
    highest quality of JPEG compression (1 to 100) that most of the images went through; None: fewer than half did.
    `blur`: standard deviation of the Gaussian before sampling, in LR pixels, from `blur_images` images; 0: none; None:
    not measured.
    """

    images: int
    noise: float
    jpeg: tuple[int, int] | None
    blur: float | None = None
    blur_images: int = 0

    @property
    def noisy(self) -> bool:
        return self.noise > NOISY

    def describe(self) -> str:
        """A sentence for people."""
        low, high = self.jpeg or (0, 0)
        jpeg = (
            f"JPEG of quality {low if low == high else f'{low} to {high}'}"
            if self.jpeg
            else "no JPEG compression found"
        )
        strength = "visible" if self.noisy else "little"
        text = f"{strength} noise ({self.noise:.1f} levels in flat regions), {jpeg} ({_from_images(self.images)})"
        if self.blur is None:
            return text
        blur = f"blur of {self.blur:.2f} LR pixels" if self.blur else "no blur found"
        return f"{text}, {blur} ({_from_images(self.blur_images)})"

    def with_blur(self, crops: Sequence[tuple[RGB, NDArray[np.float32]]]) -> Properties:
        """These properties with the blur that is measured on pairs of LR (h, w, 3) and SR (see `source_blur`)."""
        usable = [(lr, sr) for lr, sr in crops if shows_blur(lr) and np.isfinite(sr).all()]
        return replace(self, blur=source_blur(usable), blur_images=len(usable)) if usable else self

    def as_document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_properties(images: Sequence[RGB]) -> Properties:
    """Measure at most 24 images (H, W, 3), evenly spread. Raises ValueError without images."""
    if not images:
        raise ValueError("no images")
    chosen = np.linspace(0, len(images) - 1, min(len(images), _MAX_IMAGES)).round().astype(int)
    grays = [cv2.cvtColor(np.ascontiguousarray(images[index]), cv2.COLOR_RGB2GRAY) for index in chosen]
    qualities = [quality for quality in map(jpeg_quality, grays) if quality is not None]
    jpeg = (min(qualities), max(qualities)) if 2 * len(qualities) > len(grays) else None
    return Properties(len(grays), float(np.median([flat_noise(gray) for gray in grays])), jpeg)


def shows_blur(lr: RGB) -> bool:
    """Whether an image (h, w, 3) is large enough and has the contrast to show how blurred it is."""
    return min(lr.shape[:2]) >= _MIN_SIDE and float(lr.std()) >= _MIN_CONTRAST


def source_blur(crops: Sequence[tuple[RGB, NDArray[np.float32]]]) -> float:
    """The Gaussian blur of a source before sampling: its standard deviation in LR pixels, 0 to 2.

    `crops` are LR images (h, w, 3) in 8 bits with their SR (h*scale, w*scale, 3) in 0..1. The result is the blur with
    which the SR, averaged over each LR pixel, is nearest to the LR. The SR has the blur that the model didn't remove,
    so the result is a lower bound.
    """
    errors = np.zeros(len(_BLURS))
    for lr, sr in crops:
        small = cv2.cvtColor(lr, cv2.COLOR_RGB2GRAY).astype(np.float32)
        large = cv2.cvtColor(np.ascontiguousarray(sr, np.float32), cv2.COLOR_RGB2GRAY) * 255
        scale = large.shape[0] // small.shape[0]
        for index, blur in enumerate(_BLURS):
            blurred = cv2.GaussianBlur(large, (0, 0), blur * scale) if blur else large
            difference = cv2.resize(blurred, small.shape[::-1], interpolation=cv2.INTER_AREA) - small
            errors[index] += difference.var() * small.size  # without the mean: models change the brightness
    return round(float(_BLURS[errors.argmin()]), 2)


def flat_noise(gray: Gray) -> float:
    """The standard deviation of detail finer than 2 pixels in the flattest tenth of `gray` (H, W), in 8-bit levels."""
    values = gray.astype(np.float32)
    detail = values - cv2.GaussianBlur(values, (0, 0), 2)
    variance = cv2.blur(detail * detail, (7, 7))
    return math.sqrt(float(np.quantile(variance, _FLAT_QUANTILE)))


def jpeg_quality(gray: Gray) -> int | None:
    """The quality (libjpeg's scale) of the JPEG compression that `gray` (H, W) went through, whatever its file is now.

    Compressing an image again with the same quality changes almost nothing, whereas other qualities change it (Farid,
    Exposing Digital Forgeries from JPEG Ghosts, 2009). None: not compressed, a quality below 11 or above 93, or
    resized or cropped since.
    """
    crop = np.ascontiguousarray(gray[:_CROP, :_CROP])
    if min(crop.shape) < 16 or not crop.std():
        return None
    changes = {
        quality: float(np.abs(crop.astype(np.int16) - _compressed(crop, quality)).mean()) for quality in _QUALITIES
    }
    inner = [quality for quality in _QUALITIES if {quality + step for step in _NEIGHBOURS} <= changes.keys()]
    ratios = {
        quality: changes[quality] / max(float(np.median([changes[quality + step] for step in _NEIGHBOURS])), 1e-6)
        for quality in inner
    }
    best = min(ratios, key=ratios.__getitem__)
    return best if ratios[best] < _DIP else None


def _compressed(gray: Gray, quality: int) -> Gray:
    _, data = cv2.imencode(".jpg", gray, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.uint8)


def _from_images(count: int) -> str:
    return f"from {count} image{'' if count == 1 else 's'}"
