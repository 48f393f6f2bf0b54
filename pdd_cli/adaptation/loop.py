"""The training loop: data, step, monitor, log, checkpoint, preview."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from pdd_cli.adaptation.checkpoint import load_checkpoint, save_checkpoint
from pdd_cli.adaptation.prepare import Run, memory_errors
from pdd_cli.adaptation.preview import PREVIEW_IMAGES, PREVIEW_SIZE, centre, sheet, to_rgb8, upscaled
from pdd_cli.adaptation.tensorboard import TensorBoardLog
from pdd_cli.adaptation.train_step import StepResult, set_learning_rates, train_step
from pdd_cli.data.datasets import RGB, Batch
from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.files import append_line, atomic_write, remove_leftovers, write_errors, write_text

_WINDOW = 8  # steps whose mean loss is watched
_SPIKE = 3.0  # … and how far it may rise above its best
_MOST_SKIPPED = 3  # in a row
_MOST_ROLLBACKS = 4
_SAVE_SECONDS = 180  # a checkpoint is written at least as often


@dataclass(frozen=True)
class StepReport:
    """One step of a run. `losses` are unweighted; those that were off in this step are absent."""

    step: int  # counted from 1
    losses: dict[str, float]
    learning_rate: float
    seconds: float
    event: str = ""  # what went wrong in this step, and what was done about it


def train(run: Run, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
    """Train from the step that `run` is at to its last, or until `should_stop()`, yielding a report a step.

    Writes log, checkpoints and previews on the way. A step whose loss or gradient isn't finite is skipped. After
    several in a row, or when the supervised loss has risen far above its best, the run goes back to the last
    checkpoint and halves the rate.

    Among several processes each takes its part of every batch. Losses, gradients and decisions are those of the whole
    batch, and alike in all of them; only the first writes.

    Raises:
        InputError: rollbacks don't help.
        ResourceError: memory or disk ran out; the last checkpoint is whole.
    """
    try:
        with memory_errors(run.config):
            yield from _train(run, should_stop)
    except ResourceError as error:
        if run.folder.checkpoint.exists():
            error.hint += f" The last checkpoint is whole: {run.resume_command} goes on from it."
        raise


def _train(run: Run, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
    config, state, models, ranks = run.config, run.state, run.models, run.models.ranks
    first = ranks.is_first
    if first:
        _open_folder(run)
    if ranks.any(run.finished):
        return
    base_panels = [to_rgb8(upscaled(models.base, lr, models.runtime)) for lr in _preview_crops(run)] if first else []
    tensorboard = TensorBoardLog(run.folder.board if config.tensorboard and first else None, run.notify)
    with contextlib.closing(tensorboard):
        tensorboard.begin(state.step)
        batches = batch_source(run)
        if state.step == 0 and first:
            _save(run)
        if ranks.size > 1:
            load_checkpoint(run.folder.checkpoint, state, ranks)  # all begin where the first does
        saved = time.monotonic()
        while state.step < config.steps:
            # data
            started = time.perf_counter()
            learning_rate = set_learning_rates(config, state)
            batch = batches(state.step).to(models.runtime.device)

            # step
            result = train_step(state, batch, models, config.losses)
            done = state.step

            # monitor
            event = _monitor(run, result)

            # log
            report = StepReport(done, result.losses, learning_rate, time.perf_counter() - started, event)
            if first:
                _log(run, report, tensorboard)
            if state.step < done:  # rolled back
                tensorboard.begin(state.step)
            yield report
            if state.step < done:
                continue

            # checkpoint
            stop, last = ranks.any(should_stop()), state.step == config.steps
            due = state.step % config.checkpoint_every == 0 and result.finite  # a rollback must return to a sound one
            if stop or due or last:
                # An interruption doesn't judge: the run that goes on from there is to be the one that wasn't
                # interrupted, and torchrun gives it but 30 s to end.
                if first:
                    try:
                        if due or last:
                            _judge_candidates(run, tensorboard)
                    finally:  # what was learnt stays, whatever went wrong in judging it
                        _save(run)
                stop = ranks.any((first and run.stopped_early) or should_stop()) or stop
                saved = time.monotonic()
            elif first and result.finite and time.monotonic() - saved > _SAVE_SECONDS:
                _save(run)
                saved = time.monotonic()

            # preview
            if first and (state.step % config.preview_every == 0 or last):
                _write_preview(run, base_panels, tensorboard)
            if stop:
                return


def batch_source(run: Run) -> Callable[[int], Batch]:
    """This process's part of the batch of each step."""
    ranks = run.models.ranks
    n = ranks.per_rank(run.config.batch_size)

    def draw(step: int) -> Batch:
        return run.domains.batch(step, n, ranks.rank * n)

    # Not on a CPU: its cores have enough to do, and a step takes a tenth longer.
    return draw if run.models.runtime.device_type == "cpu" else Prefetcher(draw)


