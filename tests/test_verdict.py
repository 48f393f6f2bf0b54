"""The verdict without ground truth: what it measures, and what it says of models that are known to be good or bad."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from pdd_cli.adaptation.judge import Judge, Judgement, decide, held_out_indices, judge_crops, measure
from pdd_cli.errors import InputError
from pdd_cli.models.loading import SRModel, interpolated
from pdd_cli.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")


class Upsampler(nn.Module):
    """Bicubic x4, then what a model may do wrong: shift colours, blur, or add noise that LR can't have had."""

    def __init__(self, shift: float = 0.0, blur: bool = False, grain: float = 0.0) -> None:
        super().__init__()
        self.shift, self.blur, self.grain = shift, blur, grain
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=4, mode="bicubic")
        if self.blur:
            y = F.avg_pool2d(F.pad(y, (4, 4, 4, 4), mode="replicate"), 9, 1)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        return y + self.grain * noise + self.shift * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)


def model(**faults: float) -> SRModel:
    return SRModel(module=Upsampler(**faults), scale=4, in_channels=3, out_channels=3, architecture="test")  # type: ignore[arg-type]


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(70, 190, (24, 20, 3), np.uint8)) for _ in range(3)]
    smooth = [np.asarray(one.resize((100, 120), Image.Resampling.BICUBIC)).astype(int) for one in coarse]
    return [(one + rng.integers(-30, 31, (120, 100, 1))).astype(np.uint8) for one in smooth]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 0.2, 0), (2, 0.5, 0), (3, 0.2, 1), (9, 0.2, 2), (100, 0.2, 8), (10, 0.0, 0), (3, 0.9, 3)],
)
def test_images_are_held_out_where_enough_are_left(count: int, share: float, expected: int) -> None:
    found = held_out_indices(count, share)
    assert len(found) == len(set(found)) == min(expected, count)
    assert all(0 <= index < count for index in found)


def test_a_shifted_and_a_blurred_model_score_lower() -> None:
    good, shifted, blurred = (
        measure(model(**faults), images(), CPU) for faults in ({}, {"shift": 0.05}, {"blur": True})
    )
    assert shifted.drift > good.drift + 3
    assert shifted.consistency < good.consistency - 3
    assert blurred.texture < 0.5 * good.texture
    assert good.score(good, 4) == 0
    assert shifted.score(good, 4) < 0
    assert blurred.score(good, 4) < 0


def test_sabotaged_models_are_rejected_and_better_ones_kept() -> None:
    base = measure(model(shift=0.02, grain=0.01), images(), CPU)
    for faults in ({"shift": 0.08}, {"blur": True}, {"grain": 0.2}):
        verdict = decide({1.0: measure(model(**faults), images(), CPU)}, base, 4)
        assert not verdict.keep, faults
        assert "the base is better" in verdict.reason
    verdict = decide({1.0: measure(model(grain=0.01), images(), CPU)}, base, 4)
    assert verdict.keep
    assert verdict.strength == 1
    unchanged = decide({1.0: base}, base, 4)
    assert not unchanged.keep
    assert unchanged.reason.startswith("no clear gain")
    assert "fine detail 0 % (in flat regions 0 %)" in unchanged.reason


def test_the_highest_of_equally_good_strengths_is_recommended() -> None:
    base = Judgement(30.0, 1.0, 10.0, 4.0, 1.0, 6.0)
    judgements = {0.5: Judgement(31.5, 1.0, 9.0, 3.6, 0.5, 6.0), 1.0: Judgement(31.6, 1.0, 6.5, 2.6, 0.5, 6.0)}
    for found in judgements.values():
        expected = found.consistency - 30 + 3 * math.log2(found.texture / 10)
        assert found.score(base, 4) == pytest.approx(expected)
    assert decide(judgements, base, 4).strength == 0.5
    equal = judgements | {0.75: Judgement(31.3, 1.0, 9.0, 3.6, 1.0, 6.0)}  # 0.2 dB less, which a few images can't tell
    assert decide(equal, base, 4).strength == 0.75
    # Less than half a decibel is no gain that a few images could tell.
    assert "no clear gain" in decide({1.0: replace(base, consistency=30.4)}, base, 4).reason
    assert not decide({1.0: replace(base, consistency=30.4)}, base, 4).keep
    assert decide({1.0: replace(base, consistency=30.6)}, base, 4).keep
    # Below 0.6 of the base's texture no gain counts.
    assert not decide({1.0: replace(base, consistency=45.0, texture=5.9)}, base, 4).keep


def test_consistency_earns_two_decibels_at_the_most() -> None:
    base = Judgement(30.0, 1.0, 10.0, 4.0, 1.0, 6.0)
    assert [replace(base, consistency=value).score(base, 4) for value in (29.0, 31.0, 32.0, 40.0)] == [-1, 1, 2, 2]
    # Of a model that removes noise, being closer to the noisy input is no gain.
    assert replace(base, consistency=40.0).score(base, 1) == 0


def test_a_fine_error_that_falls_by_more_than_two_decibels_costs_half_of_the_rest() -> None:
    base = Judgement(30.0, 1.0, 10.0, 4.0, 1.0, 6.0)
    for ratio, cost in ((1.2, 0), (10 ** (-2 / 20), 0), (10 ** (-5 / 20), 1.5), (10 ** (-8 / 20), 3)):
        found = replace(base, consistency=32.0, fine_error=6 * ratio)
        assert found.score(base, 4) == pytest.approx(2 - cost)
        assert decide({1.0: found}, base, 4).keep is (cost <= 1.5)
        assert found.score(base, 1) == 0  # of a model that removes noise


