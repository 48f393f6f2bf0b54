"""Publishes a trained run: writes the verdict, registers the weights in the store, writes exports and the report."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdd_cli.adaptation.judge import Conclusion, Verdict
from pdd_cli.adaptation.prepare import Run, memory_errors
from pdd_cli.adaptation.preview import image_grid, to_rgb8, upscale_image
from pdd_cli.data.datasets import RGB
from pdd_cli.errors import InputError, Interrupted, PartialFailure, PddError, ResourceError
from pdd_cli.exporting.names import default_path
from pdd_cli.exporting.run import ExportResult, export_adapted
from pdd_cli.files import atomic_write, write_text
from pdd_cli.interruption import was_raised
from pdd_cli.observer import Observer
from pdd_cli.reporting.adaptation import ReportImage, RunReport, as_page
from pdd_cli.reporting.html import window
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.states import is_file_reference, read_state
from pdd_cli.weights.store import Card, Entry, Store

_REPORT_IMAGES = 6
_REPORT_SIZE = 128
_COMPARED, _COMPARED_SIDE = 3, 96  # images, LR pixels


@dataclass
class PublishResult:
    """The results of a trained run, as far as they exist, and the failures."""

    verdict: Verdict = field(default_factory=lambda: Verdict(None, "the judgement failed", 1.0))
    conclusion: Conclusion | None = None
    weights: Entry | None = None
    report: Path | None = None
    exported: list[Path] = field(default_factory=list)
    failures: list[PddError] = field(default_factory=list)

    def failure(self, run: Run) -> PddError | None:
        """The first failure as an error whose hint says how to try again; None if there are no failures."""
        if not self.failures:
            return None
        first = self.failures[0]
        kind = ResourceError if any(isinstance(failure, ResourceError) for failure in self.failures) else PartialFailure
        return kind(
            first.message,
            f"{first.hint} The trained weights are in {run.folder.best}. To try again: {run.resume_command}",
        )

    def as_document(self, run: Run, losses: Mapping[str, float]) -> dict[str, Any]:
        """For --json; `losses`: those of the last step."""
        limit = run.time_limit
        return {
            "name": run.name,
            "weights": self.weights and self.weights.path,
            "run": run.folder.path,
            "report": self.report,
            "exported": self.exported,
            "steps": run.state.step,
            "minutes": limit and {"asked": limit.minutes, "taken": limit.spent / 60},
            "features": run.features_name,
            "losses": losses,
            "verdict": {"keep": self.verdict.keep, "reason": self.verdict.reason, "strength": self.verdict.strength},
            "truth": self.conclusion and self.conclusion.validation_document(),
            "card": self.weights and self.weights.card.model_dump(),
            "failures": [{"message": failure.message, "hint": failure.hint} for failure in self.failures],
        }


def publish(run: Run, store: Store, observer: Observer) -> PublishResult:
    """Judge the trained weights, register them, write the report and the exports, and report each result.

    If one of these steps fails, the others are still done.
    """
    done = PublishResult()
    say, warn = observer.say, observer.warn

    @contextlib.contextmanager
    def collected() -> Iterator[None]:
        try:
            with memory_errors(run.config):
                yield
        except PddError as error:
            done.failures.append(error)
        except Exception as error:
            if was_raised():  # a library has turned Ctrl-C into another error
                raise KeyboardInterrupt from error
            done.failures.append(
                PddError(
                    f"a bug in pdd: {type(error).__name__}: {error}", "To see where: run the same command with --debug."
                )
            )

    try:
        if run.state.step < run.config.steps:
            say(
                f"stopped early after step {run.state.step} of {run.config.steps}: the last "
                f"{run.config.early_stopping} judgements brought no improvement "
                f"(to continue: {run.resume_command} --set early_stopping=off)"
            )
        say("judging the trained weights")
        with collected():
            done.conclusion = run.judge.conclude(read_state(run.folder.best))
            done.verdict = done.conclusion.verdict
            (warn if done.verdict.keep is False else say)(f"verdict: {done.verdict.label}. {done.verdict.reason}")
            for text in (done.conclusion.describe_teacher(), done.conclusion.describe_validation()):
                if text:
                    say(text)
            write_verdict(run, done.conclusion)
        try:
            with memory_errors(run.config):
                done.weights = register(run, store, done.verdict)
            say(f"done: weights '{run.name}' in {done.weights.path}")
        except PddError as error:
            done.failures.append(error)
            with collected():
                done.weights = register(run, replace(store, root=run.folder.path), done.verdict)
                say(f"the weights are not registered; they are in {done.weights.path}")
        with collected():
            done.report = write_report(run, done.conclusion)
            say(f"report: {done.report}")
        if run.config.export and done.weights is not None:
            with collected():
                exported = write_exports(run, store, done.weights, observer)
                done.exported += [file for files in exported.files.values() for file in files]
                done.failures += exported.failures
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; all {run.state.step} steps are done and saved in {run.folder.path}",
            f"To finish: {run.resume_command}",
        ) from None
    if run.time_limit:
        say(f"time: {run.time_limit.describe()}")
    if done.weights is not None and done.verdict.keep is not False:
        strength = f" --strength {done.verdict.strength:g}" if done.verdict.strength < 1 else ""
        reference = run.name if done.weights.path.parent == store.root else done.weights.path
        say(f"next: pdd upscale IN OUT --weights {reference}{strength}")
    else:
        say("Look at the report before you use the weights. More images from the same source, or --hr-dir, may help.")
        say(f"next: pdd upscale IN OUT --weights {shlex.quote(run.config.base)}, the better model so far")
    return done


def judge_weights(run: Run, path: Path) -> tuple[Conclusion, dict[str, Any]]:
    """Judge the weights in `path`, such as a kept checkpoint of `run`. Returns the conclusion, and it for --json.

    Raises InputError if the file can't be read, or isn't of the run's architecture.
    """
    state = read_state(path)
    expected = run.models.base.module.state_dict()
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in expected.items()}:
        raise InputError(
            f"--judge {path}: the weights belong to another network than this run's", "Give a file of this run."
        )
    with memory_errors(run.config):
        try:
            conclusion = run.judge.conclude(state)
        except InputError as error:
            raise InputError(f"--judge {path}: {error.message}", error.hint) from error
    return conclusion, {"weights": path, **_verdict_document(run, conclusion)}


def write_verdict(run: Run, conclusion: Conclusion) -> None:
    """Write verdict.json."""
    write_text(run.folder.verdict, json.dumps(_verdict_document(run, conclusion), indent=2) + "\n")


def write_report(run: Run, conclusion: Conclusion | None) -> Path:
    """Write the report. Without a conclusion it has no verdict and no images, and takes little time."""
    base = run.models.base
    images = _report_images(run, conclusion.strength) if conclusion else []
    page = as_page(
        RunReport(
            name=run.name,
            steps=run.state.step,
            max_steps=run.config.steps,
            facts={
                "Base": f"{run.config.base} ({base.architecture} x{base.scale})",
                **({"Teacher": f"{run.teacher.name} ({run.teacher.model.architecture})"} if run.teacher else {}),
                "Features": run.features_name,
                "Device": str(run.models.runtime),
                "Images": f"{run.lr_images} trained on, {run.judged_on} judged on",
                "Source": run.properties.describe(),
                **({"Time": run.time_limit.describe()} if run.time_limit else {}),
            },
            settings=run.settings,
            defaults={
                **AdaptConfig(real_dir=Path(), teacher=run.config.teacher).model_dump(mode="json"),
                "real_dir": None,
                "teacher": None,
            },
            log=_read_lines(run.folder.log),
            judgements=run.state.judgements,
            base=run.judge.base_scores.as_document(),
            verdict=_verdict_document(run, conclusion) if conclusion else None,
            teacher=conclusion.describe_teacher() if conclusion else "",
            validation=conclusion.describe_validation() if conclusion else "",
            images=images,
        )
    )
    write_text(run.folder.report, page)
    if conclusion and images:
        write_comparison(run.folder.comparison, images, conclusion.strength)
    return run.folder.report


def write_comparison(path: Path, images: Sequence[ReportImage], strength: float) -> None:
    """Write crops of up to three images as one picture: LR, base, adapted, and HR where all of them have it.

    Images with ground truth come first.
    """
    chosen = sorted(images, key=lambda image: image.hr is None)[:_COMPARED]
    with_hr = all(image.hr is not None for image in chosen)
    rows = []
    for image in chosen:
        scale = image.base.shape[0] // image.lr.shape[0]
        height, width = (min(side, _COMPARED_SIDE) for side in image.lr.shape[:2])
        enlarged = image.lr.repeat(scale, 0).repeat(scale, 1)
        panels = [enlarged, image.base, image.adapted, *([image.hr] if with_hr and image.hr is not None else [])]
        rows.append([np.ascontiguousarray(panel[: height * scale, : width * scale]) for panel in panels])
    titles = ("LR", "base", f"adapted, strength {strength:g}", *(["HR"] if with_hr else []))
    with atomic_write(path) as temporary:
        image_grid(rows, titles).save(temporary, format="PNG")


def register(run: Run, store: Store, verdict: Verdict) -> Entry:
    """Put the best weights into the store under the run's name."""
    weights = read_state(run.folder.best)
    broken = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"the adapted weights contain values that are not finite ({broken[0]}); not registered")
    base, settings = run.models.base, run.settings
    card = Card(
        name=run.name,
        architecture=base.architecture,
        scale=base.scale,
        licence=_licence(run),
        source=f"pdd adapt, {run.state.step} steps from {_name_of(run.config.base)}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        base=settings["base"],
        base_sha256=run.inputs["base"],
        adapted={
            "steps": run.state.step,
            **({"teacher": settings["teacher"], "teacher_sha256": run.teacher.sha256} if run.teacher else {}),
            "features": run.features_name,
            "real_images": len(run.sampler.real),
            "pairs": len(run.sampler.pairs),
            "source": run.properties.as_document(),
            "hr_images": run.sources[-1].used if run.config.hr_dir else len(run.sampler.lr_images),
            "hr_from": run.hr_from,
            "precision": run.models.runtime.precision,
            "verdict": verdict.label,
            "reason": verdict.reason,
            "strength": verdict.strength,
            "settings": settings,
        },
    )
    return store.add(card, weights)


