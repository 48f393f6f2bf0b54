"""How synthetic LR is made from HR."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Literal["bicubic", "bilinear", "area"]


def downsample(hr: Tensor, factor: float, filter: Filter) -> Tensor:
    """The clean degradation: (N, C, H, W) in 0..1 to (N, C, H/factor, W/factor), rounded to 8 bit.

    Bicubic and bilinear are stretched over `factor` input pixels (antialiased), as image libraries and MATLAB do it.
    """
    size = [max(1, round(n / factor)) for n in hr.shape[-2:]]
    if filter == "area":
        lr = F.interpolate(hr, size, mode="area")
    else:
        lr = F.interpolate(hr, size, mode=filter, antialias=True)
    return torch.round(lr.clamp(0, 1) * 255) / 255
