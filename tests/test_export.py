"""`pdd export`: each form is loaded by software that is not pdd, and gives the same image."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor

from pdd_cli.exporting import formats
from pdd_cli.exporting.names import SUFFIXES, name_with_scale, scale_in_name
from pdd_cli.models.loading import interpolated, load_sr_model, state_sha256
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.settings.base import ExportForm
from pdd_cli.weights.ncnn import read_state
from pdd_cli.weights.store import Card, Store, read_card
from tests.helpers.commands import Outcome
from tests.helpers.networks import bsrgan_layout, compact, old_layout, rrdbnet, saved, swinir

Pdd = Callable[..., Outcome]


def trained(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with larger weights, as training leaves them: outputs have the contrast of images."""
    return {key: tensor * (2.0 if tensor.ndim == 4 else 1.0) for key, tensor in state.items()}


NETWORKS: dict[str, dict[str, Tensor]] = {
    "x4": trained(rrdbnet(blocks=2)),
    "x2": trained(rrdbnet(unshuffle=2)),
    "x1": trained(rrdbnet(unshuffle=4)),
    "compact-x4": trained(compact()),
    "compact-x3": trained(compact(3)),
    "compact-x1": trained(compact(1)),
}


def by_spandrel(state: Mapping[str, Tensor], lr: Tensor) -> npt.NDArray[np.float32]:
    model = ModelLoader().load_from_state_dict(dict(state)).model.eval()
    with torch.inference_mode():
        return model(lr)[0].numpy()


def by_onnxruntime(path: Path, lr: Tensor) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"lr": lr.numpy()})[0][0]


def by_ncnn(param: Path, lr: Tensor) -> npt.NDArray[np.float32]:
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = 1
    assert net.load_param(str(param)) == 0
    assert net.load_model(str(param.with_suffix(".bin"))) == 0
    extractor = net.create_extractor()
    extractor.input("data", ncnn.Mat(np.ascontiguousarray(lr[0].numpy())))
    code, output = extractor.extract("output")
    assert code == 0
    return np.array(output)


