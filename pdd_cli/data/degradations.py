"""How synthetic LR is made from HR."""

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
    """What is drawn for each crop: a downsampling filter, and, where a range is given, blur, noise and JPEG.

    `blur`: standard deviation of a Gaussian in LR pixels. `noise`: of white noise in 8-bit levels. `jpeg`: quality.
    Without the three it is the paper's clean degradation.
    """

    filters: tuple[Filter, ...] = ("bicubic", "bilinear", "area")
    blur: Range | None = None
    noise: Range | None = None
    jpeg: Range | None = None

    def apply(self, hr: Tensor, scale: int, rng: np.random.Generator) -> Tensor:
        """(1, 3, H, W) in 0..1 to its LR (1, 3, H/scale, W/scale), rounded to 8 bit; H and W multiples of `scale`.

        In the order in which a camera does it: lens, sensor, noise, compression.
        """
        filter = rng.choice(self.filters)
        if self.blur is not None:
            hr = gaussian_blur(hr, rng.uniform(*self.blur) * scale)
        lr = downsample(hr, scale, filter)
        if self.noise is not None:
            sigma = rng.uniform(*self.noise) / 255
            # Half of the time the three channels have one noise, as luma noise has.
            shape = (1, int(rng.choice((1, 3))), *lr.shape[-2:])
            lr = _to_8_bit(lr + torch.from_numpy(rng.normal(0, sigma, shape).astype(np.float32)))
        if self.jpeg is not None:
            lr = jpeg(lr, round(rng.uniform(*self.jpeg)), rng)
        return lr


def downsample(hr: Tensor, factor: float, filter: Filter) -> Tensor:
    """The clean degradation: (N, C, H, W) in 0..1 to (N, C, H/factor, W/factor), rounded to 8 bit.

    Bicubic and bilinear are stretched over `factor` input pixels (antialiased), as image libraries and MATLAB do it.
    """
    size = [max(1, round(n / factor)) for n in hr.shape[-2:]]
    if filter == "area":
        lr = F.interpolate(hr, size, mode="area")
    else:
        lr = F.interpolate(hr, size, mode=filter, antialias=True)
    return _to_8_bit(lr)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """(1, C, H, W) blurred by a Gaussian of standard deviation `sigma` pixels, the border mirrored."""
    if sigma <= 0:
        return image
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    blurred = cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return torch.from_numpy(blurred).permute(2, 0, 1)[None]


def jpeg(image: Tensor, quality: int, rng: np.random.Generator) -> Tensor:
    """(1, 3, H, W) in 0..1 after JPEG compression; its grid of 8 x 8 blocks begins anywhere, as in a crop."""
    height, width = image.shape[-2:]
    top, left = (int(n) for n in rng.integers(8, size=2))
    padded = F.pad(image, (left, -(width + left) % 8, top, -(height + top) % 8), mode="replicate")
    pixels = (padded[0].permute(1, 2, 0).numpy()[:, :, ::-1] * 255).round().astype(np.uint8)
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[top : top + height, left : left + width, ::-1]
    return torch.from_numpy(decoded.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _to_8_bit(image: Tensor) -> Tensor:
    return torch.round(image.clamp(0, 1) * 255) / 255
