"""Is the adapted model better? Judged without ground truth, on real images that were held out of training.

Three things can be measured with the LR images alone: whether the SR, brought back to LR size, is the LR (faithful),
whether it has its colours, and how much fine detail it has. A model that gains faithfulness by going soft, or detail by
inventing, pays for it in the other. Whether that sum agrees with the truth is measured in docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pdd_cli.data.datasets import RGB, texture
from pdd_cli.device import Runtime
from pdd_cli.distillation.pictures import centre, to_rgb8, upscaled
from pdd_cli.iqa.consistency import colour_drift, downscale_consistency
from pdd_cli.models.loading import SRModel

STRENGTHS = (0.25, 0.5, 0.75, 1.0)

_MOST_IMAGES = 8
_PIXELS = 96**2 * _MOST_IMAGES  # LR pixels that are judged on, in all
_DECIBELS_PER_HALVING = 6.0  # of faithfulness that half of the texture is worth
_DECIBELS_PER_DELTA_E = 0.5  # … and a unit of colour drift
_WORST_TEXTURE = 0.6  # of the base's, below which the result is a blur whatever else it gained
_WORST_DRIFT = 1.0  # more than the base's, CIELAB ΔE
_LEAST_GAIN = 0.5  # dB of the score, below which a few images can't tell it from none


@dataclass(frozen=True)
class Judgement:
    """Means over the held-out images. `consistency` in dB, `drift` in CIELAB ΔE, `texture` in 8-bit levels."""

    consistency: float
    drift: float
    texture: float

    def score(self, base: Judgement) -> float:
        """How much better than the base, in dB of consistency; 0 is the base itself."""
        detail = math.log2(max(self.texture, 1e-6) / max(base.texture, 1e-6))
        return (
            self.consistency
            - base.consistency
            + _DECIBELS_PER_HALVING * min(detail, 0.5)  # detail without end is noise
            - _DECIBELS_PER_DELTA_E * (self.drift - base.drift)
        )


@dataclass(frozen=True)
class Verdict:
    """Whether to use the adapted weights, why, and how strongly they should be mixed with the base's."""

    keep: bool
    reason: str
    strength: float


def held_out(count: int, share: float) -> tuple[int, ...]:
    """Which of `count` images are kept from training: `share` of them, evenly spread; none of fewer than three."""
    wanted = min(_MOST_IMAGES, math.ceil(share * count)) if count >= 3 else 0
    return tuple(round((index + 0.5) * count / wanted - 0.5) for index in range(wanted))


def judge(model: SRModel, images: Sequence[RGB], runtime: Runtime) -> Judgement:
    """Upscale the middle of each image with `model` and measure it; the fewer images, the more of each.

    Raises ValueError for a model that gives NaN.
    """
    images = images[:_MOST_IMAGES]
    side = math.isqrt(_PIXELS // len(images))
    found = []
    for image in images:
        lr = centre(image, side)
        sr = upscaled(model, lr, runtime)
        if not np.isfinite(sr).all():
            raise ValueError("the model gives values that are not finite")
        small = lr.astype(np.float32) / 255
        found.append((downscale_consistency(sr, small), colour_drift(sr, small), texture(to_rgb8(sr))))
    return Judgement(*(float(value) for value in np.mean(found, axis=0)))


def decide(judgements: Mapping[float, Judgement], base: Judgement) -> Verdict:
    """The verdict from the judgements of the adapted weights at several strengths."""
    sound = {
        strength: found
        for strength, found in judgements.items()
        if found.texture >= _WORST_TEXTURE * base.texture and found.drift <= base.drift + _WORST_DRIFT
    }
    best = max(sound, key=lambda strength: sound[strength].score(base), default=None)
    if best is None or sound[best].score(base) <= 0:
        found = judgements[max(judgements)]
        return Verdict(False, f"the base is better on the held-out images: {_compared(found, base)}", 0.0)
    if sound[best].score(base) < _LEAST_GAIN:
        return Verdict(False, f"no clear gain on the held-out images: {_compared(sound[best], base)}", 0.0)
    return Verdict(True, f"better than the base on the held-out images: {_compared(sound[best], base)}", best)


def stalled(scores: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` of the `scores` are all no better than one before them."""
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def _compared(found: Judgement, base: Judgement) -> str:
    return (
        f"faithfulness to the LR {found.consistency - base.consistency:+.2f} dB, "
        f"colour drift {found.drift:.2f} (base {base.drift:.2f}) ΔE, "
        f"fine detail {100 * (found.texture / max(base.texture, 1e-6) - 1):+.0f} %"
    )
