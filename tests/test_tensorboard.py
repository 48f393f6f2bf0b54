"""The log for TensorBoard, read back by TensorBoard's own reader."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.commands import Outcome, command

pytestmark = pytest.mark.slow

RUN = Path("runs/realLR")


def lines(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (RUN / name).read_text().splitlines()]


def test_it_tells_what_the_log_tells_once_each_step_after_resuming(pdd: Callable[..., Outcome], ground: Path) -> None:
    arguments = [*command(ground, steps=8)[3:], "--set", "tensorboard=true"]
    assert pdd(*arguments).code == 0
    # What a killed run leaves: events of steps beyond its checkpoint, which are done again.
    saved = (RUN / "checkpoint.pt").read_bytes()
    assert pdd(*arguments, "--resume", "--steps", 12).code == 0
    (RUN / "checkpoint.pt").write_bytes(saved)
    assert pdd(*arguments, "--resume", "--steps", 12).code == 0

    events = EventAccumulator(str(RUN / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    log = lines("log.jsonl")
    for tag, key in (("loss/pixel", "pixel"), ("loss/inter", "inter"), ("learning_rate", "learning_rate")):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in log if key in line]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    for which in ("specialist", "ema"):
        expected = [(line["step"], pytest.approx(line["score"], rel=1e-6, abs=1e-6))
                    for line in lines("judgements.jsonl") if line["which"] == which]  # fmt: skip
        assert [(event.step, event.value) for event in events.Scalars(f"judgement/score/{which}")] == expected
    assert [event.step for event in events.Images("preview")] == [6, 8, 12]
    assert events.Images("preview")[0].encoded_image_string.startswith(b"\x89PNG")


def test_it_is_refused_without_the_package(
    pdd: Callable[..., Outcome], ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)  # as where the package lacks
    done = pdd(*command(ground)[3:], "--set", "tensorboard=true")
    assert done.code == 2
    assert "pip install 'pdd-cli[tensorboard]'" in done.err
