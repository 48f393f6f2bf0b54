"""Several processes, started by torchrun, train as one does: two on the CPU, on a tiny network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pdd_cli.adaptation.loop import train
from pdd_cli.data.datasets import CropSampler
from pdd_cli.data.degradations import Degradation
from pdd_cli.errors import InputError
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.ranks import SINGLE_PROCESS, Ranks
from tests.helpers import distributed_worker
from tests.helpers.commands import Hold, environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As torchrun gives its processes: threads of several that wait for each other would fight for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ground(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and feature weights of `ground` with two models that are tinier still."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(ground, folder, dirs_exist_ok=True)
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        save_file(RRDBNet(features=8, growth=8, blocks=1).state_dict(), folder / f"{name}.safetensors")
    return folder


def torchrun(*command: str | Path, folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, *map(str, command)], cwd=folder, env=environment(folder) | more,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=500)
    finally:
        process.terminate()  # where it hangs; torchrun ends its children


def adapt(ground: Path, *more: str) -> list[str]:
    return [
        "-m", "pdd_cli", "adapt", "--real-dir", str(ground / "realLR"), "--hr-dir", str(ground / "hr"),
        "--base", str(ground / "base.safetensors"), "--features", "efficientnet-lite0",
        "--feature-weights", str(ground / "features.safetensors"),
        "--steps", str(STEPS), "--batch-size", "2", "--device", "cpu", "--precision", "fp32",
        "--set", "crop=16", "--set", "checkpoint_every=4", *more,
    ]  # fmt: skip


def in_this_process(ground: Path, folder: Path, *, resume: bool = False, until: int = STEPS) -> None:
    """What `adapt` does in one process, up to the end of training or step `until`."""
    run = distributed_worker.prepare(
        ground, folder / "runs", "realLR", SINGLE_PROCESS,
        resume=resume, base=str(ground / "base.safetensors"), steps=STEPS,
        batch_size=2, crop=16, checkpoint_every=4, device="cpu", precision="fp32",
        features={"network": "efficientnet-lite0", "weights": str(ground / "features.safetensors")},
    )  # fmt: skip
    for _ in train(run, lambda: run.state.step == until):
        pass


@pytest.fixture(scope="module")
def undisturbed(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `adapt`, uninterrupted, in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    in_this_process(ground, folder)
    return folder / "runs" / "realLR"


@pytest.fixture(scope="module")
def outcomes(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and what two made of every case."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    process = torchrun("-m", "tests.helpers.distributed_worker", ground, two, folder=two)
    distributed_worker.main(ground, one, SINGLE_PROCESS)
    _, errors = finish(process)
    assert process.returncode == 0, errors
    return one, two


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes_learn_what_one_does(ground: Path, outcomes: tuple[Path, Path], case: str) -> None:
    one, two = outcomes
    files = (one / f"{case}_0.pt", two / f"{case}_0.pt", two / f"{case}_1.pt")
    alone, first, second = (torch.load(file, weights_only=True) for file in files)
    for network in ("specialist", "generalist", "discriminator"):
        assert all(torch.equal(value, second[network][key]) for key, value in first[network].items())
    assert first["reports"] == second["reports"]

    base = load_file(ground / "base.safetensors")
    assert_moved_alike(base, alone["specialist"], first["specialist"])
    reports = zip(json.loads(alone["reports"]), json.loads(first["reports"]), strict=True)
    for (step, losses, *more), (step_of_two, losses_of_two, *more_of_two) in reports:
        assert (step, *more) == (step_of_two, *more_of_two)
        assert losses_of_two == pytest.approx(losses, rel=1e-3, nan_ok=True), step


def test_the_inter_loss_is_one_norm_over_all_processes_with_its_gradient(outcomes: tuple[Path, Path]) -> None:
    one, two = outcomes
    alone = torch.load(one / "inter_0.pt", weights_only=True)
    shares = [torch.load(two / f"inter_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [float(share.pop("loss")) for share in shares] == pytest.approx([float(alone.pop("loss"))] * 2, rel=1e-6)
    for key, expected in alone.items():
        found = torch.cat([share[key] for share in shares])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_what_is_not_finite_in_one_process_is_skipped_in_all(outcomes: tuple[Path, Path]) -> None:
    for rank in (0, 1):
        reports = json.loads(torch.load(outcomes[1] / f"disturbed_{rank}.pt", weights_only=True)["reports"])
        assert [step for step, *_ in reports] == [*range(1, 10), *range(5, 13)]
        assert "step 3: the loss is not finite" in reports[2][3]
        assert "returned to step 4 with 0.5" in reports[8][3]


def test_one_interrupted_process_stops_all_after_one_step_and_one_process_continues(
    ground: Path, undisturbed: Path, tmp_path: Path
) -> None:
    hold = Hold(tmp_path / "hold", "log.jsonl", 3)
    process = torchrun(*hold.command, *adapt(ground)[2:], folder=tmp_path)
    log = tmp_path / "runs" / "realLR" / "log.jsonl"
    hold.wait(process)  # the first process, for which the other soon waits
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGINT)
    hold.let_go()
    _, errors = finish(process)
    assert process.returncode != 0
    assert "exitcode: 130" in errors
    assert errors.count("the state is saved") == 1
    done = log.read_text().count("\n")
    saved = torch.load(tmp_path / "runs" / "realLR" / "checkpoint.pt", weights_only=True)
    assert 2 <= done == saved["step"] < STEPS

    in_this_process(ground, tmp_path, resume=True)
    assert_same_run(ground, undisturbed, tmp_path / "runs" / "realLR")


def test_two_processes_continue_where_one_was_stopped_and_write_and_print_once(
    ground: Path, undisturbed: Path, tmp_path: Path
) -> None:
    in_this_process(ground, tmp_path, until=5)
    process = torchrun(*adapt(ground, "--resume", "--json"), folder=tmp_path)
    printed, errors = finish(process)
    assert process.returncode == 0, errors
    assert json.loads(printed)["steps"] == STEPS
    assert errors.count("2 processes") == errors.count("verdict:") == 1
    runs = tmp_path / "runs" / "realLR"
    assert_same_run(ground, undisturbed, runs)
    assert [json.loads(line)["step"] for line in (runs / "log.jsonl").read_text().splitlines()] == [
        *range(1, STEPS + 1)
    ]
    assert [path.name for path in (tmp_path / "home" / "weights").iterdir()] == ["realLR.safetensors"]


def test_a_process_that_fails_says_why_and_ends_all(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "0").symlink_to(ground / "realLR")  # what the other machine lacks
    arguments = ["$RANK" if part == str(ground / "realLR") else part for part in adapt(ground)]
    process = torchrun("--no-python", "sh", "-c", f"{sys.executable} {' '.join(arguments)}", folder=tmp_path)
    _, errors = finish(process)
    assert process.returncode != 0
    assert errors.count("error: --real-dir 1: no such folder") == errors.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def test_the_world_is_what_torchrun_says() -> None:
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert Ranks.from_environment(said) == Ranks(5, 8, 1)
    assert Ranks.from_environment({"RANK": "5"}) == SINGLE_PROCESS


def test_a_batch_that_can_not_be_shared_is_refused_with_one_that_can() -> None:
    assert Ranks(1, 4).per_rank(8) == 2
    with pytest.raises(InputError, match="batch_size 6") as raised:
        Ranks(1, 4).per_rank(6)
    assert "--batch-size 8" in raised.value.hint
    with pytest.raises(InputError, match="cuda:1"):
        Ranks(1, 4).device("cuda:1")


def test_each_process_takes_its_part_of_a_batch() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (90, 100, 3), np.uint8) for _ in range(3)]
    degradation = Degradation(blur=(0.5, 2), noise=(1, 9), jpeg=(30, 90))
    domains = CropSampler(images, images, 16, 4, degradation, seed=3, candidates=2)
    whole = domains.batch(7, 4)
    for name in ("lr_s", "hr_s", "lr_t"):
        shares = [getattr(domains.batch(7, 2, first), name) for first in (0, 2)]
        assert torch.equal(torch.cat(shares), getattr(whole, name))
    assert domains.digest() == CropSampler(images, images, 16, 4, degradation, seed=4).digest()
    assert domains.digest() != CropSampler(images[::-1], images, 16, 4, degradation, seed=3).digest()


def assert_same_run(ground: Path, one: Path, other: Path) -> None:
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (one, other))
    assert a["step"] == b["step"] == STEPS
    assert_moved_alike(load_file(ground / "base.safetensors"), a["specialist"], b["specialist"])


def assert_moved_alike(
    base: dict[str, torch.Tensor], one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    """How far two runs are apart, against how far they have come.

    Sums over the batch are taken in another order, which is a relative error of 1e-7 in a gradient; Adam divides by the
    gradient's own size, so that where a gradient is next to nothing the error is not.
    """
    way = sum(float((one[key] - value).square().sum()) for key, value in base.items())
    apart = sum(float((one[key] - other[key]).square().sum()) for key in base)
    assert way > 0
    assert (apart / way) ** 0.5 < 5e-3
