"""Test images, their files, and how far one is from another."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdd_cli.imaging.encode import write_image
from pdd_cli.imaging.image import DecodedImage

DATA = Path(os.environ.get("PDD_TEST_DATA", "nowhere"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="PDD_TEST_DATA doesn't name the data folder")
RNG = np.random.default_rng(0)


def photo(height: int = 64, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth content with some grain, (h, w, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    write_image(path, DecodedImage(pixels))
    return path


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, C) in 0..255 enlarged to (width, height) by Pillow's Lanczos filter in floating point, and clipped."""
    bands = [Image.fromarray(band.astype(np.float32)) for band in image.transpose(2, 0, 1)]
    return np.dstack([np.asarray(band.resize(size, Image.Resampling.LANCZOS)) for band in bands]).clip(0, 255)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float64)


def picture(height: int, width: int, channels: int = 3) -> DecodedImage:
    return DecodedImage(RNG.integers(0, 256, (height, width, channels), np.uint8))


def psnr(a: np.ndarray, b: np.ndarray, top: float = 255) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(top**2 / error))
