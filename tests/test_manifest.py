"""Records of outputs: what they say, what they keep from being replaced, and the log of a run."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pdd_cli.errors import ResourceError
from pdd_cli.imaging.decode import read_image
from pdd_cli.upscaling.manifest import NAME
from pdd_cli.version import __version__


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def test_a_record_says_what_was_made_of_what_and_how(pdd, ground: Path, tmp_path: Path) -> None:
    weights, out = ground / "base.safetensors", tmp_path / "out"
    assert pdd("upscale", ground / "realLR", out, "--weights", weights, "--scale", 2, "--quality", 90).code == 0
    done = {record["output"]: record for record in records(out) if record["done"]}
    assert sorted(done) == ["0.png", "1.png", "2.png"]
    record = done["1.png"]
    source = ground / "realLR/1.png"
    assert record["input"] == str(source)
    assert record["input_sha256"] == sha256(source)
    assert record["output_sha256"] == sha256(out / "1.png")
    assert record["weights"] == "base.safetensors"
    assert record["weights_sha256"] == sha256(weights)
    assert record["settings"]["scale"] == 2
    assert record["settings"]["quality"] == 90
    assert record["pdd"] == __version__
    assert record["date"].endswith("+00:00")


def test_outputs_recorded_by_an_earlier_version_are_current(pdd, ground: Path, tmp_path: Path) -> None:
    command = ("upscale", ground / "realLR", tmp_path / "out", "--weights", ground / "base.safetensors", "--json")
    pdd(*command)
    old = [{key: record[key] for key in ("output", "key", "done")} for record in records(tmp_path / "out")]
    (tmp_path / "out" / NAME).write_text("".join(json.dumps(record) + "\n" for record in old))
    assert json.loads(pdd(*command).out)["skipped"] == 3
    assert json.loads(pdd(*command, "--scale", 2).out)["done"] == 3


def test_an_output_that_was_edited_is_not_replaced(pdd, ground: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("upscale", ground / "realLR", out, "--weights", ground / "base.safetensors", "--json")
    pdd(*command)
    with Image.open(out / "1.png") as image:
        image.rotate(180).save(out / "1.png")
    edited = (out / "1.png").read_bytes()
    for option in (("--scale", 2), ("--scale", 2, "--overwrite")):
        found = pdd(*command, *option)
        assert found.code == 3
        assert [file["status"] for file in json.loads(found.out)["files"]] == ["done", "failed", "done"]
        assert (out / "1.png").read_bytes() == edited
    assert json.loads(pdd(*command[:-1], "--json", "--overwrite", "--strip-metadata").out)["failed"] == 1
    assert (out / "1.png").read_bytes() == edited


def test_a_photograph_is_never_taken_for_a_log(pdd, ground: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes((ground / "realLR/0.png").read_bytes())
    for source in (photo, ground / "realLR/1.png"):
        command = ("upscale", source, tmp_path / "out.png", "--weights", ground / "base.safetensors", "--log", photo)
        found = pdd(*command)
        assert found.code == 2
        assert "not a log of pdd" in found.err
    assert photo.read_bytes() == (ground / "realLR/0.png").read_bytes()
    assert not (tmp_path / "out.png").exists()


def test_a_log_has_a_line_for_each_input(pdd, ground: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes((ground / "realLR/0.png").read_bytes())
    (tmp_path / "in/b.png").write_bytes(b"damaged")
    log = tmp_path / "logs/run.jsonl"
    command = ("upscale", tmp_path / "in", tmp_path / "out", "--weights", ground / "base.safetensors", "--log", log)
    assert pdd(*command, "--dry-run").code == 3
    assert not log.exists()
    assert pdd(*command).code == 3
    assert pdd(*command).code == 3
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((Path(line["input"]).name, line["status"]) for line in lines) == [
        ("a.png", "done"),
        ("a.png", "skipped"),
        ("b.png", "failed"),
        ("b.png", "failed"),
    ]
    done = next(line for line in lines if line["status"] == "done")
    assert (done["size_in"], done["size_out"]) == ([40, 40], [160, 160])
    assert done["output"] == str(tmp_path / "out/a.png")
    assert done["seconds"] > 0
    assert "damaged" in next(line["reason"] for line in lines if line["status"] == "failed")
    found = pdd(*command[:-1], tmp_path)
    assert found.code == 2
    assert str(tmp_path) in found.err


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits")
def test_a_disk_that_is_full_for_the_manifest_ends_the_run(pdd, ground: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (
        "upscale",
        ground / "realLR",
        out,
        "--weights",
        ground / "base.safetensors",
        "--engine",
        "torch",
        "--json",
    )
    out.mkdir()
    record = {"output": "x", "key": "k", "done": True, "padding": "x" * 199_000}
    (out / NAME).write_text(json.dumps(record) + "\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((out / NAME).stat().st_size + 200, limits[1]))
    try:
        found = pdd(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.code == ResourceError.exit_code
    assert "no space left on the disk" in found.err
    assert NAME in found.err
    assert json.loads(found.out)["failed"] == 0  # what was done until then is shown
    for path in out.glob("[0-9].png"):
        assert read_image(path).width == 160
    assert pdd(*command).code == 0
    assert len(list(out.glob("[0-9].png"))) == 3


def test_names_with_other_line_ends_of_unicode_are_recorded(pdd, ground: Path, tmp_path: Path) -> None:
    photos = tmp_path / "in"
    photos.mkdir()
    for number, name in enumerate(("a\u2028b.png", "c\x85d.png", "e\x1cf.png")):
        (photos / name).write_bytes((ground / f"realLR/{number}.png").read_bytes())
    # Without metadata, only the manifest tells that pdd made them.
    command = ("upscale", photos, tmp_path / "out", "--weights", ground / "base.safetensors", "--strip-metadata")
    assert pdd(*command).code == 0
    assert json.loads(pdd(*command, "--json").out)["skipped"] == 3
    assert pdd(*command, "--scale", 2).code == 0


def test_outputs_in_a_folder_that_was_moved_are_not_upscaled_again(pdd, ground: Path, tmp_path: Path) -> None:
    photos, moved = tmp_path / "photos", tmp_path / "moved"
    photos.mkdir()
    (photos / "a.png").write_bytes((ground / "realLR/0.png").read_bytes())
    options = ("--weights", ground / "base.safetensors", "--json")
    assert pdd("upscale", photos, photos, "--suffix", "_x4", *options).code == 0
    photos.rename(moved)
    document = json.loads(pdd("upscale", moved, tmp_path / "out", *options).out)
    assert [Path(file["output"]).name for file in document["files"]] == ["a.png"]
    assert document["earlier_outputs"] == [str(moved / "a_x4.png")]