def psnr(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    assert found.shape == expected.shape
    return -10 * math.log10(max(float(np.mean((found - expected) ** 2)), 1e-20))


@pytest.mark.parametrize("name", NETWORKS)
def test_other_software_computes_the_same_image(pdd: Pdd, tmp_path: Path, name: str) -> None:
    state = NETWORKS[name]
    done = pdd("export", saved(tmp_path, state), "--to", "pth,safetensors,onnx,ncnn", "out", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    scale = document["scale"]
    files = {form: [Path(path) for path in paths] for form, paths in document["exported"].items()}
    assert {form: [path.name for path in paths] for form, paths in files.items()} == {
        "pth": ["model.pth"],
        "safetensors": ["model.safetensors"],
        "onnx": ["model.onnx"],
        "ncnn": [f"model-{scale}x.param", f"model-{scale}x.bin"],
    }
    content = torch.load(files["pth"][0], weights_only=True)
    assert list(content) == ["params", "params_ema"]
    multiple = {"x2": 2, "x1": 4}.get(name, 1)
    for height, width in ((13, 22), (31, 8)):
        odd = torch.rand(1, 3, height, width)
        lr = torch.rand(1, 3, height * multiple, width * multiple)
        expected = by_spandrel(state, lr)
        assert expected.std() > 0.03
        for form in (content["params"], content["params_ema"], load_file(files["safetensors"][0])):
            assert np.array_equal(by_spandrel(form, lr), expected)
        assert psnr(by_onnxruntime(files["onnx"][0], lr), expected) > 80
        assert psnr(by_ncnn(files["ncnn"][0], lr), expected) > 45
        with torch.inference_mode():
            padded = load_sr_model(files["pth"][0]).upscale(odd)[0].numpy()
        assert psnr(by_onnxruntime(files["onnx"][0], odd), padded) > 80
    param, data = (path.read_bytes() for path in files["ncnn"])
    again = read_state(param.decode(), data, origin="test")
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor.half().float() if tensor.ndim == 4 else tensor), key


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": {f"module.net_g.{key}": tensor for key, tensor in state.items()}}


@pytest.mark.parametrize("layout", [dict, prefixed, old_layout, bsrgan_layout])
def test_real_esrgans_scripts_load_the_pth_whatever_the_source_had(
    pdd: Pdd, layout: Callable[[Mapping[str, Tensor]], dict[str, Any]]
) -> None:
    # BasicSR's RRDBNet has these keys; Real-ESRGAN's scripts load `params_ema` strictly.
    network = RRDBNet(features=8, growth=8, blocks=2)
    torch.save(layout(network.state_dict()), "base.pth")
    assert pdd("export", "base.pth", "out.pth").code == 0
    content = torch.load("out.pth", weights_only=True)["params_ema"]
    dense = [f"body.{block}.rdb{number}.conv{conv}" for block in (0, 1) for number in (1, 2, 3) for conv in range(1, 6)]
    names = ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    assert list(content) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert all(torch.equal(content[key], tensor) for key, tensor in network.state_dict().items())


def test_a_compact_pth_loads_strictly(pdd: Pdd) -> None:
    torch.save({"params": {f"module.{key}": tensor for key, tensor in compact().items()}}, "base.pth")
    assert pdd("export", "base.pth", "out.pth").code == 0
    network = SRVGGNetCompact(num_feat=16, num_conv=3, upscale=4)
    network.load_state_dict(torch.load("out.pth", weights_only=True)["params"], strict=True)


def install(strength: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Installs `base`, and `mine`, which was adapted from it; returns their tensors."""
    base = trained(rrdbnet())
    mine = {key: tensor * 1.1 for key, tensor in base.items()}
    store = Store.default()
    fields: dict[str, Any] = {"architecture": "RRDBNet", "scale": 4, "licence": "MIT", "source": "test", "created": ""}
    store.add(Card(name="base", **fields), base)
    settings = {"real_dir": "/home/someone/photos", "steps": 8}
    adapted = {"verdict": "keep", "strength": strength, "settings": settings}
    store.add(Card(name="mine", base="base", base_sha256=state_sha256(base), adapted=adapted, **fields), mine)
    return base, mine


@pytest.mark.parametrize(("options", "strength"), [((), 0.75), (("--strength", "0.25"), 0.25)])
def test_the_strength_is_applied(pdd: Pdd, options: tuple[str, ...], strength: float) -> None:
    base, mine = install(0.75)
    done = pdd("export", "mine", "--to", "safetensors,onnx", "out", "--json", *options)
    assert done.code == 0, done.err
    assert ("strength 0.75, as pdd adapt recommends" in done.err) is not options
    found = load_file("out/mine.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in interpolated(base, mine, strength).items())
    assert json.loads(done.out)["strength"] == strength
    # The file is complete: `upscale` doesn't interpolate again, and it tells nobody its owner's folders.
    card = read_card(Path("out/mine.safetensors"))
    assert card.adapted["strength"] == 1
    assert card.adapted["exported_strength"] == strength
    assert card.adapted["settings"] == {"real_dir": "photos", "steps": 8}
    assert card.content_sha256 == state_sha256(found)
    with safe_open("out/mine.safetensors", framework="numpy") as opened:
        metadata = opened.metadata()
    assert (metadata["architecture"], metadata["scale"], metadata["licence"]) == ("RRDBNet", "4", "MIT")
    graph = onnx.load("out/mine.onnx")
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 17)]
    props = {prop.key: prop.value for prop in graph.metadata_props}
    assert (props["architecture"], props["scale"], props["licence"], props["opset"]) == ("RRDBNet", "4", "MIT", "17")
    assert json.loads(props["pdd_card"])["name"] == "mine"
    assert json.loads(props["pdd_card"])["content_sha256"] == json.loads(done.out)["card"]["content_sha256"]
    assert json.loads(done.out)["card"]["content_sha256"] == state_sha256(found)


def test_other_architectures_name_their_forms(pdd: Pdd, tmp_path: Path) -> None:
    path = saved(tmp_path, dict(swinir()))
    done = pdd("export", path, "--to", "pth,ncnn", "out")
    assert done.code == 2
    assert "only RRDBNet and SRVGGNetCompact can be written in this format, not SwinIR" in done.err
    assert "Formats for SwinIR: pth, safetensors, onnx." in done.err
    assert not Path("out").exists()
    assert pdd("export", path, "--to", "pth,safetensors", "out").code == 0
    lr = torch.rand(1, 3, 16, 16)
    expected = by_spandrel(load_file(path), lr)
    assert np.array_equal(by_spandrel(torch.load("out/model.pth", weights_only=True)["params"], lr), expected)


def test_files_are_not_replaced(pdd: Pdd) -> None:
    save_file(dict(rrdbnet()), "model.safetensors")
    Path("model.pth").write_text("mine")
    done = pdd("export", "model.safetensors", "--to", "onnx,pth")
    assert (done.code, "model.pth exists" in done.err, "--overwrite" in done.err) == (2, True, True)
    assert not Path("model.onnx").exists()  # checked before the first file is written
    done = pdd("export", "model.safetensors", "--to", "onnx,pth", "--overwrite")
    assert (done.code, "model.pth was not written by pdd" in done.err) == (2, True)
    assert Path("model.pth").read_text() == "mine"
    assert not Path("model.onnx").exists()
    Path("model.pth").rename("mine.pth")
    Path("model.pth").symlink_to("elsewhere.pth")
    done = pdd("export", "model.safetensors", "--to", "pth", "--overwrite")
    assert (done.code, "model.pth is a link to a file that doesn't exist" in done.err) == (2, True)
    assert Path("model.pth").is_symlink()
    before = Path("model.safetensors").read_bytes()
    done = pdd("export", "model.safetensors", "--to", "safetensors", "--overwrite")
    assert (done.code, "is the file to export" in done.err) == (2, True)
    assert Path("model.safetensors").read_bytes() == before
    Image.new("RGB", (8, 8)).save("photo.png")
    image = Path("photo.png").rename("photo.pth").read_bytes()
    done = pdd("export", "model.safetensors", "photo.pth", "--overwrite")
    assert (done.code, "was not written by pdd" in done.err) == (2, True)
    assert Path("photo.pth").read_bytes() == image


@pytest.mark.slow
@pytest.mark.parametrize("form", SUFFIXES)
def test_only_files_that_pdd_wrote_are_replaced(pdd: Pdd, form: ExportForm) -> None:
    base, _ = install(1.0)
    assert pdd("export", "mine", "--to", form, "out", "--strength", "0.5").code == 0
    files = sorted(Path("out").iterdir())
    first = [file.read_bytes() for file in files]
    assert pdd("export", "mine", "--to", form, "out", "--overwrite").code == 0
    assert sorted(Path("out").iterdir()) == files
    assert [file.read_bytes() for file in files] != first
    # The same weights, as another program writes them.
    match form:
        case "pth":
            torch.save({"params": base, "params_ema": {key: tensor.clone() for key, tensor in base.items()}}, files[0])
        case "safetensors":
            save_file(base, files[0])
        case "onnx":
            graph = onnx.load(files[0])
            del graph.metadata_props[:]
            onnx.save(graph, files[0])
        case "ncnn":
            text = files[1].read_text()
            files[1].write_text(text.replace("conv_first", "Conv_0"))
    theirs = [file.read_bytes() for file in files]
    done = pdd("export", "mine", "--to", form, "out", "--overwrite")
    assert (done.code, f"was not written by pdd (--to {form})" in done.err) == (2, True)
    assert [file.read_bytes() for file in files] == theirs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reallesrgan", "--to", "pth"), "did you mean realesrgan?"),
        (("mime", "--to", "pth"), "did you mean mine?"),
        (("gone.pth", "--to", "onnx"), "no such weights file: gone.pth"),
        (("text.pth", "--to", "onnx"), "text.pth is a text file, not a weights file"),
        (("mine",), "no format is given"),
        (("mine", "--to", "gguf"), "gguf"),
        (("mine", "--to", "pth,onnx", "out.pth"), "--to gives several formats"),
        (("mine", "--to", "onnx", "out.pth"), "the name of a --to onnx file ends in .onnx"),
        (("mine", "--to", "pth", "text.txt"), "text.txt is a file, not a folder"),
        (("mine", "--to", "pth", "text.txt/below"), "can't write text.txt/below/mine.pth"),
    ],
)
def test_bad_input_is_named(pdd: Pdd, arguments: tuple[str, ...], words: str) -> None:
    install(1.0)
    for name in ("text.pth", "text.txt"):
        Path(name).write_text("hello")
    done = pdd("export", *arguments)
    assert done.code == 2, done.err
    assert words in done.err
    assert {path.name for path in Path().iterdir()} == {"text.pth", "text.txt"}


def test_a_full_disk_leaves_the_other_forms(pdd: Pdd, monkeypatch: pytest.MonkeyPatch) -> None:
    install(1.0)

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    done = pdd("export", "mine", "--to", "pth", "out")
    assert (done.code, "no space left on the disk while writing out/mine.pth" in done.err) == (5, True)
    done = pdd("export", "mine", "--to", "pth,ncnn", "out", "--json")
    assert done.code == 3
    document = json.loads(done.out)
    assert list(document["exported"]) == ["ncnn"]
    assert "no space left" in document["failures"][0]["message"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["mine-4x.bin", "mine-4x.param"]


def test_weights_beyond_fp16_are_refused(pdd: Pdd, tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in rrdbnet().items()}
    state["conv_hr.weight"][0, 0, 0, 0] = 70000
    done = pdd("export", saved(tmp_path, state), "--to", "ncnn", "out")
    assert (done.code, "conv_hr.weight" in done.err, "fp16" in done.err) == (2, True, True)
    assert not list(Path("out").iterdir())
    state["conv_hr.weight"][:] = 3e-8  # nearly zero in fp16
    state["conv_last.weight"][:] = 6e4
    done = pdd("export", saved(tmp_path, state), "--to", "ncnn", "out")
    assert (done.code, "give different images" in done.err) == (2, True)


def test_upscayl_reads_the_scale_from_the_name(pdd: Pdd) -> None:
    for name, scale, expected in (
        ("canon", 4, "canon-4x"), ("realesrgan-x4plus", 4, "realesrgan-x4plus"), ("4x_photo", 4, "4x_photo"),
        ("a2x", 4, "a2_x-4x"), ("canon", 1, "canon-1x"), ("6x12", 4, "6_x_12-4x"), ("Photo-X2", 2, "Photo-X2"),
        ("v1", 4, "v1-4x"),
    ):  # fmt: skip
        assert name_with_scale(name, scale) == expected
        assert scale_in_name(expected) == scale
    install(1.0)
    done = pdd("export", "mine", "bare.param")
    assert done.code == 0
    assert "warning: bare: Upscayl needs the scale in the name, for example bare-4x" in done.err
    assert Path("bare.bin").exists()


def test_the_check_of_fp16_compares_images() -> None:
    one, other = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.01)
    assert formats.psnr(one, other) == pytest.approx(40)
    assert formats.psnr(one, one) == math.inf
    assert formats.psnr(one, other[..., :2]) == 0
    assert math.isnan(formats.psnr(one, other * math.nan))
