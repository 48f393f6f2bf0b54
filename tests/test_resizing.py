"""Sizes and resampling, against arithmetic and Pillow's own resize of the whole image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pdd_cli.upscaling.resizing import SizeRequest, from_linear, passes, resize_row_chunks, to_linear

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        (SizeRequest(), (400, 200)),
        (SizeRequest(scale=1.5), (150, 75)),
        (SizeRequest(scale=0.001), (1, 1)),
        (SizeRequest(width=333), (333, 166)),
        (SizeRequest(height=75), (150, 75)),
        (SizeRequest(long_side=1000), (1000, 500)),
        (SizeRequest(fit=(300, 300)), (300, 150)),
        (SizeRequest(fit=(300, 30)), (60, 30)),
    ],
)
def test_size_of_an_output(request_: SizeRequest, size: tuple[int, int]) -> None:
    assert request_.size_of(100, 50, 4) == size
    turned = SizeRequest(
        request_.scale, request_.height, request_.width, request_.long_side, request_.fit and request_.fit[::-1]
    )
    assert turned.size_of(50, 100, 4) == size[::-1]


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_what_fits_is_inside_touches_the_box_and_keeps_the_aspect(w: int, h: int, W: int, H: int) -> None:
    width, height = SizeRequest(fit=(W, H)).size_of(w, h, 4)
    assert 1 <= width <= W
    assert 1 <= height <= H
    assert width == W or height == H
    assert abs(width * h - height * w) <= max(w, h)  # a pixel of either side


def test_passes_reach_the_target() -> None:
    sizes = {1: 1, 0.25: 1, 1.5: 1, 4: 1, 4.3: 1, 5: 2, 8: 2, 16: 2, 17: 2, 18: 3}
    assert {scale: passes((100, 100), (round(100 * scale), round(100 * scale)), 4) for scale in sizes} == sizes
    assert passes((100, 100), (500, 500), 1) == 1


def in_bands(image: np.ndarray, seed: int) -> list[np.ndarray]:
    cuts = np.unique(np.random.default_rng(seed).integers(1, max(len(image), 2), 5))
    return [band.copy() for band in np.split(image, cuts[cuts < len(image)])]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(1, 900), st.integers(1, 60), st.integers(0, 9))
def test_bands_give_what_the_whole_image_gives(h: int, w: int, H: int, W: int, seed: int) -> None:
    image = np.random.default_rng(seed).random((h, w, 2), np.float32)
    bands = list(resize_row_chunks(iter(in_bands(image, seed)), (w, h), (W, H), alpha=False))
    reduces = h * w > H * W
    source = to_linear(image) if reduces else image
    expected = np.stack(
        [np.asarray(Image.fromarray(source[..., c].copy()).resize((W, H), Image.Resampling.LANCZOS)) for c in (0, 1)],
        axis=-1,
    ).clip(0, 1)
    if (h, w) == (H, W):
        expected = image
    result = np.concatenate(bands)
    assert result.shape == (H, W, 2)
    np.testing.assert_allclose(result, from_linear(expected) if reduces and (h, w) != (H, W) else expected, atol=2e-4)


def test_reducing_keeps_the_light_and_alpha_isnt_light() -> None:
    board = np.indices((64, 64)).sum(axis=0) % 2
    image = np.stack([board, board], axis=-1).astype(np.float32)
    small = np.concatenate(list(resize_row_chunks([image], (64, 64), (8, 8), alpha=True)))[2:-2, 2:-2]
    # Half the light is 188 of 255 in sRGB (IEC 61966-2-1), not 128.
    np.testing.assert_allclose(small[..., 0] * 255, 187.5, atol=1)
    np.testing.assert_allclose(small[..., 1] * 255, 127.5, atol=1)
    linear = RNG.random(100, np.float32)
    np.testing.assert_allclose(from_linear(to_linear(linear)), linear, atol=1e-5)
