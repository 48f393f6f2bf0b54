"""`--dry-run`: checks everything, measures time and memory in a few discarded steps, and computes the disk space."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.hr_images import HRChoice, choose_hr
from pdd_cli.adaptation.planning import measure, plan_run, planned_before, time_imitation
from pdd_cli.adaptation.prepare import Run, check_folder, check_name, memory_errors, prepare_run, weight_files
from pdd_cli.adaptation.preview import PREVIEW_IMAGES, PREVIEW_SIZE
from pdd_cli.adaptation.sources import Source, read_sources
from pdd_cli.errors import DownloadError, InputError, PddError, ResourceError
from pdd_cli.exporting.formats import check_packages
from pdd_cli.runtime import available_memory, choose_runtime, peak_memory
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.catalog import find
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.states import HUB_PREFIX
from pdd_cli.weights.store import Store

_OTHER_FILES = 4 << 20  # bytes: logs, verdict, report


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run. `steps` and `judgements` are the most that remain to be done."""

    steps: int
    judgements: int
    seconds_per_step: float
    seconds_per_judgement: float
    memory: int  # peak in bytes, of the GPU if the run uses one; 0: not known
    free_memory: int  # bytes that are free in addition
    events: tuple[str, ...]  # problems in the trial steps
    teacher_crops: int = 0  # to be computed before the first step
    seconds_per_teacher_crop: float = 0.0
    imitation_steps: int = 0  # of `steps`
    seconds_per_imitation_step: float = 0.0

    @property
    def seconds(self) -> float:
        steps = (self.steps - self.imitation_steps) * self.seconds_per_step
        steps += self.imitation_steps * self.seconds_per_imitation_step
        return steps + self.judgements * self.seconds_per_judgement + self.teacher_crops * self.seconds_per_teacher_crop


@dataclass(frozen=True)
class DiskUse:
    """Bytes that would be written into a folder, and free bytes on its disk."""

    folder: Path
    needed: int
    free: int


@dataclass
class DryRun:
    """The findings of a dry run, as far as it gets."""

    name: str
    folder: Path
    settings: AdaptConfig
    run: Run | None = None
    sources: Sequence[Source] = ()
    disk: Sequence[DiskUse] = ()
    estimate: Estimate | None = None
    to_fetch: list[str] = field(default_factory=list)
    problems: list[PddError] = field(default_factory=list)

    def as_document(self) -> dict[str, Any]:
        """For --json."""
        run, estimate = self.run, self.estimate
        return {
            "dry_run": True,
            "name": self.name,
            "run": self.folder,
            "images": [
                {
                    "option": source.option,
                    "folder": source.folder,
                    "used": source.used,
                    "smallest": source.smallest,
                    "largest": source.largest,
                    "smaller_than_a_crop": source.small,
                    "left_out": source.left_out,
                }
                for source in self.sources
            ],
            **(
                {
                    "trained_on": len(run.sampler.real),
                    "pairs_trained_on": len(run.sampler.pairs),
                    "pairs_judged_on": run.judge.held_out_pairs.found if run.judge.held_out_pairs else 0,
                    "judged_on": len(run.judge.images),
                    "source": run.properties.as_document(),
                    "hr_from": run.hr_from,
                    "pairs": run.judge.pairs.found if run.judge.pairs else 0,
                    "architecture": run.models.base.architecture,
                    "scale": run.models.base.scale,
                    "features": run.features_name,
                    "device": str(run.models.runtime.device),
                    "precision": run.models.runtime.precision,
                }
                if run
                else {}
            ),
            "to_fetch": self.to_fetch,
            **(
                {
                    "steps": estimate.steps,
                    "judgements": estimate.judgements,
                    "seconds_per_step": estimate.seconds_per_step,
                    "seconds_per_judgement": estimate.seconds_per_judgement,
                    "teacher_crops": estimate.teacher_crops,
                    "seconds_per_teacher_crop": estimate.seconds_per_teacher_crop,
                    "imitation_steps": estimate.imitation_steps,
                    "seconds_per_imitation_step": estimate.seconds_per_imitation_step,
                    "seconds": estimate.seconds,
                    "memory": estimate.memory,
                }
                if estimate
                else {}
            ),
            "disk": [{"folder": use.folder, "needed": use.needed, "free": use.free} for use in self.disk],
            "problems": [
                {"message": error.message, "hint": error.hint, "exit_code": error.exit_code} for error in self.problems
            ],
        }


