"""Runs the networks of Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def main(folder: Path) -> None:
    """Each network of `folder`/*.pt on `folder`/lr.npz's images, in turn: *.npz.

    The first image alone in fp16, and by networks whose names end with -x2, in fp32 only.
    """
    from pdd_cli.engines.triton_conv import triton_model
    from pdd_cli.models.loading import model_from_state

    images = np.load(folder / "lr.npz")
    for path in sorted(folder.glob("*.pt")):
        model = model_from_state(torch.load(path, weights_only=True), origin=path.name)
        found = {}
        is_variant = path.stem.endswith("-x2")
        for name, dtype in list(DTYPES.items())[: 1 if is_variant else None]:
            other = triton_model(model, dtype)
            if other is not None:
                with torch.inference_mode():
                    for size, lr in list(images.items())[: 1 if name == "fp16" or is_variant else None]:
                        found[f"{name} {size}"] = other.upscale(torch.from_numpy(lr)).float().numpy()
        np.savez(path.with_suffix(".npz"), **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
