"""How far SR images are from their ground truth in a perceptual feature space; the lower, the more alike.

    python benchmarks/quality/feature_distance.py WEIGHTS GT_DIR SR_DIR [SR_DIR …]

WEIGHTS is a file of VGG-16's convolutions. The distance is that of `pdd_cli/iqa/feature_distance.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.find import find_images
from pdd_cli.iqa.feature_distance import feature_distance, unit_features
from pdd_cli.iqa.pairing import pair
from pdd_cli.models.features import feature_network
from pdd_cli.weights.states import read_state


def load(path: Path) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    return torch.from_numpy(read_image(path).to_float()).permute(2, 0, 1).expand(3, -1, -1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("gt", type=Path)
    parser.add_argument("sr", type=Path, nargs="+")
    arguments = parser.parse_args()
    network = feature_network("vgg16", read_state(arguments.weights), origin=str(arguments.weights))
    references = find_images(arguments.gt)
    for folder in arguments.sr:
        pairs = pair(find_images(folder), folder, references, arguments.gt).pairs
        distances = []
        with torch.inference_mode():
            for image, reference in pairs.items():
                a, b = unit_features(network, load(image)), unit_features(network, load(reference))
                distances.append(float(feature_distance(a, b)))
        print(f"{folder}: {sum(distances) / len(distances):.4f} (mean of {len(distances)} images)")


if __name__ == "__main__":
    main()
