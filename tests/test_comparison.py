"""Baselines, intervals, verdicts, LR-only metrics, data-set presets and the page, against other implementations."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

from pdd_cli.errors import CheckFailed, InputError, PartialFailure
from pdd_cli.iqa.compare import bootstrap_interval, compare, in_words
from pdd_cli.iqa.consistency import colour_drift, downscale_consistency, lab
from pdd_cli.iqa.datasets import DatasetName, find_dataset
from pdd_cli.iqa.inputs import gather
from pdd_cli.iqa.metrics import Item, metric_infos, score
from pdd_cli.iqa.pyiqa_adapter import weights_states
from pdd_cli.last_run import LastRun, UpscaledPair, save_last_run
from tests.helpers.commands import evaluate, run
from tests.helpers.images import photo, pixels, psnr, save
from tests.helpers.pages import Page

RNG = np.random.default_rng(1)
pytestmark = pytest.mark.usefixtures("hub")


def noisy(clean: np.ndarray, most: int) -> np.ndarray:
    return np.clip(clean.astype(int) + RNG.integers(-most, most + 1, clean.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Eight images: `good` with less noise than `poor`, `same` with as much as `poor`; gt and lr."""
    for index in range(8):
        clean = photo(64, 80, seed=index)
        name = f"{index}.png"
        save(tmp_path / "gt" / name, clean)
        save(tmp_path / "good" / name, noisy(clean, 8))
        save(tmp_path / "poor" / name, noisy(clean, 16))
        save(tmp_path / "same" / name, noisy(clean, 16))
        save(tmp_path / "lr" / name, np.asarray(Image.fromarray(clean).resize((20, 16), Image.Resampling.BICUBIC)))
    return tmp_path


