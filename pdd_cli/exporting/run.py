"""The use case of `pdd export`, and the exports of `pdd adapt`: weights written in one or several forms."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pdd_cli.errors import InputError, PartialFailure, PddError, ResourceError
from pdd_cli.exporting.formats import card_of, check_architecture, check_packages, write
from pdd_cli.exporting.hub_upload import Upload, open_repository, upload
from pdd_cli.exporting.names import SUFFIXES, default_path, paths_of, scale_in_name
from pdd_cli.exporting.ownership import check_target
from pdd_cli.files import write_errors
from pdd_cli.models.loading import SRModel, load_sr_model
from pdd_cli.observer import Observer
from pdd_cli.runtime import is_out_of_memory
from pdd_cli.settings.base import ExportForm
from pdd_cli.settings.export import ExportConfig
from pdd_cli.upscaling.strength import at_strength, choose_strength
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.states import HUB_PREFIX, files_of, is_file_reference
from pdd_cli.weights.store import Store


@dataclass
class ExportResult:
    """The exported model, its files by form, what was uploaded, and the failures of other forms."""

    model: SRModel
    strength: float
    files: dict[ExportForm, list[Path]] = field(default_factory=dict)
    upload: Upload | None = None
    failures: list[PddError] = field(default_factory=list)

    def as_document(self) -> dict[str, object]:
        """For --json."""
        card = self.model.card
        return {
            "architecture": self.model.architecture,
            "scale": self.model.scale,
            "licence": card and card.licence,
            "strength": self.strength,
            "exported": self.files,
            "uploaded": self.upload and self.upload.as_document(),
            "card": card and card.model_dump(),
            "failures": [{"message": failure.message, "hint": failure.hint} for failure in self.failures],
        }

    def raise_for_failures(self) -> None:
        """Raise the first failure; PartialFailure if other forms were written."""
        if not self.failures:
            return
        first = self.failures[0]
        raise PartialFailure(first.message, first.hint) if self.files or self.upload else first


def run(settings: ExportConfig, *, overwrite: bool, observer: Observer) -> ExportResult:
    """Write the files. Everything that can be known before is checked before; a form that fails leaves the others.

    Raises InputError for unknown weights, files that exist (own exports are replaced with `overwrite`) or a form that
    can't hold the model; DownloadError if weights can't be fetched, or the Hub refuses the upload.
    """
    forms = _forms(settings)
    check_packages(forms, "--to")
    repository = None if settings.repo is None else open_repository(settings.repo)
    with observer.fetching() as on_event:
        find = partial(ensure, store=Store.default(), offline=settings.offline, on_event=on_event)
        source = find(settings.weights)
        is_name = not is_file_reference(settings.weights) and not settings.weights.startswith(HUB_PREFIX)
        name = settings.weights if is_name else source.stem
        model, strength = _load(source, settings.strength, name=name, find=find, observer=observer)
    check_architecture(forms, model, "--to")
    targets = {form: _target(form, settings, name, model.scale) for form in forms}
    for form, path in targets.items():
        for file in paths_of(form, path):
            check_target(form, file, files_of(source), overwrite=overwrite)
            _check_writable(file)
    result = _write_all(targets, model, strength, source, overwrite=overwrite, observer=observer)
    if repository is not None:
        try:
            result.upload = upload(
                model, source, repository,
                private=settings.private, pictures=settings.pictures, overwrite=overwrite, observer=observer,
            )  # fmt: skip
        except PddError as error:
            result.failures.append(error)
    return result


def export_adapted(
    source: Path, forms: Sequence[ExportForm], folder: Path, *, name: str, store: Store, observer: Observer
) -> ExportResult:
    """Write the adapted weights `source` into the folder of their run, as `run` does, at the recommended strength.

    Exports of an earlier run of pdd are replaced. Raises InputError if the base, which strengths below 1 need, is gone.
    """
    find = partial(ensure, store=store, offline=True, on_event=lambda event: None)
    model, strength = _load(source, None, name=name, find=find, observer=observer)
    targets = {form: default_path(form, folder, name, model.scale) for form in forms}
    return _write_all(targets, model, strength, source, overwrite=True, observer=observer)


def _load(
    source: Path, strength: float | None, *, name: str, find: Callable[[str], Path], observer: Observer
) -> tuple[SRModel, float]:
    """The model in `source` with the card of its exports, and its strength: the recommended one if it is None."""
    chosen = choose_strength(source, strength, name=name, observer=observer)
    model = at_strength(load_sr_model(source), chosen, name=name, find=find)
    return replace(model, card=card_of(model, name, f"file {source.name}", chosen)), chosen


def _write_all(
    targets: Mapping[ExportForm, Path],
    model: SRModel,
    strength: float,
    source: Path,
    *,
    overwrite: bool,
    observer: Observer,
) -> ExportResult:
    """Write each form; a failure, of whatever kind, is that form's."""
    result = ExportResult(model, strength)

    def check(form: ExportForm, path: Path, temporary: Path | None = None) -> None:
        for file in paths_of(form, path):
            check_target(form, file, files_of(source), overwrite=overwrite)

    for form, path in targets.items():
        try:
            check(form, path)
            result.files[form] = write(form, path, model, partial(check, form, path))
        except PddError as error:
            result.failures.append(error)
            continue
        except Exception as error:
            if is_out_of_memory(error):
                failure: PddError = ResourceError(f"out of memory while writing {path}", "Close other programs.")
            else:
                failure = PddError(
                    f"{path}: a bug in pdd: {type(error).__name__}: {error}",
                    "To see where: run the same command with --debug.",
                )
            failure.__cause__ = error
            result.failures.append(failure)
            continue
        observer.say(f"exported: {', '.join(map(str, result.files[form]))}")
        if form == "ncnn" and scale_in_name(path.stem) != model.scale:
            observer.warn(f"{path.stem}: Upscayl needs the scale in the name, for example {path.stem}-{model.scale}x")
    return result


