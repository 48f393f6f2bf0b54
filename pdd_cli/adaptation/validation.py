"""Scores against ground truth, where the user has pairs. They are for the reader: nothing is chosen by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdd_cli.adaptation.preview import centre, to_rgb8, upscaled
from pdd_cli.data.datasets import RGB, images_below
from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import image_size, read_image
from pdd_cli.iqa.feature_distance import feature_distance, unit_features
from pdd_cli.iqa.pairing import pair
from pdd_cli.iqa.pyiqa_adapter import load_metric
from pdd_cli.models.features import FeatureNetwork
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import Runtime

_MOST_PAIRS = 12
_CROP = 64  # LR pixels
_SMALLEST = 16


@dataclass(frozen=True)
class Truth:
    """Means over the pairs: PSNR in dB and SSIM as `pdd evaluate` gives them, distance in the run's feature network."""

    psnr: float
    ssim: float
    distance: float

    def describe(self, base: Truth) -> str:
        """In words, beside the base's."""
        return (
            f"PSNR {self.psnr:.2f} dB (base {base.psnr:.2f}), SSIM {self.ssim:.4f} (base {base.ssim:.4f}), "
            f"feature distance {self.distance:.4f} (base {base.distance:.4f}, lower is better)"
        )


@dataclass(frozen=True, eq=False)
class Pairs:
    """LR crops and their HR. Of `found` pairs some are scored, evenly spread, so that a judgement stays quick."""

    found: int
    names: Sequence[str]
    lr: Sequence[RGB]
    hr: Sequence[RGB]
    features: FeatureNetwork
    ssim: Any  # pyiqa's

    def score(self, model: SRModel, runtime: Runtime) -> Truth:
        """Upscale each LR crop with `model` and compare it with its HR, both as 8-bit RGB."""
        scores = []
        for lr, hr in zip(self.lr, self.hr, strict=True):
            sr, original = _tensor(to_rgb8(upscaled(model, lr, runtime))), _tensor(hr)
            with torch.inference_mode(), runtime.autocast():
                ours, theirs = (unit_features(self.features, one.to(runtime.device)) for one in (sr, original))
            scores.append((_psnr(sr, original), float(self.ssim(sr, original)), float(feature_distance(ours, theirs))))
        return Truth(*(float(mean) for mean in np.mean(scores, axis=0)))


def read_pairs(lr_folder: Path, hr_folder: Path, scale: int, features: FeatureNetwork) -> Pairs:
    """The pairs of two folders, by name. Raises InputError where an LR image has no HR of `scale` times its size."""
    lr, hr = images_below(lr_folder, "--val-lr"), images_below(hr_folder, "--val-hr")
    pairing = pair(lr, lr_folder, hr, hr_folder)
    if pairing.unmatched:
        alone = pairing.unmatched[0]
        several = [path.name for path in pairing.ambiguous.get(alone, ())]
        why = f"several could be its HR: {', '.join(several)}" if several else "no HR of that name"
        raise InputError(
            f"--val-lr {alone}: {why} in --val-hr {hr_folder} ({len(pairing.unmatched)} of {len(lr)} images have none)",
            "Pairs have the same name, or differ by an ending such as _LR4 and _HR.",
        )
    for small, large in pairing.pairs.items():
        (width, height), size = image_size(small), image_size(large)
        if min(width, height) < _SMALLEST:
            raise InputError(f"--val-lr {small} is {width}x{height}: too small to be scored", "Leave it out.")
        if size != (width * scale, height * scale):
            raise InputError(
                f"--val-hr {large} is {size[0]}x{size[1]}, its LR {small} {width}x{height}: "
                f"not {scale} times that, as the base upscales",
                f"An HR image of {width * scale}x{height * scale} pixels belongs to it.",
            )
    known = list(pairing.pairs.items())
    places = np.linspace(0, len(known) - 1, min(len(known), _MOST_PAIRS)).round().astype(int)
    chosen = [known[place] for place in places]
    return Pairs(
        found=len(pairing.pairs),
        names=[small.relative_to(lr_folder).as_posix() for small, _ in chosen],
        lr=[centre(_read(small), _CROP) for small, _ in chosen],
        hr=[_crop_of_hr(_read(large), scale) for _, large in chosen],
        features=features,
        ssim=load_metric("ssim", device="cpu"),
    )


def _read(path: Path) -> RGB:
    picture = read_image(path)
    return np.broadcast_to(to_rgb8(picture.to_float()), (picture.height, picture.width, 3))


def _crop_of_hr(hr: RGB, scale: int) -> RGB:
    """What belongs to the `centre` of the LR."""
    y, x = (max(0, (length // scale - _CROP) // 2) * scale for length in hr.shape[:2])
    return np.array(hr[y : y + _CROP * scale, x : x + _CROP * scale])


def _tensor(image: RGB) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def _psnr(image: Tensor, original: Tensor) -> float:
    return float(-10 * torch.log10((image - original).square().mean().clamp_min(1e-10)))