# --- numbers ----------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_middle_of_resampled_means() -> None:
    values = RNG.normal(0.3, 1, 40)
    means = values[np.random.default_rng(0).integers(0, 40, (10_000, 40))].mean(axis=1)
    assert bootstrap_interval(values) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert bootstrap_interval(values[:1]) == (values[0], values[0])
    assert bootstrap_interval(np.full(8, 0.5)) == (0.5, 0.5)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = [low <= 0 <= high for low, high in (bootstrap_interval(RNG.normal(0, 1, 30)) for _ in range(150))]
    assert 0.86 < np.mean(held) < 0.99


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-1, -2, -1, -2, -1, -2], "better"),
        ([1, 2, 1, 2, 1, 2], "worse"),
        ([1, -1, 2, -2, 1, -1], "unclear"),
        ([-1, -1, -1, -1, -1], "too few"),
        ([0, 0, 0, 0, 0, 0], "unclear"),
    ],
)
def test_verdicts_follow_the_metrics_direction(differences: list[float], verdict: str) -> None:
    niqe, ssim = metric_infos(["niqe", "ssim"])
    theirs = {str(i): 10.0 for i in range(len(differences))}
    ours = {str(i): 10.0 + d for i, d in enumerate(differences)}
    by_niqe, by_ssim = compare(niqe, "a", "b", ours, theirs), compare(ssim, "a", "b", ours, theirs)
    assert by_niqe
    assert by_ssim
    assert by_niqe.verdict == verdict
    assert by_ssim.verdict == {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert (by_niqe.wins, by_niqe.losses) == (by_ssim.losses, by_ssim.wins)
    assert compare(niqe, "a", "b", ours, {"other": 1.0}) is None


def test_the_verdict_is_reported_in_words() -> None:
    lpips, psnr_, niqe = metric_infos(["lpips", "psnr", "niqe"])
    names = [str(i) for i in range(8)]
    messages = [
        compare(lpips, "a", "b", dict.fromkeys(names, 0.22), dict.fromkeys(names, 0.25)),
        compare(psnr_, "a", "b", dict.fromkeys(names, 27.5), dict.fromkeys(names, 28.0)),
        compare(niqe, "a", "b", {n: 5 + (-1) ** i for i, n in enumerate(names)}, dict.fromkeys(names, 5.0)),
    ]
    assert in_words([one for one in messages if one]) == (
        "better on lpips (−12 %, 8 of 8), worse on psnr (−0.50 dB, 8 of 8), no clear difference on niqe"
    )


def test_lab_is_the_published_one() -> None:
    # Bruce Lindbloom's sRGB primaries, D65.
    for colour, published in (
        ((1, 0, 0), (53.2408, 80.0925, 67.2032)),
        ((0, 1, 0), (87.7347, -86.1827, 83.1793)),
        ((0, 0, 1), (32.2970, 79.1875, -107.8602)),
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ):
        assert lab(np.array(colour, float)) == pytest.approx(published, abs=0.01)


def test_consistency_is_the_psnr_of_torchs_downscaling() -> None:
    sr = photo(64, 96).astype(np.float32) / 255
    lr = photo(16, 24, seed=3).astype(np.float32) / 255
    small = torch.nn.functional.interpolate(
        torch.from_numpy(sr.transpose(2, 0, 1))[None], (16, 24), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 1).numpy().transpose(1, 2, 0)  # fmt: skip
    assert downscale_consistency(sr, lr) == pytest.approx(psnr(small * 255.0, lr * 255.0), abs=1e-3)
    assert downscale_consistency(sr, small) > 90
    flat = np.full((16, 24, 3), 0.5, np.float32)
    assert downscale_consistency(np.full((64, 96, 3), 0.5, np.float32), flat) == 100
    assert colour_drift(sr, small) < 0.2
    gray, darker = np.full((8, 8, 3), 119 / 255), np.full((4, 4, 3), 70 / 255)
    assert colour_drift(gray, darker) == pytest.approx(50.03 - 29.72, abs=0.01)  # L* of sRGB 119 and 70


def test_an_image_that_was_restored_without_enlarging_has_an_lr_of_its_size() -> None:
    rng = np.random.default_rng(0)
    lr = rng.random((20, 30, 3))
    restored = np.clip(lr + 0.02 * rng.standard_normal(lr.shape), 0, 1)
    expected = -10 * np.log10(np.mean((restored - lr) ** 2))
    assert downscale_consistency(restored, lr) == pytest.approx(expected, abs=1e-3)
    assert colour_drift(lr, lr) == 0


@pytest.mark.parametrize(("lr", "words"), [((65, 97), "larger"), ((24, 16), "the aspect ratios differ")])
def test_what_is_no_lr_of_the_image_is_refused(lr: tuple[int, int], words: str) -> None:
    for function in (downscale_consistency, colour_drift):
        with pytest.raises(ValueError, match=words):
            function(np.zeros((64, 96, 3)), np.zeros((*lr, 3)))


@pytest.mark.slow
def test_scores_computed_at_the_same_time_are_those_of_one_after_the_other(sets: Path) -> None:
    infos = metric_infos(["psnr", "ssim", "gmsd", "nlpd", "entropy"])
    networks = {info: pyiqa.create_metric(info.name, device="cpu") for info in infos}
    images = sorted((sets / "poor").iterdir())
    items = [Item(image, sets / "gt" / image.name) for image in images]
    threads = torch.get_num_threads()
    for item, found in zip(items, score(items, networks), strict=True):
        assert found.item == item
        for info, network in networks.items():
            expected = float(network(str(item.image), *([str(item.reference)] if info.reference == "full" else [])))
            assert found.values[info.name] == pytest.approx(expected, rel=1e-5, abs=1e-6), info.name
    assert torch.get_num_threads() == threads


# --- the command ------------------------------------------------------------------------------------------------


def test_a_better_set_is_found_better_than_a_poor_one(sets: Path) -> None:
    command = (sets / "good", "--gt-dir", sets / "gt", "--metrics", "psnr,ssim",
               "--baseline", sets / "poor", "--baseline", sets / "same")  # fmt: skip
    code, document, err = evaluate(*command, "--fail-if-worse", "psnr")
    assert code == 0, err
    found = {(one["metric"], one["baseline"]): one for one in document["comparisons"]}  # type: ignore[attr-defined]
    assert set(found) == {(m, b) for m in ("psnr", "ssim") for b in ("poor", "same")}
    expected = {
        f"{i}.png": psnr(pixels(sets / f"good/{i}.png"), pixels(sets / f"gt/{i}.png"))
        - psnr(pixels(sets / f"poor/{i}.png"), pixels(sets / f"gt/{i}.png"))
        for i in range(8)
    }
    one = found["psnr", "poor"]
    assert one["differences"] == pytest.approx(expected, abs=1e-3)
    assert one["mean_difference"] == pytest.approx(np.mean(list(expected.values())), abs=1e-3)
    assert (one["wins"], one["losses"], one["verdict"]) == (8, 0, "better")
    assert one["interval_95"][0] < one["mean_difference"] < one["interval_95"][1]
    assert "better on psnr (+" in document["verdicts"]["poor"]  # type: ignore[index]
    assert document["verdicts"]["poor"] in err  # type: ignore[index]


def test_fail_if_worse_has_an_exit_code_of_its_own(sets: Path) -> None:
    command = ("--gt-dir", sets / "gt", "--metrics", "psnr", "--fail-if-worse", "psnr", "--baseline")
    code, out, err, error = run("evaluate", sets / "poor", *command, sets / "good", "--json")
    assert isinstance(error, CheckFailed)
    assert code == 6
    assert "psnr" in error.message
    assert json.loads(out)["comparisons"][0]["verdict"] == "worse"  # the scores are kept
    code, _, err, _ = run("evaluate", sets / "poor", *command, sets / "poor")  # no difference is not worse
    assert code == 0, err
    for index in range(3, 8):
        (sets / f"poor/{index}.png").unlink()
    code, _, err, _ = run("evaluate", sets / "poor", *command, sets / "good")
    assert code == 0
    assert "too few images" in err


def test_the_lr_images_add_their_metrics(sets: Path) -> None:
    code, document, err = evaluate(sets / "good", "--lr-dir", sets / "lr", "--metrics", "entropy,psnr")
    assert code == 0, err
    assert set(document["skipped"]) == {"psnr"}  # type: ignore[call-overload]
    for image in document["images"]:  # type: ignore[attr-defined]
        sr, lr = (pixels(Path(image[key])).astype(np.float32) / 255 for key in ("image", "lr"))
        assert image["scores"]["downscale_consistency"] == pytest.approx(downscale_consistency(sr, lr))
        assert image["scores"]["colour_drift"] == pytest.approx(colour_drift(sr, lr))
    code, _, err = evaluate(sets / "good", "--metrics", "colour_drift")
    assert code == 2
    assert "--lr-dir" in err


def test_the_latest_upscale_knows_its_lr_images(sets: Path) -> None:
    pairs = tuple(UpscaledPair(lr=sets / f"lr/{i}.png", sr=sets / f"good/{i}.png") for i in range(3))
    save_last_run(LastRun(input=sets, output=sets, weights="x", scale=4, time="now", pairs=pairs))
    code, document, err = evaluate("--metrics", "entropy")
    assert code == 0, err
    assert [Path(image["lr"]) for image in document["images"]] == [pair.lr for pair in pairs]  # type: ignore[attr-defined]
    assert all("downscale_consistency" in image["scores"] for image in document["images"])  # type: ignore[attr-defined]


def test_bad_companions_are_named_and_the_others_are_scored(sets: Path) -> None:
    whole = (sets / "good/0.png").read_bytes()
    (sets / "lr/0.png").write_bytes((sets / "gt/0.png").read_bytes())  # an HR given as LR
    (sets / "lr/1.png").unlink()
    (sets / "poor/2.png").unlink()
    (sets / "poor/3.png").write_bytes(whole[: len(whole) // 2])
    save(sets / "good/4.png", pixels(sets / "good/4.png").astype(np.uint16) * 257)  # 16-bit beside 8-bit
    save(sets / "good/5.png", pixels(sets / "good/5.png").astype(np.uint8)[:, :, :1])  # gray beside RGB
    save(sets / "good/6.png", pixels(sets / "good/6.png").astype(np.uint8)[:, :-1])  # a pixel less
    code, out, err, error = run("evaluate", sets / "good", "--gt-dir", sets / "gt", "--lr-dir", sets / "lr",
                                "--baseline", sets / "poor", "--metrics", "psnr", "--json")  # fmt: skip
    assert isinstance(error, PartialFailure)
    assert code == 3
    for words in ("good/0.png and its LR", "1.png: no LR image of that name",
                  "2.png: no image of the baseline of that name", "3.png: damaged", "79x64"):  # fmt: skip
        assert words in err, words
    document = json.loads(out)
    scored = {image["name"]: set(image["scores"]) for image in document["images"]}
    lr_only = {"downscale_consistency", "colour_drift"}
    assert scored == {f"{i}.png": {"psnr", *lr_only} for i in (2, 3, 4, 5, 7)} | {
        "0.png": {"psnr"}, "1.png": {"psnr"}, "6.png": lr_only,
    }  # fmt: skip
    assert document["comparisons"][0]["images"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["good", "--baseline", "nowhere"], "--baseline nowhere: no such"),
        (["good", "--baseline", "empty"], "--baseline empty: no images"),
        (["good", "--baseline", "other"], "--baseline other"),
        (["good", "--fail-if-worse", "niqe"], "--baseline"),
        (["good", "--baseline", "poor", "--metrics", "entropy", "--fail-if-worse", "psnr"], "--metrics"),
        (["--dataset", "realsr"], "--root"),
        (["--dataset", "realsr", "--root", "good"], "Canon/Test/4"),
        (["--dataset", "videolq", "--root", "nowhere"], "no such folder"),
        (["--weights", "a,b"], "--lr-dir"),
        (["good", "--weights", "a", "--lr-dir", "lr"], "SR_DIR"),
        (["good", "--lr-dir", "nowhere"], "--lr-dir nowhere"),
    ],
)
def test_bad_usage_is_reported(sets: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(sets)
    (sets / "empty").mkdir()
    save(sets / "other/zzz.png", photo())
    code, _, err, error = run("evaluate", *arguments)
    assert isinstance(error, InputError)
    assert code == 2
    assert words in err


@pytest.mark.slow
def test_the_list_of_metrics_says_whose_weights_are_here(hub: Path) -> None:
    code, document, err = evaluate("--metrics", "list")
    assert code == 0, err
    listed = {metric["name"]: metric for metric in document["metrics"]}  # type: ignore[attr-defined]
    assert listed["psnr"] == {"name": "psnr", "reference": "full", "better": "higher", "range": "~0, ~40",
                              "weights": "needs none"}  # fmt: skip
    assert listed["niqe"]["better"] == "lower"
    assert set(pyiqa.list_models()) < set(listed)
    assert listed["niqe"]["weights"] == listed["lpips"]["weights"] == "not here"
    hub.mkdir(parents=True)
    (hub / "LPIPS_v0.1_alex-df73285e.pth").touch()
    here = weights_states()
    assert (here["lpips"], here["lpips-vgg"], here["niqe"]) == ("here", "not here", "not here")


def test_the_report_says_what_the_crop_applies_to(sets: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", sets / "good", "--gt-dir", sets / "gt", "--lr-dir", sets / "lr", "--metrics", "psnr")
    code, _, err, _ = run(*arguments, "--crop-border", 4, "--output", tmp_path / "a.json")
    assert code == 0, err
    assert "4 pixels left out at each side (downscale_consistency, colour_drift: none)." in " ".join(err.split())
    metrics = json.loads((tmp_path / "a.json").read_text())["metrics"]
    assert {metric["name"]: metric["crop_border"] for metric in metrics} == {
        "psnr": 4,
        "downscale_consistency": 0,
        "colour_drift": 0,
    }


@pytest.mark.slow
def test_metrics_of_whole_sets_are_pyiqas(sets: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real network; its published weights can't be had from a package index, so random ones.
    from pyiqa.archs import inception

    with monkeypatch.context() as patched:
        patched.setattr(inception, "load_pretrained_network", lambda network, url: None)
        torch.manual_seed(0)
        state = inception.fid_inception_v3().state_dict()
    hub.mkdir(parents=True)
    torch.save(state, hub / "weights")
    begin = hashlib.sha256((hub / "weights").read_bytes()).hexdigest()[:8]  # which the name of such a file states
    monkeypatch.setattr(inception, "FID_WEIGHTS_URL", f"https://example.org/pt_inception-{begin}.pth")
    (hub / "weights").rename(hub / f"pt_inception-{begin}.pth")
    for folder in ("good", "poor"):
        for index in range(3, 8):
            (sets / folder / f"{index}.png").unlink()
    code, document, err = evaluate(sets / "good", "--baseline", sets / "poor", "--metrics", "inception_score,entropy",
                                   "--offline", "--crop-border", 8)  # fmt: skip
    assert code == 0, err
    for path in [*(sets / "good").iterdir(), *(sets / "poor").iterdir()]:
        Image.open(path).crop((8, 8, 72, 56)).save(path)
    direct = pyiqa.create_metric("inception_score", device="cpu")
    expected = {
        name: direct(str(sets / name), num_workers=0, verbose=False)["inception_score_mean"]
        for name in ("good", "poor")
    }
    metric = document["metrics"][0]  # type: ignore[index]
    assert (metric["of"], metric["crop_border"]) == ("set", 8)
    assert metric["mean"] == pytest.approx(expected["good"], rel=1e-6)
    assert metric["baselines"]["poor"] == pytest.approx(expected["poor"], rel=1e-6)


# --- data sets --------------------------------------------------------------------------------------------------

# By data set: all files, and what `find_dataset` makes of them: LR → HR, and words for the missing and the extra one.
LAYOUTS: dict[DatasetName, tuple[list[str], dict[str, str | None], list[str]]] = {
    "realsr": (
        ["Canon/Test/4/Canon_001_LR4.png", "Canon/Test/4/Canon_001_HR.png", "Nikon/Test/4/Nikon_001_LR4.png",
         "Nikon/Test/4/Nikon_001_HR.png", "Nikon/Test/4/Nikon_002_LR4.png", "Canon/Test/4/notes.png",
         "Canon/Test/2/Canon_001_LR2.png", "Canon/Train/4/Canon_009_LR4.png"],
        {"Canon/Test/4/Canon_001_LR4.png": "Canon/Test/4/Canon_001_HR.png",
         "Nikon/Test/4/Nikon_001_LR4.png": "Nikon/Test/4/Nikon_001_HR.png", "Nikon/Test/4/Nikon_002_LR4.png": None},
        ["Nikon_002_LR4.png: its HR image is missing", "notes.png: neither"],
    ),
    "drealsr": (
        ["Test_x4/test_LR/a_1_x1.png", "Test_x4/test_HR/a_1_x4.png", "Test_x4/test_LR/b_x4.png",
         "Test_x4/test_HR/b_x1.png", "Test_x4/test_LR/c_x1.png", "Test_x4/test_HR/d_x4.png"],
        {"Test_x4/test_LR/a_1_x1.png": "Test_x4/test_HR/a_1_x4.png",
         "Test_x4/test_LR/b_x4.png": "Test_x4/test_HR/b_x1.png", "Test_x4/test_LR/c_x1.png": None},
        ["c_x1.png: its HR image is missing", "d_x4.png: its LR image is missing"],
    ),
    "ntire20": (
        ["Corrupted-va-x/0801.png", "DIV2K_valid_HR/0801.png", "Corrupted-va-x/0802.png", "DIV2K_valid_HR/0803.png"],
        {"Corrupted-va-x/0801.png": "DIV2K_valid_HR/0801.png", "Corrupted-va-x/0802.png": None},
        ["0802.png: its HR image is missing", "0803.png: its LR image is missing"],
    ),
    "dped": (["iphone/1.png", "iphone/2.jpg"], {"iphone/1.png": None, "iphone/2.jpg": None}, []),
    "videolq": (
        ["000/00000000.png", "000/00000002.png", "001/00000000.png", "001/20261201123000500.png", "cover.png"],
        {"000/00000000.png": None, "000/00000002.png": None, "001/00000000.png": None,
         "001/20261201123000500.png": None},
        ["000: frame 00000001 is missing", "001: frames 00000001 to 20261201123000499 are missing",
         "cover.png: not in the folder of a clip"],
    ),
}  # fmt: skip


def test_the_names_of_sets_are_distinct(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "x/a (2)", "x/a", "y/a")]
    for folder in folders:
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    found = gather(folders[0], baselines=folders[1:])
    assert [one.name for one in found.sets] == ["a", "a (2)", "a (3)", "a (4)"]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("above", ["", "unpacked/here"])
def test_data_sets_are_found_in_their_published_layouts(tmp_path: Path, name: DatasetName, above: str) -> None:
    files, pairs, words = LAYOUTS[name]
    root = tmp_path / "root"
    for file in files:
        (root / above / file).parent.mkdir(parents=True, exist_ok=True)
        (root / above / file).touch()
    found = find_dataset(name, root)
    assert {
        path.relative_to(root / above).as_posix(): found.hr[path].relative_to(root / above).as_posix()
        if path in found.hr
        else None
        for path in found.lr
    } == pairs
    for word in words:
        assert any(word in problem for problem in found.problems), (word, found.problems)
    assert len(found.problems) == len(words)


@pytest.mark.slow
def test_models_are_run_on_a_data_set_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(6):
        clean = photo(64, 80, seed=index)
        save(tmp_path / f"set/Canon/Test/4/Canon_{index:03}_HR.png", clean)
        small = np.asarray(Image.fromarray(clean).resize((20, 16), Image.Resampling.BOX))
        save(tmp_path / f"set/Canon/Test/4/Canon_{index:03}_LR4.png", small)
    (tmp_path / "set/Canon/Test/4/Canon_000_HR.png").unlink()
    for name, push in (("plain", 0.0), ("shifted", 0.2)):
        torch.manual_seed(0)
        net = SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=1, upscale=4)
        state = {key: tensor * 0.0 for key, tensor in net.state_dict().items()}  # nearest neighbour, by its skip
        state["body.4.bias"] = state["body.4.bias"] + push
        save_file(state, tmp_path / f"{name}.safetensors")
    code, out, err, error = run("evaluate", "--dataset", "realsr", "--root", "set", "--metrics", "psnr", "--json",
                                "--weights", "shifted.safetensors,plain.safetensors")  # fmt: skip
    assert isinstance(error, PartialFailure), err
    assert code == 3
    assert "Canon_000_LR4.png: its HR image is missing" in err
    document = json.loads(out)
    assert document["set"] == "plain"
    assert "too few images for psnr" in document["verdicts"]["shifted"]  # five have HR
    assert "better on downscale_consistency" in document["verdicts"]["shifted"]
    for image in document["images"]:
        lr, sr = pixels(Path(image["lr"])), pixels(Path(image["image"]))
        np.testing.assert_array_equal(sr, lr.repeat(4, 0).repeat(4, 1))
        if image["reference"]:
            assert image["scores"]["psnr"] == pytest.approx(psnr(sr, pixels(Path(image["reference"]))), abs=1e-3)
        assert image["baselines"]["shifted"]["scores"]["colour_drift"] > image["scores"]["colour_drift"]
    # What the data set's images were upscaled to can be scored as a folder, too.
    code, document, err = evaluate("upscaled/plain", "--dataset", "realsr", "--root", "set", "--metrics", "psnr")
    assert document["metrics"][0]["images"] == 5, err  # type: ignore[index]


def nearest(path: Path) -> None:
    """Weights of a network that repeats pixels."""
    net = SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=1, upscale=4)
    save_file({key: tensor * 0.0 for key, tensor in net.state_dict().items()}, path)


def test_upscaled_images_never_replace_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, size in (("model", 8), ("gt", 32), ("mine/model", 5)):
        save(tmp_path / folder / "0.png", photo(size, size, seed=1))
    nearest(tmp_path / "model.safetensors")
    nearest(tmp_path / "gt.safetensors")
    (tmp_path / "other").mkdir()
    nearest(tmp_path / "other/model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for weights, folder, message in (
        ("model.safetensors", ".", "would replace an input"),
        ("gt.safetensors", ".", "would replace an input"),
        ("model.safetensors", "mine", "not made by pdd"),
        ("model.safetensors,other/model.safetensors", "new", "two files are named model"),
        ("v1.4,v1.5", "new", "no weights are named 'v1.4'"),  # a name isn't cut at its point
    ):
        *_, error = run("evaluate", "--lr-dir", "model", "--gt-dir", "gt", "--weights", weights, "--upscaled-dir",
                        folder, "--metrics", "psnr")  # fmt: skip
        assert isinstance(error, InputError)
        assert message in error.message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before
    for _ in range(2):  # what it made itself is made anew
        code, _, err, _ = run("evaluate", "--lr-dir", "model", "--gt-dir", "gt", "--weights", "model.safetensors",
                              "--metrics", "psnr")  # fmt: skip
        assert code == 0, err


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_asks_for_nothing(sets: Path) -> None:
    odd = "<b>&'\"{{table}}</script>.png".replace("/", "_")
    for folder in ("good", "poor", "gt", "lr"):
        (sets / folder / "0.png").rename(sets / folder / odd)
    code, document, err = evaluate(
        sets / "good", "--gt-dir", sets / "gt", "--lr-dir", sets / "lr", "--baseline", sets / "poor",
        "--metrics", "psnr,piqe", "--output", sets / "report.html",
    )  # fmt: skip
    assert code == 0, err
    text = (sets / "report.html").read_text()
    assert not re.search(r"""(?:https?:)?//[a-z]|url\(""", re.sub(r'"data:[^"]*"', "", text))
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert odd in page.texts
    for one in document["comparisons"]:  # type: ignore[attr-defined]
        assert all(repr(value) in page.values for value in one["differences"].values())
    for image in document["images"]:  # type: ignore[attr-defined]
        assert all(repr(value) in page.values for value in image["scores"].values())
    assert document["verdicts"]["poor"] in page.texts  # type: ignore[index]
    cards = json.loads(page.json)
    assert sorted(card["name"] for card in cards) == sorted(image["name"] for image in document["images"])  # type: ignore[attr-defined]
    for card in cards:
        assert [view["label"] for view in card["views"]] == ["LR nearest", "LR bicubic", "poor", "good", "HR"]
        nearest = Image.open(io.BytesIO(base64.b64decode(card["views"][0]["src"].split(",")[1])))
        lr = pixels(sets / "lr" / card["name"])
        np.testing.assert_array_equal(np.asarray(nearest), lr.repeat(4, 0).repeat(4, 1))
        hr = Image.open(io.BytesIO(base64.b64decode(card["views"][-1]["src"].split(",")[1])))
        assert psnr(np.asarray(hr).astype(float), pixels(sets / "gt" / card["name"])) > 28


def test_the_best_and_the_worst_are_shown_where_they_differ(tmp_path: Path) -> None:
    for index in range(14):
        clean = photo(40, 48, seed=index)
        save(tmp_path / f"gt/{index:02}.png", clean)
        save(tmp_path / f"sr/{index:02}.png", noisy(clean, 2 + 3 * index))
    large = np.full((600, 900, 3), 128, np.uint8)
    save(tmp_path / "gt/14.png", large)
    large[500:560, 700:800] = 140  # 46 dB: the best
    save(tmp_path / "sr/14.png", large)
    code, _, err = evaluate(tmp_path / "sr", "--gt-dir", tmp_path / "gt", "--metrics", "psnr",
                            "--output", tmp_path / "r.html")  # fmt: skip
    assert code == 0, err
    cards = json.loads(Page((tmp_path / "r.html").read_text()).json)
    assert {card["name"] for card in cards if card["group"] == "best"} == {f"{i:02}.png" for i in (14, 0, 1, 2, 3, 4)}
    assert [card["name"] for card in cards if card["group"] == "worst"] == [f"{i:02}.png" for i in range(13, 7, -1)]
    shown = next(card for card in cards if card["name"] == "14.png")
    assert (shown["width"], shown["height"]) == (512, 512)
    x, y = map(int, re.search(r"from (\d+), (\d+)", shown["note"]).groups())  # type: ignore[union-attr]
    assert x <= 700 <= 800 <= x + 512
    assert y <= 500 <= 560 <= y + 512


def test_the_csv_holds_what_the_page_shows(sets: Path) -> None:
    (sets / "gt/0.png").unlink()
    (sets / "good/1.png").write_bytes(b"no image")
    _, document, err = evaluate(sets / "good", "--gt-dir", sets / "gt", "--baseline", sets / "poor",
                                "--metrics", "psnr,downscale_consistency", "--output", sets / "s.csv")  # fmt: skip
    with (sets / "s.csv").open() as opened:
        listed = list(csv.DictReader(opened))
    rows = {row["image"]: row for row in listed}
    skipped, *problems = [row["reference"] for row in listed if row["image"] == "not scored"]
    assert skipped == "downscale_consistency was skipped: it needs the LR inputs: add --lr-dir DIR"
    assert problems == document["problems"]
    assert [re.search(r"\d\.png", problem)[0] for problem in problems] == ["0.png", "1.png"]  # type: ignore[index]
    assert all(problem in err for problem in problems)
    assert f"pyiqa {pyiqa.__version__}" in rows["about"]["reference"]
    one = document["comparisons"][0]  # type: ignore[index]
    for image in document["images"]:  # type: ignore[attr-defined]
        row = rows[image["image"]]
        if not image["scores"]:
            assert not row["psnr"]
            continue
        assert float(row["psnr"]) == image["scores"]["psnr"]
        assert float(row["poor: psnr"]) == image["baselines"]["poor"]["scores"]["psnr"]
        assert float(row["psnr − poor"]) == one["differences"][image["name"]]
    assert [float(rows[f"95 % interval, {end}"]["psnr − poor"]) for end in ("low", "high")] == one["interval_95"]
    assert rows["verdict"]["psnr − poor"] == "better"
