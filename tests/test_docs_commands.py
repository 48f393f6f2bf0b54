"""Every command of README.md and docs/*.md runs as written, or stands in `NOT_RUN` with the reason.

`pdd fetch-weights NAME` runs with tiny networks installed under the published names, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file

from pdd_cli.cli import app
from pdd_cli.weights.states import state_sha256
from pdd_cli.weights.store import Card, Store
from tests.helpers.commands import Outcome
from tests.helpers.images import photo
from tests.helpers.networks import compact

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PDD = typer.main.get_command(app)

NOT_RUN = {
    "pdd fetch-weights --features vgg19": "downloads",
    "pdd fetch-weights kodak": "downloads",
    "pdd fetch-weights --metrics niqe,lpips": "downloads",
    "pdd fetch-weights bsrgan --from BSRGAN.pth": "needs the published file: its checksum is compared",
    "pdd adapt --real-dir ./realLR --minutes": "takes the time that it names",
    "pdd adapt --real-dir ./realLR --student": "trains for long; tests/test_student.py a shorter one",
    "pdd export realLR --to hub": "uploads; tests/test_hub_upload.py does, to a server on localhost",
    "pdd upscale in out --weights hf:": "downloads; tests/test_hub_upload.py does, from a server on localhost",
    "pdd fetch-weights --info hf:": "downloads; tests/test_hub_upload.py does, from a server on localhost",
    "pdd upscale in/ out/ --device cuda:0,cuda:1": "needs two GPUs",
    "pdd upscale in/ out/ --device vulkan:0": "needs a Vulkan device; see tests/test_ncnn_engine.py",
    "pdd upscale in/ out/ --engine onnx --device directml": "needs Windows and a package of ONNX Runtime for it",
    "pdd upscale in/ out/ --watch": "watches until it is ended; tests/test_watch.py drives it",
    "pdd ui": "serves until it is ended; tests/test_ui.py drives it",
    "torchrun": "needs several GPUs or machines; tests/test_distributed.py runs several processes on a CPU",
    "python -m benchmarks.": "needs published weights and many minutes",
}
"""Beginnings of commands that are only parsed, and why."""

# Makes a run short: tiny crops, few steps, no download, local feature weights, a metric without weights.
SHORT = """
adapt:
  steps: 8
  batch_size: 1
  crop: 16
  device: cpu
  hr_dir: own
  teacher_crops: 3
  features: {network: efficientnet-lite0, weights: features.safetensors}
evaluate:
  metrics: [entropy]
