"""`pdd adapt --dry-run`: what it finds out, against what a run then does; and that it writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import STEPS, Outcome, command

pytestmark = pytest.mark.slow


def adapt(pdd: Callable[..., Outcome], ground: Path, *more: str) -> Outcome:
    return pdd(*command(ground)[3:], *more)


def written(folder: Path) -> dict[str, bytes]:
    """All files but the cache, which holds what compiling for this CPU gave."""
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_it_tells_what_the_run_would_take_and_writes_nothing(
    pdd: Callable[..., Outcome], ground: Path, tmp_path: Path
) -> None:
    shutil.copytree(ground / "realLR", tmp_path / "mixed")
    (tmp_path / "mixed" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    before = written(tmp_path)
    done = adapt(pdd, ground, "--dry-run", "--json", "--real-dir", str(tmp_path / "mixed"), "--set", "crop=48")
    assert done.code == 0, done.err
    assert written(tmp_path) == before
    assert not Path("runs").exists()
    document = json.loads(done.out)
    real, hr = document["images"]
    assert (real["used"], real["smallest"], real["smaller_than_a_crop"]) == (3, [40, 40], 3)
    assert "broken.png" in real["left_out"][0]
    assert "broken.png" in done.err
    assert (hr["used"], hr["largest"]) == (2, [120, 120])
    assert (document["trained_on"], document["judged_on"]) == (2, 1)
    assert document["steps"] == STEPS
    assert document["judgements"] == 2 + 2 * 3 + 2 * 4  # every 4 of 12 steps, specialist and EMA; at four strengths
    assert document["seconds"] > STEPS * document["seconds_per_step"] > 0
    assert document["memory"] > 1 << 26
    assert document["problems"] == []


def test_it_foretells_the_disk_and_the_failure_of_a_name_that_is_taken(
    pdd: Callable[..., Outcome], ground: Path, home: Path
) -> None:
    foretold = {Path(place["folder"]).name: place["needed"]
                for place in json.loads(adapt(pdd, ground, "--dry-run", "--json").out)["disk"]}  # fmt: skip
    assert adapt(pdd, ground).code == 0
    run = Path("runs") / "realLR"
    taken = sum(len(content) for content in written(run).values())
    twice = (run / "checkpoint.pt").stat().st_size  # a file is replaced by a whole one
    assert taken + twice <= foretold["realLR"] <= taken + twice + (10 << 20)
    entry = (home / "weights" / "realLR.safetensors").stat().st_size
    assert foretold["weights"] == pytest.approx(entry, rel=0.05)

    before = written(run)
    again = adapt(pdd, ground, "--dry-run", "--json")
    assert again.code == adapt(pdd, ground).code == 2
    problems = " ".join(problem["message"] for problem in json.loads(again.out)["problems"])
    assert "already contains a run" in problems
    assert "are already installed" in problems
    resumed = adapt(pdd, ground, "--dry-run", "--json", "--resume")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["steps"] == 0
    assert written(run) == before


def test_weights_that_are_not_installed_are_not_fetched(pdd: Callable[..., Outcome], ground: Path, home: Path) -> None:
    absent = adapt(pdd, ground, "--dry-run", "--base", "realesr-general")
    assert absent.code == 0, absent.err
    assert "realesr-general" in absent.out
    assert adapt(pdd, ground, "--dry-run", "--base", "realesr-general", "--offline").code == 4
    assert not home.exists()


def test_too_little_memory_fails_as_in_the_run(pdd: Callable[..., Outcome], ground: Path) -> None:
    for dry in ("--dry-run", "--json"):
        done = adapt(pdd, ground, "--set", "crop=1000000", dry)  # 3 TB a crop
        assert done.code == 5, done.err
        assert "out of memory with batch_size 1 and crops of 1000000 LR pixels" in done.err
        assert "--batch-size" in done.err
    assert not Path("runs").exists()


def test_a_disk_without_room_fails_before_the_run(pdd: Callable[..., Outcome], ground: Path) -> None:
    # A billion previews fit on no disk.
    more = ("--steps", str(10**9), "--set", "preview_every=1")
    for dry in ("--dry-run", "--json"):
        done = adapt(pdd, ground, *more, dry)
        assert done.code == 5, done.err
        assert "--runs-dir" in done.err
    assert not Path("runs").exists()


def test_it_describes_the_source_and_uses_clean_images_as_hr_too(
    pdd: Callable[..., Outcome], ground: Path, tmp_path: Path
) -> None:
    noisy = json.loads(adapt(pdd, ground, "--dry-run", "--json").out)
    assert (noisy["source"]["jpeg"], noisy["hr_from"]) == (None, "hr_dir")
    assert noisy["source"]["noise"] > 2

    (tmp_path / "clean").mkdir()
    for number in range(3):
        shade = cv2.resize(np.random.default_rng(number).uniform(0, 255, (6, 6, 3)), (64, 64)).clip(0, 255)
        Image.fromarray(shade.astype(np.uint8)).save(tmp_path / "clean" / f"{number}.jpg", quality=70)
    done = adapt(pdd, ground, "--dry-run", "--json", "--real-dir", str(tmp_path / "clean"))
    clean = json.loads(done.out)
    assert clean["source"]["jpeg"] == [70, 70]
    assert clean["source"]["noise"] < 2
    assert clean["hr_from"] == "hr_dir and the real images, downscaled"
    blur = clean["source"]["blur"]
    assert clean["source"]["blur_images"] == 3
    described = f"blur of {blur:.2f} LR pixels" if blur else "no blur found"
    assert f"JPEG of quality 70 (from 3 images), {described} (from 3 images)" in done.err
