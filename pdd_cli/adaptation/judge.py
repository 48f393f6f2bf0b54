"""Decides whether the adapted model is better than its base, on real images held out of training, without ground truth.

Six quantities can be measured with the LR images alone: how well the SR, downscaled to LR size, matches the LR
(consistency), and by how much it misses the finest detail of the LR (fine error); how far its colours drift; how much
fine detail it has (texture); how much of that is in flat regions of the LR (grain), because real detail is at edges and
textures and noise is everywhere; and how much of the LR's own noise is in the SR (copied noise). A model that becomes
more consistent by blurring loses texture, and a model that invents detail loses consistency. On a noisy source a model
becomes more consistent by adding or copying noise, on a compressed one by copying artefacts.
docs/log.md compares the resulting score with scores against ground truth.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pdd_cli.adaptation.preview import center_crop, to_rgb8, upscale_image
from pdd_cli.adaptation.validation import Pairs, ValidationScores
from pdd_cli.data.datasets import RGB, laplacian
from pdd_cli.errors import InputError
from pdd_cli.iqa.consistency import colour_drift, downscale_consistency
from pdd_cli.models.loading import SRModel, interpolated
from pdd_cli.runtime import Runtime

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)

_TIMED_SIDE = 64  # LR pixels of the image on which student and teacher are timed
_MAX_IMAGES = 8
_MAX_PIXELS = 96**2 * _MAX_IMAGES  # LR pixels of all images together
# The weights of the score. docs/log.md shows on which models they were chosen and how often the score is right.
_MAX_CLOSER = 2.0  # dB; consistency gained beyond this earns nothing
_DB_PER_OCTAVE = 3.0  # cost of half the texture
_DB_PER_GRAIN = 0.2  # cost of one level of added grain
_DB_PER_NOISE = 1.0  # cost of one level of copied noise
_MAX_FINER = 2.0  # dB; a fine error that is smaller by more than this means copied artefacts
_DB_PER_FINER = 0.5  # cost of each dB beyond that
_MIN_TEXTURE_RATIO = 0.6  # with less texture, relative to the base, the result is too blurred to be accepted
_MAX_ADDED_DRIFT = 1.0  # CIELAB ΔE above the base
_FLAT_FRACTION = 0.1  # fraction of an LR image that counts as flat
_MIN_SIDE = 16  # LR pixels
_MIN_CONTRAST = 2.0  # standard deviation in 8-bit levels; images with less are flat
_DUPLICATE_CORRELATION = 0.98  # thumbnails with a higher correlation show the same scene
_MIN_IMAGES = 3  # distinct images that a verdict needs
_MIN_GAIN = 0.5  # dB; a smaller gain is not significant on a few images
_MIN_GAIN_ON_PAIRS = 0.2  # dB; with ground truth a smaller gain is significant
_EQUAL = 0.25  # dB; strengths whose scores differ by less count as equally good


@dataclass(frozen=True)
class Judgement:
    """Means over the held-out images. `consistency` in dB, `drift` in CIELAB ΔE, the others in 8-bit levels.

    `grain` is the texture of the flattest regions, `copied_noise` the noise of the LR image there that is in the SR,
    `fine_error` the part of the difference from the LR that is finer than an LR pixel or two.
    """

    consistency: float
    drift: float
    texture: float
    grain: float
    copied_noise: float
    fine_error: float

    def score(self, base: Judgement, scale: int) -> float:
        """The gain over the base, in dB of consistency; the base has 0.

        Lost detail, added grain, copied noise and a much smaller fine error cost: the HR image itself differs from the
        LR in its finest detail as much as the base or more. Gained detail earns nothing, because on a noisy source a
        model gains it by adding noise, and neither does a very high consistency.
        A x1 model removes noise and artefacts of its input: there being closer to the input than the base earns
        nothing, and detail does.
        """
        detail = _log2_ratio(self.texture, base.texture, floor=1e-6)
        closer = self.consistency - base.consistency
        noise = _DB_PER_GRAIN * max(0.0, self.grain - base.grain)
        noise += _DB_PER_NOISE * max(0.0, self.copied_noise - base.copied_noise)
        if scale == 1:
            return min(closer, 0) + _DB_PER_OCTAVE * min(detail, 0.5) - noise
        copied = _DB_PER_FINER * max(0.0, self.finer(base) - _MAX_FINER)
        return min(closer, _MAX_CLOSER) + _DB_PER_OCTAVE * min(detail, 0) - noise - copied

    def acceptable(self, base: Judgement) -> bool:
        """Whether neither too much detail is lost nor the colours drift too far, compared with the base."""
        sharp = self.texture >= _MIN_TEXTURE_RATIO * base.texture
        return sharp and self.drift <= base.drift + _MAX_ADDED_DRIFT

    def finer(self, base: Judgement) -> float:
        """By how many dB the fine error is smaller than that of the base."""
        return 20 * math.log10(2) * _log2_ratio(base.fine_error, self.fine_error, floor=0.01)


@dataclass(frozen=True)
class Verdict:
    """Whether to use the adapted weights, the reason, and the recommended strength of their blend with the base."""

    keep: bool | None  # None: not enough images to judge
    reason: str
    strength: float

    @property
    def label(self) -> str:
        """keep, reject or not judged."""
        return {True: "keep", False: "reject", None: "not judged"}[self.keep]


@dataclass(frozen=True)
class ModelScores:
    """The scores of a model: without ground truth, which decide, and on the validation pairs if there are any."""

    judgement: Judgement
    validation: ValidationScores | None
    held_out_pairs: ValidationScores | None = None  # which decide if there are any

    def as_document(self) -> dict[str, Any]:
        on_pairs = {"truth": self.validation, "held_out_pairs": self.held_out_pairs}
        return asdict(self.judgement) | {key: asdict(scores) for key, scores in on_pairs.items() if scores}


@dataclass(frozen=True)
class Conclusion:
    """The verdict, and the scores of the base and, by strength, of the best weights."""

    verdict: Verdict
    base: ModelScores
    adapted: Mapping[float, ModelScores]
    teacher: ModelScores | None = None  # of a student
    times_as_fast: float = 1.0  # a student, as a multiple of the speed of its teacher

    @property
    def strength(self) -> float:
        """The recommended strength; for rejected weights the highest."""
        return self.verdict.strength or max(self.adapted)

    def validation_document(self) -> dict[str, Any] | None:
        """The validation scores of the base and of the weights at `strength`; None without pairs."""
        ours, base = self.adapted[self.strength].validation, self.base.validation
        return {"base": asdict(base), "adapted": asdict(ours)} if ours and base else None

    def describe_teacher(self) -> str:
        """The student beside its teacher as a sentence; "" if there is none."""
        if self.teacher is None:
            return ""
        ours, theirs = self.adapted[self.strength], self.teacher
        differences = _describe(ours.judgement, theirs.judgement, "teacher")
        speed = f"{self.times_as_fast:.2g} times as fast"
        text = f"beside its teacher, at strength {self.strength:g}: {speed}, {differences}"
        if ours.validation and theirs.validation:
            text += f"; by the ground truth: {ours.validation.describe(theirs.validation)}"
        return text

    def describe_validation(self) -> str:
        """The validation scores as a sentence; "" without pairs."""
        ours, base = self.adapted[self.strength].validation, self.base.validation
        if ours is None or base is None:
            return ""
        text = f"by the ground truth, at strength {self.strength:g}: {ours.describe(base)}"
        better = ours.psnr > base.psnr
        if self.verdict.keep is not None and better == (ours.distance < base.distance) != self.verdict.keep:
            text += ". This contradicts the verdict: trust the ground truth if the pairs look like your images"
        return text


@dataclass(frozen=True, eq=False)
class Judge:
    """Compares models with the base on the images of one run."""

    base: SRModel
    images: Sequence[RGB]  # real images held out of training, or all if there are too few
    trained_on: Sequence[RGB]
    pairs: Pairs | None  # validation pairs; their scores are only reported
    runtime: Runtime
    teacher: SRModel | None = None  # of a student; its scores are only reported
    held_out_pairs: Pairs | None = None  # pairs held out of supervised training; with them the ground truth decides
    pairs_trained_on: Sequence[RGB] = ()  # LR

    @property
    def insufficient(self) -> str:
        """The reason why the images are too few or too uniform for a verdict; "" if they suffice."""
        if self.held_out_pairs:
            return insufficient_images(self.held_out_pairs.lr, self.pairs_trained_on)
        return insufficient_images(self.images, self.trained_on)

    @cached_property
    def base_scores(self) -> ModelScores:
        """The scores of the base."""
        return self.evaluate(self.base)

    @property
    def crops(self) -> list[RGB]:
        """All LR crops that `evaluate` upscales."""
        on_pairs = (lr for pairs in (self.pairs, self.held_out_pairs) if pairs for lr in pairs.lr)
        return [*central_crops(self.images), *on_pairs]

    def evaluate(self, model: SRModel) -> ModelScores:
        """Score `model` on the held-out images and on the validation pairs."""
        validation = self.pairs.score(model, self.runtime) if self.pairs else None
        held_out = self.held_out_pairs.score(model, self.runtime) if self.held_out_pairs else None
        return ModelScores(measure(model, self.images, self.runtime), validation, held_out)

    def score(self, scores: ModelScores) -> float:
        """The gain over the base in dB: by the ground truth of the held-out pairs, or else of consistency."""
        if scores.held_out_pairs and self.base_scores.held_out_pairs:
            return scores.held_out_pairs.gain(self.base_scores.held_out_pairs)
        return scores.judgement.score(self.base_scores.judgement, self.base.scale)

    def interpolate(self, adapted: Mapping[str, Tensor], strength: float) -> SRModel:
        """The model between the base (strength 0) and the `adapted` weights (1)."""
        model = replace(self.base, module=copy.deepcopy(self.base.module))
        base = {key: value.detach().cpu() for key, value in self.base.module.state_dict().items()}
        model.module.load_state_dict(interpolated(base, adapted, strength))
        return model

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths that are judged. A student has only one: a blend with its base loses the teacher's detail."""
        return _STRENGTHS if self.teacher is None else (1.0,)

    def conclude(self, best: Mapping[str, Tensor]) -> Conclusion:
        """Score the best weights at several strengths and decide whether they are better than the base."""
        adapted = {strength: self.evaluate(self.interpolate(best, strength)) for strength in self.strengths}
        base = self.base_scores
        on_pairs = {strength: scores.held_out_pairs for strength, scores in adapted.items() if scores.held_out_pairs}
        if reason := self.insufficient:
            verdict = Verdict(None, f"not enough images to judge: {reason}", 1.0)
        elif base.held_out_pairs:
            verdict = decide_by_ground_truth(on_pairs, base.held_out_pairs)
        else:
            by_strength = {strength: scores.judgement for strength, scores in adapted.items()}
            verdict = decide(by_strength, base.judgement, self.base.scale)
        if self.teacher is None:
            return Conclusion(verdict, base, adapted)
        teacher = self.evaluate(self.teacher)
        if verdict.keep is False and not base.held_out_pairs:
            student = adapted[max(adapted)].judgement
            verdict = decide_by_teacher(student, teacher.judgement, self.base.scale) or verdict
        lr = center_crop(self.images[0], _TIMED_SIDE)
        seconds, seconds_of_teacher = (_seconds(model, lr, self.runtime) for model in (self.base, self.teacher))
        return Conclusion(verdict, base, adapted, teacher, seconds_of_teacher / seconds)


