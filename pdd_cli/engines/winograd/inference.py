"""Networks of 3x3 convolutions on a CPU by Winograd's algorithm, in fp32.

A network is a list of layers, each of which reads a feature map and writes another; `kernel.py` computes them
one after the other. A dense block is one map: its convolutions read the front of it and write behind that, so that
nothing is concatenated. The last layers, at full size, are computed in strips.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

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

FloatArray = npt.NDArray[np.float32]

_STRIP = 1 << 26  # bytes of a layer at full size that is computed in strips


@dataclass(frozen=True, eq=False)
class _Layer:
    """A convolution by its name, and where it reads and writes: maps by name, `at` in blocks."""

    name: str
    outputs: int
    deep: int  # inputs and outputs as computed: whole blocks, whole products
    wide: int
    slope: Any  # of each output where it is negative
    x: str
    out: str
    at: int = 0
    residuals: tuple[str, ...] = ()
    residual_scale: float = 1.0
    upsample: bool = False
    addresses: dict[str, int] = field(default_factory=dict)  # of weight (36, wide / group, deep, group), bias, slope

    @property
    def size(self) -> int:
        """Floats of weight, bias and slope."""
        return (PLACES * self.deep + 2) * self.wide


@dataclass(frozen=True)
class _Map:
    times: int  # as high and wide as the input
    channels: int
    whole: bool = True  # or some rows of it at a time


@dataclass(frozen=True, eq=False)
class _Pass:
    """Layers one after the other, as the kernel reads them; of the maps that aren't `whole` the rows in `spans`."""

    program: npt.NDArray[np.int64]
    spans: Mapping[str, tuple[int, int]]


