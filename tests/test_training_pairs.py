"""`pdd adapt --pairs-lr --pairs-hr`: aligned crops, checks of the pairs, the verdict by the ground truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from spandrel import ModelLoader

from pdd_cli.adaptation.judge import decide_by_ground_truth
from pdd_cli.adaptation.sources import read_sources
from pdd_cli.adaptation.validation import ValidationScores
from pdd_cli.data.datasets import AlignedPair, CropSampler
from pdd_cli.data.degradations import Degradation
from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo

SCALE = 4


def reduced(hr: np.ndarray) -> np.ndarray:
    """The mean of each square of SCALE x SCALE pixels."""
    height, width = hr.shape[0] // SCALE, hr.shape[1] // SCALE
    means = hr.reshape(height, SCALE, width, SCALE, 3).astype(float).mean((1, 3))
    return means.round().astype(np.uint8)


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    """Five aligned pairs of different scenes."""
    folders = (tmp_path / "pairs-lr", tmp_path / "pairs-hr")
    for folder in folders:
        folder.mkdir()
    for number in range(5):
        hr = photo(SCALE * 32, SCALE * 40, seed=number)
        Image.fromarray(reduced(hr)).save(folders[0] / f"{number}_LR4.png")
        Image.fromarray(hr).save(folders[1] / f"{number}_HR.png")
    return folders


def config(pairs: tuple[Path, Path], **more: object) -> AdaptConfig:
    return AdaptConfig(pairs_lr=pairs[0], pairs_hr=pairs[1], crop=16, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [40, 12], ids=["larger than a crop", "mirrored"])
def test_crops_of_a_pair_show_the_same(side: int) -> None:
    hr = photo(SCALE * side, SCALE * (side + 6))
    sampler = CropSampler([], [], 16, SCALE, Degradation(("area",), None, None, None, False, True), 0,
                          pairs=[AlignedPair("a", reduced(hr), hr)], pairs_share=1.0)  # fmt: skip
    batch = sampler.batch(0, 24)  # many flips and transposes
    assert batch.lr_t is None
    expected = torch.nn.functional.avg_pool2d(batch.hr_s, SCALE)
    assert (batch.lr_s - expected).abs().max() < 0.51 / 255
    assert len({crop.numpy().tobytes() for crop in batch.lr_s}) > 8


def test_pairs_beside_synthetic_crops_in_the_given_fraction() -> None:
    white, black = (np.full((96, 96, 3), value, np.uint8) for value in (255, 0))
    sampler = CropSampler([black], [black], 16, SCALE, Degradation(("area",), None, None, None, False, True), 0,
                          pairs=[AlignedPair("a", white[:24, :24], white)], pairs_share=0.25)  # fmt: skip
    batch = sampler.batch(0, 400)
    assert batch.lr_t is not None
    of_pairs = batch.hr_s.amax((1, 2, 3)) == 1
    assert 70 < int(of_pairs.sum()) < 130
    assert torch.equal(of_pairs, batch.lr_s.amax((1, 2, 3)) == 1)
    assert batch.lr_t.amax() == 0


def test_images_that_are_no_pair_are_named_and_left_out(pairs: tuple[Path, Path]) -> None:
    lr, hr = pairs
    Image.fromarray(photo(32, 40, seed=9)).save(lr / "alone_LR4.png")
    Image.fromarray(photo(120, 160, seed=1)).save(hr / "1_HR.png")
    Image.fromarray(np.roll(photo(SCALE * 32, SCALE * 40, seed=2), 4 * SCALE, axis=1)).save(hr / "2_HR.png")
    (hr / "3_HR.png").write_bytes(b"no image")
    warnings: list[str] = []
    images = read_sources(config(pairs), SCALE, warnings.append, lambda text: None)
    assert [pair.name for pair in images.pairs] == ["0_LR4.png", "4_LR4.png"]
    text = "\n".join(warnings)
    for words in (
        "alone_LR4.png: no HR image of that name",
        "1_HR.png: the HR image is 160x120, but must be 160x128",
        "2_HR.png: the images are not aligned: the HR image is shifted by about 4, 0 LR pixels",
        "3_HR.png",
    ):
        assert words in text, (words, text)
    assert len(warnings) == 4
    assert [source.option for source in images.sources] == ["--pairs-lr", "--pairs-hr"]

    for number in (0, 4):
        (hr / f"{number}_HR.png").unlink()
    with pytest.raises(InputError, match="no usable pair"):
        read_sources(config(pairs), SCALE, warnings.append, lambda text: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no images: give --real-dir"),
        (("--dataset", "realsr"), "--dataset NAME and --root DIR must be given together"),
        (("--dataset", "realsr", "--root", "a", "--real-dir", "b"), "--dataset already names the real images"),
        (("--pairs-lr", "lr"), "--pairs-lr DIR and --pairs-hr DIR must be given together"),
        (("--pairs-hr", "lr"), "--pairs-lr DIR and --pairs-hr DIR must be given together"),
        (("--pairs-lr", "lr", "--pairs-hr", "hr", "--mode", "static", "--generalist", "x"), "--mode static has no"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_errors(
    pdd: Callable[..., Outcome], options: tuple[str, ...], words: str
) -> None:
    outcome = pdd("adapt", *options)
    assert outcome.code == 2
    assert words in outcome.err


def test_the_verdict_needs_a_gain_and_no_greater_distance() -> None:
    base = ValidationScores(25.0, 0.7, 0.3)
    better, blurred, worse = (ValidationScores(26, 0.7, 0.27), ValidationScores(27, 0.7, 0.31),
                              ValidationScores(24, 0.7, 0.3))  # fmt: skip
    assert better.gain(base) == pytest.approx((1 + 10 * np.log10(0.3 / 0.27)) / 2)
    verdict = decide_by_ground_truth({0.5: better, 1.0: blurred}, base)
    assert (verdict.keep, verdict.strength) == (True, 0.5)
    assert "PSNR 26.00 dB (base 25.00)" in verdict.reason
    assert decide_by_ground_truth({1.0: blurred}, base).keep is False
    assert "the base is better" in decide_by_ground_truth({1.0: worse}, base).reason
    assert "no clear gain" in decide_by_ground_truth({1.0: base}, base).reason


@pytest.mark.parametrize(
    ("name", "lr", "others"),
    [
        ("realsr", ["Canon/Train/4/Canon_001_LR4.png", "Nikon/Train/4/Nikon_001_LR4.png"],
         ["Canon/Train/4/Canon_001_HR.png", "Canon/Train/2/Canon_001_LR2.png", "Canon/Test/4/Canon_002_LR4.png"]),
        ("drealsr", ["Train_x4/train_LR/a_x1.png"], ["Train_x4/train_HR/a_x4.png", "Test_x4/test_LR/b_x1.png"]),
        ("ntire20", ["Corrupted-tr-x/0001.png"], ["Corrupted-va-x/0801.png", "DIV2K_train_HR/0001.png"]),
        ("dped", ["dped/iphone/training_data/iphone/0.jpg"], ["dped/iphone/training_data/canon/0.jpg"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_training_images_of_data_sets(tmp_path: Path, name: str, lr: list[str], others: list[str]) -> None:
    for path in (*lr, *others):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(24, 24, len(path))).save(tmp_path / path)
    config = AdaptConfig(dataset=name, root=tmp_path, crop=16)  # type: ignore[arg-type]
    images = read_sources(config, 4, print, print)
    assert sorted(images.sources[0].content) == lr
    assert len(images.real) == len(lr)
    assert config.lr_dir == tmp_path
    for path in lr:
        (tmp_path / path).unlink()
    with pytest.raises(InputError, match=f"no LR training images of {name} for x4"):
        read_sources(config, 4, print, print)


def test_both_sides_of_the_pairs_may_be_in_one_folder(tmp_path: Path) -> None:
    for number in range(2):
        hr = photo(128, 160, number)
        Image.fromarray(hr).save(tmp_path / f"Canon_00{number}_HR.png")
        Image.fromarray(reduced(hr)).save(tmp_path / f"Canon_00{number}_LR4.png")
    images = read_sources(config((tmp_path, tmp_path)), SCALE, print, lambda text: None)
    assert [pair.name for pair in images.pairs] == ["Canon_000_LR4.png", "Canon_001_LR4.png"]
    assert [pair.hr.shape for pair in images.pairs] == [(128, 160, 3)] * 2


def arguments(ground: Path, pairs: tuple[Path, Path]) -> list[object]:
    """`pdd adapt` on pairs alone, with tiny networks."""
    _, *options = command(ground, steps=8)[3:]
    for option in ("--real-dir", "--hr-dir"):
        place = options.index(option)
        del options[place : place + 2]
    return ["adapt", *options, "--pairs-lr", pairs[0], "--pairs-hr", pairs[1]]


@pytest.mark.slow
def test_a_run_on_pairs_is_supervised_and_judged_on_pairs_that_it_has_not_seen(
    pdd: Callable[..., Outcome], ground: Path, pairs: tuple[Path, Path]
) -> None:
    done = pdd(*arguments(ground, pairs), "--hr-dir", "kodak", "--json")
    assert done.code == 0, done.err
    assert "--hr-dir kodak is not used" in done.err
    run = Path("runs/pairs-lr")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(log) == 8
    assert not {"inter", "intra", "consistency", "self_ensemble"} & {key for line in log for key in line}
    assert {"pixel", "perceptual", "adversarial"} <= log[-1].keys()
    verdict = json.loads((run / "verdict.json").read_text())
    assert verdict["held_out_pairs"] == 1
    card = json.loads(done.out)["card"]["adapted"]
    assert (card["pairs"], card["real_images"], card["hr_from"]) == (4, 0, "the pairs")

    # The held-out pair is the third of five; the base's PSNR on it by spandrel and NumPy.
    lr, hr = (np.asarray(Image.open(folder / f"2_{end}.png")) for folder, end in zip(pairs, ("LR4", "HR"), strict=True))
    base = ModelLoader().load_from_file(str(ground / "base.safetensors")).model.eval()
    with torch.inference_mode():
        sr = (base(torch.tensor(lr).permute(2, 0, 1)[None] / 255).clamp(0, 1) * 255).round()[0].permute(1, 2, 0)
    error = np.mean((sr.numpy().astype(float) - hr) ** 2)
    scores = verdict["base"]["held_out_pairs"]
    assert scores["psnr"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)
    for found in verdict["adapted"]:
        ours = found["held_out_pairs"]
        gain = (ours["psnr"] - scores["psnr"] + 10 * np.log10(scores["distance"] / ours["distance"])) / 2
        assert found["score"] == pytest.approx(gain, abs=1e-6)
    assert "held-out pairs" in (run / "report.html").read_text(encoding="utf-8")

    # A resumed run must have the same pairs.
    (pairs[1] / "4_HR.png").write_bytes((pairs[1] / "4_HR.png").read_bytes() + b"\0")
    changed = pdd("adapt", "--resume", "--name", "pairs-lr")
    assert changed.code == 2
    assert "--pairs-hr differ" in changed.err


@pytest.mark.slow
def test_pairs_beside_real_images(pdd: Callable[..., Outcome], ground: Path, pairs: tuple[Path, Path]) -> None:
    done = pdd(*command(ground, steps=8)[3:], "--pairs-lr", pairs[0], "--pairs-hr", pairs[1], "--json")
    assert done.code == 0, done.err
    assert "2 real images and 4 pairs with ground truth" in done.err
    log = Path("runs/realLR/log.jsonl").read_text().splitlines()
    assert "inter" in json.loads(log[-1])
    assert json.loads(Path("runs/realLR/verdict.json").read_text())["held_out_pairs"] == 1