def _seconds(model: SRModel, lr: RGB, runtime: Runtime) -> float:
    """The time that `model` takes for an image: the shorter of two."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        upscale_image(model, lr, runtime)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def held_out_indices(count: int, fraction: float) -> tuple[int, ...]:
    """The indices of the images to hold out: a `fraction` of `count`, evenly spread; none of fewer than three."""
    chosen = min(_MAX_IMAGES, math.ceil(fraction * count)) if count >= 3 else 0
    return tuple(round((index + 0.5) * count / chosen - 0.5) for index in range(chosen))


def measure(model: SRModel, images: Sequence[RGB], runtime: Runtime) -> Judgement:
    """Upscale the centre of each image with `model` and measure it. With fewer images, larger crops are used.

    Raises InputError if an output is not finite.
    """
    return judge_crops((lr, upscale_image(model, lr, runtime)) for lr in central_crops(images))


def central_crops(images: Sequence[RGB]) -> list[RGB]:
    """The centres of the images that a judgement measures."""
    images = images[:_MAX_IMAGES]
    side = math.isqrt(_MAX_PIXELS // len(images))
    return [center_crop(image, side) for image in images]


def judge_crops(crops: Iterable[tuple[RGB, NDArray[np.float32]]]) -> Judgement:
    """Measure pairs of LR (h, w, 3), 8-bit, and SR (h*scale, w*scale, 3), 0..1.

    Raises InputError if an SR image is not finite.
    """
    measured = []
    for lr, sr in crops:
        if not np.isfinite(sr).all():
            raise InputError(
                "the model gives values that are not finite (NaN or infinity)",
                "Its weights are damaged or diverged, or the precision is too low for them: try --precision fp32.",
            )
        small = lr.astype(np.float32) / 255
        flat = _flat_mask(lr)
        detail, scale = laplacian(to_rgb8(sr)), sr.shape[0] // lr.shape[0]
        grain = detail[flat.repeat(scale, axis=0).repeat(scale, axis=1)]
        measured.append(
            (
                downscale_consistency(sr, small),
                colour_drift(sr, small),
                detail.std(),
                grain.std(),
                _copied_noise(lr, sr, flat),
                _fine_error(lr, sr),
            )
        )
    return Judgement(*(float(value) for value in np.mean(measured, axis=0)))


def insufficient_images(evaluation_images: Sequence[RGB], trained_on: Sequence[RGB]) -> str:
    """The reason why these images are too few or too uniform for a verdict; "" if they suffice."""
    tiny = flat = copies = 0
    thumbnails: list[NDArray[np.float32]] = []
    for number, image in enumerate(itertools.chain(evaluation_images, trained_on), 1):
        if min(image.shape[:2]) < _MIN_SIDE:
            tiny += 1
        elif image.std() < _MIN_CONTRAST:
            flat += 1
        elif any(float(np.mean(_thumbnail(image) * other)) > _DUPLICATE_CORRELATION for other in thumbnails):
            copies += 1
        else:
            thumbnails.append(_thumbnail(image))
        if number == len(evaluation_images) and not thumbnails:
            break  # none of the evaluation images shows anything
        if number >= len(evaluation_images) and len(thumbnails) >= _MIN_IMAGES:
            return ""
    kinds = ((tiny, f"smaller than {_MIN_SIDE} pixels"), (flat, "flat"), (copies, "duplicates"))
    unusable = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
    if not thumbnails:
        return f"the held-out images can't be used ({unusable})"
    plural = "" if len(thumbnails) == 1 else "s"
    counts = f"{len(thumbnails)} distinct real image{plural}{f' ({unusable})' if unusable else ''}"
    return f"{counts}; at least {_MIN_IMAGES} are needed"


def _thumbnail(image: RGB) -> NDArray[np.float32]:
    """A gray (32, 32) thumbnail with mean 0 and deviation 1, independent of size, brightness and compression."""
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    centred = small.astype(np.float32) - small.mean()
    return np.asarray(centred / max(float(centred.std()), 1e-6))


def decide(judgements: Mapping[float, Judgement], base: Judgement, scale: int) -> Verdict:
    """The verdict from the judgements of the adapted weights at several strengths."""
    acceptable = {strength: found for strength, found in judgements.items() if found.acceptable(base)}
    scores = {strength: judgement.score(base, scale) for strength, judgement in acceptable.items()}
    highest = max(scores.values(), default=-math.inf)
    if highest < _MIN_GAIN:
        full = judgements[max(judgements)]
        worse = max(judgements) not in acceptable or full.score(base, scale) <= -_MIN_GAIN
        word = "the base is better" if worse else "no clear gain"
        return Verdict(False, f"{word} on the held-out images: {_describe(full, base)}", 0.0)
    best = max(strength for strength, score in scores.items() if score >= max(_MIN_GAIN, highest - _EQUAL))
    return Verdict(True, f"better than the base on the held-out images: {_describe(acceptable[best], base)}", best)


def decide_by_teacher(student: Judgement, teacher: Judgement, scale: int) -> Verdict | None:
    """Keep a student that is as good as its teacher: its own base may be sharper than the images allow."""
    if not student.acceptable(teacher) or student.score(teacher, scale) <= -_MIN_GAIN:
        return None
    return Verdict(
        True, f"as good as its teacher on the held-out images: {_describe(student, teacher, 'teacher')}", 1.0
    )


def describe_score(score: float) -> str:
    """A score (dB over the base) in a few words."""
    word = "better" if score >= _MIN_GAIN else "worse" if score <= -_MIN_GAIN else "no clear gain"
    return f"{word} ({score:+.1f} dB)"


def decide_by_ground_truth(scores: Mapping[float, ValidationScores], base: ValidationScores) -> Verdict:
    """The verdict from the scores of the adapted weights on held-out pairs, at several strengths."""
    closer = [strength for strength, found in scores.items() if found.distance <= base.distance]
    best = max(closer, key=lambda strength: scores[strength].gain(base), default=None)
    if best is None or scores[best].gain(base) < _MIN_GAIN_ON_PAIRS:
        full = scores[max(scores)]
        word = "no clear gain" if abs(full.gain(base)) < _MIN_GAIN_ON_PAIRS else "the base is better"
        return Verdict(False, f"{word} on the held-out pairs: {full.describe(base)}", 0.0)
    return Verdict(True, f"better than the base on the held-out pairs: {scores[best].describe(base)}", best)


def stalled(scores: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` scores is better than the best score before them."""
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def _flat_mask(lr: RGB) -> NDArray[np.bool_]:
    """(h, w): True in the regions where the denoised LR image has the lowest local contrast."""
    gray = cv2.GaussianBlur(_gray(lr), (0, 0), 1)
    slopes = [cv2.Sobel(gray, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1))]
    contrast = cv2.blur(sum(slope * slope for slope in slopes), (5, 5))
    return np.asarray(contrast <= np.quantile(contrast, _FLAT_FRACTION))


