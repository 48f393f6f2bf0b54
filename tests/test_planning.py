"""`pdd adapt --minutes` and `--quality`: what they plan, and that a planned run is one like any other."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pdd_cli.adaptation import planning
from pdd_cli.adaptation.planning import Timing, plan_steps
from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve
from tests.helpers.commands import command

seconds = st.floats(0.001, 100)


@given(seconds, seconds, st.floats(1, 1e6), st.sampled_from([None, 1, 50]))
def test_a_plan_fits_into_the_time_and_uses_it(per_step, per_judgement, budget, judged_every):
    plan = plan_steps(budget, Timing(per_step, per_judgement), 2, judged_every)

    if plan.steps:
        judgements = math.ceil(plan.steps / plan.judged_every)
        assert plan.steps * per_step + judgements * 2 * per_judgement < budget
        assert plan.seconds < budget + 2 * per_judgement  # the last judgement
    if plan.steps > 1000:  # little time is left
        assert plan.seconds > 0.8 * budget


def test_a_plan_in_numbers():
    # 9 judgements of 5 s for the verdict and the report; a tenth of 600 s are 6 judgements of two models.
    plan = plan_steps(600, Timing(2, 5), 2)

    assert plan.steps == (600 - 45 - 60) // 2 == 247
    assert math.ceil(plan.steps / plan.judged_every) == 6
    assert plan.seconds == 247 * 2 + 60 + 45


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
        with pytest.raises(InputError, match="--minutes plans the steps"):
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


@pytest.mark.slow
def test_a_planned_run_equals_one_of_as_many_steps(ground, pdd, monkeypatch):
    arguments = command(ground)[3:]
    arguments = [*arguments[: arguments.index("--steps")], *arguments[arguments.index("--steps") + 2 :]]
    measure = planning.measure

    def measure_slow_machine(run, *, least_seconds=0.0):
        found = measure(run)
        assert found.per_step > 0
        assert found.per_judgement > 0
        return Timing(250.0, 5.0)

    monkeypatch.setattr(planning, "measure", measure_slow_machine)
    planned = pdd(*arguments, "--minutes", "100", "--name", "planned", "--verbose")
    assert planned.code == 0, planned.err
    stored = yaml.safe_load(Path("runs/planned/config.yaml").read_text())["adapt"]
    assert stored["minutes"] is None
    assert 20 <= stored["steps"] <= 24  # 6000 s
    assert f"planned for 100 minutes: {stored['steps']} steps of 2.5e+02 s" in planned.err
    assert f"step {stored['steps']}, " in planned.err  # --verbose

    repeated = pdd("adapt", "--config", "runs/planned/config.yaml", "--name", "repeated", "--json")
    assert repeated.code == 0, repeated.err
    assert json.loads(repeated.out)["steps"] == stored["steps"]
    first, second = (load_file(f"runs/{name}/best.safetensors") for name in ("planned", "repeated"))
    assert all(torch.equal(first[key], second[key]) for key in first)

    resumed = pdd(*arguments, "--resume", "--minutes", "500", "--name", "planned")
    assert resumed.code == 0, resumed.err
    assert f"--minutes is for new runs: this one continues to step {stored['steps']}" in resumed.err

    short = pdd(*arguments, "--minutes", "1", "--name", "short")
    assert short.code == 2
    # 20 steps of 250 s, a judgement, and what was spent before
    assert re.search(
        r"--minutes 1 is too short: on this machine, 20 steps and the verdict take about 8\d min", short.err
    )
    assert not Path("runs/short").exists()
