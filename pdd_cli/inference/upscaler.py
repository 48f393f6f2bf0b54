"""Picture → picture `scale` times as large, in tiles that fit the memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from pdd_cli.device import available_memory
from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.images import Array, Picture
from pdd_cli.inference.engines import Engine, FloatArray, bytes_per_pixel
from pdd_cli.inference.tiling import TilePlan, fit_tile, plan_tiles

# The automatic tile: what its activations may take of the free memory, and how large it gets at most. Beyond a
# megapixel of LR a larger tile saves almost no overlap, and nothing would be heard of an image for minutes.
_MEMORY_SHARE = 1 / 3
_MOST_PIXELS = 1 << 20
_SMALLEST_SIDE = 32

OnTile = Callable[[int, int], None]
"""Told after each tile: how many are done, of how many."""


@dataclass(frozen=True, eq=False)
class Upscaled:
    """One upscaled picture, and what it took."""

    picture: Picture
    tiles: int
    model_seconds: float


class Upscaler:
    """Upscales pictures with one engine.

    `tile`: "auto", 0 (whole image) or the longest side of a tile in LR pixels. `overlap` of neighbouring tiles in LR
    pixels. When memory runs out the tiles get smaller from then on, and `notify` is told once.

    Raises InputError for a model that takes or gives neither 1 nor 3 channels.
    """

    def __init__(self, engine: Engine, *, tile: int | str, overlap: int, notify: Callable[[str], None]) -> None:
        model = engine.model
        if model.in_channels not in (1, 3) or model.out_channels != model.in_channels:
            raise InputError(
                f"the model takes {model.in_channels} and gives {model.out_channels} channels",
                "pdd upscale works with models from 3 to 3 channels, or from 1 to 1.",
            )
        self.engine = engine
        self.scale = model.scale
        self._overlap = overlap
        self._notify = notify
        self._side = tile if isinstance(tile, int) and tile > 0 else None
        self._pixels: float = math.inf
        if tile == "auto":
            memory = available_memory(engine.runtime.device) * _MEMORY_SHARE
            self._pixels = max(_SMALLEST_SIDE**2, min(_MOST_PIXELS, memory // bytes_per_pixel(model)))

    def plan(self, height: int, width: int) -> TilePlan:
        """The tiles of an image of this size, as they would be computed now."""
        multiple = self.engine.model.size_multiple
        height, width = (-(-side // multiple) * multiple for side in (height, width))
        tile = None
        if self._side is not None:
            tile = (self._side, self._side)
        elif height * width > self._pixels:
            tile = fit_tile(height, width, int(self._pixels))
        return plan_tiles(height, width, tile=tile, overlap=self._overlap, multiple=multiple)

    def upscale(self, picture: Picture, on_tile: OnTile = lambda done, total: None) -> Upscaled:
        """`picture` upscaled, in its own bit depth, with its alpha and metadata.

        A gray picture stays exactly gray, opaque stays exactly opaque. Raises PddError when the model gives values
        that aren't finite even in fp32, ResourceError when the memory doesn't suffice for the smallest tiles.
        """
        while True:
            try:
                return self._upscale(picture, on_tile)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
            self._shrink(self.plan(picture.height, picture.width))

    def _upscale(self, picture: Picture, on_tile: OnTile) -> Upscaled:
        pixels = picture.pixels
        gray = picture.channels == 1 or bool((pixels == pixels[:, :, :1]).all())
        alpha = picture.alpha
        see_through = alpha is not None and bool((alpha != np.iinfo(alpha.dtype).max).any())
        tiles = len(self.plan(picture.height, picture.width))
        run = _Run(self, on_tile, tiles * (2 if see_through else 1))

        colours = picture.to_float().transpose(2, 0, 1)
        if gray:
            sr = run.gray(colours[0])[:, :, None].repeat(picture.channels, axis=2)
        else:
            sr = run.colour(colours)
        sr_alpha: Array | None = None
        if alpha is not None:
            if see_through:
                sr_alpha = _keep_extremes(run.gray(_fraction(alpha)), _fraction(alpha), self.scale)
            else:
                sr_alpha = np.ones(sr.shape[:2], np.float32)
        result = Picture.from_float(sr, alpha=sr_alpha, bits=picture.bits)
        result = replace(result, icc=picture.icc, exif=picture.exif, dpi=picture.dpi)
        return Upscaled(result, run.total, run.model_seconds)

    def _shrink(self, plan: TilePlan) -> None:
        side = max(plan.tile_size) // 2
        if side < _SMALLEST_SIDE:
            raise ResourceError(
                f"out of memory even with tiles of {max(plan.tile_size)} pixels",
                "Close other programs, or use --device cpu or a lighter model.",
            )
        if self.engine.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        self._notify(f"out of memory: going on with tiles of at most {side} pixels")
        # Told once: whatever comes later is known from the first time.
        self._notify = lambda text: None
        self._side = side


class _Run:
    """The forward passes of one picture."""

    def __init__(self, upscaler: Upscaler, on_tile: OnTile, total: int) -> None:
        self.upscaler = upscaler
        self.total = total
        self.done = 0
        self.model_seconds = 0.0
        self._on_tile = on_tile

    def colour(self, planes: Array) -> FloatArray:
        """(3, h, w) to (h*scale, w*scale, 3); a model of one channel sees the three one after the other."""
        if self.upscaler.engine.model.in_channels == 3:
            sr = self._tiled(planes[None])[0]
        else:
            sr = self._tiled(planes[:, None])[:, 0]
        return np.asarray(sr.transpose(1, 2, 0))

    def gray(self, plane: Array) -> FloatArray:
        """(h, w) to (h*scale, w*scale): the mean of what a colour model makes of three equal channels."""
        channels = self.upscaler.engine.model.in_channels
        batch = np.broadcast_to(plane, (1, channels, *plane.shape))
        return np.asarray(self._tiled(batch)[0].mean(axis=0))

    def _tiled(self, lr: Array) -> FloatArray:
        """(N, C, h, w) to (N, C, h*scale, w*scale), blended from tiles."""
        height, width = lr.shape[-2:]
        scale, plan = self.upscaler.scale, self.upscaler.plan(height, width)
        bottom, right = plan.rows[-1].stop - height, plan.columns[-1].stop - width
        if bottom or right:
            lr = np.pad(lr, ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge")
        if len(plan) == 1:
            return self._finite(lr)[..., : height * scale, : width * scale]
        sr = np.zeros((*lr.shape[:2], (height + bottom) * scale, (width + right) * scale), np.float32)
        for row, column, weights in plan.tiles(scale):
            tile = self._finite(lr[..., row.at(1), column.at(1)])
            tile *= weights
            sr[..., row.at(scale), column.at(scale)] += tile
        return sr[..., : height * scale, : width * scale]

    def _finite(self, lr: Array) -> FloatArray:
        engine, lr = self.upscaler.engine, np.array(lr, np.float32, order="C")
        started = time.perf_counter()
        sr = engine.run(lr)
        if not np.isfinite(sr).all():
            # fp16 overflows in this family of networks.
            sr = engine.run(lr, exact=True)
            if not np.isfinite(sr).all():
                raise PddError("the model gives values that are not finite, even in fp32: its weights are damaged")
        self.model_seconds += time.perf_counter() - started
        self.done += 1
        self._on_tile(self.done, self.total)
        return sr


def _fraction(alpha: Array) -> FloatArray:
    return alpha.astype(np.float32) / np.float32(np.iinfo(alpha.dtype).max)


def _keep_extremes(sr: FloatArray, lr: FloatArray, scale: int) -> FloatArray:
    """`sr` with exact 0 and 1 where all LR neighbours have it, so that opaque and empty areas stay so."""
    height, width = lr.shape
    around = np.pad(lr, 1, mode="edge")
    windows = [around[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    sr = sr.copy()
    for value in (0.0, 1.0):
        flat = np.all([window == value for window in windows], axis=0)
        sr[flat.repeat(scale, axis=0).repeat(scale, axis=1)] = value
    return sr


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("not enough memory", "out of memory", "can't allocate memory", "bad_alloc"))
