"""What a run has learnt is never lost: exports, verdicts, reports and the store fail without each other; signals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from spandrel import ModelLoader
from torch import Tensor
from typer.testing import CliRunner

from pdd_cli.adaptation.judge import insufficient_images
from pdd_cli.cli import app
from pdd_cli.errors import PddError
from pdd_cli.exporting.formats import write
from pdd_cli.exporting.run import export_adapted
from pdd_cli.models.loading import load_sr_model, model_from_state
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.observer import Observer
from pdd_cli.weights.store import Store, invalid_name_reason, read_card, valid_name_from
from tests.helpers.commands import Hold, Outcome, command, environment
from tests.helpers.networks import old_layout, rrdbnet, swinir

pytestmark = pytest.mark.slow

STEPS = 8


def adapt(pdd: Callable[..., Outcome], ground: Path, *more: object) -> Outcome:
    return pdd(*command(ground, steps=STEPS)[3:], *more)


@pytest.fixture(scope="module")
def trained(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, `runs/realLR`, and its store, `pdd-home`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PDD_HOME", str(folder / "pdd-home"))
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(app, command(ground, steps=STEPS)[3:])
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def finished(pdd: Callable[..., Outcome], trained: Path, home: Path) -> Callable[..., Outcome]:
    """`pdd`, where this run is already finished."""
    shutil.copytree(trained / "runs", "runs")
    shutil.copytree(trained / "pdd-home", home)
    return pdd


# --- exports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: rrdbnet(features=16), lambda: rrdbnet(unshuffle=2), swinir])
def test_an_onnx_graph_is_that_of_the_model_at_any_size(
    tmp_path: Path, make: Callable[[], Mapping[str, Tensor]]
) -> None:
    torch.manual_seed(0)
    state = {key: value.clone().contiguous() for key, value in make().items()}
    model = model_from_state(state, origin="test")
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        write("onnx", tmp_path / "x.onnx", model)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    theirs = ModelLoader().load_from_state_dict(state).eval()
    for height, width in ((16, 24), (40, 8), (56, 72)):
        lr = torch.rand(1, 3, height, width)
        (found,) = session.run(None, {"lr": lr.numpy()})
        with torch.inference_mode():
            expected = theirs.model(lr).numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-3


def test_what_training_made_faster_is_exported_from_the_file(pdd: Callable[..., Outcome], ground: Path) -> None:
    # Layers wide enough for Winograd's kernel, which no exporter can trace.
    torch.manual_seed(0)
    network = RRDBNet(features=16, growth=32, blocks=1)
    torch.save(network.state_dict(), "wide.pth")
    done = adapt(pdd, ground, "--base", "wide.pth", "--export", "onnx,pth,ncnn,safetensors", "--json")
    assert done.code == 0, done.err
    assert "TracerWarning" not in done.err
    names = [Path(path).name for path in json.loads(done.out)["exported"]]
    assert names == ["realLR.onnx", "realLR.pth", "realLR-4x.param", "realLR-4x.bin", "realLR.safetensors"]
    assert read_card(Path("runs/realLR/realLR.safetensors")).adapted["steps"] == STEPS
    content = torch.load("runs/realLR/realLR.pth", weights_only=True)
    RRDBNet(features=16, growth=32, blocks=1).load_state_dict(content["params"], strict=True)


def test_an_export_has_basicsrs_keys_whatever_the_base_had(tmp_path: Path) -> None:
    network = RRDBNet(features=8, growth=32, blocks=1)
    wrapped = {f"module.{key}": value for key, value in old_layout(network.state_dict()).items()}
    torch.save(wrapped, tmp_path / "base.pth")
    write("pth", tmp_path / "out.pth", load_sr_model(tmp_path / "base.pth"))
    assert set(torch.load(tmp_path / "out.pth", weights_only=True)["params"]) == set(network.state_dict())


def test_a_model_that_cannot_be_a_graph_is_named(tmp_path: Path) -> None:
    class BySize(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3) * int(x.shape[3])  # a constant in a traced graph

    model = model_from_state(rrdbnet(), origin="test")
    for module, words in ((BySize(), "give different results"),):
        object.__setattr__(model, "module", module)
        object.__setattr__(model, "scale", 2)
        with pytest.raises(PddError) as raised:
            write("onnx", tmp_path / "x.onnx", model)
        assert words in raised.value.message or "can't be exported" in raised.value.message
        assert "such as pth" in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_adapt_and_export_write_the_same_files(finished: Callable[..., Outcome], home: Path) -> None:
    # The recommended strength is below 1 here: `adapt --export` once wrote full strength.
    forms = "pth,safetensors,onnx,ncnn"
    done = finished("adapt", "--resume", "--name", "realLR", "--export", forms, "--json")
    assert done.code == 0, done.err
    entry = Store.default().get("realLR")
    adapted = {**(entry.card.adapted or {}), "verdict": "keep", "strength": 0.5}
    Store.default().add(entry.card.model_copy(update={"adapted": adapted}), load_file(entry.path))
    Path("beside").mkdir()
    export_adapted(
        entry.path, forms.split(","), Path("beside"), name="realLR", store=Store.default(), observer=Observer()
    )
    assert finished("export", "realLR", "--to", forms, "out").code == 0
    base, full = load_file(entry.card.base), load_file(entry.path)
    found = torch.load("out/realLR.pth", weights_only=True)["params"]
    assert all(torch.equal(found[key], torch.lerp(base[key], full[key], 0.5)) for key in full)
    files = sorted(path.name for path in Path("out").iterdir())
    assert files == sorted(Path(path).name for path in json.loads(done.out)["exported"])
    one, other = (load_file(f"{folder}/realLR.safetensors") for folder in ("beside", "out"))
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
    assert read_card(Path("beside/realLR.safetensors")) == read_card(Path("out/realLR.safetensors"))
    for name in files:
        if not name.endswith(".safetensors"):  # the order of its metadata is random
            assert Path("beside", name).read_bytes() == Path("out", name).read_bytes(), name


def test_a_missing_package_is_known_before_the_run(
    pdd: Callable[..., Outcome], ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    for dry in ((), ("--dry-run",)):
        done = adapt(pdd, ground, "--export", "onnx", *dry)
        assert done.code == 2
        assert "--export onnx needs a package that isn't installed: onnx" in done.err
    assert not Path("runs").exists()


# --- late failures ----------------------------------------------------------------------------------------------


def test_each_late_step_fails_without_the_others(finished: Callable[..., Outcome], home: Path) -> None:
    run = Path("runs/realLR")
    registered = load_file(home / "weights" / "realLR.safetensors")
    shutil.rmtree(home / "weights")
    (home / "weights").write_text("not a folder")
    for blocked in ("report.html", "realLR.onnx", "verdict.json"):  # a folder where a file is to be
        (run / blocked).unlink(missing_ok=True)
        (run / blocked).mkdir()
    done = finished("adapt", "--resume", "--name", "realLR", "--export", "onnx,pth", "--json")
    assert done.code == 2, done.err  # before the run: the store can't be written

    (home / "weights").unlink()
    done = finished("adapt", "--resume", "--name", "realLR", "--export", "onnx,pth", "--json")
    assert done.code == 3, done.err
    document = json.loads(done.out)
    assert "verdict: " in done.err
    assert {Path(failure["message"].split(": ")[0].removeprefix("can't write ")).name
            for failure in document["failures"]} == {"verdict.json", "report.html", "realLR.onnx"}  # fmt: skip
    assert [Path(path).name for path in document["exported"]] == ["realLR.pth"]
    again = load_file(home / "weights" / "realLR.safetensors")
    assert all(torch.equal(again[key], registered[key]) for key in registered)


def test_weights_that_cannot_be_registered_stay_in_the_run_folder(
    finished: Callable[..., Outcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdd_cli.adaptation.judge import Judge, Verdict

    conclude = Judge.conclude

    def and_block(self: Judge, best: Mapping[str, Tensor]) -> object:
        shutil.rmtree(home / "weights")
        (home / "weights").write_text("in the way")  # as a disk that was taken away
        return replace(conclude(self, best), verdict=Verdict(True, "better", 1.0))

    monkeypatch.setattr(Judge, "conclude", and_block)
    done = finished("adapt", "--resume", "--json")
    assert done.code == 3, done.err
    document = json.loads(done.out)
    kept = Path("runs/realLR/realLR.safetensors")
    assert document["weights"] == str(kept), done.err
    assert "they are in runs/realLR/realLR.safetensors" in done.err
    assert "--weights runs/realLR/realLR.safetensors" in done.err
    card = read_card(kept)
    assert card is not None
    assert card.adapted is not None
    assert document["report"]


def test_a_judgement_that_fails_leaves_checkpoint_and_weights(
    finished: Callable[..., Outcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdd_cli.adaptation.judge.decide", lambda *_: 1 / 0)
    done = finished("adapt", "--resume", "--json")
    assert done.code == 3, done.err
    document = json.loads(done.out)
    assert document["verdict"]["keep"] is None
    assert "ZeroDivisionError" in document["failures"][0]["message"]
    assert Store(home / "weights").get("realLR") is not None
    assert torch.load("runs/realLR/checkpoint.pt", weights_only=True)["step"] == STEPS


# --- bases of x1, names, cards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3, 8])
def test_bases_of_other_scales(pdd: Callable[..., Outcome], ground: Path, home: Path, scale: int) -> None:
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    torch.manual_seed(0)
    torch.save(SRVGGNetCompact(num_feat=8, num_conv=1, upscale=scale).state_dict(), "base.pth")
    done = adapt(pdd, ground, "--base", "base.pth", "--json")
    assert done.code == 0, done.err
    assert ("JPEG compression are added" in done.err) == (scale == 1)
    card = json.loads(done.out)["card"]
    assert card["scale"] == scale
    model = ModelLoader().load_from_file(str(home / "weights" / "realLR.safetensors"))
    assert model.scale == scale


@pytest.mark.parametrize(
    ("folder", "name"),
    [("Old Camera", "Old-Camera"), ("Ünïcode", "Unicode"), ("...", "adapted"), ("con", "con-adapted"),
     ("写真", "adapted"), ("v1.pth", "v1-pth-adapted"), ("realesrgan", "realesrgan-adapted"), ("a" * 200, "a" * 64),
     (" x ", "x"), ("-rf", "rf"), ("LPT1.old", "LPT1-old-adapted"), ("end.", "end"), ("good_1.2", "good_1.2")],
)  # fmt: skip
def test_a_name_is_made_of_any_folders(folder: str, name: str) -> None:
    assert valid_name_from(folder) == name
    assert not invalid_name_reason(name)


@pytest.mark.parametrize(
    "name", ["v1.pth", "v1.PTH", "a.safetensors", "m.onnx", "aux", "Con.x", "end.", "RealESRGAN", "ü"]
)
def test_a_name_that_cannot_be_used_later_is_refused(pdd: Callable[..., Outcome], ground: Path, name: str) -> None:
    done = adapt(pdd, ground, "--name", name)
    assert done.code == 2
    assert f"--name {name}: " in done.err
    assert not Path("runs").exists()


def test_a_card_finds_its_base_from_any_folder(
    pdd: Callable[..., Outcome], ground: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdd_cli.version import __version__

    shutil.copy(ground / "base.safetensors", "mine.safetensors")
    shutil.copytree(ground / "realLR", "Old Camera")
    base = Path("mine.safetensors").resolve()
    done = adapt(pdd, ground, "--base", "mine.safetensors", "--real-dir", "Old Camera")
    assert done.code == 0, done.err
    assert "named 'Old-Camera'" in done.err
    card = Store(home / "weights").get("Old-Camera").card  # type: ignore[union-attr]
    assert card.base == str(base)
    assert card.pdd_version == __version__
    assert card.content_sha256
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 60)).save(elsewhere / "x.png")
    monkeypatch.chdir(elsewhere)
    done = pdd("upscale", "x.png", "y.png", "--weights", "Old-Camera", "--strength", "0.5", "--device", "cpu")
    assert done.code == 0, done.err


# --- resuming ---------------------------------------------------------------------------------------------------


def test_a_name_is_enough_to_resume_and_images_are_compared(pdd: Callable[..., Outcome], ground: Path) -> None:
    shutil.copytree(ground / "realLR", "photos")
    assert adapt(pdd, ground, "--real-dir", "photos", "--set", "discriminator_warmup=0.25").code == 0
    settings = [json.loads(line) for line in Path("runs/photos/log.jsonl").read_text().splitlines()]
    assert [("pixel" in line) for line in settings] == [False, False] + [True] * 6  # 0.25 of 8 steps of warm-up

    done = pdd("adapt", "--resume", "--name", "photos", "--steps", "12")
    assert done.code == 0, done.err
    assert "12 steps instead of 8" in done.err
    lines = [json.loads(line) for line in Path("runs/photos/log.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all("pixel" in line for line in lines[2:])  # no second warm-up
    assert "before:" in done.err

    Path("photos").rename("moved")
    assert pdd("adapt", "--resume", "--name", "photos").code == 2
    assert pdd("adapt", "--resume", "--name", "photos", "--real-dir", "moved").code == 0
    assert pdd("adapt", "--resume", "--real-dir", "../work/moved", "--name", "runs/photos").code == 0
    Image.new("RGB", (40, 40)).save("moved/0.png")
    (Path("moved") / "1.png").unlink()
    done = pdd("adapt", "--resume", "--name", "photos", "--real-dir", "moved")
    assert done.code == 2
    assert "1 changed (0.png); 1 missing (1.png)" in done.err


def test_a_run_folder_of_an_earlier_version_continues(finished: Callable[..., Outcome], ground: Path) -> None:
    checkpoint = Path("runs/realLR/checkpoint.pt")
    content = torch.load(checkpoint, weights_only=True)
    judged = [json.loads(line) for line in Path("runs/realLR/judgements.jsonl").read_text().splitlines()]
    assert content["judgements"] == judged  # of which an older file has none
    del content["inputs"], content["warmup_steps"], content["judgements"]
    content["settings"]["name"] = None
    torch.save(content, checkpoint)
    config = Path("runs/realLR/config.yaml")
    config.write_text(config.read_text().replace("name: realLR", "name: null"))
    assert adapt(finished, ground, "--resume").code == 0
    assert [json.loads(line) for line in Path("runs/realLR/judgements.jsonl").read_text().splitlines()] == judged
    assert finished("adapt", "--resume", "--name", "realLR").code == 0
    assert finished("adapt", "--resume").code == 0  # the only one


# --- what is judged and trained on ------------------------------------------------------------------------------


def scene(seed: int, size: int = 64) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, folder: Path) -> np.ndarray:
    Image.fromarray(image).save(folder / "x.jpg", quality=60)
    return np.asarray(Image.open(folder / "x.jpg"))


def test_too_little_is_not_judged(tmp_path: Path) -> None:
    one, two, three = (scene(seed) for seed in range(3))
    flat, pixel = np.full((64, 64, 3), 90, np.uint8), np.zeros((1, 1, 3), np.uint8)
    brighter = (one.astype(float) * 0.8 + 40).astype(np.uint8)
    smaller = np.asarray(Image.fromarray(one).resize((40, 40)))
    assert insufficient_images([one], [two, three]) == ""
    for held, others, words in (
        ([flat], [one, two, three], "can't be used (1 flat)"),
        ([pixel], [one, two, three], "smaller than 16 pixels"),
        ([one], [one] * 9, "1 distinct real image (9 duplicates)"),
        ([one], [jpeg(one, tmp_path), brighter, smaller, two], "2 distinct real images (3 duplicates)"),
        ([one], [two], "3 are needed"),
        ([one], [two, flat, pixel], "1 smaller than 16 pixels, 1 flat"),
    ):
        assert words in insufficient_images(held, others), words


def test_copies_of_one_picture_are_not_judged(pdd: Callable[..., Outcome], ground: Path, home: Path) -> None:
    Path("copies").mkdir()
    for number in range(4):
        Image.fromarray(scene(1)).save(f"copies/{number}.png")
    done = adapt(pdd, ground, "--real-dir", "copies", "--json")
    assert done.code == 0, done.err
    assert "verdict: not judged. not enough images to judge: 1 distinct real image (3 duplicates)" in done.err
    document = json.loads(done.out)
    assert document["verdict"]["keep"] is None
    assert document["card"]["adapted"]["verdict"] == "not judged"
    assert "not judged" in Path("runs/copies/report.html").read_text()


LAYOUTS = {
    "RealSR": (
        ["Canon/Train/4/Canon_001_LR4.png", "Canon/Train/4/Canon_001_HR.png", "Canon/Train/2/Canon_001_LR2.png",
         "Canon/Train/2/Canon_001_HR.png", "Nikon/Train/4/Nikon_001_LR4.png", "Nikon/Train/4/Nikon_001_HR.png",
         "Canon/Test/4/Canon_009_LR4.png", "Canon/Test/4/Canon_009_HR.png"],
        ["Canon/Train/4/Canon_001_LR4.png", "Nikon/Train/4/Nikon_001_LR4.png"]),
    "DRealSR": (["Train_x4/train_LR/a_x1.png", "Train_x4/train_HR/a_x4.png", "Test_x4/test_LR/b_x1.png",
                 "Test_x4/test_HR/b_x4.png"], ["Train_x4/train_LR/a_x1.png"]),
    "NTIRE20": (["Corrupted-tr-x/0001.png", "DIV2K_train_HR/0001.png"], ["Corrupted-tr-x/0001.png"]),
    "DIV2K": (["DIV2K_train_LR_bicubic/X4/0001x4.png", "DIV2K_train_LR_bicubic/X2/0001x2.png",
               "DIV2K_train_HR/0001.png"], ["DIV2K_train_LR_bicubic/X4/0001x4.png"]),
    "folders": (["lq/1.png", "gt/1.png"], ["lq/1.png"]),
    "names": (["HR_1.png", "LR_1.png", "2_lr.png", "2_gt.png"], ["2_lr.png", "LR_1.png"]),
    "words": (["thrill_gthing.png", "lri.png", "x1.png"], ["lri.png", "thrill_gthing.png", "x1.png"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_a_published_data_set_the_lr_images_are_taken(tmp_path: Path, name: str) -> None:
    from pdd_cli.data.layouts import select_images

    files, expected = LAYOUTS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(tmp_path / file)
    found = sorted(path for path in tmp_path.rglob("*.png"))
    notes: list[str] = []
    kept, left_out = select_images(found, tmp_path, "LR", 4, notes.append)
    assert [path.relative_to(tmp_path).as_posix() for path in kept] == expected
    assert bool(left_out) == (len(expected) < len(files))
    hr, _ = select_images(found, tmp_path, "HR", 4, notes.append)
    assert name == "words" or not {path for path in hr if path in kept}
    assert not notes


def test_names_and_sizes_that_say_hr_are_warned_of(tmp_path: Path) -> None:
    from pdd_cli.data.layouts import select_images

    for folder, size in (("a", 20), ("b", 80), ("Flickr2K_HR", 50)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (size, size)).save(tmp_path / folder / f"{'other' if size == 50 else 'one'}.png")
    notes: list[str] = []
    kept, left_out = select_images(sorted(tmp_path.rglob("*.png")), tmp_path, "LR", 4, notes.append)
    assert len(kept) == 3
    assert not left_out
    assert "1 of 3 images have names of HR images (Flickr2K_HR/other.png)" in notes[0]
    assert "(b/one.png)" in notes[1]


def test_what_pdd_made_is_not_trained_on(finished: Callable[..., Outcome], ground: Path) -> None:
    shutil.copytree(ground / "realLR", "photos")
    for more in (("--suffix", "_up"), ("--suffix", "_stripped", "--strip-metadata")):
        done = finished("upscale", "photos", "photos", "--weights", "realLR", "--device", "cpu", *more)
        assert done.code == 0, done.err
    shutil.copytree("runs", "photos/older")  # its previews and its comparison
    done = adapt(finished, ground, "--real-dir", "photos", "--dry-run", "--json")
    assert done.code == 0, done.err
    real = json.loads(done.out)["images"][0]
    assert real["used"] == 3
    assert real["left_out"] == ["3 images in run folders of pdd", "6 images that are outputs of pdd"]


def test_images_too_large_to_decode_are_answered_with_what_they_need(
    pdd: Callable[..., Outcome], ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 13,000 x 13,000 pixels by the header: one of them is more than is free.
    monkeypatch.setattr("pdd_cli.adaptation.sources.free_memory", lambda: 400 << 20)
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "large").mkdir()
    for number in range(4):
        (tmp_path / "large" / f"{number}.png").write_bytes(content)
    done = adapt(pdd, ground, "--hr-dir", tmp_path / "large")
    assert done.code == 5
    assert "take 0.8 GiB when decoded, 0.4 GiB are free" in done.err
    assert "crop" not in done.err


# --- signals ----------------------------------------------------------------------------------------------------

BUSY = """
import hashlib, sys
from pdd_cli.interruption import Interruption
say = lambda text: (sys.stderr.write(text + "\\n"), sys.stderr.flush())
with Interruption(lambda: say("first"), lambda: say("second")):
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # minutes in C
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_answered_at_once_while_a_library_computes(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    assert process.stderr.readline() == "first\n"
    process.stderr.flush()
    time.sleep(0.7)  # a signal that follows at once is taken for the same Ctrl-C
    process.send_signal(number)
    assert process.stderr.readline() == "second\n"
    assert process.wait(500) == 130


@pytest.mark.parametrize("kept", ["verdict.json", "realLR.safetensors", "report.html"])
def test_an_interruption_after_training_exits_with_130_and_says_how_to_finish(
    ground: Path, tmp_path: Path, trained: Path, kept: str
) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    hold = Hold(tmp_path / "hold", kept, 1)
    process = subprocess.Popen(
        [sys.executable, *hold.command, *command(ground, "--resume", steps=STEPS)[3:]],
        cwd=tmp_path, env=environment(tmp_path) | {"PYTHONPATH": hold.path},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    hold.wait(process)
    process.send_signal(signal.SIGINT)
    messages = process.communicate(timeout=500)[1]
    assert process.returncode == 130, messages
    assert "pdd adapt --resume --name realLR" in messages
    assert "Traceback" not in messages


def test_an_interruption_before_training_exits_with_130(ground: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(ground, steps=1000), cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    messages = process.stderr.readline()
    assert messages.startswith("reading the"), messages
    process.send_signal(signal.SIGINT)
    messages += process.communicate(timeout=500)[1]
    assert process.returncode == 130, messages
    assert "Traceback" not in messages
    # On a busy machine the signal may arrive after training has begun.
    assert "interrupted" in messages or "pdd adapt --resume --name realLR" in messages, messages


def test_a_checkpoint_is_written_by_time(
    pdd: Callable[..., Outcome], ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdd_cli.adaptation import loop

    saved: list[int] = []
    save = loop.save_checkpoint
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda path, state, *more: (saved.append(state.step), save(path, state, *more))
    )
    monkeypatch.setattr("pdd_cli.adaptation.loop._SAVE_SECONDS", 0)
    assert adapt(pdd, ground, "--set", "checkpoint_every=100").code == 0
    assert saved == list(range(STEPS + 1))
