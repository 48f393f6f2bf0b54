"""Frames of videos as training images."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pdd_cli.adaptation.clips import choose_frames
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.prepare import check_inputs
from pdd_cli.adaptation.sources import read_sources
from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig
from tests.helpers.images import photo
from tests.test_video import write_video


def clip(path: Path, shots: list[np.ndarray], each: int) -> Path:
    """A video in which each shot stays for `each` frames; lossless."""
    frames = [shot for shot in shots for _ in range(each)]
    packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in frames]
    return write_video(path, packed, codec="ffv1", pix_fmt="bgr0")


def test_frames_have_detail_and_differ(tmp_path: Path) -> None:
    first, second = photo(48, 64, 1), photo(48, 64, 2)
    blurred = np.asarray(Image.fromarray(first).resize((8, 6)).resize((64, 48), Image.Resampling.BICUBIC))
    flat = np.full((48, 64, 3), 90, np.uint8)
    grainy = np.clip(first.astype(int) + np.random.default_rng(0).integers(-2, 3, first.shape), 0, 255).astype(np.uint8)
    path = clip(tmp_path / "a.mkv", [flat, blurred, first, grainy, flat, second], 5)
    chosen = choose_frames(path, 30, print)
    assert 2 <= len(chosen) <= 3  # one of each shot; the blurred one may count as another
    assert all(number // 5 not in (0, 4) for number, _ in chosen)
    assert any(np.array_equal(pixels, second) for _, pixels in chosen)
    # Of one part of the clip, the sharpest.
    ((number, pixels),) = choose_frames(clip(tmp_path / "b.mkv", [blurred, first, blurred], 5), 1, print)
    assert number // 5 == 1
    np.testing.assert_array_equal(pixels, first)


def test_a_folder_of_images_and_clips(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    clip(folder / "sub/a.mkv", [photo(48, 64, n) for n in range(3)], 2)
    clip(folder / "sub_a.mkv", [photo(48, 64, 3)], 2)
    Image.fromarray(photo(40, 40, 9)).save(folder / "still.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    warnings: list[str] = []
    config = AdaptConfig(real_dir=folder)
    images = read_sources(config, 4, warnings.append, lambda text: None)
    (source,) = images.sources
    assert source.used == len(images.real) == 5
    assert sorted(name.rsplit("/", 1)[0] for name in source.content) == ["still.png", *["sub_a.mkv"] * 3, "sub_a.mkv_"]
    assert source.largest == (64, 48)
    assert any("broken.mp4" in text for text in warnings)
    again = read_sources(config, 4, warnings.append, lambda text: None)
    assert again.sources[0].content == source.content  # a resumed run has the same images
    assert source.frames is not None
    frames = Path(source.frames.folder.name)
    assert len(list(frames.rglob("*.png"))) == 4
    del images, source
    assert not frames.exists()
    alone = read_sources(AdaptConfig(real_dir=folder / "sub/a.mkv"), 4, warnings.append, lambda text: None)
    assert alone.sources[0].used == 3


def test_a_clip_without_detail(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", [np.full((48, 64, 3), 90, np.uint8)], 5)
    with pytest.raises(InputError, match="no frame with any detail"):
        read_sources(AdaptConfig(real_dir=path), 4, print, print)


def test_the_checks_before_a_run_know_clips(tmp_path: Path) -> None:
    config = AdaptConfig(real_dir=clip(tmp_path / "cam.mkv", [photo(48, 64)], 2))
    check_inputs(config, RunFolder(tmp_path / "runs/cam"), resume=False, overwrite=False)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.mp4", tmp_path / "empty"):
        with pytest.raises(InputError, match="--real-dir"):
            check_inputs(AdaptConfig(real_dir=path), RunFolder(tmp_path / "runs/cam"), resume=False, overwrite=False)
