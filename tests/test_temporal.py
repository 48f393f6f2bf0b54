"""`pdd upscale --temporal`: means over time, against NumPy, with a network that repeats each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pdd_cli.errors import InputError
from pdd_cli.video.frames import FrameFolder
from tests.helpers.commands import run_upscale
from tests.helpers.images import photo
from tests.test_video import frames_of, twice
from tests.test_video_options import lossless, weights

__all__ = ["weights"]


def noisy(image: np.ndarray, count: int, deviation: float, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.rint(image + rng.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8) for _ in range(count)]


def upscaled(source: Path, target: Path, weights: Path, *more: Any) -> tuple[np.ndarray, dict[str, Any]]:
    document, error = run_upscale(source, target, "--weights", weights, "--lossless", *more)
    assert error is None, document
    return np.array([frame.to_ndarray(format="rgb24") for frame in frames_of(target)]).astype(float), document


@pytest.mark.parametrize("deviation", [1, 6])
def test_still_frames_become_the_mean_of_five(tmp_path: Path, weights: Path, deviation: float) -> None:
    frames = noisy(photo(24, 32) // 2 + 60, 8, deviation)
    found, _ = upscaled(lossless(tmp_path / "in.mkv", frames), tmp_path / "out.mkv", weights, "--temporal")
    for number in range(len(frames)):
        mean = np.mean([twice(frame) for frame in frames[max(0, number - 4) : number + 1]], axis=0)
        differences = np.abs(found[number] - mean)
        assert np.quantile(differences, 0.9) <= 1  # 0.5 of rounding; noise alone makes few squares look like motion


def test_what_moves_and_cuts_is_unchanged_and_equal_frames_stay_equal(tmp_path: Path, weights: Path) -> None:
    first, second = noisy(photo(24, 48), 6, 1), noisy(255 - photo(24, 48, seed=2), 4, 1)
    for number, frame in enumerate(first):
        frame[8:16, 6 * number : 6 * number + 6] = 255 * (number % 2)
    frames = [*first, *second, second[-1], second[-1]]
    source = lossless(tmp_path / "in.mkv", frames)
    plain, _ = upscaled(source, tmp_path / "plain.mkv", weights)
    found, document = upscaled(source, tmp_path / "out.mkv", weights, "--temporal")
    assert document["files"][0]["tiles"] == 10  # equal frames are computed once
    for number in range(6):
        part = (number, slice(18, 30), slice(12 * number + 2, 12 * number + 10))
        np.testing.assert_array_equal(found[part], plain[part])
    np.testing.assert_array_equal(found[6], plain[6])  # the cut
    assert np.abs(np.diff(found[6:10], axis=0)).mean() < 0.6 * np.abs(np.diff(plain[6:10], axis=0)).mean()
    np.testing.assert_array_equal(found[10], found[9])
    np.testing.assert_array_equal(found[11], found[9])


@pytest.mark.parametrize("copies", [1, 4])  # as many times each frame is shown
def test_a_resumed_run_gives_the_same(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    different = noisy(photo(24, 32), 12 if copies == 1 else 7, 2)
    frames = [frame for frame in different for _ in range(copies)]
    first = 10 if copies == 1 else 22  # the third time that its frame is shown
    source = lossless(tmp_path / "in.mkv", frames)
    options = ["--weights", weights, "--format", "png", "--temporal"]
    document, error = run_upscale(source, tmp_path / "whole/", *options)
    assert error is None, document
    add = FrameFolder.add

    def interrupted(folder: FrameFolder, time: int, pixels: np.ndarray) -> None:
        if folder.frames == first:
            raise KeyboardInterrupt
        add(folder, time, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(FrameFolder, "add", interrupted)
        run_upscale(source, tmp_path / "out/", *options)
    assert not (tmp_path / "out/in").exists()
    document, error = run_upscale(source, tmp_path / "out/", *options)
    assert error is None, document
    assert document["files"][0]["tiles"] == 5 + (2 if copies == 1 else 1)  # five of them again
    for number in range(1, len(frames) + 1):
        one, other = (np.asarray(Image.open(tmp_path / f"{folder}/in/{number:08d}.png")) for folder in ("whole", "out"))
        np.testing.assert_array_equal(one, other)


def test_it_is_for_videos(tmp_path: Path, weights: Path) -> None:
    Image.fromarray(photo(8, 8)).save(tmp_path / "a.png")
    _, error = run_upscale(tmp_path / "a.png", tmp_path / "b.png", "--weights", weights, "--temporal")
    assert isinstance(error, InputError)
    assert "--temporal is for videos" in error.message
    source = lossless(tmp_path / "in.mkv", noisy(photo(24, 32), 2, 1))
    _, error = run_upscale(source, tmp_path / "b.png", "--weights", weights, "--temporal", "--preview", "0")
    assert error is not None
    assert "--preview and --temporal" in str(error)
