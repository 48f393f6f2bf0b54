"""What `pdd adapt` settles before a run: the name, the weights; and its dry run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError, PddError

if TYPE_CHECKING:
    from rich.table import Table

    from pdd_cli.adaptation.estimate import Estimate, Space
    from pdd_cli.adaptation.folder import RunFolder
    from pdd_cli.adaptation.prepare import Run, WeightFiles
    from pdd_cli.adaptation.sources import Source
    from pdd_cli.settings.adapt import AdaptConfig
    from pdd_cli.weights.store import Store


def check_name(name: str, store: Store, *, replace: bool) -> None:
    """Refuse a name that `upscale --weights NAME` would not find, or that would hide other weights."""
    from pdd_cli.weights.store import name_from, name_problem

    if problem := name_problem(name):
        raise InputError(f"--name {name}: {problem}", f"Choose another --name, such as {name_from(name)}.")
    if not replace and store.get(name) is not None:
        raise InputError(
            f"weights '{name}' exist already in the store", "Choose another --name, or replace them with --overwrite."
        )


def derived_name(real_dir: Path, console: Console) -> str:
    """The name of a run that was given none: that of the folder of its images, as far as it can be one."""
    from pdd_cli.weights.store import name_from

    folder = real_dir.resolve().name
    name = name_from(folder)
    if name != folder:
        console.say(f"the run and its weights are named '{name}', for '{folder}' can't be a name (--name: another)")
    return name


def stored_run(given: Mapping[str, Any]) -> RunFolder:
    """The folder of the run that `--resume` means, by what is given beside it.

    Raises InputError where that doesn't say which.
    """
    from pdd_cli.adaptation.folder import RunFolder
    from pdd_cli.settings.adapt import AdaptConfig
    from pdd_cli.weights.store import name_from

    runs = Path(given.get("runs_dir") or AdaptConfig.model_fields["runs_dir"].default).expanduser()
    if given.get("name"):
        named = Path(given["name"]).expanduser()
        return RunFolder(named if len(named.parts) > 1 else runs / named)
    if given.get("real_dir"):
        return RunFolder(runs / name_from(Path(given["real_dir"]).expanduser().resolve().name))
    found = sorted(path.parent for path in runs.glob("*/checkpoint.pt"))
    if len(found) == 1:
        return RunFolder(found[0])
    raise InputError(
        "--resume: which run goes on? Give its --name",
        f"In {runs}: {', '.join(path.name for path in found)}." if found else f"There is no run in {runs}.",
    )


def finish(run: Run, store: Store, console: Console, losses: Mapping[str, float]) -> None:
    """Judge what was trained, register the weights, write the report and the exports, and say all that.

    Each of these may fail without the others. Raises PartialFailure or ResourceError at the end where one did.
    """
    from pdd_cli.adaptation.judge import Verdict
    from pdd_cli.adaptation.prepare import memory_errors
    from pdd_cli.adaptation.publish import register, write_export, write_report, write_verdict
    from pdd_cli.errors import Interrupted, PartialFailure, ResourceError
    from pdd_cli.weights.states import read_state

    failures: list[PddError] = []

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        try:
            with memory_errors(run.config):
                yield
        except PddError as error:
            failures.append(error)
        except Exception as error:
            failures.append(PddError(f"a bug in pdd: {type(error).__name__}: {error}", "--debug shows where."))

    verdict = Verdict(None, "it could not be judged", 1.0)
    conclusion = weights = report = None
    exported: list[Path] = []
    try:
        if run.state.step < run.config.steps:
            console.say(
                f"stopped early after step {run.state.step} of {run.config.steps}: the last "
                f"{run.config.early_stopping} judgements brought nothing better "
                f"({run.resume_command} --set early_stopping=off goes on)"
            )
        console.say("judging the trained weights")
        with kept():
            conclusion = run.judge.conclude(read_state(run.folder.best))
            verdict = conclusion.verdict
            (console.warn if verdict.keep is False else console.say)(f"verdict: {verdict.word}. {verdict.reason}")
            if text := conclusion.truth_in_words():
                console.say(text)
            write_verdict(run, conclusion)
        try:
            with memory_errors(run.config):
                weights = register(run, store, verdict)
            console.say(f"done: weights '{run.name}' in {weights.path}")
        except PddError as error:
            failures.append(error)
            with kept():
                weights = register(run, replace(store, root=run.folder.path), verdict)
                console.say(f"the weights are not registered; they are kept in {weights.path}")
        with kept():
            report = write_report(run, conclusion)
            console.say(f"report: {report}")
        for form in run.config.export:
            with kept():
                exported.append(write_export(run, form))
                console.say(f"exported: {exported[-1]}")
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; all {run.state.step} steps are done and saved in {run.folder.path}",
            f"To finish: {run.resume_command}",
        ) from None
    if weights is not None and verdict.keep is not False:
        strength = f" --strength {verdict.strength:g}" if verdict.strength < 1 else ""
        reference = run.name if weights.path.parent == store.root else weights.path
        console.say(f"next: pdd upscale IN OUT --weights {reference}{strength}")
    else:
        console.say("Look at the report before you use it. More images of one look, or --hr-dir, may help.")
    console.result(
        {
            "name": run.name,
            "weights": weights and weights.path,
            "run": run.folder.path,
            "report": report,
            "exported": exported,
            "steps": run.state.step,
            "features": run.features_name,
            "losses": losses,
            "verdict": {"keep": verdict.keep, "reason": verdict.reason, "strength": verdict.strength},
            "truth": conclusion and conclusion.truth_document(),
            "card": weights and weights.card.model_dump(),
            "failures": [{"message": failure.message, "hint": failure.hint} for failure in failures],
        }
    )
    if failures:
        for failure in failures[1:]:
            console.fail(failure)
        kind = ResourceError if any(isinstance(failure, ResourceError) for failure in failures) else PartialFailure
        raise kind(
            failures[0].message,
            f"{failures[0].hint} The trained weights are in {run.folder.best}; to try again: {run.resume_command}",
        )


def weight_files(settings: AdaptConfig, have: Callable[[str], Path], warn: Callable[[str], None]) -> WeightFiles:
    """The files of base, generalist and features; `have` gives the file of a name or path, or raises DownloadError."""
    from pdd_cli.adaptation.prepare import WeightFiles

    base = have(settings.base)
    generalist = have(settings.generalist.weights) if settings.generalist.mode == "static" else None
    network, file = settings.features.network, settings.features.weights
    if file is not None:
        return WeightFiles(base, generalist, network, have(str(file)))
    if network != "auto":
        return WeightFiles(base, generalist, network, have(network))
    for candidate in ("vgg19", "vgg16"):
        try:
            return WeightFiles(base, generalist, candidate, have(candidate))
        except (DownloadError, InputError):
            warn(f"{candidate} can't be had, trying the next feature network")
    warn(
        "neither VGG-19 nor VGG-16 can be had: distances are measured with efficientnet-lite0, which the method "
        "was not made for; with VGG the result is better (pdd fetch-weights vgg19 --from FILE)"
    )
    return WeightFiles(base, generalist, "efficientnet-lite0", have("efficientnet-lite0"))


def dry_adapt(
    settings: AdaptConfig, store: Store, console: Console, *, name: str, resume: bool, overwrite: bool
) -> None:
    """Say what the run would do and take. Raises what the run would fail of; of several failures the first."""
    from pdd_cli.adaptation.estimate import check_places, estimate
    from pdd_cli.adaptation.export import check_export
    from pdd_cli.adaptation.folder import RunFolder
    from pdd_cli.adaptation.prepare import check_folder, memory_errors, prepare_run
    from pdd_cli.adaptation.sources import read_sources
    from pdd_cli.runtime import choose_runtime, keep_freed_memory
    from pdd_cli.weights.fetch import ensure

    problems: list[PddError] = []
    missing: list[str] = []

    @contextlib.contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except PddError as error:
            problems.append(error)

    def installed(reference: str) -> Path:
        try:
            return ensure(reference, store=store, offline=True, on_event=lambda event: None)
        except DownloadError:
            if not settings.offline:
                missing.append(reference)
            raise

    folder = RunFolder(settings.runs_dir / name)
    found = _Findings(name, folder.path, settings)
    with collected():
        check_name(name, store, replace=resume or overwrite)
    with collected():
        check_folder(folder, settings, resume=resume, overwrite=overwrite)
    with collected():
        check_export(settings.export)
    goes_on = resume and not problems
    with collected():
        runtime = choose_runtime(settings.device, settings.precision)
        keep_freed_memory()  # as the run does whose time and memory are estimated
        weights = None
        try:
            weights = weight_files(settings, installed, console.warn if settings.offline else lambda text: None)
        except DownloadError:
            if not missing:
                raise
        if weights is None:
            found.sources = read_sources(settings, _scale_of(settings.base), console.warn, console.say).sources
        else:
            with memory_errors(settings):
                run = prepare_run(
                    settings, weights, runtime,
                    name=name, resume=goes_on, overwrite=True, notify=console.warn, say=console.say,
                )  # fmt: skip
            found.run, found.sources = run, run.sources
            with collected():
                found.spaces = check_places(run, store)
            with memory_errors(settings):
                found.rehearsal = estimate(run, console.say)
    found.to_fetch = missing
    found.problems = problems
    console.table(_table(found))
    console.result(_document(found))
    for error in problems[1:]:
        console.fail(error)
    if problems:
        raise problems[0]


@dataclass
class _Findings:
    """What a dry run finds out, as far as it gets."""

    name: str
    folder: Path
    settings: AdaptConfig
    run: Run | None = None
    sources: Sequence[Source] = ()
    spaces: Sequence[Space] = ()
    rehearsal: Estimate | None = None
    to_fetch: Sequence[str] = ()
    problems: Sequence[PddError] = ()


def _scale_of(base: str) -> int:
    """The scale of a catalogued base that isn't installed."""
    from pdd_cli.weights.catalog import find

    return find(base).scale or 4


