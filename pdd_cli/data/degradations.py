"""The degradation that makes synthetic LR from HR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Literal["bicubic", "bilinear", "area"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Degradation:
    """A random degradation: for each crop, a downsampling filter and a value from each range that is set are drawn.

    `blur`: standard deviation of a Gaussian in LR pixels. `noise`: standard deviation of white noise in 8-bit levels.
    `jpeg`: quality. Without these three it is the paper's clean degradation. `second_order`: the degradation is applied
    twice, first down to a random size between those of HR and LR, like an image that is saved, downscaled and saved
    again (Wang et al., Real-ESRGAN, 2021, section 3.1). `antialias`: of the bicubic and bilinear filters.
    """

    filters: tuple[Filter, ...] = ("bicubic", "bilinear", "area")
    blur: Range | None = None
    noise: Range | None = None
    jpeg: Range | None = None
    second_order: bool = False
    antialias: bool = True

    def apply(self, hr: Tensor, scale: int, rng: np.random.Generator) -> Tensor:
        """HR (1, 3, H, W) in 0..1 to LR (1, 3, H/scale, W/scale), rounded to 8 bits. H and W are multiples of `scale`.

        The order is that of a camera: lens (blur), sensor (downsampling), noise, compression.
        """
        size = (hr.shape[-2] // scale, hr.shape[-1] // scale)
        image = hr
        if self.second_order:
            factor = rng.uniform(1, scale)
            image = self._degrade_once(image, (round(size[0] * factor), round(size[1] * factor)), factor, rng)
        return self._degrade_once(image, size, 1, rng)

    def _degrade_once(self, image: Tensor, size: tuple[int, int], factor: float, rng: np.random.Generator) -> Tensor:
        """Degrade `image` to `size`, which is `factor` times the size of the LR."""
        filter = rng.choice(self.filters)
        if self.blur is not None:
            image = gaussian_blur(image, rng.uniform(*self.blur) * factor * image.shape[-1] / size[1])
        image = _resized(image, size, filter, antialias=self.antialias)
        if self.noise is not None:
            sigma = rng.uniform(*self.noise) / 255
            # Half of the time all three channels get the same noise (luma noise).
            shape = (1, int(rng.choice((1, 3))), *size)
            image = _to_8_bit(image + torch.from_numpy(rng.normal(0, sigma, shape).astype(np.float32)))
        if self.jpeg is not None:
            image = jpeg(image, round(rng.uniform(*self.jpeg)), rng)
        return image


def downsample(hr: Tensor, factor: float, filter: Filter) -> Tensor:
    """The clean degradation: (N, C, H, W) in 0..1 to (N, C, H/factor, W/factor), rounded to 8 bits.

    Bicubic and bilinear are antialiased, as in image libraries and MATLAB.
    """
    height, width = (max(1, round(side / factor)) for side in hr.shape[-2:])
    return _resized(hr, (height, width), filter, antialias=True)


def _resized(image: Tensor, size: tuple[int, int], filter: Filter, *, antialias: bool) -> Tensor:
    """Without antialiasing, bicubic (a = -0.75) and bilinear are those of OpenCV's `resize`."""
    if filter == "area":
        return _to_8_bit(F.interpolate(image, size, mode="area"))
    return _to_8_bit(F.interpolate(image, size, mode=filter, antialias=antialias))


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur (1, C, H, W) with a Gaussian of standard deviation `sigma` pixels. The border is mirrored."""
    if sigma <= 0:
        return image
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    blurred = cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return torch.from_numpy(blurred).permute(2, 0, 1)[None]


def jpeg(image: Tensor, quality: int, rng: np.random.Generator) -> Tensor:
    """Compress (1, 3, H, W) in 0..1 as JPEG. The grid of 8 x 8 blocks has a random offset, as in a crop."""
    height, width = image.shape[-2:]
    top, left = (int(n) for n in rng.integers(8, size=2))
    padded = F.pad(image, (left, -(width + left) % 8, top, -(height + top) % 8), mode="replicate")
    pixels = (padded[0].permute(1, 2, 0).numpy()[:, :, ::-1] * 255).round().astype(np.uint8)
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[top : top + height, left : left + width, ::-1]
    return torch.from_numpy(decoded.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _to_8_bit(image: Tensor) -> Tensor:
    return torch.round(image.clamp(0, 1) * 255) / 255
