"""The interface of an engine, and the result of converting a model to an engine's own format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pdd_cli.imaging.image import Array, from_float
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
        """The `state_sha256` of the weights: equal for equal weights, whatever the file format."""
        ...

    @property
    def bytes_per_pixel(self) -> int:
        """Estimated peak memory of the fp32 activations of a forward pass, in bytes per LR pixel."""
        ...

    @property
    def batch_pixels(self) -> int:
        """Number of LR pixels in a batch up to which batching small images is faster than computing them singly."""
        ...

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        """Upscale (N, in_channels, h, w) in 0..1 to (N, out_channels, h*scale, w*scale), not clipped.

        With `exact` it computes in fp32. The result is channels-last in memory, as images are.
        """
        ...

    def run_rounded(self, lr: Array) -> Array | None:
        """Upscale (N, h, w, in_channels), uint8 or uint16, to (N, h*scale, w*scale, out_channels) of the same type.

        Values are clipped. Returns None if a value isn't finite. Rounding on the device saves memory and transfers.
        """
        ...

    def close(self) -> None:
        """End the threads and free the memory. Only the attributes can be used afterwards."""
        ...


@dataclass(frozen=True, eq=False)
class Usable:
    """A network in an engine's own format, `exported`, that agrees with PyTorch."""

    spec: ModelSpec
    weights_sha256: str
    bytes_per_pixel: int
    exported: bytes


@dataclass(frozen=True)
class Unfit:
    """An engine can't compute a network, or its results differ from PyTorch's."""

    reason: str


def spec_of(model: SRModel) -> ModelSpec:
    return ModelSpec(**{field.name: getattr(model, field.name) for field in fields(ModelSpec)})


def pad_to_size(lr: FloatArray, spec: ModelSpec) -> FloatArray:
    """(…, h, w), padded at the bottom and right by replication to a size that the network takes."""
    height, width = lr.shape[-2:]
    bottom, right = spec.padding(height, width)
    if not bottom and not right:
        return lr
    return np.pad(lr, (*(((0, 0),) * (lr.ndim - 2)), (0, bottom), (0, right)), mode="edge")


def round_images(images: Iterable[FloatArray], dtype: np.dtype[Any]) -> Array | None:
    """Images (C, H, W) in 0..1 as (N, H, W, C) in uint8 or uint16; None if a value isn't finite."""
    rounded = []
    for planes in images:
        image = np.empty((*planes.shape[1:], len(planes)), dtype)
        try:
            for channel, plane in enumerate(planes):
                image[..., channel] = from_float(plane, 8 * dtype.itemsize)
        except ValueError:
            return None
        rounded.append(image)
    return np.stack(rounded)
