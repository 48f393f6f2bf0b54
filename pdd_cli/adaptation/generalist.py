"""The generalist: never receives a gradient; frozen, or the moving average of the specialist."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(generalist: nn.Module, specialist: nn.Module, decay: float) -> None:
    """generalist ← decay · generalist + (1 − decay) · specialist, for parameters; buffers are copied."""
    torch._foreach_lerp_(list(generalist.parameters()), list(specialist.parameters()), 1 - decay)
    for mine, theirs in zip(generalist.buffers(), specialist.buffers(), strict=True):
        mine.copy_(theirs)
