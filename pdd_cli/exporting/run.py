"""The use case of `pdd export`: weights by name or file, written in one or several forms."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pdd_cli.errors import InputError, PartialFailure, PddError
from pdd_cli.exporting.formats import card_of, check_architecture, check_packages, write
from pdd_cli.exporting.names import SUFFIXES, default_path, paths_of, scale_in_name
from pdd_cli.files import write_errors
from pdd_cli.models.loading import SRModel, load_sr_model
from pdd_cli.observer import Observer
from pdd_cli.settings.base import ExportForm
from pdd_cli.settings.export import ExportConfig
from pdd_cli.upscaling.strength import at_strength, choose_strength
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.states import HUB_PREFIX, identify, is_file_reference
from pdd_cli.weights.store import Store


@dataclass(frozen=True)
class ExportResult:
    """The exported model, its files by form, and the failures of other forms."""

    model: SRModel
    strength: float
    files: dict[ExportForm, list[Path]] = field(default_factory=dict)
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
            "card": card and card.model_dump(),
            "failures": [{"message": failure.message, "hint": failure.hint} for failure in self.failures],
        }

    def raise_for_failures(self) -> None:
        """Raise the first failure; PartialFailure if other forms were written."""
        if not self.failures:
            return
        first = self.failures[0]
        raise PartialFailure(first.message, first.hint) if self.files else first


def run(settings: ExportConfig, *, overwrite: bool, observer: Observer) -> ExportResult:
    """Write the files. Everything that can be known before is checked before; a form that fails leaves the others.

    Raises InputError for unknown weights, files that exist (unless `overwrite`) or a form that can't hold the model;
    DownloadError if weights can't be fetched.
    """
    forms = _forms(settings)
    check_packages(forms, "--to")
    with observer.fetching() as on_event:
        find = partial(ensure, store=Store.default(), offline=settings.offline, on_event=on_event)
        source = find(settings.weights)
        strength = choose_strength(source, settings.strength, name=settings.weights, observer=observer)
        model = at_strength(load_sr_model(source), strength, name=settings.weights, find=find)
    check_architecture(forms, model, "--to")
    name = (
        source.stem
        if is_file_reference(settings.weights) or settings.weights.startswith(HUB_PREFIX)
        else settings.weights
    )
    model = replace(model, card=card_of(model, name, f"file {source.name}", strength))
    targets = {form: _target(form, settings, name, model.scale) for form in forms}
    for form, path in targets.items():
        for file in paths_of(form, path):
            _check_target(file, source, overwrite=overwrite)
    result = ExportResult(model, strength)
    for form, path in targets.items():
        try:
            result.files[form] = write(form, path, model)
        except PddError as error:
            result.failures.append(error)
            continue
        observer.say(f"exported: {', '.join(map(str, result.files[form]))}")
        if form == "ncnn" and scale_in_name(path.stem) != model.scale:
            observer.warn(f"{path.stem}: Upscayl needs the scale in the name, for example {path.stem}-{model.scale}x")
    return result


def _forms(settings: ExportConfig) -> Sequence[ExportForm]:
    if settings.to:
        return list(dict.fromkeys(settings.to))
    suffix = Path(settings.output or "").suffix.lower()
    found = [form for form, suffixes in SUFFIXES.items() if suffix in suffixes]
    if not found:
        raise InputError("export: no form is given", f"Add --to FORM, one or several of {','.join(SUFFIXES)}.")
    return found


def _target(form: ExportForm, settings: ExportConfig, name: str, scale: int) -> Path:
    """The path of the file: OUT if it has the form's suffix, else a file in the folder OUT."""
    out = Path(settings.output or ".").expanduser()
    owners = [owner for owner, suffixes in SUFFIXES.items() if out.suffix.lower() in suffixes]
    if not owners or out.is_dir() or (settings.output or "").endswith(("/", "\\")):
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file, not a folder", "Name a folder for the exported files.")
        return default_path(form, out, name, scale)
    if len(settings.to) > 1:
        raise InputError(f"{out} is one file, but --to names several forms", "Name a folder.")
    if owners != [form]:
        raise InputError(f"{out}: a file of --to {form} ends in {' or '.join(SUFFIXES[form])}", "Or leave out --to.")
    return out


def _check_target(file: Path, source: Path, *, overwrite: bool) -> None:
    """Raise InputError unless `file` can be created in its folder, or replaced."""
    if file.exists():
        if file.is_dir():
            raise InputError(f"can't write {file}: it is a folder")
        sources = paths_of("ncnn", source) if source.suffix in SUFFIXES["ncnn"] else [source]
        if any(one.exists() and file.samefile(one) for one in sources):
            raise InputError(f"{file} is the file to export; it is not replaced", "Name another folder or file.")
        if not overwrite:
            raise InputError(f"{file} exists", "--overwrite replaces it.")
        with file.open("rb") as opened:
            kind = identify(opened.read(512))
        if kind is not None and kind[0] == "an image":
            raise InputError(f"{file} is an image; it is not replaced", "Name another file.")
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
