"""`pdd upscale --watch`: a folder in which files appear while a real process watches it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.commands import Hold, Outcome
from tests.helpers.images import photo, save


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, "it ended before"
        time.sleep(0.02)


@pytest.mark.slow
def test_what_appears_is_upscaled_until_ctrl_c(pdd: Callable[..., Outcome], ground: Path) -> None:
    Path("in/sub").mkdir(parents=True)
    save(Path("in/a.png"), photo(8, 8))
    Path("in/damaged.png").write_bytes(b"damaged")
    save(Path("ready.png"), photo(8, 8, seed=1))
    hold = Hold(Path("hold").absolute(), "log.jsonl", 4)
    options = ("--weights", str(ground / "base.safetensors"), "--engine", "torch")
    lists = ("--log", "log.jsonl", "--failed-list", "failed.txt", "--checksums", "SHA256SUMS", "--json")
    process = subprocess.Popen(
        [sys.executable, *hold.command, "upscale", "in", "in/out", "--watch", *options, *lists],
        env={**os.environ, "PYTHONPATH": hold.path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(Path("in/out/a.png"), process)
    part = Path("in/sub/b.png")
    data = Path("ready.png").read_bytes()
    with part.open("wb") as file:  # in two parts, as a slow copy
        file.write(data[:100])
        file.flush()
        time.sleep(0.5)
        file.write(data[100:])
    wait_for(Path("in/out/sub/b.png"), process)
    Path("in/empty.png").touch()
    Path("ready.png").rename("in/c.png")
    hold.wait(process)  # in/c.png is upscaled, and not yet logged
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 3, err
    document = json.loads(out)
    files = {file["input"]: file["status"] for file in document["files"]}
    assert files == {"in/a.png": "done", "in/damaged.png": "failed", "in/sub/b.png": "done"}
    assert "in/empty.png" in err
    assert "1 interrupted" in err
    assert "2 upscaled" in err
    for name in ("a", "sub/b", "c"):
        assert Image.open(f"in/out/{name}.png").size == (32, 32)
    assert not Path("in/out/out").exists()
    logged = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert sorted(line["input"] for line in logged) == sorted(files)
    assert {line["weights"] for line in logged} == {options[1]}
    assert Path("failed.txt").read_text().splitlines() == [
        str(Path(f"in/{name}.png").absolute()) for name in ("damaged", "c")
    ]
    summed = [line.split("  ")[1] for line in Path("SHA256SUMS").read_text().splitlines()]
    assert summed == ["in/out/a.png", "in/out/sub/b.png"]

    again = pdd("upscale", "in", "in/out", *options, "--json")
    files = {file["input"]: file["status"] for file in json.loads(again.out)["files"]}
    assert files.pop("in/empty.png") == files.pop("in/damaged.png") == "failed"
    assert set(files.values()) == {"skipped"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("in/a.png", "out"), "--watch needs one folder"),
        (("in", "in2", "out"), "--watch needs one folder"),
        (("in", "in"), "would be mixed with the inputs"),
        (("in", "out.png"), "has the suffix of a file"),
        (("in", "out", "--dry-run"), "--watch and --dry-run"),
        (("in", "out.mp4", "--fps", "25"), "--watch and --fps"),
        (("in", "out", "--from-list", "list"), "--watch and --from-list"),
        (("in", "out", "--checksums", "in/a.png"), "was not written by pdd"),
    ],
)
def test_wrong_calls_are_refused(pdd: Callable[..., Outcome], options: tuple[str, ...], words: str) -> None:
    for folder in ("in", "in2"):
        save(Path(folder, "a.png"), photo(8, 8))
    found = pdd("upscale", *options, "--watch")
    assert (found.code, words in found.err) == (2, True), found.err
