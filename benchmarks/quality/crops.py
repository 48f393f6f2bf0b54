"""One picture of six crops of each domain: base | adapted | HR, from what the laboratory has made.

    python -m benchmarks.quality.crops DATA WORK crops.jpg --domains camera_b jpeg film --variant plain --seed 0

The crops are chosen by a rule, not by their look: six test images, evenly spread by name, and of each the square of 128
HR pixels with the most texture in the HR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from benchmarks.quality.domains import NAMES, Domain, domain
from benchmarks.quality.measures import RGB, read
from pdd_cli.data.datasets import laplacian
from pdd_cli.imaging.find import find_images
from pdd_cli.iqa.pairing import pair

_CROPS = 6
_SIDE = 128  # HR pixels
_PER_ROW = 3  # crops, each with its three versions
_GAP = 4


def panels(where: Domain, work: Path, variant: str, seed: int) -> list[RGB]:
    """The crops of a domain, each as base, adapted and HR side by side: (128, 3 * 128, 3)."""
    by_version = [find_images(work / "outputs" / where.name / name) for name in ("base-0", f"{variant}-{seed}")]
    hr = find_images(where.test_hr)
    pairs = [pair(sr, sr[0].parent, hr, where.test_hr).pairs for sr in by_version]
    of_hr = [{theirs: ours for ours, theirs in found.items()} for found in pairs]
    chosen = [hr[round(index)] for index in np.linspace(0, len(hr) - 1, _CROPS)]
    return [_panel(read(path), [read(versions[path]) for versions in of_hr]) for path in chosen]


def _panel(hr: RGB, versions: list[RGB]) -> RGB:
    side = min(_SIDE, *hr.shape[:2])
    energy = cv2.blur(np.square(laplacian(hr)), (side, side), anchor=(0, 0))[: hr.shape[0] - side + 1]
    energy = energy[:, : hr.shape[1] - side + 1]
    y, x = np.unravel_index(int(energy.argmax()), energy.shape)
    same_size = [cv2.resize(image, hr.shape[1::-1], interpolation=cv2.INTER_AREA) for image in versions]
    crops = [image[y : y + side, x : x + side] for image in (*same_size, hr)]
    return np.hstack([cv2.resize(crop, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC) for crop in crops])


def grid(rows: list[list[RGB]]) -> RGB:
    """Rows of panels with white gaps."""
    height, width = rows[0][0].shape[:2]
    sheet = np.full((len(rows) * (height + _GAP) - _GAP, len(rows[0]) * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for row, of_row in enumerate(rows):
        for column, image in enumerate(of_row):
            y, x = row * (height + _GAP), column * (width + _GAP)
            sheet[y : y + height, x : x + width] = image
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--domains", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--variant", default="plain")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.domains:
        where = domain(name, arguments.data, arguments.work / "domains")
        found = panels(where, arguments.work, arguments.variant, arguments.seed)
        rows += [found[start : start + _PER_ROW] for start in range(0, _CROPS, _PER_ROW)]
    Image.fromarray(grid(rows)).save(arguments.picture, quality=75)


if __name__ == "__main__":
    main()