def _copied_noise(lr: RGB, sr: NDArray[np.float32], flat: NDArray[np.bool_]) -> float:
    """The part of the LR's noise in flat regions that is in the SR too, as a standard deviation in 8-bit levels.

    The noise is the detail finer than 2 LR pixels. Noise that the model adds doesn't correlate with it.
    """
    small = cv2.resize(_gray(to_rgb8(sr)), lr.shape[1::-1], interpolation=cv2.INTER_AREA)
    noise, ours = (image - cv2.GaussianBlur(image, (0, 0), 2) for image in (_gray(lr), small))
    covariance = np.cov(noise[flat], ours[flat])
    return float(covariance[0, 1] / max(math.sqrt(covariance[0, 0]), 1e-3))


def _fine_error(lr: RGB, sr: NDArray[np.float32]) -> float:
    """Standard deviation of the finest part of the difference between the SR, at LR size, and the LR, in 8-bit levels.

    Fine is what a Gaussian blur of 0.8 LR pixels removes.
    """
    error = cv2.resize(_gray(to_rgb8(sr)), lr.shape[1::-1], interpolation=cv2.INTER_AREA) - _gray(lr)
    return float((error - cv2.GaussianBlur(error, (0, 0), 0.8)).std())


def _gray(image: RGB) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), np.float32)


def _log2_ratio(value: float, base: float, floor: float) -> float:
    """log2(value / base), with values below `floor` raised to it."""
    return math.log2(max(value, floor) / max(base, floor))


def _describe(adapted: Judgement, base: Judgement, other: str = "base") -> str:
    texture, grain = _percent_change(adapted.texture, base.texture), _percent_change(adapted.grain, base.grain)
    return (
        f"consistency with the LR {adapted.consistency - base.consistency:+.2f} dB "
        f"(in the finest detail {adapted.finer(base):+.1f} dB), "
        f"colour drift {adapted.drift:.2f} ({other} {base.drift:.2f}) ΔE, "
        f"fine detail {texture} (in flat regions {grain}), "
        f"noise copied from the LR {adapted.copied_noise:.1f} ({other} {base.copied_noise:.1f}) levels"
    )


def _percent_change(value: float, base: float) -> str:
    percent = round(100 * (value / max(base, 1e-6) - 1))
    return f"{percent:+d} %" if percent else "0 %"
