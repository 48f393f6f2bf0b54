"""Upscale an image to the requested size, in tiles that fit the memory; rows are yielded when they are final."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pdd_cli.engines.base import Engine, FloatArray
from pdd_cli.errors import InputError, OutOfMemory, PddError, ResourceError
from pdd_cli.imaging.image import (
    MOST_PIXELS,
    Array,
    DecodedImage,
    ImageSpec,
    ImageStream,
    collect_rows,
    from_float,
    to_float,
)
from pdd_cli.runtime import available_memory, resident_memory
from pdd_cli.upscaling.colour import Correction, bleed, correct
from pdd_cli.upscaling.processing import Processing, self_ensemble, snap_flats, unit_vectors, with_blue
from pdd_cli.upscaling.resizing import SizeRequest, passes, resize_row_chunks
from pdd_cli.upscaling.tiling import Span, TilePlan, Weights, fit_tile, plan_tiles

# Automatic tiles: the fraction of the free memory for activations, and the maximum size. Tiles of more than a megapixel
# save almost no overlap, and progress would be shown only every few minutes.
_MEMORY_FRACTION = 1 / 3
_MAX_TILE_PIXELS = 1 << 20
_MIN_SIDE = 32

# Fraction of the remaining --max-memory that is planned, and bytes that a process takes besides.
_SAFE = 0.9
_OVERHEAD = 150 << 20
# Bytes per pixel of 4 samples while decoding: the file, Pillow's pixels and a copy.
_DECODED_BYTES = 12
_TIMED_SIDE = 64
# LR pixels from the opposite edge that a seamless image gets at least, whatever the overlap of tiles.
_LEAST_WRAPPED = 32

OnTile = Callable[[int, int], None]
"""Called after each tile with the number of finished tiles and of all tiles."""


@dataclass(frozen=True, eq=False)
class UpscaleResult:
    """One upscaled picture, with the number of tiles and the seconds in the model."""

    picture: DecodedImage
    tiles: int
    model_seconds: float


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of one picture: peak `memory` of the process and `activations` of the network, in bytes.

    `seconds`: extrapolated from a small tile; 0 if it was not measured.
    """

    memory: int
    activations: int
    seconds: float = 0.0


@dataclass(frozen=True)
class UpscalePlan:
    """How one image is upscaled, decided once.

    `size`: (width, height) of the output; `passes`: the tiles of each pass of the model; `gray`: all channels are
    equal; `opaque`: no pixel is transparent; `direct`: the output is the model's output for the whole image.
    """

    size: tuple[int, int]
    passes: tuple[TilePlan, ...]
    gray: bool
    opaque: bool
    direct: bool


