"""Load any super-resolution model from a weights file: RRDBNet by pdd, other networks by spandrel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdd_cli.errors import InputError
from pdd_cli.models.rrdbnet import RRDBNet, rrdbnet_from_state
from pdd_cli.models.traits import ModelSpec
from pdd_cli.weights.states import read_state, state_sha256
from pdd_cli.weights.store import Card, read_card


@dataclass(frozen=True, eq=False, kw_only=True)
class SRModel(ModelSpec):
    """A super-resolution network with its scale and size requirements.

    `module` maps (N, in_channels, h, w) in 0..1, h and w multiples of `size_multiple` and at least `size_minimum`, to
    (N, out_channels, h*scale, w*scale), nominally 0..1, not clipped.
    """

    module: nn.Module
    card: Card | None = None

    def upscale(self, lr: Tensor) -> Tensor:
        """Upscale (N, C, h, w) of any size to (N, C, h*scale, w*scale), padded by replication if needed."""
        height, width = lr.shape[-2:]
        bottom, right = self.lacking(height), self.lacking(width)
        if bottom or right:
            lr = F.pad(lr, (0, right, 0, bottom), mode="replicate")
        sr: Tensor = self.module(lr)
        return sr[..., : height * self.scale, : width * self.scale]


def load_sr_model(path: Path) -> SRModel:
    """Load the super-resolution model in a weights file, in eval mode on the CPU in fp32.

    Raises InputError if the file isn't a weights file, or neither pdd nor spandrel knows its architecture.
    """
    return model_from_state(read_state(path), origin=str(path), card=read_card(path))


def model_from_state(state: Mapping[str, Tensor], *, origin: str, card: Card | None = None) -> SRModel:
    """The super-resolution model with the tensors `state`. `origin` names them in errors."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"{origin}: {key} holds values that are not finite (NaN or infinity)",
                "The file is damaged, or its training diverged: take an earlier checkpoint.",
            )
        if key.endswith((".weight", ".bias")) and not tensor.is_floating_point():
            raise InputError(
                f"{origin}: quantised weights ({key} is {str(tensor.dtype).removeprefix('torch.')})",
                "pdd needs weights of floating point: take the file that this one was made from.",
            )
    network = rrdbnet_from_state(state)
    if network is not None:
        return SRModel(
            module=network.eval(),
            scale=network.scale,
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            architecture="RRDBNet",
            size_multiple=network.unshuffle,
            size_minimum=network.unshuffle,
            card=card,
        )
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

    try:
        model = ModelLoader().load_from_state_dict(dict(state))
    except UnsupportedModelError:
        raise InputError(f"{origin}: not an architecture that pdd or spandrel {_spandrel_version()} knows") from None
    except Exception as error:
        # The keys look like one architecture, but the shapes don't fit.
        raise InputError(f"{origin}: damaged or incomplete weights: {error}") from error
    if not isinstance(model, ImageModelDescriptor) or model.purpose not in ("SR", "Restoration"):
        raise InputError(f"{origin}: a {model.architecture.name} model for {model.purpose}, not for super-resolution")
    needs = model.size_requirements
    return SRModel(
        module=model.model.float().eval(),
        scale=model.scale,
        in_channels=model.input_channels,
        out_channels=model.output_channels,
        architecture=model.architecture.name,
        size_multiple=max(needs.multiple_of, 1),
        size_minimum=max(needs.minimum, 1),
        card=card,
    )


def stand_in(name: str) -> SRModel:
    """A model that only repeats pixels, with the scale of catalogue weights that aren't installed."""
    from torch import nn, zeros

    from pdd_cli.weights.catalog import find

    entry = find(name)
    module = nn.Upsample(scale_factor=entry.scale or 1)
    module.register_parameter("unused", nn.Parameter(zeros(1)))  # its device is that of the model
    return SRModel(
        module=module, scale=entry.scale or 1, in_channels=3, out_channels=3, architecture=entry.architecture
    )


def interpolated(base: Mapping[str, Tensor], adapted: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """base + strength · (adapted − base) for each floating-point tensor; other tensors are those of `adapted`."""
    return {
        key: torch.lerp(base[key].float(), value.float(), strength) if value.is_floating_point() else value
        for key, value in adapted.items()
    }


def _spandrel_version() -> str:
    from importlib.metadata import version

    return version("spandrel")


__all__ = ["RRDBNet", "SRModel", "interpolated", "load_sr_model", "model_from_state", "state_sha256"]