def _table(found: _Findings) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "found", title="dry run: nothing is written", title_justify="left")
    run, rehearsal = found.run, found.rehearsal
    for source in found.sources:
        table.add_row(source.option, escape(_told(source)))
    if run is not None:
        if not found.settings.hr_dir:
            table.add_row("HR", "made of the real images")
        table.add_row("judged on", f"{len(run.judge.images)} real images, {len(run.domains.real)} are trained on")
        if pairs := run.judge.pairs:
            table.add_row("pairs", f"{pairs.found} with ground truth, {len(pairs.lr)} of them are scored")
        base = run.models.base
        millions = sum(parameter.numel() for parameter in base.module.parameters()) / 1e6
        name = escape(found.settings.base)
        table.add_row("base", f"{name}: {base.architecture} x{base.scale}, {millions:.1f} million weights")
        table.add_row("features", run.features_name)
        table.add_row("device", str(run.models.runtime))
    if found.to_fetch:
        table.add_row("to be fetched", ", ".join(found.to_fetch))
    if rehearsal is not None:
        table.add_row(
            "time",
            f"{_duration(rehearsal.seconds)} at the most: "
            f"{rehearsal.steps} steps of {rehearsal.seconds_per_step:.2g} s, "
            f"{rehearsal.judgements} judgements of {rehearsal.seconds_per_judgement:.2g} s",
        )
        if rehearsal.memory:
            table.add_row(
                "memory", f"{_size(rehearsal.memory)} at the most, {_size(rehearsal.free_memory)} more are free"
            )
        for event in rehearsal.events:
            table.add_row("trial steps", escape(event))
    elif run is None:
        table.add_row("time, memory", "not known before all weights are installed")
    for space in found.spaces:
        table.add_row("disk", escape(f"{_size(space.needed)} into {space.folder} ({_size(space.free)} free)"))
    for error in found.problems:
        table.add_row("would fail", escape(error.message))
    return table


