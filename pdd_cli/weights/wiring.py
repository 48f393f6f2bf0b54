"""The wiring of RRDBNet and SRVGGNetCompact: their feature maps, and the 3x3 convolutions from map to map.

Engines compute these networks from this description and the tensors that it names; `ncnn` reads and writes files with
it. It doesn't import PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

LEAKY_SLOPE = 0.2
"""RRDBNet's leaky ReLU multiplies negative values by this."""
RESIDUAL_SCALE = 0.2
"""RRDBNet's residual blocks multiply their result by this before they add their input."""


class Shaped(Protocol):
    """A tensor of PyTorch or NumPy."""

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution with bias, an activation and up to two residuals.

    Attributes:
        key: the tensors are `{key}.weight` (outputs, inputs, 3, 3) and `{key}.bias` (outputs).
        x: the map that is read: its first `inputs` channels.
        out: the map that is written: `outputs` channels from channel `offset`.
        slope: the leaky ReLU's for negative values; 1 is no activation, a key names the slopes (outputs) of a PReLU.
        residuals: maps that are added: residual1 + residual_scale * result, then residual2 + residual_scale * that.
        upsample: x is first enlarged twofold by nearest neighbours.
    """

    key: str
    x: str
    out: str
    inputs: int
    outputs: int
    slope: float | str = 1.0
    offset: int = 0
    residuals: tuple[str, ...] = ()
    residual_scale: float = 1.0
    upsample: bool = False

    @property
    def written(self) -> slice:
        """The channels of `out` that are written."""
        return slice(self.offset, self.offset + self.outputs)


@dataclass(frozen=True)
class FeatureMap:
    """`scale`: height and width as multiples of those of the map "input"."""

    channels: int
    scale: int = 1


@dataclass(frozen=True)
class Wiring:
    """`layers` in the order in which they are computed, and the maps that they name.

    The map "input" is the network's input, pixel-unshuffled. The last layer alone writes the map "output". It is
    pixel-shuffled; with `global_residual` the input, enlarged by nearest neighbours, is added to it.
    """

    maps: Mapping[str, FeatureMap]
    layers: Sequence[Convolution]
    pixel_unshuffle: int = 1
    pixel_shuffle: int = 1
    global_residual: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by key."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            shapes[f"{layer.key}.weight"] = (layer.outputs, layer.inputs, 3, 3)
            shapes[f"{layer.key}.bias"] = (layer.outputs,)
            if isinstance(layer.slope, str):
                shapes[layer.slope] = (layer.outputs,)
        return shapes

    @property
    def modules(self) -> list[str]:
        """The modules that have tensors, convolutions and PReLUs, in the order in which they are computed."""
        names = []
        for layer in self.layers:
            names.append(layer.key)
            if isinstance(layer.slope, str):
                names.append(layer.slope.removesuffix(".weight"))
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class RRDBNetSize:
    """The dimensions of an RRDBNet: `growth` channels are added by each layer of a dense block."""

    in_channels: int
    out_channels: int
    features: int
    growth: int
    blocks: int
    unshuffle: int


def wiring_of(state: Mapping[str, Shaped]) -> Wiring | None:
    """The wiring of the network with these tensors; None for any but an RRDBNet or SRVGGNetCompact with PReLU."""
    size = rrdbnet_size(state)
    wiring = _compact(state) if size is None else rrdbnet_wiring(size)
    if wiring is None or wiring.shapes != {key: tuple(tensor.shape) for key, tensor in state.items()}:
        return None
    return wiring


def rrdbnet_size(state: Mapping[str, Shaped]) -> RRDBNetSize | None:
    """The dimensions of the RRDBNet with these tensors; None where some of them show that it is another network."""
    keys = ("conv_first.weight", "conv_last.weight", "body.0.rdb1.conv1.weight")
    if any(key not in state for key in keys):
        return None
    (features, inputs, *_), (out_channels, *_), (growth, *_) = (state[key].shape for key in keys)
    unshuffle = math.isqrt(inputs // out_channels)
    if unshuffle not in (1, 2, 4) or inputs != out_channels * unshuffle**2:
        return None
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    return RRDBNetSize(out_channels, out_channels, features, growth, blocks, unshuffle)


def dense_block(
    features: int, growth: int, prefix: str = "", x: str = "x", out: str = "out", residuals: tuple[str, ...] = ("x",)
) -> list[Convolution]:
    """A residual dense block: four layers append `growth` channels each to x, the fifth writes `out`."""
    layers = []
    for index in range(4):
        inputs = features + index * growth
        layers.append(Convolution(f"{prefix}conv{index + 1}", x, x, inputs, growth, LEAKY_SLOPE, offset=inputs))
    last = Convolution(
        f"{prefix}conv5", x, out, features + 4 * growth, features, residuals=residuals, residual_scale=RESIDUAL_SCALE
    )
    return [*layers, last]


def rrdbnet_wiring(size: RRDBNetSize) -> Wiring:
    """The wiring of an RRDBNet.

    Source: Wang et al., ESRGAN (2018), figure 4; Real-ESRGAN (2021), figure 4, for pixel-unshuffling.
    """
    features, inputs = size.features, size.in_channels * size.unshuffle**2
    dense = ("dense0", "dense1", "dense2")
    maps = {
        "input": FeatureMap(inputs), "first": FeatureMap(features),
        **dict.fromkeys(dense, FeatureMap(features + 4 * size.growth)),
        "up1": FeatureMap(features, 2), "up2": FeatureMap(features, 4), "hr": FeatureMap(features, 4),
        "output": FeatureMap(size.out_channels, 4),
    }  # fmt: skip
    layers = [Convolution("conv_first", "input", out, inputs, features) for out in ("first", "dense0")]
    for number in range(3 * size.blocks):
        # The dense blocks use three maps in turn. Each third one also adds the input of the first, and replaces it.
        x, out = dense[number % 3], dense[(number + 1) % 3]
        prefix = f"body.{number // 3}.rdb{number % 3 + 1}."
        layers += dense_block(features, size.growth, prefix, x, out, (x, out) if number % 3 == 2 else (x,))
    layers += [
        Convolution("conv_body", "dense0", "dense1", features, features, residuals=("first",)),
        Convolution("conv_up1", "dense1", "up1", features, features, LEAKY_SLOPE, upsample=True),
        Convolution("conv_up2", "up1", "up2", features, features, LEAKY_SLOPE, upsample=True),
        Convolution("conv_hr", "up2", "hr", features, features, LEAKY_SLOPE),
        Convolution("conv_last", "hr", "output", features, size.out_channels),
    ]
    return Wiring(maps, layers, pixel_unshuffle=size.unshuffle)


def _compact(state: Mapping[str, Shaped]) -> Wiring | None:
    last = len({key.rpartition(".")[0] for key in state}) - 1
    ends = [state.get(f"body.{place}.weight") for place in (0, last)]
    shapes = [end.shape for end in ends if end is not None and len(end.shape) == 4]
    if len(shapes) < 2:
        return None
    (features, inputs, *_), (outputs, *_) = shapes
    return compact_wiring(inputs, outputs, features, last)


def compact_wiring(inputs: int, outputs: int, features: int, last: int) -> Wiring | None:
    """The wiring of an SRVGGNetCompact whose last module is `body.{last}`; None if no scale fits the channels.

    Convolutions are at even places of `body`, a PReLU behind all but the last. Source: Real-ESRGAN (2021).
    """
    maps = {
        "input": FeatureMap(inputs), "even": FeatureMap(features), "odd": FeatureMap(features),
        "output": FeatureMap(outputs),
    }  # fmt: skip
    layers, x, channels = [], "input", inputs
    for place in range(0, last, 2):
        out = "odd" if place % 4 else "even"
        layers.append(Convolution(f"body.{place}", x, out, channels, features, f"body.{place + 1}.weight"))
        x, channels = out, features
    layers.append(Convolution(f"body.{last}", x, "output", channels, outputs))
    scale = math.isqrt(outputs // inputs)
    return Wiring(maps, layers, pixel_shuffle=scale, global_residual=True) if outputs == inputs * scale**2 else None
