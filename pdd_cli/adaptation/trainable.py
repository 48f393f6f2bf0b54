"""Checks that a model can be a base: from RGB to RGB or gray to gray, with parameters that receive a gradient."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from pdd_cli.errors import InputError
from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.runtime import Runtime, is_out_of_memory
from pdd_cli.settings.adapt import OptimizerSettings

_SIDE = 16  # LR pixels of the test image
_FROZEN = 0.65  # of the parameters of large networks
_LARGE = 12  # blocks of an RRDBNet; Real-ESRGAN has 23
Network = TypeVar("Network", bound=nn.Module)
_HINT = "It still upscales. Adapt another base, such as realesrgan."


def training_mode(network: Network) -> Network:
    """Set `network` to training mode, except for batch normalisation, which keeps the statistics of its weights.

    Statistics of one or two crops would change the network more than training does.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return network


def chosen_for(network: nn.Module, settings: OptimizerSettings) -> tuple[float, float]:
    """The fraction of the parameters that stays frozen, and the learning rate, with numbers in place of "auto"."""
    freeze, rate = settings.freeze, settings.learning_rate
    if freeze == "auto":
        freeze = _FROZEN if isinstance(network, RRDBNet) and len(network.body) >= _LARGE else 0.0
    if rate == "auto":
        rate = 2e-4 if freeze else 1e-4
    return freeze, rate


def freeze_first(network: nn.Module, fraction: float) -> None:
    """Exclude the first parameters of `network` from training, as many as are within `fraction` of their number."""
    left = fraction * sum(parameter.numel() for parameter in network.parameters())
    for parameter in network.parameters():
        left -= parameter.numel()
        if left < 0:
            return
        parameter.requires_grad_(False)


@contextlib.contextmanager
def frozen_blocks_shared(specialist: nn.Module, generalist: nn.Module, equal: bool) -> Iterator[None]:
    """Compute the first frozen blocks of two RRDBNets only once, while the context lasts.

    The specialist computes them, and the generalist, whose next input must be the same, continues after them. Does
    nothing unless the frozen weights of both are `equal`.
    """
    count = 0
    if equal and isinstance(specialist, RRDBNet):
        frozen = [not any(parameter.requires_grad for parameter in block.parameters()) for block in specialist.body]
        count = [*frozen, False].index(False)
    if not count:
        yield
        return
    assert isinstance(specialist, RRDBNet)
    assert isinstance(generalist, RRDBNet)
    found: list[torch.Tensor] = []
    hook = specialist.body[count - 1].register_forward_hook(lambda module, given, output: found.append(output))
    whole = generalist.body
    generalist.body = nn.Sequential(_Output(found), *whole[count:])
    try:
        yield
    finally:
        hook.remove()
        generalist.body = whole


class _Output(nn.Module):
    """Returns the last output that was kept, for any input."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept[-1]


def check_channels(model: SRModel, reference: str) -> None:
    """Raise InputError unless `model`, which the user named `reference`, is from RGB to RGB or from gray to gray."""
    if (model.in_channels, model.out_channels) not in ((3, 3), (1, 1)):
        raise InputError(
            f"{reference}: the model has {model.in_channels} input and {model.out_channels} output channels",
            "adapt trains models from RGB to RGB and from gray to gray.",
        )


def check_trainable(model: SRModel, reference: str, runtime: Runtime) -> None:
    """Raise InputError unless `model` has suitable channels and a training step on a small image gives gradients.

    The step is made on the CPU, in the precision of `runtime` if that is a CPU.
    """
    check_channels(model, reference)
    if not any(parameter.numel() for parameter in model.module.parameters()):
        raise InputError(f"{reference}: {model.architecture} has no trainable parameters")
    image = torch.linspace(0, 1, 3 * _SIDE * _SIDE).view(1, 3, _SIDE, _SIDE)
    autocast = runtime.autocast() if runtime.device_type == "cpu" else contextlib.nullcontext()
    try:
        trial = replace(model, module=training_mode(copy.deepcopy(model.module)).requires_grad_(True))
        with autocast:
            sr = trial.upscale(image)
        sr.float().square().mean().backward()
    except Exception as error:  # networks raise all kinds
        if is_out_of_memory(error):
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = _HINT if runtime.precision == "fp32" else f"Try --precision fp32. Else: {_HINT}"
        raise InputError(
            f"{reference}: {model.architecture} can't be trained: a step on a small image fails ({why})", hint
        ) from error
    gradients = [parameter.grad for parameter in trial.module.parameters() if parameter.grad is not None]
    if not any(gradient.any() for gradient in gradients):
        raise InputError(f"{reference}: {model.architecture} can't be trained: no gradient reaches its weights", _HINT)
    if not all(gradient.isfinite().all() for gradient in gradients):
        why = "its gradient is not finite"
        raise InputError(f"{reference}: {model.architecture} can't be trained: {why}", "Its weights may be damaged.")
