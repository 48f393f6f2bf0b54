"""What is an input, what is an output, and what paths are refused."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from pdd_cli.batch.plan import plan_jobs
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.evaluate import EvaluateConfig
from pdd_cli.settings.resolve import resolve
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.upscaling.manifest import NAME


@pytest.fixture
def photos(tmp_path: Path, ground: Path) -> Path:
    shutil.copytree(ground / "realLR", tmp_path / "photos")
    return tmp_path / "photos"


def planned(*sources: Path, output: object, suffix: str = "") -> list[str]:
    plan = plan_jobs(list(sources), str(output), format="keep", suffix=suffix, recursive=True)
    return sorted(job.source.relative_to(sources[0]).as_posix() for job in plan.jobs)


NAMES = ["0.png", "1.png", "2.png"]


def test_outputs_between_the_inputs_are_no_inputs(pdd, photos: Path, ground: Path) -> None:
    command = ("--weights", ground / "base.safetensors", "--json")
    assert json.loads(pdd("upscale", photos, photos, "--suffix", "_x4", *command).out)["done"] == 3
    found = pdd("upscale", photos, photos, "--suffix", "_big", *command)
    document = json.loads(found.out)
    assert document["done"] == 3
    assert sorted(Path(path).name for path in document["earlier_outputs"]) == ["0_x4.png", "1_x4.png", "2_x4.png"]
    assert "3 outputs of earlier runs" in found.err
    (photos / NAME).unlink()  # they say it themselves
    assert planned(photos, output=photos, suffix="_huge") == NAMES
    assert planned(photos, output=photos.parent / "elsewhere") == NAMES
    # Below them, too; and outputs alone are inputs like others.
    pdd("upscale", photos, photos / "out", *command)
    assert planned(photos, output=photos.parent / "elsewhere") == NAMES
    assert planned(photos / "out", output=photos.parent / "x16") == NAMES


def test_outputs_are_known_by_the_manifest_alone(pdd, photos: Path, ground: Path) -> None:
    pdd("upscale", photos, photos, "--suffix", "_x4", "--strip-metadata", "--weights", ground / "base.safetensors")
    assert planned(photos, output=photos, suffix="_big") == NAMES
    lines = [json.loads(line) for line in (photos / NAME).read_text().splitlines()]
    old = [{key: line[key] for key in ("output", "key", "done")} for line in lines]
    (photos / NAME).write_text("".join(json.dumps(line) + "\n" for line in old))
    assert planned(photos, output=photos, suffix="_big") == NAMES


def test_an_edited_copy_of_an_input_is_an_input(photos: Path) -> None:
    with Image.open(photos / "0.png") as image:
        image.rotate(180).save(photos / "0_x4.png")
    assert planned(photos, output=photos, suffix="_x4") == ["0.png", "1.png", "2.png"]  # its own output, as it is named
    assert planned(photos, output=photos, suffix="_big") == ["0.png", "0_x4.png", "1.png", "2.png"]


@pytest.mark.parametrize("name", ["result.png", "result.JPG", "clip.mp4"])
def test_a_folder_is_not_upscaled_to_a_file(pdd, photos: Path, tmp_path: Path, name: str) -> None:
    for source in (photos, photos / "*.png"):
        found = pdd("upscale", source, tmp_path / name)
        assert found.code == 2
        assert name in found.err
        assert not (tmp_path / name).exists()
    (tmp_path / name).mkdir()  # a folder that is named so
    assert planned(photos, output=tmp_path / name) == NAMES
    assert planned(photos, output=tmp_path / "v1.5") == NAMES


def test_pipes_are_refused_by_name(pdd, photos: Path) -> None:
    for arguments in ((photos, "-"), (photos / "0.png", "-"), ("-", "out.png")):
        found = pdd("upscale", *arguments)
        assert found.code == 2
        assert "pipe" in found.err
    assert not Path("-").exists()


def test_home_is_expanded_in_every_path(pdd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "pdd.yaml").write_text(
        "upscale: {input: [~/a.png], output: ~/out/, weights: ~/w.pth, log: ~/l.jsonl, suffix: ~x}\n"
        "adapt: {real_dir: ~/lr, hr_dir: '~/hr', base: ~/b.pth, runs_dir: ~/r,\n"
        " features: {network: vgg16, weights: ~/f}}\n"
        "evaluate: {sr_dir: ~/sr, baseline: [~/one, ~/two], output: ~/r.html, lr_dir: ~no-such-user/lr}\n"
    )
    file = Path("~/pdd.yaml")
    upscale = resolve(UpscaleConfig, "upscale", options={}, file=file)
    assert upscale.input == (tmp_path / "a.png",)
    assert (upscale.output, upscale.weights) == (f"{tmp_path}/out/", str(tmp_path / "w.pth"))
    assert (upscale.log, upscale.suffix) == (tmp_path / "l.jsonl", "~x")
    adapt = resolve(AdaptConfig, "adapt", options={"val_lr": Path("~/v"), "val_hr": Path("~")}, file=file)
    assert (adapt.real_dir, adapt.hr_dir, adapt.base) == (tmp_path / "lr", tmp_path / "hr", str(tmp_path / "b.pth"))
    assert (adapt.val_lr, adapt.val_hr, adapt.runs_dir) == (tmp_path / "v", tmp_path, tmp_path / "r")
    assert adapt.features.weights == tmp_path / "f"
    evaluate = resolve(EvaluateConfig, "evaluate", options={}, file=file)
    assert evaluate.baseline == (tmp_path / "one", tmp_path / "two")
    assert (evaluate.sr_dir, evaluate.output) == (tmp_path / "sr", tmp_path / "r.html")
    assert evaluate.lr_dir == Path("~no-such-user/lr")


def test_files_of_other_kinds_are_counted(pdd, photos: Path, ground: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    for name in ("a.pcx", "b.PCX", "c.ppm", "d.sgi", "sub/e.ico", ".hidden.pcx"):
        (photos / name).parent.mkdir(exist_ok=True)
        image.save(photos / name)
    (photos / "README").write_text("text")
    for source in (photos, photos / "**" / "*"):
        found = pdd("upscale", source, tmp_path / "out", "--weights", ground / "base.safetensors", "--json")
        assert found.code == 0
        kinds = {".pcx": 2, ".ppm": 1, ".sgi": 1, ".ico": 1, "without suffix": 1}
        assert json.loads(found.out)["other_kinds"] == kinds
        assert "1 .ico, 2 .pcx, 1 .ppm, 1 .sgi, 1 without suffix" in found.err
    (tmp_path / "others").mkdir()
    image.save(tmp_path / "others/a.pcx")
    found = pdd("upscale", tmp_path / "others", tmp_path / "out")
    assert found.code == 2
    assert "1 .pcx" in found.err


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder that anybody may use, and nobody's rights where these are root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            for path in folder.rglob("*"):
                path.chmod(0o777)
            if root:
                os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_a_folder_that_cannot_be_read_does_not_end_the_batch(pdd, ground: Path, monkeypatch) -> None:
    # Whatever is imported is imported now: nobody may not read root's Python.
    pdd("upscale", ground / "realLR/0.png", "warm.png", "--weights", ground / "base.safetensors")
    weights = (ground / "base.safetensors").read_bytes()
    pixels = (ground / "realLR/0.png").read_bytes()
    with unprivileged() as folder:
        monkeypatch.setenv("PDD_HOME", str(folder / "home"))
        (folder / "w.safetensors").write_bytes(weights)
        for name in ("in/lost+found/x.png", "in/a.png", "in/sub/b.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(pixels)
        (folder / "in/lost+found").chmod(0)
        found = pdd("upscale", folder / "in", folder / "out", "--weights", folder / "w.safetensors", "--json")
        assert found.code == 3
        document = json.loads(found.out)
        assert document["done"] == 2
        assert "lost+found: Permission denied" in document["problems"][0]
        assert "lost+found" in found.err
        (folder / "in").chmod(0)
        found = pdd("upscale", folder / "in", folder / "out", "--weights", folder / "w.safetensors")
        assert found.code == 2
        assert "in: Permission denied" in found.err
