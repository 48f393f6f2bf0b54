"""`--minutes`: plans steps and judgements from the speed of the machine, measured at the start of the run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pdd_cli.adaptation.checkpoint import checkpoint_settings
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.judge import STRENGTHS
from pdd_cli.adaptation.loop import batch_source
from pdd_cli.adaptation.prepare import Run
from pdd_cli.adaptation.train_step import set_learning_rates, train_step
from pdd_cli.errors import InputError
from pdd_cli.observer import duration
from pdd_cli.settings.adapt import AdaptConfig

MIN_STEPS = 20  # with fewer, little more than the warm-up is left

_TRIAL_STEPS = 3  # the first one warms up
_TRIAL_FRACTION = 0.02  # of the time: fast machines do more trial steps
_MAX_TRIAL_STEPS = 50
_JUDGING_FRACTION = 0.1  # of the time
_MAX_JUDGEMENTS = 20
_STEPS_PER_JUDGEMENT = 10  # at least
_PLANNED = ("steps", "checkpoint_every", "preview_every")


@dataclass(frozen=True)
class Timing:
    """Measured seconds; `events`: problems in the trial steps."""

    per_step: float
    per_judgement: float  # of one model
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A run that fits into a time. `judged_every`: steps between judgements; `seconds`: expected duration."""

    steps: int
    judged_every: int
    seconds: float


def measure(run: Run, *, least_seconds: float = 0.0) -> Timing:
    """Evaluate the base and do a few training steps, for at least so long. This changes `run.state`."""
    config, state, runtime = run.config, run.state, run.models.runtime
    started = time.perf_counter()
    if run.models.ranks.is_first:
        run.judge.evaluate(run.models.base)
    per_judgement = time.perf_counter() - started

    # Start with the last step before the distillation: it moves the specialist away from the generalist.
    state.step = max(state.step, state.warmup_steps + config.generalist.warmup_steps - 1)
    last = config.steps if config.minutes is None else state.step + _MAX_TRIAL_STEPS
    if run.models.ranks.size > 1:
        least_seconds = 0.0  # all processes must do the same number of steps
    seconds: list[float] = []
    events: list[str] = []
    with batch_source(run) as batches:
        while state.step < last and (len(seconds) < _TRIAL_STEPS or sum(seconds[1:]) < least_seconds):
            started = time.perf_counter()
            set_learning_rates(config, state)
            result = train_step(state, batches(state.step).to(runtime.device), run.models, run.loss_weights)
            seconds.append(time.perf_counter() - started)
            if not result.finite:
                events.append(f"step {state.step}: the loss is not finite")
    steady = seconds[1:] or seconds
    return Timing(sum(steady) / max(len(steady), 1), per_judgement, tuple(events))


def plan_steps(seconds: float, timing: Timing, candidates: int, judged_every: int | None = None) -> Plan:
    """The plan for a run of `seconds`.

    Args:
        seconds: Time for training, judgements and report.
        timing: The speed of the machine.
        candidates: Number of models that each judgement evaluates.
        judged_every: Steps between judgements; None: as often as a tenth of the time allows, at most 20 times.
    """
    final = (1 + 2 * len(STRENGTHS)) * timing.per_judgement  # previews, verdict and report
    left = seconds - final
    judging = candidates * timing.per_judgement
    if judged_every is not None:
        steps = max(0, math.floor(left / (timing.per_step + judging / judged_every)))
        judgements = math.ceil(steps / judged_every)
    else:
        judgements = max(1, min(_MAX_JUDGEMENTS, math.floor(_JUDGING_FRACTION * seconds / max(judging, 1e-9))))
        steps = max(0, math.floor((left - judgements * judging) / timing.per_step))
        judgements = max(1, min(judgements, steps // _STEPS_PER_JUDGEMENT))
        judged_every = max(1, math.ceil(steps / judgements))
    return Plan(steps, judged_every, steps * timing.per_step + judgements * judging + final)


def plan_run(run: Run, *, started: float, say: Callable[[str], None]) -> Run:
    """`run` with the steps and judgements that fit into `run.config.minutes`.

    The trial steps are done on a copy of the state, so the run equals one with the planned `--steps`. `started`: the
    `time.monotonic()` from which the minutes count.

    Raises InputError if the time is too short.
    """
    config, ranks = run.config, run.models.ranks
    assert config.minutes is not None
    say(f"measuring the time of a training step, to plan {config.minutes:g} minutes")
    trial = replace(run, state=copy.deepcopy(run.state))
    timing = measure(trial, least_seconds=_TRIAL_FRACTION * 60 * config.minutes)
    per_step, per_judgement = (
        max(map(float, ranks.gather(str(seconds)))) for seconds in (timing.per_step, timing.per_judgement)
    )
    timing = Timing(per_step, per_judgement)
    spent = max(map(float, ranks.gather(str(time.monotonic() - started))))
    candidates = 2 if config.generalist.mode == "ema" else 1
    every = None if config.is_default("checkpoint_every") else config.checkpoint_every
    plan = plan_steps(60 * config.minutes - spent, timing, candidates, every)
    if plan.steps < MIN_STEPS:
        least = spent + MIN_STEPS * per_step + (candidates + 1 + 2 * len(STRENGTHS)) * per_judgement
        raise InputError(
            f"--minutes {config.minutes:g} is too short: on this machine, {MIN_STEPS} steps and the verdict take "
            f"about {duration(least)}",
            f"Give at least --minutes {math.ceil(1.1 * least / 60)}, or a smaller --batch-size.",
        )
    say(
        f"planned for {config.minutes:g} minutes: {plan.steps} steps of {per_step:.2g} s, judged every "
        f"{plan.judged_every} steps; done in about {duration(plan.seconds)}"
    )
    update: dict[str, object] = {"minutes": None, "steps": plan.steps, "checkpoint_every": plan.judged_every}
    if config.is_default("preview_every"):
        update["preview_every"] = plan.judged_every
    planned = config.model_copy(update=update)
    run.state.warmup_steps = planned.discriminator_warmup_steps
    return replace(run, config=planned)


def planned_before(config: AdaptConfig, folder: RunFolder) -> AdaptConfig:
    """`config` with the plan of the run in `folder`, which a resumed run keeps."""
    if config.minutes is None or not folder.checkpoint.exists():
        return config
    stored = checkpoint_settings(folder.checkpoint)
    return config.model_copy(update={"minutes": None, **{key: stored[key] for key in _PLANNED}})
