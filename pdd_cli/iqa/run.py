"""Scores the inputs of `evaluate` and gives a report."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pdd_cli.errors import CheckFailed, DownloadError, InputError, PartialFailure, PddError
from pdd_cli.iqa.compare import Comparison
from pdd_cli.iqa.inputs import ImageSet, Inputs
from pdd_cli.iqa.metrics import (
    CONSISTENCY,
    DRIFT,
    LUMA_METRICS,
    ImageScores,
    MetricInfo,
    load_metrics,
    metric_infos,
    score,
    score_set,
)
from pdd_cli.iqa.report import Report, ScoredSet
from pdd_cli.observer import Observer
from pdd_cli.runtime import choose_runtime
from pdd_cli.settings.evaluate import EvaluateConfig


@dataclass(frozen=True)
class Evaluation:
    """The scores, and the errors of those that could not be computed.

    `not_loaded`: the errors of metrics that could not be loaded. `interrupted`: whether Ctrl-C ended the scoring; the
    report then holds the scores so far.
    """

    report: Report
    not_loaded: Sequence[PddError] = ()
    interrupted: bool = False

    def raise_for_failures(self, fail_if_worse: Collection[str] = ()) -> None:
        """Raise the error that gives `pdd evaluate` its exit code; `fail_if_worse` names metrics.

        Raises:
            DownloadError: a metric lacks its weights.
            CheckFailed: a baseline is clearly better by one of `fail_if_worse`.
            PartialFailure: some images could not be scored.
        """
        report = self.report
        if self.not_loaded:
            raise _combined(self.not_loaded)
        worse = [one for one in self._checked(fail_if_worse) if one.verdict == "worse"]
        if worse:
            named = ", ".join(f"{one.metric.name} than {one.theirs} ({one.change})" for one in worse)
            raise CheckFailed(f"--fail-if-worse: {report.main.name} is worse by {named}")
        if report.problems:
            count = len(report.problems)
            named = "1 problem, named above" if count == 1 else f"{count} problems, each named above"
            scored = any(scores.values for one in report.sets for scores in one.images.values())
            raise PartialFailure(named, "The rest is scored." if scored else "Nothing could be scored.")

    def too_few(self, fail_if_worse: Collection[str]) -> bool:
        """Whether a comparison by one of these metrics has too few images for a verdict."""
        return any(one.verdict == "too few" for one in self._checked(fail_if_worse))

    def _checked(self, metrics: Collection[str]) -> list[Comparison]:
        return [one for one in self.report.comparisons if one.metric.name in metrics]


def score_inputs(settings: EvaluateConfig, inputs: Inputs, observer: Observer = Observer()) -> Evaluation:
    """The scores of all sets in `inputs` by the metrics of `settings`.

    Raises:
        InputError: no metric can be computed from these inputs.
        DownloadError: no metric has its weights.
    """
    for note in inputs.notes:
        observer.say(note)
    wanted, skipped = _computable(metric_infos(settings.metrics), inputs)
    for name, reason in skipped.items():
        observer.warn(f"{name} is skipped: it {reason}")
    if not wanted:
        raise InputError(
            f"nothing to compute: no images to compare with were given for {', '.join(skipped)}",
            "Add --gt-dir DIR, or a metric without reference, such as niqe.",
        )
    if settings.luma == "matlab" and not any(info.name in LUMA_METRICS for info in wanted):
        observer.warn(f"--luma matlab changes nothing here: it is for {', '.join(LUMA_METRICS)}")
    missing = [name for name in settings.fail_if_worse if name not in [info.name for info in wanted]]
    if missing:
        raise InputError(f"--fail-if-worse {', '.join(missing)}: not computed", "Add it to --metrics.")
    with observer.fetching() as on_event:
        loaded, lacking = load_metrics(
            wanted,
            device=str(choose_runtime(settings.metric_device).device),
            luma=settings.luma,
            offline=settings.offline,
            on_event=on_event,
        )
    if not loaded:
        raise _combined(lacking.values())
    lost = {
        info.name: "lacks its weights" if isinstance(error, DownloadError) else "could not be loaded"
        for info, error in lacking.items()
    }
    failures = list(inputs.problems)
    (main, *baselines), interrupted = _score_all(inputs.sets, loaded, settings.crop_border, observer, failures)
    report = Report(
        list(loaded), main, baselines, settings.crop_border, {**skipped, **lost}, failures, luma=settings.luma
    )
    return Evaluation(report, list(lacking.values()), interrupted)


def _computable(infos: Sequence[MetricInfo], inputs: Inputs) -> tuple[list[MetricInfo], dict[str, str]]:
    """The metrics to compute (with pdd's own where LR inputs are known), and why the others can't be computed."""
    items = inputs.sets[0].items.values()
    lacking = {}
    if not any(item.reference for item in items):
        lacking["full"] = "needs ground truth: add --gt-dir DIR"
    if not any(item.lr for item in items):
        lacking["lr"] = "needs the LR inputs: add --lr-dir DIR"
    wanted = list(dict.fromkeys([*infos, *([] if "lr" in lacking else [CONSISTENCY, DRIFT])]))
    return (
        [info for info in wanted if info.reference not in lacking],
        {info.name: lacking[info.reference] for info in wanted if info.reference in lacking},
    )


def _combined(errors: Collection[PddError]) -> PddError:
    """All of `errors` as one error of the first's type."""
    first = next(iter(errors))
    return type(first)("\n".join(error.message for error in errors), "\n       ".join(error.hint for error in errors))


def _score_all(
    sets: Sequence[ImageSet],
    loaded: dict[MetricInfo, object],
    crop_border: int,
    observer: Observer,
    failures: list[str],
) -> tuple[list[ScoredSet], bool]:
    """The scores of each set, and whether Ctrl-C interrupted; scores so far are kept."""
    scored: list[ScoredSet] = []
    for one in sets:
        found = _score(one, loaded, crop_border, observer, failures)
        if found.images:
            scored.append(found)
        if len(found.images) < len(one.items):
            failures.append(f"interrupted: {len(found.images)} of {len(one.items)} images of {one.name} are scored")
            if not scored:
                raise KeyboardInterrupt
            return scored, True
    return scored, False


def _score(
    images: ImageSet,
    loaded: dict[MetricInfo, object],
    crop_border: int,
    observer: Observer,
    failures: list[str],
) -> ScoredSet:
    """The scores of one set, of fewer images after Ctrl-C; errors that concern the whole set go into `failures`."""
    items = list(images.items.values())
    scored: list[ImageScores] = []
    described = f"score {images.name}"
    with observer.progress(described, len(items)) as progress, contextlib.suppress(KeyboardInterrupt):
        scoring = score(
            items,
            loaded,
            crop_border=crop_border,
            on_start=lambda item: progress.start(0, item.image.name),
        )
        with contextlib.closing(scoring):
            for scores in scoring:
                scored.append(scores)
                progress.advance()
    set_scores = {}
    for info, metric in loaded.items():
        if info.of_sets and len(scored) == len(items):
            try:
                set_scores[info.name] = score_set(items, info, metric, crop_border=crop_border)
            except PddError as error:
                failures.append(f"{images.name}: {error.message}")
    return ScoredSet(images.name, dict(zip(images.items, scored, strict=False)), set_scores)
