"""Starts a run of `adapt`: from settings to a run that is ready to train."""

from __future__ import annotations

import time

from pdd_cli.adaptation.estimate import check_disk_space
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.hr_images import choose_hr
from pdd_cli.adaptation.planning import plan_run, planned_before
from pdd_cli.adaptation.prepare import (
    Run,
    WeightFiles,
    check_inputs,
    check_name,
    memory_errors,
    prepare_run,
    weight_files,
)
from pdd_cli.errors import InputError
from pdd_cli.observer import Observer
from pdd_cli.ranks import SINGLE_PROCESS, Ranks
from pdd_cli.runtime import choose_runtime, keep_freed_memory
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.store import Store


def start(
    settings: AdaptConfig,
    *,
    name: str,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    observer: Observer = Observer(),
) -> Run:
    """Check everything, then fetch and load what training needs. No run folder or image is written.

    Raises InputError if images, weights or settings can't be used, DownloadError if weights can't be downloaded.
    """
    store = Store.default()
    if resume and settings.minutes is not None:
        settings = planned_before(settings, RunFolder(settings.runs_dir / name))
        if settings.minutes is None:
            observer.warn(
                f"--minutes is for new runs: this one continues to step {settings.steps} (to extend it: --steps N)"
            )
    per_rank, group = ranks.per_rank(settings.batch_size), settings.losses.inter_group
    if group and per_rank % group:
        raise InputError(
            f"losses.inter_group {group}: each of the {ranks.size} processes has {per_rank} crops of a batch",
            f"Give each process a multiple of {group}: --batch-size {ranks.size * group}, for example.",
        )
    runtime = choose_runtime(ranks.device(settings.device), settings.precision)
    ranks.join(runtime.device)
    keep_freed_memory()
    hr = choose_hr(settings, store, observer.warn, observer.say)
    settings = hr.apply(settings)
    if ranks.is_first:
        check_name(name, store, replace=resume or overwrite)
        readable = settings.model_copy(update={"hr_dir": None}) if hr.to_fetch else settings
        check_inputs(readable, RunFolder(settings.runs_dir / name), resume=resume, overwrite=overwrite)

    def find_weights() -> WeightFiles:
        with observer.fetching() as on_event:
            hr.fetch(store, offline=settings.offline, warn=observer.warn, on_event=on_event)
            return weight_files(
                settings,
                lambda reference: ensure(reference, store=store, offline=settings.offline, on_event=on_event),
                observer.warn,
            )

    weights = ranks.first_per_machine(find_weights)
    settings = hr.fetched(store).apply(settings)
    started = time.monotonic()
    with memory_errors(settings):
        run = prepare_run(
            settings, weights, runtime,
            name=name, resume=resume, overwrite=overwrite, warn=observer.warn, say=observer.say, ranks=ranks,
        )  # fmt: skip
        if run.config.minutes is not None:
            run = plan_run(run, started=started)
    if ranks.is_first:
        check_disk_space(run, store)
    observer.say(
        f"adapting {settings.base} to {run.lr_images} as '{name}': "
        + (f"with the teacher {settings.teacher}, " if settings.teacher else "")
        + f"{run.config.steps - run.state.step} steps on {runtime}, features of {run.features_name}"
        + (f", {ranks.size} processes" if ranks.size > 1 else "")
    )
    return run
