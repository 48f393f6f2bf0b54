"""Folders that don't fit in memory: images are decoded when they are used, and the crops stay reproducible."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pdd_cli.adaptation import loop, sources
from pdd_cli.adaptation.checkpoint import TrainState
from pdd_cli.adaptation.sources import read_sources
from pdd_cli.adaptation.train_step import StepResult
from pdd_cli.data import lazy_images
from pdd_cli.data.datasets import Batch, CropSampler, downscaled, hr_from_real, select
from pdd_cli.data.degradations import Degradation
from pdd_cli.data.lazy_images import ImageFile, LazyImages
from pdd_cli.errors import InputError
from pdd_cli.interruption import Interruption
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.store import Store
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo

KIB = 1 << 10


class Folder:
    """Images in memory that are "decoded" by name; counts how often each is."""

    def __init__(self, count: int, *, height: int = 80, width: int = 100, broken: Collection[int] = ()) -> None:
        self.images = {Path(f"{n:03}.png"): photo(height, width, n) for n in range(count)}
        self.broken = {Path(f"{n:03}.png") for n in broken}
        self.decoded: collections.Counter[Path] = collections.Counter()
        self.reports: list[str] = []

    def decode(self, path: Path) -> np.ndarray:
        self.decoded[path] += 1
        if path in self.broken:
            raise InputError(f"can't read {path}")
        return self.images[path]

    @property
    def lazy(self) -> LazyImages:
        files = [ImageFile(path, (i.shape[1], i.shape[0]), str(path)) for path, i in self.images.items()]
        return LazyImages(files, self.decode, self.reports.append)


def key(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def sampler(real: object, hr: object, seed: int = 3) -> CropSampler:
    return CropSampler(real, hr, 16, 4, Degradation(jpeg=(30, 90)), seed, candidates=4, min_texture=30)


def assert_same(one: Batch, other: Batch) -> None:
    for ours, expected in zip(astuple(one), astuple(other), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of ten images of 100x80 pixels, two of them new at each step."""
    monkeypatch.setattr(lazy_images, "_WINDOW_BYTES", 10 * 24_000)
    monkeypatch.setattr(lazy_images, "_DECODED_PER_STEP", 2 * 24_000)


@pytest.mark.usefixtures("small_windows")
def test_windows_move_through_all_images_by_a_few_at_each_step() -> None:
    folder = Folder(37)
    images, names = folder.lazy, {key(image): path for path, image in folder.images.items()}
    assert images.window_bytes == 10 * 24_000
    seen: collections.Counter[Path] = collections.Counter()
    before: set[Path] = set()
    for step in range(37):
        window = {names[key(image)] for image in images.window(5, step)}
        assert 8 <= len(window) <= 10  # fewer where one random order ends and the next begins
        seen.update(window)
        assert not step or len(window - before) <= 2
        before = window
    assert set(seen) == set(folder.images)
    assert max(seen.values()) <= 3 * min(seen.values())
    assert max(folder.decoded.values()) <= 3  # 37 steps, twice through all images: not once a crop
    other = {names[key(image)] for image in images.window(6, 0)}
    assert other != {names[key(image)] for image in images.window(5, 0)}


@pytest.mark.usefixtures("small_windows")
def test_crops_depend_on_seed_step_and_element_alone() -> None:
    used = sampler(Folder(30).lazy, downscaled(Folder(30).lazy, (1.0, 0.7), 64))
    for step in range(6):
        used.batch(step, 4)

    def fresh() -> CropSampler:
        return sampler(Folder(30).lazy, downscaled(Folder(30).lazy, (1.0, 0.7), 64))

    expected = fresh().batch(6, 4)
    assert_same(used.batch(6, 4), expected)  # as in an uninterrupted run
    used.batch(40, 4)
    assert_same(used.batch(6, 4), expected)  # after a rollback
    for name in ("lr_s", "hr_s", "lr_t"):  # of two processes
        parts = [getattr(fresh().batch(6, 2, first), name) for first in (0, 2)]
        assert torch.equal(torch.cat(parts), getattr(expected, name))
    assert not torch.equal(fresh().batch(7, 4).hr_s, expected.hr_s)
    assert fresh().digest() == used.digest() != sampler(Folder(30).lazy, Folder(29).lazy).digest()


