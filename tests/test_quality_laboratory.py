"""benchmarks/quality: its domains and measures, against plain NumPy, SciPy and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from benchmarks.quality.domains import RECIPES, domain
from tests.helpers.images import photo


@pytest.fixture(scope="module")
def hr():
    return photo(256, 192)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_same_lr_each_time(hr, name):
    first, again = (RECIPES[name](hr, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    small = np.asarray(Image.fromarray(hr).resize((hr.shape[1] // 4, hr.shape[0] // 4), Image.Resampling.BOX))
    assert first.shape == small.shape
    error = first.astype(float) - small
    assert 1 < error.std() < 25  # degraded, and the same picture at the same place
    for shift in ((0, 2), (2, 0), (0, -2), (-2, 0)):
        assert error.std() < (np.roll(first, shift, (0, 1)) - small.astype(float)).std()


def test_trained_on_and_scored_images_are_apart(tmp_path):
    photographs = tmp_path / "kodak24"
    photographs.mkdir()
    for number in range(4):
        Image.fromarray(photo(64, 64, seed=number)).save(photographs / f"{number:02}.png")
    made = domain("jpeg", tmp_path, tmp_path / "domains")
    names = [{path.name for path in folder.iterdir()} for folder in (made.train_lr, made.test_lr, made.test_hr)]
    assert names == [{"00.png", "02.png"}, {"01.png", "03.png"}, {"01.png", "03.png"}]


def test_the_finest_band_is_measured_as_scipy_does(hr):
    from benchmarks.quality.measures import _finest

    values = hr.astype(float)
    expected = values - ndimage.gaussian_filter(values, (1.4, 1.4, 0), mode="mirror", truncate=4)
    ours = _finest(hr)
    assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.999
