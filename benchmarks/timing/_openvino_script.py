"""OpenVINO driven directly, as its guide has it: a model that was converted before, its cache, a loop over a folder.

    python benchmarks/timing/_openvino_script.py MODEL.xml CACHE_DIR f32|bf16 IN OUT

Imports nothing else that takes time: what a user gets who writes the script himself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
from PIL import Image


def main(model: str, cache: str, precision: str, source: str, target: str) -> None:
    core = ov.Core()
    core.set_property({"CACHE_DIR": cache})
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings)
    Path(target).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).iterdir()):
        lr = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255
        sr = compiled(np.ascontiguousarray(lr))[0][0]
        pixels = (sr.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(Path(target) / f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
