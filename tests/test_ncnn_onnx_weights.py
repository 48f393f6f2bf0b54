"""ncnn and ONNX files as weights of `upscale`, `evaluate` and `adapt`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pdd_cli.imaging.decode import read_image
from pdd_cli.weights.ncnn import write_network
from pdd_cli.weights.wiring import wiring_of
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo
from tests.helpers.networks import compact, rrdbnet

Pdd = Callable[..., Outcome]


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with weights that fp16 holds exactly."""
    return {key: tensor.half().float() for key, tensor in state.items()}


def save_ncnn(name: str, state: Mapping[str, Tensor]) -> str:
    """Write NAME.param and NAME.bin; returns the `.param`."""
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    param, data = write_network(wiring_of(arrays), arrays)
    Path(f"{name}.param").write_text(param, encoding="utf-8")
    Path(f"{name}.bin").write_bytes(data)
    return f"{name}.param"


@pytest.fixture
def lr() -> Image.Image:
    return Image.fromarray(photo(27, 35))


@pytest.mark.parametrize("state", [rrdbnet(features=16), rrdbnet(unshuffle=2), compact()])
def test_an_ncnn_model_upscales_as_the_same_weights_do(pdd: Pdd, lr: Image.Image, state: Mapping[str, Tensor]) -> None:
    lr.save("lr.png")
    save_ncnn("model", rounded(state))
    save_file(rounded(state), "same.safetensors")
    for weights in ("model.param", "model.bin", "same.safetensors"):
        done = pdd("upscale", "lr.png", f"{weights}.png", "--weights", weights, "--json")
        assert done.code == 0, done.err
    one, other, same = (read_image(Path(f"{w}.png")).pixels for w in ("model.param", "model.bin", "same.safetensors"))
    assert np.array_equal(one, same)
    assert np.array_equal(other, same)


def test_two_ncnn_models_with_equal_layers_are_two_models(pdd: Pdd, lr: Image.Image) -> None:
    # Their `.param` files are equal: what is cached for one must not be taken for the other.
    Path("in").mkdir()
    lr.save("in/lr.png")
    state = rounded(rrdbnet(features=16))
    save_ncnn("one", state)
    save_ncnn("other", {key: tensor * 2 for key, tensor in state.items()})
    assert Path("one.param").read_bytes() == Path("other.param").read_bytes()
    images = []
    for name in ("one", "other"):
        done = pdd("upscale", "in", "out", "--weights", f"{name}.param", "--json")
        assert json.loads(done.out)["done"] == 1, done.err  # made again, because the weights have changed
        images.append(read_image(Path("out/lr.png")).pixels)
    assert not np.array_equal(*images)


@pytest.mark.slow
def test_an_ncnn_model_is_adapted_and_evaluated(pdd: Pdd, ground: Path) -> None:
    save_ncnn("model", rounded(rrdbnet(features=16)))
    done = pdd(*command(ground, "--base", "model.param", steps=8)[3:])
    assert done.code == 0, done.err
    arguments = ("--lr-dir", ground / "realLR", "--weights", "model.param,realLR", "--metrics", "entropy")
    done = pdd("evaluate", *arguments)
    assert done.code == 0, done.err


def test_incomplete_and_other_ncnn_models_are_named(pdd: Pdd, lr: Image.Image) -> None:
    lr.save("lr.png")
    param = Path(save_ncnn("model", rounded(compact()))).read_text(encoding="utf-8")
    Path("alone.param").write_text(param, encoding="utf-8")
    Path("half.bin").write_bytes(Path("model.bin").read_bytes())
    Path("x2.bin").write_bytes(Path("model.bin").read_bytes())
    smaller = (
        param.replace("output 0=0", "112 0=0") + "Interp Resize_40 1 1 112 output 0=3 1=5.000000e-01 2=5.000000e-01\n"
    )
    Path("x2.param").write_text(smaller, encoding="utf-8")
    Path("short.param").write_text(param, encoding="utf-8")
    Path("short.bin").write_bytes(Path("model.bin").read_bytes()[:-8])
    for weights, words in (
        ("alone.param", "alone.param is one of two files of an ncnn model; the other, alone.bin, is missing"),
        ("half.bin", "half.bin is one of two files of an ncnn model; the other, half.param, is missing"),
        ("gone.param", "no such weights file: gone.param"),
        ("x2.param", "x2.bin: the model reduces its own output"),
        ("short.param", "short.bin: truncated"),
    ):
        done = pdd("upscale", "lr.png", "sr.png", "--weights", weights)
        assert done.code == 2, done.err
        assert words in done.err
    assert not Path("sr.png").exists()
