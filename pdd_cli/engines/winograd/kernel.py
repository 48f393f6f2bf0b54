"""The kernel of Winograd's algorithm, generated as LLVM code for the CPU that runs it.

F(4x4, 3x3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016): a tile of 4 x 4 outputs comes
from a patch of 6 x 6 inputs. The patch is transformed, multiplied by the transformed weights at each of the 36 places
(a matrix product over channels), and transformed back. This takes a quarter of the multiplications.

A feature map is (channels / 16, h + 2, w + 2, 16) with a border of zeros; h and w are rounded up to whole tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from pdd_cli.errors import PddError
from pdd_cli.files import atomic_write
from pdd_cli.weights.store import cache_home

BLOCK = 16  # channels that are contiguous in memory
TILE, PIECE = 4, 6  # sides of a tile of outputs and of its patch of inputs
PLACES = PIECE**2
GAP = 48  # floats between places, so that they don't map to the same cache sets
SCRATCH = 1 << 19  # bytes of a thread's transformed tiles, which should fit its cache
MAX_TILES = 28  # maximum tiles per batch, so that small images have work for all threads
_DIGEST = hashlib.sha256().digest_size
_SPINS = 2000  # of a waiting thread before it sleeps: about 50 microseconds
_FUTEX = {"x86_64": 202, "aarch64": 98}  # system call number on Linux
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # private to this process
_SLEEP_NANOSECONDS = 50_000_000  # nanoseconds that a thread sleeps before it checks `stop` again

_POINTERS = ("x", "weight", "bias", "slope", "residual1", "residual2", "out")
_NUMBERS = (
    "height", "width", "columns", "tiles", "tiles_per_batch", "inputs", "outputs", "stored", "upsample_log2",
    "residuals", "residual_scale",
    "x_plane", "x_row", "residual1_plane", "residual1_row", "residual2_plane", "residual2_row", "out_plane", "out_row",
)  # fmt: skip
FIELDS = (*_POINTERS, *_NUMBERS)
"""A row of the program, which computes a layer, as 64-bit integers: addresses of maps and weights; height and width in
pixels; number of tiles per row, in all, and per batch; channels read, computed and stored; 1 if x is upsampled twofold
while it is read, else 0; number of residuals and the bits of their scale; strides of each map in floats, between blocks
of channels and between rows."""


@dataclass(frozen=True)
class Shape:
    """Register blocking for a CPU: `tiles` x `vectors` vectors of `lanes` floats are accumulated in registers."""

    lanes: int
    vectors: int
    tiles: int
    rows: int  # the same as `tiles` in the products that sum over tiles

    @property
    def group(self) -> int:
        """Number of output channels computed at once."""
        return self.lanes * self.vectors

    def tiles_per_batch(self, inputs: int, outputs: int) -> int:
        """Number of tiles that a thread transforms at once: a multiple of `tiles` that fits its cache."""
        fitting = min(MAX_TILES, SCRATCH // (4 * PLACES * (inputs + outputs)))
        return max(1, fitting // self.tiles) * self.tiles


AVX512, AVX2, NEON = Shape(16, 2, 14, 8), Shape(8, 2, 6, 4), Shape(4, 4, 6, 4)


def shape_of(features: Mapping[str, bool], triple: str) -> Shape | None:
    """The shape for a CPU with these features (LLVM's names); None without vector FMA instructions."""
    if features.get("avx512f"):
        return AVX512
    if features.get("avx2") and features.get("fma"):
        return AVX2
    return NEON if triple.startswith(("aarch64", "arm64")) else None


I64, FLOAT, VOID = ir.IntType(64), ir.FloatType(), ir.VoidType()


class Emitter:
    """Generates the kernel. Each layer is input transforms, products, inverse transforms and a barrier."""

    fields: tuple[str, ...] = FIELDS
    pointers: tuple[str, ...] = _POINTERS

    def __init__(self, shape: Shape, triple: str) -> None:
        self.shape = shape
        self.futex_number = _FUTEX.get(triple.split("-")[0], 0) if "linux" in triple else 0
        self.module = ir.Module("winograd")
        self.module.triple = triple
        integers = I64.as_pointer()
        # Program, its length, [stop, then per layer: next tile, threads done], scratch, threads, pause.
        signature = ir.FunctionType(VOID, [integers, I64, integers, FLOAT.as_pointer(), I64, I64])
        self.run = ir.Function(self.module, signature, "run")
        self.begin(self.run)
        self.vector = ir.VectorType(FLOAT, shape.lanes)
        self.fma_ = ir.Function(
            self.module, ir.FunctionType(self.vector, [self.vector] * 3), f"llvm.fma.v{shape.lanes}f32"
        )
        is_x86 = triple.startswith("x86_64-")
        self.spin = ir.Function(self.module, ir.FunctionType(VOID, []), "llvm.x86.sse2.pause") if is_x86 else None
        time = ir.ArrayType(I64, 2)  # seconds, nanoseconds
        self.sleep_time = ir.GlobalVariable(self.module, time, "sleep_time")
        self.sleep_time.initializer = ir.Constant(time, [0, _SLEEP_NANOSECONDS])
        self.sleep_time.global_constant, self.sleep_time.linkage = True, "internal"

    # Helpers that generate instructions.

    def begin(self, function: ir.Function) -> None:
        self.function = function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    def block(self, name: str) -> Any:
        return self.function.append_basic_block(name)

    @contextmanager
    def loop(self, end: Any, step: int | Any = 1) -> Iterator[Any]:
        """From 0 to `end`."""
        step = integer(step) if isinstance(step, int) else step
        b, before = self.b, self.b.block
        head, body, after = self.block("loop"), self.block("body"), self.block("after")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(integer(0), before)
        b.cbranch(b.icmp_signed("<", index, end), body, after)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, step), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def partition(self, next_tile: Any, end: Any, step: Any) -> Iterator[Any]:
        """From 0 to `end`, divided among the threads: `next_tile` counts the parts that have been started.

        A thread leaves before its next part if `stop` is set.
        """
        b = self.b
        again, go_on, some, done = (self.block(name) for name in ("again", "go_on", "some", "done"))
        b.branch(again)
        b.position_at_end(again)
        b.cbranch(self.is_zero(self.stop), go_on, self.leave)
        b.position_at_end(go_on)
        first = self.times(b.atomic_rmw("add", next_tile, integer(1), "monotonic"), step)
        b.cbranch(b.icmp_signed("<", first, end), some, done)
        b.position_at_end(some)
        yield first
        b.branch(again)
        b.position_at_end(done)

    def is_zero(self, flag: Any) -> Any:
        return self.b.icmp_signed("==", self.b.load_atomic(flag, "monotonic", 8), integer(0))

    def sum(self, *terms: Any) -> Any:
        return functools.reduce(self.b.add, terms)

    def times(self, a: Any, factor: int | Any) -> Any:
        return self.b.mul(a, integer(factor) if isinstance(factor, int) else factor)

    def least(self, a: Any, c: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", a, c), a, c)

    def at(self, pointer: Any, *offsets: Any) -> Any:
        return self.b.gep(pointer, [self.sum(*offsets)])

    def load(self, pointer: Any, align: int | None = None) -> Any:
        """Load a vector, by default from an address aligned to vectors."""
        return self.b.load(self.b.bitcast(pointer, self.vector.as_pointer()), align=align or 4 * self.shape.lanes)

    def store(self, value: Any, pointer: Any) -> None:
        self.b.store(value, self.b.bitcast(pointer, self.vector.as_pointer()), align=4 * self.shape.lanes)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [float(value)] * self.shape.lanes)

    def broadcast(self, scalar: Any) -> Any:
        """Broadcast a scalar to a vector."""
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
        self.stop, self.leave = sync, self.block("leave")
        with self.loop(layers) as number:
            row = self.at(program, self.times(number, len(self.fields)))
            layer = {name: b.load(self.at(row, integer(place))) for place, name in enumerate(self.fields)}
            for name in self.pointers:
                layer[name] = b.inttoptr(layer[name], FLOAT.as_pointer())
            next_tile = self.at(sync, self.times(number, 2), integer(1))
            self.layer(layer, scratch, next_tile)
            self.barrier(self.at(next_tile, integer(1)), threads, pause)
        b.branch(self.leave)
        b.position_at_end(self.leave)
        b.ret_void()
        self.emit_transform()
        return self.module

    def emit_transform(self) -> None:
        """Generate `transform`: weights (3, 3, inputs, outputs) to (36, outputs / group, inputs, group)."""
        floats = FLOAT.as_pointer()
        self.begin(ir.Function(self.module, ir.FunctionType(VOID, [floats, I64, I64, floats]), "transform"))
        weight, inputs, outputs, packed = self.function.args
        tap = self.times(inputs, outputs)
        with self.loop(outputs, self.shape.group) as first, self.loop(inputs) as channel:
            source = self.at(weight, self.times(channel, outputs), first)
            target = self.at(packed, self.times(first, inputs), self.times(channel, self.shape.group))
            self.transform_taps(source, self.times(tap, 3), tap, target, tap)
        self.b.ret_void()

    def transform_taps(self, source: Any, row: Any, column: Any, target: Any, to_next: Any) -> None:
        """Transform the taps from one input to a group of outputs; `row` and `column` are strides between taps."""
        with self.loop(integer(self.shape.group), self.shape.lanes) as output:
            taps = [
                [self.load(self.at(source, self.times(row, i), self.times(column, j), output), 4) for i in range(3)]
                for j in range(3)
            ]
            self.store_tile(self.transform_2d(self.to_weight, taps), self.at(target, output), to_next)

    def layer(self, layer: dict[str, Any], scratch: Any, next_tile: Any) -> None:
        """Compute batches of tiles until none are left; `next_tile` is the counter that the threads share."""
        tiles_per_batch = layer["tiles_per_batch"]
        layer["x_place"] = self.sum(self.times(layer["inputs"], tiles_per_batch), integer(GAP))
        layer["y_place"] = self.sum(self.times(layer["outputs"], tiles_per_batch), integer(GAP))
        xs, ys = scratch, self.at(scratch, self.times(layer["x_place"], PLACES))
        with self.partition(next_tile, layer["tiles"], tiles_per_batch) as first:
            self.transform_inputs(layer, first, xs)
            self.multiply(layer, xs, ys)
            self.transform_outputs(layer, first, ys)

    @contextmanager
    def each(self, channels: Any, tiles: Any) -> Iterator[tuple[Any, Any]]:
        """Loop over the vectors of channels of each tile, in memory order."""
        with self.loop(channels, self.shape.lanes) as channel, self.loop(tiles) as tile:
            yield channel, tile

    def corner(self, layer: dict[str, Any], tile: Any) -> tuple[Any, Any]:
        """Row and column of a tile's top left output."""
        return tuple(self.times(divide(tile, layer["columns"]), TILE) for divide in (self.b.udiv, self.b.urem))  # type: ignore[return-value]

    def channels(self, first: Any, plane: Any) -> Any:
        """Offset of channel `first` in a map."""
        b = self.b
        return self.sum(self.times(b.udiv(first, integer(BLOCK)), plane), b.urem(first, integer(BLOCK)))

    def transform_inputs(self, layer: dict[str, Any], first: Any, xs: Any) -> None:
        """To xs: (place, tiles / shape.tiles, channels / 16, shape.tiles, 16)."""
        b, some = self.b, integer(self.shape.tiles)
        last = b.sub(layer["tiles"], integer(1))
        with self.each(layer["inputs"], layer["tiles_per_batch"]) as (channel, tile):
            # Past the last tile, repeat it to stay inside the map.
            piece = self.piece(layer, channel, self.least(b.add(first, tile), last))
            group = b.add(self.times(b.udiv(tile, some), b.udiv(layer["inputs"], integer(BLOCK))),
                         b.udiv(channel, integer(BLOCK)))  # fmt: skip
            place = self.sum(self.times(group, self.shape.tiles), b.urem(tile, some))
            target = self.at(xs, self.times(place, BLOCK), b.urem(channel, integer(BLOCK)))
            self.store_tile(self.transform_2d(self.to_tile, piece), target, layer["x_place"])

    def piece(self, layer: dict[str, Any], channel: Any, tile: Any) -> list[list[Any]]:
        """The columns of a tile's patch, six vectors each."""
        top, left = self.corner(layer, tile)

        def along(start: Any, step: Any) -> list[Any]:
            """Offsets of six pixels from `start` - 1, in the smaller image if x is upsampled."""
            places = [self.b.ashr(self.b.add(start, integer(i - 1)), layer["upsample_log2"]) for i in range(PIECE)]
            return [self.times(self.b.add(place, integer(1)), step) for place in places]

        x = self.at(layer["x"], self.channels(channel, layer["x_plane"]))
        rows, columns = along(top, layer["x_row"]), along(left, integer(BLOCK))
        return [[self.load(self.at(x, row, column)) for row in rows] for column in columns]

    def transform_2d(
        self, transform: Callable[[Sequence[Any]], list[Any]], columns: Sequence[Sequence[Any]]
    ) -> Iterator[list[Any]]:
        """Transform the columns, then the rows of the result."""
        halves = [transform(column) for column in columns]
        for values in zip(*halves, strict=True):
            yield transform(values)

    def store_tile(self, rows: Iterable[Sequence[Any]], target: Any, to_next: Any) -> None:
        for index, value in enumerate(value for row in rows for value in row):
            self.store(value, self.at(target, self.times(to_next, index)))

    def multiply(self, layer: dict[str, Any], xs: Any, ys: Any) -> None:
        """At each place multiply (tiles, inputs) by (inputs, outputs), to ys: (place, tiles, outputs)."""
        b, shape, group = self.b, self.shape, self.shape.group
        panel = self.times(layer["inputs"], group)
        groups = b.udiv(layer["outputs"], integer(group))
        with (
            self.loop(integer(PLACES)) as place,
            self.loop(groups) as number,
            self.loop(layer["tiles_per_batch"], shape.tiles) as tile,
        ):
            weight = self.at(layer["weight"], self.times(b.add(self.times(place, groups), number), panel))
            x = self.at(xs, self.times(place, layer["x_place"]), self.times(tile, layer["inputs"]))
            before, head, after = b.block, self.block("product"), self.block("summed")
            b.branch(head)
            b.position_at_end(head)
            channel = b.phi(I64)
            channel.add_incoming(integer(0), before)
            sums = [b.phi(self.vector) for _ in range(shape.tiles * shape.vectors)]
            factors = [
                self.load(self.at(weight, self.times(channel, group), integer(v * shape.lanes)))
                for v in range(shape.vectors)
            ]
            group_offset = self.times(b.udiv(channel, integer(BLOCK)), shape.tiles * BLOCK)
            xs_here = self.at(x, group_offset, b.urem(channel, integer(BLOCK)))
            found = []
            for t in range(shape.tiles):
                value = self.broadcast(b.load(self.at(xs_here, integer(t * BLOCK))))
                for v, factor in enumerate(factors):
                    found.append(self.fma(value, factor, sums[t * shape.vectors + v]))
            following = b.add(channel, integer(1))
            channel.add_incoming(following, head)
            for total, value in zip(sums, found, strict=True):
                total.add_incoming(self.constant(0), before)
                total.add_incoming(value, head)
            b.cbranch(b.icmp_signed("<", following, layer["inputs"]), head, after)
            b.position_at_end(after)
            y = self.at(ys, self.times(place, layer["y_place"]), self.times(number, group))
            for index, value in enumerate(found):
                t, v = divmod(index, shape.vectors)
                row = self.times(b.add(tile, integer(t)), layer["outputs"])
                self.store(value, self.at(y, row, integer(v * shape.lanes)))

    def transform_outputs(self, layer: dict[str, Any], first: Any, ys: Any) -> None:
        """From ys to the map: bias, leaky ReLU with a slope per channel, then residual + scale * result."""
        b, zero = self.b, self.constant(0)
        residual_scale = self.residual_scale(layer)
        one, two = (b.icmp_signed(">", layer["residuals"], integer(count)) for count in (0, 1))
        there = self.least(b.sub(layer["tiles"], first), layer["tiles_per_batch"])
        with self.each(layer["stored"], there) as (channel, tile):
            y = self.at(ys, self.times(tile, layer["outputs"]), channel)
            columns = [
                [self.load(self.at(y, self.times(layer["y_place"], i * PIECE + j))) for i in range(PIECE)]
                for j in range(PIECE)
            ]
            bias, slope = (self.load(self.at(layer[name], channel)) for name in ("bias", "slope"))
            top, left = self.corner(layer, b.add(first, tile))
            for i, values in enumerate(self.transform_2d(self.from_tile, columns)):
                row = b.add(top, integer(i))
                for j, value in enumerate(values):
                    column = b.add(left, integer(j))

                    def place(name: str, row: Any = row, column: Any = column) -> Any:
                        return self.pixel(layer, name, channel, b.add(first, tile), row, column)

                    value = b.fadd(value, bias)
                    value = b.select(b.fcmp_ordered("<", value, zero), b.fmul(value, slope), value)
                    inside = b.and_(
                        b.icmp_signed("<", row, layer["height"]), b.icmp_signed("<", column, layer["width"])
                    )
                    with b.if_then(inside):
                        plain, store = b.block, self.block("store")
                        residual1, residual2 = self.block("residual1"), self.block("residual2")
                        b.cbranch(one, residual1, store)
                        b.position_at_end(residual1)
                        sum1 = self.fma(value, residual_scale, self.load(place("residual1")))
                        b.cbranch(two, residual2, store)
                        b.position_at_end(residual2)
                        sum2 = self.fma(sum1, residual_scale, self.load(place("residual2")))
                        b.branch(store)
                        b.position_at_end(store)
                        result = b.phi(self.vector)
                        for found, origin in ((value, plain), (sum1, residual1), (sum2, residual2)):
                            result.add_incoming(found, origin)
                        self.store(result, place("out"))

    def residual_scale(self, layer: dict[str, Any]) -> Any:
        return self.broadcast(self.b.bitcast(self.b.trunc(layer["residual_scale"], ir.IntType(32)), FLOAT))

    def pixel(self, layer: dict[str, Any], name: str, channel: Any, tile: Any, row: Any, column: Any) -> Any:
        """Address of a channel of a pixel, counted from inside the border."""
        row, column = (self.b.add(value, integer(1)) for value in (row, column))
        offset = self.sum(self.times(row, layer[f"{name}_row"]), self.times(column, BLOCK))
        return self.at(layer[name], self.channels(channel, layer[f"{name}_plane"]), offset)

    def barrier(self, done: Any, threads: Any, pause: Any) -> None:
        """A barrier: wait until all threads are `done`; leave if `stop` is set."""
        b = self.b
        before, check, spin, sleep, wake, passed = (
            self.block(name) for name in ("barrier", "check", "spin", "sleep", "wake", "passed")
        )
        arrived = b.add(b.atomic_rmw("add", done, integer(1), "acq_rel"), integer(1))
        b.cbranch(b.icmp_signed("==", arrived, threads), wake, before)
        b.position_at_end(before)
        b.branch(check)
        b.position_at_end(check)
        spins = b.phi(I64)
        spins.add_incoming(integer(0), before)
        seen = b.load_atomic(done, "acquire", 8)
        b.cbranch(b.icmp_signed("==", seen, threads), passed, spin)
        b.position_at_end(spin)
        # Spinning is fastest. After a while the thread sleeps, to leave the core to the threads that it waits for.
        if self.spin is not None:
            b.call(self.spin, [])
        spins.add_incoming(b.add(spins, integer(1)), spin)
        b.cbranch(b.icmp_signed("<", spins, integer(_SPINS)), check, sleep)
        b.position_at_end(sleep)
        self.futex(pause, done, _FUTEX_WAIT, seen)
        spins.add_incoming(spins, sleep)
        b.cbranch(self.is_zero(self.stop), check, self.leave)
        b.position_at_end(wake)
        self.futex(pause, done, _FUTEX_WAKE, threads)
        b.branch(passed)
        b.position_at_end(passed)

    def futex(self, pause: Any, done: Any, operation: int, value: Any) -> None:
        """Sleep while `done` has this value, or wake as many sleepers. Without futexes yield the core."""
        b = self.b
        if self.futex_number:
            given = [integer(self.futex_number), b.ptrtoint(done, I64), integer(operation), value,
                     b.ptrtoint(self.sleep_time, I64), integer(0), integer(0)]  # fmt: skip
            b.call(b.inttoptr(pause, ir.FunctionType(I64, [I64] * len(given)).as_pointer()), given)
        elif operation == _FUTEX_WAIT:
            b.call(b.inttoptr(pause, ir.FunctionType(ir.IntType(32), []).as_pointer()), [])

    def to_weight(self, g: Sequence[Any]) -> list[Any]:
        """G g."""
        b, fma = self.b, self.fma
        middle, sixth = b.fmul(g[1], self.constant(1 / 12)), b.fmul(g[0], self.constant(1 / 24))
        even, outer = b.fadd(g[0], g[2]), fma(g[2], 1 / 6, sixth)
        return [
            b.fmul(g[0], self.constant(1 / 4)),
            b.fmul(b.fadd(even, g[1]), self.constant(-1 / 6)),
            b.fmul(b.fsub(even, g[1]), self.constant(-1 / 6)),
            b.fadd(outer, middle),
            b.fsub(outer, middle),
            g[2],
        ]

    def to_tile(self, d: Sequence[Any]) -> list[Any]:
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

    def from_tile(self, m: Sequence[Any]) -> list[Any]:
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


