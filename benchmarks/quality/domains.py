"""The domains of the laboratory: LR images to train on, and pairs of LR and HR that only score.

Two are real cameras. Four are made from Kodak's photographs by fixed recipes and seeds, the LR a quarter of the HR's
size (area): those with odd numbers are trained on (LR only), those with even numbers score.

    jpeg    JPEG of quality 30 to 50
    film    a blur of 0.8 LR pixels, then grain (9 levels in luma, 2 LR pixels wide)
    phone   noise (8 levels), bilateral denoising, oversharpening, JPEG of quality 80
    h264    the fifth frame of a slow pan, H.264 at CRF 33
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB = NDArray[np.uint8]

SCALE = 4
CAMERAS = ("camera_b", "camera_phone")
CHOSEN_ON = ("camera_b", "jpeg", "film")
"""Settings are chosen on these alone; the others are scored once, and reported as they come."""


@dataclass(frozen=True)
class Domain:
    """Folders of one source. The HR of `test_hr` may be smaller than x4: outputs are resized to it."""

    name: str
    train_lr: Path
    test_lr: Path
    test_hr: Path


def domain(name: str, data: Path, work: Path) -> Domain:
    """The domain of this name; one that is made from photographs is written to `work` at its first use."""
    root = data / name if name in CAMERAS else work / name
    if name not in CAMERAS and not (root / "complete").exists():
        _make(name, data / "kodak24", root)
        (root / "complete").touch()
    return Domain(name, root / "train_lr", root / "test_lr", root / "test_hr")


def _make(name: str, photographs: Path, root: Path) -> None:
    for folder in ("train_lr", "test_lr", "test_hr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(photographs.glob("*.png")), 1):
        hr = np.asarray(Image.open(path).convert("RGB"))
        lr = RECIPES[name](hr, np.random.default_rng(number))
        folder = "train_lr" if number % 2 else "test_lr"
        Image.fromarray(lr).save(root / folder / path.name)
        if folder == "test_lr":
            Image.fromarray(hr).save(root / "test_hr" / path.name)


def _quarter(hr: RGB) -> NDArray[np.float32]:
    small = cv2.resize(hr, None, fx=1 / SCALE, fy=1 / SCALE, interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def _rounded(image: NDArray[np.float32]) -> RGB:
    return image.round().clip(0, 255).astype(np.uint8)


def _compressed(image: RGB, quality: int) -> RGB:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def _jpeg(hr: RGB, random: np.random.Generator) -> RGB:
    return _compressed(_rounded(_quarter(hr)), int(random.integers(30, 51)))


def _film(hr: RGB, random: np.random.Generator) -> RGB:
    lr = cv2.GaussianBlur(_quarter(hr), (0, 0), 0.8)
    grain = cv2.GaussianBlur(random.standard_normal(lr.shape[:2]).astype(np.float32), (0, 0), 0.8)
    return _rounded(lr + 9 * (grain / grain.std())[..., None])


def _phone(hr: RGB, random: np.random.Generator) -> RGB:
    noisy = _quarter(hr)
    noisy = noisy + 8 * random.standard_normal(noisy.shape, np.float32)
    smooth = cv2.bilateralFilter(noisy, 5, 30, 2)
    sharp = smooth + 0.9 * (smooth - cv2.GaussianBlur(smooth, (0, 0), 1))
    return _compressed(_rounded(sharp), 80)


def _h264(hr: RGB, random: np.random.Generator) -> RGB:
    """Each frame is the photograph, moved by two HR pixels against the one before; the last is where the HR is."""
    file, frames = io.BytesIO(), 5
    with av.open(file, "w", format="matroska") as container:
        # x264's AVX-512 code gives another file each time; without assembly all CPUs give the same one.
        options = {"crf": "33", "preset": "medium", "x264-params": "asm=0"}
        stream = container.add_stream("libx264", rate=Fraction(25), options=options)
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = hr.shape[1] // SCALE, hr.shape[0] // SCALE
        for index in range(frames):
            moved = np.roll(hr, 2 * (frames - 1 - index), axis=1)
            frame = av.VideoFrame.from_ndarray(_rounded(_quarter(moved)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        *_, last = container.decode(video=0)
        return np.asarray(last.to_ndarray(format="rgb24"))


RECIPES: dict[str, Callable[[RGB, np.random.Generator], RGB]] = {
    "jpeg": _jpeg,
    "film": _film,
    "phone": _phone,
    "h264": _h264,
}
NAMES = (*CAMERAS, *RECIPES)
