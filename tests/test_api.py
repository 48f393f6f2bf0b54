"""The public Python interface, and the examples of its page."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pdd_cli
from pdd_cli.engines.winograd.kernel import kernel
from pdd_cli.errors import InputError, PartialFailure
from pdd_cli.models.rrdbnet import RRDBNet

PAGE = Path(__file__).parent.parent / "docs/api.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def place(ground: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples use."""
    folder = tmp_path / "place"
    (folder / "photos").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((ground / "base.safetensors").read_bytes())
    (folder / "features.safetensors").write_bytes((ground / "features.safetensors").read_bytes())
    for number in range(2):
        (folder / f"photos/{number}.png").write_bytes((ground / f"realLR/{number}.png").read_bytes())
    (folder / "photo.png").write_bytes((ground / "realLR/0.png").read_bytes())
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("pdd_cli.")[1].split("(")[0].strip())
def test_examples_run_as_written(place: Path, example: str, capfd: pytest.CaptureFixture[str]) -> None:
    printed = example.count("print(")
    exec(compile(example, str(PAGE), "exec"), {})
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert bool(out) == bool(printed)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_an_array_becomes_what_the_network_makes_of_it(place: Path, dtype: type, channels: int | None) -> None:
    most = np.iinfo(dtype).max
    shape = (12, 16) if channels is None else (12, 16, channels)
    lr = np.random.default_rng(0).integers(0, most + 1, shape).astype(dtype)
    if channels == 4:
        lr[..., 3] = most
    model = pdd_cli.load_model("model.safetensors", settings={"engine": "torch", "precision": "fp32", "device": "cpu"})
    sr = model.upscale(lr)
    assert sr.dtype == dtype
    assert sr.shape == (48, 64, *shape[2:])
    if channels in (3, 4):
        network = RRDBNet(features=8, growth=32, blocks=1)
        network.load_state_dict(load_file(place / "model.safetensors"))
        with torch.no_grad():
            whole = network(torch.from_numpy(lr[..., :3] / most).float().permute(2, 0, 1)[None])[0]
        wanted = whole.permute(1, 2, 0).clamp(0, 1).numpy() * most
        assert np.abs(sr[..., :3] - wanted).max() < (0.51 if dtype is np.uint8 else 1.5)
        assert (sr[..., 3:] == most).all()


def test_files_become_files_as_the_command_makes_them(place: Path, pdd) -> None:
    paths = pdd_cli.upscale(place / "photos", place / "api", weights=place / "model.safetensors")
    assert paths == [place / "api/0.png", place / "api/1.png"]
    assert pdd("upscale", place / "photos", place / "cli", "--weights", place / "model.safetensors").code == 0
    for path in paths:
        made, wanted = (np.asarray(Image.open(folder / path.name)) for folder in (place / "api", place / "cli"))
        assert np.array_equal(made, wanted)


def test_a_failed_input_is_named_and_the_others_are_finished(place: Path) -> None:
    (place / "photos/bad.png").write_bytes(b"no image")
    with pytest.raises(PartialFailure, match=r"bad\.png"):
        pdd_cli.upscale("photos", "out", weights="model.safetensors")
    assert sorted(path.name for path in (place / "out").glob("*.png")) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
    ],
)
def test_arrays_of_other_kinds_are_rejected(place: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pdd_cli.upscale(array, weights="model.safetensors")


def test_a_wrong_setting_is_named(place: Path) -> None:
    with pytest.raises(InputError, match=r"scala: no such setting; did you mean scale\?"):
        pdd_cli.load_model("model.safetensors", settings={"scala": 2})


def test_the_import_is_light() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'pydantic', 'pyiqa'}"
    code = f"import sys, pdd_cli; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("engine", ["torch", "openvino", "winograd"])
def test_no_thread_is_left(place: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    if engine == "winograd" and kernel() is None:
        pytest.skip("there is no kernel for this CPU")
    wide = {"features": 16, "growth": 16, "blocks": 1}  # channels that Winograd's kernel computes
    save_file(RRDBNet(**wide).state_dict(), "wide.safetensors")
    settings = {"engine": engine, "device": "cpu", "precision": "fp32"}
    lr = np.zeros((8, 8, 3), np.uint8)
    before = set(threading.enumerate())
    with pdd_cli.load_model("wide.safetensors", settings=settings) as model:
        assert model.upscale(lr).shape == (32, 32, 3)
        assert engine != "winograd" or set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    pdd_cli.upscale(lr, weights="wide.safetensors", settings=settings)
    pdd_cli.upscale("photos", "out", weights="wide.safetensors", settings=settings)
    assert set(threading.enumerate()) == before
