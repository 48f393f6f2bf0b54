"""Switches at inference, against NumPy, PyTorch, Pillow and ImageMagick, with tiles, alpha, gray and 16 bits."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import pdd_cli
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.upscaling.colour import correct
from pdd_cli.upscaling.processing import Processing
from pdd_cli.upscaling.resizing import SizeRequest
from pdd_cli.upscaling.upscaler import Upscaler
from tests.helpers.images import photo, psnr, resized
from tests.helpers.networks import compact, repeating, upscaler

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model() -> SRModel:
    """A tiny network that sees 5 pixels around each."""
    return model_from_state(compact(2), origin="test")


def made(model: SRModel, processing: Processing, *, tile: int = 0, **more) -> Upscaler:
    worker = upscaler(model, tile=tile)
    worker.processing = processing
    for name, value in more.items():
        setattr(worker, name, value)
    return worker


def picture(height: int = 24, width: int = 20, samples: int = 3, bits: int = 16) -> DecodedImage:
    values = RNG.integers(0, 1 << bits, (height, width, samples), np.uint16 if bits == 16 else np.uint8)
    has_alpha = samples in (2, 4)
    return DecodedImage(values[..., : samples - has_alpha], values[..., -1] if has_alpha else None)


def rolled(image: DecodedImage, down: int, across: int) -> DecodedImage:
    alpha = None if image.alpha is None else np.roll(image.alpha, (down, across), (0, 1))
    return DecodedImage(np.roll(image.pixels, (down, across), (0, 1)), alpha)


@pytest.mark.parametrize(
    ("seamless", "down", "across", "samples", "tile", "size"),
    [
        ("both", 7, 11, 3, 0, None),
        ("both", 7, 11, 3, 16, None),
        ("x", 0, 11, 1, 0, None),
        ("y", 7, 0, 4, 16, None),
        ("both", 10, 8, 3, 0, SizeRequest(scale=1.5)),
        ("both", 10, 8, 2, 0, SizeRequest(scale=3.5)),  # two passes of the model
    ],
)
def test_a_seamless_image_has_no_seam(model, seamless, down, across, samples, tile, size) -> None:
    """Moved around, it gives the same image moved around: nothing tells where its edges are."""
    lr = picture(samples=samples)
    worker = made(model, Processing(seamless=seamless), tile=tile, **({"size": size} if size else {}))
    straight, moved = worker.upscale(lr).picture, worker.upscale(rolled(lr, down, across)).picture
    factor = straight.width / lr.width
    wanted = rolled(straight, round(down * factor), round(across * factor))
    assert psnr(moved.interleaved, wanted.interleaved, 65535) > 60
    plain = made(model, Processing(), tile=tile, **({"size": size} if size else {}))
    assert psnr(plain.upscale(rolled(lr, down, across)).picture.interleaved, wanted.interleaved, 65535) < 60


@pytest.mark.parametrize("correction", ["low-frequency", "wavelet"])
def test_colour_correction_keeps_a_seamless_image_seamless(model, correction) -> None:
    lr = DecodedImage(photo(48, 40))
    worker = made(model, Processing(seamless="both"), correction=correction)
    straight, moved = worker.upscale(lr).picture, worker.upscale(rolled(lr, 20, 20)).picture
    assert psnr(moved.pixels, np.roll(straight.pixels, (40, 40), (0, 1))) > 45


@pytest.mark.parametrize(("samples", "size"), [(1, (24, 20)), (3, (24, 20)), (4, (24, 20)), (3, (1, 9)), (3, (9, 1))])
def test_tta_is_the_mean_over_flips_and_transposes(model, samples, size) -> None:
    lr = picture(*size, samples=samples)
    result = made(model, Processing(tta=True)).upscale(lr).picture
    pixels = torch.from_numpy(lr.to_float()).permute(2, 0, 1)[None].expand(1, 3, -1, -1)
    outputs = []
    with torch.no_grad():
        for turns in range(4):
            for mirrored in (False, True):
                turned = torch.rot90(pixels.flip(-1) if mirrored else pixels, turns, (-2, -1))
                back = torch.rot90(model.module(turned), -turns, (-2, -1))
                outputs.append(back.flip(-1) if mirrored else back)
    mean = torch.stack(outputs).mean(0)[0].permute(1, 2, 0).numpy()
    wanted = mean.mean(axis=2, keepdims=True) if samples == 1 else mean
    assert psnr(result.to_float(), wanted.clip(0, 1), 1) > 80
    assert psnr(result.to_float(), made(model, Processing()).upscale(lr).picture.to_float(), 1) < 80


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_mix_blends_with_a_plain_resize(model, samples) -> None:
    lr = picture(samples=samples)
    sr = made(model, Processing()).upscale(lr).picture.interleaved / 65535
    plain = np.dstack(
        [
            np.asarray(Image.fromarray(band.astype(np.float32) / 65535).resize((40, 48), Image.Resampling.LANCZOS))
            for band in lr.interleaved.transpose(2, 0, 1)
        ]
    ).clip(0, 1)
    for mix in (0.25, 1.0):
        result = made(model, Processing(mix=mix), tile=16).upscale(lr).picture.interleaved / 65535
        assert psnr(result, (1 - mix) * sr + mix * plain, 1) > 70


def test_normal_maps_stay_unit_vectors() -> None:
    vectors = RNG.normal((0, 0, 2), size=(16, 20, 3))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    for bits in (8, 16):
        top = (1 << bits) - 1
        lr = DecodedImage(np.rint((vectors + 1) / 2 * top).astype(np.uint16 if bits == 16 else np.uint8))
        for size in (SizeRequest(), SizeRequest(scale=1.5), SizeRequest(scale=0.5)):
            result = made(repeating(2), Processing(normal_map=True), size=size).upscale(lr).picture
            lengths = np.linalg.norm(result.to_float() * 2 - 1, axis=2)
            assert np.abs(lengths - 1).max() < 2.5 / top
    # Where nothing is resampled, they are the same vectors; a map of x and y only gets its z.
    straight = made(repeating(2), Processing(normal_map=True))
    assert np.abs(straight.upscale(lr).picture.pixels[::2, ::2].astype(int) - lr.pixels).max() <= 2
    flat = DecodedImage(np.dstack([lr.pixels[..., :2], np.zeros((16, 20), np.uint16)]))
    up = np.abs(vectors[..., 2]) > 0.2  # z of the others is too uncertain
    blue = straight.upscale(flat).picture.pixels[::2, ::2, 2].astype(int)
    assert np.abs(blue - (np.abs(lr.pixels[..., 2] / 32767.5 - 1) + 1) * 32767.5)[up].max() < 30


def test_the_height_in_a_normal_map_hides_nothing(pdd, tmp_path: Path) -> None:
    pixels = np.full((12, 10, 4), 255, np.uint8)
    pixels[..., :2] = 128
    pixels[:, :5, 0], pixels[:, :5, 2] = 218, 218  # another direction where the height is 0
    pixels[:, :5, 3] = 0
    Image.fromarray(pixels).save("n.png", icc_profile=b"")
    network = {key: value for key, value in compact().items()}
    save_file(network, "model.safetensors")
    done = pdd("upscale", "n.png", "out.png", "--weights", "model.safetensors", "--normal-map", "--mix", 1, "--json")
    assert done.code == 0, done.err
    out = np.asarray(Image.open("out.png"))
    assert np.abs(out[8:40, :8, :3].astype(int) - pixels[0, 0, :3]).max() <= 2
    assert (out[8:40, :8, 3] == 0).all()
    failed = pdd("upscale", "n.png", "out.jpg", "--weights", "model.safetensors", "--normal-map")
    assert failed.code == 3
    assert "can't hold the alpha of a normal map" in failed.err
    Image.new("L", (8, 8)).save("gray.png")
    failed = pdd("upscale", "gray.png", "g.png", "--weights", "model.safetensors", "--normal-map")
    assert failed.code == 3
    assert "a gray image is not a normal map" in failed.err


def test_flats_of_scanned_text_are_snapped_and_nothing_else() -> None:
    page = Image.new("L", (120, 90), 250)
    ImageDraw.Draw(page).text((10, 10), "Text", fill=4, font_size=40)
    page.paste(6, (70, 60, 110, 85))
    lr = DecodedImage(
        np.clip(np.asarray(page).astype(int) + RNG.integers(-3, 4, (90, 120)), 0, 255).astype(np.uint8)[..., None]
    )
    plain = made(repeating(2), Processing()).upscale(lr).picture.pixels[..., 0].astype(int)
    snapped = made(repeating(2), Processing(snap_flats=True)).upscale(lr).picture.pixels[..., 0].astype(int)
    changed = snapped != plain
    assert set(np.unique(snapped[changed])) <= {0, 255}
    assert np.abs(snapped - plain).max() <= 10
    # By ImageMagick's morphology: exactly those around which all pixels are near white, or near black.
    near_white, near_black = ((plain >= 246), (plain <= 9))
    for near, value in ((near_white, 255), (near_black, 0)):
        eroded = eroded_by_imagemagick(near, 3)
        assert (snapped[eroded] == value).all()
    inside = eroded_by_imagemagick(near_white, 3) | eroded_by_imagemagick(near_black, 3)
    assert (snapped[~inside] == plain[~inside]).mean() > 0.999
    assert (snapped == 255).mean() > 0.5


def eroded_by_imagemagick(mask: np.ndarray, radius: int) -> np.ndarray:
    if shutil.which("convert") is None:
        pytest.skip("ImageMagick isn't installed")
    height, width = mask.shape
    command = ["convert", "-size", f"{width}x{height}", "-depth", "8", "gray:-", "-morphology", "Erode",
               f"Square:{radius}", "gray:-"]  # fmt: skip
    found = subprocess.run(command, input=(mask * 255).astype(np.uint8).tobytes(), capture_output=True, check=True)
    return np.frombuffer(found.stdout, np.uint8).reshape(height, width) > 127


def test_wavelet_correction_takes_the_coarse_colours_of_the_input() -> None:
    lr = photo(40, 48).astype(np.float32) / 255
    sr = np.asarray(Image.fromarray(photo(160, 192)), np.float32) / 255
    tinted = sr * [0.8, 1, 1.1] + [0.1, 0, -0.1]
    result = correct(tinted.astype(np.float32), lr, "wavelet")
    # By its definition: details of the SR, and the five times smoothed LR.
    enlarged = np.dstack(
        [np.asarray(Image.fromarray(lr[..., c]).resize((192, 160), Image.Resampling.BILINEAR)) for c in range(3)]
    )
    assert np.allclose(result, tinted - smoothed(tinted) + smoothed(enlarged), atol=1e-5)


def smoothed(image: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(image)).float().permute(2, 0, 1)[:, None]
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    for level in range(5):
        padded = torch.nn.functional.pad(tensor, (2**level,) * 4, mode="replicate")
        tensor = torch.nn.functional.conv2d(padded, kernel, dilation=2**level)
    return tensor[:, 0].permute(1, 2, 0).numpy()


def test_a_changed_switch_makes_the_output_again(pdd) -> None:
    Path("in").mkdir()
    Image.fromarray(photo(12, 16)).save("in/a.png")
    save_file(compact(), "model.safetensors")
    seen = set()
    for more in ((), ("--tta",), ("--mix", 0.5), ("--seamless", "x"), ("--snap-flats",)):
        command = ("upscale", "in", "out", "--weights", "model.safetensors", *more, "--json")
        assert json.loads(pdd(*command).out)["done"] == 1
        assert json.loads(pdd(*command).out)["skipped"] == 1
        seen.add(read_image(Path("out/a.png")).pixels.tobytes())
        record = json.loads(Path("out/.pdd-manifest.jsonl").read_text().splitlines()[-1])
        if more:
            assert more[0][2:].split("-")[0] in record["how"] or "flats snapped" in record["how"]
    assert len(seen) >= 4
    array = pdd_cli.upscale(photo(12, 16), weights="model.safetensors", settings={"mix": 1.0, "device": "cpu"})
    assert np.abs(array - resized(photo(12, 16), (64, 48))).max() <= 1
    failed = pdd("upscale", "in", "out", "--normal-map", "--color-correction", "wavelet")
    assert failed.code == 2
    assert "can't be combined" in failed.err
