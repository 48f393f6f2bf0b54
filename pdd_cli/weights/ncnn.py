"""Converts ncnn models (`.param`: layers as text, `.bin`: weights) to tensors with the names of the PyTorch network.

For each Convolution of the `.param`, in order, the `.bin` has a uint32 flag (0x01306B47: fp16, 0: fp32), the weights
(out, in, kh, kw) padded to a multiple of 4 bytes, and fp32 biases. For a PReLU it has only fp32 slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pdd_cli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = "7767517"
_OTHER = (
    "pdd converts only RRDBNet and SRVGGNetCompact from ncnn. For other networks use the original .pth or .safetensors."
)
_TYPES: dict[int, np.dtype[np.float16] | np.dtype[np.float32]] = {0x01306B47: np.dtype("<f2"), 0: np.dtype("<f4")}
# Layers without weights.
_WITHOUT_WEIGHTS = {
    "Input", "Split", "Concat", "ReLU", "BinaryOp", "Eltwise", "Interp", "PixelShuffle", "Crop", "Padding", "Noop",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with weights: a Convolution has weights (out, in, kh, kw) and biases (out), a PReLU slopes (channels)."""

    kind: str
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None = None


def read_layers(param: str, data: bytes, *, origin: str) -> list[Layer]:
    """The layers with weights, in order. Raises InputError if the two files don't belong together or are damaged."""
    lines = param.split("\n")
    if lines[0].strip() != _MAGIC:
        raise InputError(f"{origin}: not an ncnn .param file")
    reader = _Reader(data, origin)
    layers = []
    for line in lines[2:]:
        kind, *words = line.split() or ["Noop"]
        if kind in _WITHOUT_WEIGHTS:
            continue
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        try:
            number = {key: int(settings.get(key, 0)) for key in ("0", "1", "5", "6", "11")}
        except ValueError:
            raise InputError(f"{origin}: can't read its layer {line!r}") from None
        if kind == "Convolution":
            out, width, height = number["0"], number["1"], number["11"] or number["1"]
            if out < 1 or width < 1 or number["6"] % (out * width * height):
                raise InputError(f"{origin}: can't read its layer {line!r}")
            weight = reader.tagged(number["6"]).reshape(out, -1, height, width)
            layers.append(Layer(kind, weight, reader.plain(out) if number["5"] else None))
        elif kind == "PReLU":
            layers.append(Layer(kind, reader.plain(number["0"])))
        else:
            raise InputError(f"{origin}: an ncnn model with an unsupported layer ({kind})", _OTHER)
    reader.finish()
    return layers


def read_state(param: str, data: bytes, *, origin: str) -> dict[str, Tensor]:
    """The tensors with the names of the PyTorch network. Raises InputError for networks other than these two."""
    layers = read_layers(param, data, origin=origin)
    convert = compact_state if any(layer.kind == "PReLU" for layer in layers) else rrdbnet_state
    return convert(layers, origin=origin)


def rrdbnet_state(layers: Sequence[Layer], *, origin: str) -> dict[str, Tensor]:
    """The tensors of an RRDBNet with Real-ESRGAN's names. Raises InputError for the layers of another network."""
    blocks, rest = divmod(len(layers) - 6, 15)
    if blocks < 1 or rest or any(layer.kind != "Convolution" for layer in layers):
        raise InputError(f"{origin}: not an RRDBNet", _OTHER)
    dense = [f"body.{b}.rdb{r}.conv{c}" for b in range(blocks) for r in (1, 2, 3) for c in (1, 2, 3, 4, 5)]
    return _named(["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"], layers)


def compact_state(layers: Sequence[Layer], *, origin: str) -> dict[str, Tensor]:
    """The tensors of an SRVGGNetCompact with Real-ESRGAN's names. Raises InputError for layers of another network."""
    kinds = [layer.kind for layer in layers]
    if len(kinds) < 3 or kinds != ["Convolution", "PReLU"] * (len(kinds) // 2) + ["Convolution"]:
        raise InputError(f"{origin}: not an SRVGGNetCompact", _OTHER)
    return _named([f"body.{index}" for index in range(len(layers))], layers)


def _named(names: Sequence[str], layers: Sequence[Layer]) -> dict[str, Tensor]:
    import torch

    state = {}
    for name, layer in zip(names, layers, strict=True):
        state[f"{name}.weight"] = torch.from_numpy(layer.weight.copy())
        if layer.bias is not None:
            state[f"{name}.bias"] = torch.from_numpy(layer.bias.copy())
    return state


class _Reader:
    def __init__(self, data: bytes, origin: str) -> None:
        self._data, self._origin, self._at = data, origin, 0

    def tagged(self, count: int) -> npt.NDArray[np.float32]:
        """Read a flag and then `count` values of the type that the flag names."""
        flag = int.from_bytes(self._take(4), "little")
        if flag not in _TYPES:
            raise InputError(f"{self._origin}: weights of a type that pdd can't convert (flag {flag:#010x})")
        dtype = _TYPES[flag]
        values = np.asarray(np.frombuffer(self._take(count * dtype.itemsize), dtype), np.float32)
        self._take(-count * dtype.itemsize % 4)
        return values

    def plain(self, count: int) -> npt.NDArray[np.float32]:
        return np.frombuffer(self._take(4 * count), "<f4").astype(np.float32)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise InputError(f"{self._origin}: {len(self._data) - self._at} bytes more than its layers need")

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) < size:
            raise InputError(f"{self._origin}: truncated")
        self._at += size
        return piece
