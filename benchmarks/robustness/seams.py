"""How close `pdd upscale` comes to the whole-image fp32 forward pass of spandrel, and whether tiles leave seams.

Usage: python benchmarks/robustness/seams.py WEIGHTS_FILE IMAGE... [--tile 96 128 0] [--engine torch] [--precision fp32]
Prints, per image and setting, the PSNR of the 8-bit result to spandrel's; and, against pdd's own result for the whole
image, what tiles alone change: the PSNR of the worst 16 x 16 LR pixels, and the largest jump of the difference from
one output row or column to the next (mean over the line, levels of 255) where tiles meet and elsewhere. A seam would
stand out there. Ends with a table over all images.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from spandrel import ModelLoader

from pdd_cli.engines.select import choose_engine
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.models.loading import load_sr_model
from pdd_cli.runtime import choose_runtime
from pdd_cli.upscaling.tiling import Span, TilePlan
from pdd_cli.upscaling.upscaler import Upscaler
from pdd_cli.weights.states import read_state

# LR pixels of a side of the blocks that are judged one by one.
BLOCK = 16


@dataclass(frozen=True)
class Row:
    """One image at one tile size; `worst`, `seam` and `elsewhere` are None where a single tile covers the image."""

    tiles: int
    psnr: float
    worst: float | None = None
    seam: float | None = None
    elsewhere: float | None = None

    def __str__(self) -> str:
        line = f"{self.tiles:3} tiles, {self.psnr:.1f} dB"
        if self.worst is None:
            return line
        return (
            f"{line}; worst block {self.worst:.1f} dB, jump at borders {self.seam:.3f}, elsewhere {self.elsewhere:.3f}"
        )


def spandrel_whole(weights: Path, pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 to (H, W, 3) uint8 by spandrel's own network in fp32, the whole image at once."""
    model = ModelLoader().load_from_state_dict(read_state(weights)).eval()
    with torch.inference_mode():
        sr = model(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)
    return DecodedImage.from_float(sr[0].permute(1, 2, 0).numpy()).pixels


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def worst_block(a: np.ndarray, b: np.ndarray, side: int) -> float:
    """The lowest PSNR of any block of side x side output pixels."""
    return min(
        psnr(a[y : y + side, x : x + side], b[y : y + side, x : x + side])
        for y in range(0, a.shape[0], side)
        for x in range(0, a.shape[1], side)
    )


def border_lines(spans: tuple[Span, ...], scale: int, length: int) -> np.ndarray:
    """Which output lines lie within 4 LR pixels of the start, middle or end of an overlap."""
    near = np.zeros(length, bool)
    for before, after in itertools.pairwise(spans):
        for at in (after.start, (after.start + before.stop) // 2, before.stop):
            near[max(at - 4, 0) * scale : (at + 4) * scale] = True
    return near


def jumps(result: np.ndarray, whole: np.ndarray, plan: TilePlan, scale: int) -> tuple[float, float]:
    """The largest mean jump of the difference to the next row or column: at borders of tiles, and elsewhere."""
    difference = result.astype(np.float32) - whole
    at, away = [0.0], [0.0]
    for axis, spans in ((0, plan.rows), (1, plan.columns)):
        jump = np.abs(np.diff(difference, axis=axis)).mean(axis=(1 - axis, 2))
        near = border_lines(spans, scale, len(jump))
        at += jump[near].tolist()
        away += jump[~near].tolist()
    return max(at), max(away)


def summary(rows: dict[str, list[Row]]) -> str:
    lines = ["| tile | images in tiles | PSNR, mean / worst | worst block | largest jump at borders / elsewhere |"]
    lines.append("|---|---|---|---|---|")
    for name, found in rows.items():
        values = [row.psnr for row in found]
        cells = [name, f"{sum(row.tiles > 1 for row in found)} of {len(found)}"]
        cells.append(f"{np.mean(values):.1f} / {min(values):.1f} dB")
        tiled = [row for row in found if row.worst is not None]
        cells.append(f"{min(row.worst or 0 for row in tiled):.1f} dB" if tiled else "")
        cells.append(f"{max(row.seam or 0 for row in tiled):.3f} / {max(row.elsewhere or 0 for row in tiled):.3f}"
                     if tiled else "")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--tile", nargs="+", type=int, default=[96, 128, 192, 256, 512, 0], help="0: the whole image")
    parser.add_argument("--engine", nargs="+", default=["torch"])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--crop", type=int, default=0, help="only the N x N pixels in the middle of each image")
    arguments = parser.parse_args()
    engines = [
        choose_engine(load_sr_model(arguments.weights), choose_runtime("cpu", precision), engine)
        for engine in arguments.engine
        for precision in arguments.precision
    ]
    rows: dict[str, list[Row]] = {}
    for path in arguments.images:
        picture = read_image(path)
        if arguments.crop:
            top, left = (max(0, side - arguments.crop) // 2 for side in (picture.height, picture.width))
            picture = DecodedImage(picture.pixels[top : top + arguments.crop, left : left + arguments.crop])
        picture = DecodedImage(np.broadcast_to(picture.pixels, (picture.height, picture.width, 3)))
        started = time.perf_counter()
        expected = spandrel_whole(arguments.weights, picture.pixels)
        print(f"{path.name} {picture.width}x{picture.height}: {time.perf_counter() - started:.0f} s", flush=True)
        for engine in engines:
            # Settings that plan the same tiles give the same image.
            made: dict[TilePlan, np.ndarray] = {}
            for tile in sorted(arguments.tile, key=lambda side: side or 10**9, reverse=True):
                worker = Upscaler(engine, tile=tile, overlap=arguments.overlap, notify=print)
                plan = worker.plan(picture.height, picture.width)
                if plan not in made:
                    made[plan] = worker.upscale(picture).picture.pixels
                result = made[plan]
                row = Row(len(plan), psnr(result, expected))
                if len(plan) > 1:
                    whole = next((image for known, image in made.items() if len(known) == 1), expected)
                    row = Row(
                        len(plan),
                        row.psnr,
                        worst_block(result, whole, BLOCK * worker.scale),
                        *jumps(result, whole, plan, worker.scale),
                    )
                name = f"{engine.name} {engine.runtime.precision} {tile or 'whole'}"
                rows.setdefault(name, []).append(row)
                print(f"  {name:24} {row}", flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
