"""The verdict against the ground truth, on models that were judged and scored by benchmarks/quality/verdicts.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from benchmarks.quality.verdicts import agreement, good, right, score, table, true_gains, variants, variants_of_base

ROWS = json.loads((Path(__file__).parent / "data" / "judged_models.json").read_text())


def test_the_verdict_is_right_as_often_as_documented() -> None:
    count, correlation = agreement(ROWS)
    assert (count, len(ROWS)) == (77, 93)
    assert correlation == pytest.approx(0.28, abs=0.005)


def test_scores_are_those_of_the_documented_formula() -> None:
    for row in ROWS:
        base, ours = row["base"], row["adapted"]
        expected = min(2, ours["consistency"] - base["consistency"])
        expected -= 3 * max(0, math.log2(base["texture"] / ours["texture"]))
        expected -= 0.2 * max(0, ours["grain"] - base["grain"])
        expected -= max(0, ours["copied_noise"] - base["copied_noise"])
        expected -= 0.5 * max(0, 20 * math.log10(base["fine_error"] / ours["fine_error"]) - 2)
        assert score(row) == pytest.approx(expected)


def test_the_agreement_is_spearmans_correlation_with_the_mean_z_score() -> None:
    gains = np.array([[row["gain"][name] for name in ("psnr", "distance", "ssimulacra2")] for row in ROWS])
    expected = ((gains - gains.mean(0)) / gains.std(0)).mean(1)
    np.testing.assert_allclose(true_gains(ROWS), expected)
    ranks = [rankdata(values) for values in (expected, [score(row) for row in ROWS])]
    assert agreement(ROWS)[1] == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_a_good_model_gains_by_two_measures_and_loses_by_none() -> None:
    error = {"psnr": 0.1, "distance": 0.01, "ssimulacra2": 1.0}
    for gains, expected in (
        ((1, 0.1, 5), True),
        ((1, 0.1, -0.5), True),
        ((1, 0.1, -2), False),
        ((1, -0.005, -0.5), False),
    ):
        row = {"gain": dict(zip(error, gains, strict=True)), "error": error}
        assert good(row) is expected


def test_the_table_names_each_model_and_whether_its_verdict_is_right() -> None:
    lines = [line for line in table(ROWS).splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(ROWS)
    assert sum(line.endswith("| yes |") for line in lines) == sum(map(right, ROWS))


def test_spoilt_outputs_differ_in_the_known_way() -> None:
    random = np.random.default_rng(0)
    lr = random.integers(60, 190, (24, 20, 3), np.uint8)
    sr, base = (random.uniform(0.2, 0.8, (96, 80, 3)).astype(np.float32) for _ in range(2))
    made = {name: make() for name, make in variants(lr, base, sr).items()}
    assert all(image.shape == sr.shape for image in made.values())
    np.testing.assert_array_equal(made[""], sr)
    np.testing.assert_allclose(made["half strength"], 0.5 * base + 0.5 * sr, atol=1e-6)
    assert made["blurred"].std() < sr.std() < made["sharpened"].std()
    assert (made["grainy"] - sr).std() == pytest.approx(6 / 255, rel=0.05)
    corrected = variants_of_base(lr, base)["corrected finely"]()
    # Closer to the LR, as the mean of each 4 x 4 pixels shows.
    errors = [np.abs(image.reshape(24, 4, 20, 4, 3).mean((1, 3)) - lr / 255).mean() for image in (base, corrected)]
    assert errors[1] < 0.5 * errors[0]
