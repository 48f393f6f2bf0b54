"""Videos against what PyAV reads of them, formulas in NumPy, and a network that repeats each pixel twice each way."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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

from pdd_cli.batch.devices import partition
from pdd_cli.batch.plan import plan_jobs
from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.errors import InputError, PartialFailure, PddError, ResourceError
from pdd_cli.imaging.encode import Encoding
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.imaging.provenance import made_by_pdd, source_of
from pdd_cli.last_run import read_last_run
from pdd_cli.models.loading import load_sr_model
from pdd_cli.ranks import Ranks
from pdd_cli.runtime import Runtime
from pdd_cli.upscaling.jobs import Job, Output
from pdd_cli.upscaling.manifest import NAME as MANIFEST
from pdd_cli.upscaling.upscaler import Upscaler, UpscaleResult
from pdd_cli.video import decode as clips
from pdd_cli.video import pipeline
from pdd_cli.video.pipeline import PART_FRAMES, run_videos
from pdd_cli.video.yuv import Coding, from_rgb, to_rgb
from tests.helpers.commands import Hold, run_upscale
from tests.helpers.images import psnr

WIDTH, HEIGHT = 32, 24
MATRICES = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # BT.709, 601, 2020, by H.273's numbers
TURNED = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # a display matrix: a quarter turn
SUBTITLES = "1\n00:00:00,100 --> 00:00:00,300\nOne\n\n2\n00:00:00,400 --> 00:00:00,600\nZwei, größer\n"


@pytest.fixture
def weights(tmp_path: Path, home: Path) -> Path:
    """A network without weights but its skip connection, which repeats each pixel twice each way."""
    network = SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=4, num_conv=1, upscale=2)
    path = tmp_path / "twice.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in network.state_dict().items()}, path)
    return path


def smooth(seed: int, low: float = 0, high: float = 255, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """(h, w) that changes slowly, in `low`..`high`."""
    coarse = np.random.default_rng(seed).uniform(low, high, (3, 4)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))


def rgb_frames(count: int) -> list[np.ndarray]:
    """(h, w, 3) of 8 bits each, all different."""
    base = np.dstack([smooth(seed, 40, 200) for seed in range(3)])
    return [np.rint(np.roll(base, n, axis=1)).astype(np.uint8) for n in range(count)]


def put_planes(frame: av.VideoFrame, planes: Sequence[np.ndarray]) -> av.VideoFrame:
    for target, plane in zip(frame.planes, planes, strict=True):
        rows = np.zeros((target.height, target.line_size // plane.dtype.itemsize), plane.dtype)
        rows[: plane.shape[0], : plane.shape[1]] = plane
        target.update(rows.tobytes())
    return frame


def get_planes(frame: av.VideoFrame) -> list[np.ndarray]:
    kind = np.dtype("<u2" if frame.format.components[0].bits > 8 else "u1")
    planes = []
    for source in frame.planes:
        rows = np.frombuffer(bytes(source), kind).reshape(source.height, source.line_size // kind.itemsize)
        planes.append(rows[:, : source.width].astype(np.float64))
    return planes


def write_video(
    path: Path,
    frames: Sequence[np.ndarray | av.VideoFrame],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    audio: str = "",
    subtitles: bool = False,
    kept: bool = False,
    options: dict[str, str] | None = None,
    blocks: int = 30,
    **context: Any,
) -> Path:
    """A video of RGB arrays or frames; `kept`: with a rotation, pixel aspect, chapters and tags.

    `options` of its encoder; `blocks` of audio, 21 ms each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options)
        first = frames[0]
        size = (first.width, first.height) if isinstance(first, av.VideoFrame) else (first.shape[1], first.shape[0])
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = time_base
        for key, value in context.items():
            setattr(stream.codec_context, key, value)
        sound = out.add_stream(audio, rate=48_000, bit_rate=128_000) if audio else None
        text = None
        if subtitles:
            (path.parent / "s.srt").write_text(SUBTITLES, encoding="utf-8")
            text = av.open(str(path.parent / "s.srt"))
            written = out.add_stream_from_template(text.streams[0])
            written.metadata["language"] = "deu"
        if kept:
            stream.codec_context.sample_aspect_ratio = Fraction(40, 33)
            stream.set_display_matrix(TURNED)
            out.metadata["title"] = "A title"
            chapter = {"id": 1, "start": 0, "end": 300, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}}
            out.set_chapters([chapter])
        for number, content in enumerate(frames):
            frame = content if isinstance(content, av.VideoFrame) else av.VideoFrame.from_ndarray(content)
            frame.pts, frame.time_base = (times[number] if times else number), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            wave = np.sin(np.arange(1024 * blocks) / 20).astype(np.float32)
            for number in range(blocks):
                block = wave[None, number * 1024 : (number + 1) * 1024].repeat(2, axis=0)
                tone = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
                tone.sample_rate, tone.pts = 48_000, number * 1024
                out.mux(sound.encode(tone))
            out.mux(sound.encode(None))
        if text is not None:
            for packet in text.demux():
                if packet.size:
                    packet.stream = written
                    out.mux(packet)
    return path


