"""How much does `pdd upscale --temporal` reduce flicker, and does anything that moves leave a ghost?

    python -m benchmarks.quality.flicker kodak24/19.png kodak24/14.png WORK --crf 33 --noise 4

A part of one photograph stands still (or pans, `--pan`), and a part of another moves across it. The clip is reduced to
a quarter, gets noise and is compressed with x264; `pdd upscale` makes it large again, without and with `--temporal`.
Measured in the second half, against the clip before all this. Flicker: mean absolute difference of consecutive frames,
in levels of 255, where the truth has none. Uncovered: where the moving part was within the six frames before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE, SCALE = (384, 256), 4
MARGIN = 9  # pixels around the moving part that count as neither

Frames = NDArray[np.float32]


def truth(still: Path, moving: Path, frames: int, pan: float) -> tuple[Frames, Frames]:
    """The clip, (n, h, w, 3) in 0..255, and the opacity of its moving part, (n, h, w)."""
    background, part = (np.asarray(Image.open(path).convert("RGB"), np.float32) for path in (still, moving))
    part = part[100:200, 100:220]
    clip, masks = [], []
    for time in range(frames):
        place = np.array([[1, 0, -40 - pan * time], [0, 1, -40 - 0.4 * pan * time]], np.float32)
        behind = cv2.warpAffine(background, place, SIZE, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        place = np.array([[1, 0, 40 + 9 * time], [0, 1, 60 + 3 * time]], np.float32)
        mask = cv2.warpAffine(np.ones(part.shape[:2], np.float32), place, SIZE)
        clip.append(behind * (1 - mask[..., None]) + cv2.warpAffine(part, place, SIZE))
        masks.append(mask)
    return np.clip(clip, 0, 255).astype(np.float32), np.asarray(masks)


def write(path: Path, clip: Frames, crf: int, noise: float) -> None:
    """The clip at a quarter of its size with noise of this standard deviation, as H.264."""
    small = [cv2.resize(frame, None, fx=1 / SCALE, fy=1 / SCALE, interpolation=cv2.INTER_AREA) for frame in clip]
    noisy = np.asarray(small) + np.random.default_rng(0).normal(0, noise, np.shape(small))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = SIZE[0] // SCALE, SIZE[1] // SCALE, "yuv420p"
        for frame in np.rint(noisy).clip(0, 255).astype(np.uint8):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


def read(path: Path) -> Frames:
    with av.open(str(path)) as file:
        return np.asarray([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], np.float32)


def measure(found: Frames, clip: Frames, masks: Frames) -> str:
    """A row of the table."""
    covered = np.asarray([cv2.dilate(mask, np.ones((MARGIN, MARGIN))) for mask in masks]) > 0
    rows = []
    for time in range(len(clip) // 2, len(clip)):
        error = ((found[time] - clip[time]) ** 2).mean(axis=2)
        still = ~covered[time] & ~covered[time - 1]
        uncovered = covered[time - 6 : time].any(axis=0) & ~covered[time]
        changes = np.abs(found[time] - found[time - 1]).mean(axis=2)
        sharpness = cv2.Laplacian(found[time].mean(axis=2), cv2.CV_32F)[still].std()
        parts = [10 * np.log10(255**2 / error[where].mean()) for where in (still, masks[time] > 0.5, uncovered)]
        rows.append([changes[still].mean(), *parts, sharpness])
    flicker, *decibels, sharp = np.mean(rows, axis=0)
    return f"{flicker:.2f} | {' | '.join(f'{value:.2f}' for value in decibels)} | {sharp:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("still", type=Path)
    parser.add_argument("moving", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weights", default="realesr-animevideo")
    parser.add_argument("--crf", type=int, default=33)
    parser.add_argument("--noise", type=float, default=4)
    parser.add_argument("--pan", type=float, default=0, help="pixels of the large clip per frame")
    parser.add_argument("--frames", type=int, default=16)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    clip, masks = truth(options.still, options.moving, options.frames, options.pan)
    write(options.work / "clip.mkv", clip, options.crf, options.noise)
    print("| | flicker | still, dB | moving, dB | uncovered, dB | sharpness of still |\n|---|---|---|---|---|---|")
    for name, more in (("without", []), ("`--temporal`", ["--temporal"])):
        target = options.work / f"{name.strip('`-')}.mkv"
        command = [sys.executable, "-m", "pdd_cli", "upscale", options.work / "clip.mkv", target]
        subprocess.run(
            [*command, "--weights", options.weights, "--lossless", "--overwrite", *more], env=os.environ, check=True
        )
        print(f"| {name} | {measure(read(target), clip, masks)} |", flush=True)


if __name__ == "__main__":
    main()