"""
WITHOUT_WEIGHTS = {"niqe": "piqe", "lpips": "gmsd", "musiq": "entropy", "paper": "psnr,entropy"}
"""Metrics whose weights are downloaded, and the formulas that are computed in their place."""


def commands(page: Path) -> Iterator[str]:
    """The commands in fenced and indented blocks, joined where they continue, without comments and prompts."""
    text = page.read_text(encoding="utf-8")
    for language, fenced, indented in re.findall(r"^```(\w*)\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", text, re.M | re.S):
        if language not in ("", "sh", "console"):
            continue
        lines = [line.strip() for line in (fenced or indented).replace("\\\n", " ").splitlines()]
        if any(line.startswith("$ ") for line in lines):  # the other lines are output
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            if re.match(r"(pdd|torchrun|python -m)( |$)", line):
                yield " ".join(line.split("  #")[0].split())


def reason_not_to_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


ALL = [(page, command) for page in PAGES for command in commands(page)]


def test_all_commands_are_found() -> None:
    assert len(ALL) > 35
    assert [start for start in NOT_RUN if not any(command.startswith(start) for _, command in ALL)] == []


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in ALL))
def test_options_are_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    if program == "python":
        parse_args = argparse.ArgumentParser.parse_args

        def parse_only(parser: argparse.ArgumentParser) -> None:
            raise SystemExit(0 if parse_args(parser, arguments[2:]) else 1)

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_module(arguments[1], run_name="__main__")
        return
    name, *options = arguments[arguments.index("pdd_cli") + 1 :] if program == "torchrun" else arguments
    assert PDD.commands[name].make_context(name, options).params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    known = {
        flag for command in PDD.commands.values() for one in command.params for flag in (*one.opts, *one.secondary_opts)
    }
    known.add("--version")
    others = {"--node-rank", "--shutdown-timeout", "--avx2", "--install-completion"}  # of torchrun, benchmarks, Typer
    quoted = re.findall(
        r"`((?:pdd |--)[^`]+)`", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    )
    named = {flag for text in quoted for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*\d?", text)}
    assert named - known - others - {"--help"} == set()


def write_clip(path: Path) -> None:
    """Three small frames; with sound in an MP4."""
    with av.open(path, "w") as clip:
        stream = clip.add_stream("h264" if path.suffix == ".mp4" else "mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        sound = clip.add_stream("aac", rate=48_000) if path.suffix == ".mp4" else None
        for number in range(3):
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(photo(24, 32, number))))
        clip.mux(stream.encode())
        if sound is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((2, 14_400), np.float32), format="fltp", layout="stereo")
            tone.sample_rate = 48_000
            clip.mux([*sound.encode(tone), *sound.encode()])


@pytest.fixture
def place(ground: Path, pdd: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`pdd` in a folder with the files that the pages name; tiny networks are installed as the published weights."""
    base, store = load_file(ground / "base.safetensors"), Store.default()
    for name in ("realesrgan", "bsrgan"):
        store.add(Card(name=name, architecture="RRDBNet", scale=4, source="test", created=""), base)
    store.add(Card(name="realesr-animevideo", architecture="Compact", scale=4, source="test", created=""), compact())
    torch.save(base, "4x_model.pth")
    shutil.copy(ground / "base.safetensors", "realLR.safetensors")
    shutil.copy(ground / "features.safetensors", ".")
    Path("pdd.yaml").write_text(SHORT, encoding="utf-8")
    for folder in ("realLR", "photos"):
        shutil.copytree(ground / "realLR", folder)
    for name in ("photo.jpg", "a.jpg", "b.jpg", "scans/c.png", "in/1.jpg", "in/sub/2.jpg", "clips/cover.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(48, 64, len(name))).save(name)
    for name in ("clip.mp4", "clip.avi", "clips/1.mp4", "restored.mp4", "original.mp4"):
        write_clip(Path(name))
    shades = [Image.fromarray(photo(48, 64, number)) for number in range(3)]
    shades[0].save("anim.gif", save_all=True, append_images=shades[1:], duration=100)
    rng = np.random.default_rng(0)
    for image in ("1.jpg", "sub/2.jpg"):
        for folder in ("originals", "new", "old"):
            (Path(folder) / image).parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 9, (192, 256, 3), np.uint8)
            enlarged = Image.open(Path("in", image)).resize((256, 192))
            Image.fromarray(np.asarray(enlarged) // 2 + noise).save(Path(folder, image))
    for number in range(3):  # aligned pairs
        hr = photo(96, 128, number)
        for folder, side in (("hr", hr), ("lr", hr.reshape(24, 4, 32, 4, 3).mean((1, 3)).astype(np.uint8))):
            Path(folder).mkdir(exist_ok=True)
            Image.fromarray(side).save(Path(folder, f"{number}.png"))
    for part, count in (("Test", 1), ("Train", 3)):
        canon = Path(f"RealSR/Canon/{part}/4")
        canon.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(photo(48, 64, number)).save(canon / f"Canon_00{number + 1}_LR4.png")
            Image.fromarray(photo(192, 256, number)).save(canon / f"Canon_00{number + 1}_HR.png")
    return pdd


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", dict.fromkeys(page for page, command in ALL if not reason_not_to_run(command)), ids=lambda page: page.name
)
def test_commands_run_as_written(page: Path, place: Callable[..., Outcome]) -> None:
    todo = [command for command in commands(page) if not reason_not_to_run(command)]
    text = " ".join(todo)
    if re.search("--weights|pdd export", text) and "pdd adapt" not in text:
        store, base = Store.default(), torch.load("4x_model.pth")
        made_from = {"base": "realesrgan", "base_sha256": state_sha256(base)}
        store.add(Card(name="realLR", architecture="RRDBNet", scale=4, source="test", created="", **made_from), base)
    if todo[0] == "pdd evaluate":  # scores the latest upscale
        assert place("upscale", "in", "out").code == 0
    for command in todo:
        arguments = shlex.split(command)[1:]
        if "--metrics" in arguments:
            value = arguments.index("--metrics") + 1
            arguments[value] = ",".join(WITHOUT_WEIGHTS.get(name, name) for name in arguments[value].split(","))
        outcome = place(*arguments)
        assert outcome.code == 0, f"{command}\n{outcome.err}"
