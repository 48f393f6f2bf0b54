"""ncnn and ONNX files as weights of `upscale`, `evaluate` and `adapt`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pdd_cli.imaging.decode import read_image
from pdd_cli.weights.ncnn import write_network
from pdd_cli.weights.store import Card, Store
from pdd_cli.weights.wiring import wiring_of
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo
from tests.helpers.networks import compact, rrdbnet, swinir

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
def test_a_damaged_half_is_noticed_where_the_model_is_cached(pdd: Pdd, lr: Image.Image) -> None:
    lr.save("lr.png")
    save_ncnn("model", rounded(rrdbnet(features=16)))
    text = Path("model.param").read_text(encoding="utf-8")
    assert pdd("upscale", "lr.png", "first.png", "--weights", "model.param").code == 0
    for named, damaged, words in (
        ("model.param", text.replace("Convolution", "Deconvolution", 1), "unsupported layer (Deconvolution)"),
        ("model.bin", "\n".join(text.split("\n")[:9]), "bytes more than its layers need"),
        ("model.param", "", "not an ncnn .param file"),
    ):
        Path("model.param").write_text(damaged, encoding="utf-8")
        done = pdd("upscale", "lr.png", "out.png", "--weights", named)
        assert (done.code, words in done.err) == (2, True), done.err
    Path("model.param").unlink()
    done = pdd("upscale", "lr.png", "out.png", "--weights", "model.bin")
    assert (done.code, "the other, model.param, is missing" in done.err) == (2, True)
    assert not Path("out.png").exists()


def test_an_ncnn_model_is_installed_with_the_checksum_of_its_tensors(pdd: Pdd) -> None:
    save_ncnn("model", rounded(compact()))
    done = pdd("fetch-weights", "mine", "--from", "model.param")
    assert done.code == 0, done.err
    digest = hashlib.sha256(Path("model.bin").read_bytes()).hexdigest()
    assert Store.default().get("mine").card.sha256 == digest
    assert digest in pdd("fetch-weights", "--info", "model.param", "--json").out


def test_an_export_is_installed_with_its_card(pdd: Pdd) -> None:
    card = Card(name="first", architecture="RRDBNet", scale=4, licence="MIT", source="test", created="2026")
    Store.default().add(card, rrdbnet(features=16))
    assert pdd("export", "first", "shared.safetensors").code == 0
    assert pdd("fetch-weights", "mine", "--from", "shared.safetensors").code == 0
    found = Store.default().get("mine").card
    assert (found.licence, found.source, found.created) == ("MIT", "test", "2026")


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


# --- ONNX -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [rrdbnet(features=16), rrdbnet(unshuffle=2), rrdbnet(unshuffle=2, in_channels=1, out_channels=1), swinir()]
)
def test_an_onnx_model_upscales_as_the_same_weights_do(pdd: Pdd, lr: Image.Image, state: Mapping[str, Tensor]) -> None:
    lr.save("lr.png")
    bright = {key: tensor.abs() + 0.3 if key == "conv_last.bias" else tensor for key, tensor in state.items()}
    save_file({key: tensor.contiguous() for key, tensor in bright.items()}, "model.safetensors")
    assert pdd("export", "model.safetensors", "model.onnx").code == 0
    done = pdd("upscale", "lr.png", "onnx.png", "--weights", "model.onnx", "--json", "--tile", 24)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["engine"], document["device"], document["precision"]) == ("onnx", "cpu", "fp32")
    same = ("--weights", "model.safetensors", "--engine", "torch", "--precision", "fp32", "--tile", 24)
    assert pdd("upscale", "lr.png", "same.png", *same).code == 0
    found, expected = (read_image(Path(f"{name}.png")).pixels.astype(int) for name in ("onnx", "same"))
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 1
    assert expected.std() > 0.3


def test_onnx_models_are_evaluated_and_not_confused(pdd: Pdd, ground: Path) -> None:
    for name, factor in (("one", 1.0), ("other", 1.5)):
        save_file({key: tensor * factor for key, tensor in rrdbnet(features=16).items()}, f"{name}.safetensors")
        assert pdd("export", f"{name}.safetensors", f"{name}.onnx").code == 0
    arguments = ("--lr-dir", ground / "realLR", "--weights", "one.onnx,other.onnx", "--metrics", "entropy")
    done = pdd("evaluate", *arguments)
    assert done.code == 0, done.err
    one, other = (np.asarray(Image.open(f"upscaled/{name}/0.png")) for name in ("one", "other"))
    assert not np.array_equal(one, other)


def save_graph(name: str, module: nn.Module, *, dynamic: bool = True, channels: int = 3) -> None:
    axes = {2: "height", 3: "width"}
    torch.onnx.export(
        module, (torch.zeros(1, channels, 32, 32),), name, input_names=["in"], output_names=["out"], opset_version=17,
        dynamic_axes={"in": axes, "out": axes} if dynamic else None, dynamo=False,
    )  # fmt: skip


class Halves(nn.Module):
    """A network that takes only even sides."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        halves = x.reshape(1, 3, height // 2, 2, width // 2, 2)
        return halves.reshape(1, 3, height, width)


