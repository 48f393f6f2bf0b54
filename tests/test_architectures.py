"""Networks of spandrel that are called, padded, trained or computed otherwise than RRDBNet."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from spandrel import ImageModelDescriptor, ModelLoader
from torch import Tensor, nn

from benchmarks.architectures.__main__ import as_table
from benchmarks.architectures.networks import NETWORKS, random_state
from pdd_cli.adaptation.preview import upscale_image
from pdd_cli.adaptation.trainable import check_trainable, training_mode
from pdd_cli.engines.select import open_engine
from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.errors import InputError
from pdd_cli.exporting.formats import try_forms
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.models.onnx_graph import write_onnx
from pdd_cli.runtime import Runtime, to_channels_last
from tests.helpers.networks import CPU


def spandrels(name: str) -> ImageModelDescriptor:
    return ModelLoader().load_from_state_dict(random_state(name))


# A noise map is added (DRUNet); the output is a tuple (MMRealSR), or in -1..1 (MixDehazeNet); images are square; the
# network overwrites its input (RCAN), or fails with batches (SeemoRe).
@pytest.mark.parametrize("name", ["DRUNet", "MMRealSR", "MixDehazeNet", "IPT", "Uformer", "RCAN", "SeemoRe"])
def test_images_are_those_of_spandrel(name: str) -> None:
    model, theirs = model_from_state(random_state(name), origin="test"), spandrels(name)
    assert (model.in_channels, model.out_channels, model.scale) == (3, 3, theirs.scale)
    lr = torch.rand(2, 3, 37, 53).contiguous(memory_format=torch.channels_last)
    to_channels_last(model.module, torch.device("cpu"))  # as engines and training do
    right, bottom = theirs.size_requirements.get_padding(53, 37)
    assert model.padding(37, 53) == (bottom, right)
    before = lr.clone()
    with torch.inference_mode():
        found = model.upscale(lr).clamp(0, 1)
    assert torch.equal(lr, before)
    for one, image in zip(found, lr, strict=True):
        expected = theirs(F.pad(image[None], (0, right, 0, bottom), mode="replicate"))[0]
        assert expected.std() > 1e-3
        assert torch.allclose(one, expected[:, : 37 * model.scale, : 53 * model.scale], atol=1e-4)


def test_an_image_is_always_upscaled_to_the_same() -> None:
    model = model_from_state(random_state("AuraSR"), origin="test")  # which adds noise to its input
    lr, seed = torch.rand(1, 3, 16, 16), torch.get_rng_state()
    with torch.inference_mode():
        assert torch.equal(model.upscale(lr), model.upscale(lr))
    assert torch.equal(torch.get_rng_state(), seed)


@pytest.mark.slow
def test_a_prefix_of_the_keys_may_belong_to_the_network() -> None:
    # `read_state` removes `model.`, which wrappers add, from the keys of LaMa.
    with torch.device("meta"):
        shapes = NETWORKS["LaMa"]().state_dict()
    state = {key.removeprefix("model."): torch.zeros(tensor.shape) for key, tensor in shapes.items()}
    with pytest.raises(InputError, match=r"x\.pth: a LaMa model for Inpainting, not for super-resolution"):
        model_from_state(state, origin="x.pth")


class _Optional(nn.Module):
    """A network with an optional argument, as that of RealCUGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor, alpha: float = 1) -> Tensor:
        return self.conv(image) * alpha  # type: ignore[no-any-return]


def test_a_graph_has_one_input(tmp_path: Path) -> None:
    model = SRModel(module=_Optional(), scale=1, in_channels=3, out_channels=3, architecture="Optional")
    write_onnx(tmp_path / "x.onnx", model, {})
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert [one.name for one in session.get_inputs()] == ["lr"]


