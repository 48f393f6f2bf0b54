"""One batch on several devices, and by several processes under torchrun: the same files as from one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdd_cli.batch.devices import partition, run_on_devices
from pdd_cli.errors import InputError, PartialFailure
from pdd_cli.imaging.encode import write_image
from pdd_cli.last_run import read_last_run
from pdd_cli.models.loading import load_sr_model
from pdd_cli.ranks import Ranks
from pdd_cli.upscaling.jobs import Job, Result, results_from_json, results_to_json
from pdd_cli.upscaling.manifest import NAME as MANIFEST
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.upscaling.pipeline import run_jobs
from tests.helpers.commands import run_upscale
from tests.helpers.images import picture
from tests.helpers.networks import compact, saved, upscaler


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def lines(manifest: Path) -> list[dict[str, object]]:
    """Those of a manifest, sorted, without when they were written."""
    found = [json.loads(line) for line in manifest.read_text().splitlines()]
    return sorted(({**line, "date": ""} for line in found), key=lambda line: str(line["output"]))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine images of very different sizes in a tree, one of them broken, and the weights beside it."""
    for number, side in enumerate((8, 9, 10, 12, 40, 16, 60, 8)):
        write_image(tmp_path / f"in/{number % 3}/{number}.png", picture(side, side + 3))
    (tmp_path / "in/broken.png").write_bytes((tmp_path / "in/0/0.png").read_bytes()[:60])
    saved(tmp_path, compact())
    return tmp_path / "in"


# --- several devices --------------------------------------------------------------------------------------------


def test_two_devices_make_what_one_makes(images: Path, home: Path) -> None:
    weights = images.parent / "model.safetensors"
    _, error = run_upscale(images, images.parent / "one", "--weights", weights)
    assert isinstance(error, PartialFailure)
    document, error = run_upscale(images, images.parent / "two", "--weights", weights, "--device", "cpu,cpu")
    assert isinstance(error, PartialFailure)
    assert document["device"] == "cpu,cpu"
    assert (document["done"], document["failed"]) == (8, 1)
    files = [file["input"] for file in document["files"]]  # type: ignore[attr-defined]
    assert files == sorted(files)
    assert contents(images.parent / "two") == contents(images.parent / "one")
    document, _ = run_upscale(images, images.parent / "two", "--weights", weights)
    assert document["skipped"] == 8


def test_a_device_that_fails_stops_the_batch(images: Path) -> None:
    model = load_sr_model(images.parent / "model.safetensors")
    workers = [upscaler(model, tile=8), upscaler(model, tile=8)]
    jobs = [Job(path, images.parent / "out" / path.name) for path in sorted(images.rglob("[0-9].png"))]
    begun: list[Job] = []
    failed = threading.Event()

    def fail(device: int, job: Job) -> None:
        begun.append(job)
        if len(begun) == 3:
            failed.set()
            raise RuntimeError("a GPU is gone")
        if failed.is_set():  # the batch takes a moment to hear of it
            time.sleep(1)

    with pytest.raises(RuntimeError, match="gone"):
        list(run_on_devices(run_jobs, jobs, workers, on_start=fail))
    assert len(begun) < len(jobs)
    assert not list((images.parent / "out").glob(".pdd-*"))


def test_a_device_list_must_name_devices(images: Path, home: Path) -> None:
    weights = images.parent / "model.safetensors"
    for devices, wrong in (("cpu,", "--device : "), ("cpu,tpu", "--device tpu")):
        _, error = run_upscale(images, images.parent / "out", "--weights", weights, "--device", devices)
        assert isinstance(error, InputError)
        assert wrong in error.message


# --- several processes ------------------------------------------------------------------------------------------


