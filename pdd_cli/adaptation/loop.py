"""The training loop: data, step, monitor, log, checkpoint, preview."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import nn

from pdd_cli.adaptation.checkpoint import load_checkpoint, save_checkpoint
from pdd_cli.adaptation.prepare import Run, memory_errors
from pdd_cli.adaptation.preview import PREVIEW_IMAGES, PREVIEW_SIZE, center_crop, image_grid, to_rgb8, upscale_image
from pdd_cli.adaptation.tensorboard import TensorBoardLog
from pdd_cli.adaptation.time_limit import TimeLimit
from pdd_cli.adaptation.train_step import StepResult, set_learning_rates, train_step
from pdd_cli.data.datasets import RGB, Batch
from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.files import append_line, atomic_write, remove_leftovers, write_errors, write_text

# Crops of a student's step, as a multiple of the batch size. Imitation needs no features: more crops, and less work.
_TEACHER_CROPS = 2
_IMITATION_CROPS = 4
_WINDOW = 8  # number of steps of the monitored mean loss
_MAX_RISE = 3.0  # maximum ratio of that mean to its minimum
_MAX_SKIPPED = 3  # steps in a row
_MAX_ROLLBACKS = 4
_CHANGE_SAID = 0.1  # a last step that changes by a smaller fraction isn't worth a line
_SAVE_SECONDS = 180  # maximum time between checkpoints


@dataclass(frozen=True)
class StepReport:
    """One step of a run. `losses` are unweighted; those that were off, or not finite, in this step are absent."""

    step: int  # counted from 1
    losses: dict[str, float]
    learning_rate: float
    seconds: float
    event: str = ""  # a problem in this step and its remedy


def train(run: Run, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
    """Train from the current step of `run` to its last, or until `should_stop()`, and yield a report for each step.

    Writes log, checkpoints and previews. A step whose loss or gradient isn't finite is skipped. After several skipped
    steps in a row, or when the supervised loss has risen far above its minimum, the run returns to the last checkpoint
    and halves the learning rate.

    With several processes, each computes a part of every batch. Losses, gradients and decisions are those of the whole
    batch, and identical in all processes; only the first process writes files.

    Raises:
        InputError: training diverges again after every rollback.
        ResourceError: out of memory or disk space; the last checkpoint is intact.
    """
    try:
        with memory_errors(run.config):
            yield from _train(run, should_stop)
    except ResourceError as error:
        if run.folder.checkpoint.exists():
            error.hint += f" The last checkpoint is intact. To continue: {run.resume_command}"
        raise


def _train(run: Run, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
    state, models, ranks = run.state, run.models, run.models.ranks
    first = ranks.is_first
    if first:
        _open_folder(run)
    if ranks.any(run.finished):
        return
    base_panels = (
        [to_rgb8(upscale_image(models.base, lr, models.runtime)) for lr in _preview_crops(run)] if first else []
    )
    tensorboard = TensorBoardLog(run.folder.tensorboard if run.config.tensorboard and first else None, run.warn)
    with contextlib.closing(tensorboard), batch_source(run) as batches:
        tensorboard.begin(state.step)
        if state.step == 0 and first:
            _save(run)
        if ranks.size > 1:
            load_checkpoint(run.folder.checkpoint, state, ranks)  # so that all processes start with the same state
        if not _teach(run, should_stop):
            return
        saved = time.monotonic()
        while state.step < run.config.steps:
            # data
            started = time.perf_counter()
            learning_rate = set_learning_rates(run.config, state)
            batch = batches(state.step).to(models.runtime.device)

            # step
            result = train_step(state, batch, models, run.loss_weights)
            done = state.step

            # monitor
            event = _monitor(run, result)

            # log
            losses = {name: value for name, value in result.losses.items() if math.isfinite(value)}
            report = StepReport(done, losses, learning_rate, time.perf_counter() - started, event)
            if first:
                _log(run, report, tensorboard)
            if state.step < done:  # rolled back
                tensorboard.begin(state.step)
            yield report
            if state.step < done:
                continue

            # time
            if run.time_limit:
                _keep_to_time(run, run.time_limit, report.seconds)

            # checkpoint
            stop, last = ranks.any(should_stop()), state.step == run.config.steps
            due = state.step % run.config.checkpoint_every == 0 and result.finite  # a rollback needs a finite state
            if stop or due or last:
                # No judgement at an interruption: the resumed run must equal an uninterrupted one, and torchrun ends
                # processes after 30 s.
                if first:
                    try:
                        if due or last:
                            _judge_candidates(run, tensorboard)
                    finally:  # save the training even if the judgement fails
                        _save(run)
                stop = ranks.any((first and run.stopped_early) or should_stop()) or stop
                saved = time.monotonic()
            elif first and result.finite and time.monotonic() - saved > _SAVE_SECONDS:
                _save(run)
                saved = time.monotonic()

            # preview
            if first and (state.step % run.config.preview_every == 0 or last):
                _write_preview(run, base_panels, tensorboard)
            if stop:
                return


def _teach(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Compute the teacher's crops, if there is a teacher; False if that was stopped."""
    teacher, ranks, path = run.teacher, run.models.ranks, run.folder.teacher_crops
    if teacher is None:
        return True
    complete = teacher.compute(path, run.models.runtime, should_stop, run.say) if ranks.is_first else True
    if ranks.any(not complete):
        return False
    if ranks.size > 1:
        content = ranks.broadcast_file(path)
        teacher.load(content.read_bytes() if isinstance(content, Path) else content.getvalue())
    return True


