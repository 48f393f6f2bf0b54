"""The update of the generalist, which never receives a gradient: it is frozen, or an EMA of the specialist."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(generalist: nn.Module, specialist: nn.Module, decay: float) -> None:
    """generalist ← decay · generalist + (1 − decay) · specialist, for the parameters; buffers are copied."""
    torch._foreach_lerp_(list(generalist.parameters()), list(specialist.parameters()), 1 - decay)
    for target, source in zip(generalist.buffers(), specialist.buffers(), strict=True):
        target.copy_(source)
