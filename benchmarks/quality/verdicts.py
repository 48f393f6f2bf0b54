"""Is the verdict of `adapt` right? Runs of which some are sabotaged, against the truth known from held-out pairs.

    python -m benchmarks.quality.verdicts DATA --base realesrgan.safetensors --other DATA/realset65

DATA is as for `benchmarks.quality.adapt_domains`. A result is better in truth where, on the held-out pairs, PSNR is
higher *and* the feature distance lower than the base's, at the strength that the verdict recommends (at full strength
where it rejects). One JSON line a run, then a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.quality.adapt_domains import Pairs, load_pairs, score
from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.prepare import Run, WeightFiles, prepare_run
from pdd_cli.data.datasets import RGB, Batch, CropSampler, read_folder
from pdd_cli.errors import PddError
from pdd_cli.runtime import Runtime, choose_runtime
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve
from pdd_cli.weights.states import read_state

RUNS = ("sound", "sound, seed 1", "rate x30", "another domain", "tinted HR", "blurred HR", "noisy HR")


@dataclass(frozen=True, eq=False)
class TintedHR(CropSampler):
    """The HR has other colours than the LR that it is paired with, as after a careless white balance."""

    def batch(self, step: int, size: int, first: int = 0) -> Batch:
        batch = super().batch(step, size, first)
        return replace(batch, hr_s=(batch.hr_s * torch.tensor([1.2, 1.0, 0.8]).view(1, 3, 1, 1)).clamp(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="weights file")
    parser.add_argument("--other", type=Path, required=True, help="a folder of LR images of another domain")
    parser.add_argument("--domain", default="camera_b")
    parser.add_argument("--hr-dir", type=Path, help="sharp photographs (default: DATA/hr_photos)")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[], help="settings for every run")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    runtime = choose_runtime(arguments.device)
    pairs = load_pairs(arguments.data / arguments.domain, _features(arguments))
    rows: list[dict[str, Any]] = []
    for name in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            run = _prepare(arguments, name, Path(folder), runtime)
            if not rows:
                rows.append({"run": "base", **_truth(run, None, pairs)})
            try:
                for _ in train(run, lambda: False):
                    pass
                verdict = run.judge.conclude(read_state(run.folder.best)).verdict
            except PddError as error:
                rows.append({"run": name, "says": "stopped", "reason": error.message, "right": True})
            else:
                truth = _truth(run, verdict.strength if verdict.keep else 1.0, pairs)
                better = truth["psnr"] > rows[0]["psnr"] and truth["distance"] < rows[0]["distance"]
                says = f"keep at {verdict.strength:g}" if verdict.keep else "reject"
                rows.append(
                    {"run": name, **truth, "says": says, "right": better == verdict.keep, "reason": verdict.reason}
                )
            print(json.dumps(rows[-1]), flush=True)
    columns = ("run", "psnr", "distance", "sharpness", "says", "right", "reason")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        print("| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def _features(arguments: argparse.Namespace) -> Path:
    return Path(arguments.data / "features" / "vgg16_features_fp16.safetensors")


def _prepare(arguments: argparse.Namespace, name: str, folder: Path, runtime: Runtime) -> Run:
    config = resolve(
        AdaptConfig,
        "adapt",
        options={
            "real_dir": arguments.data / arguments.domain / "train_lr",
            "hr_dir": arguments.hr_dir or arguments.data / "hr_photos",
            "features.network": "vgg16",
            "features.weights": _features(arguments),
            "steps": arguments.steps,
            "seed": 1 if name == "sound, seed 1" else 0,
            "optimizer.learning_rate": 3e-3 if name == "rate x30" else None,
            "runs_dir": folder,
            "preview_every": 10**9,
            "checkpoint_every": max(1, arguments.steps // 3),
        },
        overrides=arguments.set,
    )
    files = WeightFiles(arguments.base, None, "vgg16", _features(arguments))
    run = prepare_run(config, files, runtime, name="run", resume=False, overwrite=True, warn=print)
    return replace(run, sampler=_sabotaged(run.sampler, name, arguments.other))


def _sabotaged(domains: CropSampler, name: str, other: Path) -> CropSampler:
    noise = np.random.default_rng(0)
    match name:
        case "another domain":
            return replace(domains, real=read_folder(other, "--other", print))
        case "tinted HR":
            return TintedHR(**vars(domains))
        case "blurred HR":
            return replace(domains, hr=[_blurred(image) for image in domains.hr])
        case "noisy HR":
            return replace(domains, hr=[_noisy(image, noise) for image in domains.hr])
        case _:
            return domains


def _blurred(image: RGB) -> RGB:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 3), np.uint8)


def _noisy(image: RGB, rng: np.random.Generator) -> RGB:
    return (image + rng.normal(0, 25, image.shape)).clip(0, 255).astype(np.uint8)


def _truth(run: Run, strength: float | None, pairs: Pairs) -> dict[str, float]:
    """The scores of the run's best weights at `strength`; of the base where that is None."""
    model = run.models.base if strength is None else run.judge.interpolate(read_state(run.folder.best), strength)
    return score(model, pairs, run.models.runtime)


if __name__ == "__main__":
    main()