@pytest.mark.filterwarnings("ignore")
def test_graphs_of_other_programs(pdd: Pdd, lr: Image.Image) -> None:
    lr.save("lr.png")  # 35x27
    save_graph("twice.onnx", nn.Upsample(scale_factor=2))
    save_graph("even.onnx", Halves())
    for name, size, *options in (("twice", (70, 54)), ("even", (35, 27), "--engine", "onnx", "--device", "cpu")):
        done = pdd("upscale", "lr.png", f"{name}.png", "--weights", f"{name}.onnx", *options)
        assert done.code == 0, done.err
        repeated = np.asarray(lr.resize(size, Image.Resampling.NEAREST))
        assert np.array_equal(np.asarray(Image.open(f"{name}.png")), repeated)


@pytest.mark.filterwarnings("ignore")
def test_graphs_that_cannot_be_used_are_named(pdd: Pdd, lr: Image.Image, ground: Path) -> None:
    lr.save("lr.png")
    save_graph("fixed.onnx", nn.Upsample(scale_factor=2), dynamic=False)
    save_graph("broken_scale.onnx", nn.Upsample(scale_factor=1.5))
    save_graph("good.onnx", nn.Upsample(scale_factor=2))
    graph = onnx.load("good.onnx")
    helper.set_model_props(graph, {"scale": "4"})
    onnx.save(graph, "wrong_scale.onnx")
    graph = onnx.load("good.onnx")
    graph.opset_import[0].version = 99
    onnx.save(graph, "new_opset.onnx")
    image, label = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None]) for name in ("image", "label"))
    node = helper.make_node("Relu", ["image"], ["label"])
    classifier = helper.make_model(
        helper.make_graph([node], "g", [image], [label]), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.save(classifier, "classifier.onnx")
    node = helper.make_node("Sharpen", ["image"], ["label"], domain="com.example")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [image], [label]), opset_imports=opsets), "foreign.onnx")
    Path("cut.onnx").write_bytes(Path("good.onnx").read_bytes()[:-40])
    for weights, words, *options in (
        ("fixed.onnx", "the graph takes only images of 32x32 pixels"),
        ("broken_scale.onnx", "not a super-resolution model with one whole-numbered scale"),
        ("wrong_scale.onnx", "its metadata say x4, but its output is x2"),
        ("new_opset.onnx", "can't load this graph"),
        ("foreign.onnx", "can't load this graph"),
        ("cut.onnx", "can't load this graph"),
        ("classifier.onnx", "not a super-resolution model: pdd needs one image as input"),
        ("gone.onnx", "no such weights file: gone.onnx"),
        ("good.onnx", "the base of good.onnx is unknown", "--strength", "0.5"),
        ("good.onnx", "computed in fp32, not with --precision bf16", "--precision", "bf16"),
        ("good.onnx", "--engine openvino can't compute an ONNX file", "--engine", "openvino"),
    ):
        done = pdd("upscale", "lr.png", "sr.png", "--weights", weights, *options)
        assert done.code == 2, done.err
        assert words in done.err
    assert not Path("sr.png").exists()
    done = pdd("export", "good.onnx", "good.pth")
    assert (done.code, "Only `pdd upscale` and `pdd evaluate` take ONNX models" in done.err) == (2, True)
    done = pdd(*command(ground, "--base", "good.onnx")[3:])
    assert (done.code, "Only `pdd upscale` and `pdd evaluate` take ONNX models" in done.err) == (2, True)
