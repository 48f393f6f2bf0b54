"""Does adapting help? The method and its controls on a domain with held-out ground truth, at equal steps and data.

    python -m benchmarks.quality.adapt_domains DATA --base realesrgan.safetensors --steps 120 --seeds 0 1

DATA holds `camera_b/{train_lr,test_lr,test_hr}`, `hr_photos`, `features/vgg16_features_fp16.safetensors`. The truth is
for scoring only. Every variant is scored as its last weights, half-way between base and those, and as its EMA, so that
controls have the same help as the method. One JSON line a score, then a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.prepare import Run, WeightFiles, prepare_run
from pdd_cli.data.datasets import texture
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.find import find_images
from pdd_cli.iqa.feature_distance import feature_distance, unit_features
from pdd_cli.iqa.pairing import pair
from pdd_cli.iqa.pyiqa_adapter import load_metric
from pdd_cli.models.features import FeatureNetwork, feature_network
from pdd_cli.models.loading import SRModel, interpolated
from pdd_cli.runtime import Runtime, choose_runtime
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve
from pdd_cli.weights.states import read_state

# Settings that make each variant; all others are the defaults.
SUPERVISED = ["losses.inter=0", "losses.intra=0", "losses.consistency=0", "losses.adversarial_on_target=false"]
PAPER = [
    "discriminator=unet", "discriminator_warmup=0.003", "crop_candidates=1", "synthetic.hr_scales=[1]",
    "optimizer.halve_at=[0.25]", "optimizer.discriminator_learning_rate=0.0001",
    "losses.pixel=0.5", "losses.adversarial=0.01", "losses.consistency=0", "losses.feature_distance=0",
]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "ema": [],
    "supervised": SUPERVISED,
    "static": ["generalist.mode=static", "generalist.weights=realesrgan"],
    "own-hr": [],
    "paper": PAPER,
    "paper-supervised": [*PAPER, *SUPERVISED],
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """The held-out pairs, (1, 3, h, w) in 0..1, and the features of the ground truth."""

    lr: list[Tensor]
    hr: list[Tensor]
    features: list[list[Tensor]]
    network: FeatureNetwork
    niqe: Any
    ssim: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="weights file")
    parser.add_argument("--domain", default="camera_b")
    parser.add_argument("--hr-dir", type=Path, help="sharp photographs (default: DATA/hr_photos)")
    parser.add_argument("--variants", nargs="+", default=["ema", "supervised", "static", "own-hr"], choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], help="settings for every variant")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    runtime = choose_runtime(arguments.device)
    features = arguments.data / "features" / "vgg16_features_fp16.safetensors"
    pairs = load_pairs(arguments.data / arguments.domain, features)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            with tempfile.TemporaryDirectory() as folder:
                run = _prepare(arguments, variant, seed, features, Path(folder), runtime)
                if not rows:
                    truth = {"variant": "HR itself", "niqe": _mean(pairs.niqe, pairs.hr), "sharpness": _sharp(pairs.hr)}
                    rows += [truth, {"variant": "base", **score(run.models.base, pairs, runtime)}]
                started = time.perf_counter()
                for _ in train(run, lambda: False):
                    pass
                seconds = time.perf_counter() - started
                for which, model in _candidates(run):
                    rows.append(
                        {
                            "variant": variant, "which": which, "seed": seed, "steps": arguments.steps,
                            "seconds": round(seconds), **score(model, pairs, runtime),
                        }
                    )  # fmt: skip
                    print(json.dumps(rows[-1]), flush=True)
    _table(rows)


def _prepare(
    arguments: argparse.Namespace, variant: str, seed: int, features: Path, folder: Path, runtime: Runtime
) -> Run:
    config = resolve(
        AdaptConfig,
        "adapt",
        options={
            "real_dir": arguments.data / arguments.domain / "train_lr",
            "hr_dir": None if variant == "own-hr" else arguments.hr_dir or arguments.data / "hr_photos",
            "features.network": "vgg16",
            "features.weights": features,
            "steps": arguments.steps,
            "seed": seed,
            "runs_dir": folder,
            "preview_every": 10**9,
        },
        overrides=[*VARIANTS[variant], *arguments.set],
    )
    generalist = arguments.base if config.generalist.mode == "static" else None
    files = WeightFiles(arguments.base, generalist, "vgg16", features)
    return prepare_run(config, files, runtime, name=variant, resume=False, overwrite=True, warn=print)


def _candidates(run: Run) -> Iterator[tuple[str, SRModel]]:
    base = {key: value.detach().cpu() for key, value in run.models.base.module.state_dict().items()}
    last = {key: value.detach().cpu() for key, value in run.state.specialist.state_dict().items()}
    model = replace(run.models.base, module=copy.deepcopy(run.models.base.module))
    for strength in (0.5, 0.75, 1.0):
        model.module.load_state_dict(interpolated(base, last, strength))
        yield f"strength {strength:g}", model
    if run.config.generalist.mode == "ema":
        yield "ema", replace(run.models.base, module=run.state.generalist)


def load_pairs(folder: Path, features: Path) -> Pairs:
    network = feature_network("vgg16", read_state(features), origin=str(features))
    lr, hr = find_images(folder / "test_lr"), find_images(folder / "test_hr")
    matched = pair(lr, folder / "test_lr", hr, folder / "test_hr").pairs
    images = [_load(path) for path in matched.values()]
    with torch.inference_mode():
        known = [unit_features(network, image) for image in images]
    metrics = [load_metric(name, device="cpu") for name in ("niqe", "ssim")]
    return Pairs([_load(path) for path in matched], images, known, network, *metrics)


def _load(path: Path) -> Tensor:
    return torch.from_numpy(read_image(path).to_float()).permute(2, 0, 1).expand(3, -1, -1)[None].contiguous()


def score(model: SRModel, pairs: Pairs, runtime: Runtime) -> dict[str, float]:
    model.module.to(runtime.device).eval()
    outputs, distances = [], []
    with torch.inference_mode():
        for lr, known in zip(pairs.lr, pairs.features, strict=True):
            with runtime.autocast():
                sr = model.upscale(lr.to(runtime.device)).float().cpu().clamp(0, 1)
            sr = torch.round(sr * 255) / 255
            outputs.append(sr)
            distances.append(float(feature_distance(unit_features(pairs.network, sr), known)))
    errors = [float((a - b).square().mean()) for a, b in zip(outputs, pairs.hr, strict=True)]
    return {
        "psnr": float(np.mean([-10 * np.log10(error) for error in errors])),
        "ssim": float(np.mean([float(pairs.ssim(a, b)) for a, b in zip(outputs, pairs.hr, strict=True)])),
        "distance": float(np.mean(distances)),
        "niqe": _mean(pairs.niqe, outputs),
        "sharpness": _sharp(outputs),
    }


def _mean(metric: Any, images: list[Tensor]) -> float:
    return float(np.mean([float(metric(image)) for image in images]))


def _sharp(images: list[Tensor]) -> float:
    pixels = [(image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for image in images]
    return float(np.mean([texture(one) for one in pixels]))


def _table(rows: list[dict[str, Any]]) -> None:
    columns = ("variant", "which", "seed", "psnr", "ssim", "distance", "niqe", "sharpness", "seconds")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        print("| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