def write_exports(run: Run, store: Store, registered: Entry, observer: Observer) -> ExportResult:
    """Write the registered weights for other programs, as files of the run's name in its folder.

    Where the store couldn't be written, the registered weights are already a safetensors file there.
    """
    folder, there = run.folder.path, registered.path
    forms = [form for form in run.config.export if default_path(form, folder, run.name, 1) != there]
    result = export_adapted(there, forms, folder, name=run.name, store=store, observer=observer)
    if len(forms) < len(run.config.export):
        result.files["safetensors"] = [there]
    return result


def _licence(run: Run) -> str:
    """The licence of the base, and that of the teacher if it is another one."""
    card, teacher = run.models.base.card, run.teacher
    licence = card.licence if card else "that of the base weights"
    if teacher is None:
        return licence
    of_teacher = teacher.model.card.licence if teacher.model.card else "not known"
    return licence if of_teacher == licence else f"{licence}; of the teacher: {of_teacher}"


def _name_of(reference: str) -> str:
    """A reference to weights without the folders of a file, which cards and model cards show to others."""
    return Path(reference).name if is_file_reference(reference) else reference


def _verdict_document(run: Run, conclusion: Conclusion) -> dict[str, Any]:
    verdict = conclusion.verdict
    return {
        "keep": verdict.keep,
        "reason": verdict.reason,
        "strength": verdict.strength,
        "images": len(run.judge.images),
        "pairs": run.judge.pairs.found if run.judge.pairs else 0,
        "held_out_pairs": run.judge.held_out_pairs.found if run.judge.held_out_pairs else 0,
        "base": conclusion.base.as_document(),
        **(
            {
                "teacher": {"score": run.judge.score(conclusion.teacher), **conclusion.teacher.as_document()},
                "times_as_fast_as_teacher": conclusion.times_as_fast,
            }
            if conclusion.teacher
            else {}
        ),
        "adapted": [
            {"strength": strength, "score": run.judge.score(scores), **scores.as_document()}
            for strength, scores in conclusion.adapted.items()
        ],
    }


