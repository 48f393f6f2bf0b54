"""Load any super-resolution model from a weights file: RRDBNet by pdd, other networks by spandrel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdd_cli.errors import InputError
from pdd_cli.models.rrdbnet import RRDBNet, rrdbnet_from_state
from pdd_cli.models.traits import ModelSpec
from pdd_cli.weights.states import read_state, state_sha256
from pdd_cli.weights.store import Card, read_card

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor


_LUMA = (0.299, 0.587, 0.114)  # BT.601


@dataclass(frozen=True, eq=False, kw_only=True)
class SRModel(ModelSpec):
    """A super-resolution network with its scale and size requirements.

    `module` maps (N, in_channels, h, w) in 0..1, h and w multiples of `size_multiple` and at least `size_minimum`, to
    (N, out_channels, h*scale, w*scale), nominally 0..1, not clipped.
    """

    module: nn.Module
    card: Card | None = None

    def upscale(self, lr: Tensor) -> Tensor:
        """Upscale (N, C, h, w) of any size to (N, C, h*scale, w*scale), padded by replication if needed.

        A one-channel model upscales the luma of RGB; the result is gray.
        """
        if self.in_channels == 1 and lr.shape[1] == 3:
            weights = torch.tensor(_LUMA, dtype=lr.dtype, device=lr.device).view(1, 3, 1, 1)
            return self.upscale((lr * weights).sum(1, keepdim=True)).repeat(1, 3, 1, 1)
        height, width = lr.shape[-2:]
        bottom, right = self.padding(height, width)
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
        try:
            model = ModelLoader().load_from_state_dict(dict(state))
        except UnsupportedModelError:  # `read_state` removes a prefix that is part of the names of some networks
            model = ModelLoader().load_from_state_dict({f"model.{key}": tensor for key, tensor in state.items()})
    except UnsupportedModelError:
        raise InputError(f"{origin}: not an architecture that pdd or spandrel {_spandrel_version()} knows") from None
    except Exception as error:
        # The keys look like one architecture, but the shapes don't fit.
        raise InputError(f"{origin}: damaged or incomplete weights: {error}") from error
    if not isinstance(model, ImageModelDescriptor) or model.purpose not in ("SR", "Restoration"):
        raise InputError(f"{origin}: a {model.architecture.name} model for {model.purpose}, not for super-resolution")
    needs = model.size_requirements
    return SRModel(
        module=_images_to_images(model).float().eval(),
        scale=model.scale,
        in_channels=model.input_channels,
        out_channels=model.output_channels,
        architecture=model.architecture.name,
        size_multiple=max(needs.multiple_of, 1),
        size_minimum=max(needs.minimum, 1),
        square=needs.square,
        card=card,
    )


# Networks that spandrel calls directly, although they compute one image correctly and not a batch (SeemoRe), change
# their input (RCAN), or draw random numbers (AuraSR).
_NOT_DIRECTLY = {"SeemoRe", "RCAN", "AuraSR"}


def _images_to_images(model: ImageModelDescriptor[nn.Module]) -> nn.Module:
    """The network of `model` as a module from images to images.

    Some networks need more than an image, return more, or compute in another range; spandrel describes this by a
    function of network and image.
    """
    call = model._call_fn
    is_default = call.__module__.endswith(".__helpers.model_descriptor")  # the network itself
    if is_default and model.architecture.id not in _NOT_DIRECTLY:
        network: nn.Module = model.model
        return network
    return _Adapted(model.model, call, contiguous_only=model.architecture.id == "IPT")


class _Adapted(nn.Module):
    """`network` called by `call(network, image)`, which takes batches of one image. The state is that of `network`.

    The input is not changed, and except in training the same input always gives the same output.
    `contiguous_only`: the network fails with tensors that are channels-last (`runtime.to_channels_last`).
    """

    def __init__(
        self, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], *, contiguous_only: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.contiguous_only = contiguous_only
        self._call = call

    def forward(self, images: Tensor) -> Tensor:
        layout = torch.contiguous_format if self.contiguous_only else torch.preserve_format
        sr = [self._one(image.clone(memory_format=layout)) for image in images.split(1)]
        return sr[0] if len(sr) == 1 else torch.cat(sr)

    def _one(self, image: Tensor) -> Tensor:
        if self.training or torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined]
            return self._call(self.network, image)
        with torch.random.fork_rng([image.device] if image.is_cuda else []):
            torch.manual_seed(0)
            return self._call(self.network, image)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)


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
