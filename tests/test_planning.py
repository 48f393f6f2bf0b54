"""`pdd adapt --minutes` and `--quality`: what they plan, and that a planned run is one like any other."""

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pdd_cli.adaptation import planning, time_limit
from pdd_cli.adaptation.loop import train
from pdd_cli.adaptation.run import start
from pdd_cli.adaptation.time_limit import TimeLimit, Timing, plan_steps
from pdd_cli.errors import InputError
from pdd_cli.observer import Observer
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve, settings_from
from tests.helpers.commands import command

seconds = st.floats(0.001, 100)


FINAL = 9  # judgements: verdict and report


@given(seconds, seconds, st.floats(1, 1e6), st.sampled_from([None, 1, 50]))
def test_a_plan_fits_into_the_time_and_uses_it(per_step, per_judgement, budget, judged_every):
    plan = plan_steps(budget, Timing(per_step, per_judgement), 2, FINAL, judged_every)

    judgements = math.ceil(plan.steps / plan.judged_every)
    planned = plan.steps * per_step + (2 * judgements + FINAL) * per_judgement
    if plan.steps:
        assert planned <= budget * (1 + 1e-9)
    if plan.steps > 1000:  # little time is left
        assert planned > 0.8 * budget


def test_a_plan_in_numbers():
    # 9 judgements of 5 s for the verdict and the report; a tenth of 600 s are 6 judgements of two models.
    plan = plan_steps(600, Timing(2, 5), 2, FINAL)

    assert plan.steps == (600 - 45 - 60) // 2 == 247
    assert math.ceil(plan.steps / plan.judged_every) == 6


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def simulated(monkeypatch, minutes, timing, slower):
    """The seconds that a run takes on a machine that is `slower(time)` times as slow as in the trial steps, its last
    step, and the planned one."""
    clock = Clock()
    monkeypatch.setattr(time_limit, "monotonic", clock)
    plan = plan_steps(60 * minutes, timing, 2, FINAL)
    limit = TimeLimit(minutes, 0.0, timing, 2, FINAL)
    step, last = 0, plan.steps
    while step < last:
        seconds = slower(clock.now) * timing.per_step
        clock.now += seconds
        step += 1
        limit.record(seconds)
        last = limit.last_step(step, last, plan.judged_every)
        if step % plan.judged_every == 0 or step == last:
            clock.now += slower(clock.now) * 2 * timing.per_judgement
    clock.now += slower(clock.now) * FINAL * timing.per_judgement
    return clock.now, last, plan.steps


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    st.floats(2, 600),
    st.floats(0.001, 0.01),
    st.floats(0.0001, 0.005),
    st.floats(0, 0.7),
    st.floats(0.2, 5),
)
def test_a_run_keeps_to_its_time_when_the_speed_changes(minutes, step, judgement, at, factor):
    seconds = 60 * minutes
    timing = Timing(step * seconds, judgement * seconds)
    with pytest.MonkeyPatch.context() as monkeypatch:
        taken, last, planned = simulated(
            monkeypatch, minutes, timing, lambda now: factor if now > at * seconds else 1.0
        )
    one_step, judging, final = (factor * value * seconds for value in (step, 2 * judgement, FINAL * judgement))
    # What can't be avoided: after the change, the steps that show it, a judgement, and the end.
    soonest = (at + 0.1) * seconds + 12 * max(one_step, step * seconds) + judging + final
    assert taken <= max(1.035 * seconds, soonest)
    assert taken >= 0.9 * seconds - 5 * step * seconds - 2 * judging
    if 0.98 < factor < 1.02:
        assert last == planned


def settings(file="", cli=None, overrides=()):
    Path("pdd.yaml").write_text(f"adapt: {{real_dir: x, {file}}}")
    return resolve(AdaptConfig, "adapt", options=cli or {}, overrides=overrides)


def test_the_source_of_higher_precedence_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert settings("steps: 300", {"minutes": 20.0}).minutes == 20
    by_steps = settings("minutes: 20", {"steps": 300})
    assert (by_steps.minutes, by_steps.steps) == (None, 300)
    assert settings("minutes: 20", {}, ["steps=300"]).minutes is None
    assert settings("minutes: 20", {"steps": 50}, ["steps=300"]).steps == 50
    for given_twice in ({"cli": {"steps": 50, "minutes": 5.0}}, {"file": "steps: 50, minutes: 5"}):
        with pytest.raises(InputError, match="--minutes plans the number of steps"):
            settings(**given_twice)


