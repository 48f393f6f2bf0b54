"""What pdd does with one network: each step returns what was found, or raises an exception."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from spandrel import ImageModelDescriptor, ModelLoader

import pdd_cli
from benchmarks.architectures.networks import random_state
from pdd_cli.errors import InputError, PddError
from pdd_cli.exporting.formats import try_forms
from pdd_cli.models.loading import load_sr_model
from tests.helpers.networks import efficientnet_state

_MIN_PSNR = 40.0  # dB, of images of 8 bits
_SIZE = (37, 53)  # height, width


def load(name: str, folder: Path) -> str:
    """Whether a file of `torch.save` is recognised."""
    return load_sr_model(_saved(name, folder)).architecture


def upscale(name: str, folder: Path) -> str:
    """Whether pdd gives the image that spandrel gives."""
    image = _photo(*_SIZE)
    expected = _by_spandrel(name, image)
    with pdd_cli.load_model(
        _saved(name, folder), settings={"device": "cpu", "engine": "torch", "precision": "fp32"}
    ) as model:
        found = model.upscale(image)
    psnr = _psnr(found, expected)
    if not psnr >= _MIN_PSNR:
        raise PddError(f"the image differs from that of spandrel (PSNR {psnr:.1f} dB)")
    return f"{psnr:.0f} dB"


def adapt(name: str, folder: Path) -> str:
    """Whether two training steps change the weights."""
    weights = _saved(name, folder)
    for kind, size in (("real", 32), ("hr", 64)):
        (folder / kind).mkdir()
        for number in range(3):
            Image.fromarray(_photo(size, size, seed=number)).save(folder / kind / f"{number}.png")
    features = folder / "features.safetensors"
    save_file(efficientnet_state()[1], features)
    settings = {
        "hr_dir": str(folder / "hr"), "runs_dir": str(folder / "runs"), "steps": 2, "batch_size": 1, "crop": 16,
        "features": {"network": "efficientnet-lite0", "weights": str(features)},
        "discriminator_warmup": 0, "generalist": {"warmup_steps": 1}, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    result = pdd_cli.adapt(folder / "real", base=weights, name="adapted", settings=settings)
    assert result.weights is not None
    before = load_sr_model(weights).module.state_dict()
    after = load_sr_model(result.weights.path).module.state_dict()
    changed = sum(not torch.equal(before[key], tensor) for key, tensor in after.items())
    if not changed:
        raise PddError("the weights didn't change")
    return f"{changed} of {len(after)} tensors changed"


def export(name: str, folder: Path) -> str:
    """Whether an ONNX graph computes the same."""
    try_forms(["onnx"], load_sr_model(_saved(name, folder)), "--to")
    return "onnx"


STEPS: Mapping[str, Callable[[str, Path], str]] = {"load": load, "upscale": upscale, "export": export, "adapt": adapt}


def preload() -> None:
    """Import everything that the steps need, so that processes that are forked afterwards don't."""
    for name in (
        "huggingface_hub.hf_api", "onnx", "onnxruntime", "pdd_cli.adaptation.loop", "pdd_cli.adaptation.publish",
        "pdd_cli.adaptation.run", "pdd_cli.batch.model", "timm", "torch.onnx",
    ):  # fmt: skip
        import_module(name)


def outcome(step: str, name: str, folder: Path) -> tuple[bool, str]:
    """Whether the step succeeds, and what was found, or the reason why not; prints nothing."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return True, STEPS[step](name, folder)
    except InputError as error:
        return False, error.message.replace(f"{folder}/", "").removeprefix("model.pth: ")
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _saved(name: str, folder: Path) -> Path:
    path = folder / "model.pth"
    torch.save(random_state(name), path)
    return path


def _photo(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random blobs of several sizes."""
    generator = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((width, height)),
            np.float32,
        )
        for side in (4, 11, 29)
    ]
    return np.asarray(np.mean(layers, axis=0), np.uint8)


def _by_spandrel(name: str, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image that spandrel gives, padded as pdd pads it: by replication."""
    model = ModelLoader().load_from_state_dict(random_state(name))
    assert isinstance(model, ImageModelDescriptor)
    height, width = image.shape[:2]
    right, bottom = model.size_requirements.get_padding(width, height)
    lr = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    sr = model(F.pad(lr, (0, right, 0, bottom), mode="replicate"))[0, :, : height * model.scale, : width * model.scale]
    return np.asarray(sr.permute(1, 2, 0).mul(255).round().byte().numpy())


def _psnr(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> float:
    if found.shape != expected.shape:
        return 0.0
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