@pytest.mark.usefixtures("small_windows")
def test_a_window_of_all_images_holds_what_a_list_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_images, "_WINDOW_BYTES", 1 << 30)
    folder = Folder(9)
    eager = list(folder.images.values())
    for make in (
        lambda images: downscaled(images, (1.0, 0.7, 0.2), 40),
        lambda images: hr_from_real(images, 64),
        lambda images: downscaled(hr_from_real(select(images, [1, 4, 7]), 32), (1.0, 0.5), 16),
    ):
        lazy = make(folder.lazy)
        assert isinstance(lazy, LazyImages)
        assert sorted(map(key, lazy.window(0, 0))) == sorted(map(key, make(eager)))
    images = folder.lazy
    assert isinstance(images[2:5], LazyImages)
    assert [key(image) for image in images[2:5]] == [key(image) for image in eager[2:5]]
    assert key(images[-1]) == key(eager[-1])
    with pytest.raises(IndexError):
        images[9]
    assert not folder.lazy.select([])


@pytest.mark.usefixtures("small_windows")
def test_an_image_that_turns_out_broken_is_reported_once_and_another_is_used() -> None:
    def made() -> tuple[Folder, CropSampler]:
        folder = Folder(30, broken={3, 4, 29})
        return folder, sampler(folder.lazy, downscaled(folder.lazy.select(range(30)), (1.0, 0.7), 64))

    folder, one = made()
    batches = [one.batch(step, 2) for step in range(40)]
    assert sorted(folder.reports) == sorted(2 * [f"can't read {n:03}.png" for n in (3, 4, 29)])  # of real and HR images
    assert_same(made()[1].batch(17, 2), batches[17])
    assert key(folder.lazy[3]) == key(folder.images[Path("005.png")])
    assert key(folder.lazy[29]) == key(folder.images[Path("000.png")])
    with pytest.raises(InputError, match="no image in"):
        Folder(3, broken={0, 1, 2}).lazy.window(0, 0)


def test_large_images_make_small_windows() -> None:
    def files(*sizes: tuple[int, int]) -> LazyImages:
        paths = [ImageFile(Path(str(n)), size, "") for n, size in enumerate(sizes)]
        return LazyImages(paths, lambda path: photo(8, 8), print)

    div2k = files(*[(2040, 1356)] * 800).derive(lambda image: [image], 1.74)
    assert (len(div2k.window(0, 0)), div2k.window_bytes) == (32, pytest.approx(32 * 2040 * 1356 * 3 * 1.74))
    assert div2k.window_bytes < 512 << 20
    assert len(files(*[(6000, 4000)] * 50).window(0, 0)) == 7
    assert len(files((30_000, 20_000), *[(100, 100)] * 50).window(0, 0)) == 1  # the largest alone exceeds the limit
    assert len(files(*[(64, 64)] * 9000).window(0, 0)) == 32


