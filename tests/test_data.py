"""Crops and the synthetic degradation."""

import io
import threading
from dataclasses import astuple

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from pdd_cli.adaptation.loop import Prefetcher
from pdd_cli.data.datasets import Batch, CropSampler, downscaled, hr_from_real, read_folder, texture
from pdd_cli.data.degradations import Degradation, downsample, gaussian_blur, jpeg
from pdd_cli.errors import InputError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def domains(real, hr, **changes):
    settings = {"crop": 16, "scale": 4, "degradation": Degradation(), "seed": 0, **changes}
    return CropSampler(real=real, hr=hr, **settings)


def test_area_downsampling_is_the_block_mean_rounded_to_8_bit():
    hr = torch.rand(1, 3, 16, 8)
    blocks = hr.numpy().astype(np.float64).reshape(1, 3, 4, 4, 2, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(downsample(hr, 4, "area").numpy(), np.round(blocks * 255) / 255, atol=1e-6)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_downsampling_equals_pillows_antialiased_filters(filter):
    pixels = np.random.default_rng(0).random((32, 24)).astype(np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize((6, 8), getattr(Image.Resampling, filter.upper())))
    ours = downsample(torch.from_numpy(pixels)[None, None], 4, filter)[0, 0].numpy()
    np.testing.assert_allclose(ours, np.round(expected.clip(0, 1) * 255) / 255, atol=1.01 / 255)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_without_antialiasing_filters_are_opencvs(filter):
    pixels = np.random.default_rng(0).random((32, 24)).astype(np.float32)
    method = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}[filter]
    expected = cv2.resize(pixels, (6, 8), interpolation=method)
    degradation = Degradation((filter,), antialias=False)
    image = torch.from_numpy(pixels)[None, None].expand(1, 3, -1, -1)
    ours = degradation.apply(image, 4, np.random.default_rng(0))[0, 0].numpy()
    np.testing.assert_allclose(ours, np.round(expected.clip(0, 1) * 255) / 255, atol=1.01 / 255)
    assert not np.allclose(ours, downsample(image, 4, filter)[0, 0].numpy(), atol=0.05)


def test_a_pair_is_one_crop_and_its_downsampling():
    batch = domains([noise(40, 50)], [noise(90, 100)], degradation=Degradation(("area",))).batch(3, 2)
    assert batch.hr_s.shape == (2, 3, 64, 64)
    assert batch.lr_s.shape == batch.lr_t.shape == (2, 3, 16, 16)
    assert torch.equal(batch.lr_s, downsample(batch.hr_s, 4, "area"))


def test_crops_depend_on_seed_and_step_alone():
    images = [noise(70, 80), noise(90, 90, 1)]
    one, other = domains(images, images), domains(images, images)
    other.batch(0, 2)  # what was drawn before doesn't matter
    assert torch.equal(one.batch(5, 2).hr_s, other.batch(5, 2).hr_s)
    assert not torch.equal(one.batch(5, 2).hr_s, one.batch(6, 2).hr_s)
    assert not torch.equal(one.batch(5, 2).hr_s, domains(images, images, seed=1).batch(5, 2).hr_s)


def test_a_share_of_the_hr_crops_comes_from_the_real_images():
    dark, bright = (np.full((64, 64, 3), level, np.uint8) for level in (20, 200))
    sampler = domains([noise(40, 50)], [bright], own_hr=[dark], own_share=0.3)
    levels = torch.cat([sampler.batch(step, 8).hr_s[:, 0, 0, 0] for step in range(100)])
    assert float((levels < 0.5).float().mean()) == pytest.approx(0.3, abs=0.06)
    alone = domains([noise(40, 50)], [noise(90, 100)])
    unused = domains([noise(40, 50)], [noise(90, 100)], own_hr=[dark], own_share=0.0)
    ours, theirs = (astuple(one.batch(2, 3))[:3] for one in (alone, unused))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_images_smaller_than_a_crop_are_mirrored():
    image = noise(9, 70)
    crop = (domains([image], [noise(64, 64)]).batch(0, 1).lr_t[0] * 255).round().byte()
    rows = {bytes(row) for row in image.reshape(-1, 3)}
    assert all(bytes(pixel) in rows for pixel in crop.permute(1, 2, 0).reshape(-1, 3).numpy())


def test_hr_from_real_is_half_the_size_but_never_below_a_crop():
    large, small, tiny = hr_from_real([noise(200, 300), noise(100, 150), noise(40, 50)], 64)
    assert (large.shape, small.shape, tiny.shape) == ((100, 150, 3), (64, 96, 3), (40, 50, 3))


def test_unreadable_images_are_reported_and_left_out(tmp_path):
    (tmp_path / "below").mkdir()
    Image.fromarray(noise(20, 30)).save(tmp_path / "below" / "good.png")
    Image.fromarray(noise(20, 30)[..., 0]).save(tmp_path / "gray.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    messages = []
    images = read_folder(tmp_path, "--real-dir", messages.append)
    assert [image.shape for image in images] == [(20, 30, 3), (20, 30, 3)]
    assert len(messages) == 1
    assert "broken.jpg" in messages[0]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--hr-dir .*no images"):
        read_folder(tmp_path, "--hr-dir", lambda _: None)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    with pytest.raises(InputError, match=r"--hr-dir .*no readable image"):
        read_folder(tmp_path, "--hr-dir", lambda _: None)
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "nowhere", "--hr-dir", lambda _: None)