def _told(source: Source) -> str:
    smallest, largest = ("x".join(map(str, size)) for size in (source.smallest, source.largest))
    sizes = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels"
    small = f", {source.small} of them smaller than a crop" if source.small else ""
    left_out = f"; {len(source.left_out)} left out" if source.left_out else ""
    return f"{source.folder}: {source.used} images, {sizes}{small}{left_out}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _document(found: _Findings) -> dict[str, object]:
    run, rehearsal = found.run, found.rehearsal
    return {
        "dry_run": True,
        "name": found.name,
        "run": found.folder,
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
            for source in found.sources
        ],
        **(
            {
                "trained_on": len(run.domains.real),
                "judged_on": len(run.judge.images),
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
        "to_fetch": found.to_fetch,
        **(
            {
                "steps": rehearsal.steps,
                "judgements": rehearsal.judgements,
                "seconds_per_step": rehearsal.seconds_per_step,
                "seconds_per_judgement": rehearsal.seconds_per_judgement,
                "seconds": rehearsal.seconds,
                "memory": rehearsal.memory,
            }
            if rehearsal
            else {}
        ),
        "disk": [{"folder": space.folder, "needed": space.needed, "free": space.free} for space in found.spaces],
        "problems": [
            {"message": error.message, "hint": error.hint, "exit_code": error.exit_code} for error in found.problems
        ],
    }
