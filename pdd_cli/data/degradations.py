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
    Without the three it is the paper's clean degradation. `second_order`: everything happens twice, first on the way to
    a size drawn between HR's and LR's, as to an image that is saved, shrunk and saved again (Wang et al., Real-ESRGAN,
    2021, section 3.1).
    """

    filters: tuple[Filter, ...] = ("bicubic", "bilinear", "area")
    blur: Range | None = None
    noise: Range | None = None
    jpeg: Range | None = None
    second_order: bool = False

    def apply(self, hr: Tensor, scale: int, rng: np.random.Generator) -> Tensor:
        """(1, 3, H, W) in 0..1 to its LR (1, 3, H/scale, W/scale), rounded to 8 bit; H and W multiples of `scale`.

        In the order in which a camera does it: lens, sensor, noise, compression.
        """
        size = (hr.shape[-2] // scale, hr.shape[-1] // scale)
        image = hr
        if self.second_order:
            part = rng.uniform(1, scale)
            image = self._once(image, (round(size[0] * part), round(size[1] * part)), part, rng)
        return self._once(image, size, 1, rng)

    def _once(self, image: Tensor, size: tuple[int, int], part: float, rng: np.random.Generator) -> Tensor:
        """`image` brought to `size`, `part` times that of the LR."""
        filter = rng.choice(self.filters)
        if self.blur is not None:
            image = gaussian_blur(image, rng.uniform(*self.blur) * part * image.shape[-1] / size[1])
        image = _resized(image, size, filter)
        if self.noise is not None:
            sigma = rng.uniform(*self.noise) / 255
            # Half of the time the three channels have one noise, as luma noise has.
            shape = (1, int(rng.choice((1, 3))), *size)
            image = _to_8_bit(image + torch.from_numpy(rng.normal(0, sigma, shape).astype(np.float32)))
        if self.jpeg is not None:
            image = jpeg(image, round(rng.uniform(*self.jpeg)), rng)
        return image


def downsample(hr: Tensor, factor: float, filter: Filter) -> Tensor:
    """The clean degradation: (N, C, H, W) in 0..1 to (N, C, H/factor, W/factor), rounded to 8 bit.

    Bicubic and bilinear are stretched over `factor` input pixels (antialiased), as image libraries and MATLAB do it.
    """
    height, width = (max(1, round(side / factor)) for side in hr.shape[-2:])
    return _resized(hr, (height, width), filter)


def _resized(image: Tensor, size: tuple[int, int], filter: Filter) -> Tensor:
    if filter == "area":
        return _to_8_bit(F.interpolate(image, size, mode="area"))
    return _to_8_bit(F.interpolate(image, size, mode=filter, antialias=True))


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