def _forms(settings: ExportConfig) -> Sequence[ExportForm]:
    if ("hub" in settings.to) != (settings.repo is not None):
        given, missing = ("--to hub", "--repo USER/NAME") if settings.repo is None else ("--repo", "--to hub")
        raise InputError(f"export: {given} needs {missing}")
    if "hub" in settings.to and settings.offline:
        raise InputError("--to hub can't be combined with --offline")
    if settings.to:
        return list(dict.fromkeys(form for form in settings.to if form != "hub"))
    suffix = Path(settings.output or "").suffix.lower()
    found = [form for form, suffixes in SUFFIXES.items() if suffix in suffixes]
    if not found:
        raise InputError("export: no format is given", f"Add --to FORMAT, with one or more of {','.join(SUFFIXES)}.")
    return found


def _target(form: ExportForm, settings: ExportConfig, name: str, scale: int) -> Path:
    """The path of the file: OUT if it has the form's suffix, else a file in the folder OUT."""
    out = Path(settings.output or ".").expanduser()
    owners = [owner for owner, suffixes in SUFFIXES.items() if out.suffix.lower() in suffixes]
    if not owners or out.is_dir() or (settings.output or "").endswith(("/", "\\")):
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file, not a folder", "Give a folder for the exported files.")
        return default_path(form, out, name, scale)
    if len(set(settings.to) - {"hub"}) > 1:
        raise InputError(f"{out} is one file, but --to gives several formats", "Give a folder.")
    if owners != [form]:
        raise InputError(
            f"{out}: the name of a --to {form} file ends in {' or '.join(SUFFIXES[form])}",
            "Change the name, or leave out --to.",
        )
    return out


def _check_writable(file: Path) -> None:
    """Raise InputError or ResourceError unless a file can be created in the folder of `file`, which is made."""
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
