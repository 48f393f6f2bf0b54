"""Images per second of `pdd evaluate`'s scoring against the obvious loop over pyiqa's metrics, on the same files.

Usage: python benchmarks/timing/evaluate.py [--pairs 24] [--loop-pairs 24] [--side 1000] [--metrics psnr ssim niqe]
       [--repeat 1]
Makes pairs of images (sums of waves with grain, PNG), scores them in both ways (the loop only the first --loop-pairs
of them), and prints for both the rate and the processor time an image, how much memory was held on the way, and the
largest difference between the scores. It takes the cores that it is given: `taskset -c 0,1 python ...` for two.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyiqa
import torch
from PIL import Image

from pdd_cli.iqa.metrics import Item, load_metrics, metric_infos, score
from pdd_cli.runtime import resident_memory


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


def loop(items: list[Item], names: list[str]) -> list[dict[str, float]]:
    metrics = {name: pyiqa.create_metric(name, device="cpu") for name in names}
    return [
        {
            name: float(metric(str(i.image), str(i.reference)) if metric.metric_mode == "FR" else metric(str(i.image)))
            for name, metric in metrics.items()
        }
        for i in items
    ]


def pdd(items: list[Item], names: list[str]) -> list[dict[str, float]]:
    loaded, lacking = load_metrics(metric_infos(names), device="cpu", offline=False, on_event=lambda event: None)
    assert not lacking, lacking
    scores, held = [], []
    for one in score(items, loaded):
        assert not one.problems, one.problems
        scores.append(one.values)
        held.append(resident_memory() >> 20)
    tenths = [max(held[len(held) * i // 10 : max(len(held) * (i + 1) // 10, 1)], default=0) for i in range(10)]
    print("         most MiB held in each tenth of the images:", *tenths)
    return scores


def measured(
    way: Callable[[list[Item], list[str]], list[dict[str, float]]], items: list[Item], names: list[str]
) -> tuple[list[dict[str, float]], float]:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    found = way(items, names)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(
        f"{way.__name__:8} {len(items)} pairs in {seconds:.1f} s, {len(items) / seconds:.3f} images/s; processor time "
        f"an image {user / len(items):.3f} s + {system / len(items):.3f} s system",
        flush=True,
    )
    return found, len(items) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--loop-pairs", type=int, help="as many as --pairs where it isn't given")
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--metrics", nargs="+", default=["psnr", "ssim", "niqe"])
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, pyiqa {pyiqa.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        items = make_pairs(Path(folder), arguments.pairs, arguments.side)
        for _ in range(arguments.repeat):
            ours, our_rate = measured(pdd, items, arguments.metrics)
            theirs, their_rate = measured(loop, items[: arguments.loop_pairs], arguments.metrics)
            worst = {
                name: max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=False))
                for name in arguments.metrics
            }
            print(f"{our_rate / their_rate:.2f} times as fast; largest differences:", worst, flush=True)


if __name__ == "__main__":
    main()