def dry_run(
    settings: AdaptConfig,
    store: Store,
    *,
    name: str,
    resume: bool,
    overwrite: bool,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> DryRun:
    """Find out what the run would do, what it needs, and every reason for which it would fail."""
    found = DryRun(name, settings.runs_dir / name, settings)

    @contextlib.contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except PddError as error:
            found.problems.append(error)

    def installed(reference: str) -> Path:
        try:
            return ensure(reference, store=store, offline=True, on_event=lambda event: None)
        except DownloadError:
            if not settings.offline and not reference.startswith(HUB_PREFIX):
                found.to_fetch.append(reference)
            raise

    hr = HRChoice(None)
    with collected():
        hr = choose_hr(settings, store, warn, say)
        if settings.offline:
            hr.fetch(store, offline=True, warn=warn)
            hr = hr.fetched(store)
    settings = found.settings = hr.apply(settings)
    if resume:
        settings = found.settings = planned_before(settings, RunFolder(found.folder))
    with collected():
        check_name(name, store, replace=resume or overwrite)
    with collected():
        check_folder(RunFolder(found.folder), settings, resume=resume, overwrite=overwrite)
    with collected():
        check_packages(settings.export, "--export")
    resuming = resume and not found.problems
    if hr.to_fetch:  # the estimate is made with HR images from the real images
        settings = found.settings = settings.model_copy(update={"hr_dir": None})
    with collected():
        runtime = choose_runtime(settings.device, settings.precision)
        weights = None
        try:
            weights = weight_files(settings, installed, warn if settings.offline else lambda text: None)
        except DownloadError:
            if not found.to_fetch:
                raise
        if hr.to_fetch and not settings.offline:
            found.to_fetch.append(hr.to_fetch.name)
        if weights is None:
            scale = find(settings.base).scale or 4  # the base is in the catalogue, but not installed
            found.sources = read_sources(settings, scale, warn, say).sources
        else:
            started = time.monotonic()
            with memory_errors(settings):
                run = prepare_run(
                    settings, weights, runtime, name=name, resume=resuming, overwrite=True, warn=warn, say=say
                )
                if settings.minutes is not None:
                    run = plan_run(run, started=started)
                    found.settings = run.config
            found.run, found.sources = run, run.sources
            with collected():
                found.disk = check_disk_space(run, store)
            with memory_errors(settings):
                found.estimate = estimate(run, say)
    return found


def estimate(run: Run, say: Callable[[str], None]) -> Estimate:
    """Evaluate the base and do a few training steps. This changes `run.state`, so `run` can't be trained afterwards."""
    runtime = run.models.runtime
    teacher_crops, seconds_per_teacher_crop = 0, 0.0
    if run.teacher is not None:
        say("timing two crops of the teacher")
        teacher_crops = run.teacher.missing(run.folder.teacher_crops)
        crop_seconds: list[float] = []
        while len(crop_seconds) < 2:
            started = time.perf_counter()
            run.teacher.compute_next(runtime)
            crop_seconds.append(time.perf_counter() - started)
        seconds_per_teacher_crop = min(crop_seconds)
    left, judgements = run.config.steps - run.state.step, _judgements(run)
    imitation_steps = max(0, run.state.imitation_steps - run.state.step)
    seconds_per_imitation_step = time_imitation(run) if imitation_steps else 0.0
    if run.time_limit:
        timing = run.time_limit.timing  # just measured
    else:
        say("evaluating the base, and timing a few training steps, whose results are discarded")
        timing = measure(run)
    return Estimate(
        steps=left,
        judgements=judgements,
        seconds_per_step=timing.per_step,
        seconds_per_judgement=timing.per_judgement,
        memory=peak_memory(runtime.device),
        free_memory=available_memory(runtime.device),
        events=timing.events,
        teacher_crops=teacher_crops,
        seconds_per_teacher_crop=seconds_per_teacher_crop,
        imitation_steps=imitation_steps,
        seconds_per_imitation_step=seconds_per_imitation_step,
    )


def check_disk_space(run: Run, store: Store) -> list[DiskUse]:
    """The disk space that the run needs in each folder.

    Raises InputError if a folder can't be written, ResourceError if there is not enough space.
    """
    folder = run.folder.path
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # will be replaced or extended
    needed = {
        folder: max(0, _run_bytes(run) - present),
        store.root: _bytes(run.models.base.module.state_dict().values()),
    }
    uses = []
    for target, size in needed.items():
        existing = _existing(target)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"can't write into {existing}", "Choose a folder that you may write to.")
        uses.append(DiskUse(target, size, shutil.disk_usage(existing).free))
    disks: dict[int, list[DiskUse]] = {}
    for use in uses:
        disks.setdefault(_existing(use.folder).stat().st_dev, []).append(use)
    for on_disk in disks.values():
        total = sum(use.needed for use in on_disk)
        if total > on_disk[0].free:
            raise ResourceError(
                f"no space for the run: {on_disk[0].folder} needs about {total / 2**20:.0f} MiB, "
                f"{on_disk[0].free / 2**20:.0f} MiB are free",
                "Free some space, or choose another disk: --runs-dir.",
            )
    return uses


def _judgements(run: Run) -> int:
    """The number of judgements: of the base, at checkpoints, and twice (for the report's images) at each strength."""
    config = run.config
    candidates = 2 if config.generalist.mode == "ema" else 1
    checkpoints = math.ceil((config.steps - run.state.step) / config.checkpoint_every)
    return 2 + candidates * checkpoints + 2 * len(run.judge.strengths)


def _run_bytes(run: Run) -> int:
    """The bytes of all files of a run, plus a second checkpoint, because the old one exists until it is replaced."""
    state, config = run.state, run.config
    networks = (state.specialist, state.generalist, state.discriminator)
    trained: tuple[nn.Module, ...] = (state.specialist, state.discriminator)
    checkpoint = sum(_bytes(network.state_dict().values()) for network in networks)
    checkpoint += 2 * sum(_bytes(network.parameters()) for network in trained)  # Adam's two moments
    weights = _bytes(state.specialist.state_dict().values())
    preview = 3 * PREVIEW_IMAGES * (PREVIEW_SIZE * run.models.base.scale) ** 2 * 3
    previews = math.ceil(config.steps / config.preview_every) * preview
    crops = run.teacher.total_bytes if run.teacher else 0
    return (
        2 * checkpoint
        + weights * (1 + len(config.export) + config.keep_checkpoints)
        + previews
        + 2 * crops
        + _OTHER_FILES
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path
