"""Upscaling against spandrel's own forward pass of the same weights, and whole batches of files."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file
from spandrel import ModelLoader
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet as SpandrelRRDBNet
from torch import Tensor, nn

from pdd_cli.batch.plan import plan_jobs
from pdd_cli.engines.openvino_engine import OpenVINOEngine
from pdd_cli.engines.select import choose_engine
from pdd_cli.engines.torch_engine import TorchEngine, bytes_per_pixel
from pdd_cli.engines.winograd import kernel as winograd_kernel
from pdd_cli.engines.winograd.engine import WinogradEngine
from pdd_cli.errors import InputError, OutOfMemory, PartialFailure, PddError, ResourceError
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.encode import Encoding, write_image
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.last_run import read_last_run
from pdd_cli.models.loading import SRModel, load_sr_model
from pdd_cli.runtime import Runtime
from pdd_cli.upscaling.jobs import Job, Output
from pdd_cli.upscaling.manifest import NAME as MANIFEST
from pdd_cli.upscaling.pipeline import run_jobs
from pdd_cli.upscaling.resizing import SizeRequest
from pdd_cli.upscaling.upscaler import Upscaler
from tests.helpers.commands import Hold, run_upscale
from tests.helpers.images import picture, psnr
from tests.helpers.networks import compact, repeating, saved, upscaler

CPU = Runtime(torch.device("cpu"), "fp32")
RNG = np.random.default_rng(0)


def old_esrgan(scale: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(SpandrelRRDBNet(scale=scale, num_filters=8, num_blocks=1).state_dict())


def new_esrgan(blocks: int = 1, unshuffle: int = 1, features: int = 8) -> dict[str, Tensor]:
    from pdd_cli.models.rrdbnet import RRDBNet

    torch.manual_seed(0)
    state = RRDBNet(features=features, blocks=blocks, unshuffle=unshuffle).state_dict()
    return dict(state)


STATES = {
    "old-esrgan": old_esrgan(),
    "old-esrgan-x2": old_esrgan(2),
    "new-esrgan": new_esrgan(),
    "unshuffle-x2": new_esrgan(unshuffle=2),
    "unshuffle-x1": new_esrgan(unshuffle=4),
    "compact-x4": compact(),
    "compact-x2": compact(2),
    "compact-x3": compact(3),
    "compact-x1": compact(1),
}


def spandrel_forward(state: dict[str, Tensor], pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) in 0..255 to float, by spandrel's network alone; not clamped."""
    model = ModelLoader().load_from_state_dict(dict(state)).eval()
    with torch.inference_mode():
        sr = model.model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    return sr[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("size", [(24, 32), (4, 8)])
def test_whole_image_equals_spandrel(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    model = load_sr_model(saved(tmp_path, STATES[name]))
    lr = DecodedImage(RNG.integers(0, 65536, (*size, 3), np.uint16))  # 16 bits: nothing is hidden by rounding
    result = upscaler(model).upscale(lr).picture
    expected = spandrel_forward(STATES[name], lr.pixels.astype(np.float32) / 257)
    assert result.pixels.shape == (size[0] * model.scale, size[1] * model.scale, 3)
    assert result.bits == 16
    assert np.std(expected.clip(0, 1)) > 0.001
    assert psnr(result.to_float(), expected.clip(0, 1), 1) >= 80


@pytest.mark.parametrize("name", STATES)
def test_any_size_gives_scale_times_as_much(tmp_path: Path, name: str) -> None:
    worker = upscaler(load_sr_model(saved(tmp_path, STATES[name])), tile=8, overlap=4)
    for height, width in ((1, 1), (1, 23), (13, 2)):
        pixels = worker.upscale(picture(height, width)).picture.pixels
        assert pixels.shape == (height * worker.scale, width * worker.scale, 3)


@pytest.mark.parametrize("name", ["old-esrgan", "unshuffle-x2", "compact-x3"])
def test_tiles_with_context_equal_the_whole(tmp_path: Path, name: str) -> None:
    # These networks see 16 LR pixels far at most, and a tile counts only where it has as much around it.
    model = load_sr_model(saved(tmp_path, STATES[name]))
    lr = picture(100, 110)
    whole = upscaler(model).upscale(lr)
    seen: list[tuple[int, int]] = []
    tiled = upscaler(model, tile=48, overlap=24).upscale(lr, on_tile=lambda done, total: seen.append((done, total)))
    assert tiled.tiles == 4
    assert seen == [(done, tiled.tiles) for done in range(1, tiled.tiles + 1)]
    assert psnr(tiled.picture.pixels, whole.picture.pixels) >= 75


def test_one_channel_model_upscales_gray_and_colour(tmp_path: Path) -> None:
    # spandrel's Compact is for 3 channels; a network of one channel stands for those of other architectures.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2))
    model = SRModel(module=module.eval(), scale=2, in_channels=1, out_channels=1, architecture="test")
    lr = picture(9, 8)
    sr = upscaler(model).upscale(lr).picture
    for channel in range(3):
        alone = upscaler(model).upscale(DecodedImage(lr.pixels[:, :, channel : channel + 1])).picture
        assert alone.channels == 1
        np.testing.assert_array_equal(sr.pixels[:, :, channel], alone.pixels[:, :, 0])


def test_a_model_of_other_channels_is_refused() -> None:
    model = SRModel(module=nn.Conv2d(4, 3, 1), scale=1, in_channels=4, out_channels=3, architecture="test")
    with pytest.raises(InputError, match="4"):
        upscaler(model)


def test_gray_stays_gray_and_is_the_mean_of_channels(tmp_path: Path) -> None:
    model = load_sr_model(saved(tmp_path, compact()))
    gray = picture(12, 9, 1)
    sr = upscaler(model).upscale(gray).picture
    assert sr.channels == 1
    expected = spandrel_forward(compact(), gray.pixels.repeat(3, axis=2)).mean(axis=2).clip(0, 1) * 255
    assert psnr(sr.pixels[:, :, 0], expected) > 50
    colour = upscaler(model).upscale(DecodedImage(gray.pixels.repeat(3, axis=2))).picture
    np.testing.assert_array_equal(colour.pixels, sr.pixels.repeat(3, axis=2))


def test_alpha_opaque_stays_opaque_and_edges_are_upscaled(tmp_path: Path) -> None:
    model = load_sr_model(saved(tmp_path, compact()))
    lr = picture(12, 12)
    opaque = DecodedImage(lr.pixels, np.full((12, 12), 255, np.uint8))
    assert (upscaler(model).upscale(opaque).picture.alpha == 255).all()
    alpha = np.zeros((12, 12), np.uint8)
    alpha[:, 6:] = 255
    sr = upscaler(model).upscale(DecodedImage(lr.pixels, alpha)).picture
    assert sr.alpha is not None
    assert sr.alpha.shape == (48, 48)
    assert (sr.alpha[:, :20] == 0).all()
    assert (sr.alpha[:, 28:] == 255).all()
    # What lies below transparent pixels doesn't count: they get the colour of the nearest one that is seen.
    hidden = lr.pixels.copy()
    hidden[:, :6] = 0
    np.testing.assert_array_equal(upscaler(model).upscale(DecodedImage(hidden, alpha)).picture.pixels, sr.pixels)
    bled = lr.pixels.copy()
    bled[:, :6] = lr.pixels[:, 6:7]
    np.testing.assert_array_equal(sr.pixels, upscaler(model).upscale(DecodedImage(bled)).picture.pixels)


class Overflowing(nn.Module):
    """Gives infinity outside fp32, as fp16 does; with `always`, in fp32 too."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * float("inf") if self.always or y.dtype != torch.float32 else y


def test_values_that_are_not_finite_are_computed_again_or_fail() -> None:
    bf16 = Runtime(torch.device("cpu"), "bf16")
    good = SRModel(module=Overflowing(False), scale=1, in_channels=3, out_channels=3, architecture="test")
    sr = Upscaler(TorchEngine(good, bf16), tile=0, overlap=0, notify=print).upscale(picture(8, 8)).picture
    assert sr.pixels.std() > 0
    bad = SRModel(module=Overflowing(True), scale=1, in_channels=3, out_channels=3, architecture="test")
    with pytest.raises(PddError, match="not finite"):
        upscaler(bad).upscale(picture(8, 8))


class Hungry(nn.Module):
    """Fails as PyTorch's CPU allocator does on more than `most` pixels."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] * x.shape[-2] > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to")
        return self.conv(x)


def test_out_of_memory_makes_smaller_tiles_and_is_reported_once() -> None:
    model = SRModel(module=Hungry(40 * 40), scale=1, in_channels=3, out_channels=3, architecture="test")
    messages: list[str] = []
    worker = upscaler(model, notify=messages)
    lr = picture(150, 130)
    result = worker.upscale(lr)
    assert result.tiles > 4
    assert len(messages) == 1
    with torch.inference_mode():
        expected = model.module.conv(torch.from_numpy(lr.to_float()).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert psnr(result.picture.to_float(), expected.clamp(0, 1).numpy(), 1) > 50
    worker.upscale(lr)
    assert len(messages) == 1
    nothing = SRModel(module=Hungry(16 * 16), scale=1, in_channels=3, out_channels=3, architecture="test")
    with pytest.raises(ResourceError, match="out of memory"):
        upscaler(nothing).upscale(lr)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("state", [new_esrgan(unshuffle=2, features=16), compact()])
@pytest.mark.parametrize("kind", [TorchEngine, OpenVINOEngine, WinogradEngine])
def test_values_are_rounded_where_they_are_computed(
    tmp_path: Path,
    state: dict[str, Tensor],
    kind: type[TorchEngine] | type[OpenVINOEngine] | type[WinogradEngine],
    bits: int,
) -> None:
    if kind is OpenVINOEngine:
        pytest.importorskip("openvino")
    if kind is WinogradEngine and winograd_kernel.kernel() is None:
        pytest.skip("there is no kernel for this CPU")
    engine = kind(load_sr_model(saved(tmp_path, state)), CPU)
    top = 2**bits - 1
    lr = RNG.integers(0, top + 1, (2, 9, 140, 3), np.uint8 if bits == 8 else np.uint16)
    found = engine.run_rounded(lr)
    assert found is not None
    assert found.dtype == lr.dtype
    sr = engine.run(np.ascontiguousarray(lr.transpose(0, 3, 1, 2)).astype(np.float32) / top).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, np.rint(sr.astype(np.float64 if bits == 16 else np.float32).clip(0, 1) * top))


def test_pictures_of_one_size_together_are_as_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_sr_model(saved(tmp_path, new_esrgan()))
    engine = TorchEngine(model, CPU)
    assert upscaler(model).batch(20, 12) == 1  # a CPU has nothing of it
    engine.batch_pixels = 1000
    worker = Upscaler(engine, tile="auto", overlap=8, notify=print)
    assert worker.batch(20, 12) == 4
    assert worker.batch(200, 120) == 1
    calls: list[int] = []
    run_rounded = engine.run_rounded
    monkeypatch.setattr(engine, "run_rounded", lambda lr: calls.append(len(lr)) or run_rounded(lr))
    pictures = [picture(12, 20) for _ in range(3)]
    together = worker.upscale_all(pictures)
    assert calls == [3]
    alone = [upscaler(model).upscale(one) for one in pictures]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.picture.pixels.shape == (48, 80, 3)
        assert np.abs(ours.picture.pixels.astype(int) - theirs.picture.pixels).max() <= 1  # sums in another order
    # What isn't the network's alone is done one by one.
    gray = DecodedImage(RNG.integers(0, 256, (12, 20, 1), np.uint8).repeat(3, axis=2))
    mixed = worker.upscale_all([pictures[0], gray])
    assert (mixed[1].picture.pixels == mixed[1].picture.pixels[..., :1]).all()

    def hungry(lr: np.ndarray) -> np.ndarray | None:
        if len(lr) > 1:
            raise OutOfMemory("CUDA out of memory. Tried to allocate")
        return run_rounded(lr)

    monkeypatch.setattr(engine, "run_rounded", hungry)
    assert len(worker.upscale_all(pictures)) == 3
    assert worker.batch(20, 12) == 1


def test_automatic_tile_follows_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_sr_model(saved(tmp_path, new_esrgan()))
    # 8 features at 4x: 8 * 16 floats in and out of the last convolutions, twice.
    assert bytes_per_pixel(model) == 2 * 2 * 8 * 16 * 4
    monkeypatch.setattr("pdd_cli.upscaling.upscaler.available_memory", lambda device: 3 * 2048 * 100 * 100)
    worker = upscaler(model, tile="auto")
    assert len(worker.plan(100, 100)) == 1
    assert worker.plan(200, 200).tile_size[0] <= 100
    assert len(worker.plan(200, 200)) == 9
    assert len(worker.plan(20, 400)) == 1


# --- OpenVINO ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["old-esrgan", "compact-x2", "unshuffle-x2"])
def test_openvino_equals_torch(tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino")
    model = load_sr_model(saved(tmp_path, STATES[name]))
    engine = choose_engine(model, CPU, "openvino")
    for size in ((17, 23), (40, 8)):
        lr = RNG.random((1, 3, *size), np.float32)
        assert psnr(engine.run(lr), TorchEngine(model, CPU).run(lr), 1) >= 60
    worker = Upscaler(engine, tile=32, overlap=8, notify=print)
    lr_picture = picture(40, 50)
    assert psnr(worker.upscale(lr_picture).picture.pixels, upscaler(model).upscale(lr_picture).picture.pixels) > 30


def test_openvino_is_for_the_cpu() -> None:
    pytest.importorskip("openvino")
    model = SRModel(module=nn.Identity(), scale=1, in_channels=3, out_channels=3, architecture="test")
    with pytest.raises(InputError, match="cuda"):
        OpenVINOEngine(model, Runtime(torch.device("cuda"), "fp32"))


# --- which files ------------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def targets(source: Path, output: str, format: str = "keep", suffix: str = "", recursive: bool = True) -> list[str]:
    jobs = plan_jobs([source], output, format=format, suffix=suffix, recursive=recursive).jobs  # type: ignore[arg-type]
    return [job.target.as_posix() for job in jobs]


def test_outputs_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.jpg", "folder.d/x")
    source = Path("a.jpg")
    assert targets(source, "b.png") == ["b.png"]
    assert targets(source, "folder.d") == ["folder.d/a.jpg"]
    assert targets(source, "new.d/") == ["new.d/a.jpg"]
    assert targets(source, "new") == ["new/a.jpg"]
    assert targets(source, "new", format="png", suffix="_x4") == ["new/a_x4.png"]
    assert targets(source, "b.jpeg", format="jpg", suffix="_x4") == ["b_x4.jpeg"]
    for output, format, message in (
        ("a.jpg", "keep", "replace an input"),
        ("./", "keep", "replace an input"),
        ("b.png", "jpg", "contradicts"),
        ("b.ico", "keep", r"\.ico"),
    ):
        with pytest.raises(InputError, match=message):
            targets(source, output, format)
    with pytest.raises(InputError, match="no such file"):
        targets(Path("none"), "out")


def test_outputs_of_a_folder_mirror_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "in/a.png", "in/sub/b c.JPG", "in/.hidden/x.png", "in/note.txt", "file")
    assert targets(Path("in"), "out") == ["out/a.png", "out/sub/b c.JPG"]
    assert targets(Path("in"), "out", recursive=False) == ["out/a.png"]
    assert targets(Path("in"), "out", format="webp", suffix="_x4") == ["out/a_x4.webp", "out/sub/b c_x4.webp"]
    with pytest.raises(InputError, match="is a file"):
        targets(Path("in"), "file")
    touch(tmp_path, "empty/x.txt")
    with pytest.raises(InputError, match="no images"):
        targets(Path("empty"), "out")


def test_two_inputs_of_one_output_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg")
    assert len(targets(tmp_path, str(tmp_path / "out"))) == 2
    with pytest.raises(InputError, match=r"a\.jpg and .*a\.png would have the same output .*a\.png"):
        targets(tmp_path, str(tmp_path / "out"), format="png")


def test_inputs_whose_names_differ_by_case(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/A.png", "in/Sub/b.png", "in/sub/B.png")
    if len(list((tmp_path / "in").iterdir())) < 4:
        pytest.skip("this folder is case-insensitive")
    assert len(targets(tmp_path / "in", str(tmp_path / "out"))) == 4
    if not (mount := shutil.which("lowntfs-3g")) or os.geteuid():
        pytest.skip("no lowntfs-3g, or not root")
    image, out = tmp_path / "ntfs.img", tmp_path / "out"
    with image.open("wb") as opened:
        opened.truncate(20 << 20)
    out.mkdir()
    subprocess.run(["mkfs.ntfs", "-q", "-F", "-Q", image], check=True, capture_output=True)
    if subprocess.run([mount, "-o", "ignore_case", image, out], capture_output=True).returncode:
        pytest.skip("this machine can't mount it")
    try:
        with pytest.raises(InputError, match=r"A\.png and .*a\.png would have the same output"):
            targets(tmp_path / "in", str(out / "new"))
        assert not list(out.iterdir())
    finally:
        subprocess.run(["umount", out], check=True)


def test_output_beside_or_below_the_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/a.png")
    assert targets(tmp_path, str(tmp_path / "out")) == [(tmp_path / "out/a.png").as_posix()]
    with pytest.raises(InputError, match="mixed with the inputs"):
        targets(tmp_path / "out", str(tmp_path / "out"))
    touch(tmp_path, "out/a_x4.png")  # what an earlier run left is no input
    assert targets(tmp_path / "out", str(tmp_path / "out"), suffix="_x4") == [(tmp_path / "out/a_x4.png").as_posix()]


def test_a_full_disk_stops_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_sr_model(saved(tmp_path, compact()))
    write_image(tmp_path / "a.png", picture(8, 8))

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    jobs = [Job(tmp_path / "a.png", tmp_path / f"out/{n}.png") for n in range(2)]
    with pytest.raises(ResourceError, match="no space left"):
        list(run_jobs(jobs, upscaler(model)))
    assert list((tmp_path / "out").iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """A folder of six images of different kinds, one of them broken, and the weights beside it."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(picture(20, 16).pixels).save(folder / "a.png")
    Image.fromarray(picture(16, 20).pixels).save(folder / "sub/b.jpg")
    Image.fromarray(picture(9, 9, 1).pixels[:, :, 0]).save(folder / "sub/gray.bmp")
    Image.fromarray(RNG.integers(0, 256, (8, 8, 4), np.uint8)).save(folder / "ä alpha.webp", lossless=True)
    write_image(folder / "deep.tif", DecodedImage(RNG.integers(0, 65536, (7, 9, 3), np.uint16)))
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    saved(tmp_path, compact())
    return folder


def test_a_folder_with_a_broken_file(batch: Path, home: Path) -> None:
    out = batch.parent / "out"
    weights = batch.parent / "model.safetensors"
    document, error = run_upscale(batch, out, "--weights", weights)
    assert isinstance(error, PartialFailure)
    assert (document["done"], document["failed"], document["skipped"]) == (5, 1, 0)
    failed = [file for file in document["files"] if file["status"] == "failed"]  # type: ignore[attr-defined]
    assert failed[0]["input"].endswith("broken.png")
    assert "damaged" in failed[0]["problem"]
    assert not (out / "broken.png").exists()
    for name in ("a.png", "sub/b.jpg", "sub/gray.bmp", "ä alpha.webp", "deep.tif"):
        lr, sr = read_image(batch / name), read_image(out / name)
        assert (sr.height, sr.width) == (4 * lr.height, 4 * lr.width)
        assert (sr.channels, sr.bits, sr.alpha is None) == (lr.channels, lr.bits, lr.alpha is None)
    expected = spandrel_forward(compact(), read_image(batch / "a.png").pixels).clip(0, 1) * 255
    assert psnr(read_image(out / "a.png").pixels, expected) > 55  # as far as rounding to 8 bits lets it

    last = read_last_run()
    assert last is not None
    assert (last.scale, len(last.pairs)) == (4, 5)
    assert all(pair.lr.is_file() and pair.sr.is_file() for pair in last.pairs)

    # Again: what exists is left alone, the rest is made.
    before = (out / "a.png").stat().st_mtime_ns
    (out / "deep.tif").unlink()
    (batch / "broken.png").unlink()
    document, error = run_upscale(batch, out, "--weights", weights)
    assert error is None
    assert (document["done"], document["skipped"]) == (1, 4)
    assert (out / "a.png").stat().st_mtime_ns == before
    document, error = run_upscale(batch, out, "--weights", weights, "--overwrite")
    assert (document["done"], document["skipped"]) == (5, 0)
    assert (out / "a.png").stat().st_mtime_ns > before


def test_dry_run_writes_nothing(batch: Path, home: Path) -> None:
    out = batch.parent / "out"
    document, error = run_upscale(
        batch, out, "--weights", batch.parent / "model.safetensors", "--dry-run", "--tile", 16, "--overlap", 0
    )
    assert error is None or isinstance(error, PartialFailure)
    assert not out.exists()
    assert read_last_run() is None
    files = {Path(file["input"]).name: file for file in document["files"]}  # type: ignore[attr-defined]
    assert files["a.png"]["size_out"] == [64, 80]
    assert files["a.png"]["tiles"] == 2


@pytest.mark.slow
def test_a_single_broken_file_fails_the_command(batch: Path, home: Path) -> None:
    weights = batch.parent / "model.safetensors"
    command = [sys.executable, "-m", "pdd_cli", "upscale", batch / "broken.png", batch.parent / "out"]
    result = subprocess.run([*command, "--weights", weights], capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert "broken.png: damaged" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_run_leaves_whole_files_and_continues(tmp_path: Path, home: Path) -> None:
    saved(tmp_path, compact())
    for number in range(20):
        write_image(tmp_path / f"in/{number:02}.png", picture(128, 128))
    out = tmp_path / "out"
    hold = Hold(tmp_path / "hold", "[0-9]*.png", 4)
    command = [sys.executable, *hold.command, "upscale", tmp_path / "in", out]
    command += ["--weights", tmp_path / "model.safetensors", "--engine", "torch", "--precision", "fp32"]
    variables = {**os.environ, "PYTHONPATH": hold.path}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    hold.wait(process)
    process.send_signal(signal.SIGINT)
    hold.let_go()
    _, messages = process.communicate(timeout=500)
    assert process.returncode == 130, messages
    assert "same command again" in messages
    made = [path for path in out.iterdir() if path.name != MANIFEST]
    assert 3 <= len(made) < 20
    for path in made:  # no temporary file, none cut short
        assert read_image(path).width == 512
    document, error = run_upscale(tmp_path / "in", out, "--weights", tmp_path / "model.safetensors")
    assert error is None
    assert document["skipped"] == len(made)
    assert document["done"] == 20 - len(made)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_large_output_is_never_held_whole(tmp_path: Path, suffix: str) -> None:
    worker = upscaler(repeating(4), tile=32, overlap=4)
    peaks = []
    for height in (1024, 3072):  # both long enough to fill the queue to the thread that writes
        lr = np.tile(RNG.integers(0, 256, (64, 128, 3), np.uint8), (height // 64, 1, 1))
        write_image(tmp_path / "a.png", DecodedImage(lr))
        job = Job(tmp_path / "a.png", tmp_path / f"{height}.{suffix}")
        tracemalloc.start()
        try:
            (result,) = run_jobs([job], worker)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert result.status == "done"
        np.testing.assert_array_equal(read_image(job.target).pixels, lr.repeat(4, axis=0).repeat(4, axis=1))
    # The output grew by 12 MiB, the input by 0.8: of this a few copies.
    assert peaks[1] - peaks[0] < 4 << 20, peaks


def test_inputs_beyond_the_limit_against_bombs_need_max_memory(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact(2))
    with (tmp_path / "a.png").open("wb") as file:  # 200 megapixels, whose data ends after the first rows
        rows = zlib.compress(bytes(20_001))
        for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)), (b"IDAT", rows)):
            file.write(b"\x89PNG\r\n\x1a\n" if kind == b"IHDR" else b"")
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    command = (tmp_path / "a.png", tmp_path / "b.png", "--weights", weights, "--dry-run")
    for options, status, words in (
        (
            (),
            "failed",
            "(20000x10000 pixels; at most 179 megapixels). Only `pdd upscale` with --max-memory reads larger images",
        ),
        (("--max-memory", "1G"), "failed", "too large (20000x10000 pixels; at most"),
        (("--max-memory", "16G"), "planned", ""),
    ):
        document, _ = run_upscale(*command, *options)
        (file,) = document["files"]  # type: ignore[misc]
        assert (file["status"], words in file["problem"]) == (status, True)
    assert file["size_out"] == [40_000, 20_000]
    assert file["memory"] < 16 << 30


# --- sizes, strength, colours -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [(24, 32), (1, 1), (3, 70), (31, 17)])
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0, 6.0])
def test_any_target_size(tmp_path: Path, size: tuple[int, int], scale: float) -> None:
    model = load_sr_model(saved(tmp_path, compact(2)))
    lr = DecodedImage(RNG.integers(0, 256, (*size, 3), np.uint8), RNG.integers(0, 256, size, np.uint8))
    worker = Upscaler(TorchEngine(model, CPU), tile=16, overlap=8, notify=print, size=SizeRequest(scale=scale))
    sr = worker.upscale(lr).picture
    assert (sr.height, sr.width) == tuple(max(1, round(side * scale)) for side in size)
    assert sr.alpha is not None
    gray = worker.upscale(DecodedImage(lr.pixels[..., :1].repeat(3, axis=2))).picture
    assert (gray.pixels == gray.pixels[..., :1]).all()


def test_a_flat_image_stays_flat_whatever_is_done_to_it(tmp_path: Path) -> None:
    # A network that repeats each pixel: what comes out is then known.
    model = repeating(4)
    lr = DecodedImage(np.full((20, 30, 3), (200, 100, 50), np.uint8))
    for correction in ("none", "mean-std", "low-frequency"):
        for scale in (0.7, 2.0, 4.0, 5.5):
            worker = Upscaler(
                TorchEngine(model, CPU),
                tile=16,
                overlap=4,
                notify=print,
                size=SizeRequest(scale=scale),
                correction=correction,  # type: ignore[arg-type]
            )
            assert (worker.upscale(lr).picture.pixels == (200, 100, 50)).all()


def adapted(folder: Path, base: dict[str, Tensor], base_sha256: str | None = None) -> dict[str, Tensor]:
    """Weights that say they were adapted from `base`, which is installed as `ground`; both in `folder`'s store."""
    from pdd_cli.models.loading import model_from_state, state_sha256
    from pdd_cli.weights.store import Card, Store

    store = Store(folder / "weights")
    known = state_sha256(model_from_state(base, origin="base").module.state_dict())
    store.add(Card(name="ground", architecture="Compact", source="test", created=""), base)
    state = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in base.items()}
    card = Card(
        name="mine", architecture="Compact", source="test", created="", base="ground", base_sha256=base_sha256 or known
    )
    store.add(card, state)
    return state


def test_strength_moves_from_the_base_to_the_adapted_model(tmp_path: Path, home: Path) -> None:
    base = compact()
    mine = adapted(home, base)
    lr = picture(16, 16)
    write_image(tmp_path / "a.png", lr)
    for strength in (0, 0.25, 1):
        _, error = run_upscale(
            tmp_path / "a.png", tmp_path / f"{strength}.png", "--weights", "mine", "--strength", strength
        )
        assert error is None
        mixed = {key: (1 - strength) * base[key] + strength * mine[key] for key in base}
        expected = spandrel_forward(mixed, lr.pixels.copy()).clip(0, 1) * 255
        assert psnr(read_image(tmp_path / f"{strength}.png").pixels, expected) > 55
    assert psnr(read_image(tmp_path / "0.png").pixels, read_image(tmp_path / "1.png").pixels) < 45


def test_strength_needs_the_very_base(tmp_path: Path, home: Path) -> None:
    write_image(tmp_path / "a.png", picture(4, 4))
    adapted(home, compact(), base_sha256="0" * 64)
    arguments = (tmp_path / "a.png", tmp_path / "b.png", "--offline", "--strength", 0.5, "--weights")
    _, error = run_upscale(*arguments, "mine")
    assert isinstance(error, InputError)
    assert "ground isn't the base" in str(error)
    _, error = run_upscale(*arguments, "ground")
    assert isinstance(error, InputError)
    assert "is unknown" in str(error)
    (home / "weights/ground.safetensors").unlink()
    _, error = run_upscale(*arguments, "mine")
    assert isinstance(error, InputError)
    assert "can't be loaded" in str(error)


# --- the manifest -----------------------------------------------------------------------------------------------


def statuses(document: dict[str, object]) -> dict[str, str]:
    return {Path(file["input"]).name: file["status"] for file in document["files"]}  # type: ignore[attr-defined]


def test_a_second_run_does_what_is_missing_or_changed(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact())
    for name in "abcd":
        write_image(tmp_path / f"in/{name}.png", picture(8, 8))
    write_image(tmp_path / "out/d.png", picture(2, 2))  # the user's own
    command = (tmp_path / "in", tmp_path / "out", "--weights", weights)
    document, _ = run_upscale(*command)
    assert statuses(document) == {"a.png": "done", "b.png": "done", "c.png": "done", "d.png": "failed"}
    assert "not made by pdd" in document["files"][3]["problem"]  # type: ignore[index]
    assert read_image(tmp_path / "out/d.png").width == 2
    document, _ = run_upscale(*command, "--overwrite")  # which replaces no file of the user's either
    assert statuses(document) == {"a.png": "done", "b.png": "done", "c.png": "done", "d.png": "failed"}
    assert read_image(tmp_path / "out/d.png").width == 2
    (tmp_path / "out/d.png").unlink()
    document, _ = run_upscale(*command)
    assert statuses(document) == {"a.png": "skipped", "b.png": "skipped", "c.png": "skipped", "d.png": "done"}
    write_image(tmp_path / "in/a.png", picture(8, 8))
    (tmp_path / "out/b.png").unlink()
    document, _ = run_upscale(*command)
    assert statuses(document) == {"a.png": "done", "b.png": "done", "c.png": "skipped", "d.png": "skipped"}
    # Power failed while c was written: begun, and the line cut short.
    with (tmp_path / "out" / MANIFEST).open("a") as file:
        file.write('{"output": "c.png", "key": "x", "done": false}\n{"output": "a.p')
    document, _ = run_upscale(*command)
    assert statuses(document) == {"a.png": "skipped", "b.png": "skipped", "c.png": "done", "d.png": "skipped"}
    document, _ = run_upscale(*command, "--scale", 2)
    assert set(statuses(document).values()) == {"done"}
    assert read_image(tmp_path / "out/a.png").width == 16
    save_file({key: tensor + 0.1 for key, tensor in compact().items()}, weights)
    document, _ = run_upscale(*command, "--scale", 2, "--overwrite")
    assert set(statuses(document).values()) == {"done"}


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_photograph_is_never_taken_for_an_output(tmp_path: Path, home: Path, more: tuple[str, ...]) -> None:
    """What a shell makes of *.png where there are two, and where there are three."""
    weights = saved(tmp_path, compact())
    photographs = [tmp_path / f"{name}.png" for name in "abc"]
    for path in photographs:
        write_image(path, picture(8, 8))
    before = [path.read_bytes() for path in photographs]

    _, error = run_upscale(*photographs[:2], "--weights", weights, *more)
    assert isinstance(error, InputError)
    assert "not made by pdd" in error.message
    assert "upscaled/" in error.hint
    _, error = run_upscale(*photographs, "--weights", weights, *more)
    assert isinstance(error, InputError)
    assert "is a file" in error.message
    assert [path.read_bytes() for path in photographs] == before


def test_several_inputs_go_to_one_folder(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact())
    for name in ("a.png", "b.jpg", "shots/a.png", "shots/sub/c.png", "more/d.png"):
        write_image(tmp_path / name, picture(4, 4))
    names = ("a.png", "b.jpg", "a.png", "shots", "more/*.png")
    document, error = run_upscale(*(tmp_path / name for name in names), tmp_path / "out", "--weights", weights)
    assert error is None
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*g"))
    assert made == ["a.png", "b.jpg", "d.png", "shots/a.png", "shots/sub/c.png"]
    document, _ = run_upscale(*(tmp_path / name for name in names), tmp_path / "out", "--weights", weights)
    assert set(statuses(document).values()) == {"skipped"}
    _, error = run_upscale(tmp_path / "a.png", tmp_path / "shots/a.png", tmp_path / "new/", "--weights", weights)
    assert isinstance(error, InputError)
    assert "would have the same output" in error.message


def test_links_are_seen_through_before_an_input_is_replaced(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact())
    write_image(tmp_path / "in/a.png", picture(4, 4))
    (tmp_path / "out").symlink_to(tmp_path / "in")
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard/a.png").hardlink_to(tmp_path / "in/a.png")
    before = (tmp_path / "in/a.png").read_bytes()
    for out in ("out", "hard"):
        _, error = run_upscale(tmp_path / "in/a.png", tmp_path / out, "--weights", weights, "--overwrite")
        assert isinstance(error, InputError)
        assert (tmp_path / "in/a.png").read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--strip-metadata",)])
@pytest.mark.parametrize("name", ["b.png", "b.jpg", "b.bmp", "b.tif", "b.webp"])
def test_a_single_output_is_recognised(tmp_path: Path, home: Path, name: str, more: tuple[str, ...]) -> None:
    weights = saved(tmp_path, compact())
    write_image(tmp_path / "a.png", picture(8, 8))
    command = (tmp_path / "a.png", tmp_path / name, "--weights", weights, *more)
    for again, status in (((), "done"), ((), "skipped"), (("--overwrite",), "done")):
        document, error = run_upscale(*command, *again)
        assert error is None
        assert statuses(document) == {"a.png": status}
    if more:
        return
    with Image.open(tmp_path / name) as image:  # as somebody who paints over it
        painted = image.convert("L")
    painted.save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    _, error = run_upscale(*command, "--overwrite")
    assert error is not None
    assert (tmp_path / name).read_bytes() == before


def test_stripped_outputs_keep_their_colours(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(picture(8, 8).pixels)
    image.save(tmp_path / "a.png", icc_profile=profile, dpi=(300, 300))
    run_upscale(tmp_path / "a.png", tmp_path / "b.png", "--weights", weights, "--strip-metadata")
    with Image.open(tmp_path / "b.png") as made:
        assert made.info["icc_profile"] == profile
        assert "dpi" not in made.info
        assert not made.getexif()


def test_a_pattern_takes_what_matches(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact())
    for name in ("in/a.png", "in/sub/b.png", "in/sub/c.jpg"):
        write_image(tmp_path / name, picture(4, 4))
    _, error = run_upscale(tmp_path / "in/**/*.png", tmp_path / "out", "--weights", weights)
    assert error is None
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")) == [
        "a.png",
        "sub/b.png",
    ]
    _, error = run_upscale(tmp_path / "in/*.webp", tmp_path / "out", "--weights", weights)
    assert isinstance(error, InputError)
    assert "no images or videos match" in str(error)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_leaves_whole_files_and_the_next_completes(tmp_path: Path, home: Path) -> None:
    weights = saved(tmp_path, compact())
    for number in range(20):
        write_image(tmp_path / f"in/{number:02}.png", picture(96, 96))
    out = tmp_path / "out"
    run_upscale(tmp_path / "in", tmp_path / "expected", "--weights", weights)
    hold = Hold(tmp_path / "hold", "[0-9]*.png", 4)
    command = [sys.executable, *hold.command, "upscale", tmp_path / "in", out, "--weights", weights]
    command += ["--engine", "torch", "--precision", "fp32"]
    variables = {**os.environ, "PYTHONPATH": hold.path}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, env=variables)
    hold.wait(process)
    process.kill()
    process.wait()
    made = list(out.glob("[0-9]*.png"))
    assert len(made) == 3
    for path in made:
        assert path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes()
    document, error = run_upscale(tmp_path / "in", out, "--weights", weights)
    assert error is None
    assert 20 - len(made) <= int(str(document["done"])) <= 21 - len(made)
    assert [path.name for path in out.glob(".*")] == [MANIFEST]
    for path in (tmp_path / "expected").glob("*.png"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("suffix", "height"), [("tif", 64), ("tif", 63), ("tif", 128), ("png", 64), ("webp", 64)])
def test_all_pages_are_written_whatever_their_height(tmp_path: Path, suffix: str, height: int) -> None:
    # 4 x 64 and 4 x 128 rows are whole tiles of a TIFF: tifffile doesn't ask for what comes behind the last of them.
    frames = [picture(height, 9).pixels for _ in range(4)]
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(source, save_all=True, append_images=images[1:], lossless=True)
    output = Output(Encoding(lossless=True))
    (result,) = run_jobs([Job(source, target)], upscaler(repeating(4)), output=output)
    assert (result.status, result.problem) == ("done", "")
    with Image.open(target) as image:
        assert image.n_frames == 4
        for index, frame in enumerate(frames):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), frame.repeat(4, 0).repeat(4, 1))
