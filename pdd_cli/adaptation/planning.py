"""`--minutes`: plans steps and judgements from the speed of the machine, measured at the start (see time_limit)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace

from pdd_cli.adaptation.checkpoint import checkpoint_settings
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.loop import batch_source
from pdd_cli.adaptation.prepare import Run
from pdd_cli.adaptation.publish import report_crops
from pdd_cli.adaptation.time_limit import TimeLimit, Timing, plan_steps
from pdd_cli.adaptation.train_step import set_learning_rates, train_step
from pdd_cli.data.datasets import Batch
from pdd_cli.errors import InputError
from pdd_cli.observer import duration
from pdd_cli.settings.adapt import AdaptConfig

MIN_STEPS = 20  # with fewer, little more than the warm-up is left

_TRIAL_STEPS = 2  # the first one warms up
_TRIAL_FRACTION = 0.02  # of the time: fast machines do more trial steps
_MAX_TRIAL_STEPS = 50
_WARMUP_COST = 0.2  # of a step that trains only the discriminator, as a fraction of the others
_PLANNED = ("steps", "checkpoint_every", "preview_every")


def measure(run: Run, *, least_seconds: float = 0.0) -> Timing:
    """Evaluate the base and do a few training steps, for at least so long. This changes `run.state`."""
    config, state = run.config, run.state
    started = time.perf_counter()
    if run.models.ranks.is_first:
        _ = run.judge.base_scores  # computed once, and needed in any case
    per_judgement = time.perf_counter() - started

    # Start with the last step before the distillation: it moves the specialist away from the generalist.
    distillation = 0 if run.teacher else config.generalist.warmup_steps
    state.step = max(state.step, state.warmup_steps + distillation - 1)
    last = config.steps if config.minutes is None else state.step + _MAX_TRIAL_STEPS
    if run.models.ranks.size > 1:
        least_seconds = 0.0  # all processes must do the same number of steps
    seconds: list[float] = []
    events: list[str] = []
    with batch_source(run) as batches:
        while state.step < last and (len(seconds) < _TRIAL_STEPS or sum(seconds[1:]) < least_seconds):
            taken, finite = _timed_step(run, batches)
            seconds.append(taken)
            if not finite:
                events.append(f"step {state.step}: the loss is not finite")
    steady = seconds[1:] or seconds
    return Timing(sum(steady) / max(len(steady), 1), per_judgement, tuple(events))


def time_imitation(run: Run) -> float:
    """The time of one of a student's next steps, which are steps of imitation. This changes `run.state`."""
    with batch_source(run) as batches:
        return min(_timed_step(run, batches)[0] for _ in range(_TRIAL_STEPS))


def _timed_step(run: Run, batches: Callable[[int], Batch]) -> tuple[float, bool]:
    """Do a training step; returns its time, and whether its losses are finite."""
    started = time.perf_counter()
    set_learning_rates(run.config, run.state)
    batch = batches(run.state.step).to(run.models.runtime.device)
    result = train_step(run.state, batch, run.models, run.loss_weights)
    return time.perf_counter() - started, result.finite


def plan_run(run: Run, *, started: float) -> Run:
    """`run` with the steps and judgements that fit into `run.config.minutes`, and with this time as a limit.

    The trial steps are done on a copy of the state, so the run equals one with the planned `--steps` as long as the
    plan doesn't change. `started`: the `time.monotonic()` from which the minutes count.

    Raises InputError if the time is too short.
    """
    config, ranks, say = run.config, run.models.ranks, run.say
    assert config.minutes is not None
    say(f"measuring the time of a training step, to plan {config.minutes:g} minutes")
    trial = replace(run, state=copy.deepcopy(run.state))
    measured = measure(trial, least_seconds=_TRIAL_FRACTION * 60 * config.minutes)
    per_step, per_judgement, final = (
        max(map(float, ranks.gather(str(value))))
        for value in (measured.per_step, measured.per_judgement, final_judgements(run) if ranks.is_first else 0)
    )
    timing = Timing(per_step, per_judgement, measured.events)
    # Most of the warm-up steps are much shorter.
    average = replace(timing, per_step=per_step * (1 - (1 - _WARMUP_COST) * config.discriminator_warmup))
    candidates = 2 if config.generalist.mode == "ema" else 1
    limit = TimeLimit(config.minutes, started, timing, candidates, final)
    spent = max(map(float, ranks.gather(str(limit.spent))))
    every = None if config.is_default("checkpoint_every") else config.checkpoint_every
    plan = plan_steps(60 * config.minutes - spent, average, candidates, final, every)
    limit.announced = plan.steps
    if plan.steps < MIN_STEPS:
        least = spent + MIN_STEPS * per_step + (candidates + final) * per_judgement
        raise InputError(
            f"--minutes {config.minutes:g} is too short: on this machine, {MIN_STEPS} steps and the verdict take "
            f"about {duration(least)}",
            f"Give at least --minutes {math.ceil(1.1 * least / 60)}, or a smaller --batch-size.",
        )
    say(
        f"planned for {config.minutes:g} minutes: {plan.steps} steps of {per_step:.2g} s, judged every "
        f"{plan.judged_every}"
    )
    update: dict[str, object] = {"minutes": None, "steps": plan.steps, "checkpoint_every": plan.judged_every}
    if config.is_default("preview_every"):
        update["preview_every"] = plan.judged_every
    planned = config.model_copy(update=update)
    run.state.warmup_steps = planned.discriminator_warmup_steps
    return replace(run, config=planned, time_limit=limit)


def final_judgements(run: Run) -> float:
    """The time of previews, verdict and report, as a multiple of the judgement of one model."""
    in_report = [lr for _, _, lr, _ in report_crops(run)]
    judged, shown = (sum(lr.shape[0] * lr.shape[1] for lr in crops) for crops in (run.judge.crops, in_report))
    return float(1 + len(run.judge.strengths) + 2 * shown / judged)


def planned_before(config: AdaptConfig, folder: RunFolder) -> AdaptConfig:
    """`config` with the plan of the run in `folder`, which a resumed run keeps."""
    if config.minutes is None or not folder.checkpoint.exists():
        return config
    stored = checkpoint_settings(folder.checkpoint)
    return config.model_copy(update={"minutes": None, **{key: stored[key] for key in _PLANNED}})
