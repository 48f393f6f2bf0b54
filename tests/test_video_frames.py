"""Frames as images, and animations, as inputs and outputs of videos: by ffmpeg and Pillow."""

from __future__ import annotations

import itertools
import subprocess
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

from pdd_cli.errors import InputError, PartialFailure
from pdd_cli.imaging.encode import write_image, write_images
from pdd_cli.imaging.image import DecodedImage, ImageStream
from pdd_cli.imaging.provenance import made_by_pdd
from pdd_cli.settings.upscale import rate_of
from pdd_cli.upscaling.jobs import Job
from pdd_cli.video.frames import FrameFolder
from pdd_cli.video.pipeline import run_videos
from tests.helpers.commands import run_upscale
from tests.helpers.networks import repeating, upscaler
from tests.test_video import frames_of, packets_of, put_planes, rgb_frames, times_of, twice, write_video
from tests.test_video_options import decoded_by_ffmpeg, lossless, needs_ffmpeg, probe


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network without weights but its skip connection, which repeats each pixel twice each way."""
    network = SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=4, num_conv=1, upscale=2)
    path = tmp_path_factory.mktemp("weights") / "twice.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in network.state_dict().items()}, path)
    return path


def write_frames(folder: Path, frames: list[np.ndarray], names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / (names[number] if names else f"{number + 1:04d}.png"))
    return folder


@needs_ffmpeg
def test_a_folder_of_frames_becomes_a_video(tmp_path: Path, weights: Path) -> None:
    rgb = rgb_frames(11)
    folder = write_frames(tmp_path / "frames", rgb, [f"f{n}.png" for n in range(11)])  # f10 follows f9
    sound = write_video(tmp_path / "sound.mp4", rgb_frames(2), audio="aac", blocks=20)
    document, error = run_upscale(
        folder, tmp_path / "out.mkv", "--weights", weights, "--fps", "23.976", "--audio", sound, "--lossless"
    )
    assert error is None, document
    assert document["files"][0]["problem"] == ""
    np.testing.assert_array_equal(decoded_by_ffmpeg(tmp_path / "out.mkv"), [twice(frame) for frame in rgb])
    # In Matroska all starts with the sound, which begins before the first frame.
    begin, _ = packets_of(sound, "audio")[0]
    times = [float(time + begin) for time in times_of(tmp_path / "out.mkv")]
    assert times == pytest.approx([n * 1001 / 24_000 for n in range(11)], abs=0.0011)
    assert [data for _, data in packets_of(tmp_path / "out.mkv", "audio")] == [
        data for _, data in packets_of(sound, "audio")
    ]
    assert made_by_pdd(tmp_path / "out.mkv")

    # Without --lossless every player can show it.
    document, error = run_upscale(folder, tmp_path / "out/", "--weights", weights, "--fps", "25")
    assert error is None, document
    (stream,) = probe(tmp_path / "out/frames.mp4", "codec_name,pix_fmt,width,r_frame_rate,nb_read_packets")
    assert (stream["codec_name"], stream["pix_fmt"], stream["r_frame_rate"]) == ("h264", "yuv420p", "25/1")
    assert stream["nb_read_packets"] == "11"
    for made, frame in zip(decoded_by_ffmpeg(tmp_path / "out/frames.mp4"), rgb, strict=True):
        assert np.abs(made.astype(int) - twice(frame)).mean() < 12
    document, _ = run_upscale(folder, tmp_path / "out/", "--weights", weights, "--fps", "25")
    assert document["skipped"] == 1


def test_frames_that_make_no_video(tmp_path: Path, weights: Path) -> None:
    rgb = rgb_frames(3)
    folder = write_frames(tmp_path / "frames", rgb, ["a1.png", "a2.png", "a7.png"])
    document, error = run_upscale(folder, tmp_path / "out.mp4", "--weights", weights, "--fps", "25")
    assert error is None
    assert "frames are missing before a7.png" in document["files"][0]["problem"]
    Image.fromarray(rgb[0][:20]).save(folder / "a8.png")
    document, error = run_upscale(folder, tmp_path / "no.mp4", "--weights", weights, "--fps", "25")
    assert isinstance(error, PartialFailure)
    assert "a8.png is 32x20, the frames before it 32x24" in document["files"][0]["problem"]
    video = write_video(tmp_path / "in.mp4", rgb)
    for source, options, words in (
        (folder, [], "--fps 25"),
        (folder, ["--fps", "0"], "not a frame rate"),
        (folder, ["--fps", "25", "--audio", tmp_path / "none.mp4"], "no such file"),
        (video, ["--fps", "25"], "--fps is for folders"),
        (video, ["--audio", video], "--audio is for folders"),
    ):
        _, error = run_upscale(source, tmp_path / "no.mp4", "--weights", weights, *options)
        assert isinstance(error, InputError), error
        assert words in f"{error.message} {error.hint}"
    document, error = run_upscale(
        write_frames(tmp_path / "f", rgb), tmp_path / "no.mp4", "--weights", weights, "--fps", "25", "--audio", video
    )
    assert isinstance(error, PartialFailure)
    assert "there is no audio in it" in document["files"][0]["problem"]


def test_frame_rates() -> None:
    rates = {"25": Fraction(25), "23.976": Fraction(24_000, 1001), "29.97": Fraction(30_000, 1001), "12.5": 12.5}
    assert {text: rate_of(text) for text in rates} == rates
    assert rate_of("60000/1001") == Fraction(60_000, 1001)


def save_animation(path: Path, frames: list[np.ndarray], durations: list[int], loop: int) -> Path:
    images = [Image.fromarray(frame) for frame in frames]
    extra: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=loop, **extra)
    return path


def flat_frames(count: int, channels: int = 3) -> list[np.ndarray]:
    """Frames of few colours, which a GIF holds exactly."""
    colours = np.random.default_rng(0).integers(0, 8, (6, 4, 3)) * 32 + 8
    base = colours.repeat(4, axis=0).repeat(8, axis=1).astype(np.uint8)
    return [np.roll(base, 5 * n, axis=1)[..., :channels] for n in range(count)]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_an_animation_becomes_a_video(tmp_path: Path, weights: Path, suffix: str) -> None:
    frames, durations = flat_frames(4), [100, 250, 40, 500]
    source = save_animation(tmp_path / f"in{suffix}", frames, durations, loop=0)
    document, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights, "--lossless")
    assert error is None, document
    assert document["files"][0]["problem"] == "not kept: repetitions"
    for made, frame in zip(frames_of(tmp_path / "out.mkv"), frames, strict=True):
        np.testing.assert_array_equal(made.to_ndarray(format="rgb24"), twice(frame))
    assert times_of(tmp_path / "out.mkv") == [Fraction(n, 1000) for n in (0, 100, 350, 390)]
    document, error = run_upscale(source, tmp_path / "out/", "--weights", weights, "--format", "mp4", "--dry-run")
    assert document["files"][0]["output"].endswith("in.mp4")
    assert document["files"][0]["frames"] == 4
    assert document["files"][0]["size_out"] == [64, 48]


@pytest.mark.parametrize(
    ("first", "second"), [(".gif", ".gif"), (".png", ".gif"), (".gif", ".png"), (".webp", ".webp")]
)
@pytest.mark.parametrize("plays", [0, 3])
def test_an_animation_stays_one(tmp_path: Path, weights: Path, first: str, second: str, plays: int) -> None:
    frames, durations = flat_frames(4), [100, 250, 40, 500]
    # GIF counts repetitions, the others count plays.
    loop = plays - 1 if plays and first == ".gif" else plays
    source = save_animation(tmp_path / f"in{first}", frames, durations, loop)
    exact = ["--lossless"] if second == ".webp" else []
    document, error = run_upscale(source, tmp_path / f"out{second}", "--weights", weights, *exact)
    assert error is None, document
    assert document["files"][0]["problem"] == ""
    with Image.open(tmp_path / f"out{second}") as made:
        assert made.n_frames == 4
        for index, frame in enumerate(frames):
            made.seek(index)
            made.load()
            assert made.info["duration"] == durations[index]
            np.testing.assert_array_equal(np.asarray(made.convert("RGB")), twice(frame))
        assert made.info["loop"] == (plays - 1 if plays and second == ".gif" else plays)
    assert made_by_pdd(tmp_path / f"out{second}")


def test_a_transparent_gif_stays_one(tmp_path: Path, weights: Path) -> None:
    frames = []
    for number, frame in enumerate(flat_frames(3)):
        alpha = np.zeros((24, 32), np.uint8)
        alpha[4:16, 8 * number : 8 * number + 12] = 255
        frames.append(np.dstack([frame, alpha]))
    source = save_animation(tmp_path / "in.png", frames, [80] * 3, loop=0)
    _, error = run_upscale(source, tmp_path / "out.gif", "--weights", weights)
    assert error is None
    with Image.open(tmp_path / "out.gif") as made:
        for index, frame in enumerate(frames):
            made.seek(index)
            shown = np.asarray(made.convert("RGBA"))
            np.testing.assert_array_equal(shown[..., 3], twice(frame[..., 3]))
            visible = shown[..., 3] > 0
            # The colours of what is visible are exact, but where the model's edge meets what is not.
            assert np.abs(shown[visible][:, :3].astype(int) - twice(frame[..., :3])[visible]).mean() < 3
    # Laid on white in a video, which says so.
    document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights)
    assert "transparency (laid on white)" in document["files"][0]["left_out"]
    assert frames_of(tmp_path / "out.mp4")[0].to_ndarray(format="rgb24")[40, 60].min() > 250


def test_a_gif_is_written_frame_by_frame(tmp_path: Path) -> None:
    frames = [frame for frame in flat_frames(4) for _ in range(2)]  # each one is followed by an equal one
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def streams() -> Iterator[ImageStream]:
        nonlocal most
        for frame in frames:
            picture = DecodedImage(frame.copy())
            alive.append(weakref.ref(picture.pixels))
            yield ImageStream(picture.spec, [picture.pixels], picture.metadata, duration=33.3)
            del picture
            most = max(most, sum(one() is not None for one in alive))

    write_images(tmp_path / "a.gif", streams(), count=len(frames))
    assert most <= 1
    durations = [30, 40, 30, 30, 40, 30, 30, 40]  # in hundredths, without a sum of errors
    with Image.open(tmp_path / "a.gif") as made:
        for index, frame in enumerate(frames):
            made.seek(index)
            assert made.info["duration"] == durations[index]
            np.testing.assert_array_equal(np.asarray(made.convert("RGB")), frame)
    for decoded, frame in zip(frames_of(tmp_path / "a.gif"), frames, strict=True):
        np.testing.assert_array_equal(decoded.to_ndarray(format="rgb24"), frame)
    ends = [0, *itertools.accumulate(durations)]
    assert times_of(tmp_path / "a.gif") == [Fraction(end, 1000) for end in ends[:-1]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("transparent", [False, True])
def test_a_frame_of_a_gif_may_be_shown_for_an_hour(tmp_path: Path, transparent: bool) -> None:
    alpha = np.full(flat_frames(1)[0].shape[:2], 255, np.uint8)
    alpha[:2] = 0
    pictures = [DecodedImage(frame, alpha if transparent else None) for frame in flat_frames(2)]
    streams = [
        ImageStream(one.spec, [one.interleaved], duration=shown)
        for one, shown in zip(pictures, (3.6e6, 50), strict=True)
    ]
    write_images(tmp_path / "a.gif", streams, count=2)
    shown = [0, 0]
    with Image.open(tmp_path / "a.gif") as made:
        for index in range(made.n_frames):
            made.seek(index)
            pixels = np.asarray(made.convert("RGB"))[2:]
            (which,) = (n for n, one in enumerate(pictures) if np.array_equal(pixels, one.pixels[2:]))
            shown[which] += made.info["duration"]
    assert shown == [3_600_000, 50]


def test_black_pixels_of_a_transparent_gif_are_seen(tmp_path: Path) -> None:
    # Many colours: black is not one of the palette, and the transparent entry must not be the nearest.
    colours = np.random.default_rng(0).integers(40, 256, (64, 64, 3), np.uint8)
    colours[20, 30] = 0
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:8] = 0
    write_image(tmp_path / "a.gif", DecodedImage(colours, alpha))
    with Image.open(tmp_path / "a.gif") as made:
        np.testing.assert_array_equal(np.asarray(made.convert("RGBA"))[..., 3], alpha)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp", ".avif", ".mp4"])
def test_pages_without_times_become_frames_that_are_seen(tmp_path: Path, weights: Path, suffix: str) -> None:
    pages = [Image.fromarray(frame) for frame in rgb_frames(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    document, error = run_upscale(tmp_path / "a.tif", tmp_path / f"b{suffix}", "--weights", weights)
    assert error is None, document
    assert document["files"][0]["problem"] == "its frames have no times: each is shown for 0.1 s"
    if suffix == ".mp4":
        assert times_of(tmp_path / "b.mp4") == pytest.approx([0, 0.1, 0.2])
        return
    with Image.open(tmp_path / f"b{suffix}") as image:
        for index in range(3):
            image.seek(index)
            image.load()
            assert image.info["duration"] == 100


def test_one_image_is_no_animation(tmp_path: Path, weights: Path) -> None:
    Image.fromarray(rgb_frames(1)[0]).save(tmp_path / "a.png")
    document, error = run_upscale(tmp_path / "a.png", tmp_path / "b.mp4", "--weights", weights)
    assert isinstance(error, PartialFailure)
    assert "not an animation" in document["files"][0]["problem"]


@needs_ffmpeg
@pytest.mark.parametrize("bits", [8, 10])
def test_frames_of_a_video_are_those_of_ffmpeg_and_go_back(tmp_path: Path, weights: Path, bits: int) -> None:
    rgb = rgb_frames(6)
    if bits == 8:
        source = lossless(tmp_path / "in.mkv", rgb, audio="aac", blocks=20)
    else:
        planes = [[(frame[..., c].astype(np.uint16) << 2) + n for c in (1, 2, 0)] for n, frame in enumerate(rgb)]
        deep = [put_planes(av.VideoFrame(32, 24, "gbrp10le"), three) for three in planes]
        source = write_video(tmp_path / "in.mkv", deep, codec="ffv1", pix_fmt="gbrp10le", audio="aac", blocks=20)
    document, error = run_upscale(source, tmp_path / "out/", "--weights", weights, "--format", "png")
    assert error is None, document
    file = document["files"][0]
    assert (file["frames"], file["left_out"]) == (6, ["audio (aac)"])
    folder = tmp_path / "out/in"
    names = [f"{number:08d}.png" for number in range(1, 7)]
    assert sorted(path.name for path in folder.iterdir()) == [".pdd-frames.json", *names]
    (tmp_path / "theirs").mkdir()
    command = ["ffmpeg", "-v", "error", "-i", source, *(["-pix_fmt", "rgb48be"] if bits > 8 else [])]
    subprocess.run([*command, "-fps_mode", "passthrough", tmp_path / "theirs/%08d.png"], check=True)
    for name in names:
        ours, theirs = (cv2.imread(str(path / name), cv2.IMREAD_UNCHANGED) for path in (folder, tmp_path / "theirs"))
        assert ours.dtype == theirs.dtype == (np.uint8 if bits == 8 else np.uint16)
        # FFmpeg repeats the upper bits of 10 in the lower ones of 16: within a rounding of ours.
        assert np.abs(ours.astype(int) - twice(theirs)).max() <= (0 if bits == 8 else 64)
        assert made_by_pdd(folder / name)
    document, _ = run_upscale(source, tmp_path / "out/", "--weights", weights, "--format", "png")
    assert document["skipped"] == 1

    # And back, each pixel of each frame, with the sound.
    back = [folder, tmp_path / "back.mkv", "--weights", weights, "--fps", "25", "--audio", source, "--lossless"]
    document, error = run_upscale(*back)
    assert error is None, document
    if bits == 8:
        np.testing.assert_array_equal(decoded_by_ffmpeg(tmp_path / "back.mkv"), [twice(twice(frame)) for frame in rgb])
    assert len(packets_of(tmp_path / "back.mkv", "audio")) == len(packets_of(source, "audio"))


def test_a_name_with_two_suffixes_of_videos_becomes_a_folder_of_frames(tmp_path: Path, weights: Path) -> None:
    source = lossless(tmp_path / "holiday.mov.mkv", rgb_frames(2))
    document, error = run_upscale(source, tmp_path / "out/", "--weights", weights, "--format", "png")
    assert error is None, document
    folder = tmp_path / "out/holiday.mov_frames"
    assert sorted(path.name for path in folder.glob("*.png")) == ["00000001.png", "00000002.png"]


def test_a_folder_of_frames_is_replaced_only_if_pdd_made_it(tmp_path: Path, weights: Path) -> None:
    source = lossless(tmp_path / "in.mkv", rgb_frames(2))
    command = [source, tmp_path / "out/", "--weights", weights, "--format", "png"]
    assert run_upscale(*command)[1] is None
    document, error = run_upscale(*command, "--scale", "1")  # other settings: made again
    assert error is None
    assert document["done"] == 1
    assert Image.open(tmp_path / "out/in/00000002.png").size == (32, 24)
    (tmp_path / "out/in/mine.txt").write_text("precious")
    document, error = run_upscale(*command, "--overwrite")
    assert isinstance(error, PartialFailure)
    assert "holds mine.txt, which was not made by pdd" in document["files"][0]["problem"]
    (tmp_path / "out/in/mine.txt").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "out/in/00000001.png")
    document, error = run_upscale(*command, "--overwrite")
    assert isinstance(error, PartialFailure)
    assert "00000001.png" in document["files"][0]["problem"]
    assert Image.open(tmp_path / "out/in/00000001.png").size == (9, 9)
    (tmp_path / "other/in").mkdir(parents=True)
    document, error = run_upscale(source, tmp_path / "other/", *command[2:], "--overwrite")
    assert isinstance(error, PartialFailure)
    assert not list((tmp_path / "other/in").iterdir())
    for options, words in (([tmp_path / "x.png"], "--preview"), ([tmp_path / "o/", "--crf", "20"], "makes images")):
        _, error = run_upscale(source, *options, "--weights", weights, "--format", "png")
        assert isinstance(error, InputError)
        assert words in f"{error.message} {error.hint}"


@pytest.mark.parametrize(("target", "appearing"), [("out.mkv", "out.mkv"), ("out", "out/note.txt")])
def test_what_appears_during_the_work_is_kept(tmp_path: Path, target: str, appearing: str) -> None:
    source = lossless(tmp_path / "in.mkv", rgb_frames(2))

    def appear(done: int, total: int) -> None:
        (tmp_path / appearing).parent.mkdir(exist_ok=True)
        (tmp_path / appearing).write_bytes(b"mine")

    job = Job(source, tmp_path / target)
    (result,) = run_videos([job], upscaler(repeating(2)), recipe={}, on_tile=appear)
    assert result.status == "failed"
    assert "was not made by pdd" in result.problem
    assert (tmp_path / appearing).read_bytes() == b"mine"
    # Nothing is lost: when it is gone, the finished frames are used.
    (tmp_path / appearing).rename(tmp_path / "moved")
    if target == "out":
        (tmp_path / "out").rmdir()
    (result,) = run_videos([job], upscaler(repeating(2)), recipe={})
    assert (result.status, result.tiles) == ("done", 0)


def test_interrupted_frames_are_resumed(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lossless(tmp_path / "in.mkv", rgb_frames(8))
    command = [source, tmp_path / "out/", "--weights", weights, "--format", "png"]
    add = FrameFolder.add

    def interrupted(folder: FrameFolder, time: int, pixels: np.ndarray) -> None:
        if folder.frames == 5:
            raise KeyboardInterrupt
        add(folder, time, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(FrameFolder, "add", interrupted)
        run_upscale(*command)
    assert not (tmp_path / "out/in").exists()
    document, error = run_upscale(*command)
    assert error is None, document
    assert (document["files"][0]["frames"], document["files"][0]["tiles"]) == (8, 3)
    for number, frame in enumerate(rgb_frames(8)):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/in/{number + 1:08d}.png")), twice(frame))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["in"]