def frames_of(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def times_of(path: Path) -> list[Fraction]:
    return [frame.pts * frame.time_base for frame in frames_of(path)]  # type: ignore[operator]


def packets_of(path: Path, kind: str) -> list[tuple[Fraction, str]]:
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        packets = [packet for packet in container.demux(streams[0]) if packet.size] if streams else []
        return [(p.pts * p.time_base, hashlib.md5(bytes(p)).hexdigest()) for p in packets]


def twice(plane: np.ndarray) -> np.ndarray:
    return plane.repeat(2, axis=0).repeat(2, axis=1)


# --- colours ----------------------------------------------------------------------------------------------------


def reference_rgb(planes: Sequence[np.ndarray], matrix: int, bits: int, full: bool) -> np.ndarray:
    """(h, w, 3) in 0..1 from planes of one size, by BT.601's, 709's and 2020's own words."""
    red, blue = MATRICES[matrix]
    unit = 1 << (bits - 8)
    y, cb, cr = (np.asarray(plane, np.float64) for plane in planes)
    if full:
        y, cb, cr = (y / (256 * unit - 1), *((c - 128 * unit) / (256 * unit - 1) for c in (cb, cr)))
    else:
        y, cb, cr = ((y - 16 * unit) / (219 * unit), *((c - 128 * unit) / (224 * unit) for c in (cb, cr)))
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.dstack([r, (y - red * r - blue * b) / (1 - red - blue), b]).clip(0, 1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("matrix", MATRICES)
def test_conversion_is_that_of_the_standard(matrix: int, bits: int, full: bool) -> None:
    unit, kind = 1 << (bits - 8), np.uint8 if bits == 8 else np.uint16
    planes = [smooth(0, 90 * unit, 180 * unit), smooth(1, 110 * unit, 145 * unit), smooth(2, 110 * unit, 145 * unit)]
    planes = [plane.astype(kind) for plane in planes]
    coding = Coding(*MATRICES[matrix], bits, full)
    rgb = to_rgb(planes, coding)
    assert np.abs(rgb - reference_rgb(planes, matrix, bits, full) * 65_535).max() <= 0.51
    for back, plane in zip(from_rgb(rgb, coding, (1, 1)), planes, strict=True):
        assert back.dtype == plane.dtype
        np.testing.assert_array_equal(back, plane)


def test_halved_chroma_stays_where_it_is() -> None:
    coding = Coding(*MATRICES[1], 16, False)
    ramp = np.tile(np.linspace(20_000, 45_000, 64), (16, 1))
    rgb = np.dstack([ramp, np.full_like(ramp, 30_000), ramp[:, ::-1]]).astype(np.uint16)
    for chroma in ((2, 1), (2, 2)):
        back = to_rgb(from_rgb(rgb, coding, chroma), coding).astype(int)
        assert np.abs(back - rgb)[:, 4:-4].max() <= 4  # half a pixel aside would be 200
    gray = np.repeat(ramp[:, :, None], 3, axis=2).astype(np.uint16)
    for plane in from_rgb(gray, coding, (2, 2))[1:]:
        assert (plane == 1 << 15).all()


@pytest.mark.parametrize("factors", [(2, 2), (2, 1), (4, 1), (1, 2)])
@pytest.mark.parametrize("site", [(0, 0.5), (0.5, 0.5), (0, 0), (0.5, 0), (0, 1), (0.5, 1)])
def test_chroma_is_read_where_it_lies(site: tuple[float, float], factors: tuple[int, int]) -> None:
    coding = Coding(*MATRICES[1], 16, True)
    x, y = (np.arange(64 // factor) * factor + at * (factor - 1) for factor, at in zip(factors, site, strict=True))
    ramp = 20_000 + 150.0 * x + 250.0 * y[:, None]
    neutral = np.full_like(ramp, 1 << 15)
    luma = np.full((64, 64), 30_000, np.uint16)
    rgb = to_rgb([luma, ramp.astype(np.uint16), neutral.astype(np.uint16)], coding, site).astype(float)
    blue = (rgb[..., 2] - 30_000) / (2 * (1 - MATRICES[1][1])) + (1 << 15)
    expected = 20_000 + 150.0 * np.arange(64) + 250.0 * np.arange(64)[:, None]
    assert np.abs(blue - expected)[8:-8, 8:-8].max() < 2  # half a sample aside would be 75


def test_the_chroma_site_of_a_file_is_heeded(tmp_path: Path, weights: Path) -> None:
    y = np.arange(0, HEIGHT, 2)
    plane = np.repeat((100 + 3 * y)[:, None], WIDTH // 2, axis=1).astype(np.uint8)
    planes = [np.full((HEIGHT, WIDTH), 120, np.uint8), plane, np.full_like(plane, 128)]
    made = {}
    for site, options in (("topleft", {"chroma_sample_location": "topleft"}), ("left", {})):
        frames = [put_planes(av.VideoFrame(WIDTH, HEIGHT, "yuv420p"), planes)]
        source = write_video(tmp_path / f"{site}.mkv", frames, options={"qp": "0", **options})
        run_upscale(source, tmp_path / f"out/{site}.mkv", "--weights", weights, "--lossless")
        made[site] = frames_of(tmp_path / f"out/{site}.mkv")[0].to_ndarray(format="rgb24")[::2, 8, 2].astype(float)
    # Sited half a row higher, the same samples are those of half a row further up.
    step = np.diff(made["left"])[4:-4].mean()
    assert (made["left"] - made["topleft"])[4:-4].mean() == pytest.approx(-step / 2, abs=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p", "yuv422p10le"])
@pytest.mark.parametrize(("matrix", "codes"), [(1, 1), (6, 1), (6, 2), (9, 1)])
def test_colours_of_a_video_stay(tmp_path: Path, weights: Path, pix_fmt: str, matrix: int, codes: int) -> None:
    bits = 10 if "10" in pix_fmt else 8
    unit, kind = 1 << (bits - 8), np.uint8 if bits == 8 else np.uint16
    w, h = WIDTH // (1 if "444" in pix_fmt else 2), HEIGHT // (2 if "420" in pix_fmt else 1)
    planes = [smooth(0, 80 * unit, 190 * unit), *(smooth(n, 100 * unit, 155 * unit, (w, h)) for n in (1, 2))]
    planes = [np.rint(plane).astype(kind) for plane in planes]
    source = [put_planes(av.VideoFrame(WIDTH, HEIGHT, pix_fmt), planes)] * 3
    tags = {"colorspace": matrix, "color_range": codes, "color_primaries": 9, "color_trc": 14}
    write_video(tmp_path / "in.mkv", source, codec="ffv1", pix_fmt=pix_fmt, **tags)
    document, error = run_upscale(tmp_path / "in.mkv", tmp_path / "out.mp4", "--weights", weights, "--quality", 100)
    assert error is None, document
    frame = frames_of(tmp_path / "out.mp4")[1]
    assert frame.format.name.replace("yuvj", "yuv") == pix_fmt
    assert {key: getattr(frame, key) for key in tags} == tags
    for ours, plane in zip(get_planes(frame), planes, strict=True):
        assert psnr(ours, twice(plane.astype(np.float64)), 255 * unit) > 38
        assert abs(ours.mean() - plane.mean()) < 0.5 * unit

    # By the exact way out the network's pixels are those of the formula.
    if pix_fmt == "yuv444p":
        run_upscale(tmp_path / "in.mkv", tmp_path / "exact.mkv", "--weights", weights, "--lossless")
        exact = frames_of(tmp_path / "exact.mkv")[0].to_ndarray(format="rgb24")
        expected = np.rint(reference_rgb(planes, matrix, 8, codes == 2) * 255)
        assert np.abs(exact - twice(expected)).max() <= 1


def test_untagged_colours_are_those_of_the_size_and_then_tagged(tmp_path: Path, weights: Path) -> None:
    write_video(tmp_path / "in.mp4", rgb_frames(2))
    run_upscale(tmp_path / "in.mp4", tmp_path / "out.mp4", "--weights", weights, "--height", 720)
    assert frames_of(tmp_path / "in.mp4")[0].colorspace == 2
    # Players take BT.601 for the small input, and would take BT.709 for the large output.
    assert frames_of(tmp_path / "out.mp4")[0].colorspace == 6


@pytest.mark.slow
def test_gray_stays_gray_and_lossless_is(tmp_path: Path, weights: Path) -> None:
    gray = [np.rint(smooth(n, 20, 230)).astype(np.uint8) for n in range(3)]
    frames = [av.VideoFrame.from_ndarray(plane, format="gray") for plane in gray]
    write_video(tmp_path / "gray.mkv", frames, codec="ffv1", pix_fmt="gray")
    run_upscale(tmp_path / "gray.mkv", tmp_path / "out/gray.mkv", "--weights", weights)
    for frame in frames_of(tmp_path / "out/gray.mkv"):
        _, cb, cr = get_planes(frame)
        assert (cb == 128).all()
        assert (cr == 128).all()
    # Without a tag gray has all codes: black is 0, white 255.
    levels = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    write_video(
        tmp_path / "levels.mkv", [av.VideoFrame.from_ndarray(levels, format="gray")], codec="ffv1", pix_fmt="gray"
    )
    run_upscale(tmp_path / "levels.mkv", tmp_path / "exact.mkv", "--weights", weights, "--lossless")
    np.testing.assert_array_equal(
        frames_of(tmp_path / "exact.mkv")[0].to_ndarray(format="rgb24")[..., 0], twice(levels)
    )

    rgb = rgb_frames(5)
    packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in rgb]
    write_video(tmp_path / "rgb.mkv", packed, codec="ffv1", pix_fmt="bgr0")
    document, error = run_upscale(tmp_path / "rgb.mkv", tmp_path / "out/", "--weights", weights, "--lossless")
    assert error is None, document
    for frame, expected in zip(frames_of(tmp_path / "out/rgb.mkv"), rgb, strict=True):
        np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), twice(expected))
    document, error = run_upscale(tmp_path / "rgb.mkv", tmp_path / "out/no.mp4", "--weights", weights, "--lossless")
    assert isinstance(error, PartialFailure)
    assert "losslessly" in document["files"][0]["problem"]


@pytest.mark.parametrize(("pix_fmt", "plain"), [("nv12", "yuv420p"), ("yuyv422", "yuv422p")])
def test_arrangements_of_planes(tmp_path: Path, weights: Path, pix_fmt: str, plain: str) -> None:
    made = {}
    for name in (pix_fmt, plain):
        frames = [av.VideoFrame.from_ndarray(frame).reformat(format=plain) for frame in rgb_frames(2)]
        frames = [frame.reformat(format=name) for frame in frames]
        write_video(tmp_path / "a.nut", frames, codec="rawvideo", pix_fmt=name)
        (tmp_path / "a.nut").rename(tmp_path / f"{name}.avi")
        _, error = run_upscale(tmp_path / f"{name}.avi", tmp_path / "a.mkv", "--weights", weights, "--lossless")
        assert error is None
        made[name] = [frame.to_ndarray(format="rgb24") for frame in frames_of(tmp_path / "a.mkv")]
        (tmp_path / "a.mkv").unlink()
    np.testing.assert_array_equal(made[pix_fmt], made[plain])


@pytest.mark.parametrize("pix_fmt", ["rgb24", "bgra", "gbrp", "pal8"])
def test_arrangements_of_rgb(tmp_path: Path, weights: Path, pix_fmt: str) -> None:
    if pix_fmt == "pal8":
        palette = np.random.default_rng(0).integers(0, 256, (256, 4), np.uint8)
        palette[:, 0] = 255  # alpha
        index = smooth(0).astype(np.uint8)
        frames, rgb = [av.VideoFrame.from_ndarray((index, palette), format="pal8")], palette[index][..., 1:]
    else:
        rgb = rgb_frames(1)[0]
        frames = [av.VideoFrame.from_ndarray(rgb).reformat(format=pix_fmt)]
    write_video(tmp_path / "a.nut", frames, codec="rawvideo", pix_fmt=pix_fmt)
    (tmp_path / "a.nut").rename(tmp_path / "a.avi")
    _, error = run_upscale(tmp_path / "a.avi", tmp_path / "a.mkv", "--weights", weights, "--lossless")
    assert error is None
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv")[0].to_ndarray(format="rgb24"), twice(rgb))


# --- what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_everything_but_the_frames_is_kept(tmp_path: Path, weights: Path, suffix: str) -> None:
    unit = Fraction(1, 1000) if suffix == ".mkv" else Fraction(1, 12_800)
    times = [round(Fraction(t, 1000) / unit) for t in (0, 40, 80, 200, 210, 230, 400, 440, 480, 700)]
    source = write_video(
        tmp_path / f"in{suffix}",
        rgb_frames(10),
        times=times,
        time_base=unit,
        audio="aac",
        subtitles=suffix == ".mkv",
        kept=True,
    )
    target = tmp_path / f"out{suffix}"
    document, error = run_upscale(source, target, "--weights", weights)
    assert error is None, document
    file = document["files"][0]
    assert (file["frames"], file["problem"]) == (10, "")
    # A quarter turn: sizes are reported as they are seen.
    assert (file["size_in"], file["size_out"]) == ([HEIGHT, WIDTH], [2 * HEIGHT, 2 * WIDTH])

    assert times_of(target) == times_of(source) == [t * unit for t in times]
    for kind in ("audio", "subtitle"):
        assert packets_of(target, kind) == packets_of(source, kind)
    assert len(packets_of(target, "audio")) > 25
    assert len(packets_of(target, "subtitle")) == (2 if suffix == ".mkv" else 0)
    with av.open(str(source)) as before, av.open(str(target)) as after:
        video, audio = after.streams.video[0], after.streams.audio[0]
        assert (video.width, video.height) == (2 * WIDTH, 2 * HEIGHT)
        assert video.codec_context.name == "h264"
        # Matroska says it by the display size, in whole pixels.
        rounding = 1 / (2 * HEIGHT) if suffix == ".mkv" else 0
        assert float(video.sample_aspect_ratio or 0) == pytest.approx(40 / 33, rel=rounding)
        assert abs(after.duration - before.duration) <= 25_000  # Matroska's last audio block has no length of its own
        if suffix != ".mkv":
            assert after.duration == before.duration
            assert video.duration * video.time_base == (
                before.streams.video[0].duration * before.streams.video[0].time_base  # type: ignore[operator]
            )
        assert audio.codec_context.extradata == before.streams.audio[0].codec_context.extradata
        assert after.metadata["title"] == "A title"
        assert [chapter["metadata"] for chapter in after.chapters()] == [{"title": "One"}]
        if suffix == ".mkv":
            assert after.streams.subtitles[0].metadata["language"] == "deu"
    assert frames_of(target)[0].rotation == frames_of(source)[0].rotation != 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    run_upscale(source, tmp_path / f"bare{suffix}", "--weights", weights, "--strip-metadata")
    with av.open(str(tmp_path / f"bare{suffix}")) as bare:
        assert "title" not in bare.metadata


def test_the_model_sees_a_turned_video_upright(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(2), kept=True)
    # Asked for a height of what is seen, which is the width that is stored.
    document, _ = run_upscale(source, tmp_path / "out.mp4", "--weights", weights, "--height", 96, "--quality", 100)
    assert document["files"][0]["size_out"] == [72, 96]
    before, after = (frames_of(tmp_path / name)[0] for name in ("in.mp4", "out.mp4"))
    assert (after.width, after.height) == (96, 72)
    larger = Image.fromarray(before.to_ndarray(format="rgb24")).resize((96, 72), Image.Resampling.BICUBIC)
    assert psnr(after.to_ndarray(format="rgb24").astype(float), np.asarray(larger, float), 255) > 30


def test_what_a_container_cannot_hold_is_reported(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mkv", rgb_frames(3), audio="aac", subtitles=True)
    document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights)
    assert error is None
    assert "subtitle (subrip) is not kept: .mp4 can't hold it, .mkv can" in document["files"][0]["problem"]
    assert document["files"][0]["left_out"] == ["subtitle (subrip)"]
    assert packets_of(tmp_path / "out.mp4", "audio")[3][1] == packets_of(source, "audio")[3][1]
    # Sound is never lost.
    document, error = run_upscale(source, tmp_path / "out.webm", "--weights", weights)
    assert isinstance(error, PartialFailure)
    assert "can't hold the audio" in document["files"][0]["problem"]
    assert "Use .mkv" in document["files"][0]["problem"]
    assert not (tmp_path / "out.webm").exists()
    document, error = run_upscale(source, tmp_path / "out.webm", "--weights", weights, "--dry-run")
    assert isinstance(error, PartialFailure)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("tta", "in.mkv"),
        ("wavpack", "in.mkv"),
        ("wmav2", "in.wmv"),
        ("adpcm_ms", "in.avi"),
    ],
)
def test_audio_that_a_container_refuses_is_known_before_the_work(
    tmp_path: Path, weights: Path, codec: str, name: str
) -> None:
    video = "libx264" if name == "in.mkv" else "msmpeg4"
    source = write_video(tmp_path / name, rgb_frames(3), codec=video, audio=codec)
    for more in (["--dry-run"], []):
        document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights, *more)
        assert isinstance(error, PartialFailure)
        assert f"can't hold the audio of {source} ({codec})" in document["files"][0]["problem"]
        assert "Use .mkv." in document["files"][0]["problem"]
        assert document["files"][0]["tiles"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {name, weights.name}


@pytest.mark.parametrize(("codec", "name"), [("wmav2", "in.wmv"), ("wmav1", "in.avi"), ("adpcm_ms", "in.avi")])
def test_audio_that_matroska_holds_by_its_windows_number(tmp_path: Path, weights: Path, codec: str, name: str) -> None:
    source = write_video(tmp_path / name, rgb_frames(3), codec="msmpeg4", audio=codec)
    document, error = run_upscale(source, tmp_path / "in [x].mkv", "--weights", weights)
    assert error is None, document
    assert document["files"][0]["problem"] == ""
    made = packets_of(tmp_path / "in [x].mkv", "audio")
    assert [data for _, data in made] == [data for _, data in packets_of(source, "audio")]
    with av.open(str(tmp_path / "in [x].mkv")) as container:
        assert container.streams.audio[0].codec_context.name == codec


def test_a_stream_without_a_decoder_is_named(tmp_path: Path, weights: Path) -> None:
    # As an iPhone's second sound track, of a codec that FFmpeg doesn't know.
    data = bytearray(write_video(tmp_path / "in.mov", rgb_frames(3), audio="aac").read_bytes())
    start = data.rfind(b"stsd")
    end = data.find(b"stts", start)
    data[start:end] = bytes(data[start:end]).replace(b"mp4a", b"apac").replace(b"esds", b"dapa")
    (tmp_path / "in.mov").write_bytes(data)
    document, error = run_upscale(tmp_path / "in.mov", tmp_path / "out.mov", "--weights", weights)
    assert error is None, document
    assert document["files"][0]["problem"] == "its audio (apac) is not kept: nothing here knows it"
    assert len(frames_of(tmp_path / "out.mov")) == 3


@pytest.mark.parametrize("kind", ["gif", "tiff", "bmp", "webp", "jpeg"])
def test_covers_and_fonts_are_kept(tmp_path: Path, weights: Path, kind: str) -> None:
    Image.fromarray(rgb_frames(1)[0]).save(tmp_path / f"art.{kind}")
    picture, font = (tmp_path / f"art.{kind}").read_bytes(), bytes(range(256))
    plain = write_video(tmp_path / "plain.mkv", rgb_frames(3), audio="aac")
    with av.open(str(plain)) as before, av.open(str(tmp_path / "in.mkv"), "w") as after:
        streams = [after.add_stream_from_template(stream, opaque=True) for stream in before.streams]
        after.add_attachment(f"art.{kind}", f"image/{kind}", picture)
        after.add_attachment("a.ttf", "font/ttf", font)
        for packet in before.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                after.mux(packet)
    document, error = run_upscale(tmp_path / "in.mkv", tmp_path / "out.mkv", "--weights", weights)
    assert error is None, document
    assert document["files"][0]["problem"] == ""
    made = (tmp_path / "out.mkv").read_bytes()
    for content in (picture, font, f"art.{kind}".encode(), f"image/{kind}".encode(), b"a.ttf", b"font/ttf"):
        assert content in made
    document, error = run_upscale(tmp_path / "in.mkv", tmp_path / "out.mp4", "--weights", weights)
    assert error is None, document
    assert "its attachment (a.ttf) is not kept: .mp4 can't hold it, .mkv can" in document["files"][0]["problem"]


def test_data_and_other_videos_are_kept_or_named(tmp_path: Path, weights: Path) -> None:
    # A camera's positions, in GoPro's track, and a second video.
    plain = write_video(tmp_path / "plain.mp4", rgb_frames(3), audio="aac")
    with av.open(str(plain)) as before, av.open(str(tmp_path / "in.mp4"), "w") as after:
        streams = [after.add_stream_from_template(stream, opaque=True) for stream in before.streams]
        second = after.add_stream_from_template(before.streams.video[0], opaque=True)
        data = after.add_data_stream("bin_data")
        data.time_base = Fraction(1, 1000)
        for packet in before.demux():
            if packet.size:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                packet.stream = streams[packet.stream_index]
                after.mux(packet)
                if packet.stream is streams[0]:
                    copy.stream = second
                    after.mux(copy)
        for number in range(3):
            point = av.Packet(b"DEVC" + bytes([number]) * 20)
            point.stream, point.time_base = data, data.time_base
            point.pts, point.dts, point.duration = 40 * number, 40 * number, 40
            after.mux(point)
    assert len(packets_of(tmp_path / "in.mp4", "data")) == 3
    for name, lost in (("out.mp4", ""), ("out.mkv", "; its data (gpmd) is not kept: .mkv can't hold it")):
        dry, _ = run_upscale(tmp_path / "in.mp4", tmp_path / name, "--weights", weights, "--dry-run")
        document, error = run_upscale(tmp_path / "in.mp4", tmp_path / name, "--weights", weights)
        assert error is None, document
        problem = document["files"][0]["problem"]
        assert problem == dry["files"][0]["problem"]
        assert problem.startswith("its other video (h264) is not kept")
        assert ("gpmd" in problem) == bool(lost)
    assert packets_of(tmp_path / "out.mp4", "data") == packets_of(tmp_path / "in.mp4", "data")


def test_hdr10_is_kept_and_other_side_data_named(tmp_path: Path, weights: Path) -> None:
    display = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
    params = f"log-level=none:repeat-headers=1:hdr10=1:master-display={display}:max-cll=1000,400"
    planes = [np.full((64, 64), 400, np.uint16), *[np.full((32, 32), 512, np.uint16)] * 2]
    frames = [put_planes(av.VideoFrame(64, 64, "yuv420p10le"), planes) for _ in range(3)]
    tags = {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16}
    source = write_video(
        tmp_path / "in.mp4", frames, codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": params}, **tags
    )

    def hdr(path: Path) -> dict[str, list[float]]:
        found = {data.type.name: bytes(data) for data in frames_of(path)[0].side_data}  # type: ignore[attr-defined]
        display, light = found["MASTERING_DISPLAY_METADATA"], found["CONTENT_LIGHT_LEVEL"]
        numbers = np.frombuffer(display, "<i4")[:20].reshape(-1, 2).astype(float)
        return {"display": list(numbers[:, 0] / numbers[:, 1]), "light": list(np.frombuffer(light, "<u4")[:2])}

    for name in ("out.mp4", "out.mkv", "out.webm"):
        document, error = run_upscale(source, tmp_path / name, "--weights", weights)
        assert error is None, document
        assert document["files"][0]["problem"] == ""
        np.testing.assert_allclose(hdr(tmp_path / name)["display"], hdr(source)["display"], rtol=1e-3, atol=1e-4)
        assert hdr(tmp_path / name)["light"] == hdr(source)["light"] == [1000, 400]
    document, _ = run_upscale(source, tmp_path / "exact.mkv", "--weights", weights, "--lossless")
    assert (
        "properties of its frames that are not kept: the mastering display, the content light level"
        in document["files"][0]["problem"]
    )


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv", "out.webm", "out.3gp"])
def test_an_output_says_how_it_was_made(tmp_path: Path, weights: Path, name: str) -> None:
    plain = write_video(tmp_path / "plain.mkv", rgb_frames(2))
    with av.open(str(plain)) as before, av.open(str(tmp_path / "in.mkv"), "w") as after:
        stream = after.add_stream_from_template(before.streams.video[0], opaque=True)
        after.metadata["comment"] = "Filmed in June"
        for packet in before.demux():
            if packet.size:
                packet.stream = stream
                after.mux(packet)
    run_upscale(tmp_path / "in.mkv", tmp_path / name, "--weights", weights)
    with av.open(str(tmp_path / name)) as container:
        said = "\n".join(container.metadata.values())
    if name == "out.3gp":  # whose tags FFmpeg writes and doesn't read
        said = (tmp_path / name).read_bytes().decode("latin-1")
    assert f"upscaled with {weights.name}" in said
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in said
    assert "Filmed in June" in said
    assert made_by_pdd(tmp_path / name)
    assert source_of(tmp_path / name) == hashlib.sha256((tmp_path / "in.mkv").read_bytes()).hexdigest()
    run_upscale(tmp_path / "in.mkv", tmp_path / f"bare{name}", "--weights", weights, "--strip-metadata")
    assert b"upscaled with" not in (tmp_path / f"bare{name}").read_bytes()


def test_the_shape_of_pixels_in_matroska_and_webm(tmp_path: Path, weights: Path) -> None:
    for number, aspect in enumerate([Fraction(40, 33), Fraction(8, 9), Fraction(1)]):
        source = write_video(tmp_path / f"{number}.mp4", rgb_frames(2), sample_aspect_ratio=aspect)
        for suffix in ("mkv", "webm"):
            target = tmp_path / f"{number}.{suffix}"
            document, error = run_upscale(source, target, "--weights", weights)
            assert error is None, document
            width, height = 2 * WIDTH, 2 * HEIGHT
            shown = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
            made = target.read_bytes()
            for element, side in zip((b"\x54\xb0", b"\x54\xba"), shown, strict=True):
                assert element + b"\x84" + side.to_bytes(4, "big") in made
            assert b"\x54\xb2\x81\x04" not in made  # the display size isn't known
            with av.open(str(target)) as container:
                found = container.streams.video[0].sample_aspect_ratio
                assert abs(float(found or 1) / float(aspect) - 1) < 0.01
                assert "title" not in {key.lower() for key in container.streams.video[0].metadata}
            assert len(frames_of(target)) == 2


def test_webm(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.webm", rgb_frames(30), codec="libvpx-vp9", audio="libopus")
    _, error = run_upscale(source, tmp_path / "out.webm", "--weights", weights)
    assert error is None
    assert times_of(tmp_path / "out.webm") == times_of(source)
    assert packets_of(tmp_path / "out.webm", "audio") == packets_of(source, "audio")
    with av.open(str(tmp_path / "out.webm")) as container:
        assert container.streams.video[0].codec_context.name == "vp9"


def test_odd_sizes_are_cut_and_told(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(3))
    document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights, "--width", 45)
    assert error is None
    assert "45x34 is cut to 44x34" in document["files"][0]["problem"]
    assert document["files"][0]["size_out"] == [44, 34]
    frame = frames_of(tmp_path / "out.mp4")[0]
    assert (frame.width, frame.height) == (44, 34)


# --- batches, resuming, failures --------------------------------------------------------------------------------


def test_a_folder_of_images_and_videos(tmp_path: Path, weights: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_video(folder / "a.mp4", rgb_frames(4))
    write_video(folder / "sub/b.avi", rgb_frames(4), codec="mpeg4")
    (folder / "sub/broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    Image.fromarray(rgb_frames(1)[0]).save(folder / "sub/c.png")
    document, error = run_upscale(folder, out, "--weights", weights, "--dry-run")
    assert isinstance(error, PartialFailure)
    assert (document["planned"], document["failed"]) == (3, 1)
    assert not out.exists()

    document, error = run_upscale(folder, out, "--weights", weights)
    assert isinstance(error, PartialFailure)
    assert (document["done"], document["failed"]) == (3, 1)
    problems = [file["problem"] for file in document["files"] if file["status"] == "failed"]
    assert "can't read" in problems[0]
    assert "broken.mp4" in problems[0]
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert made == [MANIFEST, "a.mp4", "sub/b.mkv", "sub/c.png"]
    assert len(frames_of(out / "sub/b.mkv")) == 4
    last = read_last_run()
    assert last is not None
    assert [pair.sr.name for pair in last.pairs] == ["c.png"]  # what evaluate can read

    (folder / "sub/broken.mp4").unlink()
    document, _ = run_upscale(folder, out, "--weights", weights)
    assert (document["done"], document["skipped"]) == (0, 3)
    document, _ = run_upscale(folder, out, "--weights", weights, "--quality", 50)
    assert document["done"] == 3
    write_video(folder / "a.mp4", rgb_frames(5))
    document, _ = run_upscale(folder, out, "--weights", weights, "--quality", 50)
    assert (document["done"], document["skipped"]) == (1, 2)
    assert len(frames_of(out / "a.mp4")) == 5


def test_devices_and_processes_share_videos(tmp_path: Path, weights: Path) -> None:
    for number in range(3):
        packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in rgb_frames(number + 2)]
        write_video(tmp_path / f"in/{number}.mkv", packed, codec="ffv1", pix_fmt="bgr0")
    Image.fromarray(rgb_frames(1)[0]).save(tmp_path / "in/still.png")
    options = ["--weights", weights, "--lossless", "--device", "cpu,cpu"]
    document, error = run_upscale(tmp_path / "in", tmp_path / "out", *options)
    assert error is None, document
    assert [file["frames"] for file in document["files"] if "frames" in file] == [2, 3, 4]
    for number in range(3):
        for frame, rgb in zip(frames_of(tmp_path / f"out/{number}.mkv"), rgb_frames(number + 2), strict=True):
            np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), twice(rgb))
    # By the pixels of all frames: the longest video to one process, all else to the other.
    jobs = plan_jobs([tmp_path / "in"], str(tmp_path / "out"), format="keep", suffix="", recursive=True).jobs
    shares = [[job.source.name for job in partition(jobs, Ranks(rank, 2))] for rank in range(2)]
    assert shares == [["2.mkv", "still.png"], ["0.mkv", "1.mkv"]]


