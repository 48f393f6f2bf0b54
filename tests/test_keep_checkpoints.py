"""`pdd adapt --keep-checkpoints` and `--judge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.commands import Outcome, command


@pytest.mark.slow
def test_kept_weights_can_be_judged(pdd: Callable[..., Outcome], ground: Path) -> None:
    done = pdd(*command(ground, "--keep-checkpoints", "2", steps=12)[3:])
    assert done.code == 0, done.err
    run = Path("runs/realLR")
    kept = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_000008.safetensors", "step_000012.safetensors"]
    judged = [json.loads(line) for line in (run / "judgements.jsonl").read_text().splitlines()]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}

    found = pdd("adapt", "--resume", "--name", "realLR", "--judge", kept[0], "--json")

    assert found.code == 0, found.err
    assert "verdict: " in found.err
    document = json.loads(found.out)
    full = next(one for one in document["adapted"] if one["strength"] == 1)
    assert full["score"] == pytest.approx(max(one["score"] for one in judged if one["step"] == 8), abs=1e-3)
    assert before == {path: path.read_bytes() for path in before}
    assert pdd("upscale", ground / "realLR/0.png", "out.png", "--weights", kept[1], "--engine", "torch").code == 0

    wrong = pdd("adapt", "--resume", "--name", "realLR", "--judge", ground / "features.safetensors")
    assert (wrong.code, "the weights belong to another network than this run's" in wrong.err) == (2, True)
    assert load_file(kept[0]).keys() == load_file(run / "best.safetensors").keys()


def test_judging_needs_a_run(pdd: Callable[..., Outcome]) -> None:
    found = pdd("adapt", "--real-dir", ".", "--judge", "x.safetensors")
    assert found.code == 2
    assert "--resume --name NAME" in found.err