def tiles_along(side: int) -> int:
    """The number of tiles that cover a side of an image."""
    return -(-side // TILE)


def integer(value: int) -> Any:
    return ir.Constant(I64, value)


class Kernel:
    """The kernel for a CPU, compiled on first use. That takes 0.2 s; the machine code is cached on disk."""

    def __init__(self, shape: Shape, *, cpu: str, features: str, triple: str, emitter: type[Emitter] = Emitter) -> None:
        self.shape = shape
        self._emitter = emitter
        self._cpu, self._features, self._triple = cpu, features, triple
        self._engine: Any = None  # holds the machine code
        self._compiling = threading.Lock()

    def __call__(self, *arguments: int) -> None:
        """Compute one thread's part of a program; the arguments are those of `Emitter.run`."""
        self.compile()(*arguments)

    def compile(self) -> Callable[..., None]:
        found: Callable[..., None] = _prototype("pqppqp")(self.address("run"))
        return found

    def transform(self, weight: int, inputs: int, outputs: int, packed: int) -> None:
        """Transform weights (3, 3, inputs, outputs) to (36, outputs / group, inputs, group), by address."""
        _prototype("pqqp")(self.address("transform"))(weight, inputs, outputs, packed)

    def address(self, function: str) -> int:
        """The address of a compiled function."""
        with self._compiling:
            if self._engine is None:
                llvm.initialize_native_target()
                llvm.initialize_native_asmprinter()
                target = llvm.Target.from_triple(self._triple)
                machine = target.create_target_machine(cpu=self._cpu, features=self._features, opt=3)
                code = self._code(machine)
                engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
                engine.add_object_file(llvm.ObjectFileRef.from_data(code))
                engine.finalize_object()
                self._engine = engine
        return int(self._engine.get_function_address(function))

    def _code(self, machine: Any) -> bytes:
        """The object file, from the cache if possible."""
        source = str(self._emitter(self.shape, self._triple).emit())
        made_of = (source, self._cpu, self._features, llvm.llvm_version_info)
        path = cache_home() / "compiled" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.kernel"
        with contextlib.suppress(OSError):
            digest, code = (kept := path.read_bytes())[:_DIGEST], kept[_DIGEST:]
            if hashlib.sha256(code).digest() == digest:
                return code
        module = llvm.parse_assembly(source)
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = False  # the code is vectorised already
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        code = machine.emit_object(module)
        with contextlib.suppress(PddError, OSError), atomic_write(path) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
        return bytes(code)


def _prototype(arguments: str) -> Any:
    """The type of a function of pointers (p) and 64-bit integers (q)."""
    return ctypes.CFUNCTYPE(None, *({"p": ctypes.c_void_p, "q": ctypes.c_int64}[kind] for kind in arguments))


@functools.lru_cache
def kernel(emitter: type[Emitter] = Emitter) -> Kernel | None:
    """The kernel for this CPU; None if this CPU isn't supported."""
    triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features()
    shape = shape_of(features, triple)
    if shape is None:
        return None
    return Kernel(shape, cpu=llvm.get_host_cpu_name(), features=features.flatten(), triple=triple, emitter=emitter)


@functools.lru_cache(maxsize=1)
def pause_address() -> int:
    """The address of the function that yields the core to other threads; on Linux that of `syscall`."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    elif sys.platform == "linux":
        function = ctypes.CDLL(None).syscall
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0