def test_the_fine_error_is_the_finest_part_of_the_difference_from_the_lr() -> None:
    random = np.random.default_rng(1)
    lr = random.integers(60, 190, (64, 64, 1), np.uint8).repeat(3, axis=2)
    error = random.normal(0, 5, (64, 64, 1))
    for shown, expected in ((error, error - ndimage.gaussian_filter(error, (0.8, 0.8, 0))), (np.full(1, 9.0), 0)):
        sr = ((lr + shown).repeat(4, 0).repeat(4, 1) / 255).astype(np.float32)
        assert judge_crops([(lr, sr)]).fine_error == pytest.approx(np.std(expected), rel=0.03, abs=0.1)


class Sharpener(nn.Module):
    """Bicubic x4, then its contrast with its surroundings raised where there is some, or grain everywhere."""

    def __init__(self, sharpen: float = 0.0, grain: float = 0.0) -> None:
        super().__init__()
        self.sharpen, self.grain = sharpen, grain
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=4, mode="bicubic")
        noise = torch.randn((1, 1, *y.shape[2:]), generator=torch.Generator().manual_seed(0))
        return y + self.sharpen * (y - F.avg_pool2d(y, 5, 1, padding=2, count_include_pad=False)) + self.grain * noise


def test_detail_is_distinguished_from_grain() -> None:
    columns, rows = np.meshgrid(np.arange(96), np.arange(96))
    stripes = np.where((columns < 48) & (rows % 6 < 3), 200, 60) + columns // 8  # textured, and nearly flat
    lr = np.repeat(stripes[..., None], 3, axis=2).astype(np.uint8)
    base, sharp, grainy = (
        measure(replace(model(), module=Sharpener(*faults)), [lr], CPU)
        for faults in ((0, 0.003), (1, 0.003), (0, 0.04))
    )
    assert sharp.texture > 1.3 * base.texture
    assert grainy.texture > 1.3 * base.texture
    assert sharp.grain < 1.1 * base.grain
    # In flat places there is nothing but the noise: of deviation 0.04, through the Laplacian's weights 1, 1, 1, 1, -4.
    assert grainy.grain == pytest.approx(0.04 * 255 * 20**0.5, rel=0.1)
    closer = grainy.consistency - base.consistency
    copied = max(0, grainy.copied_noise - base.copied_noise)
    assert copied < 0.2  # the grain has nothing to do with the LR
    assert grainy.score(base, 4) == pytest.approx(closer - 0.2 * (grainy.grain - base.grain) - copied)
    assert not decide({1.0: grainy}, base, 4).keep
    # Detail that is gained earns nothing, and neither do grain and noise that are lost.
    assert Judgement(32.0, 1.0, 15.0, 1.0, 0.0, 6.0).score(Judgement(32.0, 1.0, 10.0, 4.0, 2.0, 6.0), 4) == 0


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_noise_that_is_copied_from_the_lr_is_measured(part: float) -> None:
    random = np.random.default_rng(0)
    scene = np.repeat((np.arange(96) + np.arange(96)[:, None])[..., None], 3, axis=2).astype(np.float64)
    noise = random.normal(0, 6, (96, 96, 1))
    lr = (scene + noise).round().clip(0, 255).astype(np.uint8)
    added = random.normal(0, 6, (384, 384, 1))
    sr = ((scene + part * noise).repeat(4, 0).repeat(4, 1) + added).clip(0, 255).astype(np.float32) / 255
    # The deviation of white noise without the detail coarser than 2 pixels; a little less in the flattest tenth.
    impulse = np.zeros((33, 33))
    impulse[16, 16] = 1
    weights = impulse - ndimage.gaussian_filter(impulse, 2)
    expected = part * 6 * np.sqrt(np.square(weights).sum())
    assert judge_crops([(lr, sr)]).copied_noise == pytest.approx(expected, rel=0.15, abs=0.5)
    more = judge_crops([(lr, sr)])
    less = replace(more, copied_noise=0.0)
    assert less.score(less, 4) - more.score(less, 4) == pytest.approx(max(0, more.copied_noise))


class Grainy(nn.Module):
    """Bicubic x4, then as much grain as the only weight says."""

    def __init__(self, grain: float) -> None:
        super().__init__()
        self.grain = nn.Parameter(torch.tensor(grain))

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=4, mode="bicubic")
        return y + self.grain * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def test_a_student_as_good_as_its_teacher_is_kept_even_if_its_base_is_sharper() -> None:
    base, teacher = (replace(model(), module=Grainy(grain)) for grain in (0.05, 0.01))
    for taught, grain, expected in ((teacher, 0.01, True), (teacher, 0.05, False), (None, 0.01, False)):
        judge = Judge(base, images(), images(), None, CPU, taught)
        verdict = judge.conclude({"grain": torch.tensor(grain)}).verdict
        assert verdict.keep is expected
        assert verdict.reason.startswith("as good as its teacher") is expected


def test_interpolation_is_linear() -> None:
    base, adapted = {"a": torch.zeros(3), "n": torch.tensor(1)}, {"a": torch.ones(3) * 4, "n": torch.tensor(2)}
    found = interpolated(base, adapted, 0.25)
    assert torch.equal(found["a"], torch.ones(3))
    assert found["n"] == 2


def test_a_model_that_gives_nan_is_not_judged() -> None:
    with pytest.raises(InputError, match="finite"):
        measure(model(shift=float("nan")), images(), CPU)


def test_an_output_that_is_not_finite_is_an_error() -> None:
    sr = np.full((64, 64, 3), np.nan, np.float32)
    with pytest.raises(InputError, match="not finite") as raised:
        judge_crops([(np.zeros((16, 16, 3), np.uint8), sr)])
    assert "--precision fp32" in raised.value.hint
