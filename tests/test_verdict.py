"""The verdict without ground truth: what it measures, and what it says of models that are known to be good or bad."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pdd_cli.adaptation.judge import Judgement, decide, held_out_indices, measure
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


def test_the_best_strength_is_recommended() -> None:
    base = Judgement(30.0, 1.0, 10.0, 4.0)
    judgements = {0.5: Judgement(32.0, 1.0, 9.0, 3.6), 1.0: Judgement(32.5, 1.0, 6.5, 2.6)}
    for found in judgements.values():
        expected = found.consistency - 30 + 6 * math.log2(found.texture / 10)
        assert found.score(base, 4) == pytest.approx(expected)
    assert decide(judgements, base, 4).strength == 0.5
    # Less than half a decibel is no gain that a few images could tell.
    assert not decide({1.0: Judgement(30.4, 1.0, 10.0, 4.0)}, base, 4).keep
    assert "no clear gain" in decide({1.0: Judgement(30.4, 1.0, 10.0, 4.0)}, base, 4).reason
    assert decide({1.0: Judgement(30.6, 1.0, 10.0, 4.0)}, base, 4).keep
    # Below 0.6 of the base's texture no gain counts.
    assert not decide({1.0: Judgement(45.0, 1.0, 5.9, 4.0)}, base, 4).keep


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
    assert grainy.score(base, 4) == pytest.approx(closer - 0.25 * (grainy.grain - base.grain))
    assert not decide({1.0: grainy}, base, 4).keep
    # Detail that is gained earns nothing, and grain that is lost neither.
    assert Judgement(32.0, 1.0, 15.0, 1.0).score(Judgement(32.0, 1.0, 10.0, 4.0), 4) == 0


# The base and the weights at full strength as judged in runs of the laboratory, and the gain against the ground truth
# (PSNR in dB, feature distance in percent, SSIMULACRA 2).
RUNS = {
    "camera_b": (Judgement(32.46, 0.88, 11.24, 2.13), Judgement(35.50, 0.44, 14.25, 5.10), (0.70, -6.1, 8.5)),
    "camera_phone": (Judgement(29.22, 1.35, 14.50, 3.46), Judgement(31.40, 0.53, 20.12, 6.46), (0.36, -3.5, 7.1)),
    "camera_phone, own": (Judgement(29.22, 1.35, 14.50, 3.46), Judgement(31.38, 0.98, 16.47, 3.20), (0.21, -0.2, 8.2)),
    "jpeg": (Judgement(27.82, 2.07, 27.52, 7.61), Judgement(29.84, 0.76, 31.06, 12.84), (0.23, -1.7, 2.9)),
    "film, own": (Judgement(25.79, 3.27, 28.13, 17.83), Judgement(28.05, 0.84, 42.11, 34.38), (-0.88, 25.3, -3.1)),
    "film, adversarial": (Judgement(25.79, 3.27, 28.13, 17.83), Judgement(28.93, 1.57, 42.64, 29.15), (0.17, 0.8, 0.6)),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_that_gained_by_the_ground_truth_are_kept(name: str) -> None:
    base, adapted, (psnr, distance, ssimulacra2) = RUNS[name]
    better = psnr > 0 and distance < 0 and ssimulacra2 > 0
    assert decide({1.0: adapted}, base, 4).keep == better


def test_interpolation_is_linear() -> None:
    base, adapted = {"a": torch.zeros(3), "n": torch.tensor(1)}, {"a": torch.ones(3) * 4, "n": torch.tensor(2)}
    found = interpolated(base, adapted, 0.25)
    assert torch.equal(found["a"], torch.ones(3))
    assert found["n"] == 2


def test_a_model_that_gives_nan_is_not_judged() -> None:
    with pytest.raises(ValueError, match="finite"):
        measure(model(shift=float("nan")), images(), CPU)
