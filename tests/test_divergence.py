"""A run that can't go wrong unseen: losses that aren't finite, and losses that rise, on a tiny network."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.prepare import Run, WeightFiles, prepare_run
from pdd_cli.adaptation.publish import write_report
from pdd_cli.data.datasets import Batch, CropSampler
from pdd_cli.errors import PddError, ResourceError
from pdd_cli.files import append_line, atomic_write
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.runtime import Runtime
from pdd_cli.settings.adapt import AdaptConfig
from tests.helpers.crops import Disturbed
from tests.helpers.networks import efficientnet_state

pytestmark = pytest.mark.slow


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Run]:
    torch.manual_seed(0)
    save_file(RRDBNet(features=8, blocks=1).state_dict(), tmp_path / "base.safetensors")
    save_file(efficientnet_state()[1], tmp_path / "features.safetensors")
    rng = np.random.default_rng(0)
    for folder, size in (("real", 40), ("hr", 120)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            coarse = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
            path = tmp_path / folder / f"{number}.png"
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)

    def make(disturb: Callable[[int, Batch], Batch], **settings: object) -> Run:
        config = AdaptConfig(
            real_dir=tmp_path / "real", hr_dir=tmp_path / "hr", runs_dir=tmp_path / "runs", crop=16, batch_size=1,
            **{"discriminator": "features", **settings},  # type: ignore[arg-type]
        )  # fmt: skip
        files = WeightFiles(
            tmp_path / "base.safetensors", None, "efficientnet-lite0", tmp_path / "features.safetensors"
        )
        runtime = Runtime(torch.device("cpu"), "fp32")
        run = prepare_run(config, files, runtime, name="r", resume=False, overwrite=True, warn=print)
        plain = {field.name: getattr(run.sampler, field.name) for field in dataclasses.fields(CropSampler)}
        return dataclasses.replace(run, sampler=Disturbed(**plain, disturb=disturb))

    return make


def finite(run: Run) -> bool:
    networks = (run.state.specialist, run.state.generalist, run.state.discriminator)
    return all(torch.isfinite(value).all() for network in networks for value in network.state_dict().values())


@pytest.mark.parametrize("discriminator", ["unet", "features"])
def test_a_step_whose_loss_is_not_finite_is_skipped(prepare: Callable[..., Run], discriminator: str) -> None:
    def disturb(step: int, batch: Batch) -> Batch:
        return dataclasses.replace(batch, hr_s=batch.hr_s * float("nan")) if step in (2, 3) else batch

    run = prepare(disturb, steps=9, discriminator=discriminator)
    reports = list(train(run, lambda: False))
    assert [report.step for report in reports] == list(range(1, 10))
    assert [bool(report.event) for report in reports] == [step in (3, 4) for step in range(1, 10)]
    assert "skipped" in reports[2].event
    assert finite(run)
    lines = run.folder.log.read_text().splitlines()
    logged = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN isn't JSON
    assert "skipped" in logged[2]["event"]
    assert all(math.isfinite(value) for report in reports for value in report.losses.values())
    page = write_report(run, None).read_text()
    assert logged[2]["event"] in page


def test_several_in_a_row_go_back_to_the_last_checkpoint_at_half_the_rate(prepare: Callable[..., Run]) -> None:
    seen = set()

    def disturb(step: int, batch: Batch) -> Batch:
        first, _ = step not in seen, seen.add(step)
        return dataclasses.replace(batch, lr_s=batch.lr_s * float("inf")) if step in (6, 7, 8) and first else batch

    run = prepare(disturb, steps=12, checkpoint_every=4, optimizer={"halve_at": ()})
    reports = list(train(run, lambda: False))
    assert [report.step for report in reports] == [*range(1, 10), *range(5, 13)]
    assert "returned to step 4 with 0.5" in reports[8].event
    assert reports[3].learning_rate == 1e-4
    assert reports[-1].learning_rate == 5e-5
    assert finite(run)


def test_rising_losses_go_back_too(prepare: Callable[..., Run]) -> None:
    seen = set()

    def disturb(step: int, batch: Batch) -> Batch:
        first, _ = step not in seen, seen.add(step)
        return dataclasses.replace(batch, hr_s=batch.hr_s * 200) if step == 13 and first else batch

    run = prepare(disturb, steps=30, checkpoint_every=4)
    reports = list(train(run, lambda: False))
    events = [report.event for report in reports if report.event]
    assert len(events) == 1
    assert "times their minimum" in events[0]
    assert "returned to step 12" in events[0]
    assert reports[-1].step == 30


def test_what_never_becomes_finite_ends_with_the_remedy(prepare: Callable[..., Run]) -> None:
    run = prepare(
        lambda step, batch: dataclasses.replace(batch, hr_s=batch.hr_s * float("nan")) if step > 5 else batch,
        steps=20, checkpoint_every=4,
    )  # fmt: skip
    with pytest.raises(PddError, match="diverges") as raised:
        list(train(run, lambda: False))
    assert "learning_rate" in raised.value.hint
    saved = torch.load(run.folder.checkpoint, weights_only=True)
    assert saved["step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["specialist"].values())


def test_out_of_memory_ends_with_the_remedy_and_a_whole_checkpoint(prepare: Callable[..., Run]) -> None:
    def disturb(step: int, batch: Batch) -> Batch:
        return dataclasses.replace(batch, lr_s=torch.empty(1 << 60)) if step == 6 else batch

    run = prepare(disturb, steps=12, checkpoint_every=4)
    with pytest.raises(ResourceError, match="out of memory with batch_size 1") as raised:
        list(train(run, lambda: False))
    assert raised.value.exit_code == 5
    for word in ("--batch-size", "--resume"):
        assert word in raised.value.hint
    assert torch.load(run.folder.checkpoint, weights_only=True)["step"] == 4


def test_a_full_disk_ends_with_the_remedy_and_a_whole_checkpoint(prepare: Callable[..., Run]) -> None:
    # The real thing needs a disk of its own; a limit on the size of files makes writes fail in the same way.
    run = prepare(lambda step, batch: batch, steps=12, checkpoint_every=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = []

    def fill() -> bool:
        if run.state.step == 5:
            saved.append(run.folder.checkpoint.read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, limits[1]))
        return False

    try:
        with pytest.raises(ResourceError, match=r"no space left on the disk while writing .*checkpoint\.pt") as raised:
            list(train(run, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.exit_code == 5
    assert "--resume" in raised.value.hint
    assert [run.folder.checkpoint.read_bytes()] == saved
    assert not list(run.folder.path.glob(".*"))
    assert torch.load(run.folder.checkpoint, weights_only=True)["step"] == 4


def test_a_full_disk_is_reported_of_the_files_of_libraries(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"a": torch.zeros(1 << 20)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(ResourceError, match="no space left"), atomic_write(tmp_path / "a.safetensors") as path:
            save_file(tensors, path)
        with pytest.raises(ResourceError, match="no space left"), atomic_write(tmp_path / "a.png") as path:
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (999, 999, 3), np.uint8)).save(path)
        with pytest.raises(ResourceError, match="no space left"):
            append_line(tmp_path / "log", "x" * (2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