def test_the_keys_are_those_of_the_file() -> None:
    state = random_state("DRUNet")
    model = model_from_state(state, origin="test")
    assert model.module.state_dict().keys() == state.keys()
    model.module.load_state_dict({key: tensor * 0 for key, tensor in state.items()})
    assert not any(tensor.any() for tensor in model.module.state_dict().values())


def test_batch_normalisation_keeps_its_statistics() -> None:
    model = model_from_state(random_state("DnCNN"), origin="test")
    norms = [module for module in model.module.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    assert norms
    training_mode(model.module)
    model.upscale(torch.rand(2, 3, 16, 16)).sum().backward()
    upscale_image(model, np.zeros((16, 16, 3), np.uint8), CPU)
    assert model.module.training
    assert not any(norm.training for norm in norms)
    model.upscale(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert all(norm.weight.grad is not None for norm in norms)


def test_tensors_of_five_dimensions_are_moved() -> None:
    model = model_from_state(random_state("AuraSR"), origin="test")
    assert any(parameter.ndim == 5 for parameter in model.module.parameters())
    to_channels_last(model.module, torch.device("cpu"))
    convolution = next(module for module in model.module.modules() if isinstance(module, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


class _Strict(nn.Module):
    """A network that fails if its convolution is computed in another precision than its input has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.zeros_like(image).index_add(1, torch.arange(3), self.conv(image))


def test_a_network_that_refuses_bf16_is_computed_in_fp32() -> None:
    model = SRModel(module=_Strict(), scale=1, in_channels=3, out_channels=3, architecture="Strict")
    engine = TorchEngine(model, Runtime("cpu", "bf16"))
    assert engine.runtime.precision == "fp32"
    lr = np.random.default_rng(0).random((1, 3, 16, 32), np.float32)
    with torch.inference_mode():
        expected = model.upscale(torch.from_numpy(lr)).numpy()
    assert np.allclose(engine.run(lr), expected, atol=1e-5)
    check_trainable(model, "x.pth", CPU)
    with pytest.raises(InputError, match=r"x\.pth: Strict can't be trained") as raised:
        check_trainable(model, "x.pth", Runtime("cpu", "bf16"))
    assert "--precision fp32" in raised.value.hint


@pytest.mark.slow
def test_a_graph_that_cannot_be_made_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = model_from_state(random_state("ATD"), origin="test")
    with pytest.raises(InputError, match=r"^--export onnx: ATD can't be exported as ONNX") as raised:
        try_forms(["onnx"], model, "--export")
    assert "/" not in raised.value.message.split("(")[0]
    os.write(1, b"after")
    out, err = capfd.readouterr()
    assert (out, err) == ("after", "")


@pytest.mark.slow
def test_a_crash_of_openvino_leaves_pytorch() -> None:
    pytest.importorskip("openvino")
    model = model_from_state(random_state("CRAFT"), origin="test")
    with pytest.raises(InputError, match="crashes with a CRAFT model") as raised:  # OpenVINO 2026.4
        open_engine(lambda: model, None, CPU, "openvino")
    assert raised.value.hint == "Use --engine torch."


@pytest.mark.slow
def test_a_crash_of_the_exporter_is_an_error() -> None:
    model = model_from_state(random_state("GRL"), origin="test")
    with pytest.raises(InputError, match="GRL") as raised:  # PyTorch 2.14 ends with a segmentation fault
        try_forms(["onnx"], model, "--to")
    assert raised.value.hint == "Choose another form, such as pth."


def test_the_table_names_the_reasons(tmp_path: Path) -> None:
    found = {
        "B": {"load": (True, ""), "upscale": (True, ""), "adapt": (False, "why"), "export": (True, "")},
        "a": {"load": (False, "another"), "upscale": (False, ""), "adapt": (False, ""), "export": (False, "")},
    }
    rows = as_table(found).splitlines()
    assert rows[2:4] == ["| a | no [1] | – | – | – |", "| B | yes | yes | yes | no [2] |"]
    assert rows[-2:] == ["1. another", "2. why"]
