"""How much slower `pdd` gets on a machine that other programs keep busy.

    python -m benchmarks.timing.busy DATA --base WEIGHTS [--loops 0 2 8] [--rounds 2] [--steps 4]

Whole commands, beside so many endless loops, each of which takes what it gets of a core: seconds of a step of `pdd
adapt` (the first one isn't counted), and of `pdd upscale` of one image by each engine, with its start. The numbers of
loops take turns. "fair" is the ratio that equal parts for all threads give: (cores + loops) / cores. DATA holds
`camera_b/train_lr`, `hr_photos` and `features/vgg16_features_fp16.safetensors`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing._machine import describe, show
from pdd_cli.system import available_cpus

_PDD = [sys.executable, "-m", "pdd_cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="weights file")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a training, a number of loops and a round")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--crop", type=int, default=32)
    parser.add_argument("--side", type=int, default=128, help="of the upscaled image")
    parser.add_argument("--only", nargs="*", default=["adapt", "winograd", "openvino", "torch"])
    arguments = parser.parse_args()
    taken: dict[str, dict[int, list[float]]] = {
        name: {loops: [] for loops in arguments.loops} for name in arguments.only
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = np.random.default_rng(0).integers(0, 256, (arguments.side, arguments.side, 3), np.uint8)
        Image.fromarray(image).save(folder / "image.png")
        for number in range(arguments.rounds):
            for loops in arguments.loops:
                for what, found in taken.items():
                    with busy(loops):
                        if what == "adapt":
                            found[loops] += steps(arguments, folder)
                        else:
                            found[loops].append(upscaling(arguments, folder, what))
                    print(f"round {number + 1}, {loops} loops, {what}: {found[loops][-1]:.2f} s", flush=True)
    _report(arguments, taken)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many programs that never rest."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def steps(arguments: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds of each step of a training, but for the first, which doesn't distil."""
    data = arguments.data
    options = [
        "--real-dir", data / "camera_b" / "train_lr", "--hr-dir", data / "hr_photos", "--base", arguments.base,
        "--features", "vgg16", "--feature-weights", data / "features" / "vgg16_features_fp16.safetensors",
        "--steps", arguments.steps + 1, "--batch-size", arguments.batch_size, "--runs-dir", folder / "runs",
        "--name", "busy", "--overwrite", "--set", f"crop={arguments.crop}", "--set", "generalist.warmup_steps=1",
        "--set", "discriminator_warmup=0", "--set", "held_out=0", "--set", "crop_candidates=1",
    ]  # fmt: skip
    run(["adapt", *options], folder)
    lines = (folder / "runs" / "busy" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines[1:]]


def upscaling(arguments: argparse.Namespace, folder: Path, engine: str) -> float:
    started = time.perf_counter()
    options = ["--weights", arguments.base, "--engine", engine, "--device", "cpu", "--overwrite"]
    run(["upscale", folder / "image.png", folder / "out.png", *options], folder)
    return time.perf_counter() - started


def run(command: list[Any], folder: Path) -> None:
    environment = os.environ | {"PDD_HOME": str(folder / "home")}
    subprocess.run([*_PDD, *map(str, command)], env=environment, check=True, capture_output=True)


def _report(arguments: argparse.Namespace, taken: dict[str, dict[int, list[float]]]) -> None:
    rows: list[dict[str, Any]] = []
    for what, found in taken.items():
        quiet = statistics.median(found[min(found)])
        for loops, seconds in found.items():
            rows.append(
                {
                    "what": what,
                    "loops": loops,
                    "seconds": statistics.median(seconds),
                    "least": min(seconds),
                    "most": max(seconds),
                    "slower": statistics.median(seconds) / quiet,
                    "fair": (available_cpus() + loops) / available_cpus(),
                }
            )
    title = f"beside busy programs, {arguments.base.stem}"
    show(title, describe(torch.device("cpu")), rows)


if __name__ == "__main__":
    main()
