"""`pdd evaluate`: the best values, tables for papers, the origin of a report, `--metrics paper`."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdd_cli.settings.evaluate import EvaluateConfig
from pdd_cli.version import __version__
from tests.helpers.commands import Outcome
from tests.helpers.images import photo, psnr


@pytest.fixture
def sets(pdd: Callable[..., Outcome]) -> dict[str, float]:
    """Folders `hr`, `good_1` and `bad` of two images each, and the mean PSNR of the latter two."""
    rng = np.random.default_rng(0)
    means = {}
    for number in range(2):
        hr = photo(64, 64, seed=number)
        for folder, noise in (("hr", 0), ("good_1", 4), ("bad", 16)):
            Path(folder).mkdir(exist_ok=True)
            noisy = np.clip(hr + rng.normal(0, noise, hr.shape), 0, 255).round().astype(np.uint8)
            Image.fromarray(noisy).save(f"{folder}/{number}.png")
            means[folder] = means.get(folder, 0.0) + (psnr(noisy, hr) / 2 if noise else 0)
    return means


def evaluate(pdd: Callable[..., Outcome], *more: object) -> Outcome:
    return pdd("evaluate", "bad", "--baseline", "good_1", "--gt-dir", "hr", "--metrics", "psnr,gmsd", *more)


def test_the_best_mean_is_marked_everywhere(pdd: Callable[..., Outcome], sets: dict[str, float]) -> None:
    shown = evaluate(pdd, "--output", "table.md")
    assert shown.code == 0, shown.err
    good, bad = (f"{sets[name]:.2f}" for name in ("good_1", "bad"))
    rows = [re.split(r" \| ", line.strip("| ")) for line in Path("table.md").read_text().splitlines()[:4]]
    assert rows[0] == ["model", "psnr ↑", "gmsd ↓"]
    assert rows[2][:2] == [r"good\_1", f"**{good}**"]
    assert rows[3][:2] == ["bad", bad]
    assert rows[2][2].startswith("**0.")
    assert len(re.findall(r"\d \*", shown.out)) == 2

    assert evaluate(pdd, "--output", "report.html").code == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert page.count('<td class="best">') == 2

    assert evaluate(pdd, "--output", "scores.csv").code == 0
    with Path("scores.csv").open() as file:
        about = {row["image"]: row for row in csv.DictReader(file)}["about"]["reference"]
    document = json.loads(evaluate(pdd, "--json").out)
    assert [metric["best"] for metric in document["metrics"]] == [["good_1"], ["good_1"]]
    assert document["origin"]["versions"]["pdd"] == __version__
    for text in (about, page, Path("table.md").read_text()):
        assert f"torch {torch.__version__.split('+')[0]}" in text
        assert re.search(r"date: 20\d\d-\d\d-\d\dT", text)
        assert "command: pdd" in text
        assert "machine: " in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
def test_latex_accepts_the_table(pdd: Callable[..., Outcome], sets: dict[str, float]) -> None:
    assert evaluate(pdd, "--output", "table.tex").code == 0
    Path("page.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    )
    subprocess.run(["pdflatex", "-halt-on-error", "page"], check=True, capture_output=True)


def test_the_table_for_latex(pdd: Callable[..., Outcome], sets: dict[str, float]) -> None:
    assert evaluate(pdd, "--output", "table.tex").code == 0
    lines = [line for line in Path("table.tex").read_text().splitlines() if not line.startswith("%")]
    assert lines[:3] == [r"\begin{tabular}{lrr}", r"\toprule", r"Model & psnr $\uparrow$ & gmsd $\downarrow$ \\"]
    assert lines[4].startswith(rf"good\_1 & \textbf{{{sets['good_1']:.2f}}} & \textbf{{0.")
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_the_weights_of_the_images_are_named(pdd: Callable[..., Outcome], ground: Path) -> None:
    weights = ground / "base.safetensors"
    assert pdd("upscale", ground / "realLR", "out", "--weights", weights, "--engine", "torch").code == 0
    document = json.loads(pdd("evaluate", "out", "--metrics", "entropy", "--json").out)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert document["origin"]["weights"]["out"] == [f"base.safetensors (sha256 {digest})"]


def test_the_command_line_is_in_the_report(
    pdd: Callable[..., Outcome], sets: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", "hr", "--metrics", "entropy", "--json"]
    monkeypatch.setattr(sys, "argv", ["/bin/pdd", *command])
    assert json.loads(pdd(*command).out)["origin"]["command"] == f"pdd {' '.join(command)}"


def test_metrics_of_papers() -> None:
    six = ("psnr", "ssim", "lpips", "dists", "niqe", "musiq")
    settings = EvaluateConfig(metrics=("paper", "fsim", "psnr"))
    assert (settings.metrics, settings.crop_border) == ((*six, "fsim"), 4)
    assert EvaluateConfig(metrics=("paper",), crop_border=0).crop_border == 0
    assert EvaluateConfig(metrics=("psnr",)).crop_border == 0


@pytest.mark.parametrize("name", ["mine.csv", "mine.html", "mine.json", "mine.md", "mine.tex"])
def test_a_report_replaces_only_reports(pdd: Callable[..., Outcome], sets: dict[str, float], name: str) -> None:
    Path(name).write_text("mine")
    found = evaluate(pdd, "--output", name)
    assert found.code == 2
    assert "was not written by pdd" in found.err
    assert Path(name).read_text() == "mine"
    Path(name).unlink()
    assert evaluate(pdd, "--output", name).code == 0
    assert evaluate(pdd, "--output", name).code == 0
