"""`pdd adapt --val-lr --val-hr`: the scores against formulas; that nothing is chosen by them; what can't be paired."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image
from spandrel import ModelLoader
from torch.nn.functional import normalize, relu

from tests.helpers.commands import Outcome, command
from tests.helpers.networks import efficientnet_state


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs; the third LR image is larger than what is scored of it."""
    rng = np.random.default_rng(0)
    lr, hr = tmp_path / "lr", tmp_path / "hr"
    for folder in (lr, hr):
        folder.mkdir()
    for number, (width, height) in enumerate([(24, 20), (20, 24), (80, 72)]):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        large = coarse.resize((4 * width, 4 * height), Image.Resampling.BICUBIC)
        large.save(hr / f"{number}_HR.png")
        large.resize((width, height), Image.Resampling.BOX).save(lr / f"{number}_LR4.png")
    return lr, hr


def adapt(pdd: Callable[..., Outcome], ground: Path, *more: object) -> Outcome:
    return pdd(*command(ground, steps=8)[3:], *more)


def chosen() -> object:
    """What a run has chosen, and why."""
    run = Path("runs/realLR")
    judged = [json.loads(line) for line in (run / "judgements.jsonl").read_text().splitlines()]
    scores = [(line["step"], line["which"], line["score"]) for line in judged]
    return scores, (run / "best.safetensors").read_bytes(), json.loads((run / "verdict.json").read_text())["strength"]


@pytest.mark.slow
def test_the_scores_are_those_of_the_formulas_and_nothing_is_chosen_by_them(
    pdd: Callable[..., Outcome], ground: Path, pairs: tuple[Path, Path]
) -> None:
    assert adapt(pdd, ground).code == 0
    without = chosen()
    done = adapt(pdd, ground, "--val-lr", pairs[0], "--val-hr", pairs[1], "--json", "--overwrite")
    assert done.code == 0, done.err
    assert chosen() == without
    verdict = json.loads(Path("runs/realLR/verdict.json").read_text())
    assert verdict["pairs"] == 3

    base = ModelLoader().load_from_file(str(ground / "base.safetensors")).model.eval()
    ssim, features = pyiqa.create_metric("ssim", device="cpu"), efficientnet_state()[0]
    mean, std = (torch.tensor(three).view(1, 3, 1, 1) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    scores = []
    for number in range(3):
        lr, hr = (np.asarray(Image.open(folder / f"{number}_{end}.png"))
                  for folder, end in zip(pairs, ("LR4", "HR"), strict=True))  # fmt: skip
        if number == 2:  # 64 of 80 x 72 pixels
            lr, hr = lr[4:68, 8:72], hr[16:272, 32:288]
        lr_image, hr_image = (torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in (lr, hr))
        with torch.inference_mode():
            sr = (base(lr_image).clamp(0, 1) * 255).round() / 255
            levels = [[normalize(relu(level)) for level in features((image - mean) / std)] for image in (sr, hr_image)]
        distances = [float(((a - b) ** 2).sum(1).mean()) for a, b in zip(*levels, strict=True)]
        error = np.mean((sr.numpy().astype(float) - hr_image.numpy()) ** 2)
        scores.append((-10 * np.log10(error), float(ssim(sr, hr_image)), np.mean(distances)))
    expected = dict(zip(("psnr", "ssim", "distance"), np.mean(scores, axis=0), strict=True))
    assert verdict["base"]["truth"] == pytest.approx(expected, rel=1e-4)

    # Told at each judgement, at each strength, and at the end.
    judged = [json.loads(line) for line in Path("runs/realLR/judgements.jsonl").read_text().splitlines()]
    assert all(line["truth"].keys() == expected.keys() for line in [*judged, *verdict["adapted"]])
    assert f"PSNR {json.loads(done.out)['truth']['adapted']['psnr']:.2f} dB (base {expected['psnr']:.2f})" in done.err


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_is_no_pair_is_named_before_the_run(
    pdd: Callable[..., Outcome], ground: Path, pairs: tuple[Path, Path], dry: tuple[str, ...]
) -> None:
    lr, hr = pairs
    assert "must be given together" in adapt(pdd, ground, "--val-lr", lr, *dry).err
    nowhere = adapt(pdd, ground, "--val-lr", lr, "--val-hr", "nowhere", *dry)
    assert (nowhere.code, "--val-hr nowhere: no such folder" in nowhere.err) == (2, True)
    Image.open(lr / "0_LR4.png").resize((25, 20)).save(lr / "0_LR4.png")
    size = adapt(pdd, ground, "--val-lr", lr, "--val-hr", hr, *dry)
    assert size.code == 2
    assert "0_HR.png is 96x80" in size.err
    assert "100x80 pixels" in size.err
    (hr / "1_HR.png").rename(hr / "another.png")
    alone = adapt(pdd, ground, "--val-lr", lr, "--val-hr", hr, *dry)
    assert alone.code == 2
    assert "1_LR4.png: no image of that name" in alone.err
    assert not Path("runs").exists()