def test_names_of_videos(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.avi", "c.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()

    def names(format: Any) -> list[str]:
        jobs = plan_jobs([tmp_path / "in"], str(tmp_path / "out"), format=format, suffix="_x2", recursive=True).jobs
        return [job.target.name for job in jobs]

    assert names("keep") == ["a_x2.mp4", "b_x2.mkv", "c_x2.png"]
    assert names("webm") == ["a_x2.webm", "b_x2.webm", "c_x2.png"]
    assert names("jpg") == ["a_x2.mp4", "b_x2.mkv", "c_x2.jpg"]
    for source, target, format in (
        ("a.mp4", "out.png", "keep"),
        ("b.avi", "out.avi", "keep"),
        ("a.mp4", "out.mp4", "png"),
        ("a.mp4", "out.mkv", "mp4"),
    ):
        with pytest.raises(InputError):
            plan_jobs(
                [tmp_path / "in" / source],
                str(tmp_path / target),
                format=format,
                suffix="",
                recursive=True,  # type: ignore[arg-type]
            )
    (tmp_path / "in/b.mkv").touch()
    with pytest.raises(InputError, match="would have the same output"):
        names("keep")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_continues_and_gives_the_same(tmp_path: Path, weights: Path) -> None:
    count = 2 * PART_FRAMES + 10
    rgb = rgb_frames(count)
    packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in rgb]
    source = write_video(tmp_path / "in.mkv", packed, codec="ffv1", pix_fmt="bgr0", audio="aac")
    out = tmp_path / "out.mkv"
    options = [source, out, "--weights", weights, "--lossless"]
    hold = Hold(tmp_path / "hold", "000001.mkv", 1)  # about to complete the second part
    command = [sys.executable, *hold.command, "upscale", *options, "--engine", "torch", "--precision", "fp32"]
    variables = {**os.environ, "PYTHONPATH": hold.path}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, env=variables)
    hold.wait(process)
    process.kill()
    process.communicate()
    assert not out.exists()
    document, error = run_upscale(*options)
    assert error is None, document
    assert document["files"][0]["frames"] == count
    assert document["files"][0]["tiles"] <= count - PART_FRAMES  # the frames that were computed
    for frame, expected in zip(frames_of(out), rgb, strict=True):
        np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), twice(expected))
    assert times_of(out) == times_of(source)
    assert packets_of(out, "audio") == packets_of(source, "audio")
    assert not list(tmp_path.glob(".pdd-*"))