class Prefetcher:
    """What `make` gives for a step, made in a thread of its own while the step before is computed."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "data")
        self._coming: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        coming = self._coming
        if coming is None or coming[0] != step:  # the first one, or after a rollback
            coming = step, self._thread.submit(self._make, step)
        self._coming = step + 1, self._thread.submit(self._make, step + 1)
        return coming[1].result()


def _monitor(run: Run, result: StepResult) -> str:
    """Watch the losses of the step that was done; go back to the checkpoint if they diverge. The event, in words."""
    state, losses, guard = run.state, result.losses, run.state.guard
    guard.skipped = 0 if result.finite else guard.skipped + 1
    if result.finite and "pixel" in losses:
        guard.recent = [*guard.recent[1 - _WINDOW :], losses["pixel"] + losses["perceptual"]]
    mean = sum(guard.recent) / _WINDOW if len(guard.recent) == _WINDOW else None
    spiked = mean is not None and mean > _SPIKE * guard.best
    if mean is not None:
        guard.best = min(guard.best, mean)
    if not spiked and guard.skipped < _MOST_SKIPPED:
        return "" if result.finite else f"step {state.step}: the loss is not finite; the step was skipped"
    why = f"the losses are {_SPIKE:g} times their best" if spiked else f"{guard.skipped} losses in a row are not finite"
    failed_at, factor, rollbacks = state.step, guard.rate_factor / 2, guard.rollbacks + 1
    if rollbacks > _MOST_ROLLBACKS:
        raise InputError(
            f"step {failed_at}: {why}, though the rate has been halved {_MOST_ROLLBACKS} times: training diverges",
            "The last good state is kept. Start anew with a lower rate: --overwrite --set optimizer.learning_rate=1e-5",
        )
    load_checkpoint(run.folder.checkpoint, state, run.models.ranks)
    state.guard.rate_factor, state.guard.rollbacks = factor, rollbacks
    return f"step {failed_at}: {why}; back to step {state.step} at {factor:g} of the learning rate"


def _open_folder(run: Run) -> None:
    folder = run.folder
    if folder.checkpoint.exists() and not run.resumed:
        folder.clear()  # --overwrite: without it nobody gets here
    with write_errors(folder.path):
        folder.previews.mkdir(parents=True, exist_ok=True)
    remove_leftovers([folder.path, folder.previews])
    write_text(folder.config, yaml.safe_dump({"adapt": run.settings}, sort_keys=False))
    _cut_log(folder.log, run.state.step)
    write_text(folder.judgements, "".join(json.dumps(judged) + "\n" for judged in run.state.judgements))


def _cut_log(path: Path, step: int) -> None:
    """Drop the log's lines after `step`: those steps are done again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def _log(run: Run, report: StepReport, tensorboard: TensorBoardLog) -> None:
    line = {
        "step": report.step,
        **report.losses,
        "learning_rate": report.learning_rate,
        "seconds": report.seconds,
        **({"event": report.event} if report.event else {}),
    }
    append_line(run.folder.log, json.dumps(line))
    losses = {f"loss/{name}": value for name, value in report.losses.items()}
    tensorboard.scalars({**losses, "learning_rate": report.learning_rate}, report.step)


def _save(run: Run) -> None:
    save_checkpoint(run.folder.checkpoint, run.state, run.settings, run.inputs)


def _judge_candidates(run: Run, tensorboard: TensorBoardLog) -> None:
    """Judge the weights of this step, and keep the best so far."""
    state, folder = run.state, run.folder
    candidates = {"specialist": state.specialist}
    if run.config.generalist.mode == "ema":
        candidates["ema"] = state.generalist
    best = max((judged["score"] for judged in state.judgements), default=float("-inf"))
    for which, module in candidates.items():
        found = run.judge.judged(replace(run.models.base, module=module))
        score = run.judge.score(found)
        if score > best or not folder.best.exists():
            best = score
            with atomic_write(folder.best) as temporary:
                save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, temporary)
        judged = {"step": state.step, "which": which, "score": score, **found.as_document()}
        state.judgements.append(judged)
        append_line(folder.judgements, json.dumps(judged))
        tensorboard.scalars(_tags(judged), state.step)


def _tags(judged: Mapping[str, Any]) -> dict[str, float]:
    """A judgement as TensorBoard's tags, those of one measure below each other."""
    values = {f"judgement/{key}": judged[key] for key in ("score", "consistency", "drift", "texture", "grain")}
    values |= {f"truth/{key}": value for key, value in judged.get("truth", {}).items()}
    return {f"{tag}/{judged['which']}": value for tag, value in values.items()}


def _preview_crops(run: Run) -> list[RGB]:
    return [centre(image, PREVIEW_SIZE) for image in run.domains.real[:PREVIEW_IMAGES]]


def _write_preview(run: Run, base_panels: list[RGB], tensorboard: TensorBoardLog) -> None:
    adapted = replace(run.models.base, module=run.state.specialist)
    scale, step = adapted.scale, run.state.step
    rows = [
        (lr.repeat(scale, 0).repeat(scale, 1), base, to_rgb8(upscaled(adapted, lr, run.models.runtime)))
        for lr, base in zip(_preview_crops(run), base_panels, strict=True)
    ]
    picture = sheet(rows, ("LR", "base", f"adapted, step {step}"))
    try:
        with atomic_write(run.folder.previews / f"step_{step:06d}.png") as temporary:
            picture.save(temporary, "PNG")
    except PddError as error:
        run.notify(f"no preview of step {step}: {error.message}")
    tensorboard.picture("preview", picture, step)
