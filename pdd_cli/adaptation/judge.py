"""Is the adapted model better? Judged without ground truth, on real images that were held out of training.

Four things can be measured with the LR images alone: whether the SR, brought back to LR size, is the LR (faithful),
whether it has its colours, how much fine detail it has, and how much of that where the LR is flat: detail gathers at
edges and textures, grain doesn't. A model that gains faithfulness by going soft, or detail by inventing, pays for it in
the other. Whether that sum agrees with the truth is measured in docs/results.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pdd_cli.adaptation.preview import centre, to_rgb8, upscaled
from pdd_cli.adaptation.validation import Pairs, Truth
from pdd_cli.data.datasets import RGB, laplacian
from pdd_cli.iqa.consistency import colour_drift, downscale_consistency
from pdd_cli.models.loading import SRModel, interpolated
from pdd_cli.runtime import Runtime

STRENGTHS = (0.25, 0.5, 0.75, 1.0)

_MOST_IMAGES = 8
_PIXELS = 96**2 * _MOST_IMAGES  # LR pixels that are judged on, in all
_DECIBELS_PER_HALVING = 6.0  # of faithfulness that half of the texture, or twice the grain, is worth
_DECIBELS_PER_DELTA_E = 0.5  # … and a unit of colour drift
_WORST_TEXTURE = 0.6  # of the base's, below which the result is a blur whatever else it gained
_WORST_DRIFT = 1.0  # more than the base's, CIELAB ΔE
_FLAT = 0.1  # the share of an LR image that counts as flat
_UNSEEN_GRAIN = 2.0  # 8-bit levels of the Laplacian, below which noise isn't seen
_SMALLEST = 16  # LR pixels a side of an image that is judged on
_LEAST_CONTRAST = 2.0  # 8-bit levels, standard deviation; below it an image is flat
_ALIKE = 0.98  # the correlation of two images, made small, above which they show the same
_FEWEST = 3  # distinct images that a verdict rests on
_LEAST_GAIN = 0.5  # dB of the score, below which a few images can't tell it from none


@dataclass(frozen=True)
class Judgement:
    """Means over the held-out images. `consistency` in dB, `drift` in CIELAB ΔE, `texture` and `grain` in 8-bit levels.

    `grain` is the texture of the flattest parts.
    """

    consistency: float
    drift: float
    texture: float
    grain: float

    def score(self, base: Judgement, scale: int) -> float:
        """How much better than the base, in dB of consistency; 0 is the base itself.

        A x1 model removes noise and artefacts of its input: being nearer to the input than the base is no merit there.
        """
        detail = _octaves(self.texture, base.texture, least=1e-6)
        grain = _octaves(self.grain, base.grain, least=_UNSEEN_GRAIN)
        gained = min(detail, 0.5) - max(0, grain - max(0, detail))  # as far as it grows alike everywhere, it is detail
        faithful = self.consistency - base.consistency
        return (
            (min(faithful, 0) if scale == 1 else faithful)
            + _DECIBELS_PER_HALVING * gained
            - _DECIBELS_PER_DELTA_E * (self.drift - base.drift)
        )


@dataclass(frozen=True)
class Verdict:
    """Whether to use the adapted weights, why, and how strongly they should be mixed with the base's."""

    keep: bool | None  # None: it can't be said
    reason: str
    strength: float

    @property
    def word(self) -> str:
        """The verdict in one word or two."""
        return {True: "keep", False: "reject", None: "not judged"}[self.keep]


@dataclass(frozen=True)
class Judged:
    """What was found of a model: without ground truth, which counts, and with it where there are pairs."""

    judgement: Judgement
    truth: Truth | None

    def as_document(self) -> dict[str, Any]:
        return asdict(self.judgement) | ({"truth": asdict(self.truth)} if self.truth else {})


@dataclass(frozen=True)
class Conclusion:
    """The verdict, and what was found of the base and of the best weights by strength."""

    verdict: Verdict
    base: Judged
    adapted: Mapping[float, Judged]

    @property
    def strength(self) -> float:
        """The recommended strength; of rejected weights the full one."""
        return self.verdict.strength or max(self.adapted)

    def truth_document(self) -> dict[str, Any] | None:
        """What the pairs say of that strength and of the base; None without pairs."""
        ours, base = self.adapted[self.strength].truth, self.base.truth
        return {"base": asdict(base), "adapted": asdict(ours)} if ours and base else None

    def truth_in_words(self) -> str:
        """The same for people; "" without pairs."""
        ours, base = self.adapted[self.strength].truth, self.base.truth
        if ours is None or base is None:
            return ""
        text = f"by the ground truth, at strength {self.strength:g}: {ours.describe(base)}"
        better = ours.psnr > base.psnr
        if self.verdict.keep is not None and better == (ours.distance < base.distance) != self.verdict.keep:
            text += ". That speaks against the verdict: trust the ground truth, if the pairs look as your images do"
        return text


