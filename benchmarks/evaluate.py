"""Images per second of `pdd evaluate`'s scoring against the obvious loop over pyiqa's metrics, on the same files.

Usage: python benchmarks/evaluate.py [--pairs 24] [--side 1000] [--metrics psnr ssim niqe] [--repeat 2]
Makes pairs of images (sums of waves with grain, PNG), scores them in both ways in turn, and prints the rates, the
largest difference between the scores, and how much memory a later quarter of the images took beyond the first.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyiqa
import torch
from PIL import Image

from pdd_cli.iqa.metrics import Item, load_metrics, metric_infos, score


def make_pairs(folder: Path, count: int, side: int) -> list[Item]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    items = []
    for index in range(count):
        waves = sum(
            np.sin(2 * np.pi * (a * x + b * y))[..., None] * rng.random(3) for a, b in rng.integers(1, 60, (6, 2))
        )
        clean = 128 + 25 * waves
        paths = []
        for kind, grain in (("hr", 4), ("sr", 9)):
            paths.append(folder / f"{index}_{kind}.png")
            pixels = np.clip(clean + rng.normal(0, grain, clean.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(paths[-1], compress_level=1)
        items.append(Item(paths[1], paths[0]))
    return items


def obvious(items: list[Item], names: list[str]) -> list[dict[str, float]]:
    metrics = {name: pyiqa.create_metric(name, device="cpu") for name in names}
    return [
        {
            name: float(metric(str(i.image), str(i.reference)) if metric.metric_mode == "FR" else metric(str(i.image)))
            for name, metric in metrics.items()
        }
        for i in items
    ]


def ours(items: list[Item], names: list[str]) -> list[dict[str, float]]:
    loaded, lacking = load_metrics(metric_infos(names), device="cpu", offline=False, on_event=lambda event: None)
    assert not lacking, lacking
    scores, peaks = [], []
    for one in score(items, loaded):
        assert not one.problems, one.problems
        scores.append(one.values)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    quarter = len(peaks) // 4
    print(f"  peak memory after a quarter {peaks[quarter]:.0f} MiB, at the end {peaks[-1]:.0f} MiB")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--metrics", nargs="+", default=["psnr", "ssim", "niqe"])
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, pyiqa {pyiqa.__version__}, {arguments.pairs} pairs")
    with tempfile.TemporaryDirectory() as folder:
        items = make_pairs(Path(folder), arguments.pairs, arguments.side)
        for _ in range(arguments.repeat):
            found = {}
            for way in (ours, obvious):
                started = time.perf_counter()
                found[way] = way(items, arguments.metrics)
                seconds = time.perf_counter() - started
                print(f"{way.__name__:8} {seconds:7.1f} s {len(items) / seconds:6.3f} images/s")
            worst = {
                name: max(abs(a[name] - b[name]) for a, b in zip(found[ours], found[obvious], strict=True))
                for name in arguments.metrics
            }
            print("largest differences:", {name: f"{value:.2g}" for name, value in worst.items()})


if __name__ == "__main__":
    main()
