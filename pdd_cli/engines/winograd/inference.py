"""Networks of 3x3 convolutions on a CPU by Winograd's algorithm, in fp32.

`kernel.py` computes the layers of a network (`weights/wiring.py`) one after the other. The maps of a dense block share
one array: each convolution reads its first channels and writes the following ones, so nothing is concatenated. The
last layers, at full size, are computed in strips.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdd_cli.engines.winograd.kernel import (
    BLOCK,
    FIELDS,
    GAP,
    PLACES,
    SCRATCH,
    TILE,
    Kernel,
    pause_address,
    tiles_along,
)
from pdd_cli.runtime import usable_cpus
from pdd_cli.weights.wiring import Convolution, Wiring

FloatArray = npt.NDArray[np.float32]

_STRIP = 1 << 26  # maximum bytes of a strip of a full-size map


@dataclass(frozen=True, eq=False)
class _Layer:
    """A convolution with channels padded for the kernel: `inputs` to whole blocks, `outputs` to whole groups."""

    convolution: Convolution
    inputs: int
    outputs: int
    addresses: dict[str, int]  # of weight (36, outputs / group, inputs, group), bias, slope

    @property
    def size(self) -> int:
        """Number of floats of weight, bias and slope."""
        return (PLACES * self.inputs + 2) * self.outputs


@dataclass(frozen=True, eq=False)
class _Pass:
    """A kernel program of successive layers, and the rows that it computes of the maps in strips."""

    program: npt.NDArray[np.int64]
    spans: Mapping[str, tuple[int, int]]


class Network:
    """The forward pass of a network.

    `state`: the tensors that `wiring` names, fp32. Raises ValueError for unsupported numbers of channels, MemoryError.
    """

    def __init__(self, wiring: Wiring, state: Mapping[str, FloatArray], kernel: Kernel, *, threads: int | None = None):
        if any(layer.offset % BLOCK for layer in wiring.layers):
            raise ValueError(f"its numbers of channels are not multiples of {BLOCK}")
        self._wiring, self._kernel = wiring, kernel
        self._threads = threads or usable_cpus()
        self._pool = ThreadPoolExecutor(self._threads, "winograd")
        group = kernel.shape.group
        self._layers = [
            _Layer(layer, _blocks(layer.inputs) * BLOCK, -(-layer.outputs // group) * group, {})
            for layer in wiring.layers
        ]
        # The layers at full size, where that is larger than the input's, are computed in strips.
        scale = wiring.maps["output"].scale
        tail = [layer for layer in wiring.layers if wiring.maps[layer.out].scale == scale > 1]
        self._tail = len(tail)
        self._strips = {layer.out for layer in tail[:-1]}
        self._transform_weights(state)
        self._scratch = [_memory(self._most_scratch()) for _ in range(self._threads)]
        self._arena = np.empty(0, np.float32)
        self._found: dict[str, FloatArray] = {}
        self._passes: list[_Pass] = []
        self._size = (0, 0)

    def close(self) -> None:
        """End the threads and free the memory. Calling the network afterwards raises RuntimeError."""
        self._pool.shutdown()
        self._weights = self._arena = np.empty(0, np.float32)
        self._scratch, self._found, self._passes = [], {}, []

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of the feature maps that aren't computed in strips, per LR pixel."""
        whole = [a_map for name, a_map in self._wiring.maps.items() if name not in self._strips]
        return sum(4 * a_map.scale**2 * _blocks(a_map.channels) * BLOCK for a_map in whole)

    def __call__(self, lr: FloatArray) -> FloatArray:
        """Upscale (h, w, C) in 0..1 to (h*scale, w*scale, C), not clipped. The next call overwrites the result.

        h and w must be multiples of the network's `size_multiple`.
        """
        lr = _unshuffled(lr, self._wiring.pixel_unshuffle)
        height, width = lr.shape[:2]
        if (height, width) != self._size:
            self._allocate(height, width)
        for block, channels in zip(_interior(self._found["input"], height, width), _channel_blocks(lr), strict=True):
            block[..., : channels.shape[2]] = channels
        for one in self._passes:
            for name, (first, end) in one.spans.items():
                self._found[name][:, end - first + 1 :] = 0  # remains of the previous pass
            self._compute(one)
        return self._finish(lr, self._found["output"])

    # Weights.

    def _transform_weights(self, state: Mapping[str, FloatArray]) -> None:
        """Store the transformed weights, the biases and the slopes of all layers in one array."""
        ends = np.cumsum([layer.size for layer in self._layers])
        whole = _memory(4 * int(ends[-1]))

        def fill(layer: _Layer, end: int) -> None:
            convolution = layer.convolution
            weight, bias, slope = np.split(
                whole[end - layer.size : end], [layer.size - 2 * layer.outputs, layer.size - layer.outputs]
            )
            bias[: convolution.outputs] = state[f"{convolution.key}.bias"]
            value = convolution.slope
            slope[: convolution.outputs] = state[value] if isinstance(value, str) else value
            taps = np.zeros((9, layer.inputs, layer.outputs), np.float32)
            taps[:, : convolution.inputs, : convolution.outputs] = (
                state[f"{convolution.key}.weight"]
                .reshape(convolution.outputs, convolution.inputs, 9)
                .transpose(2, 1, 0)
            )
            self._kernel.transform(taps.ctypes.data, layer.inputs, layer.outputs, weight.ctypes.data)
            layer.addresses.update(weight=weight.ctypes.data, bias=bias.ctypes.data, slope=slope.ctypes.data)

        list(self._pool.map(fill, self._layers, ends))
        self._weights = whole

    def _finish(self, lr: FloatArray, out: FloatArray) -> FloatArray:
        """The network's output, from the map of its last layer."""
        height, width = lr.shape[:2]
        scale, channels = self._wiring.maps["output"].scale, self._wiring.maps["output"].channels
        found = _interior(out, height * scale, width * scale)
        if not self._wiring.global_residual:
            return found[0, ..., :channels]
        scale = self._wiring.pixel_shuffle
        colours = channels // scale**2
        sr = np.empty((height, scale, width, scale, colours), np.float32)

        rows = max(1, SCRATCH // (4 * channels * width))  # that fit a thread's cache

        def shuffle(first: int) -> None:
            part = slice(first, first + rows)
            for channel in range(channels):
                colour, place = divmod(channel, scale**2)
                values = found[channel // BLOCK, part, :, channel % BLOCK]
                np.add(values, lr[part, :, colour], out=sr[part, place // scale, :, place % scale, colour])

        list(self._pool.map(shuffle, range(0, height, rows)))
        return sr.reshape(height * scale, width * scale, colours)

    # Memory.

    def _allocate(self, height: int, width: int) -> None:
        """Allocate the maps for an input of this size, in one array that is reused, and write the programs for them."""
        maps = self._wiring.maps
        row = max((4 * width * maps[name].scale * maps[name].channels for name in self._strips), default=1)
        strip = max(64, _STRIP // row // 2 * 2)
        shapes = {}
        for name, a_map in maps.items():
            high, wide = height * a_map.scale, width * a_map.scale
            high = min(high, strip + 2 * self._tail) if name in self._strips else high
            shapes[name] = (_blocks(a_map.channels), tiles_along(high) * TILE + 2, tiles_along(wide) * TILE + 2, BLOCK)
        sizes = [math.prod(shape) for shape in shapes.values()]
        if sum(sizes) > self._arena.size:
            self._found = {}
            self._arena = np.empty(0, np.float32)  # freed before the new one is allocated
            self._arena = _memory(4 * sum(sizes))
        self._found = {
            name: self._arena[end - size : end].reshape(shape)
            for (name, shape), size, end in zip(shapes.items(), sizes, np.cumsum(sizes), strict=True)
        }
        for name, found in self._found.items():
            below = found.shape[1] if name in self._strips else height * maps[name].scale + 1
            for border in (found[:, 0], found[:, below:], found[:, :, 0], found[:, :, width * maps[name].scale + 1 :]):
                border[:] = 0
        self._found["input"][:] = 0  # not all of its channels are written
        self._passes = [self._pass(self._layers[: len(self._layers) - self._tail], height, width)]
        last = height * maps["output"].scale
        for first in range(0, last if self._tail else 0, strip):
            # Each layer needs one more row above and below than the next one.
            low, high, spans = first, min(first + strip, last), {}
            for layer in reversed(self._layers[-self._tail :]):
                spans[layer.convolution.out] = low, high
                low, high = max(low - 1, 0), min(high + 1, last)
            self._passes.append(self._pass(self._layers[-self._tail :], height, width, spans))
        self._size = (height, width)

    def _pass(
        self, layers: Sequence[_Layer], height: int, width: int, spans: Mapping[str, tuple[int, int]] | None = None
    ) -> _Pass:
        """The program of `layers` for an input of this size; `spans`: rows to compute of the maps that are in it."""
        spans = spans or {}
        rows = [self._row(layer, height, width, spans) for layer in layers]
        return _Pass(np.array(rows, np.int64), {name: span for name, span in spans.items() if name in self._strips})

    def _row(self, layer: _Layer, height: int, width: int, spans: Mapping[str, tuple[int, int]]) -> list[int]:
        """The row of a program that computes `layer`."""
        convolution = layer.convolution
        scale = self._wiring.maps[convolution.out].scale
        width *= scale
        first, end = spans.get(convolution.out, (0, height * scale))

        def origin(name: str) -> int:
            """The row of the image that is the first one in a map."""
            return spans[name][0] if name in self._strips else 0

        x, out = self._found[convolution.x], self._found[convolution.out]
        residual1, residual2 = (*(self._found[name] for name in convolution.residuals), out, out)[:2]
        values = layer.addresses | {
            "height": end - first,
            "width": width,
            "columns": tiles_along(width),
            "tiles": tiles_along(end - first) * tiles_along(width),
            "tiles_per_batch": self._kernel.shape.tiles_per_batch(layer.inputs, layer.outputs),
            "inputs": layer.inputs,
            "outputs": layer.outputs,
            "stored": _blocks(convolution.outputs) * BLOCK,
            "upsample_log2": int(convolution.upsample),
            "residuals": len(convolution.residuals),
            "residual_scale": int(np.float32(convolution.residual_scale).view(np.uint32)),
        }
        for name, found in (("x", x), ("residual1", residual1), ("residual2", residual2), ("out", out)):
            values |= {name: found.ctypes.data, f"{name}_plane": found[0].size, f"{name}_row": found[0, 0].size}
        values["x"] = x[:, (first >> convolution.upsample) - origin(convolution.x) :].ctypes.data
        values["out"] = out[convolution.offset // BLOCK :, first - origin(convolution.out) :].ctypes.data
        return [values[name] for name in FIELDS]

    def _most_scratch(self) -> int:
        """Bytes of a thread's scratch memory."""
        shape = self._kernel.shape
        tiles = (
            shape.tiles_per_batch(layer.inputs, layer.outputs) * (layer.inputs + layer.outputs)
            for layer in self._layers
        )
        return 4 * PLACES * (2 * GAP + max(tiles))

    def _compute(self, one: _Pass) -> None:
        sync = np.zeros(1 + 2 * len(one.program), np.int64)

        def compute(scratch: FloatArray) -> None:
            # The closure keeps all memory alive, even after an interrupted caller has dropped the network.
            addresses = (one.program.ctypes.data, len(one.program), sync.ctypes.data, scratch.ctypes.data)
            self._kernel(*addresses, self._threads, pause_address())

        work: list[Future[None]] = []
        try:
            work.extend(self._pool.submit(compute, scratch) for scratch in self._scratch)
            # Short waits, so that Python can handle Ctrl-C in between.
            waiting = set(work)
            while waiting:
                done, waiting = wait(waiting, timeout=0.1)
                for ended in done:
                    ended.result()
        except BaseException:
            sync[0] = 1
            wait(work)
            raise


def _blocks(channels: int) -> int:
    return int(-(-channels // BLOCK))


def _interior(a_map: FloatArray, height: int, width: int) -> FloatArray:
    return a_map[:, 1 : height + 1, 1 : width + 1]


def _channel_blocks(pixels: FloatArray) -> list[FloatArray]:
    """Split (h, w, C) into blocks of channels."""
    return np.split(pixels, range(BLOCK, pixels.shape[2], BLOCK), axis=2)


def _unshuffled(lr: FloatArray, by: int) -> FloatArray:
    """(h, w, C) to (h / by, w / by, C * by * by), as PyTorch's pixel_unshuffle orders channels."""
    if by == 1:
        return lr
    height, width, channels = lr.shape
    parts = lr.reshape(height // by, by, width // by, by, channels)
    return parts.transpose(0, 2, 4, 1, 3).reshape(height // by, width // by, -1)


def _memory(size: int) -> FloatArray:
    """Allocate `size` bytes of zeros, page-aligned, in huge pages where the system has them. Raises MemoryError."""
    try:
        pages = mmap.mmap(-1, max(size, 1))
    except OSError as error:
        raise MemoryError(f"{size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE") and size > 1 << 21:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.float32, size // 4)