def started(*arguments: object, hold: Hold | None = None, **options: Any) -> subprocess.Popen[str]:
    """`pdd upscale` in a process of its own, with its messages on standard error."""
    settings = ["--engine", "torch", "--precision", "fp32"]
    module = hold.command if hold else ["-m", "pdd_cli"]
    command = [sys.executable, "-X", "faulthandler", *module, "upscale", *map(str, arguments), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": hold.path} if hold else {})
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
@pytest.mark.parametrize("options", [["out.mkv", "--lossless"], ["out.mp4"], ["out.webm"]])
def test_a_full_disk_keeps_the_finished_parts(tmp_path: Path, weights: Path, options: list[str]) -> None:
    import resource

    # The first part is of frames that an encoder makes small, the second of noise.
    noise = np.random.default_rng(0).integers(0, 256, (30, HEIGHT, WIDTH, 3), np.uint8)
    frames = [*[np.full_like(noise[0], 128)] * PART_FRAMES, *noise]
    source = write_video(tmp_path / "in.mkv", frames)
    name, *rest = options
    most = 25_000
    command = [source, tmp_path / name, "--weights", weights, *rest]
    full = started(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    _, said = full.communicate(timeout=500)
    assert full.returncode == 5, said
    assert "no space left on the disk" in said
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.rglob(".pdd-tmp-*"))
    document, error = run_upscale(*command)
    assert error is None, document
    assert document["files"][0]["tiles"] == len(noise)
    assert len(frames_of(tmp_path / name)) == len(frames)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("times", [1, 4])
def test_an_interrupted_run_ends_well_and_continues(tmp_path: Path, weights: Path, times: int) -> None:
    count = PART_FRAMES + 20
    source = write_video(tmp_path / "in.mp4", rgb_frames(count))
    command = [source, tmp_path / "out.mkv", "--weights", weights, "--lossless"]
    hold = Hold(tmp_path / "hold", "000001.mkv", 1)  # about to complete the second part
    process = started(*command, hold=hold)
    hold.wait(process)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    hold.let_go()
    _, said = process.communicate(timeout=500)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Fatal Python error" not in said
    assert not (tmp_path / "out.mkv").exists()
    document, error = run_upscale(*command)
    assert error is None, document
    assert document["files"][0]["tiles"] <= count - PART_FRAMES
    assert len(frames_of(tmp_path / "out.mkv")) == count
    assert not list(tmp_path.glob(".pdd-*"))


@pytest.mark.parametrize("form", ["mkv", "png"])
@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_finished_frames_stay_if_the_machine_fails(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, form: str, lacking: str
) -> None:
    monkeypatch.setattr(pipeline, "PART_FRAMES", 4)
    source = write_video(tmp_path / "in.mkv", rgb_frames(10))
    command = [source, tmp_path / "out/", "--weights", weights, "--format", form]
    rename, upscale, calls = Path.replace, Upscaler.upscale_all, itertools.count(1)

    def renamed(path: Path, target: Path) -> Path:
        if target.name in ("000001.mkv", "00000007.png"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    def upscaled(upscaler: Upscaler, pictures: Sequence[DecodedImage]) -> list[UpscaleResult]:
        if next(calls) > 8:
            raise ResourceError("out of memory even with tiles of 64 pixels")
        return upscale(upscaler, pictures)

    with monkeypatch.context() as failing:
        if lacking == "disk":
            failing.setattr(Path, "replace", renamed)
        else:
            failing.setattr(Upscaler, "upscale_all", upscaled)
        document, _ = run_upscale(*command)
    assert document["failed"] == 1
    document, error = run_upscale(*command)
    assert error is None, document
    assert document["files"][0]["frames"] == 10
    assert document["files"][0]["tiles"] <= 6
    assert not list(tmp_path.rglob(".pdd-*.parts"))


def test_a_surprise_is_the_job_s_own(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / "in" / name, rgb_frames(3))
    pixels = clips._pixels

    def broken(frame: av.VideoFrame, clip: Any) -> np.ndarray:
        if clip.path.name == "a.mp4":
            raise AttributeError("no such thing")
        return pixels(frame, clip)

    monkeypatch.setattr(clips, "_pixels", broken)
    document, error = run_upscale(tmp_path / "in", tmp_path / "out", "--weights", weights)
    assert isinstance(error, PartialFailure)
    assert [file["status"] for file in document["files"]] == ["failed", "done"]
    assert "AttributeError: no such thing" in document["files"][0]["problem"]
    assert "--debug" in document["files"][0]["problem"]


def test_frames_that_are_computed_together_are_the_same(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last few don't fill a batch, and a part ends within one.
    rgb = rgb_frames(PART_FRAMES + 10)
    packed = [av.VideoFrame.from_ndarray(frame).reformat(format="bgr0") for frame in rgb]
    source = write_video(tmp_path / "in.mkv", packed, codec="ffv1", pix_fmt="bgr0")
    engine = TorchEngine(load_sr_model(weights), Runtime("cpu", "fp32"))
    engine.batch_pixels = 7 * WIDTH * HEIGHT
    upscaler = Upscaler(engine, tile="auto", overlap=8, notify=print)
    calls: list[int] = []
    run_rounded = engine.run_rounded
    monkeypatch.setattr(engine, "run_rounded", lambda lr: calls.append(len(lr)) or run_rounded(lr))
    job = Job(source, tmp_path / "out.mkv")
    counted: list[int] = []
    (result,) = run_videos(
        [job],
        upscaler,
        recipe={},
        output=Output(Encoding(lossless=True)),
        on_tile=lambda done, total: counted.append(done),
    )
    assert result.status == "done", result.problem
    assert calls == [7] * 15 + [1]
    assert counted[-1] == result.frames == result.tiles == len(rgb)
    for frame, expected in zip(frames_of(job.target), rgb, strict=True):
        np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), twice(expected))
    assert times_of(job.target) == times_of(source)


def test_parts_are_joined_with_the_times_of_the_input(tmp_path: Path, weights: Path) -> None:
    # Several parts with B-frames, at times that no frame rate makes.
    count = PART_FRAMES + 7
    steps = np.random.default_rng(0).integers(1, 3000, count)
    times = [int(time) for time in np.cumsum(steps)]
    source = write_video(tmp_path / "in.mp4", rgb_frames(count), times=times, time_base=Fraction(1, 90_000))
    document, error = run_upscale(source, tmp_path / "out.mp4", "--weights", weights)
    assert error is None, document
    assert times_of(tmp_path / "out.mp4") == times_of(source)
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert all(packet.dts <= packet.pts for packet in packets)  # type: ignore[operator]
        assert sum(packet.is_keyframe for packet in packets) >= 2
        assert any(packet.dts != packet.pts for packet in packets)
    for frame, expected in zip(frames_of(tmp_path / "out.mp4"), frames_of(source), strict=True):
        ours, theirs = (get_planes(f)[0] for f in (frame, expected))
        assert psnr(ours, twice(theirs), 255) > 30


def test_parts_of_other_settings_are_not_used(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(5))
    name = hashlib.sha256(b"out.mkv").hexdigest()[:16]
    stale = tmp_path / f".pdd-{name}.parts"
    stale.mkdir()
    (stale / "made-by").write_text("another run")
    (stale / "000000.mkv").write_bytes(b"of another run")
    document, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights)
    assert error is None, document
    assert document["files"][0]["tiles"] == 5
    assert not stale.exists()


