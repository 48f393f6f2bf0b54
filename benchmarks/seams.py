"""How close `pdd upscale` comes to the whole-image fp32 forward pass of spandrel, and whether tiles leave seams.

Usage: python benchmarks/seams.py WEIGHTS_FILE IMAGE... [--tile auto 96 128] [--engine torch] [--precision fp32 bf16]
Prints, per image and setting: PSNR of the 8-bit result; and the mean absolute difference of the output rows and
columns in the middle of overlaps, against that of all others (a visible seam would stand out there).
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from spandrel import ModelLoader

from pdd_cli.device import choose_runtime
from pdd_cli.images import Picture, read_image
from pdd_cli.inference.engines import choose_engine
from pdd_cli.inference.tiling import Span
from pdd_cli.inference.upscaler import Upscaler
from pdd_cli.models.loading import load_sr_model
from pdd_cli.weights.states import read_state


def spandrel_whole(weights: Path, pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 to (H, W, 3) uint8 by spandrel's own network in fp32, the whole image at once."""
    model = ModelLoader().load_from_state_dict(read_state(weights)).eval()
    with torch.inference_mode():
        sr = model(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)
    return Picture.from_float(sr[0].permute(1, 2, 0).numpy()).pixels


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def overlap_lines(spans: tuple[Span, ...], scale: int, length: int) -> np.ndarray:
    """Which output lines lie within 4 LR pixels of the start, middle or end of an overlap."""
    near = np.zeros(length, bool)
    for before, after in itertools.pairwise(spans):
        for at in (after.start, (after.start + before.stop) // 2, before.stop):
            near[max(at - 4, 0) * scale : (at + 4) * scale] = True
    return near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--tile", nargs="+", default=["0", "auto", "96"])
    parser.add_argument("--engine", nargs="+", default=["torch"])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--crop", type=int, default=0, help="only the top left N x N pixels of each image")
    arguments = parser.parse_args()
    engines = [
        choose_engine(load_sr_model(arguments.weights), choose_runtime("cpu", precision), engine)
        for engine in arguments.engine
        for precision in arguments.precision
    ]
    for path in arguments.images:
        picture = read_image(path)
        if arguments.crop:
            picture = Picture(picture.pixels[: arguments.crop, : arguments.crop])
        started = time.perf_counter()
        expected = spandrel_whole(arguments.weights, picture.pixels)
        print(
            f"{path.name} {picture.width}x{picture.height}: spandrel {time.perf_counter() - started:.1f} s", flush=True
        )
        for engine in engines:
            for tile in arguments.tile:
                worker = Upscaler(
                    engine, tile=tile if tile == "auto" else int(tile), overlap=arguments.overlap, notify=print
                )
                plan = worker.plan(picture.height, picture.width)
                started = time.perf_counter()
                result = worker.upscale(picture).picture.pixels
                line = (
                    f"  {engine.name} {engine.runtime.precision} tile {tile}: {len(plan)} tiles, "
                    f"{time.perf_counter() - started:.1f} s, {psnr(result, expected):.2f} dB"
                )
                difference = np.abs(result.astype(float) - expected)
                worst = difference.max()
                for axis, spans in (("rows", plan.rows), ("columns", plan.columns)):
                    profile = difference.mean(axis=(1, 2) if axis == "rows" else (0, 2))
                    near = overlap_lines(spans, worker.scale, len(profile))
                    if near.any():
                        line += (
                            f"; {axis} at overlaps {profile[near].mean():.3f}, elsewhere {profile[~near].mean():.3f}"
                        )
                print(f"{line}; largest difference {worst:.0f}/255", flush=True)


if __name__ == "__main__":
    main()
