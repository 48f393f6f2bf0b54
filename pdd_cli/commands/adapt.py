"""`pdd adapt`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdd_cli.console import Console
from pdd_cli.errors import InputError, Interrupted, PddError
from pdd_cli.options import Call, command
from pdd_cli.ranks import Ranks
from pdd_cli.settings.adapt import AdaptConfig, AdaptFlags

if TYPE_CHECKING:
    from pdd_cli.adaptation.prepare import Run
    from pdd_cli.adaptation.publish import PublishResult
    from pdd_cli.weights.store import Store


# What a student has in common with the run of its teacher.
_SHARED_WITH_STUDENT = {
    "real_dir", "hr_dir", "dataset", "root", "runs_dir", "seed", "features", "held_out", "export", "device",
    "precision", "offline",
}  # fmt: skip


@dataclass(frozen=True)
class _Trained:
    """A run that is finished and published."""

    run: Run
    result: PublishResult
    losses: dict[str, float]  # of the last step

    @property
    def document(self) -> dict[str, Any]:
        return self.result.as_document(self.run, self.losses)


def _adapt(call: Call[AdaptConfig, AdaptFlags]) -> None:
    """Adapt a model to your own real images, with or without ground truth.

    The method is Pairwise Distance Distillation. Writes runs/NAME/ (settings,
    log, previews, checkpoint) and registers the weights NAME for `pdd upscale`.
    Ctrl-C saves a checkpoint; `pdd adapt --resume --name NAME` continues.

    Examples:
      pdd adapt --real-dir ./realLR
      pdd adapt --real-dir ./realLR --hr-dir ./photos --name mine --minutes 30
      pdd adapt --pairs-lr ./lr --pairs-hr ./hr --name mine
      pdd adapt --real-dir ./realLR --student realesr-animevideo
    """
    from pdd_cli.adaptation.folder import RunFolder, find_run
    from pdd_cli.commands._dry_run_table import dry_run_table

    console = call.console
    resume, overwrite, student_base = call.flags.resume, call.flags.overwrite, call.flags.student
    if call.flags.judge is not None and not resume:
        raise InputError("--judge FILE needs the run of the weights", "Add --resume --name NAME.")
    if call.flags.judge is not None and student_base is not None:
        raise InputError("--judge and --student can't be combined: --judge doesn't train")
    if resume:
        folder = find_run(call.explicit_values())
        settings = call.settings(
            {"runs_dir": folder.path.parent, "name": folder.path.name},
            stored=folder.config if folder.config.exists() else None,
        )
    else:
        settings = call.settings()

    from pdd_cli.adaptation import estimate
    from pdd_cli.adaptation.prepare import default_name
    from pdd_cli.runtime import keep_freed_memory
    from pdd_cli.weights.store import Store

    store = Store.default()
    run_name = settings.name or default_name(settings.lr_dir, console.say)
    if call.flags.dry_run:
        if student_base is not None:
            _student_of(settings, run_name, student_base, Ranks.from_environment())
            console.say(f"the estimate is for '{run_name}' only, without its student")
        keep_freed_memory()  # as in the run, so that the estimate is right
        found = estimate.dry_run(
            settings, store, name=run_name, resume=resume, overwrite=overwrite, say=console.say, warn=console.warn
        )
        console.table(dry_run_table(found))
        console.result(found.as_document())
        for error in found.problems[1:]:
            console.fail(error)
        if found.problems:
            raise found.problems[0]
        return
    ranks = Ranks.from_environment()
    student = None if student_base is None else _student_of(settings, run_name, student_base, ranks)
    run = _start(call, settings, run_name, ranks, resume=resume)
    again = False
    if student is not None:
        # The student of a teacher that still changes starts again from the beginning.
        again = resume and run.finished and RunFolder(student.runs_dir / str(student.name)).checkpoint.exists()
        _check_student(console, student, store, resume=again, overwrite=overwrite)
    trained = _train(call, run, store)
    if student is None or trained is None:
        _finish(console, trained)
        return
    result = trained.result
    if result.weights is None or result.failures or result.verdict.keep is False:
        because = f"is not better than {settings.base}" if result.verdict.keep is False else "is not finished"
        console.warn(f"no student is trained, because '{run_name}' {because}")
        _finish(console, trained)
        return
    try:
        second = _train(call, _start(call, student, str(student.name), ranks, resume=again), store)
    except PddError:
        _finish(console, trained)  # its weights are registered
        raise
    _finish(console, trained, second)


def _student_of(settings: AdaptConfig, teacher: str, base: str, ranks: Ranks) -> AdaptConfig:
    """The settings of --student: the images and the machine of its teacher's run, otherwise defaults."""
    if ranks.size > 1:
        raise InputError(
            "--student works with one process only", "With torchrun, train the student afterwards: --teacher NAME."
        )
    if settings.teacher is not None:
        raise InputError(
            f"--student {base}: can't be combined with --teacher {settings.teacher}, which already trains a student"
        )
    if settings.real_dir is None:
        raise InputError("--student needs --real-dir: the student learns from the adapted model's SR of these images")
    shared = settings.model_dump(include=_SHARED_WITH_STUDENT, exclude_unset=True)
    return AdaptConfig(**shared, base=base, teacher=teacher, name=f"{teacher}-student")