def test_what_the_user_sets_wins_over_the_quality(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    quick = settings(cli={"quality": "quick"})
    assert (quick.steps, quick.checkpoint_every, quick.batch_size) == (30, 15, 4)
    assert settings() == settings(cli={"quality": "good"})
    best = settings("steps: 77", {"quality": "best"})
    assert (best.steps, best.batch_size) == (77, 8)
    assert settings(cli={"quality": "best", "minutes": 5.0}).batch_size == 8
    with pytest.raises(InputError, match="quality: 'poor' is not allowed"):
        settings(cli={"quality": "poor"})


def simulate(monkeypatch, seconds_of):
    """A machine on which a judgement of a model takes 5 s, and a step the seconds that `seconds_of(step)` gives."""
    clock = Clock()
    clock.now = time.monotonic()
    done = 0

    def measure(run, *, least_seconds=0.0):
        found = planning_measure(run)
        assert found.per_step > 0
        assert found.per_judgement > 0
        return Timing(seconds_of(0), 5.0)

    def record(limit, seconds):
        nonlocal done
        assert seconds > 0
        done += 1
        clock.now += seconds_of(done) if done > 1 else 5 * seconds_of(done)  # with the warm-up, which is not recorded
        limit_record(limit, seconds_of(done))

    planning_measure, limit_record = planning.measure, TimeLimit.record
    monkeypatch.setattr(planning, "measure", measure)
    monkeypatch.setattr(time_limit, "monotonic", clock)
    monkeypatch.setattr(TimeLimit, "record", record)


def without_steps(arguments):
    at = arguments.index("--steps")
    return [*arguments[:at], *arguments[at + 2 :]]


def trained(config, name, *, until=None, resume=False, say=None):
    """A run, trained to its last step, or interrupted after the step `until`."""
    observer = Observer()
    observer.say = say or observer.say  # type: ignore[method-assign]
    run = start(config, name=name, resume=resume, observer=observer)
    for _ in train(run, lambda: run.state.step == until):
        pass
    return run


@pytest.mark.slow
def test_a_run_that_becomes_slower_equals_one_that_is_resumed_with_fewer_steps(ground, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"real_dir": ground / "realLR", "hr_dir": ground / "hr", "base": str(ground / "base.safetensors")}
    features = {"network": "efficientnet-lite0", "weights": ground / "features.safetensors"}
    small = {"batch_size": 1, "crop": 16, "device": "cpu", "precision": "fp32", "checkpoint_every": 50}
    config = settings_from(AdaptConfig, {**base, **small, "features": features, "minutes": 100.0})
    said = []
    with monkeypatch.context() as patch:
        simulate(patch, lambda step: 250.0 if step <= 5 else 400.0)
        planned = trained(config, "planned", say=said.append)
    ((last, first),) = re.findall(r"(\d+) steps instead of (\d+), to end in time: a step now takes 4e\+02 s", str(said))
    assert int(last) == planned.state.step == planned.config.steps < int(first)
    assert yaml.safe_load(Path("runs/planned/config.yaml").read_text())["adapt"]["steps"] == int(last)

    changed_at = 6 + 10  # the warm-up, five steps as fast as planned, and five slower ones
    fixed = {"minutes": None, "preview_every": planned.config.preview_every}
    trained(config.model_copy(update={**fixed, "steps": int(first)}), "resumed", until=changed_at)
    resumed = trained(config.model_copy(update={**fixed, "steps": int(last)}), "resumed", resume=True)
    one, other = (run.state.specialist.state_dict() for run in (planned, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not all(torch.equal(one[key], value) for key, value in planned.models.base.module.state_dict().items())


@pytest.mark.slow
def test_a_planned_run_equals_one_of_as_many_steps(ground, pdd, monkeypatch):
    arguments = without_steps(command(ground)[3:])
    with monkeypatch.context() as patch:
        simulate(patch, lambda step: 250.0)
        planned = pdd(*arguments, "--minutes", "100", "--name", "planned", "--verbose")
    assert planned.code == 0, planned.err
    stored = yaml.safe_load(Path("runs/planned/config.yaml").read_text())["adapt"]
    assert stored["minutes"] is None
    assert 20 <= stored["steps"] <= 24  # 6000 s
    assert f"planned for 100 minutes: {stored['steps']} steps of 2.5e+02 s" in planned.err
    assert "time: 100 minutes asked, " in planned.err
    assert "Time: 100 minutes asked, " in Path("runs/planned/report.html").read_text()
    assert f"step {stored['steps']}, " in planned.err  # --verbose

    assert "steps instead of" not in planned.err
    repeated = pdd("adapt", "--config", "runs/planned/config.yaml", "--name", "repeated", "--json")
    assert repeated.code == 0, repeated.err
    assert json.loads(repeated.out)["steps"] == stored["steps"]
    first, second = (load_file(f"runs/{name}/best.safetensors") for name in ("planned", "repeated"))
    assert all(torch.equal(first[key], second[key]) for key in first)

    resumed = pdd(*arguments, "--resume", "--minutes", "500", "--name", "planned")
    assert resumed.code == 0, resumed.err
    assert f"--minutes is for new runs: this one continues to step {stored['steps']}" in resumed.err

    with monkeypatch.context() as patch:
        simulate(patch, lambda step: 250.0)
        short = pdd(*arguments, "--minutes", "1", "--name", "short")
    assert short.code == 2
    # 20 steps of 250 s, a judgement, and what was spent before
    assert re.search(
        r"--minutes 1 is too short: on this machine, 20 steps and the verdict take about 8\d min", short.err
    )
    assert not Path("runs/short").exists()
