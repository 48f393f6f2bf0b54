"""Colour corrections and bleeding, against formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from pdd_cli.upscaling.colour import bleed, correct

RNG = np.random.default_rng(0)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([0.3 + 0.3 * x, 0.5 - 0.2 * y, 0.4 + 0.2 * x * y], axis=-1).astype(np.float32)


def test_moments_become_those_of_the_lr() -> None:
    lr = RNG.random((20, 30, 3)).astype(np.float32) * [0.5, 0.8, 0.2] + [0.1, 0, 0.3]
    sr = RNG.random((80, 120, 3)).astype(np.float32) * 0.3 + 0.4
    result = correct(sr, lr.astype(np.float32), "mean-std")
    np.testing.assert_allclose(result.mean(axis=(0, 1)), lr.mean(axis=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(0, 1)), lr.std(axis=(0, 1)), atol=1e-5)
    expected = (sr - sr.mean(axis=(0, 1))) / sr.std(axis=(0, 1)) * lr.std(axis=(0, 1)) + lr.mean(axis=(0, 1))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    flat = np.full((8, 8, 1), 0.2, np.float32)
    np.testing.assert_allclose(correct(flat, flat[:2, :2] + 0.3, "mean-std"), 0.5, atol=1e-6)


def test_a_tint_goes_and_detail_stays() -> None:
    lr, true = smooth(40, 48), smooth(160, 192)
    detail = (RNG.random(true.shape) * 0.1 - 0.05).astype(np.float32)
    y, x = np.mgrid[0:1:160j, 0:1:192j]
    tint = np.stack([0.1 * x, -0.08 * y, np.full_like(x, 0.05)], axis=-1).astype(np.float32)
    result = correct(true + detail + tint, lr, "low-frequency")
    left = (result - true - detail)[16:-16, 16:-16]
    assert np.abs(left).max() < 0.02 < np.abs(tint).max()
    gradient = np.diff(result, axis=1)[16:-16, 16:-16]
    np.testing.assert_allclose(gradient, np.diff(true + detail, axis=1)[16:-16, 16:-16], atol=0.005)


@pytest.mark.parametrize("correction", ["mean-std", "low-frequency"])
def test_what_isnt_seen_doesnt_count(correction: str) -> None:
    lr, sr = smooth(40, 48), smooth(160, 192) + np.float32(0.1)
    visible = np.zeros((40, 48), np.float32)
    visible[:, 24:] = 1
    other = lr.copy()
    other[:, :20] = 1 - other[:, :20]
    a = correct(sr.copy(), lr, correction, visible)  # type: ignore[arg-type]
    b = correct(sr.copy(), other, correction, visible)  # type: ignore[arg-type]
    np.testing.assert_allclose(a[:, 100:], b[:, 100:], atol=1e-5)
    assert np.abs(a - sr).max() > 0.03


def test_hidden_pixels_take_the_nearest_colour_that_is_seen() -> None:
    pixels = RNG.integers(0, 256, (9, 11, 3), np.uint8)
    alpha = (RNG.random((9, 11)) > 0.7).astype(np.uint8) * 255
    result = bleed(pixels, alpha)
    seen = np.argwhere(alpha > 0)
    for y, x in np.ndindex(9, 11):
        distances = ((seen - (y, x)) ** 2).sum(axis=1)
        nearest = seen[distances == distances.min()]
        assert any((result[y, x] == pixels[tuple(at)]).all() for at in nearest)
    np.testing.assert_array_equal(bleed(pixels, np.zeros_like(alpha)), pixels)