# --- folders and runs -------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two subfolders of images that count as too large for memory; two files are no images."""
    monkeypatch.setattr(sources, "_LARGEST_IN_MEMORY", 64 * KIB)
    for name, count, height, width in (("lr", 12, 60, 70), ("hr", 9, 120, 140)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.fromarray(photo(height, width, number)).save(tmp_path / name / f"{number:02}.png")
        (tmp_path / name / "text.png").write_text("no image")
    return tmp_path


def test_large_folders_are_checked_at_the_start(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> tuple[sources.Images, list[str], list[str]]:
        warned, said = list[str](), list[str]()
        config = AdaptConfig(real_dir=large / "lr", hr_dir=large / "hr", crop=16)
        return read_sources(config, 4, warned.append, said.append), warned, said

    lazy, warned, said = read()
    assert isinstance(lazy.real, LazyImages)
    assert isinstance(lazy.hr, LazyImages)
    assert all("decoded when they are used" in line for line in said)
    monkeypatch.setattr(sources, "_LARGEST_IN_MEMORY", 1 << 30)
    eager, warned_too, _ = read()
    assert isinstance(eager.real, list)
    assert warned == warned_too  # the unreadable files
    assert len(warned) == 2
    assert lazy.sources == eager.sources  # sizes and checksums
    assert [key(image) for image in lazy.hr] == [key(image) for image in eager.hr]


def arguments(ground: Path, large: Path, *more: str) -> list[str]:
    return [*command(ground)[3:], "--real-dir", str(large / "lr"), "--hr-dir", str(large / "hr"), *more]


def test_a_run_on_large_folders_is_repeated_and_resumed(
    pdd: Callable[..., Outcome], ground: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its header is whole, its pixels are not.
    (large / "hr" / "05.png").write_bytes((large / "hr" / "05.png").read_bytes()[:-2000])
    done = pdd(*arguments(ground, large, "--name", "whole", "--json"))
    assert done.code == 0, done.err
    assert done.err.count("05.png") == 1
    assert "another image is used" in done.err
    assert json.loads(done.out)["report"]
    step, steps = loop.train_step, list[int]()

    def counted(state: TrainState, *more: Any) -> StepResult:
        steps.append(state.step)
        return step(state, *more)

    with monkeypatch.context() as patch:  # not by a signal, which could end this process
        patch.setattr(loop, "train_step", counted)
        patch.setattr(Interruption, "requested", lambda self: len(steps) > 6)
        assert pdd(*arguments(ground, large, "--name", "resumed")).code == 130
    assert pdd("adapt", "--resume", "--name", "resumed").code == 0
    whole, resumed = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "resumed"))
    for name, expected in whole["specialist"].items():
        assert torch.equal(resumed["specialist"][name], expected), name
    assert Store.default().get("whole").card.adapted["hr_images"] == 9


# Prints the peak memory of reading a folder and drawing batches, in MiB above that of the imports: of images that are
# decoded when they are used, and then of those that are all in memory.
_MEASURED = """
import sys
from pathlib import Path
from pdd_cli.adaptation import sources
from pdd_cli.data import lazy_images
from pdd_cli.data.datasets import CropSampler, downscaled
from pdd_cli.data.degradations import Degradation
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.system import peak_memory, resident_memory
lazy_images._WINDOW_BYTES = 64 << 20
folder = Path(sys.argv[1])
config = AdaptConfig(real_dir=folder / "lr", hr_dir=folder / "hr")
before = resident_memory()
for limit in (64, 4096):
    sources._LARGEST_IN_MEMORY = limit << 20
    images = sources.read_sources(config, 4, print, lambda text: None)
    sampler = CropSampler(images.real, downscaled(images.hr, (1, 0.7, 0.5), 192), 48, 4, Degradation(), 0, 8, 30.0)
    for step in range(30 if limit == 64 else 1):
        sampler.batch(step, 2)
    print((peak_memory() - before) >> 20)
"""


@pytest.mark.slow
def test_the_memory_is_that_of_a_window(tmp_path: Path) -> None:
    for name, count, height, width in (("lr", 2, 60, 80), ("hr", 30, 1500, 2000)):
        (tmp_path / name).mkdir()
        first = tmp_path / name / "00.png"
        Image.fromarray(photo(height, width)).save(first, compress_level=1)
        for number in range(1, count):
            shutil.copyfile(first, tmp_path / name / f"{number:02}.png")

    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path)], capture_output=True, text=True, timeout=500,
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    window, whole = map(int, done.stdout.splitlines()[-2:])
    assert window < 250 < 400 < whole  # 30 images with their copies take 449 MiB
