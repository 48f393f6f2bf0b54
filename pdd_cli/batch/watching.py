"""The use case of `pdd upscale --watch`: upscales what appears in a folder until it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from pdd_cli.batch.grouping import group_jobs
from pdd_cli.batch.lists import checksums, failed_list
from pdd_cli.batch.loading import KeptUpscalers
from pdd_cli.batch.plan import Plan, collisions, find_inputs, plan_found
from pdd_cli.batch.run import BatchResult, check_side_files, check_video_options, is_clip, record_last_run, run
from pdd_cli.errors import InputError, Interrupted, PddError, ResourceError
from pdd_cli.files import check_log
from pdd_cli.interruption import end_normally, was_raised
from pdd_cli.observer import Observer, duration
from pdd_cli.own_files import write_own_file
from pdd_cli.ranks import SINGLE_PROCESS, Ranks
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.upscaling.jobs import Job, Result, failed

# Seconds between two looks at the folder, and for which a file must not have changed. Polling also works where the
# system reports no changes, as on network shares.
_POLL, _SETTLED = 1.0, 2.0
_SHOWN = 3

_State = tuple[int, int]
"""Size and time of the last change of a file."""


def watch(
    settings: UpscaleConfig,
    *,
    fixed: Collection[str] = (),
    ranks: Ranks = SINGLE_PROCESS,
    observer: Observer = Observer(),
) -> BatchResult:
    """Upscale the images and videos in a folder, and those that appear in it, until Ctrl-C or SIGTERM.

    A file is upscaled once it is complete: not empty, readable, and unchanged for two seconds. One that changes later
    is upscaled again. The rules of `run` for outputs that exist apply.

    Returns:
        The last result of each file. A failed file does not end it; a full disk does (`stopped`).

    Raises:
        InputError: bad paths or settings, before anything is upscaled.
        DownloadError: the weights can't be fetched.
    """
    folder = _Folder(_check(settings, ranks), settings)
    with closing(KeptUpscalers()) as models:
        session = _Session(settings, fixed, models, observer)
        with models.load(_without_lists(settings), ranks, observer, dry_run=False) as loaded:
            pass
        observer.say(f"watching {folder.path}; press Ctrl-C to stop")
        started, stopped = time.monotonic(), None
        try:
            while stopped is None and not was_raised():
                looked = time.monotonic()
                new, colliding = folder.look(observer)
                looked = time.monotonic() - looked
                for job, error in colliding.items():
                    session.fail([job], error)
                stopped = session.upscale(new) if new else None
                if not new:
                    time.sleep(max(_POLL, looked))
        except (KeyboardInterrupt, Interrupted):
            pass
        if stopped is None:
            end_normally()
    session.write_lists()
    observer.say(f"watched for {duration(time.monotonic() - started)}")
    for names, why in ((session.unfinished, "interrupted"), (folder.incomplete(), "not complete yet")):
        if names:
            more = ", …" if len(names) > _SHOWN else ""
            observer.say(f"{len(names)} {why}, left for the next call: {', '.join(map(str, names[:_SHOWN]))}{more}")
    results = list(session.results.values())
    plan = replace(folder.plan, jobs=list(session.jobs), problems=[*folder.plan.problems, *session.problems])
    outcome = BatchResult(settings, plan, results, loaded, session.seconds, stopped=stopped)
    try:
        return replace(outcome, recorded=bool(results) and record_last_run(outcome))
    except PddError as error:  # the outputs are complete
        observer.warn(f"{error.message}. The outputs are complete, but this run is not recorded for `pdd evaluate`.")
        return outcome


def _check(settings: UpscaleConfig, ranks: Ranks) -> Path:
    """The folder to watch. Raises InputError for settings that can't be combined with watching."""
    for name in ("from_list", "fps", "audio", "preview"):
        if getattr(settings, name) is not None:
            raise InputError(f"--watch and --{name.replace('_', '-')} can't be combined", "Leave one of them out.")
    if ranks.size > 1:
        raise InputError("--watch runs in one process", "For several GPUs: --device cuda:0,cuda:1.")
    if len(settings.input) != 1 or not settings.input[0].is_dir():
        named = ", ".join(map(str, settings.input))
        raise InputError(f"--watch needs one folder, and got {named}", "Give a folder; its subfolders are included.")
    folder = settings.input[0]
    # Wrong paths and lists are reported before the weights are loaded.
    plan = plan_found(folder, [], settings.output, Plan(), format=settings.format, suffix=settings.suffix)
    check_side_files(settings, plan)
    if settings.log is not None:
        check_log(settings.log)
    return folder


def _without_lists(settings: UpscaleConfig) -> UpscaleConfig:
    """The settings of one batch: the lists are of all batches."""
    return settings.model_copy(update={"failed_list": None, "checksums": None})


