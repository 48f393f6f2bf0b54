"""A run ends by itself when the judgements find nothing better, interrupted or not at the same step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdd_cli.adaptation.judge import stalled
from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.prepare import Run, WeightFiles, prepare_run
from pdd_cli.errors import InputError
from pdd_cli.runtime import Runtime
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve
from tests.helpers.commands import Outcome, command

# A step of 1e-30 changes nothing.
NEVER_BETTER = (
    "--set",
    "optimizer.learning_rate=1e-30",
    "--set",
    "early_stopping=2",
)


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([], 1, False), ([1], 1, False), ([1, 2], 1, False), ([2, 1], 1, True), ([1, 1], 1, True),
        ([0, 3, 1, 2], 2, True), ([0, 3, 1, 2], 3, False), ([0, 3, 1, 4], 2, False), ([-1, -2, -3], 2, True),
    ],
)  # fmt: skip
def test_stalled(scores: list[float], patience: int, expected: bool) -> None:
    assert stalled(scores, patience) is expected


def test_off_and_numbers_are_allowed() -> None:
    def read(value: str) -> object:
        settings = resolve(AdaptConfig, "adapt", options={"real_dir": "x"}, overrides=[f"early_stopping={value}"])
        assert AdaptConfig.model_validate(settings.model_dump(mode="json")) == settings
        return settings.early_stopping

    assert (read("off"), read("3")) == (False, 3)
    for wrong in ("-1", "true", "soon", "2.5"):
        with pytest.raises(InputError, match="early_stopping"):
            read(wrong)


@pytest.mark.slow
def test_the_run_ends_early_with_a_verdict(pdd: Callable[..., Outcome], ground: Path) -> None:
    done = pdd(*command(ground, *NEVER_BETTER, steps=40)[3:], "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["steps"] == 12  # judged at 4, 8 and 12, the last two no better than the first
    assert "stopped early after step 12 of 40" in done.err
    assert "verdict: reject" in done.err
    again = pdd(*command(ground, *NEVER_BETTER, steps=40)[3:], "--resume", "--json")
    assert (again.code, json.loads(again.out)["steps"]) == (0, 12)
    more = pdd(*command(ground, *NEVER_BETTER, steps=40)[3:], "--resume", "--json", "--set", "early_stopping=5")
    assert (more.code, json.loads(more.out)["steps"]) == (0, 24)


@pytest.mark.slow
def test_an_interrupted_run_ends_at_the_same_step(tmp_path: Path, ground: Path) -> None:
    def prepared(folder: str, *, resume: bool) -> Run:
        config = AdaptConfig(
            real_dir=ground / "realLR", hr_dir=ground / "hr", runs_dir=tmp_path / folder, crop=16, batch_size=1,
            steps=40, checkpoint_every=2, preview_every=100, early_stopping=2, optimizer={"learning_rate": 3e-3},
            losses={"consistency": 0},
        )  # type: ignore[arg-type]  # fmt: skip
        files = WeightFiles(ground / "base.safetensors", None, "efficientnet-lite0", ground / "features.safetensors")
        runtime = Runtime(torch.device("cpu"), "fp32")
        return prepare_run(config, files, runtime, name="r", resume=resume, overwrite=False, warn=print)

    whole = prepared("whole", resume=False)
    list(train(whole, lambda: False))
    assert 2 < whole.state.step < 40
    stop = whole.state.step - 1  # between two judgements
    first = prepared("parts", resume=False)
    list(train(first, lambda: first.state.step == stop))
    assert (first.state.step, first.finished) == (stop, False)
    rest = prepared("parts", resume=True)
    assert len(list(train(rest, lambda: False))) == 1
    assert rest.finished
    for name in ("judgements.jsonl", "best.safetensors"):
        assert (rest.folder.path / name).read_bytes() == (whole.folder.path / name).read_bytes()
