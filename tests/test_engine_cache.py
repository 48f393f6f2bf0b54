"""What engines have converted is kept: equal results, no conversion and no PyTorch the second time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pdd_cli.engines import cache as engine_cache
from pdd_cli.engines.base import Unfit, Usable
from pdd_cli.engines.select import choose_engine, open_engine
from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.engines.winograd import kernel as winograd_kernel
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.encode import write_image
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.models.loading import SRModel, load_sr_model, state_sha256
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.models.traits import ModelSpec
from pdd_cli.runtime import Runtime

pytest.importorskip("openvino")

CPU = Runtime("cpu", "fp32")
no_kernel = pytest.mark.skipif(winograd_kernel.kernel() is None, reason="there is no kernel for this CPU")
both = pytest.mark.parametrize("engine", ["openvino", pytest.param("winograd", marks=no_kernel)])
LR = np.random.default_rng(0).random((1, 3, 9, 14), np.float32)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of a network that needs even sizes."""
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(RRDBNet(features=16, growth=16, blocks=1, unshuffle=2).state_dict(), path)
    return path


def entries(home: Path) -> list[Path]:
    return sorted((home / "cache").rglob("*.compiled"))


def never() -> SRModel:
    raise AssertionError("loaded, though the cache has it")


@both
def test_the_second_time_nothing_is_loaded_and_the_result_is_the_same(weights: Path, home: Path, engine: str) -> None:
    known = engine_cache.fingerprint([weights], 1.0)
    first = open_engine(lambda: load_sr_model(weights), known, CPU, engine)
    second = open_engine(never, known, CPU, engine)
    assert (first.name, second.name, len(entries(home))) == (engine, engine, 1)
    np.testing.assert_array_equal(second.run(LR), first.run(LR))
    model = load_sr_model(weights)
    plain = TorchEngine(model, CPU)
    assert np.abs(second.run(LR) - plain.run(LR)).max() < 1e-5
    assert second.model.scale == 2
    assert second.model.size_multiple == 2
    assert second.weights_sha256 == plain.weights_sha256 == state_sha256(model.module.state_dict())
    assert second.bytes_per_pixel == first.bytes_per_pixel
    if engine == "winograd":
        return
    assert second.bytes_per_pixel == plain.bytes_per_pixel
    # Each precision is checked for itself.
    bf16 = open_engine(lambda: model, known, Runtime("cpu", "bf16"), "openvino")
    np.testing.assert_array_equal(bf16.run(LR, exact=True), first.run(LR))
    assert len(entries(home)) == 2


def test_other_weights_or_strength_are_another_entry(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes()[:-1] + b"x")
    names = [([weights], 1.0), ([other], 1.0), ([weights], 0.5), ([weights, other], 0.5), ([other, weights], 0.5)]
    assert len({engine_cache.fingerprint(files, strength) for files, strength in names}) == len(names)


@both
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "not exported"])
def test_a_damaged_entry_is_made_again(weights: Path, home: Path, engine: str, damage: str) -> None:
    known = engine_cache.fingerprint([weights], 1.0)
    expected = open_engine(lambda: load_sr_model(weights), known, CPU, engine).run(LR)
    (path,) = entries(home)
    whole = path.read_bytes()
    if damage == "not exported":  # whole, but nothing that the engine knows
        found = engine_cache.find(engine, known, CPU)
        assert isinstance(found, Usable)
        engine_cache.keep(engine, known, CPU, replace(found, exported=b"something else"))
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-9], "flipped": whole[:-9] + b"x" + whole[-8:]}[damage])
    again = open_engine(lambda: load_sr_model(weights), known, CPU, engine)
    assert again.name == engine
    np.testing.assert_array_equal(again.run(LR), expected)
    open_engine(never, known, CPU, engine)


class Branching(nn.Module):
    """Computes something else for small images, which tracing freezes to what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[-1] < 36 else -self.conv(x)


class Unknown(nn.Module):
    """Does what OpenVINO has no operation for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.linalg.eigvalsh(x @ x.mT).sum()


def test_auto_takes_torch_where_openvino_disagrees() -> None:
    model = SRModel(module=Branching().eval(), scale=1, in_channels=3, out_channels=3, architecture="test")
    assert choose_engine(model, CPU, "auto").name == "torch"


@pytest.mark.parametrize("module", [Branching(), Unknown()])
def test_that_openvino_cannot_be_taken_is_kept_too(
    home: Path, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")  # where Winograd's algorithm is asked first
    model = SRModel(module=module.eval(), scale=1, in_channels=3, out_channels=3, architecture="test")
    for _ in range(2):
        assert open_engine(lambda: model, "weights", CPU, "auto").name == "torch"
    assert len(entries(home)) == 2  # nor can Winograd's algorithm
    for path in entries(home):
        os.utime(path, (0, 0))
    for engine in ("openvino", "winograd"):
        found = engine_cache.find(engine, "weights", CPU)
        assert isinstance(found, Unfit)
        assert found.reason
    assert all(path.stat().st_mtime > 0 for path in entries(home))  # used just now


def test_the_cache_is_bounded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Usable(ModelSpec(scale=1, in_channels=3, out_channels=3, architecture="test"), "", 1, bytes(2000))
    monkeypatch.setattr(engine_cache, "_MAX_BYTES", 5000)
    for number in range(6):
        engine_cache.keep("openvino", str(number), CPU, result)
        time.sleep(0.02)  # as fine as file systems tell times
        if number:  # the first is used again and again
            assert engine_cache.find("openvino", "0", CPU) is not None
        time.sleep(0.02)
    kept = [number for number in range(6) if engine_cache.find("openvino", str(number), CPU) is not None]
    assert kept == [0, 5]
    engine_cache.keep("openvino", "large", CPU, replace(result, exported=bytes(9000)))
    assert len(entries(home)) == 1


def test_a_cache_that_cannot_be_written_is_done_without(weights: Path, home: Path) -> None:
    home.write_text("not a folder")
    assert open_engine(lambda: load_sr_model(weights), "weights", CPU, "openvino").name == "openvino"


@pytest.mark.slow
@both
def test_the_command_does_not_need_pytorch_the_second_time(
    weights: Path, tmp_path: Path, home: Path, engine: str
) -> None:
    write_image(
        tmp_path / "in/a.png", DecodedImage(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3))
    )
    script = (
        "import sys; from pdd_cli.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'scipy', 'cv2', 'spandrel', 'torchvision'} & set(sys.modules)))"
    )

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, "upscale", tmp_path / "in", "--weights", weights, "--engine", engine]
        result = subprocess.run([*command, "--device", "cpu", *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result

    assert "torch" in run(tmp_path / "first").stdout
    assert run(tmp_path / "second").stdout.strip() == "[]"
    np.testing.assert_array_equal(
        read_image(tmp_path / "first/a.png").pixels, read_image(tmp_path / "second/a.png").pixels
    )
    # The folder's manifest knows the weights by one name in both engines: nothing is made again.
    assert "1 skipped" in run(tmp_path / "first", "--engine", "torch").stderr