def test_blur_is_a_gaussian_of_that_deviation():
    image = torch.rand(1, 3, 40, 30)
    expected = [scipy.ndimage.gaussian_filter(plane, 2.5, mode="mirror") for plane in image[0].numpy()]
    np.testing.assert_allclose(gaussian_blur(image, 2.5)[0].numpy(), expected, atol=2e-3)
    assert gaussian_blur(image, 0) is image


def test_noise_has_the_deviation_that_was_asked_for():
    flat = torch.full((1, 3, 256, 256), 0.5)
    for sigma in (2, 10):
        lr = Degradation(("area",), noise=(sigma, sigma)).apply(flat, 4, np.random.default_rng(0))
        assert float((lr * 255).std()) == pytest.approx(sigma, rel=0.05)


def test_jpeg_is_pillows_of_that_quality():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(coarse).copy()).permute(2, 0, 1)[None].float() / 255

    class Corner:  # the grid of blocks at the image's corner, where a file has it
        def integers(self, high, size):
            return np.zeros(size, int)

    for quality in (90, 30):
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=quality)
        expected = np.asarray(Image.open(buffer)).astype(float)
        found = jpeg(image, quality, Corner())[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - expected).mean() < 0.6
        assert np.abs(found - np.asarray(coarse)).mean() > 0.6
    assert jpeg(image[..., :13, :21], 50, rng).shape == (1, 3, 13, 21)


def test_second_order_degrades_twice():
    flat = torch.full((1, 3, 256, 256), 0.5)
    once, twice = (
        Degradation(("area",), noise=(10, 10), second_order=second).apply(flat, 4, np.random.default_rng(1))
        for second in (False, True)
    )
    assert once.shape == twice.shape == (1, 3, 64, 64)
    # The first noise is thinned out by the second shrinking, and adds to the second noise.
    assert float((once * 255).std()) == pytest.approx(10, rel=0.05)
    assert 10.2 < float((twice * 255).std()) < 14.2
    # The first blur has the same width in LR pixels: the variances of both add up.
    edge = torch.zeros(1, 3, 256, 256)
    edge[..., 128:] = 1
    slope = {
        second: np.diff(
            Degradation(("area",), blur=(2, 2), second_order=second).apply(edge, 4, np.random.default_rng(1))[0, 0, 32]
        )
        for second in (False, True)
    }
    deviation = {k: np.sqrt((v * (np.arange(63) - 31) ** 2).sum() / v.sum()) for k, v in slope.items()}
    assert deviation[True] == pytest.approx(deviation[False] * np.sqrt(2), rel=0.05)


def test_of_several_crops_the_one_with_most_texture_is_taken():
    image = np.full((64, 640, 3), 128, np.uint8)
    image[:, :64] = noise(64, 64)
    flat = sum(texture(crop(domains([image], [image]), step)) for step in range(20))
    chosen = sum(texture(crop(domains([image], [image], candidates=8), step)) for step in range(20))
    assert chosen > 2 * flat


def test_a_crop_with_texture_enough_is_taken_wherever_it_comes_from():
    wild, mild, flat = noise(64, 64), noise(64, 64) // 6, np.full((64, 64, 3), 128, np.uint8)
    assert texture(wild) > texture(mild) > 30
    found = [
        texture(crop(domains([wild, mild, flat], [wild], candidates=8, min_texture=30), step)) for step in range(60)
    ]
    assert min(found) > 30
    assert 15 < sum(one > texture(mild) * 2 for one in found) < 45  # not the wildest alone
    assert len(set(found)) > 2  # nor the same crop
    # Where none has enough: the one with the most.
    most = [texture(crop(domains([mild, flat], [wild], candidates=8, min_texture=1e9), step)) for step in range(20)]
    assert sum(one > 30 for one in most) > 17


def crop(domain, step):
    return (domain.batch(step, 1).lr_t[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_texture_is_the_deviation_of_the_laplacian():
    image = noise(20, 30)[:, :, :1].repeat(3, axis=2)
    kernel = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
    expected = scipy.ndimage.convolve(image[:, :, 0].astype(float), kernel, mode="mirror").std()
    assert texture(image) == pytest.approx(expected, rel=1e-3)


def test_hr_at_several_sizes_never_falls_below_a_crop():
    made = downscaled([noise(100, 200), noise(50, 60)], (1, 0.5), 48)
    assert [image.shape[:2] for image in made] == [(100, 200), (50, 100), (50, 60)]


def test_batches_made_ahead_are_those_of_their_steps() -> None:
    domain = domains([noise(40, 50)], [noise(90, 100)])
    begun: list[int] = []
    third = threading.Event()

    def make(step: int) -> Batch:
        begun.append(step)
        if step == 2:
            third.set()
        return domain.batch(step, 2)

    threads = set(threading.enumerate())
    with Prefetcher(make) as ahead:
        found = {step: ahead(step) for step in (0, 1)}
        assert third.wait(120), "nothing is made before it is asked for"
        again = ahead(1)  # after a rollback
    assert set(threading.enumerate()) == threads
    for step, batch in [*found.items(), (1, again)]:
        for ours, expected in zip(astuple(batch), astuple(domain.batch(step, 2)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert begun[:3] == [0, 1, 2]
