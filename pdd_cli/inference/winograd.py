"""Networks of 3x3 convolutions on a CPU by Winograd's algorithm, in fp32: a quarter of the multiplications.

F(4x4, 3x3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016): 4 x 4 outputs come from a
6 x 6 piece of the input, which is transformed, multiplied with transformed weights at each of the 36 places (there a
convolution is a product of matrices, over channels), and transformed back. LLVM compiles the one kernel for this very
CPU when it is first needed.

A feature map is (channels / 16, h + 2, w + 2, 16) with zeros around it, h and w rounded up to whole tiles. A dense
block is one such map: its convolutions read the front of it and write behind that, so that nothing is concatenated.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir

from pdd_cli.device import usable_cpus

FloatArray = npt.NDArray[np.float32]

_BLOCK = 16  # channels that lie next to each other
_TILE, _PIECE = 4, 6  # sides of what comes out of a tile and of what goes into it
_PLACES = _PIECE**2
_SCRATCH = 1 << 19  # bytes that the transformed tiles of a thread may take: they should stay in its cache
_TOGETHER = 28  # tiles that a thread transforms at once at most: all have their share of small images, too
_STRIP = 1 << 26  # bytes of a layer at full size that is computed in strips
_GAP = 48  # floats between places, which would share the cache's sets else

# The transforms of weights (G) and, in `_to_tile` and `_from_tile`, of inputs (Bᵀ) and outputs (Aᵀ).
_G = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64
) / 24  # fmt: skip

_POINTERS = ("x", "weight", "bias", "slope", "near", "far", "out")
_NUMBERS = (
    "height", "width", "columns", "tiles", "together", "inputs", "outputs", "stored", "grown", "residuals", "share",
    "x_plane", "x_row", "near_plane", "near_row", "far_plane", "far_row", "out_plane", "out_row",
)  # fmt: skip
_FIELDS = (*_POINTERS, *_NUMBERS)
"""A layer as the kernel reads it, a 64-bit integer each: the addresses of its maps and weights; what it computes, in
pixels; tiles in a row and in all, and how many are transformed together; channels read, computed, and blocks of them
stored; whether x is enlarged twofold in reading; residuals and (the bits of) their share; floats to a map's next
block of channels and next row."""


@dataclass(frozen=True)
class Shape:
    """How a CPU multiplies: `tiles` times `vectors` of `lanes` floats are summed in registers."""

    lanes: int
    vectors: int
    tiles: int

    @property
    def group(self) -> int:
        """Output channels of one product."""
        return self.lanes * self.vectors


AVX512, AVX2, NEON = Shape(16, 2, 14), Shape(8, 2, 6), Shape(4, 4, 6)


def shape_of(features: Mapping[str, bool], triple: str) -> Shape | None:
    """For a CPU with these features, by LLVM's names; None where it can't multiply and add in one instruction."""
    if features.get("avx512f"):
        return AVX512
    if features.get("avx2") and features.get("fma"):
        return AVX2
    return NEON if triple.startswith(("aarch64", "arm64")) else None


# --- the kernel ------------------------------------------------------------------------------------------------------

_I64, _FLOAT, _VOID = ir.IntType(64), ir.FloatType(), ir.VoidType()


class _Emitter:
    """Writes the kernel, layer after layer: transforms, products, transforms back, a meeting of all threads."""

    def __init__(self, shape: Shape, triple: str) -> None:
        self.shape = shape
        self.module = ir.Module("winograd")
        self.module.triple = triple
        integers = _I64.as_pointer()
        # The program, its length, [stop, then for each layer tiles taken and threads done], scratch, threads, yield.
        signature = ir.FunctionType(_VOID, [integers, _I64, integers, _FLOAT.as_pointer(), _I64, _I64])
        self.function = ir.Function(self.module, signature, "run")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.vector = ir.VectorType(_FLOAT, shape.lanes)
        self.fma_ = ir.Function(
            self.module, ir.FunctionType(self.vector, [self.vector] * 3), f"llvm.fma.v{shape.lanes}f32"
        )

    # Small words of the language.

    def block(self, name: str) -> Any:
        return self.function.append_basic_block(name)

    @contextmanager
    def loop(self, end: Any, step: int = 1) -> Iterator[Any]:
        """From 0 to `end`."""
        b, before = self.b, self.b.block
        head, body, after = self.block("loop"), self.block("body"), self.block("after")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(_I64)
        index.add_incoming(_integer(0), before)
        b.cbranch(b.icmp_signed("<", index, end), body, after)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, _integer(step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    def sum(self, *terms: Any) -> Any:
        return functools.reduce(self.b.add, terms)

    def times(self, a: Any, factor: int | Any) -> Any:
        return self.b.mul(a, _integer(factor) if isinstance(factor, int) else factor)

    def least(self, a: Any, c: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", a, c), a, c)

    def at(self, pointer: Any, *offsets: Any) -> Any:
        return self.b.gep(pointer, [self.sum(*offsets)])

    def load(self, pointer: Any) -> Any:
        return self.b.load(self.b.bitcast(pointer, self.vector.as_pointer()), align=4 * self.shape.lanes)

    def store(self, value: Any, pointer: Any) -> None:
        self.b.store(value, self.b.bitcast(pointer, self.vector.as_pointer()), align=4 * self.shape.lanes)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [float(value)] * self.shape.lanes)

    def spread(self, scalar: Any) -> Any:
        """A vector of equal values."""
        nothing = ir.Constant(self.vector, ir.Undefined)
        first = self.b.insert_element(nothing, scalar, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.shape.lanes), [0] * self.shape.lanes)
        return self.b.shuffle_vector(first, nothing, mask)

    def fma(self, a: Any, factor: float | Any, c: Any) -> Any:
        factor = self.constant(factor) if isinstance(factor, (int, float)) else factor
        return self.b.call(self.fma_, [a, factor, c])

    # The kernel.

    def emit(self) -> ir.Module:
        b = self.b
        program, layers, sync, scratch, threads, pause = self.function.args
        leave = self.block("leave")
        with self.loop(layers) as number:
            row = self.at(program, self.times(number, len(_FIELDS)))
            layer = {name: b.load(self.at(row, _integer(place))) for place, name in enumerate(_FIELDS)}
            for name in _POINTERS:
                layer[name] = b.inttoptr(layer[name], _FLOAT.as_pointer())
            taken = self.at(sync, self.times(number, 2), _integer(1))
            self.layer(layer, scratch, taken)
            self.meet(sync, self.at(taken, _integer(1)), threads, pause, leave)
        b.branch(leave)
        b.position_at_end(leave)
        b.ret_void()
        return self.module

    def layer(self, layer: dict[str, Any], scratch: Any, taken: Any) -> None:
        """Some tiles after others, as long as no thread has `taken` them all."""
        b, together = self.b, layer["together"]
        layer["x_place"] = self.sum(self.times(layer["inputs"], together), _integer(_GAP))
        layer["y_place"] = self.sum(self.times(layer["outputs"], together), _integer(_GAP))
        xs, ys = scratch, self.at(scratch, self.times(layer["x_place"], _PLACES))
        again, some, done = self.block("again"), self.block("some"), self.block("done")
        b.branch(again)
        b.position_at_end(again)
        first = self.times(b.atomic_rmw("add", taken, _integer(1), "monotonic"), together)
        b.cbranch(b.icmp_signed("<", first, layer["tiles"]), some, done)
        b.position_at_end(some)
        self.transform_inputs(layer, first, xs)
        self.multiply(layer, xs, ys)
        self.transform_outputs(layer, first, ys)
        b.branch(again)
        b.position_at_end(done)

    def corner(self, layer: dict[str, Any], tile: Any) -> tuple[Any, Any]:
        """Row and column of a tile's first output."""
        return tuple(self.times(divide(tile, layer["columns"]), _TILE) for divide in (self.b.udiv, self.b.urem))  # type: ignore[return-value]

    def channels(self, first: Any, plane: Any) -> Any:
        """Where the channels from `first` begin in a map."""
        b = self.b
        return self.sum(self.times(b.udiv(first, _integer(_BLOCK)), plane), b.urem(first, _integer(_BLOCK)))

    def transform_inputs(self, layer: dict[str, Any], first: Any, xs: Any) -> None:
        """To xs: (place, tiles / shape.tiles, channels / 16, shape.tiles, 16)."""
        b, some = self.b, _integer(self.shape.tiles)
        last = b.sub(layer["tiles"], _integer(1))
        with self.loop(layer["inputs"], self.shape.lanes) as channel, self.loop(layer["together"]) as tile:
            # Beyond the last tile it once more, for there is nothing there.
            top, left = self.corner(layer, self.least(b.add(first, tile), last))

            def along(start: Any, step: Any) -> list[Any]:
                """Six pixels, from the one before `start`; half as far apart where x is enlarged."""
                places = [b.ashr(b.add(start, _integer(i - 1)), layer["grown"]) for i in range(_PIECE)]
                return [self.times(b.add(place, _integer(1)), step) for place in places]

            x = self.at(layer["x"], self.channels(channel, layer["x_plane"]))
            rows, columns = along(top, layer["x_row"]), along(left, _integer(_BLOCK))
            halves = [self._to_tile([self.load(self.at(x, row, column)) for row in rows]) for column in columns]
            lots = b.add(self.times(b.udiv(tile, some), b.udiv(layer["inputs"], _integer(_BLOCK))),
                         b.udiv(channel, _integer(_BLOCK)))  # fmt: skip
            place = self.sum(self.times(lots, self.shape.tiles), b.urem(tile, some))
            target = self.at(xs, self.times(place, _BLOCK), b.urem(channel, _integer(_BLOCK)))
            for i in range(_PIECE):
                for j, value in enumerate(self._to_tile([half[i] for half in halves])):
                    self.store(value, self.at(target, self.times(layer["x_place"], i * _PIECE + j)))

    def multiply(self, layer: dict[str, Any], xs: Any, ys: Any) -> None:
        """At each place (tiles, inputs) times (inputs, outputs), to ys: (place, tiles, outputs)."""
        b, shape, group = self.b, self.shape, self.shape.group
        panel = self.times(layer["inputs"], group)
        groups = b.udiv(layer["outputs"], _integer(group))
        with (
            self.loop(_integer(_PLACES)) as place,
            self.loop(groups) as number,
            self.loop(layer["together"], shape.tiles) as tile,
        ):
            weight = self.at(layer["weight"], self.times(b.add(self.times(place, groups), number), panel))
            x = self.at(xs, self.times(place, layer["x_place"]), self.times(tile, layer["inputs"]))
            before, head, after = b.block, self.block("product"), self.block("summed")
            b.branch(head)
            b.position_at_end(head)
            channel = b.phi(_I64)
            channel.add_incoming(_integer(0), before)
            sums = [b.phi(self.vector) for _ in range(shape.tiles * shape.vectors)]
            factors = [
                self.load(self.at(weight, self.times(channel, group), _integer(v * shape.lanes)))
                for v in range(shape.vectors)
            ]
            lot = self.times(b.udiv(channel, _integer(_BLOCK)), shape.tiles * _BLOCK)
            xs_here = self.at(x, lot, b.urem(channel, _integer(_BLOCK)))
            found = []
            for t in range(shape.tiles):
                value = self.spread(b.load(self.at(xs_here, _integer(t * _BLOCK))))
                for v, factor in enumerate(factors):
                    found.append(self.fma(value, factor, sums[t * shape.vectors + v]))
            following = b.add(channel, _integer(1))
            channel.add_incoming(following, head)
            for total, value in zip(sums, found, strict=True):
                total.add_incoming(self.constant(0), before)
                total.add_incoming(value, head)
            b.cbranch(b.icmp_signed("<", following, layer["inputs"]), head, after)
            b.position_at_end(after)
            y = self.at(ys, self.times(place, layer["y_place"]), self.times(number, group))
            for index, value in enumerate(found):
                t, v = divmod(index, shape.vectors)
                row = self.times(b.add(tile, _integer(t)), layer["outputs"])
                self.store(value, self.at(y, row, _integer(v * shape.lanes)))

    def transform_outputs(self, layer: dict[str, Any], first: Any, ys: Any) -> None:
        """From ys to the map: bias, leaky ReLU with a slope for each channel, near + share * result, and so far."""
        b, zero = self.b, self.constant(0)
        share = self.spread(b.bitcast(b.trunc(layer["share"], ir.IntType(32)), _FLOAT))
        one, two = (b.icmp_signed(">", layer["residuals"], _integer(count)) for count in (0, 1))
        there = self.least(b.sub(layer["tiles"], first), layer["together"])
        with self.loop(layer["stored"], self.shape.lanes) as channel, self.loop(there) as tile:
            top, left = self.corner(layer, b.add(first, tile))
            y = self.at(ys, self.times(tile, layer["outputs"]), channel)
            halves = [
                self._from_tile(
                    [self.load(self.at(y, self.times(layer["y_place"], i * _PIECE + j))) for i in range(_PIECE)]
                )
                for j in range(_PIECE)
            ]
            bias, slope = (self.load(self.at(layer[name], channel)) for name in ("bias", "slope"))

            def place(name: str, row: Any, column: Any, channel: Any = channel) -> Any:
                pixel = self.sum(self.times(row, layer[f"{name}_row"]), self.times(column, _BLOCK))
                return self.at(layer[name], self.channels(channel, layer[f"{name}_plane"]), pixel)

            for i in range(_TILE):
                row = b.add(top, _integer(i))
                for j, value in enumerate(self._from_tile([half[i] for half in halves])):
                    column = b.add(left, _integer(j))
                    value = b.fadd(value, bias)
                    value = b.select(b.fcmp_ordered("<", value, zero), b.fmul(value, slope), value)
                    inside = b.and_(
                        b.icmp_signed("<", row, layer["height"]), b.icmp_signed("<", column, layer["width"])
                    )
                    row_, column_ = b.add(row, _integer(1)), b.add(column, _integer(1))  # behind the border
                    with b.if_then(inside):
                        plain, store = b.block, self.block("store")
                        near, far = self.block("near"), self.block("far")
                        b.cbranch(one, near, store)
                        b.position_at_end(near)
                        nearer = self.fma(value, share, self.load(place("near", row_, column_)))
                        b.cbranch(two, far, store)
                        b.position_at_end(far)
                        farther = self.fma(nearer, share, self.load(place("far", row_, column_)))
                        b.branch(store)
                        b.position_at_end(store)
                        result = b.phi(self.vector)
                        for found, origin in ((value, plain), (nearer, near), (farther, far)):
                            result.add_incoming(found, origin)
                        self.store(result, place("out", row_, column_))

    def meet(self, stop: Any, done: Any, threads: Any, pause: Any, leave: Any) -> None:
        """Wait until all threads are `done`; leave at once when told to stop."""
        b = self.b
        b.atomic_rmw("add", done, _integer(1), "acq_rel")
        before, look, ask, rest, go_on = (self.block(name) for name in ("meet", "look", "ask", "rest", "go_on"))
        b.branch(before)
        b.position_at_end(before)
        b.branch(look)
        b.position_at_end(look)
        looks = b.phi(_I64)
        looks.add_incoming(_integer(0), before)
        met = b.icmp_signed("==", b.load_atomic(done, "acquire", 8), threads)
        b.cbranch(met, go_on, ask)
        b.position_at_end(ask)
        # At first only looked, which is fastest; then with the cores left to others, who may be those waited for.
        looks.add_incoming(b.add(looks, _integer(1)), ask)
        b.cbranch(b.icmp_signed("<", looks, _integer(200)), look, rest)
        b.position_at_end(rest)
        b.call(b.inttoptr(pause, ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        looks.add_incoming(looks, rest)
        b.cbranch(b.icmp_signed("==", b.load_atomic(stop, "monotonic", 8), _integer(0)), look, leave)
        b.position_at_end(go_on)

    def _to_tile(self, d: Sequence[Any]) -> list[Any]:
        """Bᵀ d."""
        b, fma = self.b, self.fma
        even, odd = fma(d[2], -4, d[4]), fma(d[1], -4, d[3])
        difference, other = b.fsub(d[4], d[2]), b.fsub(d[3], d[1])
        return [
            fma(d[0], 4, fma(d[2], -5, d[4])),
            b.fadd(even, odd),
            b.fsub(even, odd),
            fma(other, 2, difference),
            fma(other, -2, difference),
            fma(d[1], 4, fma(d[3], -5, d[5])),
        ]

    def _from_tile(self, m: Sequence[Any]) -> list[Any]:
        """Aᵀ m."""
        b, fma = self.b, self.fma
        one, two = b.fadd(m[1], m[2]), b.fadd(m[3], m[4])
        odd, other = b.fsub(m[1], m[2]), b.fsub(m[3], m[4])
        return [
            b.fadd(b.fadd(m[0], one), two),
            fma(other, 2, odd),
            fma(two, 4, one),
            b.fadd(fma(other, 8, odd), m[5]),
        ]


def _integer(value: int) -> Any:
    return ir.Constant(_I64, value)


class Kernel:
    """The kernel for a CPU, compiled when it is first needed, which takes a fifth of a second."""

    def __init__(self, shape: Shape, *, cpu: str, features: str, triple: str) -> None:
        self.shape = shape
        self._cpu, self._features, self._triple = cpu, features, triple
        self._engine: Any = None  # holds the machine code
        self._compiling = threading.Lock()

    def __call__(self, *arguments: int) -> None:
        """One thread's part of a program, by what `_Emitter` names: addresses and numbers."""
        self.compile()(*arguments)

    def compile(self) -> Callable[..., None]:
        with self._compiling:
            if self._engine is None:
                llvm.initialize_native_target()
                llvm.initialize_native_asmprinter()
                target = llvm.Target.from_triple(self._triple)
                machine = target.create_target_machine(cpu=self._cpu, features=self._features, opt=3)
                module = llvm.parse_assembly(str(_Emitter(self.shape, self._triple).emit()))
                options = llvm.create_pipeline_tuning_options(speed_level=2)
                options.loop_vectorization = options.slp_vectorization = False  # it is vectors already
                passes = llvm.create_pass_builder(machine, options)
                passes.getModulePassManager().run(module, passes)
                engine = llvm.create_mcjit_compiler(module, machine)
                engine.finalize_object()
                self._engine = engine
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        prototype = ctypes.CFUNCTYPE(None, pointer, integer, pointer, pointer, integer, pointer)
        return prototype(self._engine.get_function_address("run"))


@functools.lru_cache(maxsize=1)
def kernel() -> Kernel | None:
    """For this CPU; None where there is none for it."""
    triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features()
    shape = shape_of(features, triple)
    if shape is None:
        return None
    return Kernel(shape, cpu=llvm.get_host_cpu_name(), features=features.flatten(), triple=triple)


@functools.lru_cache(maxsize=1)
def _yield() -> int:
    """The address of what leaves this core to other threads."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# --- networks --------------------------------------------------------------------------------------------------------


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
    share: float = 1.0
    grown: bool = False
    addresses: dict[str, int] = field(default_factory=dict)  # of weight (36, wide / group, deep, group), bias, slope

    @property
    def size(self) -> int:
        """Floats of weight, bias and slope."""
        return (_PLACES * self.deep + 2) * self.wide


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
    """The forward pass of an RRDBNet or SRVGGNetCompact. Raises ValueError for the tensors of another network.

    `state`: its tensors by the names of `models.rrdbnet` and of Real-ESRGAN's SRVGGNetCompact, fp32. `scale`: what it
    enlarges by.
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
        compiled = self._pool.submit(kernel.compile)
        self._transform_weights(state)
        compiled.result()
        self._scratch = [_memory(self._most_scratch()) for _ in range(self._threads)]
        self._arena = np.empty(0, np.float32)
        self._size = (0, 0)

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of the whole feature maps, per LR pixel."""
        whole = [a_map for a_map in self._maps.values() if a_map.whole]
        return sum(4 * a_map.times**2 * _blocks(a_map.channels) * _BLOCK for a_map in whole)

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
                if end == height * self._maps[name].times:  # below the last row are others, of the pass before
                    self._found[name][:, end - first + 1 :] = 0
            self._compute(one)
        return self._finish(lr, self._found["out"])

    # What there is to compute.

    def _add(self, state: Mapping[str, FloatArray], name: str, x: str, out: str, slope: Any = 1.0, **more: Any) -> None:
        outputs, inputs, *sides = state[f"{name}.weight"].shape
        if sides != [3, 3]:
            raise ValueError(name)
        group = self._kernel.shape.group
        deep, wide = _blocks(inputs) * _BLOCK, -(-outputs // group) * group
        self._layers.append(_Layer(name, outputs, deep, wide, slope, x, out, **more))

    def _transform_weights(self, state: Mapping[str, FloatArray]) -> None:
        """Put the weights, transformed, and biases and slopes of all layers into one piece of memory."""
        ends = np.cumsum([layer.size for layer in self._layers])
        whole = _memory(4 * int(ends[-1]))
        group = self._kernel.shape.group
        transform = np.kron(_G, _G).astype(np.float32)

        def fill(layer: _Layer, end: int) -> None:
            weight, bias, slope = np.split(
                whole[end - layer.size : end], [layer.size - 2 * layer.wide, layer.size - layer.wide]
            )
            bias[: layer.outputs] = state[f"{layer.name}.bias"]
            slope[: layer.outputs] = layer.slope
            given = state[f"{layer.name}.weight"]
            taps = np.zeros((9, layer.deep, layer.wide), np.float32)
            taps[:, : given.shape[1], : layer.outputs] = given.reshape(*given.shape[:2], 9).transpose(2, 1, 0)
            # (outputs / group, inputs, group) for each of the nine taps, which one product turns into the 36 places.
            grouped = taps.reshape(9, layer.deep, -1, group).transpose(0, 2, 1, 3).reshape(9, -1)
            np.matmul(transform, grouped, out=weight.reshape(_PLACES, -1))
            layer.addresses.update(weight=weight.ctypes.data, bias=bias.ctypes.data, slope=slope.ctypes.data)

        list(self._pool.map(fill, self._layers, ends))
        self._weights = whole

    def _read_rrdbnet(self, state: Mapping[str, FloatArray]) -> None:
        features, inputs = state["conv_first.weight"].shape[:2]
        growth, outputs = state["body.0.rdb1.conv1.weight"].shape[0], state["conv_last.weight"].shape[0]
        self._unshuffle = math.isqrt(inputs // outputs)
        if features % _BLOCK or growth % _BLOCK:
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
                at = (features + index * growth) // _BLOCK
                add(f"{name}.conv{index + 1}", block, block, 0.2, at=at)
            residuals = (block, after) if number % 3 == 2 else (block,)
            add(f"{name}.conv5", block, after, residuals=residuals, share=0.2)
        add("conv_body", "dense0", "dense1", residuals=("first",))
        add("conv_up1", "dense1", "half", 0.2, grown=True)
        add("conv_up2", "half", "full", 0.2, grown=True)
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
        for channel in range(channels):
            colour, place = divmod(channel, scale**2)
            values = found[channel // _BLOCK, ..., channel % _BLOCK]
            np.add(values, lr[..., colour], out=sr[:, place // scale, :, place % scale, colour])
        return sr.reshape(height * scale, width * scale, colours)

    # Where it is computed.

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
            shapes[name] = (_blocks(a_map.channels), _tiles(high) * _TILE + 2, _tiles(wide) * _TILE + 2, _BLOCK)
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
        near, far = (*(self._found[name] for name in layer.residuals), out, out)[:2]
        values = layer.addresses | {
            "height": end - first,
            "width": width,
            "columns": _tiles(width),
            "tiles": _tiles(end - first) * _tiles(width),
            "together": self._together(layer),
            "inputs": layer.deep,
            "outputs": layer.wide,
            "stored": _blocks(layer.outputs) * _BLOCK,
            "grown": int(layer.grown),
            "residuals": len(layer.residuals),
            "share": int(np.float32(layer.share).view(np.uint32)),
        }
        for name, found in (("x", x), ("near", near), ("far", far), ("out", out)):
            values |= {name: found.ctypes.data, f"{name}_plane": found[0].size, f"{name}_row": found[0, 0].size}
        values["x"] = x[:, (first >> layer.grown) - origin(layer.x) :].ctypes.data
        values["out"] = out[layer.at :, first - origin(layer.out) :].ctypes.data
        return [values[name] for name in _FIELDS]

    def _together(self, layer: _Layer) -> int:
        """How many tiles a thread transforms at once: whole products, and few enough for its cache."""
        tiles = self._kernel.shape.tiles
        fitting = _SCRATCH // (4 * _PLACES * (layer.deep + layer.wide))
        return max(1, min(fitting, _TOGETHER) // tiles) * tiles

    def _most_scratch(self) -> int:
        """Bytes."""
        return max(
            4 * _PLACES * (2 * _GAP + self._together(layer) * (layer.deep + layer.wide)) for layer in self._layers
        )

    def _compute(self, one: _Pass) -> None:
        sync = np.zeros(1 + 2 * len(one.program), np.int64)
        arguments = (one.program.ctypes.data, len(one.program), sync.ctypes.data)
        work = [
            self._pool.submit(self._kernel, *arguments, scratch.ctypes.data, self._threads, _yield())
            for scratch in self._scratch
        ]
        try:
            # In small waits, between which Python answers Ctrl-C.
            while wait(work, timeout=0.1).not_done:
                pass
        except BaseException:
            sync[0] = 1
            wait(work)
            raise


def _blocks(channels: int) -> int:
    return int(-(-channels // _BLOCK))


def _tiles(side: int) -> int:
    return int(-(-side // _TILE))


def _inside(a_map: FloatArray, height: int, width: int) -> FloatArray:
    return a_map[:, 1 : height + 1, 1 : width + 1]


def _parts(pixels: FloatArray) -> list[FloatArray]:
    """(h, w, C) by blocks of channels."""
    return np.split(pixels, range(_BLOCK, pixels.shape[2], _BLOCK), axis=2)


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