class Upscaler:
    """Upscales pictures with one engine.

    `tile`: "auto", 0 (whole image) or the longest side of a tile in LR pixels. `overlap`: LR pixels of context around a
    tile. `size`: of the outputs. `max_memory`: maximum memory of the process on the CPU, in bytes. When memory runs
    out, tiles become smaller from then on, and `notify` is called once.

    Raises InputError unless the model has 1 input and output channel, or 3.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tile: int | str,
        overlap: int,
        notify: Callable[[str], None],
        size: SizeRequest = SizeRequest(),
        correction: Correction = "none",
        processing: Processing = Processing(),
        max_memory: int | None = None,
    ) -> None:
        model = engine.model
        if model.in_channels not in (1, 3) or model.out_channels != model.in_channels:
            raise InputError(
                f"the model takes {model.in_channels} and gives {model.out_channels} channels",
                "pdd upscale works with models from 3 to 3 channels, or from 1 to 1.",
            )
        self.engine = engine
        self.scale = model.scale
        self.size = size
        self.correction: Correction = correction
        self.processing = processing
        self._overlap = overlap
        self._notify = notify
        # Maximum size of a tile with its overlap, in LR pixels: a side, or a number of pixels.
        self._side = tile + 2 * overlap if isinstance(tile, int) and tile > 0 else None
        self._pixels: float = math.inf
        self._bytes_per_pixel = engine.bytes_per_pixel
        fitting = available_memory(engine.runtime.device_name) * _MEMORY_FRACTION // self._bytes_per_pixel
        if tile == "auto":
            self._pixels = max(_MIN_SIDE**2, min(_MAX_TILE_PIXELS, fitting))
        self._batch_pixels = min(engine.batch_pixels, fitting)
        self.reserved = 0  # bytes that other parts, such as a video encoder, use while a picture is upscaled
        self._max_memory = max_memory
        self._base_memory = resident_memory() + _OVERHEAD
        self._seconds_per_pixel = 0.0

    @property
    def most_pixels(self) -> int:
        """Maximum size of inputs: by `max_memory`, else 179 megapixels, as a limit for decompression bombs."""
        if self._max_memory is not None:
            return max(1, (self._max_memory - self._base_memory) // _DECODED_BYTES)
        return max(1, min(MOST_PIXELS, available_memory("cpu") // _DECODED_BYTES))

    def plan(self, height: int, width: int) -> TilePlan:
        """The tiles of a pass over an image of this size, as they would be computed now."""
        multiple = self.engine.model.size_multiple
        height, width = (-(-side // multiple) * multiple for side in (height, width))
        tile = None
        pixels = self._pixels
        if self._max_memory is not None:
            pixels = min(pixels, self._affordable(height, width))
        if self._side is not None:
            tile = (self._side, self._side) if self._side**2 <= pixels else fit_tile(height, width, int(pixels))
        elif height * width > pixels:
            tile = fit_tile(height, width, int(pixels))
        return plan_tiles(height, width, tile=tile, overlap=2 * self._overlap, multiple=multiple)

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the output for an input of this size."""
        return self.size.size_of(width, height, self.scale)

    def tiles(self, width: int, height: int) -> int:
        """The number of tiles of an input of this size, over all passes."""
        return sum(map(len, self._passes(width, height)))

    def estimate(self, spec: ImageSpec, *, streamed: bool, timed: bool = True) -> Estimate:
        """Estimate the cost of an input of this spec; `streamed`: the output is written row by row."""
        width, height = self.output_size(spec.width, spec.height)
        inputs = self._inputs(spec.width, spec.height)
        depth = spec.bits // 8
        memory = 2 * spec.bytes
        if len(inputs) > 1:
            memory += 2 * inputs[-1][0] * inputs[-1][1] * spec.samples * 2
        if self.correction != "none" or self.processing.needs_whole:
            memory += 3 * width * height * spec.samples * 4
        if not streamed:
            memory += 2 * width * height * spec.samples * depth
        plans = self._passes(spec.width, spec.height)
        sides = max(plan.tile_size for plan in plans)
        memory += _rows_bytes(sides[0], inputs[-1][0], self.scale)
        memory += (inputs[0][0] * inputs[0][1] - spec.width * spec.height) * spec.samples * depth
        activations = sides[0] * sides[1] * self._bytes_per_pixel
        seconds = (
            sum(len(plan) * math.prod(plan.tile_size) for plan in plans) * self._time_of_a_pixel() if timed else 0.0
        )
        on_cpu = self.engine.runtime.device_type == "cpu"
        memory += self._base_memory + self.reserved + (activations if on_cpu else 0)
        return Estimate(memory, activations, seconds)

    def check_memory(self, memory: int) -> None:
        """Raise ResourceError if an estimate exceeds the maximum memory."""
        limit = self._max_memory
        if limit is not None and memory > limit:
            raise ResourceError(
                f"needs about {memory / 2**30:.1f} GiB of memory, more than --max-memory {limit / 2**30:.1f} GiB",
                "PNG and TIFF outputs without --color-correction need the least.",
            )

    def _affordable(self, height: int, width: int) -> float:
        """Maximum LR pixels of a tile within `max_memory`, beside the other memory for an image."""
        assert self._max_memory is not None
        left = self._max_memory - self._base_memory - self.reserved - 2 * height * width * 4
        side = _MIN_SIDE
        while True:
            rows, across = min(side + 8, height), min(side + 8, width)
            needed = rows * across * self._bytes_per_pixel + _rows_bytes(rows, width, self.scale)
            if needed > left * _SAFE or rows * across >= _MAX_TILE_PIXELS:
                return side**2
            if rows == height and across == width:
                return math.inf
            side += 8

    def _time_of_a_pixel(self) -> float:
        """Seconds per LR pixel in the network, measured once on a small tile."""
        if not self._seconds_per_pixel:
            lr = np.zeros((1, self.engine.model.in_channels, _TIMED_SIDE, _TIMED_SIDE), np.float32)
            self.engine.run(lr)
            started = time.perf_counter()
            self.engine.run(lr)
            seconds = (time.perf_counter() - started) * self.processing.passes
            self._seconds_per_pixel = seconds / _TIMED_SIDE**2
        return self._seconds_per_pixel

    def upscale(self, picture: DecodedImage, on_tile: OnTile = lambda done, total: None) -> UpscaleResult:
        """`picture` upscaled, in its own bit depth, with its alpha and metadata.

        Gray stays exactly gray, opaque stays exactly opaque. Raises PddError if the model's output isn't finite even
        in fp32, ResourceError if the memory doesn't suffice for the smallest tiles.
        """
        while True:
            try:
                run = self.start(picture, on_tile)
                whole = collect_rows(run.output)
                return UpscaleResult(_picture(whole, run.output, picture), run.tiles, run.model_seconds)
            except MemoryError:
                self.shrink(picture)

    def batch(self, width: int, height: int) -> int:
        """The fastest batch size for images of this size in `upscale_all`."""
        return max(1, int(self._batch_pixels // (width * height)))

    def upscale_all(self, pictures: Sequence[DecodedImage]) -> list[UpscaleResult]:
        """Upscale pictures of the same size, in one batch of the model if possible."""
        if len(pictures) > 1 and all(one.alpha is None and self.plan_image(one).direct for one in pictures):
            started = time.perf_counter()
            try:
                sr = self.engine.run_rounded(np.stack([picture.pixels for picture in pictures]))
            except OutOfMemory:
                sr = None
                self._batch_pixels = 0
            if sr is not None:
                seconds = (time.perf_counter() - started) / len(pictures)
                return [
                    UpscaleResult(replace(picture, pixels=pixels), 1, seconds)
                    for picture, pixels in zip(pictures, sr, strict=True)
                ]
        return [self.upscale(picture) for picture in pictures]

    def plan_image(self, picture: DecodedImage) -> UpscalePlan:
        """How `picture` would be upscaled now."""
        width, height = picture.width, picture.height
        size, tiles = self.output_size(width, height), self._passes(width, height)
        processing = self.processing
        if processing.normal_map and picture.channels == 1:
            raise InputError("a gray image is not a normal map", "Leave --normal-map out for it.")
        gray = picture.channels == 1 or (_is_gray(picture.pixels) and not processing.normal_map)
        opaque = picture.alpha is None or _is_opaque(picture.alpha)
        direct = (
            picture.channels == self.engine.model.in_channels == 3
            and self.correction == "none"
            and processing == Processing()
            and size == (width * self.scale, height * self.scale)
            and len(tiles[0]) == 1
            and opaque
            and not gray
        )
        return UpscalePlan(size, tiles, gray, opaque, direct)

    def start(self, picture: DecodedImage, on_tile: OnTile = lambda done, total: None) -> UpscaleStream:
        """Upscale `picture` as a stream whose rows are computed when they are read, so it is never whole in memory.

        Reading raises PddError as `upscale` does, and MemoryError; call `shrink` then and try again.
        """
        return UpscaleStream(self, picture, on_tile)

    def shrink(self, picture: DecodedImage) -> None:
        """Make tiles smaller after memory ran out for `picture`. Raises ResourceError if they can't be smaller."""
        seen = max(self.plan(picture.height, picture.width).tile_size)
        side = seen // 2
        if side < _MIN_SIDE:
            raise ResourceError(
                f"out of memory even with tiles of {seen} pixels",
                "Close other programs, or use --device cpu or a lighter model.",
            )
        if self.engine.runtime.device_type == "cuda":
            import torch

            torch.cuda.empty_cache()
        self._notify(f"out of memory: continuing with tiles of at most {side} pixels")
        # Reported once.
        self._notify = lambda text: None
        self._side = side

    @property
    def margins(self) -> tuple[int, int]:
        """LR pixels on each side of an image, (left and right, top and bottom), that come from its opposite edge."""
        return self.processing.margins(max(self._overlap, _LEAST_WRAPPED))

    def _inputs(self, width: int, height: int) -> list[tuple[int, int]]:
        """The (width, height) of the input of each pass of the model, with what a seamless image gets around it."""
        count = passes((width, height), self.output_size(width, height), self.scale)
        across, down = self.margins
        width, height = width + 2 * across, height + 2 * down
        return [(width * self.scale**n, height * self.scale**n) for n in range(count)]

    def _passes(self, width: int, height: int) -> tuple[TilePlan, ...]:
        """The tiles of each pass of the model over an image of this size."""
        return tuple(self.plan(h, w) for w, h in self._inputs(width, height))


class UpscaleStream:
    """One image being upscaled: `output` yields the rows; `tiles` and `model_seconds` are its cost."""

    def __init__(self, upscaler: Upscaler, picture: DecodedImage, on_tile: OnTile) -> None:
        self._upscaler = upscaler
        self._on_tile = on_tile
        self._done = 0
        self.model_seconds = 0.0
        self._plan = upscaler.plan_image(picture)
        self.tiles = sum(map(len, self._plan.passes))
        width, height = self._plan.size
        spec = replace(picture.spec, width=width, height=height)
        metadata = picture.metadata.resized((picture.width, picture.height), (width, height))
        if upscaler.processing.normal_map:  # vectors have no colour space, and are never converted to another
            lost = (
                (*metadata.lost, "colour profile")
                if metadata.icc or metadata.colour or metadata.cicp
                else metadata.lost
            )
            metadata = replace(metadata, icc=None, colour=(), cicp=None, lost=lost)
        self.output = ImageStream(spec, self._row_chunks(picture, spec), metadata, picture.duration, picture.share)

    def _row_chunks(self, picture: DecodedImage, spec: ImageSpec) -> Iterator[Array]:
        """The rows of the output, in the picture's bit depth, colours first, alpha last."""
        plan = self._plan
        if plan.direct:
            pixels = self._direct(picture)
            if pixels is not None:
                yield pixels
                return
        opaque, gray, processing = plan.opaque, plan.gray, self._upscaler.processing
        colours = picture.pixels[:, :, :1] if gray else picture.pixels
        if processing.normal_map:
            colours = with_blue(colours)
        source = colours
        if not opaque and picture.alpha is not None:
            # The alpha of a normal map is a height: it hides nothing.
            shown = colours if processing.normal_map else bleed(colours, picture.alpha)
            source = np.dstack([shown, picture.alpha])
        across, down = self._upscaler.margins
        if across or down:
            source = np.pad(source, ((down, down), (across, across), (0, 0)), mode="wrap")

        whole_source = source
        for tiles in plan.passes[:-1]:
            # 16 bits between two passes, which loses nothing visible.
            passed = (from_float(rows, 16) for rows in self._pass(source, tiles, gray))
            source = np.concatenate(list(passed))
        row_chunks = self._pass(source, plan.passes[-1], gray)
        factor = self._upscaler.scale ** len(plan.passes)
        row_chunks = self._resized(row_chunks, picture, spec, factor)
        if self._upscaler.correction != "none" or processing.needs_whole:
            sr = _joined(row_chunks, (spec.height, spec.width))
            if self._upscaler.correction != "none":
                sr = self._corrected(sr, picture, colours, opaque)
            if processing.mix:
                plain = self._resized(iter([to_float(whole_source)]), picture, spec, 1)
                sr = (1 - processing.mix) * sr.clip(0, 1) + processing.mix * _joined(plain, sr.shape[:2])
            if processing.snap_flats:
                sr = snap_flats(sr, colours.shape[2])
            row_chunks = iter([sr.astype(np.float32, copy=False)])
        if processing.normal_map:
            row_chunks = map(unit_vectors, row_chunks)
        for rows in row_chunks:
            values = from_float(rows, picture.bits)
            if gray and picture.channels == 3:
                values = np.dstack([values[..., :1].repeat(3, axis=2), values[..., 1:]])
            if opaque and picture.alpha is not None:
                values = np.dstack([values, np.full(values.shape[:2], np.iinfo(values.dtype).max, values.dtype)])
            yield values

    def _resized(
        self, row_chunks: Iterator[FloatArray], picture: DecodedImage, spec: ImageSpec, factor: int
    ) -> Iterator[FloatArray]:
        """Rows of the image enlarged by `factor`, with its margins, at the size of `spec` and without them."""
        across, down = self._upscaler.margins
        return resize_row_chunks(
            row_chunks,
            (picture.width * factor, picture.height * factor),
            (spec.width, spec.height),
            alpha=not self._plan.opaque,
            margins=(across * factor, down * factor),
            linear=not self._upscaler.processing.normal_map,
        )

    def _direct(self, picture: DecodedImage) -> Array | None:
        """All rows of the output; None if the model's output isn't finite."""
        started = time.perf_counter()
        sr = self._upscaler.engine.run_rounded(np.ascontiguousarray(picture.pixels)[None])
        self.model_seconds += time.perf_counter() - started
        if sr is None:
            return None
        self._on_tile(1, self.tiles)
        pixels: Array = sr[0]
        if picture.alpha is None:
            return pixels
        return np.dstack([pixels, np.full(sr.shape[1:3], np.iinfo(sr.dtype).max, sr.dtype)])

    def _corrected(self, sr: FloatArray, picture: DecodedImage, colours: Array, opaque: bool) -> FloatArray:
        count = colours.shape[2]
        visible = None if opaque or picture.alpha is None else to_float(picture.alpha)
        across, down = self._upscaler.margins
        wrap = (down > 0, across > 0)
        correction = self._upscaler.correction
        sr[..., :count] = correct(sr[..., :count].clip(0, 1), to_float(colours), correction, visible, wrap)
        return sr

    def _pass(self, source: Array, plan: TilePlan, gray: bool) -> Iterator[FloatArray]:
        """One pass of the model over (h, w, C), C = 1 (gray) or 3 and alpha: chunks of rows, w*scale wide, float.

        A chunk is overwritten when the next one is read.
        """
        height, width = source.shape[:2]
        scale = self._upscaler.scale
        if len(plan) == 1:
            yield self._tile(source, plan.tile_size, gray)[: height * scale, : width * scale]
            return
        # One array for the rows of a row of tiles: fresh memory for each costs more than the sums in it.
        held = np.empty((plan.tile_size[0] * scale, plan.columns[-1].stop * scale, source.shape[2]), np.float32)
        top = stop = 0  # the range of output rows in `held`
        row: Span | None = None
        for next_row, column, down, across in plan.tiles(scale):
            if next_row != row:
                row = next_row
                # Rows above the first one with a weight in this row of tiles are final.
                final = row.start * scale + int(np.argmax(down > 0))
                if final > top:
                    yield held[: final - top, : width * scale]
                    held[: stop - final] = held[final - top : stop - top]
                    top = final
                held[stop - top : row.stop * scale - top] = 0
                stop = row.stop * scale
            tile = self._tile(source[row.at(1), column.at(1)], plan.tile_size, gray)
            _weigh(tile, down, across)
            counted = slice(max(top - row.start * scale, 0), None)
            held[row.start * scale + (counted.start or 0) - top : stop - top, column.at(scale)] += tile[counted]
        yield held[: height * scale - top, : width * scale]

    def _tile(self, source: Array, size: tuple[int, int], gray: bool) -> FloatArray:
        """Upscale (h, w, C), padded to (H, W) = `size` by replication, to (H*scale, W*scale, C)."""
        started = time.perf_counter()
        bottom, right = size[0] - source.shape[0], size[1] - source.shape[1]
        if bottom or right:
            source = np.pad(source, ((0, bottom), (0, right), (0, 0)), mode="edge")
        planes = np.ascontiguousarray(to_float(source).transpose(2, 0, 1))
        if gray:
            sr = self._gray(planes[0])[None]
        elif self._upscaler.engine.model.in_channels == 3:
            sr = self._finite(planes[None, :3])[0]
        else:  # a model of one channel computes the three as a batch
            sr = self._finite(planes[:3, None])[:, 0]
        if len(planes) in (2, 4):
            alpha = planes[-1]
            if alpha.min() == alpha.max() and alpha.flat[0] in (0, 1):
                sr_alpha = np.full(sr.shape[1:], alpha.flat[0], np.float32)
            else:
                sr_alpha = _keep_extremes(self._gray(alpha), alpha, self._upscaler.scale)
            sr = np.concatenate([sr, sr_alpha[None]])
        self.model_seconds += time.perf_counter() - started
        self._done += 1
        self._on_tile(self._done, self.tiles)
        return np.ascontiguousarray(sr.transpose(1, 2, 0))

    def _gray(self, plane: FloatArray) -> FloatArray:
        """Upscale (h, w) to (h*scale, w*scale): the mean of a colour model's output for three equal channels."""
        channels = self._upscaler.engine.model.in_channels
        batch = np.broadcast_to(plane, (1, channels, *plane.shape))
        return np.asarray(self._finite(batch)[0].mean(axis=0))

    def _finite(self, lr: Array) -> FloatArray:
        engine, lr = self._upscaler.engine, np.array(lr, np.float32, order="C")
        tta = self._upscaler.processing.tta
        sr = self_ensemble(engine.run, lr) if tta else engine.run(lr)
        if not np.isfinite(sr).all():
            # fp16 may overflow in these networks.
            exact = partial(engine.run, exact=True)
            sr = self_ensemble(exact, lr) if tta else exact(lr)
            if not np.isfinite(sr).all():
                raise PddError("the model's output is not finite, even in fp32: its weights are damaged")
        return sr


def _joined(row_chunks: Iterator[FloatArray], size: tuple[int, int]) -> FloatArray:
    """All rows of an image of (height, width)."""
    first = next(row_chunks)
    whole = np.empty((*size, first.shape[2]), np.float32)
    row = 0
    for rows in itertools.chain([first], row_chunks):
        whole[row : row + len(rows)] = rows
        row += len(rows)
    return whole


def _is_opaque(alpha: Array) -> bool:
    return bool((alpha == np.iinfo(alpha.dtype).max).all())


def _is_gray(pixels: Array) -> bool:
    """Whether (h, w, C) has the same values in all channels."""
    return bool((pixels == pixels[:, :, :1]).all())


def _rows_bytes(rows: int, width: int, scale: int) -> int:
    """Bytes of a row of tiles, `rows` LR pixels high, while it is blended, quantised and queued for writing."""
    return rows * scale * width * scale * 4 * (2 * 4 + 4 + 3)


def _picture(whole: Array, stream: ImageStream, source: DecodedImage) -> DecodedImage:
    """The output as a picture with the metadata of `source`."""
    alpha = np.ascontiguousarray(whole[..., -1]) if stream.spec.alpha else None
    pixels = np.ascontiguousarray(whole[..., : stream.spec.channels])
    return replace(source, pixels=pixels, alpha=alpha, frames=1, metadata=stream.metadata)


def _weigh(tile: FloatArray, down: Weights, across: Weights) -> None:
    """Multiply (h, w, C) by the weights of its rows and columns, in place; most of them are 1."""
    rows, columns = down != 1, across != 1
    tile[rows] *= np.outer(down[rows], across)[:, :, None]
    tile[np.ix_(~rows, columns)] *= across[columns, None]


def _keep_extremes(sr: FloatArray, lr: FloatArray, scale: int) -> FloatArray:
    """`sr` with exactly 0 or 1 where all LR neighbours are 0 or 1, to keep opaque and empty areas exact."""
    height, width = lr.shape
    around = np.pad(lr, 1, mode="edge")
    windows = [around[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    sr = sr.copy()
    for value in (0.0, 1.0):
        flat = np.all([window == value for window in windows], axis=0)
        sr[flat.repeat(scale, axis=0).repeat(scale, axis=1)] = value
    return sr
