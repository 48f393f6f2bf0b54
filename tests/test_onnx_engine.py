"""The ONNX engine: ONNX Runtime's results against PyTorch's, its devices and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pdd_cli.engines import devices, onnx_engine, select
from pdd_cli.engines.onnx_engine import OnnxEngine
from pdd_cli.engines.select import choose_engine, open_engine
from pdd_cli.engines.torch_engine import TorchEngine, agrees_with_torch
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.runtime import Runtime
from tests.helpers.commands import Outcome
from tests.helpers.images import photo
from tests.helpers.networks import compact, rrdbnet, swinir
from tests.test_ncnn_engine import CPU, LR, model_of, psnr

Pdd = Callable[..., Outcome]


@pytest.mark.parametrize("state", [rrdbnet(unshuffle=2), compact(), swinir()])
def test_onnx_runtime_computes_what_pytorch_does(state: Mapping[str, Tensor]) -> None:
    model = model_of(state)
    engine, plain = OnnxEngine(model, CPU), TorchEngine(model, CPU)
    assert psnr(engine.run(LR), plain.run(LR)) > 100
    assert agrees_with_torch(engine, model)
    rounded = np.ascontiguousarray((LR * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    assert abs(engine.run_rounded(rounded).astype(int) - plain.run_rounded(rounded)).max() <= 1
    assert engine.weights_sha256 == plain.weights_sha256
    again = OnnxEngine(engine.export(), CPU)
    np.testing.assert_array_equal(again.run(LR), engine.run(LR))
    assert again.bytes_per_pixel == plain.bytes_per_pixel


def test_a_graph_in_fp16_is_near_and_has_an_exact_one_beside_it() -> None:
    # ONNX Runtime computes fp16 graphs on its CPU provider, too, which pdd doesn't offer.
    model = model_of(compact())
    engine, expected = OnnxEngine(model, Runtime("cpu", "fp16")), TorchEngine(model, CPU).run(LR)
    assert 45 < psnr(engine.run(LR), expected) < 90
    assert psnr(engine.run(LR, exact=True), expected) > 100


def test_the_graph_is_cached(home: Path) -> None:
    model = model_of(compact())
    first = open_engine(lambda: model, "weights", CPU, "onnx")

    def never() -> SRModel:
        raise AssertionError("loaded, though the cache has it")

    second = open_engine(never, "weights", CPU, "onnx")
    np.testing.assert_array_equal(second.run(LR), first.run(LR))


def test_images_are_upscaled_and_evaluated_with_onnx_runtime(pdd: Pdd, ground: Path) -> None:
    save_file(dict(model_of(rrdbnet(features=16)).module.state_dict()), "model.safetensors")
    Image.fromarray(photo(27, 35)).save("lr.png")
    for engine in ("onnx", "torch"):
        options = ("--weights", "model.safetensors", "--engine", engine, "--device", "cpu", "--precision", "fp32")
        done = pdd("upscale", "lr.png", f"{engine}.png", *options, "--tile", 16, "--overlap", 8, "--json")
        assert done.code == 0, done.err
        document = json.loads(done.out)
        assert (document["engine"], document["device"], document["precision"]) == (engine, "cpu", "fp32")
    found, expected = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("onnx", "torch"))
    assert abs(found - expected).max() <= 1
    arguments = ("--lr-dir", ground / "realLR", "--weights", "model.safetensors", "--metrics", "entropy")
    done = pdd("evaluate", *arguments, "--engine", "onnx")
    assert done.code == 0, done.err
    assert "cpu, fp32, onnx" in done.err


def test_devices_and_packages_that_are_missing_are_named(pdd: Pdd, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(dict(compact()), "model.safetensors")
    Image.fromarray(photo(27, 35)).save("lr.png")

    def fails(words: str, *options: str) -> None:
        done = pdd("upscale", "lr.png", "sr.png", "--weights", "model.safetensors", *options)
        assert done.code == 2, done.err
        assert words in done.err, done.err

    fails("Devices for --engine onnx here: cpu", "--device", "directml")
    fails("Devices for --engine onnx here: cpu", "--engine", "onnx", "--device", "mps")
    fails("--engine onnx can", "--engine", "ncnn", "--device", "coreml")
    fails("not in bf16", "--engine", "onnx", "--device", "cpu", "--precision", "bf16")
    # A provider that is installed, but can't start: ONNX Runtime falls back to the CPU, pdd doesn't.
    for module in (devices, onnx_engine, select):
        monkeypatch.setattr(module, "onnx_providers", lambda: {"cuda": "CUDAExecutionProvider"})
    fails("can't start its CUDAExecutionProvider", "--engine", "onnx", "--device", "cuda")
    monkeypatch.setattr(select, "has_onnx_gpu_package", lambda: True)
    model = model_from_state(compact(), origin="")
    assert choose_engine(model, CPU, "onnx", anywhere=True).runtime == CPU
    assert choose_engine(model, CPU, "auto", anywhere=True).name != "onnx"
    monkeypatch.setattr(onnx_engine, "find_spec", lambda name: None)
    fails("pip install 'pdd-cli[onnx]'", "--engine", "onnx")
