"""Encoders, ranges, parts and previews of videos, by ffprobe and ffmpeg."""

from __future__ import annotations

import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

from pdd_cli.errors import InputError, PartialFailure
from pdd_cli.imaging.provenance import made_by_pdd
from tests.helpers.commands import run_upscale
from tests.test_video import frames_of, packets_of, rgb_frames, times_of, twice, write_video

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network without weights but its skip connection, which repeats each pixel twice each way."""
    network = SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=4, num_conv=1, upscale=2)
    path = tmp_path_factory.mktemp("weights") / "twice.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in network.state_dict().items()}, path)
    return path


def lossless(path: Path, frames: list[np.ndarray], **more: Any) -> Path:
    """A video whose frames are exactly these."""
    packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in frames]
    return write_video(path, packed, codec="ffv1", pix_fmt="bgr0", **more)


def probe(path: Path, entries: str) -> list[dict[str, Any]]:
    command = ["ffprobe", "-v", "error", "-count_packets", "-show_entries", f"stream={entries}", "-of", "json", path]
    streams = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["streams"]
    return [stream for stream in streams if stream.get("width", 1)]


def decoded_by_ffmpeg(path: Path, *options: str) -> np.ndarray:
    """(n, h, w, 3) of 8 bits."""
    size = probe(path, "width,height")[0]
    command = ["ffmpeg", "-v", "error", *options, "-i", path, "-fps_mode", "passthrough", "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, size["height"], size["width"], 3)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("a.mp4", ["--encoder", "libx265", "--crf", 40, "--preset", "ultrafast"], ("hevc", "yuv420p")),
        ("a.mkv", ["--encoder", "mpeg4", "--quality", 50], ("mpeg4", "yuv420p")),
        ("a.mov", ["--encoder", "prores_ks"], ("prores", "yuv422p10le")),
        ("a.webm", ["--crf", 50, "--preset", "8"], ("vp9", "yuv420p")),
        ("a.mkv", ["--encoder", "ffv1"], ("ffv1", "yuv420p")),
    ],
)
def test_encoders(tmp_path: Path, weights: Path, name: str, options: list[Any], expected: tuple[str, str]) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(4))
    document, error = run_upscale(source, tmp_path / name, "--weights", weights, *options)
    assert error is None, document
    (stream,) = probe(tmp_path / name, "codec_name,pix_fmt,nb_read_packets")
    assert (stream["codec_name"], stream["pix_fmt"]) == expected
    assert stream["nb_read_packets"] == "4"
    assert times_of(tmp_path / name) == times_of(source)
    for frame, original in zip(frames_of(tmp_path / name), frames_of(source), strict=True):
        difference = frame.to_ndarray(format="rgb24").astype(int) - twice(original.to_ndarray(format="rgb24"))
        assert np.abs(difference).mean() < 12


def test_the_rate_factor_is_the_encoder_s(tmp_path: Path, weights: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), np.uint8)
    source = lossless(tmp_path / "in.mkv", list(noise))
    sizes = {}
    for crf in (5, 45):
        _, error = run_upscale(source, tmp_path / f"{crf}.mp4", "--weights", weights, "--crf", crf)
        assert error is None
        data = (tmp_path / f"{crf}.mp4").read_bytes()
        assert f"crf={crf}.0".encode() in data  # x264 writes its settings
        sizes[crf] = len(data)
    assert sizes[5] > 2 * sizes[45]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--encoder", "libx999"], ["no encoder libx999", "libx264"]),
        (["--encoder", "aac"], ["encodes audio"]),
        (["--encoder", "libx264", "--preset", "quickly"], ["no preset quickly"]),
        (["--preset", "quickly"], ["the encoder libx264 has no preset quickly"]),
        (["--encoder", "mpeg4", "--preset", "fast"], ["no --preset"]),
        (["--encoder", "mpeg4", "--crf", "20"], ["no --crf"]),
        (["--encoder", "h264_v4l2m2m"], ["h264_v4l2m2m"]),
        (["--encoder", "prores_ks"], [".mp4 can't hold prores"]),
        (["--encoder", "libx264", "--lossless"], ["can't be combined"]),
        (["--start", "1:xx"], ["1:xx is not a time"]),
        (["--start", "0:10", "--end", "9"], ["--end 9 is not after --start 0:10"]),
        (["--crop", "10x10"], ["crop"]),
        (["--preview", "1", "--crf", "20"], ["can't be combined"]),
    ],
)
def test_bad_options_are_rejected_before_the_work(
    tmp_path: Path, weights: Path, options: list[str], words: list[str]
) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(2))
    _, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights, *options)
    assert isinstance(error, InputError), error
    for word in words:
        assert word in f"{error.message} {error.hint}"
    assert not (tmp_path / "out.mp4").exists()


def test_options_of_videos_need_one(tmp_path: Path, weights: Path) -> None:
    Image.fromarray(rgb_frames(1)[0]).save(tmp_path / "a.png")
    _, error = run_upscale(tmp_path / "a.png", tmp_path / "b.png", "--weights", weights, "--crf", "20")
    assert isinstance(error, InputError)
    assert "--crf is for videos" in error.message
    frames = [Image.fromarray(frame) for frame in rgb_frames(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    for option in (["--deinterlace"], ["--preview", "0.1"]):
        _, error = run_upscale(tmp_path / "a.gif", tmp_path / "b.mp4", "--weights", weights, *option)
        assert isinstance(error, InputError)
        assert f"{option[0]} is for videos; {tmp_path / 'a.gif'} is not a video" in error.message


@needs_ffmpeg
@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("0.2", "0.48", range(5, 12)),
        ("00:00:00.410", None, range(11, 30)),
        (None, "0.2", range(0, 5)),
        ("8", "99", None),
    ],
)
def test_a_range_of_time(
    tmp_path: Path, weights: Path, start: str | None, end: str | None, expected: range | None
) -> None:
    if expected is None:  # far from the start, where decoding begins at a keyframe
        source = write_video(tmp_path / "in.mp4", rgb_frames(230), options={"g": "20"}, audio="aac", blocks=400)
        expected = range(200, 230)
    else:
        source = write_video(tmp_path / "in.mp4", rgb_frames(30), audio="aac", blocks=60)
    options = [*(["--start", start] if start else []), *(["--end", end] if end else [])]
    document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights, "--quality", 100, *options)
    assert error is None, document
    assert document["files"][0]["problem"] == ""
    first = Fraction(start.split(":")[-1]) if start else Fraction(0)
    unit = Fraction(1, 12_800)
    assert times_of(tmp_path / "out.mp4") == [Fraction(n, 25) - round(first / unit) * unit for n in expected]
    # The frames repeat after 32.
    originals = [twice(frame.to_ndarray(format="rgb24")).astype(int) for frame in frames_of(source)]
    for frame, number in zip(frames_of(tmp_path / "out.mp4"), expected, strict=True):
        made = frame.to_ndarray(format="rgb24")
        assert min(range(len(originals[:32])), key=lambda n: np.abs(originals[n] - made).mean()) == number % 32
    # The sound is that of the range, at the same place.
    last = Fraction(expected.stop, 25) if end is None else Fraction(end)
    audio = packets_of(source, "audio")
    wanted = [(time - first, data) for time, data in audio if not start or time >= first]
    wanted = [(time, data) for time, data in wanted if not end or time < last - first]
    sound = packets_of(tmp_path / "out.mp4", "audio")
    assert [data for _, data in sound] == [data for _, data in wanted]
    assert all(abs(a - b) < Fraction(1, 1000) for (a, _), (b, _) in zip(sound, wanted, strict=True))
    dry, _ = run_upscale(source, tmp_path / "dry.mp4", "--weights", weights, "--dry-run", *options)
    assert abs(dry["files"][0]["frames"] - len(expected)) <= 1


def test_a_range_without_frames(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(10))
    for options, words in ((["--start", "7"], "after its end"), (["--start", "0.11", "--end", "0.115"], "no frame")):
        document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights, *options)
        assert isinstance(error, PartialFailure)
        assert words in document["files"][0]["problem"]
        assert not (tmp_path / "out.mp4").exists()


@needs_ffmpeg
def test_chapters_and_subtitles_of_a_range(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mkv", rgb_frames(20), subtitles=True, kept=True)
    options = ["--start", "0.2", "--end", "0.56"]
    _, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights, *options)
    assert error is None
    with av.open(str(tmp_path / "out.mkv")) as container:
        (chapter,) = container.chapters()
        assert (chapter["start"] * chapter["time_base"], chapter["end"] * chapter["time_base"]) == (0, Fraction(1, 10))
        times = [(p.pts, p.duration) for p in container.demux(subtitles=0) if p.size]
    assert times == [(0, 100), (200, 200)]  # of 100 to 300 and 400 to 600 ms


@needs_ffmpeg
def test_a_part_of_each_frame(tmp_path: Path, weights: Path) -> None:
    rgb = rgb_frames(3)
    source = lossless(tmp_path / "in.mkv", rgb)
    options = ["--weights", weights, "--lossless", "--crop", "10x8+5+6"]
    document, error = run_upscale(source, tmp_path / "out.mkv", *options)
    assert error is None, document
    assert (document["files"][0]["size_in"], document["files"][0]["size_out"]) == ([10, 8], [20, 16])
    expected = [twice(frame[6:14, 5:15]) for frame in rgb]
    np.testing.assert_array_equal(decoded_by_ffmpeg(tmp_path / "out.mkv"), expected)
    # A turned video is cropped as it is seen.
    turned = write_video(tmp_path / "turned.mp4", rgb_frames(2), kept=True)
    document, error = run_upscale(turned, tmp_path / "t.mp4", "--weights", weights, "--crop", "8x20+2+4")
    assert error is None
    assert document["files"][0]["size_out"] == [16, 40]
    assert (frames_of(tmp_path / "t.mp4")[0].width, frames_of(tmp_path / "t.mp4")[0].height) == (40, 16)
    document, error = run_upscale(source, tmp_path / "no.mkv", *options[:3], "--crop", "30x8+5+6")
    assert isinstance(error, PartialFailure)
    assert "not inside the frames, which are 32x24" in document["files"][0]["problem"]


@needs_ffmpeg
def test_one_frame_as_an_image(tmp_path: Path, weights: Path) -> None:
    rgb = rgb_frames(150)
    source = lossless(tmp_path / "in.mkv", rgb)
    for at, number in (("0", 0), ("0.1", 2), ("00:00:05.5", 137), ("5.99", 149)):
        target = tmp_path / f"{number}.png"
        document, error = run_upscale(source, target, "--weights", weights, "--preview", at)
        assert error is None, document
        np.testing.assert_array_equal(np.asarray(Image.open(target)), twice(rgb[number]))
        assert made_by_pdd(target)
        assert f"the frame at {number / 25:.3f} s" in document["files"][0]["problem"]
    document, _ = run_upscale(source, tmp_path / "folder/", "--weights", weights, "--preview", "1", "--dry-run")
    assert document["files"][0]["output"].endswith("folder/in.png")
    assert document["files"][0]["size_out"] == [64, 48]
    document, error = run_upscale(source, tmp_path / "x.png", "--weights", weights, "--preview", "30")
    assert isinstance(error, PartialFailure)
    assert "--preview 30 is after its end" in document["files"][0]["problem"]
    _, error = run_upscale(source, tmp_path / "x.mp4", "--weights", weights, "--preview", "3")
    assert isinstance(error, InputError)


def test_lossless_images_of_a_video_are_not_written_as_jpeg(tmp_path: Path, weights: Path) -> None:
    source = lossless(tmp_path / "in.mkv", rgb_frames(2))
    for target, options in (("x.jpg", ["--preview", "0"]), ("folder/", ["--format", "jpg"])):
        document, error = run_upscale(source, tmp_path / target, "--weights", weights, "--lossless", *options)
        assert isinstance(error, PartialFailure)
        assert "can't be written losslessly" in document["files"][0]["problem"]
    assert not list(tmp_path.rglob("*.jpg"))


@needs_ffmpeg
def test_the_last_frame_of_a_program_stream(tmp_path: Path, weights: Path) -> None:
    """FFmpeg takes the duration of its video from the last time in it, which frames follow."""
    source = tmp_path / "in.mpg"
    made = ["-f", "lavfi", "-i", "testsrc=size=32x24:rate=10:duration=3", "-f", "lavfi", "-i", "sine=duration=3"]
    subprocess.run(["ffmpeg", "-v", "error", *made, "-c:v", "mpeg2video", "-bf", "2", source], check=True)
    _, error = run_upscale(source, tmp_path / "a.png", "--weights", weights, "--preview", "2.85")
    assert error is None


@needs_ffmpeg
def test_transparency_that_the_decoder_drops_is_named(tmp_path: Path, weights: Path) -> None:
    source = tmp_path / "in.webm"
    made = ["-f", "lavfi", "-i", "testsrc=size=32x24:rate=10:duration=0.3", "-vf", "format=yuva420p"]
    subprocess.run(["ffmpeg", "-v", "error", *made, "-c:v", "libvpx-vp9", source], check=True)
    document, error = run_upscale(source, tmp_path / "out.webm", "--weights", weights, "--dry-run")
    assert error is None
    assert document["files"][0]["left_out"] == ["transparency"]


def test_equal_frames_are_computed_once(tmp_path: Path, weights: Path) -> None:
    rgb = rgb_frames(4)
    order = [0, 0, 0, 1, 1, 2, 0, 3, 3]
    source = lossless(tmp_path / "in.mkv", [rgb[n] for n in order])
    document, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights, "--lossless")
    assert error is None
    assert (document["files"][0]["frames"], document["files"][0]["tiles"]) == (9, 5)
    for frame, number in zip(frames_of(tmp_path / "out.mkv"), order, strict=True):
        np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), twice(rgb[number]))


def test_other_options_make_another_output(tmp_path: Path, weights: Path) -> None:
    write_video(tmp_path / "in/a.mp4", rgb_frames(6))
    command = [tmp_path / "in", tmp_path / "out", "--weights", weights]
    for options, count in (([], 6), (["--end", "0.1"], 3), (["--end", "0.1", "--crf", "30"], 3), ([], 6)):
        document, error = run_upscale(*command, *options)
        assert error is None
        assert document["done"] == 1
        assert len(frames_of(tmp_path / "out/a.mp4")) == count
    document, _ = run_upscale(*command)
    assert document["skipped"] == 1


def interlaced(path: Path) -> Path:
    """A video whose fields show a bar at different places, marked as interlaced, top field first."""
    frames = []
    for number in range(8):
        rgb = np.full((48, 64, 3), 40, np.uint8)
        for field in (0, 1):
            left = 4 + 6 * number + 3 * field
            rgb[field::2, left : left + 8] = 200
        frames.append(rgb)
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=64, height=48, format="yuv420p", time_base=Fraction(1, 25)),
        graph.add("setfield", "tff"),
        graph.add("buffersink"),
    ).configure()
    marked = []
    for number, rgb in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(rgb).reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        graph.push(frame)
        marked.append(graph.pull())
    return write_video(path, marked, codec="mpeg2video", flags=0x20040000, options={"qscale": "1", "g": "1"})


def comb(frame: np.ndarray) -> float:
    """How much neighbouring lines differ."""
    return float(np.abs(np.diff(frame[..., 1].astype(float), axis=0)).mean())


@needs_ffmpeg
def test_fields_become_whole_frames(tmp_path: Path, weights: Path) -> None:
    source = interlaced(tmp_path / "in.mkv")
    made = {}
    for name, options in (("plain", []), ("whole", ["--deinterlace"])):
        target = tmp_path / f"{name}.mkv"
        document, error = run_upscale(source, target, "--weights", weights, "--lossless", *options)
        assert error is None, document
        assert ("interlaced, which will be visible" in document["files"][0]["problem"]) == (name == "plain")
        made[name] = decoded_by_ffmpeg(target)
        assert times_of(target) == times_of(source)
    theirs = subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            source,
            "-vf",
            "bwdif=mode=send_frame",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "gray",
            "-",
        ],
        capture_output=True,
        check=True,
    ).stdout
    expected = np.frombuffer(theirs, np.uint8).reshape(8, 48, 64).astype(int)
    for number in range(1, 7):  # FFmpeg's versions differ in the first and the last one
        assert comb(made["whole"][number]) < comb(made["plain"][number]) / 3
        luma = made["whole"][number][::2, ::2].astype(int) @ [299, 587, 114] // 1000
        assert np.abs(luma - expected[number]).mean() < 2
    document, error = run_upscale(
        write_video(tmp_path / "p.mp4", rgb_frames(3)), tmp_path / "p.mkv", "--weights", weights, "--deinterlace"
    )
    assert "not marked as interlaced" in document["files"][0]["problem"]
    assert len(frames_of(tmp_path / "p.mkv")) == 3


@needs_ffmpeg
@pytest.mark.parametrize(("codec", "name", "expected"), [("wavpack", "out.mp4", "aac"), ("aac", "out.webm", "opus")])
def test_audio_is_converted_if_asked(tmp_path: Path, weights: Path, codec: str, name: str, expected: str) -> None:
    source = write_video(tmp_path / "in.mkv", rgb_frames(20), audio=codec, blocks=40)
    options = ["--weights", weights, "--keep-audio", "convert"]
    document, error = run_upscale(source, tmp_path / name, *options)
    assert error is None, document
    assert f"its audio ({codec}) is converted to" in document["files"][0]["problem"]
    command = ["ffprobe", "-v", "error", "-select_streams", "a", "-show_entries", "stream=codec_name,channels", "-of"]
    found = json.loads(subprocess.run([*command, "json", tmp_path / name], capture_output=True, check=True).stdout)
    assert found["streams"] == [{"codec_name": expected, "channels": 2}]

    def sound(path: Path) -> np.ndarray:
        raw = ["ffmpeg", "-v", "error", "-i", path, "-map", "0:a", "-f", "f32le", "-ar", "48000", "-ac", "1", "-"]
        return np.frombuffer(subprocess.run(raw, capture_output=True, check=True).stdout, np.float32)

    before, after = sound(source), sound(tmp_path / name)
    assert abs(len(before) - len(after)) < 3000
    # The same tone, which repeats after 126 samples, and begins when it did but for the padding of an encoder.
    tones = [np.corrcoef(before[10_000:30_000], after[10_000 + shift : 30_000 + shift])[0, 1] for shift in range(126)]
    assert max(tones) > 0.98
    begins = [packets_of(path, "audio")[0][0] - times_of(path)[0] for path in (source, tmp_path / name)]
    assert abs(begins[0] - begins[1]) < Fraction(3, 100)
    # A track that the container holds is copied.
    _, error = run_upscale(source, tmp_path / "same.mkv", *options)
    assert error is None
    assert [data for _, data in packets_of(tmp_path / "same.mkv", "audio")] == [
        data for _, data in packets_of(source, "audio")
    ]
    # Of a range, the sound of the range.
    _, error = run_upscale(source, tmp_path / f"part-{name}", *options, "--start", "0.2", "--end", "0.6")
    assert error is None
    assert abs(len(sound(tmp_path / f"part-{name}")) / 48_000 - 0.4) < 0.08
