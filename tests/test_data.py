"""Crops and the synthetic degradation."""

import numpy as np
import pytest
import torch
from PIL import Image

from pdd_cli.data.datasets import Domains, hr_from_real, read_folder
from pdd_cli.data.degradations import Degradation, downsample
from pdd_cli.errors import InputError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def domains(real, hr, **changes):
    settings = {"crop": 16, "scale": 4, "degradation": Degradation(), "seed": 0, **changes}
    return Domains(real=real, hr=hr, **settings)


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


def test_images_smaller_than_a_crop_are_mirrored():
    image = noise(9, 70)
    crop = (domains([image], [noise(64, 64)]).batch(0, 1).lr_t[0] * 255).round().byte()
    rows = {bytes(row) for row in image.reshape(-1, 3)}
    assert all(bytes(pixel) in rows for pixel in crop.permute(1, 2, 0).reshape(-1, 3).numpy())


def test_hr_from_real_is_half_the_size_but_never_below_a_crop():
    large, small, tiny = hr_from_real([noise(200, 300), noise(100, 150), noise(40, 50)], 64)
    assert (large.shape, small.shape, tiny.shape) == ((100, 150, 3), (64, 96, 3), (40, 50, 3))


def test_unreadable_images_are_told_and_left_out(tmp_path):
    (tmp_path / "below").mkdir()
    Image.fromarray(noise(20, 30)).save(tmp_path / "below" / "good.png")
    Image.fromarray(noise(20, 30)[..., 0]).save(tmp_path / "gray.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    told = []
    images = read_folder(tmp_path, "--real-dir", told.append)
    assert [image.shape for image in images] == [(20, 30, 3), (20, 30, 3)]
    assert len(told) == 1
    assert "broken.jpg" in told[0]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--hr-dir .*no readable image"):
        read_folder(tmp_path, "--hr-dir", lambda _: None)
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "nowhere", "--hr-dir", lambda _: None)