@contextlib.contextmanager
def batch_source(run: Run) -> Iterator[Callable[[int], Batch]]:
    """This process's part of the batch of each step."""
    ranks = run.models.ranks
    n = ranks.per_rank(run.config.batch_size)

    def draw(step: int) -> Batch:
        if run.teacher is None:
            return run.sampler.batch(step, n, ranks.rank * n)
        count = n * (_IMITATION_CROPS if step < run.state.imitation_steps else _TEACHER_CROPS)
        lr_t, sr_t = run.teacher.draw(step, count, ranks.rank * count)
        return Batch(lr_t[:0], sr_t[:0], lr_t, sr_t)

    if run.models.runtime.device_type == "cpu":  # its cores are busy anyway; prefetching makes a step 10 % slower
        yield draw
    else:
        with Prefetcher(draw) as prefetcher:
            yield prefetcher


class Prefetcher:
    """Calls `load` for the next step in a background thread, which ends with the `with` block."""

    def __init__(self, load: Callable[[int], Batch]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(1, "data")
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        next_batch = self._next
        if next_batch is None or next_batch[0] != step:  # the first one, or after a rollback
            next_batch = step, self._thread.submit(self._load, step)
        self._next = step + 1, self._thread.submit(self._load, step + 1)
        return next_batch[1].result()


def _monitor(run: Run, result: StepResult) -> str:
    """Check the losses of this step and return to the checkpoint if they diverge. The result describes the event."""
    state, losses, monitor = run.state, result.losses, run.state.monitor
    monitor.skipped = 0 if result.finite else monitor.skipped + 1
    if result.finite and "perceptual" in losses:
        pixels = losses["teacher" if run.teacher else "pixel"]
        monitor.recent = [*monitor.recent[1 - _WINDOW :], pixels + losses["perceptual"]]
    mean = sum(monitor.recent) / _WINDOW if len(monitor.recent) == _WINDOW else None
    spiked = mean is not None and mean > _MAX_RISE * monitor.best
    if mean is not None:
        monitor.best = min(monitor.best, mean)
    if not spiked and monitor.skipped < _MAX_SKIPPED:
        return "" if result.finite else f"step {state.step}: the loss is not finite; the step was skipped"
    problem = f"the losses are {_MAX_RISE:g} times their minimum"
    if not spiked:
        problem = f"{monitor.skipped} losses in a row are not finite"
    failed_at, factor, rollbacks = state.step, monitor.rate_factor / 2, monitor.rollbacks + 1
    if rollbacks > _MAX_ROLLBACKS:
        raise InputError(
            f"step {failed_at}: {problem}, although the learning rate was halved {_MAX_ROLLBACKS} times: "
            "training diverges",
            "The last good state is kept. Start again with a lower learning rate: "
            "--overwrite --set optimizer.learning_rate=1e-5",
        )
    load_checkpoint(run.folder.checkpoint, state, run.models.ranks)
    state.monitor.rate_factor, state.monitor.rollbacks = factor, rollbacks
    return f"step {failed_at}: {problem}; returned to step {state.step} with {factor:g} of the learning rate"


def _keep_to_time(run: Run, limit: TimeLimit, seconds: float) -> None:
    """Change the last step if the speed of the machine has changed. `seconds`: duration of the step just done."""
    config, state, ranks = run.config, run.state, run.models.ranks
    if state.step <= state.warmup_steps + config.generalist.warmup_steps:  # these steps are shorter than the others
        return
    limit.record(seconds)
    steps = int(ranks.gather(str(limit.last_step(state.step, config.steps, config.checkpoint_every)))[0])
    if steps == config.steps:
        return
    if abs(steps - limit.announced) > _CHANGE_SAID * limit.announced:
        run.say(f"{steps} steps instead of {limit.announced}, to end in time: a step now takes {limit.per_step:.2g} s")
        limit.announced = steps
    run.config = config.model_copy(update={"steps": steps})
    if ranks.is_first:
        _write_config(run)


def _write_config(run: Run) -> None:
    write_text(run.folder.config, yaml.safe_dump({"adapt": run.settings}, sort_keys=False))


def _open_folder(run: Run) -> None:
    folder = run.folder
    if folder.checkpoint.exists() and not run.resumed:
        folder.clear()  # only with --overwrite: prepare_run has checked that
    with write_errors(folder.path):
        folder.previews.mkdir(parents=True, exist_ok=True)
    remove_leftovers([folder.path, folder.previews])
    _write_config(run)
    _truncate_log(folder.log, run.state.step)
    write_text(folder.judgements, "".join(json.dumps(judged) + "\n" for judged in run.state.judgements))


def _truncate_log(path: Path, step: int) -> None:
    """Remove the lines after `step` from the log, because those steps will be repeated."""
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
    """Judge the weights of this step and save the best weights so far; of a student those of the last step.

    The score, which knows nothing of the teacher, stops rising long before a student has learnt the teacher's detail.
    """
    state, folder = run.state, run.folder
    candidates = {"specialist": state.specialist}
    if run.config.generalist.mode == "ema":
        candidates["ema"] = state.generalist
    earlier = [] if run.teacher else [judged["score"] for judged in state.judgements]
    best = max(earlier, default=float("-inf"))
    best_of_step, module_to_keep = float("-inf"), state.specialist
    for which, module in candidates.items():
        scores = run.judge.evaluate(replace(run.models.base, module=module))
        score = run.judge.score(scores)
        if score > best or not folder.best.exists():
            best = score
            _save_weights(folder.best, module)
        if score > best_of_step:
            best_of_step, module_to_keep = score, module
        judged = {"step": state.step, "which": which, "score": score, **scores.as_document()}
        state.judgements.append(judged)
        append_line(folder.judgements, json.dumps(judged))
        tensorboard.scalars(_tags(judged), state.step)
    if run.config.keep_checkpoints:
        try:
            _save_weights(folder.checkpoints / f"step_{state.step:06d}.safetensors", module_to_keep)
            for old in folder.kept()[: -run.config.keep_checkpoints]:
                old.unlink(missing_ok=True)
        except (PddError, OSError) as error:
            run.warn(f"the weights of step {state.step} are not kept: {error}")


def _save_weights(path: Path, module: nn.Module) -> None:
    with atomic_write(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, temporary)


def _tags(judged: Mapping[str, Any]) -> dict[str, float]:
    """A judgement as values by TensorBoard tag, grouped by quantity."""
    keys = ("score", "consistency", "drift", "texture", "grain", "copied_noise", "fine_error")
    values = {f"judgement/{key}": judged[key] for key in keys}
    values |= {f"truth/{key}": value for key, value in judged.get("truth", {}).items()}
    return {f"{tag}/{judged['which']}": value for tag, value in values.items()}


def _preview_crops(run: Run) -> list[RGB]:
    return [center_crop(image, PREVIEW_SIZE) for image in run.sampler.lr_images[:PREVIEW_IMAGES]]


def _write_preview(run: Run, base_panels: list[RGB], tensorboard: TensorBoardLog) -> None:
    adapted = replace(run.models.base, module=run.state.specialist)
    scale, step = adapted.scale, run.state.step
    rows = [
        (lr.repeat(scale, 0).repeat(scale, 1), base, to_rgb8(upscale_image(adapted, lr, run.models.runtime)))
        for lr, base in zip(_preview_crops(run), base_panels, strict=True)
    ]
    grid = image_grid(rows, ("LR", "base", f"adapted, step {step}"))
    try:
        with atomic_write(run.folder.previews / f"step_{step:06d}.png") as temporary:
            grid.save(temporary, "PNG")
    except PddError as error:
        run.warn(f"no preview of step {step}: {error.message}")
    tensorboard.image("preview", grid, step)
