"""`pdd adapt` from the command line, on a tiny network: files, weights, interruption, resuming."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader

from pdd_cli.adaptation.generalist import ema_update
from pdd_cli.adaptation.resuming import as_started, check_settings
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.store import Store
from tests.helpers.commands import STEPS, Hold, Outcome, command, environment, invoke_in

pytestmark = pytest.mark.slow


def run(ground, folder, *more, steps=STEPS):
    return invoke_in(folder, *command(ground, *more, steps=steps)[3:])


def start(ground, folder, *, lines, steps=STEPS):
    """A run in the background that has logged so many lines and is held there, and its log."""
    hold = Hold(folder / "hold", "log.jsonl", lines + 1)
    process = subprocess.Popen(
        [sys.executable, *hold.command, *command(ground, steps=steps)[3:]],
        cwd=folder, env=environment(folder) | {"PYTHONPATH": hold.path},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    hold.wait(process)
    return process, folder / "runs" / "realLR" / "log.jsonl", hold


@pytest.fixture(scope="module")
def finished(ground, tmp_path_factory):
    """One uninterrupted run, in a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    result = subprocess.run(
        command(ground, "--json"), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return folder, Outcome(result.returncode, result.stdout, result.stderr)


def test_a_run_leaves_what_it_names(ground, finished):
    folder, result = finished
    document = json.loads(result.out)
    runs = folder / "runs" / "realLR"
    assert document["name"] == "realLR"
    lines = [json.loads(line) for line in (runs / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"inter", "intra", "pixel", "perceptual", "adversarial"} <= set(lines[-1])
    assert "inter" not in lines[0]  # S = G there
    assert sorted(p.name for p in (runs / "previews").iterdir()) == ["step_000006.png", "step_000012.png"]
    assert Image.open(runs / "previews" / "step_000012.png").width >= 3 * 40 * 4
    assert yaml.safe_load((runs / "config.yaml").read_text())["adapt"]["steps"] == STEPS


def test_the_weights_are_registered_with_their_provenance(ground, finished):
    folder, _ = finished
    entry = Store(folder / "home" / "weights").get("realLR")
    assert entry.card.architecture == "RRDBNet"
    assert entry.card.scale == 4
    assert entry.card.adapted["features"] == "efficientnet-lite0"
    assert entry.card.adapted["hr_from"] == "hr_dir"
    adapted, base = load_file(entry.path), load_file(ground / "base.safetensors")
    assert set(adapted) == set(base)
    assert all(torch.isfinite(value).all() for value in adapted.values())
    assert any(not torch.equal(adapted[key], base[key]) for key in base)


def test_the_resolved_config_repeats_the_run(ground, finished, tmp_path):
    folder, _ = finished
    config = str(folder / "runs" / "realLR" / "config.yaml")
    again = invoke_in(tmp_path, "adapt", "--config", config)
    assert again.code == 0, again.err
    assert_equal_weights(folder, tmp_path)


def test_ctrl_c_saves_and_resume_equals_an_uninterrupted_run(ground, finished, tmp_path):
    undisturbed, _ = finished
    process, log, hold = start(ground, tmp_path, lines=2)
    process.send_signal(signal.SIGINT)
    hold.let_go()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    done = log.read_text().count("\n")
    assert done == 3
    assert Store(tmp_path / "home" / "weights").get("realLR") is None
    assert f"stopped after step {done} of {STEPS}" in (log.parent / "report.html").read_text()

    assert run(ground, tmp_path).code == 2  # the run is not begun anew by mistake
    resumed = run(ground, tmp_path, "--resume")
    assert resumed.code == 0, resumed.err
    assert_equal_weights(undisturbed, tmp_path)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_sigterm_saves_too(ground, tmp_path):
    process, log, hold = start(ground, tmp_path, lines=2)
    process.terminate()
    hold.let_go()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"] == log.read_text().count("\n")


def test_resume_after_a_kill_loses_only_what_came_after_the_checkpoint(ground, finished, tmp_path):
    undisturbed, _ = finished
    process, log, _ = start(ground, tmp_path, lines=6)
    process.kill()
    process.communicate(timeout=600)
    saved = torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"]
    assert (saved, log.read_text().count("\n")) == (4, 6)  # at most one interval is lost
    resumed = run(ground, tmp_path, "--resume")
    assert resumed.code == 0, resumed.err
    assert_equal_weights(undisturbed, tmp_path)


def test_resume_refuses_other_settings(ground, finished):
    folder, _ = finished
    result = run(ground, folder, "--resume", "--set", "losses.intra=0.5")
    assert result.code == 2
    assert "losses was" in result.err
    assert run(ground, folder, "--resume").code == 0  # nothing left to do: registers again


def test_an_earlier_run_or_entry_is_not_overwritten_by_mistake(ground, finished, tmp_path):
    folder, _ = finished
    result = run(ground, folder)
    assert result.code == 2
    assert "--overwrite" in result.err
    catalogued = run(ground, folder, "--name", "realesrgan")
    assert catalogued.code == 2
    assert "realesrgan" in catalogued.err


def test_settings_that_are_newer_than_a_run_change_nothing_in_it(finished, tmp_path):
    content = torch.load(finished[0] / "runs" / "realLR" / "checkpoint.pt", weights_only=True)
    now = AdaptConfig.model_validate(content["settings"])
    torch.save(content, tmp_path / "new.pt")
    assert as_started(now, tmp_path / "new.pt") == now
    del content["settings"]["losses"]["self_ensemble"], content["settings"]["synthetic"]["own_share"]
    torch.save(content, tmp_path / "old.pt")
    before = as_started(now, tmp_path / "old.pt")
    assert (before.losses.self_ensemble, before.synthetic.own_share) == (0, 0)
    assert before.losses.feature_distance == now.losses.feature_distance
    check_settings(tmp_path / "old.pt", now)


def test_hr_from_the_real_images(ground, tmp_path):
    result = run(ground, tmp_path, "--hr-dir", "own", steps=8)
    assert result.code == 0, result.err
    assert "HR images made from noisy images teach the model to add noise" in result.err
    assert "downscaled" in Store(tmp_path / "home" / "weights").get("realLR").card.adapted["hr_from"]


def test_static_mode_trains_beside_a_frozen_second_model(ground, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(RRDBNet(features=8, growth=32, blocks=2).state_dict(), other)
    result = run(ground, tmp_path, "--mode", "static", "--generalist", str(other), steps=8)
    assert result.code == 0, result.err
    kept = torch.load(tmp_path / "runs" / "realLR" / "checkpoint.pt", weights_only=True)["generalist"]
    assert all(torch.equal(kept[key], value) for key, value in load_file(other).items())
    log = (tmp_path / "runs" / "realLR" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["inter"] > 0


def test_a_diverging_run_stops_and_registers_nothing(ground, tmp_path):
    result = run(ground, tmp_path, "--set", "optimizer.learning_rate=1e30")
    assert result.code == 2
    assert "not finite" in result.err
    assert "learning_rate" in result.err
    assert Store(tmp_path / "home" / "weights").get("realLR") is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        # Before any weights are asked for.
        (["--real-dir", "nowhere", "--base", "realesrgan", "--offline"], ["--real-dir nowhere"]),
        (["--base", "realesrgn", "--offline"], ["realesrgn", "realesrgan"]),
        (["--base", "nowhere.pth"], ["nowhere.pth"]),
        (["--set", "generalist.warmup_steps=0"], ["generalist.warmup_steps", "0"]),
        (["--mode", "static"], ["generalist.weights"]),
        (["--resume"], ["--resume", "no checkpoint"]),
        (["--name", "a/b"], ["a/b"]),
        (["--device", "cuda:9"], ["--device cuda:9"]),
    ],
)
def test_bad_input_is_named(ground, tmp_path, more, words):
    result = run(ground, tmp_path, *more)
    assert result.code == 2, result.err
    for word in words:
        assert word in result.err


def test_exports_give_the_same_picture(ground, finished, tmp_path):
    folder, _ = finished
    result = run(ground, folder, "--resume", "--export", "pth,onnx")
    assert result.code == 0, result.err
    torch.manual_seed(0)
    lr = torch.rand(1, 3, 23, 37)
    # At the strength that `upscale` uses: what `pdd export` writes.
    card = Store(folder / "home" / "weights").get("realLR").card
    strength = card.adapted["strength"] if card.adapted["verdict"] == "keep" else 1.0
    base = load_file(ground / "base.safetensors")
    adapted = load_file(folder / "home" / "weights" / "realLR.safetensors")
    mixed = {key: torch.lerp(base[key], tensor, strength) for key, tensor in adapted.items()}
    expected = ModelLoader().load_from_state_dict(mixed).eval()(lr)
    exported = folder / "runs" / "realLR"
    for key in ("params", "params_ema"):  # as Real-ESRGAN's scripts take one or the other
        content = torch.load(exported / "realLR.pth", weights_only=True)[key]
        again = ModelLoader().load_from_state_dict(content).eval()(lr)
        assert torch.equal(again, expected)
    session = onnxruntime.InferenceSession(str(exported / "realLR.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"lr": lr.numpy()})
    assert np.mean((found.clip(0, 1) - expected.detach().numpy()) ** 2) < 1e-6  # 60 dB; spandrel clamps


def test_the_run_ends_with_a_verdict(ground, finished):
    folder, result = finished
    runs = folder / "runs" / "realLR"
    verdict = json.loads((runs / "verdict.json").read_text())
    assert ("verdict: keep" if verdict["keep"] else "verdict: reject") in result.err
    assert verdict["reason"] in result.err
    judged = [json.loads(line) for line in (runs / "judgements.jsonl").read_text().splitlines()]
    assert [(line["step"], line["which"]) for line in judged] == [
        (step, which) for step in (4, 8, 12) for which in ("specialist", "ema")
    ]
    card = Store(folder / "home" / "weights").get("realLR").card
    assert card.adapted["verdict"] == ("keep" if verdict["keep"] else "reject")
    assert card.adapted["strength"] == verdict["strength"]
    assert card.adapted["real_images"] == 2  # of three, one was held out


def test_ema_is_the_weighted_mean_of_parameters():
    torch.manual_seed(0)
    generalist, specialist = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = generalist.weight.detach().numpy().copy()
    ema_update(generalist, specialist, 0.9)
    expected = 0.9 * before + 0.1 * specialist.weight.detach().numpy()
    np.testing.assert_allclose(generalist.weight.detach().numpy(), expected, rtol=1e-6)


def assert_equal_weights(one, other):
    a, b = (load_file(folder / "home" / "weights" / "realLR.safetensors") for folder in (one, other))
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("runs_dir", "name"),
    [(".", "realLR"), ("realLR", "new"), (".", "hr"), ("link", "run"), ("..", "parent")],
    ids=["equal", "inside", "an --hr-dir", "through a link", "around"],
)
def test_overwrite_never_touches_an_image_folder(ground, tmp_path, monkeypatch, pdd, runs_dir, name):
    folder = tmp_path / "parent"
    shutil.copytree(ground, folder)
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to(folder / "realLR")
    for images in ("realLR", "hr"):  # as if a run had been there, which --overwrite replaces
        (folder / images / "checkpoint.pt").write_bytes(b"")
        (folder / images / "config.yaml").write_text("adapt: {real_dir: x}")
    before = _contents(folder)

    result = pdd(*command(folder, "--runs-dir", runs_dir, "--name", name, "--overwrite")[3:])

    assert result.code == 2
    assert "choose another --runs-dir or --name" in result.err
    assert _contents(folder) == before


def test_a_folder_that_holds_no_run_is_refused(ground, pdd):
    mine = Path("runs", "realLR", "config.yaml")
    mine.parent.mkdir(parents=True)
    mine.write_text("database: mine")

    result = pdd(*command(ground, "--overwrite")[3:])

    assert result.code == 2
    assert "does not contain a run of pdd" in result.err
    assert mine.read_text() == "database: mine"


def test_overwrite_deletes_only_what_a_run_has_written(ground, pdd):
    folder = Path("runs", "realLR")
    arguments = command(ground, "--overwrite", steps=6)[3:]
    assert pdd(*arguments).code == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "previews" / "favourite.png").write_bytes(b"mine")
    (folder / "previews" / "step_000099.png").write_bytes(b"of a longer run")

    assert pdd(*arguments).code == 0

    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (folder / "previews").iterdir()) == ["favourite.png", "step_000006.png"]
