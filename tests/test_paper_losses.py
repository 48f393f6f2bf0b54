"""Settings that make a training step the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdd_cli.errors import InputError
from pdd_cli.ranks import SINGLE_PROCESS
from tests.helpers.distributed_worker import outcome, prepare

pytestmark = pytest.mark.slow


def losses(ground: Path, folder: Path, reduction: str) -> list[dict[str, float]]:
    """Of three steps: the discriminator alone, without distillation, with distillation."""
    run = prepare(
        ground, folder, reduction, SINGLE_PROCESS,
        steps=3, batch_size=2, crop=16, discriminator_warmup=0.3, generalist={"mode": "ema", "warmup_steps": 1},
        losses={"adversarial_reduction": reduction},
    )  # fmt: skip
    return [step[1] for step in json.loads(str(outcome(run)["reports"]))]


def test_the_adversarial_loss_is_one_mean_over_both_domains_or_the_sum_of_two(ground: Path, tmp_path: Path) -> None:
    added, averaged = (losses(ground, tmp_path, reduction) for reduction in ("sum", "mean"))
    assert "adversarial" not in added[0]
    assert added[1]["adversarial"] == averaged[1]["adversarial"]  # S_s alone
    assert added[2]["adversarial"] == pytest.approx(2 * averaged[2]["adversarial"], rel=1e-6)
    assert added[2]["inter"] == averaged[2]["inter"]


def test_each_process_must_have_whole_groups(ground: Path) -> None:
    from pdd_cli.adaptation.run import start
    from pdd_cli.ranks import Ranks
    from pdd_cli.settings.adapt import AdaptConfig

    settings = AdaptConfig(real_dir=ground / "realLR", batch_size=16, losses={"inter_group": 8})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="each of the 4 processes has 4 crops"):
        start(settings, name="x", ranks=Ranks(0, 4))
