"""What must not end a batch or its report: names, encodings, a home that is read-only, errors that nobody expected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdd_cli.errors import InputError
from pdd_cli.last_run import read_last_run
from pdd_cli.upscaling import pipeline as batch
from pdd_cli.upscaling.manifest import NAME
from pdd_cli.weights.store import Card, Store

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names that are any bytes")


SCRIPT = """
import os, sys
from pdd_cli.cli import main
for line in sys.argv[1].split("\\n"):
    sys.argv = ["pdd", *line.split("\\t")]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os.write(1, b"\\n\\x1e%d\\x1e" % (end.code or 0))
"""


def run(*commands: tuple[object, ...], **environment: str) -> tuple[list[bytes], list[int], bytes]:
    """What some commands, in one process of its own, write to stdout, their exit codes, and all of stderr."""
    text = "\n".join("\t".join(map(str, command)) for command in commands)
    found = subprocess.run([sys.executable, "-c", SCRIPT, text], capture_output=True, env={**os.environ, **environment})
    parts = found.stdout.split(b"\x1e")
    return parts[0::2], [int(part) for part in parts[1::2]], found.stderr


@pytest.fixture
def odd(tmp_path: Path, ground: Path) -> Path:
    """A folder with names in Latin-1, Shift-JIS and UTF-8."""
    folder = tmp_path / os.fsdecode(b"B\xfccher")
    folder.mkdir()
    for name in (b"M\xfcnchen.png", b"\x93\xfa\x96{.png", "東京.png".encode()):
        shutil.copy(ground / "realLR/0.png", folder / os.fsdecode(name))
    return folder


@pytest.mark.slow
@LINUX
def test_names_that_are_not_utf8(pdd, odd: Path, ground: Path, tmp_path: Path) -> None:
    out, log = tmp_path / os.fsdecode(b"out\xff"), tmp_path / "log.jsonl"
    command = ("upscale", odd, out, "--weights", ground / "base.safetensors", "--json", "--log", log)
    reports = [tmp_path / f"report{suffix}" for suffix in (".json", ".csv", ".html")]
    score = ("evaluate", odd, "--gt-dir", odd, "--metrics", "psnr", "--json", "--output")
    outputs, codes, errors = run(command, command, *((*score, report) for report in reports))
    assert codes == [0] * 5, errors
    first, second, *scored = (json.loads(output.decode("utf-8")) for output in outputs[:5])
    assert first["done"] == 3
    assert second["skipped"] == 3
    names = {os.fsencode(file["output"]) for file in first["files"]}
    assert names == {os.fsencode(path) for path in out.glob("*.png")}
    assert len([json.loads(line) for line in log.read_text("utf-8").splitlines()]) == 6
    (out / NAME).read_text("utf-8")  # valid
    assert {pair.lr for pair in read_last_run().pairs} == set(odd.iterdir())
    assert [len(document["images"]) for document in scored] == [3] * 3
    for report in reports:
        assert "nchen.png" in report.read_text("utf-8")


@LINUX
def test_a_card_may_hold_such_names(tmp_path: Path, odd: Path) -> None:
    import torch

    store = Store(tmp_path / "weights")
    card = Card(name="a", architecture="x", source="test", created="", base=str(odd), adapted={"real_dir": str(odd)})
    store.add(card, {"weight": torch.zeros(1)})
    found = store.get("a")
    assert found.card.base == str(odd)
    assert found.card.adapted == {"real_dir": str(odd)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "C"],
)
def test_any_encoding_of_the_console_will_do(pdd, tmp_path: Path, ground: Path, environment: dict[str, str]) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(ground / "realLR/0.png", tmp_path / "in" / "東京😀 ↓.png")
    (tmp_path / "in/ж.png").write_bytes(b"damaged")
    score = ("evaluate", tmp_path / "out", "--gt-dir", tmp_path / "out", "--metrics", "psnr")
    outputs, codes, errors = run(
        ("upscale", tmp_path / "in", tmp_path / "out", "--weights", ground / "base.safetensors"),
        score,
        ("evaluate", tmp_path / "out", "--metrics", "list"),
        (*score, "--json"),
        ("upscale", "--help"),
        **environment,
    )
    assert codes == [3, 0, 0, 0, 0], errors
    assert b"psnr" in outputs[1]
    assert json.loads(outputs[3].decode("ascii"))["images"][0]["name"].endswith(".png")


def test_a_home_that_cannot_be_written_costs_no_output(pdd, ground: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PDD_HOME", str(tmp_path / "file/home"))
    command = ("upscale", ground / "realLR/0.png", tmp_path / "b.png", "--weights", ground / "base.safetensors")
    found = pdd(*command, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["done"] == 1
    assert "latest_upscale.json" in found.err
    assert "1 upscaled" in found.err


def test_scores_are_shown_where_the_report_cannot_be_written(pdd, ground: Path) -> None:
    images = ground / "realLR"
    Path("file").write_text("")
    found = pdd("evaluate", images, "--gt-dir", images, "--metrics", "psnr", "--json", "--output", "file/x.csv")
    assert found.code == InputError.exit_code
    assert len(json.loads(found.out)["images"]) == 3
    assert "x.csv" in found.err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["read", "compute", "write"])
def test_an_error_that_nobody_expected_is_one_jobs_failure(
    pdd, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "compute":  # of the second image
        from pdd_cli.upscaling.upscaler import Upscaler

        original = Upscaler.start
        calls: list[int] = []

        def start(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("apac")
            return original(self, *arguments)

        monkeypatch.setattr(Upscaler, "start", start)
    else:
        name = {"read": "probe", "write": "write_images"}[where]
        original = getattr(batch, name)

        def function(path, *arguments, **options):
            if path.name == "1.png":
                raise KeyError("apac")
            return original(path, *arguments, **options)

        monkeypatch.setattr(batch, name, function)
    command = ("upscale", ground / "realLR", tmp_path / "out", "--weights", ground / "base.safetensors", "--json")
    found = pdd(*command)
    assert found.code == 3
    files = json.loads(found.out)["files"]
    assert [file["status"] for file in files] == ["done", "failed", "done"]
    kind = "RuntimeError" if where == "compute" else "KeyError"
    assert kind in files[1]["problem"]
    assert "apac" in files[1]["problem"]
    assert "--debug" in files[1]["problem"]
    assert "Traceback" not in found.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "2.png"]
    if where != "compute":
        monkeypatch.setattr(sys, "argv", ["pdd", "--debug"])
        assert "Traceback" in pdd("--debug", *command).err
