"""Scores on validation pairs with ground truth. They are only reported; no decision depends on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdd_cli.adaptation.preview import center_crop, to_rgb8, upscale_image
from pdd_cli.data.datasets import RGB, AlignedPair, as_gray, images_below
from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import image_size, read_image
from pdd_cli.iqa.feature_distance import feature_distance, unit_features
from pdd_cli.iqa.pairing import pair
from pdd_cli.iqa.pyiqa_adapter import load_metric
from pdd_cli.models.features import FeatureNetwork
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import Runtime

_MAX_PAIRS = 12
_CROP = 64  # LR pixels
_HELD_OUT_CROP = 96  # LR pixels; the verdict rests on these pairs
_MIN_SIDE = 16


@dataclass(frozen=True)
class ValidationScores:
    """Means over the pairs: PSNR in dB and SSIM as in `pdd evaluate`, and the distance in the run's feature network."""

    psnr: float
    ssim: float
    distance: float

    def describe(self, base: ValidationScores) -> str:
        """The scores, with those of the base, as text."""
        return (
            f"PSNR {self.psnr:.2f} dB (base {base.psnr:.2f}), SSIM {self.ssim:.4f} (base {base.ssim:.4f}), "
            f"feature distance {self.distance:.4f} (base {base.distance:.4f}, lower is better)"
        )

    def gain(self, base: ValidationScores) -> float:
        """The gain over the base in dB: the mean of the gain in PSNR and of the decrease of the feature distance.

        The distance is a mean square, as the error in PSNR is. Blur raises PSNR and costs distance; invented detail may
        do the opposite.
        """
        closer = 10 * math.log10(max(base.distance, 1e-9) / max(self.distance, 1e-9))
        return ((self.psnr - base.psnr) + closer) / 2


@dataclass(frozen=True, eq=False)
class Pairs:
    """LR crops and their HR. Of the `found` pairs, a few evenly spread ones are scored to keep a judgement fast."""

    found: int
    names: Sequence[str]
    lr: Sequence[RGB]
    hr: Sequence[RGB]
    features: FeatureNetwork
    ssim: Any  # pyiqa's

    def in_gray(self) -> Pairs:
        """The pairs without colour."""
        return replace(self, lr=[as_gray(image) for image in self.lr], hr=[as_gray(image) for image in self.hr])

    def score(self, model: SRModel, runtime: Runtime) -> ValidationScores:
        """Upscale each LR crop with `model` and compare it with its HR, both as 8-bit RGB."""
        scores = []
        for lr, hr in zip(self.lr, self.hr, strict=True):
            sr, original = _tensor(to_rgb8(upscale_image(model, lr, runtime))), _tensor(hr)
            with torch.inference_mode(), runtime.autocast():
                ours, theirs = (unit_features(self.features, one.to(runtime.device)) for one in (sr, original))
            scores.append((_psnr(sr, original), float(self.ssim(sr, original)), float(feature_distance(ours, theirs))))
        return ValidationScores(*(float(mean) for mean in np.mean(scores, axis=0)))


def read_pairs(lr_folder: Path, hr_folder: Path, scale: int, features: FeatureNetwork) -> Pairs:
    """Pair the images of two folders by name. Raises InputError if an LR image has no HR of `scale` times its size."""
    lr, hr = images_below(lr_folder, "--val-lr"), images_below(hr_folder, "--val-hr")
    pairing = pair(lr, lr_folder, hr, hr_folder)
    if pairing.unmatched:
        alone = pairing.unmatched[0]
        several = [path.name for path in pairing.ambiguous.get(alone, ())]
        why = f"several images match: {', '.join(several)}" if several else "no image of that name"
        raise InputError(
            f"--val-lr {alone}: {why} in --val-hr {hr_folder} ({len(pairing.unmatched)} of {len(lr)} images have none)",
            "The names of a pair must be equal, or differ only in an ending such as _LR4 and _HR.",
        )
    for small, large in pairing.pairs.items():
        (width, height), size = image_size(small), image_size(large)
        if min(width, height) < _MIN_SIDE:
            raise InputError(f"--val-lr {small} is {width}x{height}: too small to be scored", "Remove it.")
        if size != (width * scale, height * scale):
            raise InputError(
                f"--val-hr {large} is {size[0]}x{size[1]}, but its LR {small} is {width}x{height} and the base "
                f"upscales x{scale}",
                f"The HR image must have {width * scale}x{height * scale} pixels.",
            )
    pairs = list(pairing.pairs.items())
    indices = np.linspace(0, len(pairs) - 1, min(len(pairs), _MAX_PAIRS)).round().astype(int)
    chosen = [pairs[index] for index in indices]
    return Pairs(
        found=len(pairing.pairs),
        names=[small.relative_to(lr_folder).as_posix() for small, _ in chosen],
        lr=[center_crop(read_image(small).to_rgb8(), _CROP) for small, _ in chosen],
        hr=[_crop_of_hr(read_image(large).to_rgb8(), scale) for _, large in chosen],
        features=features,
        ssim=load_metric("ssim", device="cpu"),
    )


def pairs_to_score(pairs: Sequence[AlignedPair], scale: int, features: FeatureNetwork) -> Pairs:
    """The held-out training pairs, as pairs that are scored on their central part."""
    return Pairs(
        found=len(pairs),
        names=[pair.name for pair in pairs],
        lr=[center_crop(pair.lr, _HELD_OUT_CROP) for pair in pairs],
        hr=[_crop_of_hr(pair.hr, scale, _HELD_OUT_CROP) for pair in pairs],
        features=features,
        ssim=load_metric("ssim", device="cpu"),
    )


def _crop_of_hr(hr: RGB, scale: int, side: int = _CROP) -> RGB:
    """The part of the HR that corresponds to the `center_crop` of the LR."""
    y, x = (max(0, (length // scale - side) // 2) * scale for length in hr.shape[:2])
    return np.array(hr[y : y + side * scale, x : x + side * scale])


def _tensor(image: RGB) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def _psnr(image: Tensor, original: Tensor) -> float:
    return float(-10 * torch.log10((image - original).square().mean().clamp_min(1e-10)))