def test_a_truncated_video_gives_what_can_be_decoded_and_says_so(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "whole.mkv", rgb_frames(30), codec="mpeg4")
    data = source.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 6 // 10])
    document, error = run_upscale(tmp_path / "cut.mkv", tmp_path / "out.mkv", "--weights", weights)
    assert error is None
    count = document["files"][0]["frames"]
    assert 5 < count < 30
    assert f"damaged or truncated: only {count}" in document["files"][0]["problem"]
    assert len(frames_of(tmp_path / "out.mkv")) == count
    document, _ = run_upscale(source, tmp_path / "fine.mkv", "--weights", weights)
    assert document["files"][0]["problem"] == ""


def test_videos_that_change_midway_fail(tmp_path: Path, weights: Path) -> None:
    first = write_video(tmp_path / "a.ts", rgb_frames(30))
    larger = [np.pad(frame, ((0, 8), (0, 16), (0, 0))) for frame in rgb_frames(30)]
    second = write_video(tmp_path / "b.ts", larger, times=list(range(100, 130)))
    (tmp_path / "again.ts").write_bytes(first.read_bytes() * 2)
    (tmp_path / "sizes.ts").write_bytes(first.read_bytes() + second.read_bytes())
    for name, reason in (("again.ts", "timestamps restart"), ("sizes.ts", "is 48x32")):
        document, error = run_upscale(tmp_path / name, tmp_path / "out.mkv", "--weights", weights)
        assert isinstance(error, PartialFailure)
        assert reason in document["files"][0]["problem"]
        assert not (tmp_path / "out.mkv").exists()
        assert not list(tmp_path.glob(".pdd-*"))


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "avi"), ("mpeg4", "avi"), ("libx264", "h264")])
def test_times_of_files_that_have_those_of_decoding_or_none(
    tmp_path: Path, weights: Path, codec: str, suffix: str
) -> None:
    source = write_video(tmp_path / f"in.{suffix}", rgb_frames(20), codec=codec, max_b_frames=2, options={"bf": "2"})
    assert any(frame.pict_type == 3 for frame in frames_of(source))  # B
    document, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights)
    assert error is None, document
    note = "it has no timestamps: 25 frames per second are assumed" if suffix == "h264" else ""
    assert document["files"][0]["problem"] == note
    assert times_of(tmp_path / "out.mkv") == [Fraction(n, 25) for n in range(20)]