def report_crops(run: Run) -> list[tuple[str, str, RGB, RGB | None]]:
    """Name, group, LR and HR of the report's images: the most detailed crops of held-out images, and the pairs."""
    crops: list[tuple[str, str, RGB, RGB | None]] = []
    for number, image in enumerate(run.judge.images[:_REPORT_IMAGES] if run.config.real_dir else (), 1):
        x, y, width, height = window(image, side=_REPORT_SIZE)
        crop = np.ascontiguousarray(image[y : y + height, x : x + width])
        crops.append((f"image {number}", "held-out images", crop, None))
    for pairs, group in ((run.judge.held_out_pairs, "held-out pairs"), (run.judge.pairs, "with ground truth")):
        if pairs:
            with_truth = zip(pairs.names, pairs.lr, pairs.hr, strict=True)
            crops += [(name, group, lr, hr) for name, lr, hr in list(with_truth)[:_REPORT_IMAGES]]
    return crops


def _report_images(run: Run, strength: float) -> list[ReportImage]:
    """The `report_crops`, upscaled with the base and with the best weights at `strength`."""
    base, runtime = run.models.base, run.models.runtime
    adapted = run.judge.interpolate(read_state(run.folder.best), strength)
    crops = report_crops(run)
    upscaled = ([to_rgb8(upscale_image(model, lr, runtime)) for model in (base, adapted)] for _, _, lr, _ in crops)
    return [
        ReportImage(name, group, lr, by_base, by_adapted, hr)
        for (name, group, lr, hr), (by_base, by_adapted) in zip(crops, upscaled, strict=True)
    ]


def _read_lines(path: Path) -> Sequence[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
