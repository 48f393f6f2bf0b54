"""The interface of an engine, and what a conversion to an engine's own form gives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from pdd_cli.imaging.image import Array
from pdd_cli.models.traits import ModelSpec
from pdd_cli.runtime import Runtime

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel

FloatArray = npt.NDArray[np.float32]


class Engine(Protocol):
    """Computes the forward pass of one model. `run` and `run_rounded` raise OutOfMemory."""

    name: str
    runtime: Runtime

    @property
    def model(self) -> ModelSpec: ...

    @property
    def weights_sha256(self) -> str:
        """By `state_sha256`: equal for equal weights, in whatever file they are."""
        ...

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of fp32 activations that a forward pass holds at once, per LR pixel: an estimate."""
        ...

    @property
    def batch_pixels(self) -> int:
        """LR pixels up to which several small images at once are faster than one after the other."""
        ...

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        """(N, in_channels, h, w) in 0..1 to (N, out_channels, h*scale, w*scale); `exact` computes in fp32.

        In memory the channels of the result lie next to each other, as they do in pictures.
        """
        ...

    def run_rounded(self, lr: Array) -> Array | None:
        """(N, h, w, in_channels) of 8 or 16 bits to (N, h*scale, w*scale, out_channels) of the same, clipped.

        None where a value isn't finite. Rounded on the device, which saves memory, time and most of the way back.
        """
        ...

    def close(self) -> None:
        """End its threads and free its memory. Afterwards it computes nothing more; its attributes stay."""
        ...


@dataclass(frozen=True, eq=False)
class Usable:
    """A network in an engine's own form, `exported`, which computes what PyTorch does."""

    spec: ModelSpec
    weights_sha256: str
    bytes_per_pixel: int
    exported: bytes


@dataclass(frozen=True)
class Unfit:
    """An engine has no form of a network, or its form computes something else."""

    reason: str


def spec_of(model: SRModel) -> ModelSpec:
    return ModelSpec(**{field.name: getattr(model, field.name) for field in fields(ModelSpec)})