class _Folder:
    """The inputs in the watched folder. `plan`: the files of other kinds, and the problems, of the last look."""

    def __init__(self, path: Path, settings: UpscaleConfig) -> None:
        self.path = path
        self.plan = Plan()
        self._settings = settings
        real, output = path.resolve(), Path(settings.output).resolve()
        inside = output != real and output.is_relative_to(real)
        self._outputs = path / output.relative_to(real) if inside else None
        self._waiting: dict[Path, tuple[_State, float]] = {}  # since when each file is as it is
        self._taken: dict[Path, _State] = {}
        self._jobs: list[Job] = []  # in the order in which they came
        self._problem = ""

    def incomplete(self) -> list[Path]:
        """The inputs that are not complete."""
        outputs = {job.target.resolve() for job in self._jobs}
        return [path for path in self._waiting if path.resolve() not in outputs]

    def look(self, observer: Observer) -> tuple[list[Job], Mapping[Job, InputError]]:
        """The jobs for new and changed files that are complete, and those whose output is another's, too."""
        settings = self._settings
        try:
            found, plan = find_inputs(self.path, recursive=settings.recursive)
            ready = self._complete(found)
            if ready:
                plan = plan_found(
                    self.path, found, settings.output, plan, format=settings.format, suffix=settings.suffix
                )
        except InputError as error:  # such as a network share that is gone for a while
            if error.message != self._problem:
                observer.warn(f"{error.message}; pdd keeps watching")
            self._problem = error.message
            return [], {}
        self.plan, self._problem = plan, ""
        self._taken |= ready
        for path in ready:
            del self._waiting[path]
        present = set(plan.jobs)
        new = [job for job in plan.jobs if job.source in ready]
        if new:
            self._jobs = list(dict.fromkeys([*(job for job in self._jobs if job in present), *new]))
        colliding = {job: error for job, error in collisions(self._jobs) if job in new}
        return [job for job in new if job not in colliding], colliding

    def _complete(self, found: Sequence[Path]) -> dict[Path, _State]:
        """The new and changed files that are complete."""
        now = time.monotonic()
        before, self._waiting, ready = self._waiting, {}, {}
        for path in found:
            if self._outputs in path.parents:
                continue
            state = _state(path)
            if state is None or self._taken.get(path) == state:
                continue
            since = before[path][1] if path in before and before[path][0] == state else now
            self._waiting[path] = state, since
            if now - since >= _SETTLED and state[0] and _is_readable(path):
                ready[path] = state
        return ready


def _state(path: Path) -> _State | None:
    try:
        status = path.stat()
    except OSError:  # gone
        return None
    return status.st_size, status.st_mtime_ns


def _is_readable(path: Path) -> bool:
    """Whether the file can be opened, which Windows refuses while it is copied."""
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


@dataclass
class _Session:
    """What was upscaled so far: the last result of each job that was started."""

    settings: UpscaleConfig
    fixed: Collection[str]
    models: KeptUpscalers
    observer: Observer
    jobs: dict[Job, None] = field(default_factory=dict)
    results: dict[Job, Result] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _unlisted: list[Path] = field(default_factory=list)

    @property
    def unfinished(self) -> list[Path]:
        """The inputs that were interrupted."""
        return [job.source for job in self.jobs if job not in self.results]

    def upscale(self, jobs: Sequence[Job]) -> ResourceError | None:
        """Upscale a batch. Returns the error that makes it useless to continue, such as a full disk."""
        for job in jobs:
            self.jobs[job] = None
            self.results.pop(job, None)
        for settings, group in self._groups(jobs).items():
            try:
                outcome = run(settings, jobs=group, observer=self.observer, load=self.models.load, on_result=self._add)
            except (Interrupted, ResourceError):
                raise
            except PddError as error:  # such as weights of a folder's pdd.yaml that can't be fetched
                self.fail(group, error)
                continue
            self.seconds += outcome.seconds
            if outcome.stopped is not None:
                return outcome.stopped
        self.write_lists()
        return None

    def _groups(self, jobs: Sequence[Job]) -> Mapping[UpscaleConfig, Sequence[Job]]:
        """The jobs by their settings. Those with wrong settings fail."""
        groups: dict[UpscaleConfig, list[Job]] = {}
        for job in jobs:
            try:
                (group,) = group_jobs(self.settings, [job], self.fixed)
                if is_clip(job):
                    check_video_options(group.settings, [job])
            except InputError as error:
                self.fail([job], error)
            else:
                groups.setdefault(_without_lists(group.settings), []).append(job)
        return groups

    def _add(self, result: Result) -> None:
        self.results[result.job] = result
        if result.status == "failed":
            self.observer.say(f"  {result.problem}")
        else:
            self._unlisted.append(result.job.target)
        if result.status == "done":
            self.observer.say(f"{result.job.source} upscaled to {result.job.target} ({duration(result.seconds)})")

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Record that jobs can't be done."""
        for job in jobs:
            self.jobs[job] = None
            self._add(failed(job, error, time.perf_counter()))

    def write_lists(self) -> None:
        """Write the lists that the settings name."""
        settings = self.settings
        try:
            if settings.failed_list is not None:
                text = failed_list(Plan(list(self.jobs)), list(self.results.values()))
                write_own_file(settings.failed_list, text, "--failed-list")
            if settings.checksums is not None and self._unlisted:
                write_own_file(settings.checksums, checksums(self._unlisted, settings.checksums), "--checksums")
                self._unlisted.clear()
        except PddError as error:
            if error.message not in self.problems:
                self.problems.append(error.message)
                self.observer.warn(error.message)