def test_a_process_takes_its_own_of_several_devices() -> None:
    assert Ranks().devices("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    assert Ranks(5, 8, 1).devices("cuda:2,cuda:3,cuda:4") == ["cuda:3"]
    assert Ranks(5, 8, 4).devices("cuda:2,cuda:3,cuda:4") == ["cuda:3"]
    assert Ranks(5, 8, 1).devices("cpu") == ["cpu"]
    with pytest.raises(InputError, match="share one device"):
        Ranks(5, 8, 1).devices("cuda:1")
    assert Ranks().gather("text") == ["text"]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_shares_are_whole_disjoint_and_balanced(sides: list[int], count: int) -> None:
    jobs = [Job(Path(f"{index}-{side}"), Path(f"out/{index}")) for index, side in enumerate(sides)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdd_cli.batch.devices.input_size", lambda source: (*[int(source.name.split("-")[1])] * 2, 1))
        shares = [partition(jobs, Ranks(index, count)) for index in range(count)]
    assert sorted((job for share in shares for job in share), key=jobs.index) == jobs
    assert all(share == sorted(share, key=jobs.index) for share in shares)
    loads = [sum(int(job.source.name.split("-")[1]) ** 2 for job in share) for share in shares]
    # No process could give its smallest job away and be better off.
    assert max(loads) - min(loads) <= max(sides) ** 2


def test_results_travel_as_text() -> None:
    results = [
        Result(Job(Path("in/ä\udcff.png"), Path("out/ä\udcff.png")), "done", size_in=(1, 2), size_out=(4, 8), tiles=3),
        Result(Job(Path("in/b.png"), Path("out/b.png")), "failed", "damaged", seconds=1.5),
    ]
    assert results_from_json(results_to_json(results)) == results


@pytest.mark.slow
def test_two_processes_under_torchrun_make_what_one_makes(images: Path, home: Path) -> None:
    weights, one, two = images.parent / "model.safetensors", images.parent / "one", images.parent / "two"
    (images / "broken.png").unlink()
    run_upscale(images, one, "--weights", weights)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "pdd_cli"]
    command += ["upscale", images, two, "--weights", weights, "--engine", "torch", "--precision", "fp32", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    files = [file["input"] for file in document["files"]]
    assert len(files) == len(set(files)) == document["done"] == 8
    assert contents(two) == contents(one)
    assert lines(two / MANIFEST) == [line for line in lines(one / MANIFEST) if line["done"]]
    last = read_last_run()
    assert last is not None
    assert len(last.pairs) == 8


@pytest.mark.slow
def test_every_process_ends_with_the_exit_code_of_all(images: Path, home: Path) -> None:
    out, weights = images.parent / "out", images.parent / "model.safetensors"
    run_upscale(images, out, "--weights", weights)
    (out / "0/0.png").unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        environment = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}
        environment["MASTER_PORT"] = port
        command = [sys.executable, "-m", "pdd_cli", "upscale", images, out, "--weights", weights, "--engine", "torch"]
        command += ["--precision", "fp32"]
        variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        started.append(
            subprocess.Popen(
                [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
            )
        )
    messages = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [3, 3], messages
    document = json.loads(messages[0][0])
    assert (document["done"], document["skipped"], document["failed"]) == (1, 7, 1)
    assert "broken.png: damaged" in messages[0][1]
    assert (messages[0][1] + messages[1][1]).count("broken.png: damaged") == 1
    assert "1 of 9 files failed" in messages[0][1] + messages[1][1]
    assert messages[1][0] == ""


def test_parts_of_a_manifest_become_one(tmp_path: Path) -> None:
    recipe = {"weights": "x"}
    for name in "abc":
        write_image(tmp_path / f"{name}.png", picture(2, 2))

    def record(manifest: Manifest, name: str, digest: str) -> None:
        target = tmp_path / f"{name}.png"
        manifest.record(target, manifest.key(digest), source=tmp_path / name, written=target)
        manifest.finish(target)

    alone = Manifest(tmp_path, recipe)
    for name in "ab":
        record(alone, name, "old")
    for part, name in enumerate("bc"):
        manifest = Manifest(tmp_path, recipe, part=part)
        record(manifest, name, "new")
    with (tmp_path / ".pdd-manifest.1.jsonl").open("a") as file:  # power failed
        file.write('{"output": "a.p')

    def states() -> list[str]:
        manifest = Manifest(tmp_path, recipe)
        contents = zip("abc", ("old", "new", "new"), strict=True)
        return [manifest.state(tmp_path / f"{name}.png", manifest.key(digest)) for name, digest in contents]

    assert states() == ["current"] * 3
    Manifest(tmp_path, recipe).tidy()
    assert [path.name for path in tmp_path.glob(".pdd-*")] == [MANIFEST]
    assert len((tmp_path / MANIFEST).read_text().splitlines()) == 3
    assert states() == ["current"] * 3
    before = (tmp_path / MANIFEST).stat().st_mtime_ns
    Manifest(tmp_path, recipe).tidy()
    assert (tmp_path / MANIFEST).stat().st_mtime_ns == before
