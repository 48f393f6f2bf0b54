"""Videos are scored frame by frame, against NumPy's PSNR of the frames that PyAV decodes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from pdd_cli.batch import video_frames
from tests.helpers.commands import evaluate
from tests.helpers.images import photo, psnr
from tests.test_video import frames_of, write_video


def video(path: Path, frames: list[np.ndarray], **more: object) -> Path:
    packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in frames]
    return write_video(path, packed, codec="ffv1", pix_fmt="bgr0", **more)


def noisy(frames: list[np.ndarray], level: int) -> list[np.ndarray]:
    noise = np.random.default_rng(level).integers(-level, level + 1, frames[0].shape)
    return [np.clip(frame.astype(int) + noise, 0, 255).astype(np.uint8) for frame in frames]


def test_two_videos_frame_by_frame(tmp_path: Path) -> None:
    frames = [photo(48, 64, n) for n in range(5)]
    truth, good, bad = (
        video(tmp_path / name, noisy(frames, level)) for name, level in (("t.mkv", 0), ("g.mkv", 4), ("b.mkv", 20))
    )
    code, document, err = evaluate(good, "--gt-dir", truth, "--baseline", bad, "--metrics", "psnr")
    assert code == 0, err
    assert "5 of 5 frames" in err
    main = document["images"]
    assert isinstance(main, list)
    assert [(image["image"], image["reference"], image["frame"]) for image in main] == [
        (str(good), str(truth), number) for number in range(1, 6)
    ]
    assert {image["baselines"]["b.mkv"]["image"] for image in main} == {str(bad)}
    for image, ours, theirs in zip(main, frames_of(good), frames_of(truth), strict=True):
        expected = psnr(*(frame.to_ndarray(format="rgb24") for frame in (ours, theirs)))
        assert image["scores"]["psnr"] == pytest.approx(expected, abs=0.01)


def test_long_videos_are_sampled_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_frames, "_MOST", 3)
    frames = [photo(48, 64, n) for n in range(8)]
    truth, good = video(tmp_path / "t.mkv", frames), video(tmp_path / "g.mkv", noisy(frames, 4))
    code, document, err = evaluate(good, "--gt-dir", truth, "--metrics", "psnr")
    assert code == 0, err
    assert "3 of 8 frames of each video are scored: one in 3" in err
    assert [image["frame"] for image in document["images"]] == [1, 4, 7]
    assert evaluate(good, "--gt-dir", truth, "--metrics", "psnr", "--output", tmp_path / "scores.csv")[0] == 0
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert rows[2].startswith(f'"{good}, frame 4","{truth}, frame 4",,')


def test_videos_of_other_frames_are_not_compared(tmp_path: Path) -> None:
    frames = [photo(48, 64, n) for n in range(5)]
    truth = video(tmp_path / "t.mkv", frames)
    short = video(tmp_path / "s.mkv", frames[:4])
    code, _, err = evaluate(short, "--gt-dir", truth, "--metrics", "psnr")
    assert code == 2
    assert "has 5 frames" in err
    assert "can't be paired" in err
    late = video(tmp_path / "l.mkv", frames, times=[0, 1, 3, 4, 5])
    code, _, err = evaluate(late, "--gt-dir", truth, "--metrics", "psnr")
    assert code == 2
    assert "frame 3 of" in err
