"""The kernel of Winograd's algorithm for training: convolutions, and their gradients by inputs and by weights.

Unlike `kernel.py` it reads PyTorch's tensors directly (channels-last, a batch of images, no border). Weights change
with every step; they are transformed just before use, so they are in the cache. With the transforms of that module a
convolution is y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A; its transposition gives the gradient of the weights,
dg = Gᵀ [(Bᵀ d B) ⊙ (A dy Aᵀ)] G, summed over all tiles. Source: Lavin and Gray, Fast Algorithms for
Convolutional Neural Networks (2016), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from pdd_cli.engines.winograd.kernel import FLOAT, GAP, I64, PIECE, PLACES, TILE, VOID, Emitter, Shape, integer

CHANNELS = 32  # numbers of inputs and outputs are multiples of this
TRANSFORM, CONVOLVE, GATE, CORRELATE = range(4)
"""The kinds of a row of the program.

TRANSFORM: packed = the transformed weights. CONVOLVE: out = x convolved with them, with bias and leaky ReLU; with a
residual1, residual1 + residual_scale * that. GATE: out = residual1, multiplied by residual_scale where x is negative.
CORRELATE: out = the gradient of the weights, from x and residual1; added to out if `residuals` is 1."""

_POINTERS = ("x", "weight", "packed", "bias", "slope", "residual1", "out")
_MAPS = ("x", "residual1", "out")
_NUMBERS = (
    "kind", "height", "width", "columns", "per_image", "tiles", "tiles_per_batch", "inputs", "outputs", "residuals",
    "residual_scale",
    *(f"{name}_{step}" for name in _MAPS for step in ("image", "row", "pixel")),
    "tap_row", "tap_column", "tap_channel",
)  # fmt: skip
FIELDS = (*_POINTERS, *_NUMBERS)
"""A row of the program, as 64-bit integers: addresses; height and width in pixels; number of tiles per row, per image,
in all, and per batch; the bits of `residual_scale`; strides of each map in floats, between images, rows and pixels;
strides of the weights in floats, between rows and columns of taps, and between channels: of the inputs where weights
are read (their outputs are contiguous), of the outputs where gradients are written."""

TEAM = ("program", "steps", "sync", "scratch", "scratch_bytes", "pause", "thread_number", "thread_count")
"""The arguments of `team`, as 64-bit integers; the last three are addresses of functions."""


class TrainingEmitter(Emitter):
    """Generates the training kernel."""

    fields, pointers = FIELDS, _POINTERS

    def __init__(self, shape: Shape, triple: str) -> None:
        super().__init__(shape, triple)
        zeros = ir.ArrayType(FLOAT, shape.lanes)
        self.zeros = ir.GlobalVariable(self.module, zeros, "zeros")
        self.zeros.initializer = ir.Constant(zeros, [0.0] * shape.lanes)
        self.zeros.global_constant, self.zeros.linkage, self.zeros.align = True, "internal", 4 * shape.lanes

    def emit(self) -> ir.Module:
        """Also generate `team`, which OpenMP's threads call to run the program."""
        super().emit()
        signature = ir.FunctionType(VOID, [I64.as_pointer()])
        team = ir.Function(self.module, signature, "team")
        b = ir.IRBuilder(team.append_basic_block("entry"))
        values = {name: b.load(b.gep(team.args[0], [integer(place)])) for place, name in enumerate(TEAM)}
        asked = ir.FunctionType(ir.IntType(32), []).as_pointer()
        thread, threads = (
            b.sext(b.call(b.inttoptr(values[name], asked), []), I64) for name in ("thread_number", "thread_count")
        )
        scratch = b.add(values["scratch"], b.mul(thread, values["scratch_bytes"]))
        b.call(
            self.run,
            [
                b.inttoptr(values["program"], I64.as_pointer()), values["steps"],
                b.inttoptr(values["sync"], I64.as_pointer()), b.inttoptr(scratch, FLOAT.as_pointer()), threads,
                values["pause"],
            ],
        )  # fmt: skip
        b.ret_void()
        return self.module

    def layer(self, layer: dict[str, Any], scratch: Any, next_tile: Any) -> None:
        for kind, emit in (
            (TRANSFORM, self.transform_weights), (CONVOLVE, self.convolve), (GATE, self.gate),
            (CORRELATE, self.correlate),
        ):  # fmt: skip
            with self.b.if_then(self.b.icmp_signed("==", layer["kind"], integer(kind))):
                emit(dict(layer), scratch, next_tile)

    def convolve(self, layer: dict[str, Any], scratch: Any, next_tile: Any) -> None:
        layer |= {"weight": layer["packed"], "stored": layer["outputs"]}
        layer |= {
            name.replace("residual1", "residual2"): value
            for name, value in layer.items()
            if name.startswith("residual1")
        }
        super().layer(layer, scratch, next_tile)

    def transform_weights(self, layer: dict[str, Any], scratch: Any, next_tile: Any) -> None:
        """Transform weights to (place, outputs / group, inputs, group)."""
        b, group, lanes = self.b, self.shape.group, self.shape.lanes
        groups = b.udiv(layer["outputs"], integer(group))
        to_next = self.times(layer["inputs"], layer["outputs"])
        with self.partition(next_tile, self.times(groups, layer["inputs"]), integer(lanes)) as first:
            number, channel = b.udiv(first, layer["inputs"]), b.urem(first, layer["inputs"])
            with self.loop(integer(lanes)) as more:
                source = self.sum(self.times(b.add(channel, more), layer["tap_channel"]), self.times(number, group))
                target = self.at(layer["packed"], self.times(b.add(first, more), group))
                self.transform_taps(
                    self.at(layer["weight"], source), layer["tap_row"], layer["tap_column"], target, to_next
                )

    def gate(self, layer: dict[str, Any], scratch: Any, next_tile: Any) -> None:
        b, zero = self.b, self.constant(0)
        residual_scale = self.residual_scale(layer)
        with self.partition(next_tile, layer["tiles"], integer(1)) as row:
            image, row = b.udiv(row, layer["height"]), b.urem(row, layer["height"])
            with self.loop(layer["width"]) as column, self.loop(layer["outputs"], self.shape.lanes) as channel:
                x, residual1, out = (self.where(layer, name, channel, image, row, column) for name in _MAPS)
                value = self.load(residual1)
                self.store(b.select(b.fcmp_ordered("<", self.load(x), zero), b.fmul(value, residual_scale), value), out)

    def correlate(self, layer: dict[str, Any], scratch: Any, next_tile: Any) -> None:
        """Compute gradients for 32 x 32 channels at a time: products at each place, summed over all tiles."""
        b, shape, lanes = self.b, self.shape, self.shape.lanes
        to_next = b.add(self.times(layer["tiles_per_batch"], CHANNELS), integer(GAP))
        xs, ys = scratch, self.at(scratch, self.times(to_next, PLACES))
        sums = self.at(scratch, self.times(to_next, 2 * PLACES))
        to_next_sum = CHANNELS * CHANNELS + GAP
        blocks = b.udiv(layer["inputs"], integer(CHANNELS))
        more = b.icmp_signed("!=", layer["residuals"], integer(0))
        pairs = self.times(blocks, b.udiv(layer["outputs"], integer(CHANNELS)))
        with self.partition(next_tile, pairs, integer(1)) as item:
            ins, outs = (self.times(divide(item, blocks), CHANNELS) for divide in (b.urem, b.udiv))
            with self.loop(integer(PLACES * to_next_sum), lanes) as index:
                self.store(self.constant(0), self.at(sums, index))
            with self.loop(layer["tiles"], layer["tiles_per_batch"]) as first:
                there = self.least(b.sub(layer["tiles"], first), layer["tiles_per_batch"])
                with self.loop(integer(CHANNELS), lanes) as channel, self.loop(there) as tile:
                    target = b.add(self.times(tile, CHANNELS), channel)
                    for channels, read, transform, to in (
                        (ins, self.piece, self.to_tile, xs), (outs, self.gradient, self.to_gradient, ys),
                    ):  # fmt: skip
                        piece = read(layer, b.add(channels, channel), b.add(first, tile))
                        self.store_tile(self.transform_2d(transform, piece), self.at(to, target), to_next)
                with self.loop(integer(PLACES)) as place:
                    x, y = (self.at(some, self.times(place, to_next)) for some in (xs, ys))
                    with (
                        self.loop(integer(CHANNELS), shape.vectors * lanes) as channel,
                        self.loop(integer(CHANNELS), shape.rows) as output,
                    ):
                        offset = self.sum(self.times(place, to_next_sum), self.times(output, CHANNELS), channel)
                        self.add_products(self.at(x, channel), self.at(y, output), there, self.at(sums, offset))
            with self.loop(integer(CHANNELS)) as output, self.loop(integer(CHANNELS), lanes) as channel:
                total = self.at(sums, self.times(output, CHANNELS), channel)
                columns = [
                    [self.load(self.at(total, integer((i * PIECE + j) * to_next_sum))) for i in range(PIECE)]
                    for j in range(PIECE)
                ]
                place = self.sum(self.times(b.add(outs, output), layer["tap_channel"]), ins, channel)
                for i, values in enumerate(self.transform_2d(self.from_weight, columns)):
                    for j, value in enumerate(values):
                        tap = self.sum(place, self.times(layer["tap_row"], i), self.times(layer["tap_column"], j))
                        target = self.at(layer["out"], tap)
                        self.store(b.select(more, b.fadd(value, self.load(target)), value), target)

    def add_products(self, x: Any, y: Any, tiles: Any, total: Any) -> None:
        """total[output, channel] += y[tile, output] * x[tile, channel], for a block of outputs and channels."""
        b, shape = self.b, self.shape
        targets = [
            self.at(total, integer(row * CHANNELS + v * shape.lanes))
            for row in range(shape.rows)
            for v in range(shape.vectors)
        ]
        begun = [self.load(target) for target in targets]
        before, head, after = b.block, self.block("products"), self.block("summed")
        b.branch(head)
        b.position_at_end(head)
        tile = b.phi(I64)
        tile.add_incoming(integer(0), before)
        sums = [b.phi(self.vector) for _ in targets]
        here = self.times(tile, CHANNELS)
        factors = [self.load(self.at(x, here, integer(v * shape.lanes))) for v in range(shape.vectors)]
        found = []
        for row in range(shape.rows):
            value = self.broadcast(b.load(self.at(y, here, integer(row))))
            for v, factor in enumerate(factors):
                found.append(self.fma(value, factor, sums[row * shape.vectors + v]))
        following = b.add(tile, integer(1))
        tile.add_incoming(following, head)
        for phi, value, start in zip(sums, found, begun, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, head)
        b.cbranch(b.icmp_signed("<", following, tiles), head, after)
        b.position_at_end(after)
        for value, target in zip(found, targets, strict=True):
            self.store(value, target)

    # Addresses of pixels.

    @contextmanager
    def each(self, channels: Any, tiles: Any) -> Iterator[tuple[Any, Any]]:
        with self.loop(tiles) as tile, self.loop(channels, self.shape.lanes) as channel:
            yield channel, tile

    def corner(self, layer: dict[str, Any], tile: Any) -> tuple[Any, Any]:
        return super().corner(layer, self.b.urem(tile, layer["per_image"]))

    def piece(self, layer: dict[str, Any], channel: Any, tile: Any) -> list[list[Any]]:
        return self.read(layer, "x", channel, tile, range(-1, PIECE - 1))

    def gradient(self, layer: dict[str, Any], channel: Any, tile: Any) -> list[list[Any]]:
        return self.read(layer, "residual1", channel, tile, range(TILE))

    def read(self, layer: dict[str, Any], name: str, channel: Any, tile: Any, pixels: range) -> list[list[Any]]:
        """The columns of the pixels around a tile, zeros outside the image."""
        b = self.b
        top, left = self.corner(layer, tile)
        rows, columns = ([b.add(start, integer(i)) for i in pixels] for start in (top, left))
        # As unsigned integers, negative positions are outside as well.
        in_rows = [b.icmp_unsigned("<", row, layer["height"]) for row in rows]
        in_columns = [b.icmp_unsigned("<", column, layer["width"]) for column in columns]
        zeros = b.bitcast(self.zeros, FLOAT.as_pointer())
        return [
            [
                self.load(b.select(b.and_(a, c), self.pixel(layer, name, channel, tile, row, column), zeros))
                for row, a in zip(rows, in_rows, strict=True)
            ]
            for column, c in zip(columns, in_columns, strict=True)
        ]

    def pixel(self, layer: dict[str, Any], name: str, channel: Any, tile: Any, row: Any, column: Any) -> Any:
        return self.where(layer, name, channel, self.b.udiv(tile, layer["per_image"]), row, column)

    def where(self, layer: dict[str, Any], name: str, channel: Any, image: Any, row: Any, column: Any) -> Any:
        steps = ((image, "image"), (row, "row"), (column, "pixel"))
        return self.at(layer[name], channel, *(self.times(index, layer[f"{name}_{step}"]) for index, step in steps))

    # Transforms.

    def from_weight(self, m: Sequence[Any]) -> list[Any]:
        """Gᵀ m."""
        b, fma = self.b, self.fma
        even1, even2 = b.fadd(m[1], m[2]), b.fadd(m[3], m[4])
        odd1, odd2 = b.fsub(m[2], m[1]), b.fsub(m[3], m[4])
        scaled = b.fmul(even1, self.constant(-1 / 6))
        return [
            fma(m[0], 1 / 4, fma(even2, 1 / 24, scaled)),
            fma(odd2, 1 / 12, b.fmul(odd1, self.constant(1 / 6))),
            fma(even2, 1 / 6, b.fadd(scaled, m[5])),
        ]

    def to_gradient(self, y: Sequence[Any]) -> list[Any]:
        """A y."""
        b, fma = self.b, self.fma
        even, odd = b.fadd(y[0], y[2]), b.fadd(y[1], y[3])
        double, other = fma(y[2], 4, y[0]), fma(y[3], 8, b.fadd(y[1], y[1]))
        return [y[0], b.fadd(even, odd), b.fsub(even, odd), b.fadd(double, other), b.fsub(double, other), y[3]]
