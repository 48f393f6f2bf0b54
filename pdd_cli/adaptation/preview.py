"""Upscaling of small crops with a model during training, for judgements, previews and the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pdd_cli.adaptation.trainable import training_mode
from pdd_cli.data.datasets import RGB
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import Runtime

PREVIEW_IMAGES = 4
PREVIEW_SIZE = 64  # LR pixels


def center_crop(image: RGB, side: int) -> RGB:
    """The central (side, side, 3) crop of `image`, or less if the image is smaller."""
    y, x = (max(0, (length - side) // 2) for length in image.shape[:2])
    return np.array(image[y : y + side, x : x + side])


def upscale_image(model: SRModel, lr: RGB, runtime: Runtime) -> NDArray[np.float32]:
    """Upscale (h, w, 3) without tiling to (h*scale, w*scale, 3) in 0..1. NaN values are kept."""
    training = model.module.training
    model.module.to(runtime.device).eval()
    batch = (torch.from_numpy(np.ascontiguousarray(lr)).permute(2, 0, 1)[None].float() / 255).to(runtime.device)
    with torch.inference_mode(), runtime.autocast():
        sr = model.upscale(batch.contiguous(memory_format=torch.channels_last)).float()
    if training:
        training_mode(model.module)
    return np.asarray(sr[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy())


def to_rgb8(image: NDArray[np.float32]) -> RGB:
    """(H, W, 3) in 0..1, rounded to 8 bits."""
    return np.round(image * 255).astype(np.uint8)


def image_grid(rows: Sequence[Sequence[RGB]], titles: tuple[str, ...]) -> Image.Image:
    """An image with rows of panels below their column titles."""
    gap, top = 4, 16
    width = max(sum(panel.shape[1] + gap for panel in row) for row in rows)
    whole = Image.new("RGB", (width, top + sum(row[0].shape[0] + gap for row in rows)), "white")
    draw = ImageDraw.Draw(whole)
    x = 0
    for title, panel in zip(titles, rows[0], strict=True):
        draw.text((x + 2, 2), title, fill="black")
        x += panel.shape[1] + gap
    y = top
    for row in rows:
        x = 0
        for panel in row:
            whole.paste(Image.fromarray(panel), (x, y))
            x += panel.shape[1] + gap
        y += row[0].shape[0] + gap
    return whole