def test_sound_that_is_longer_than_the_picture_is_no_damage(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.flv", rgb_frames(10), audio="aac", blocks=150)
    document, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights)
    assert error is None, document
    assert document["files"][0]["problem"] == ""
    assert packets_of(tmp_path / "out.mkv", "audio")[-1][0] > 3


def test_frames_that_are_interlaced_later_are_reported(tmp_path: Path, weights: Path) -> None:
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=WIDTH, height=HEIGHT, format="yuv420p", time_base=Fraction(1, 25)),
        graph.add("setfield", "tff"),
        graph.add("buffersink"),
    ).configure()
    fields = []
    for array in rgb_frames(5):
        graph.push(av.VideoFrame.from_ndarray(array).reformat(format="yuv420p"))
        fields.append(graph.pull())
    first = write_video(tmp_path / "a.m2v", rgb_frames(5), codec="mpeg2video")
    second = write_video(tmp_path / "b.m2v", fields, codec="mpeg2video", flags=0x20040000)  # interlaced ME and DCT
    assert frames_of(second)[0].interlaced_frame
    (tmp_path / "in.m2v").write_bytes(first.read_bytes() + second.read_bytes())
    document, error = run_upscale(tmp_path / "in.m2v", tmp_path / "out.mkv", "--weights", weights)
    assert error is None, document
    assert "5 of its frames are interlaced" in document["files"][0]["problem"]


