"""Estimates of noise, JPEG compression and blur from LR images, against the values that made them."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pdd_cli.data.properties import flat_noise, jpeg_quality, measure_properties, source_blur


def photograph(size: int = 256) -> np.ndarray:
    """Shaded regions with edges and some texture, (size, size, 3)."""
    rng = np.random.default_rng(3)
    coarse = cv2.resize(rng.uniform(40, 210, (8, 8, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    textured = cv2.GaussianBlur(rng.normal(0, 30, (size, size, 1)).astype(np.float32), (0, 0), 1.5)
    mask = np.zeros((size, size), np.float32)
    mask[: size // 2] = 1
    return (coarse + (textured * mask)[..., None]).round().clip(0, 255).astype(np.uint8)


def through_jpeg(image: np.ndarray, quality: int, **options: object) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, **options)
    return np.asarray(Image.open(file).convert("RGB"))


def gray(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


@pytest.mark.parametrize("quality", [25, 50, 75, 90])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_the_quality_of_a_jpeg_is_found_in_its_pixels(quality, subsampling):
    decoded = through_jpeg(photograph(), quality, subsampling=subsampling)
    found = jpeg_quality(gray(decoded))
    assert found is not None
    assert abs(found - quality) <= 1


def test_an_image_that_was_not_compressed_has_no_quality():
    image = photograph()
    assert jpeg_quality(gray(image)) is None
    noisy = image + np.random.default_rng(0).normal(0, 6, image.shape)
    assert jpeg_quality(gray(noisy.clip(0, 255).astype(np.uint8))) is None
    assert jpeg_quality(np.full((64, 64), 7, np.uint8)) is None
    assert jpeg_quality(np.zeros((9, 300), np.uint8)) is None


def test_an_image_that_was_resized_after_its_compression_has_no_quality():
    decoded = through_jpeg(photograph(512), 60)
    assert jpeg_quality(gray(cv2.resize(decoded, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))) is None


@pytest.mark.parametrize("sigma", [3.0, 8.0])
def test_noise_is_measured_where_the_image_is_flat(sigma):
    image = photograph().astype(np.float32)
    noisy = (image + np.random.default_rng(1).normal(0, sigma, image.shape[:2])[..., None]).round().clip(0, 255)
    assert flat_noise(gray(noisy.astype(np.uint8))) == pytest.approx(sigma, rel=0.3)
    assert flat_noise(gray(image.astype(np.uint8))) < 1


def test_most_images_decide(tmp_path: Path):
    compressed, clean = through_jpeg(photograph(), 40), photograph()
    most = measure_properties([compressed, through_jpeg(clean, 55), clean])
    assert (most.jpeg, most.images, most.noisy) == ((40, 55), 3, False)
    assert measure_properties([compressed, clean]).jpeg is None
    assert "JPEG of quality 40 to 55 (from 3 images)" in most.describe()
    with pytest.raises(ValueError, match="no images"):
        measure_properties([])


def sampled(image: np.ndarray, blur: float) -> np.ndarray:
    """A quarter of `image`'s size: SciPy's Gaussian of `blur` LR pixels, then the mean of each 4 x 4 pixels."""
    values = image.astype(np.float64)
    if blur:
        values = ndimage.gaussian_filter(values, (4 * blur, 4 * blur, 0), mode="mirror")
    height, width = image.shape[0] // 4, image.shape[1] // 4
    return values.reshape(height, 4, width, 4, 3).mean((1, 3))


@pytest.mark.parametrize("blur", [0.0, 0.3, 0.55, 0.8, 1.5])
@pytest.mark.parametrize("noise", [0.0, 6.0])
def test_blur_is_found_from_lr_and_hr(blur, noise):
    hr = photograph()
    lr = sampled(hr, blur) + 12 + np.random.default_rng(2).normal(0, noise, (64, 64, 1))  # brighter than the HR
    found = source_blur([(lr.round().clip(0, 255).astype(np.uint8), hr.astype(np.float32) / 255)])
    assert found == pytest.approx(blur, abs=0.1 if noise else 0.05)


def test_sharpened_images_have_no_blur():
    hr = photograph()
    lr = sampled(hr, 0)
    sharpened = lr + 0.9 * (lr - ndimage.gaussian_filter(lr, (1, 1, 0)))
    assert source_blur([(sharpened.round().clip(0, 255).astype(np.uint8), hr.astype(np.float32) / 255)]) == 0


def test_blur_rests_on_images_that_show_it():
    hr = photograph()
    shown = (sampled(hr, 0.8).round().astype(np.uint8), hr.astype(np.float32) / 255)
    flat = (np.full((64, 64, 3), 90, np.uint8), np.full((256, 256, 3), 0.4, np.float32))
    broken = (shown[0], np.full_like(shown[1], np.nan))
    tiny = (shown[0][:9, :9], shown[1][:36, :36])
    before = measure_properties([shown[0]])
    found = before.with_blur([shown, flat, broken, tiny])
    assert found.blur == pytest.approx(0.8, abs=0.05)
    assert found.blur_images == 1
    assert found.describe() == f"{before.describe()}, blur of {found.blur:.2f} LR pixels (from 1 image)"
    assert before.with_blur([flat, broken, tiny]) == before