def _check_student(console: Console, student: AdaptConfig, store: Store, *, resume: bool, overwrite: bool) -> None:
    """What would fail only after the training of its teacher: names, folders and the download of its base."""
    from pdd_cli.adaptation.folder import RunFolder
    from pdd_cli.adaptation.prepare import check_folder, check_name
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.weights.fetch import ensure

    name = str(student.name)
    check_name(name, store, replace=resume or overwrite)
    check_folder(RunFolder(student.runs_dir / name), student, resume=resume, overwrite=overwrite)
    with ConsoleObserver(console).fetching() as on_event:
        ensure(student.base, store=store, offline=student.offline, on_event=on_event)


def _start(call: Call[AdaptConfig, AdaptFlags], settings: AdaptConfig, name: str, ranks: Ranks, *, resume: bool) -> Run:
    """Prepare the run `name`."""
    from pdd_cli.adaptation.run import start
    from pdd_cli.commands._observer import ConsoleObserver

    observer = ConsoleObserver(call.console)
    return start(settings, name=name, resume=resume, overwrite=call.flags.overwrite, ranks=ranks, observer=observer)


def _train(call: Call[AdaptConfig, AdaptFlags], run: Run, store: Store) -> _Trained | None:
    """Train and publish a run. None: there is nothing to publish, or another process does it.

    Raises Interrupted if it was stopped before its last step.
    """
    from pdd_cli.adaptation.loop import train
    from pdd_cli.adaptation.publish import judge_weights, publish, write_report
    from pdd_cli.commands._adapt_progress import adapt_progress
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.interruption import Interruption

    console, flags, ranks = call.console, call.flags, run.models.ranks
    if flags.judge is not None:
        conclusion, document = judge_weights(run, flags.judge)
        console.say(f"verdict: {conclusion.verdict.label}. {conclusion.verdict.reason}")
        console.say(conclusion.describe_validation() or "(--val-lr and --val-hr add scores with ground truth)")
        console.result(document)
        return None
    again = run.resume_command
    if flags.student is not None and run.config.teacher is None:
        again += f" --student {shlex.quote(flags.student)}{' --overwrite' if flags.overwrite else ''}"
    interruption = Interruption(
        on_first=lambda: console.say("stopping after this step; press Ctrl-C again to stop at once"),
        on_second=lambda: console.leave(f"stopped at once. To continue from the last checkpoint: {again}"),
    )
    with adapt_progress(console, run, verbose=flags.verbose) as progress, interruption:
        losses: dict[str, float] = {}
        for report in train(run, interruption.requested):
            losses = report.losses
            progress.update(report)
    finished = ranks.any(run.finished)
    ranks.leave()
    if not finished:
        if ranks.is_first:
            write_report(run, None)
        raise Interrupted(
            f"stopped after step {run.state.step} of {run.config.steps}; the state is saved in {run.folder.checkpoint}",
            f"To continue: {again}",
        )
    return _Trained(run, publish(run, store, ConsoleObserver(console)), losses) if ranks.is_first else None


def _finish(console: Console, trained: _Trained | None, student: _Trained | None = None) -> None:
    """Print the JSON document, and raise the failures of publishing."""
    if trained is None:
        return
    console.result({**trained.document, **({"student": student.document} if student else {})})
    for one in (trained, student) if student else (trained,):
        for error in one.result.failures[1:]:
            console.fail(error)
        if failure := one.result.failure(one.run):
            raise failure


adapt = command(AdaptConfig, "adapt", AdaptFlags, _adapt)
