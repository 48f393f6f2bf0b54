"""`pdd adapt` on gray images, and with one-channel models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pdd_cli.adaptation.sources import read_sources
from pdd_cli.data.datasets import is_gray
from pdd_cli.models.loading import load_sr_model
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.settings.adapt import AdaptConfig
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo


@pytest.fixture
def gray_model(tmp_path: Path) -> Path:
    path = tmp_path / "gray.safetensors"
    save_file(RRDBNet(in_channels=1, out_channels=1, features=8, growth=32, blocks=1).state_dict(), path)
    return path


def gray_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        image = Image.fromarray(photo(40, 40, number)).convert("L")
        image.convert("RGB" if number else "L").save(folder / f"{number}.{'jpg' if number else 'png'}", quality=80)
    return folder


def test_a_one_channel_model_upscales_the_luma(gray_model: Path) -> None:
    model = load_sr_model(gray_model)
    rgb = torch.rand(2, 3, 8, 9)
    luma = 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]
    with torch.inference_mode():
        found, expected = model.upscale(rgb), model.module(luma)
    torch.testing.assert_close(found, expected.expand(-1, 3, -1, -1))


def test_gray_images_are_recognised_and_hr_images_lose_their_colour(tmp_path: Path, ground: Path) -> None:
    config = AdaptConfig(real_dir=gray_folder(tmp_path), hr_dir=ground / "hr", crop=16)
    images = read_sources(config, 4, print, lambda text: None)
    assert images.are_gray
    gray = images.in_gray()
    for colour, converted in zip(images.hr, gray.hr, strict=True):
        assert not is_gray(colour)
        expected = np.asarray(Image.fromarray(colour).convert("L")).astype(int)
        assert (np.abs(converted - expected[..., None]) <= 1).all()
    coloured = AdaptConfig(real_dir=ground / "realLR", hr_dir=ground / "hr", crop=16)
    assert not read_sources(coloured, 4, print, lambda text: None).are_gray


@pytest.mark.slow
def test_a_one_channel_model_is_adapted_and_used(
    pdd: Callable[..., Outcome], ground: Path, gray_model: Path, tmp_path: Path
) -> None:
    done = pdd(*command(ground, "--base", str(gray_model), steps=8)[3:])
    assert done.code == 0, done.err
    assert "is a model for gray images: all images are converted to gray" in done.err
    adapted, base = load_file("runs/realLR/best.safetensors"), load_file(gray_model)
    assert {key: value.shape for key, value in adapted.items()} == {key: value.shape for key, value in base.items()}
    assert any(not torch.equal(adapted[key], base[key]) for key in base)
    scans = gray_folder(tmp_path)
    assert pdd("upscale", scans / "0.png", "out.png", "--weights", "realLR", "--engine", "torch").code == 0
    with Image.open("out.png") as image:
        assert (image.mode, image.size) == ("L", (160, 160))
