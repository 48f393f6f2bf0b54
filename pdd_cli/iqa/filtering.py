"""pyiqa's filters in double precision, computed fast on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FastFilters(TorchFunctionMode):
    """A context manager in which OpenCV computes filters that PyTorch is slow at, in the current thread.

    These filter each channel in double precision on the CPU, as in ssim and niqe. PyTorch first copies the image for
    each weight of the filter (a gigabyte for a megapixel and ssim's 11x11), which takes most of the time of these
    metrics. OpenCV sums the same products without copies.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        filtered = _filtered(*args, **kwargs) if func is F.conv2d else None
        return func(*args, **kwargs) if filtered is None else filtered


def _filtered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """`torch.nn.functional.conv2d` of (1, C, H, W) float64 on the CPU with one filter a channel; else None."""
    plain = bias is None and stride in (1, (1, 1)) and padding in (0, (0, 0)) and dilation in (1, (1, 1))
    if not plain or input.dtype != torch.float64 or input.device.type != "cpu":
        return None
    height, width = (of - by + 1 for of, by in zip(input.shape[-2:], weight.shape[-2:], strict=True))
    if input.shape[:-2] != (1, groups) or weight.shape[:-2] != (groups, 1) or min(height, width) < 1:
        return None
    # OpenCV extends the image at the right and at the bottom; that part is cut off.
    channels = [
        cv2.filter2D(np.ascontiguousarray(plane), -1, taps, anchor=(0, 0))[:height, :width]
        for plane, taps in zip(input[0].detach().numpy(), weight[:, 0].detach().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(channels)[None])
