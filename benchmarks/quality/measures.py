"""How good a folder of SR images is, against its HR images.

    python -m benchmarks.quality.measures HR_DIR SR_DIR [SR_DIR …] --features vgg16.safetensors

    psnr          dB, RGB
    ssim          pyiqa's, RGB
    distance      of VGG-16's features at unit length, mean over five layers; lower is better
    ssimulacra2   a judge that nobody trains on or chooses by; 100 is equal
    sharpness     standard deviation of the Laplacian, as a ratio to the HR's; 1 is the aim
    correlation   of the finest band (detail finer than a Gaussian of 1.4 HR pixels) with the HR's
    energy        of the finest band, as a ratio to the HR's
    niqe          without reference; read it beside the HR's own

Eight pixels at each border are left out. An SR image of another size is resized to the HR's first (area).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from ssimulacra2 import compute_ssimulacra2
from torch import Tensor

from pdd_cli.data.datasets import laplacian
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.find import find_images
from pdd_cli.iqa.feature_distance import feature_distance, unit_features
from pdd_cli.iqa.pairing import pair
from pdd_cli.iqa.pyiqa_adapter import load_metric
from pdd_cli.models.features import FeatureNetwork, feature_network
from pdd_cli.weights.states import read_state

RGB = NDArray[np.uint8]

BORDER = 8
FINEST = 1.4
MEASURES = ("psnr", "ssim", "distance", "ssimulacra2", "sharpness", "correlation", "energy", "niqe")


@dataclass(frozen=True, eq=False)
class Judges:
    """What is loaded once."""

    features: FeatureNetwork
    ssim: Any
    niqe: Any

    @classmethod
    def load(cls, features: Path) -> Judges:
        """`features` are VGG-16's convolutions."""
        network = feature_network("vgg16", read_state(features), origin=str(features))
        return cls(network, *(load_metric(name, device="cpu") for name in ("ssim", "niqe")))


def read(path: Path) -> RGB:
    """(H, W, 3)."""
    pixels = (read_image(path).to_float() * 255).round().astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def measure_folder(sr: Path, hr: Path, judges: Judges) -> dict[str, float]:
    """The mean of each measure over the pairs of two folders, matched by name."""
    pairs = pair(find_images(sr), sr, find_images(hr), hr).pairs
    if not pairs:
        raise SystemExit(f"no image in {sr} has a partner in {hr}")
    found = [measure(read(ours), read(theirs), judges) for ours, theirs in pairs.items()]
    return mean(found)


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in found])) for name in MEASURES}


def measure(sr: RGB, hr: RGB, judges: Judges) -> dict[str, float]:
    """Every measure of one pair."""
    if sr.shape != hr.shape:
        sr = np.asarray(cv2.resize(sr, hr.shape[1::-1], interpolation=cv2.INTER_AREA))
    sr, hr = (np.ascontiguousarray(image[BORDER:-BORDER, BORDER:-BORDER]) for image in (sr, hr))
    ours, theirs = (_finest(image) for image in (sr, hr))
    a, b = (_tensor(image) for image in (sr, hr))
    with torch.inference_mode():
        return {
            "psnr": -10 * math.log10(max(float(np.mean((sr / 255 - hr / 255) ** 2)), 1e-10)),
            "ssim": float(judges.ssim(a, b)),
            "distance": float(feature_distance(*(unit_features(judges.features, image) for image in (a, b)))),
            "ssimulacra2": ssimulacra2(hr, sr),
            "sharpness": float(laplacian(sr).std() / laplacian(hr).std()),
            "correlation": float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]),
            "energy": float(np.square(ours).sum() / np.square(theirs).sum()),
            "niqe": float(judges.niqe(a)),
        }


def _finest(image: RGB) -> NDArray[np.float32]:
    values = image.astype(np.float32)
    return np.asarray(values - cv2.GaussianBlur(values, (0, 0), FINEST))


def _tensor(image: RGB) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def ssimulacra2(hr: RGB, sr: RGB) -> float:
    with tempfile.TemporaryDirectory() as folder:  # the package reads files
        paths = [Path(folder, name) for name in ("hr.png", "sr.png")]
        for path, image in zip(paths, (hr, sr), strict=True):
            Image.fromarray(image).save(path, compress_level=1)
        return float(compute_ssimulacra2(*map(str, paths)))


def table(rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("| " + " | ".join(_cell(name, cell) for name, cell in zip(columns, cells, strict=True)) + " |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    digits = {"ssim": 4, "distance": 4, "ssimulacra2": 1, "minutes": 1}.get(name, 2)
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hr", type=Path)
    parser.add_argument("sr", type=Path, nargs="+")
    parser.add_argument("--features", type=Path, required=True, help="file with VGG-16's convolutions")
    arguments = parser.parse_args()
    judges = Judges.load(arguments.features)
    rows = [{"folder": str(folder)} | measure_folder(folder, arguments.hr, judges) for folder in arguments.sr]
    print(table(rows, ("folder", *MEASURES)))


if __name__ == "__main__":
    main()
