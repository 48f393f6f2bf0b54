"""`pdd adapt --teacher`: a small network learns from the SR of a large one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.losses import lattice_loss
from pdd_cli.adaptation.teaching import Teacher
from pdd_cli.adaptation.train_step import _shifted_window
from pdd_cli.data.datasets import CropSampler
from pdd_cli.data.degradations import Degradation
from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.ranks import SINGLE_PROCESS
from pdd_cli.runtime import Runtime
from pdd_cli.settings.adapt import STUDENT_DEFAULTS, AdaptConfig
from pdd_cli.weights.states import state_sha256
from pdd_cli.weights.store import Card, Store
from tests.helpers import distributed_worker
from tests.helpers.commands import Outcome, command
from tests.helpers.networks import compact

CPU = Runtime("cpu", "fp32")
QUICK = ("--teacher", "big", "--set", "teacher_crops=3", "--set", "checkpoint_every=3")


def nearest(scale: int = 4) -> SRModel:
    """A model whose SR is known: every pixel repeated."""
    module = nn.Upsample(scale_factor=scale)
    module.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return SRModel(module=module, scale=scale, in_channels=3, out_channels=3, architecture="nearest")


def sampler(seed: int = 0) -> CropSampler:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, shape, np.uint8) for shape in ((70, 80, 3), (40, 30, 3))]
    return CropSampler(images, images, 8, 4, Degradation(), seed)


def teacher(count: int = 5, seed: int = 0, sha256: str = "a") -> Teacher:
    return Teacher(nearest(), "big", sha256, sampler(seed), count)


def silent(text: str) -> None:
    pass


def test_crops_of_a_step_are_the_teachers_sr_of_their_lr(tmp_path: Path) -> None:
    taught = teacher()
    assert taught.compute(tmp_path / "crops", CPU, lambda: False, silent)
    lr, sr = taught.draw(3, 16, 0)
    assert (lr.shape, sr.shape) == ((16, 3, 8, 8), (16, 3, 32, 32))
    np.testing.assert_array_equal(sr.numpy(), lr.numpy().repeat(4, 2).repeat(4, 3))
    assert len({one.numpy().tobytes() for one in lr}) > 10
    parts = [taught.draw(3, 8, first) for first in (0, 8)]
    assert torch.equal(torch.cat([part[0] for part in parts]), lr)
    assert torch.equal(torch.cat([part[1] for part in parts]), sr)
    assert not torch.equal(taught.draw(4, 16, 0)[0], lr)


@pytest.mark.parametrize(("shape", "real"), [((64, 64), 4), ((64, 128), 8), ((200, 200), 12)])
def test_the_fewer_real_images_the_more_crops_of_photographs(tmp_path: Path, shape: tuple[int, int], real: int) -> None:
    """The 16 crops of 32 x 32 pixels are as large as four, two and two fifths of these images."""
    red, blue = np.full((*shape, 3), (200, 0, 0), np.uint8), np.full((300, 280, 3), (0, 0, 100), np.uint8)
    one_colour_each = CropSampler([red], [blue], 8, 4, Degradation(), 0)
    mixed = Teacher(nearest(), "big", "a", one_colour_each, 16, photographs=True)
    assert mixed.compute(tmp_path / "crops", CPU, lambda: False, silent)
    is_real = [tuple(lr[0, 0]) == (200, 0, 0) for lr in mixed.lr]
    assert sum(is_real) == 4 * sum(is_real[:4]) == real
    assert {lr.shape for lr in mixed.lr} == {(32, 32, 3)}
    assert Teacher(nearest(), "big", "a", one_colour_each, 16).missing(tmp_path / "crops") == 16


def test_computing_continues_and_never_takes_crops_of_something_else(tmp_path: Path) -> None:
    whole, path = teacher(), tmp_path / "crops"
    whole.compute(tmp_path / "whole", CPU, lambda: False, silent)
    stopped = teacher()
    assert not stopped.compute(path, CPU, lambda: len(stopped.lr) == 2, silent)
    again = teacher()
    assert again.missing(path) == 3
    again.model = dataclasses.replace(again.model, module=_Counted(again.model.module))
    assert again.compute(path, CPU, lambda: False, silent)
    assert again.model.module.calls == 3
    assert all(np.array_equal(a, b) for a, b in zip(whole.sr, again.sr, strict=True))
    assert teacher().missing(path) == 0
    assert teacher(seed=1).missing(path) == teacher(sha256="b").missing(path) == 5
    path.write_bytes(path.read_bytes()[:1000])
    assert teacher().missing(path) == 5


class _Counted(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.module(images)


def test_the_lattice_loss_is_the_error_of_each_place_in_an_lr_pixel_beyond_their_mean() -> None:
    rng = np.random.default_rng(0)
    error = rng.normal(0, 0.1, (2, 3, 64, 32)).astype(np.float32)
    places = error.reshape(2, 3, 2, 8, 4, 1, 8, 4).mean((3, 6))
    places -= places.mean((3, 5), keepdims=True)
    target = torch.rand(2, 3, 64, 32)
    found = float(lattice_loss(target + torch.from_numpy(error), target, 4))
    assert found == pytest.approx(np.abs(places).mean(), rel=1e-3)
    assert float(lattice_loss(target + 0.1, target, 4)) == pytest.approx(0, abs=1e-6)  # a wrong colour is no pattern


def test_in_imitation_steps_the_student_learns_only_the_pixels_of_the_teacher(ground: Path, tmp_path: Path) -> None:
    settings = {**distributed_worker.COMMON, **distributed_worker.CASES["student"], "imitation": 0.5}
    settings["optimizer"] = {"learning_rate": 1e-3, "halve_at": ()}
    run = distributed_worker.prepare(ground, tmp_path, "run", SINGLE_PROCESS, **settings)
    alone = copy.deepcopy(run.state.specialist)
    discriminator = copy.deepcopy(run.state.discriminator.state_dict())
    optimizer = torch.optim.Adam(alone.parameters(), run.config.optimizer.learning_rate, run.config.optimizer.betas)
    steps = train(run, lambda: False)
    for report in itertools.islice(steps, 2):
        lr, sr = run.teacher.draw(report.step - 1, 8, 0)
        loss = (alone(lr) - sr).abs().mean()
        assert report.losses == {"teacher": pytest.approx(loss.item(), rel=1e-4)}
        optimizer.zero_grad()
        (run.config.losses.teacher * loss).backward()
        optimizer.step()
    for ours, plain in zip(run.state.specialist.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(run.state.discriminator.state_dict()[key], value) for key, value in discriminator.items())
    assert {"perceptual", "lattice"} <= set(list(steps)[-1].losses)


def test_features_see_every_place_in_an_lr_pixel_over_the_steps() -> None:
    windows = [_shifted_window(128, step, 4) for step in range(16)]
    assert {(rows.start, columns.start) for _, rows, columns in windows} == set(itertools.product(range(4), repeat=2))
    assert all(rows.stop - rows.start == columns.stop - columns.start == 112 for _, rows, columns in windows)
    assert _shifted_window(16, 5, 4) == (..., slice(0, 16), slice(0, 16))
    assert all(window[1].stop <= 64 for window in (_shifted_window(64, step, 2) for step in range(4)))


def test_a_teacher_changes_defaults_and_nothing_that_is_set() -> None:
    plain, student = AdaptConfig(real_dir=Path("x")), AdaptConfig(real_dir=Path("x"), teacher="big")
    assert (plain.steps, plain.imitation_steps, student.steps, student.imitation_steps) == (100, 0, 800, 240)
    assert student.losses.pixel == plain.losses.pixel
    given = {"steps": 50, "losses": {"pixel": 3}, "optimizer": {"learning_rate": 0.5}}
    chosen = AdaptConfig(real_dir=Path("x"), teacher="big", **given)
    assert (chosen.steps, chosen.losses.pixel, chosen.optimizer.learning_rate) == (50, 3, 0.5)
    assert chosen.losses.adversarial == student.losses.adversarial != plain.losses.adversarial
    assert AdaptConfig.model_validate(chosen.model_dump(mode="json")) == chosen


@pytest.fixture
def ground(ground: Path, tmp_path: Path, home: Path) -> Path:
    """Images and features, a compact network as the base, and the teacher `big` in the store."""
    folder = tmp_path / "ground"
    shutil.copytree(ground, folder)
    (folder / "base.safetensors").rename(folder / "other.safetensors")
    save_file(compact(), folder / "base.safetensors")
    torch.manual_seed(2)
    states = {"big": (4, RRDBNet(features=8, growth=8, blocks=1).state_dict()), "double": (2, compact(2))}
    for name, (scale, state) in states.items():
        card = Card(name=name, architecture="any", scale=scale, licence="MIT", source="a test", created="")
        Store.default().add(card, state)
    return folder


def adapt(pdd: Callable[..., Outcome], ground: Path, *more: str) -> Outcome:
    return pdd(*command(ground, *QUICK, *more, steps=6)[3:], "--json")


@pytest.mark.slow
def test_a_student_is_trained_judged_and_described(pdd: Callable[..., Outcome], ground: Path) -> None:
    dry = json.loads(adapt(pdd, ground, "--dry-run").out)
    assert dry["teacher_crops"] == 3
    assert dry["seconds"] > 3 * dry["seconds_per_teacher_crop"] > 0
    assert not Path("runs").exists()

    done = adapt(pdd, ground, "--keep-checkpoints", "1")
    assert done.code == 0, done.err
    assert "beside its teacher" in done.err
    run = Path("runs") / "realLR"
    last_weights, best = load_file(*(run / "checkpoints").iterdir()), load_file(run / "best.safetensors")
    assert all(torch.equal(best[key], tensor) for key, tensor in last_weights.items())
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert {"perceptual", "teacher", "lattice", "adversarial"} <= set(last)
    assert not {"pixel", "inter", "intra", "self_ensemble"} & set(last)
    verdict = json.loads((run / "verdict.json").read_text())
    assert {"score", "consistency", "texture"} <= set(verdict["teacher"])
    assert verdict["times_as_fast_as_teacher"] > 0
    assert [judged["strength"] for judged in verdict["adapted"]] == [1]
    page = (run / "report.html").read_text()
    assert "Beside its teacher" in page
    assert "big (RRDBNet)" in page

    entry = Store.default().get("realLR")
    big = load_file(Store.default().path("big"))
    assert entry.card.architecture == "RealESRGAN Compact"
    assert entry.card.base_sha256 == state_sha256(load_file(ground / "base.safetensors"))
    assert (entry.card.adapted["teacher"], entry.card.adapted["teacher_sha256"]) == ("big", state_sha256(big))
    assert entry.card.licence == "that of the base weights; of the teacher: MIT"

    shown = pdd("fetch-weights", "--info", "realLR")
    assert re.search(r"teacher\W+big", shown.out)
    assert "learning_rate" not in shown.out  # a default of students

    halfway = pdd("upscale", ground / "realLR" / "0.png", "half.png", "--weights", "realLR", "--strength", "0.5")
    assert halfway.code == 0, halfway.err
    resumed = adapt(pdd, ground, "--resume")
    assert resumed.code == 0, resumed.err
    assert (run / "teacher_crops.safetensors").exists()
    before = len(list(run.iterdir()))
    Path(run / "mine.txt").write_text("kept")
    assert adapt(pdd, ground, "--overwrite").code == 0
    assert len(list(run.iterdir())) == before + 1


@pytest.mark.slow
def test_one_command_trains_a_model_and_its_student(
    pdd: Callable[..., Outcome], ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDENT_DEFAULTS, "steps", 7)
    few = ground / "few"  # too few images to judge, so that the teacher is not rejected
    few.mkdir()
    for path in sorted((ground / "realLR").iterdir())[:2]:
        shutil.copy(path, few)
    small = str(ground / "other.safetensors")

    def both(*more: str) -> Outcome:
        options = ("--real-dir", str(few), "--student", small, *more)
        return pdd(*command(ground, *options, steps=6)[3:], "--json")

    done = both()
    assert done.code == 0, done.err
    documents = json.loads(done.out)
    assert (documents["name"], documents["student"]["name"]) == ("few", "few-student")
    card = Store.default().get("few-student").card
    teacher = load_file(Store.default().path("few"))
    assert (card.adapted["teacher"], card.adapted["teacher_sha256"]) == ("few", state_sha256(teacher))
    assert card.base_sha256 == state_sha256(load_file(small))
    shutil.copy(Store.default().path("few-student"), Store.default().path("new-student"))
    for words, more in {
        "already trains a student": ("--teacher", "big", "--overwrite"),
        "no weights are named 'nobody'": ("--student", "nobody", "--overwrite"),
        "'new-student' are already installed": ("--name", "new"),
    }.items():
        failed = both(*more)
        assert failed.code == 2, words
        assert words in failed.err
    assert not Path("runs/new").exists()

    # A longer run of the teacher makes another teacher: its student begins anew, and only on request.
    refused = both("--resume", "--steps", "9")
    assert refused.code == 2
    assert "'few-student' are already installed" in refused.err
    assert len(Path("runs/few/log.jsonl").read_text().splitlines()) == 6
    longer = both("--resume", "--steps", "9", "--overwrite")
    assert longer.code == 0, longer.err
    assert (json.loads(longer.out)["steps"], json.loads(longer.out)["student"]["steps"]) == (9, 7)
    adapted = Store.default().get("few-student").card.adapted
    assert adapted["teacher_sha256"] == state_sha256(load_file(Store.default().path("few"))) != state_sha256(teacher)
    dry = both("--dry-run", "--overwrite")
    assert "without its student" in dry.err

    rejected = both("--real-dir", str(ground / "realLR"))
    assert rejected.code == 0, rejected.err
    assert "no student is trained" in rejected.err
    assert "student" not in json.loads(rejected.out)


@pytest.mark.slow
def test_a_teacher_that_cannot_teach_is_named(pdd: Callable[..., Outcome], ground: Path) -> None:
    cases = {
        "double": ("--teacher double upscales x2", str(ground / "base.safetensors")),
        "nobody": ("no weights are named 'nobody'",),
        str(ground / "none.pth"): (str(ground / "none.pth"),),
    }
    for name, words in cases.items():
        failed = adapt(pdd, ground, "--teacher", name)
        assert failed.code == 2, failed.err
        assert all(word in failed.err for word in words), failed.err
    static = adapt(pdd, ground, "--mode", "static", "--generalist", str(ground / "other.safetensors"))
    assert static.code == 2
    assert "--teacher and --mode static" in static.err
    pairs = adapt(pdd, ground, "--pairs-lr", str(ground / "realLR"), "--pairs-hr", str(ground / "hr"))
    assert pairs.code == 2
    assert "--teacher and --pairs-lr" in pairs.err
    assert not Path("runs").exists()


def test_progress_shows_the_judgement_of_the_weights_that_are_kept(ground: Path, tmp_path: Path) -> None:
    judgements = [(3, "specialist", 2.0), (6, "specialist", 0.5), (6, "ema", 0.75)]
    for case, kept in (("ema", "so far better (+2.0 dB)"), ("student", "so far better (+0.8 dB)")):
        settings = {**distributed_worker.COMMON, **distributed_worker.CASES[case]}
        run = distributed_worker.prepare(ground, tmp_path / case, "run", SINGLE_PROCESS, **settings)
        assert run.verdict_so_far == f"first judged at step {run.config.steps}"
        run.state.judgements += [{"step": step, "which": which, "score": score} for step, which, score in judgements]
        assert run.verdict_so_far == kept


@pytest.mark.slow
def test_a_run_that_is_extended_does_not_imitate_again(ground: Path, tmp_path: Path) -> None:
    settings = {**distributed_worker.COMMON, **distributed_worker.CASES["student"]}
    list(train(distributed_worker.prepare(ground, tmp_path, "run", SINGLE_PROCESS, **settings), lambda: False))
    longer = {**settings, "steps": 32}  # a quarter would be 8
    run = distributed_worker.prepare(ground, tmp_path, "run", SINGLE_PROCESS, resume=True, **longer)
    report = next(train(run, lambda: False))
    assert (report.step, run.state.imitation_steps) == (5, 1)
    assert {"perceptual", "adversarial"} <= set(report.losses)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights(ground: Path, tmp_path: Path) -> None:
    settings = {**distributed_worker.COMMON, **distributed_worker.CASES["student"]}
    prepared = {
        name: distributed_worker.prepare(ground, tmp_path / name, "run", SINGLE_PROCESS, **settings)
        for name in ("whole", "parts")
    }
    whole = distributed_worker.outcome(prepared["whole"])
    assert list(train(prepared["parts"], lambda: True)) == []  # before the teacher's first crop
    for until in (2, 4):
        run = distributed_worker.prepare(ground, tmp_path / "parts", "run", SINGLE_PROCESS, resume=True, **settings)
        state = run.state
        parts = distributed_worker.outcome(run, lambda state=state, until=until: state.step == until)
    for network in ("specialist", "generalist", "discriminator"):
        assert all(torch.equal(value, parts[network][key]) for key, value in whole[network].items())
    assert json.loads(whole["reports"])[2:] == json.loads(parts["reports"])
