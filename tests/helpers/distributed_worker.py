"""Trains a tiny network in every mode, in one process or under torchrun, and keeps what came out of each process."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.losses import INTER_LAYERS, inter_loss
from pdd_cli.adaptation.prepare import Run, WeightFiles, prepare_run
from pdd_cli.data.datasets import Batch, CropSampler
from pdd_cli.ranks import Ranks
from pdd_cli.runtime import Runtime
from pdd_cli.settings.adapt import AdaptConfig
from tests.helpers.crops import Disturbed

# The inter-model distance weighs so much that a wrong gradient of it shows in the weights. These rates keep rounding
# small: the specialist soon differs from the generalist by far more, and no discriminator wins within two steps, from
# where on Adam and the logits would multiply rounding by a million.
COMMON: dict[str, object] = {
    "steps": 6, "batch_size": 4, "crop": 16, "discriminator_warmup": 0.2, "losses": {"inter": 100},
    "optimizer": {"learning_rate": 1e-3, "discriminator_learning_rate": 1e-4},
}  # fmt: skip
EMA = {"mode": "ema", "warmup_steps": 1}
CASES: dict[str, dict[str, object]] = {
    "ema": {"generalist": EMA, "discriminator": "features"},
    "ema_unet": {"generalist": EMA, "discriminator": "unet", "steps": 4, "batch_size": 2},
    "static": {"generalist": {"mode": "static", "weights": "other", "warmup_steps": 0}, "discriminator": "features"},
    "student": {
        "generalist": EMA,
        "teacher": "other",
        "teacher_crops": 3,
        "imitation": 0.25,
        "steps": 4,
        "batch_size": 2,
    },
    "disturbed": {"generalist": EMA, "steps": 12, "checkpoint_every": 4},
}


def prepare(ground: Path, runs: Path, name: str, ranks: Ranks, *, resume: bool = False, **settings: object) -> Run:
    """A run on the images and weights below `ground`, its folder below `runs`."""
    config = AdaptConfig(real_dir=ground / "realLR", hr_dir=ground / "hr", runs_dir=runs, **settings)  # type: ignore[arg-type]
    static = config.generalist.mode == "static"
    files = WeightFiles(
        ground / "base.safetensors",
        ground / "other.safetensors" if static else None,
        "efficientnet-lite0",
        ground / "features.safetensors",
        (ground / "other.safetensors",) if config.teacher else (),
    )
    return prepare_run(
        config, files, Runtime(torch.device("cpu"), "fp32"),
        name=name, resume=resume, overwrite=False, warn=print, ranks=ranks,
    )  # fmt: skip


def outcome(run: Run, stop: Callable[[], bool] = lambda: False) -> dict[str, object]:
    """Train `run`; every tensor of its state, and what each step reported."""
    reports = [(report.step, report.losses, report.learning_rate, report.event) for report in train(run, stop)]
    state = run.state
    return {
        "specialist": state.specialist.state_dict(),
        "generalist": state.generalist.state_dict(),
        "discriminator": state.discriminator.state_dict(),
        "reports": json.dumps(reports),
    }


def disturbed(run: Run) -> Run:
    """The last process's share of step 2, and the first time of steps 6, 7 and 8, isn't finite."""
    seen: set[int] = set()

    def disturb(step: int, batch: Batch) -> Batch:
        first, _ = step not in seen, seen.add(step)
        if step not in (2, 6, 7, 8) or not first or run.models.ranks.rank != run.models.ranks.size - 1:
            return batch
        return dataclasses.replace(batch, hr_s=batch.hr_s * float("inf" if step == 2 else "nan"))

    plain = {field.name: getattr(run.sampler, field.name) for field in dataclasses.fields(CropSampler)}
    return dataclasses.replace(run, sampler=Disturbed(**plain, disturb=disturb))


def inter_gradients(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The inter loss of random features, and its gradient with regard to this process's share of them."""
    generator = torch.Generator().manual_seed(0)
    n = ranks.per_rank(4)
    mine = slice(ranks.rank * n, (ranks.rank + 1) * n)
    four = [
        {layer: torch.randn(4, 6, 5, 5, generator=generator)[mine].requires_grad_() for layer in INTER_LAYERS}
        for _ in range(4)
    ]
    S_s, S_t, G_s, G_t = four
    loss = inter_loss(S_s, S_t, G_s, G_t, ranks)
    loss.backward()
    gradients = {f"{number} {layer}": phi.grad for number, of in enumerate(four) for layer, phi in of.items()}
    return {"loss": loss.detach(), **{key: value / ranks.size for key, value in gradients.items() if value is not None}}


def main(ground: Path, runs: Path, ranks: Ranks) -> None:
    torch.save(inter_gradients(ranks), runs / f"inter_{ranks.rank}.pt")
    for name, settings in CASES.items():
        run = prepare(ground, runs, name, ranks, **{**COMMON, **settings})
        torch.save(outcome(disturbed(run) if name == "disturbed" else run), runs / f"{name}_{ranks.rank}.pt")


if __name__ == "__main__":
    ranks = Ranks.from_environment()
    ranks.join(torch.device("cpu"))
    main(Path(sys.argv[1]), Path(sys.argv[2]), ranks)
    ranks.leave()
    if sys.platform == "linux":  # a thread that outlives this may abort the process while Python ends
        threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        assert not [name for name in threads if "gloo" in name], threads