class Network:
    """The forward pass of an RRDBNet or SRVGGNetCompact.

    `state`: its tensors by the names of `models.rrdbnet` and of Real-ESRGAN's SRVGGNetCompact, fp32. `scale`: what it
    enlarges by. Raises KeyError or ValueError for the tensors of another network, MemoryError.
    """

    def __init__(self, state: Mapping[str, FloatArray], scale: int, kernel: Kernel, *, threads: int | None = None):
        self._kernel, self._scale = kernel, scale
        self._threads = threads or usable_cpus()
        self._pool = ThreadPoolExecutor(self._threads, "winograd")
        self._layers: list[_Layer] = []
        self._maps: dict[str, _Map] = {}
        if "conv_first.weight" in state:
            self._read_rrdbnet(state)
        else:
            self._read_compact(state)
        self._transform_weights(state)
        self._scratch = [_memory(self._most_scratch()) for _ in range(self._threads)]
        self._arena = np.empty(0, np.float32)
        self._size = (0, 0)

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of the whole feature maps, per LR pixel."""
        whole = [a_map for a_map in self._maps.values() if a_map.whole]
        return sum(4 * a_map.times**2 * _blocks(a_map.channels) * BLOCK for a_map in whole)

    def __call__(self, lr: FloatArray) -> FloatArray:
        """(h, w, C) in 0..1, h and w multiples of what the network needs, to (h*scale, w*scale, C), not clamped.

        The result is overwritten by the next call.
        """
        lr = _unshuffled(lr, self._unshuffle)
        height, width = lr.shape[:2]
        if (height, width) != self._size:
            self._lay_out(height, width)
        for block, channels in zip(_inside(self._found["head"], height, width), _parts(lr), strict=True):
            block[..., : channels.shape[2]] = channels
        for one in self._passes:
            for name, (first, end) in one.spans.items():
                self._found[name][:, end - first + 1 :] = 0  # there may be rows of the pass before
            self._compute(one)
        return self._finish(lr, self._found["out"])

    # Layers to compute.

    def _add(self, state: Mapping[str, FloatArray], name: str, x: str, out: str, slope: Any = 1.0, **more: Any) -> None:
        outputs, inputs, *sides = state[f"{name}.weight"].shape
        if sides != [3, 3]:
            raise ValueError(name)
        group = self._kernel.shape.group
        deep, wide = _blocks(inputs) * BLOCK, -(-outputs // group) * group
        self._layers.append(_Layer(name, outputs, deep, wide, slope, x, out, **more))

    def _transform_weights(self, state: Mapping[str, FloatArray]) -> None:
        """Put the weights, transformed, and biases and slopes of all layers into one piece of memory."""
        ends = np.cumsum([layer.size for layer in self._layers])
        whole = _memory(4 * int(ends[-1]))

        def fill(layer: _Layer, end: int) -> None:
            weight, bias, slope = np.split(
                whole[end - layer.size : end], [layer.size - 2 * layer.wide, layer.size - layer.wide]
            )
            bias[: layer.outputs] = state[f"{layer.name}.bias"]
            slope[: layer.outputs] = layer.slope
            given = state[f"{layer.name}.weight"]
            taps = np.zeros((9, layer.deep, layer.wide), np.float32)
            taps[:, : given.shape[1], : layer.outputs] = given.reshape(*given.shape[:2], 9).transpose(2, 1, 0)
            self._kernel.transform(taps.ctypes.data, layer.deep, layer.wide, weight.ctypes.data)
            layer.addresses.update(weight=weight.ctypes.data, bias=bias.ctypes.data, slope=slope.ctypes.data)

        list(self._pool.map(fill, self._layers, ends))
        self._weights = whole

    def _read_rrdbnet(self, state: Mapping[str, FloatArray]) -> None:
        features, inputs = state["conv_first.weight"].shape[:2]
        growth, outputs = state["body.0.rdb1.conv1.weight"].shape[0], state["conv_last.weight"].shape[0]
        self._unshuffle = math.isqrt(inputs // outputs)
        if features % BLOCK or growth % BLOCK:
            raise ValueError("channels that don't fill a block")
        blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
        dense = ("dense0", "dense1", "dense2")
        self._maps = {
            "head": _Map(1, inputs), "first": _Map(1, features),
            **dict.fromkeys(dense, _Map(1, features + 4 * growth)),
            "half": _Map(2, features), "full": _Map(4, features, whole=False),
            "hr": _Map(4, features, whole=False), "out": _Map(4, outputs),
        }  # fmt: skip
        self._tail = 3
        add = functools.partial(self._add, state)
        add("conv_first", "head", "first")
        add("conv_first", "head", "dense0")
        for number in range(3 * blocks):
            # Three blocks in turn; the third adds the input of the first, and takes its place.
            name = f"body.{number // 3}.rdb{number % 3 + 1}"
            block, after = dense[number % 3], dense[(number + 1) % 3]
            for index in range(4):
                at = (features + index * growth) // BLOCK
                add(f"{name}.conv{index + 1}", block, block, 0.2, at=at)
            residuals = (block, after) if number % 3 == 2 else (block,)
            add(f"{name}.conv5", block, after, residuals=residuals, residual_scale=0.2)
        add("conv_body", "dense0", "dense1", residuals=("first",))
        add("conv_up1", "dense1", "half", 0.2, upsample=True)
        add("conv_up2", "half", "full", 0.2, upsample=True)
        add("conv_hr", "full", "hr", 0.2)
        add("conv_last", "hr", "out")

    def _read_compact(self, state: Mapping[str, FloatArray]) -> None:
        self._unshuffle = 1
        self._tail = 0
        count = 1 + max(int(key.split(".")[1]) for key in state)
        features, inputs = state["body.0.weight"].shape[:2]
        last = f"body.{count - 1}"
        outputs = state[f"{last}.weight"].shape[0]
        self._maps = {
            "head": _Map(1, inputs), "even": _Map(1, features), "odd": _Map(1, features), "out": _Map(1, outputs)
        }  # fmt: skip
        x = "head"
        for index in range(0, count - 1, 2):
            out = "even" if index % 4 == 0 else "odd"
            self._add(state, f"body.{index}", x, out, state[f"body.{index + 1}.weight"])
            x = out
        self._add(state, last, x, "out")

    def _finish(self, lr: FloatArray, out: FloatArray) -> FloatArray:
        """What the network gives, from its last layer's map."""
        height, width = lr.shape[:2]
        times = self._maps["out"].times
        channels = self._maps["out"].channels
        found = _inside(out, height * times, width * times)
        if times > 1:
            return found[0, ..., :channels]
        # The compact network's end: pixels shuffled, and the input enlarged by nearest neighbours added.
        scale, colours = self._scale, channels // self._scale**2
        sr = np.empty((height, scale, width, scale, colours), np.float32)

        rows = max(1, SCRATCH // (4 * channels * width))  # that stay in a thread's cache

        def shuffle(first: int) -> None:
            part = slice(first, first + rows)
            for channel in range(channels):
                colour, place = divmod(channel, scale**2)
                values = found[channel // BLOCK, part, :, channel % BLOCK]
                np.add(values, lr[part, :, colour], out=sr[part, place // scale, :, place % scale, colour])

        list(self._pool.map(shuffle, range(0, height, rows)))
        return sr.reshape(height * scale, width * scale, colours)

    # Memory to compute in.

    def _lay_out(self, height: int, width: int) -> None:
        """The maps for this size, in one piece of memory that is kept, and the passes that refer to them."""
        row = max(
            (4 * width * a_map.times * a_map.channels for a_map in self._maps.values() if not a_map.whole), default=1
        )
        strip = max(64, _STRIP // row // 2 * 2)
        shapes = {}
        for name, a_map in self._maps.items():
            high, wide = height * a_map.times, width * a_map.times
            high = high if a_map.whole else min(high, strip + 2 * self._tail)
            shapes[name] = (_blocks(a_map.channels), tiles_along(high) * TILE + 2, tiles_along(wide) * TILE + 2, BLOCK)
        sizes = [math.prod(shape) for shape in shapes.values()]
        if sum(sizes) > self._arena.size:
            self._found: dict[str, FloatArray] = {}
            self._arena = np.empty(0, np.float32)  # freed before the other is made
            self._arena = _memory(4 * sum(sizes))
        self._found = {
            name: self._arena[end - size : end].reshape(shape)
            for (name, shape), size, end in zip(shapes.items(), sizes, np.cumsum(sizes), strict=True)
        }
        for name, found in self._found.items():
            a_map = self._maps[name]
            below = height * a_map.times + 1 if a_map.whole else found.shape[1]
            for border in (found[:, 0], found[:, below:], found[:, :, 0], found[:, :, width * a_map.times + 1 :]):
                border[:] = 0
        self._found["head"][:] = 0  # its channels aren't all written
        self._passes = [self._pass(self._layers[: len(self._layers) - self._tail], height, width)]
        last = height * self._maps["out"].times
        for first in range(0, last if self._tail else 0, strip):
            # Each layer has one more row above and below than what the next one reads it for.
            low, high, spans = first, min(first + strip, last), {}
            for layer in reversed(self._layers[-self._tail :]):
                spans[layer.out] = low, high
                low, high = max(low - 1, 0), min(high + 1, last)
            self._passes.append(self._pass(self._layers[-self._tail :], height, width, spans))
        self._size = (height, width)

    def _pass(
        self, layers: Sequence[_Layer], height: int, width: int, spans: Mapping[str, tuple[int, int]] | None = None
    ) -> _Pass:
        """`layers` for an input of this size; in `spans`, by the map that they write, of some rows only."""
        spans = spans or {}
        rows = [self._row(layer, height, width, spans) for layer in layers]
        return _Pass(
            np.array(rows, np.int64), {name: span for name, span in spans.items() if not self._maps[name].whole}
        )

    def _row(self, layer: _Layer, height: int, width: int, spans: Mapping[str, tuple[int, int]]) -> list[int]:
        """`layer` as the kernel reads it."""
        times = self._maps[layer.out].times
        width *= times
        first, end = spans.get(layer.out, (0, height * times))

        def origin(name: str) -> int:
            """The image's row that is the first in a map."""
            return 0 if self._maps[name].whole else spans[name][0]

        x, out = self._found[layer.x], self._found[layer.out]
        residual1, residual2 = (*(self._found[name] for name in layer.residuals), out, out)[:2]
        values = layer.addresses | {
            "height": end - first,
            "width": width,
            "columns": tiles_along(width),
            "tiles": tiles_along(end - first) * tiles_along(width),
            "tiles_per_batch": self._kernel.shape.tiles_per_batch(layer.deep, layer.wide),
            "inputs": layer.deep,
            "outputs": layer.wide,
            "stored": _blocks(layer.outputs) * BLOCK,
            "upsample_log2": int(layer.upsample),
            "residuals": len(layer.residuals),
            "residual_scale": int(np.float32(layer.residual_scale).view(np.uint32)),
        }
        for name, found in (("x", x), ("residual1", residual1), ("residual2", residual2), ("out", out)):
            values |= {name: found.ctypes.data, f"{name}_plane": found[0].size, f"{name}_row": found[0, 0].size}
        values["x"] = x[:, (first >> layer.upsample) - origin(layer.x) :].ctypes.data
        values["out"] = out[layer.at :, first - origin(layer.out) :].ctypes.data
        return [values[name] for name in FIELDS]

    def _most_scratch(self) -> int:
        """Bytes."""
        shape = self._kernel.shape
        tiles = (shape.tiles_per_batch(layer.deep, layer.wide) * (layer.deep + layer.wide) for layer in self._layers)
        return 4 * PLACES * (2 * GAP + max(tiles))

    def _compute(self, one: _Pass) -> None:
        sync = np.zeros(1 + 2 * len(one.program), np.int64)

        def compute(scratch: FloatArray) -> None:
            # It holds all memory that it computes in, even where an interrupted caller has let go of it.
            addresses = (one.program.ctypes.data, len(one.program), sync.ctypes.data, scratch.ctypes.data)
            self._kernel(*addresses, self._threads, pause_address())

        work = [self._pool.submit(compute, scratch) for scratch in self._scratch]
        try:
            # In small waits, between which Python answers Ctrl-C.
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


def _inside(a_map: FloatArray, height: int, width: int) -> FloatArray:
    return a_map[:, 1 : height + 1, 1 : width + 1]


def _parts(pixels: FloatArray) -> list[FloatArray]:
    """(h, w, C) by blocks of channels."""
    return np.split(pixels, range(BLOCK, pixels.shape[2], BLOCK), axis=2)


def _unshuffled(lr: FloatArray, by: int) -> FloatArray:
    """(h, w, C) to (h / by, w / by, C * by * by), as PyTorch's pixel_unshuffle orders channels."""
    if by == 1:
        return lr
    height, width, channels = lr.shape
    parts = lr.reshape(height // by, by, width // by, by, channels)
    return parts.transpose(0, 2, 4, 1, 3).reshape(height // by, width // by, -1)


def _memory(size: int) -> FloatArray:
    """Zeros, `size` bytes, from the start of a page; in large pages where the system has them.

    Raises MemoryError.
    """
    try:
        pages = mmap.mmap(-1, max(size, 1))
    except OSError as error:
        raise MemoryError(f"{size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE") and size > 1 << 21:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.float32, size // 4)