@dataclass(frozen=True, eq=False)
class Judge:
    """Compares models with the base, on the images of one run."""

    base: SRModel
    images: Sequence[RGB]  # real images: held out of training, or all where there are too few
    trained_on: Sequence[RGB]
    pairs: Pairs | None  # with ground truth, for the reader
    runtime: Runtime

    @cached_property
    def base_judged(self) -> Judged:
        """What is found of the base."""
        return self.judged(self.base)

    def judged(self, model: SRModel) -> Judged:
        """Look at what `model` makes of the held-out images, and of the pairs where there are any."""
        truth = self.pairs.score(model, self.runtime) if self.pairs else None
        return Judged(judge(model, self.images, self.runtime), truth)

    def score(self, found: Judged) -> float:
        """How much better than the base, in dB of consistency."""
        return found.judgement.score(self.base_judged.judgement, self.base.scale)

    def mixed(self, adapted: Mapping[str, Tensor], strength: float) -> SRModel:
        """The model between the base (strength 0) and the `adapted` weights (1)."""
        model = replace(self.base, module=copy.deepcopy(self.base.module))
        base = {key: value.detach().cpu() for key, value in self.base.module.state_dict().items()}
        model.module.load_state_dict(interpolated(base, adapted, strength))
        return model

    def conclude(self, best: Mapping[str, Tensor]) -> Conclusion:
        """Judge the best weights at several strengths, and say whether they are better than the base."""
        judged = {strength: self.judged(self.mixed(best, strength)) for strength in STRENGTHS}
        base = self.base_judged
        if reason := too_little(self.images, self.trained_on):
            verdict = Verdict(None, f"too little to judge: {reason}", max(STRENGTHS))
        else:
            by_strength = {strength: found.judgement for strength, found in judged.items()}
            verdict = decide(by_strength, base.judgement, self.base.scale)
        return Conclusion(verdict, base, judged)


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
        detail = laplacian(to_rgb8(sr))
        grain = detail[_flattest(lr, model.scale)]
        found.append((downscale_consistency(sr, small), colour_drift(sr, small), detail.std(), grain.std()))
    return Judgement(*(float(value) for value in np.mean(found, axis=0)))


def too_little(judged_on: Sequence[RGB], trained_on: Sequence[RGB]) -> str:
    """Why these images are too few or too plain for a verdict; "" where they are enough."""
    tiny = flat = copies = 0
    looks: list[NDArray[np.float32]] = []
    for number, image in enumerate((*judged_on, *trained_on), 1):
        if min(image.shape[:2]) < _SMALLEST:
            tiny += 1
        elif image.std() < _LEAST_CONTRAST:
            flat += 1
        elif any(float(np.mean(_look(image) * other)) > _ALIKE for other in looks):
            copies += 1
        else:
            looks.append(_look(image))
        if number == len(judged_on) and not looks:
            break  # what is judged on shows nothing
        if number >= len(judged_on) and len(looks) >= _FEWEST:
            return ""
    kinds = ((tiny, f"smaller than {_SMALLEST} pixels"), (flat, "flat"), (copies, "like another"))
    found = ", ".join(f"{count} {what}" for count, what in kinds if count)
    if not looks:
        return f"the images to judge on show nothing ({found})"
    plural = "" if len(looks) == 1 else "s"
    return f"{len(looks)} distinct real image{plural}{f' ({found})' if found else ''}; {_FEWEST} are needed"


def _look(image: RGB) -> NDArray[np.float32]:
    """What an image shows, whatever its size, brightness and compression: (32, 32) of mean 0 and deviation 1."""
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    centred = small.astype(np.float32) - small.mean()
    return np.asarray(centred / max(float(centred.std()), 1e-6))


def decide(judgements: Mapping[float, Judgement], base: Judgement, scale: int) -> Verdict:
    """The verdict from the judgements of the adapted weights at several strengths."""
    sound = {
        strength: found
        for strength, found in judgements.items()
        if found.texture >= _WORST_TEXTURE * base.texture and found.drift <= base.drift + _WORST_DRIFT
    }
    best = max(sound, key=lambda strength: sound[strength].score(base, scale), default=None)
    if best is None or sound[best].score(base, scale) <= 0:
        found = judgements[max(judgements)]
        return Verdict(False, f"the base is better on the held-out images: {_compared(found, base)}", 0.0)
    if sound[best].score(base, scale) < _LEAST_GAIN:
        return Verdict(False, f"no clear gain on the held-out images: {_compared(sound[best], base)}", 0.0)
    return Verdict(True, f"better than the base on the held-out images: {_compared(sound[best], base)}", best)


def stalled(scores: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` of the `scores` are all no better than one before them."""
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def _flattest(lr: RGB, scale: int) -> NDArray[np.bool_]:
    """(h*scale, w*scale): where the LR image, its noise smoothed away, has the least contrast around a pixel."""
    gray = cv2.GaussianBlur(cv2.cvtColor(lr, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1)
    slopes = [cv2.Sobel(gray, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1))]
    contrast = cv2.blur(sum(slope * slope for slope in slopes), (5, 5))
    flat = contrast <= np.quantile(contrast, _FLAT)
    return np.asarray(flat.repeat(scale, axis=0).repeat(scale, axis=1))


def _octaves(value: float, base: float, least: float) -> float:
    """How often `value` is twice `base`, both taken as `least` where they are less."""
    return math.log2(max(value, least) / max(base, least))


def _compared(found: Judgement, base: Judgement) -> str:
    return (
        f"faithfulness to the LR {found.consistency - base.consistency:+.2f} dB, "
        f"colour drift {found.drift:.2f} (base {base.drift:.2f}) ΔE, "
        f"fine detail {_change(found.texture, base.texture)} (in flat places {_change(found.grain, base.grain)})"
    )


def _change(value: float, base: float) -> str:
    return f"{100 * (value / max(base, 1e-6) - 1):+.0f} %"
