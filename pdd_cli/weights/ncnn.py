"""Reads and writes ncnn models (`.param`: layers as text, `.bin`: weights) of RRDBNet and SRVGGNetCompact.

For each Convolution of the `.param`, in order, the `.bin` has a uint32 flag (0x01306B47: fp16, 0: fp32), the weights
(out, in, kh, kw) padded to a multiple of 4 bytes, and fp32 biases. For a PReLU it has only fp32 slopes. The order of
the layers, and their names in PyTorch, are those of the network's `Wiring`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pdd_cli.errors import InputError
from pdd_cli.weights.wiring import LEAKY_SLOPE, Convolution, RRDBNetSize, Wiring, compact_wiring, rrdbnet_wiring

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = "7767517"
_OTHER = (
    "pdd converts only RRDBNet and SRVGGNetCompact from ncnn. For other networks use the original .pth or .safetensors."
)
_FP16 = 0x01306B47
_TYPES: dict[int, np.dtype[np.float16] | np.dtype[np.float32]] = {_FP16: np.dtype("<f2"), 0: np.dtype("<f4")}
# Layers without weights.
_WITHOUT_WEIGHTS = {
    "Input", "Split", "Concat", "ReLU", "BinaryOp", "Eltwise", "Interp", "PixelShuffle", "Reorg", "Crop", "Padding",
    "Noop",
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
    if re.search(r"^Interp\s.*\s1=0?\.\d|^Interp\s.*\s1=\d\.\d+e-", param, re.MULTILINE):
        raise InputError(
            f"{origin}: the model reduces its own output, as realesr-animevideov3-x2 and -x3 do",
            "Use the files of the x4 model, with --scale 2 or 3.",
        )
    convert = compact_state if any(layer.kind == "PReLU" for layer in layers) else rrdbnet_state
    return convert(layers, origin=origin)


def rrdbnet_state(layers: Sequence[Layer], *, origin: str) -> dict[str, Tensor]:
    """The tensors of an RRDBNet with Real-ESRGAN's names. Raises InputError for the layers of another network."""
    blocks, rest = divmod(len(layers) - 6, 15)
    if blocks < 1 or rest or any(layer.kind != "Convolution" for layer in layers):
        raise InputError(f"{origin}: not an RRDBNet", _OTHER)
    (features, inputs), growth, outputs = layers[0].weight.shape[:2], len(layers[1].weight), len(layers[-1].weight)
    size = RRDBNetSize(outputs, outputs, features, growth, blocks, math.isqrt(max(inputs // outputs, 1)))
    return _named(rrdbnet_wiring(size).modules, layers)


def compact_state(layers: Sequence[Layer], *, origin: str) -> dict[str, Tensor]:
    """The tensors of an SRVGGNetCompact with Real-ESRGAN's names. Raises InputError for layers of another network."""
    kinds = [layer.kind for layer in layers]
    if len(kinds) < 3 or kinds != ["Convolution", "PReLU"] * (len(kinds) // 2) + ["Convolution"]:
        raise InputError(f"{origin}: not an SRVGGNetCompact", _OTHER)
    (features, inputs), outputs = layers[0].weight.shape[:2], len(layers[-1].weight)
    wiring = compact_wiring(inputs, outputs, features, len(layers) - 1)
    if wiring is None:
        raise InputError(f"{origin}: not an SRVGGNetCompact", _OTHER)
    return _named(wiring.modules, layers)


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


@dataclass(frozen=True)
class _Line:
    """A layer of the `.param`, which reads and writes blobs by name."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: str = ""

    def __str__(self) -> str:
        counts = f"{len(self.inputs)} {len(self.outputs)}"
        words = (f"{self.kind:<16} {self.name:<24} {counts}", *self.inputs, *self.outputs, self.settings)
        return " ".join(word for word in words if word)


def write_network(
    wiring: Wiring, state: Mapping[str, npt.NDArray[np.float32]], *, half: bool = True
) -> tuple[str, bytes]:
    """The `.param` and `.bin` of the network, whose input is the blob `data` and whose output is `output`.

    Weights are stored in fp16 (unless `half` is false), biases and slopes in fp32; this is how Real-ESRGAN's ncnn
    models are published. Raises InputError for weights beyond the range of fp16 (65504).
    """
    *lines, last = _lines(wiring)
    lines = _with_splits([*lines, replace(last, outputs=("output",))])
    blobs = sum(len(line.outputs) for line in lines)
    param = "\n".join([_MAGIC, f"{len(lines)} {blobs}", *map(str, lines)]) + "\n"
    data = bytearray()
    for module in wiring.modules:
        weight = state[f"{module}.weight"]
        if weight.ndim == 1:  # a PReLU
            data += weight.astype("<f4").tobytes()
            continue
        if not half:
            data += bytes(4) + weight.astype("<f4").tobytes() + state[f"{module}.bias"].astype("<f4").tobytes()
            continue
        if np.abs(weight).max() > np.finfo(np.float16).max:
            raise InputError(f"{module}.weight has values beyond the range of fp16, which pdd uses in ncnn files")
        values = weight.astype("<f2").tobytes()
        data += _FP16.to_bytes(4, "little") + values + bytes(-len(values) % 4)
        data += state[f"{module}.bias"].astype("<f4").tobytes()
    return param, bytes(data)


@dataclass(frozen=True)
class _Blob:
    name: str
    channels: int


def _lines(wiring: Wiring) -> Iterator[_Line]:
    """The layers in the order of `wiring`; a blob may be read several times.

    A feature map that several layers write, one group of channels each, is a list of blobs; where it is read as one,
    they are concatenated.
    """
    maps: dict[str, list[_Blob]] = {}
    yield _Line("Input", "data", (), ("data",))
    x = "data"
    if wiring.pixel_unshuffle > 1:
        x = "unshuffled"
        yield _Line("Reorg", x, ("data",), (x,), f"0={wiring.pixel_unshuffle}")
    maps["input"] = [_Blob(x, wiring.maps["input"].channels)]
    computed: dict[str, str] = {}  # key of a convolution → its blob; RRDBNet's first one writes two maps
    for layer in wiring.layers:
        if layer.key not in computed:
            for line in _convolution(layer, maps):
                yield line
            computed[layer.key] = line.outputs[0]
        kept = [blob for blob in maps.get(layer.out, []) if layer.offset]
        maps[layer.out] = [*_first(kept, layer.offset), _Blob(computed[layer.key], layer.outputs)]
    (last,) = maps["output"]
    yield from _tail(wiring, last.name)


def _convolution(layer: Convolution, maps: Mapping[str, list[_Blob]]) -> Iterator[_Line]:
    """The convolution and what belongs to it; the last line gives its result."""
    key = layer.key
    read = tuple(blob.name for blob in _first(maps[layer.x], layer.inputs))
    x = read[0]
    if len(read) > 1:
        x = f"{key}.concat"
        yield _Line("Concat", x, read, (x,))
    if layer.upsample:
        yield _Line("Interp", f"{key}.upsample", (x,), (f"{key}.upsample",), _nearest(2))
        x = f"{key}.upsample"
    settings = f"0={layer.outputs} 1=3 4=1 5=1 6={9 * layer.inputs * layer.outputs}"
    if layer.slope == LEAKY_SLOPE:
        settings += f" 9=2 -23310=1,{LEAKY_SLOPE:e}"
    yield _Line("Convolution", key, (x,), (key,), settings)
    out = key
    if isinstance(layer.slope, str):
        out = layer.slope.removesuffix(".weight")
        yield _Line("PReLU", out, (key,), (out,), f"0={layer.outputs}")
    for number, residual in enumerate(layer.residuals, 1):
        (added,) = _first(maps[residual], layer.outputs)
        name = f"{key}.add{number}"
        yield _Line("Eltwise", name, (out, added.name), (name,), f"0=1 -23301=2,{layer.residual_scale:e},{1:e}")
        out = name


def _tail(wiring: Wiring, last: str) -> Iterator[_Line]:
    """The layers after the last convolution, which gives the blob `last`."""
    scale = wiring.pixel_shuffle
    if scale > 1:
        yield _Line("PixelShuffle", "shuffled", (last,), ("shuffled",), f"0={scale}")
        last = "shuffled"
    if wiring.global_residual:
        enlarged = "data"
        if scale > 1:
            enlarged = "enlarged"
            yield _Line("Interp", enlarged, ("data",), (enlarged,), _nearest(scale))
        yield _Line("BinaryOp", "output", (last, enlarged), ("output",), "0=0")


def _nearest(factor: int) -> str:
    return f"0=1 1={factor:e} 2={factor:e}"


def _first(blobs: Sequence[_Blob], channels: int) -> list[_Blob]:
    """The blobs that make up the first `channels` channels of a feature map."""
    found = []
    for blob in blobs:
        if channels > 0:
            found.append(blob)
            channels -= blob.channels
    return found


def _with_splits(lines: Sequence[_Line]) -> list[_Line]:
    """`lines` with a Split after each blob that several layers read, because in ncnn a blob has one reader."""
    readers = Counter(name for line in lines for name in line.inputs)
    copies = {name: _copies(name, count) for name, count in readers.items() if count > 1}
    unread = {name: iter(parts) for name, parts in copies.items()}
    result = []
    for line in lines:
        result.append(
            replace(line, inputs=tuple(next(unread[name]) if name in unread else name for name in line.inputs))
        )
        for name in line.outputs:
            if name in copies:
                result.append(_Line("Split", f"{name}.split", (name,), copies[name]))
    return result


def _copies(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}.{number}" for number in range(count))