def test_a_clock_that_starts_anywhere_starts_at_zero(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "a.ts", rgb_frames(10), times=list(range(1000, 1010)))
    assert times_of(source)[0] > 30
    _, error = run_upscale(source, tmp_path / "out.mkv", "--weights", weights)
    assert error is None
    assert times_of(tmp_path / "out.mkv") == [Fraction(n, 25) for n in range(10)]


def test_without_pyav(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "in/a.mp4", rgb_frames(2))
    Image.fromarray(rgb_frames(1)[0]).save(tmp_path / "in/b.png")
    monkeypatch.setitem(sys.modules, "av", None)
    document, error = run_upscale(tmp_path / "in", tmp_path / "out", "--weights", weights)
    assert isinstance(error, PddError)
    assert (document["done"], document["failed"]) == (1, 1)  # the image
    problem = next(file["problem"] for file in document["files"] if file["status"] == "failed")
    assert "PyAV" in problem
    assert "pip install" in problem


def test_frame_folders_keep_names_and_order(tmp_path: Path, weights: Path) -> None:
    # VideoLQ's layout: a folder per clip.
    names = [f"{clip:03}/{frame:08}.png" for clip in (0, 1, 10) for frame in (0, 1, 9, 10, 100)]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb_frames(number + 1)[-1]).save(tmp_path / "in" / name)
    document, error = run_upscale(tmp_path / "in", tmp_path / "out", "--weights", weights)
    assert error is None
    assert [Path(file["output"]).relative_to(tmp_path / "out").as_posix() for file in document["files"]] == names
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert made == names
    for name in names:
        ours, source = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("out", "in"))
        np.testing.assert_array_equal(ours, twice(source))


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe")
def test_ffprobe_finds_the_same(tmp_path: Path, weights: Path) -> None:
    source = write_video(tmp_path / "in.mp4", rgb_frames(30), audio="aac", kept=True)
    target = tmp_path / "out.mp4"
    run_upscale(source, target, "--weights", weights)

    def probe(path: Path) -> list[Any]:
        entries = "stream=codec_type,nb_read_frames,duration,avg_frame_rate,sample_aspect_ratio:format=duration"
        command = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", entries, "-of", "json", str(path)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        sound = ["ffprobe", "-v", "error", "-select_streams", "a", "-show_packets", "-show_data_hash", "md5", str(path)]
        lines = subprocess.run(sound, capture_output=True, check=True, text=True).stdout.splitlines()
        return [found, [line for line in lines if line.startswith(("pts=", "dts=", "size=", "data_hash="))]]

    assert probe(target) == probe(source)
