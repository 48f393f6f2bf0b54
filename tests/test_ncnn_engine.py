"""The ncnn engine, on the CPU and on the Vulkan device that is there, against PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pdd_cli import gpus
from pdd_cli.engines import devices, ncnn_engine, select
from pdd_cli.engines.base import Usable
from pdd_cli.engines.ncnn_engine import NcnnEngine
from pdd_cli.engines.select import choose_engine, open_engine, try_engines
from pdd_cli.engines.torch_engine import TorchEngine, agrees_with_torch
from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import read_image
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.runtime import Runtime
from pdd_cli.upscaling.upscaler import Upscaler
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo
from tests.helpers.networks import compact, rrdbnet, swinir

Pdd = Callable[..., Outcome]
CPU = Runtime("cpu", "fp32")
LR = np.random.default_rng(0).random((2, 3, 17, 27), np.float32)  # neither rows nor planes of a multiple of 4
vulkan = pytest.mark.skipif(not gpus.vulkan_devices(), reason="there is no Vulkan device")


def model_of(state: Mapping[str, Tensor]) -> SRModel:
    """The network with a last layer that gives values around 0.5, as a trained one does."""
    last = [key for key in state if key.endswith("bias")][-1]
    return model_from_state({**state, last: state[last] + 0.3}, origin="")


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.mark.parametrize(
    "state",
    [rrdbnet(features=16), rrdbnet(unshuffle=2), rrdbnet(in_channels=1, out_channels=1), compact(), compact(scale=2)],
)
def test_ncnn_computes_what_pytorch_does(state: Mapping[str, Tensor]) -> None:
    model = model_of(state)
    lr = LR[:, : model.in_channels]
    engine, plain = NcnnEngine(model, CPU), TorchEngine(model, CPU)
    expected = plain.run(lr)
    assert psnr(engine.run(lr), expected) > 100
    np.testing.assert_array_equal(engine.run(lr, exact=True), engine.run(lr))
    assert agrees_with_torch(engine, model)
    rounded = np.ascontiguousarray((lr * 65535).astype(np.uint16).transpose(0, 2, 3, 1))
    assert abs(engine.run_rounded(rounded).astype(int) - plain.run_rounded(rounded)).max() <= 1
    assert engine.weights_sha256 == plain.weights_sha256
    again = NcnnEngine(engine.export(), CPU)
    np.testing.assert_array_equal(again.run(lr), engine.run(lr))
    assert again.bytes_per_pixel == plain.bytes_per_pixel
    engine.close()


def test_values_that_are_not_finite_are_not_rounded() -> None:
    state = compact()
    model = model_from_state({**state, "body.0.weight": state["body.0.weight"] * 1e38}, origin="")
    assert NcnnEngine(model, CPU).run_rounded(np.full((1, 9, 9, 3), 200, np.uint8)) is None


def test_the_converted_model_is_cached(home: Path) -> None:
    model = model_of(compact())
    first = open_engine(lambda: model, "weights", CPU, "ncnn")

    def never() -> SRModel:
        raise AssertionError("loaded, though the cache has it")

    second = open_engine(never, "weights", CPU, "ncnn")
    assert (first.name, second.name) == ("ncnn", "ncnn")
    np.testing.assert_array_equal(second.run(LR), first.run(LR))
    broken = Usable(model, "", 1, b"7767517\n")
    with pytest.raises(RuntimeError, match="not an ncnn model"):
        NcnnEngine(broken, CPU)


def test_images_are_upscaled_and_evaluated_with_ncnn(pdd: Pdd, ground: Path) -> None:
    save_file(dict(model_of(rrdbnet(features=16)).module.state_dict()), "model.safetensors")
    Image.fromarray(photo(27, 35)).save("lr.png")
    for engine in ("ncnn", "torch"):
        options = ("--weights", "model.safetensors", "--engine", engine, "--device", "cpu", "--precision", "fp32")
        done = pdd("upscale", "lr.png", f"{engine}.png", *options, "--tile", 16, "--overlap", 8, "--json")
        assert done.code == 0, done.err
        document = json.loads(done.out)
        assert (document["engine"], document["device"], document["precision"]) == (engine, "cpu", "fp32")
    found, expected = (read_image(Path(f"{name}.png")).pixels.astype(int) for name in ("ncnn", "torch"))
    assert abs(found - expected).max() <= 1
    arguments = ("--lr-dir", ground / "realLR", "--weights", "model.safetensors", "--metrics", "entropy")
    done = pdd("evaluate", *arguments, "--engine", "ncnn")
    assert done.code == 0, done.err
    assert "cpu, fp32, ncnn" in done.err


def test_what_ncnn_cannot_do_is_named(pdd: Pdd, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({key: value.contiguous() for key, value in swinir().items()}, "swinir.safetensors")
    save_file(dict(compact()), "model.safetensors")
    Image.fromarray(photo(27, 35)).save("lr.png")
    for weights, words, *options in (
        ("swinir", "can't compute this SwinIR model: only RRDBNet", "--engine", "ncnn", "--device", "cpu"),
        ("model", "Devices for --engine ncnn here: cpu", "--device", "vulkan:7"),
        ("model", "Devices for --engine ncnn here: cpu", "--engine", "ncnn", "--device", "cuda"),
        ("model", "Devices for --engine ncnn here: cpu", "--device", "vulkan:x"),
        ("model", "--engine ncnn can", "--engine", "torch", "--device", "vulkan"),
        ("model", "computes in fp32 on --device cpu", "--engine", "ncnn", "--device", "cpu", "--precision", "bf16"),
    ):
        done = pdd("upscale", "lr.png", "sr.png", "--weights", f"{weights}.safetensors", *options)
        assert done.code == 2, done.err
        assert words in done.err, done.err
    done = pdd(*command(ground)[3:], "--device", "vulkan:0")
    assert (done.code, "PyTorch can't use it" in done.err) == (2, True), done.err
    done = pdd("evaluate", ground / "hr", "--metrics", "entropy", "--engine", "ncnn")
    assert (done.code, "add --weights" in done.err) == (2, True), done.err
    monkeypatch.setattr(ncnn_engine, "find_spec", lambda name: None)
    done = pdd("upscale", "lr.png", "sr.png", "--weights", "model.safetensors", "--engine", "ncnn")
    assert (done.code, "pip install 'pdd-cli[vulkan]'" in done.err) == (2, True), done.err
    assert not Path("sr.png").exists()


def test_a_device_that_pytorch_lacks_is_answered_with_those_that_are_there(pdd: Pdd) -> None:
    with pytest.raises(InputError) as caught:
        devices.choose_inference("auto", "cuda:99", "auto")
    assert "Devices here: cpu" in caught.value.hint
    for device in gpus.vulkan_devices():
        assert f"vulkan:{device.index} ({device.name}" in caught.value.hint


# --- Vulkan -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@vulkan
def test_vulkan_computes_what_pytorch_does_in_tiles_and_in_fp16() -> None:
    model = model_of(compact())
    picture = read_image_like(photo(45, 39))
    expected = TorchEngine(model, CPU)
    for precision, least in (("fp32", 60), ("fp16", 45)):
        engine = NcnnEngine(model, Runtime("vulkan:0", precision))
        assert engine.bytes_per_pixel > 0
        assert psnr(engine.run(LR), expected.run(LR)) > least
        assert agrees_with_torch(engine, model)
        results = [Upscaler(one, tile=24, overlap=8, notify=print).upscale(picture) for one in (engine, expected)]
        assert results[0].tiles > 1
        found, wanted = (result.picture.pixels / 255 for result in results)
        assert psnr(found, wanted) > least
        engine.close()


@pytest.mark.slow
@vulkan
def test_values_beyond_fp16_are_computed_in_fp32() -> None:
    state = dict(compact())
    state["body.0.weight"], state["body.0.bias"] = state["body.0.weight"] * 3e5, state["body.0.bias"] * 3e5
    state["body.2.weight"] = state["body.2.weight"] / 3e5
    model = model_of(state)
    engine = NcnnEngine(model, Runtime("vulkan:0", "fp16"))
    assert not np.isfinite(engine.run(LR)).all()
    picture = read_image_like(photo(17, 19))
    results = [
        Upscaler(one, tile=0, overlap=8, notify=print).upscale(picture).picture.pixels.astype(int)
        for one in (engine, TorchEngine(model, CPU))
    ]
    assert abs(results[0] - results[1]).max() <= 1


@pytest.mark.slow
@vulkan
def test_auto_takes_a_gpu_that_is_faster_than_the_cpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(compact())
    if all(not device.is_gpu for device in gpus.vulkan_devices()):  # a software device is never taken
        assert "vulkan" not in str(choose_engine(model, CPU, "auto", free=True, anywhere=True).runtime)
    monkeypatch.setattr(select, "_gpus", lambda engine: ["vulkan:0"] if engine == "ncnn" else [])
    assert choose_engine(model, CPU, "auto", free=True).name != "ncnn"  # the device was named
    for seconds in (1, 9):
        times = {"ncnn": seconds, "torch": 5, "openvino": 5, "winograd": 5}
        monkeypatch.setattr(select, "_seconds", lambda engine, times=times: times[engine.name])
        engine = choose_engine(model, CPU, "auto", free=True, anywhere=True)
        assert (engine.name == "ncnn") == (seconds == 1)
    assert engine.runtime.device_type == "cpu"
    tried = try_engines(model, CPU)
    assert [str(one.runtime) for one in tried[:2]] == ["vulkan:0, fp16", "vulkan:0, fp32"]
    assert "slower on vulkan:0, fp16 than" in tried[0].problem


def read_image_like(pixels: np.ndarray):
    from pdd_cli.imaging.image import DecodedImage

    return DecodedImage(pixels)
