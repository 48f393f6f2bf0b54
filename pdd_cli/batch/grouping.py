"""Settings of single files: `pdd.yaml` in the folders of the input, and --model-map."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdd_cli.errors import InputError
from pdd_cli.observer import Observer
from pdd_cli.settings.resolve import DEFAULT_FILE, read_section, settings_from
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.upscaling.jobs import Job

_SIZES = ("scale", "width", "height", "long_side", "fit")
PER_FILE = (
    "weights", "strength", *_SIZES, "color_correction", "tta", "mix", "snap_flats", "seamless", "normal_map",
    "quality", "lossless",
)  # fmt: skip
"""The settings that a folder may have of its own."""


@dataclass(frozen=True)
class Group:
    """Jobs with the same settings."""

    settings: UpscaleConfig
    jobs: Sequence[Job]


def group_jobs(
    settings: UpscaleConfig, jobs: Sequence[Job], fixed: Collection[str] = (), observer: Observer = Observer()
) -> list[Group]:
    """The jobs by their settings, in the order of their first job.

    Precedence: `fixed` (the settings that were given for this call) > pdd.yaml of the nearest folder > those of the
    folders above it up to the input > `settings`. --model-map, the first pattern that matches, gives the weights.

    Raises InputError for a setting that a folder can't have, or a file or pattern that is wrong.
    """
    roots = [_root(source) for source in settings.input]
    if not settings.input and jobs:  # a list: the folder that its files have in common
        roots = [Path(os.path.commonpath([job.source.parent for job in jobs]))]
    patterns = [_parse(text) for text in settings.model_map]
    unused = set(settings.model_map)
    of_folder: dict[Path, Mapping[str, Any]] = {}
    groups: dict[UpscaleConfig, list[Job]] = {}
    for job in jobs:
        root = next((root for root in roots if root is not None and job.source.is_relative_to(root)), job.source.parent)
        below = job.source.relative_to(root)
        changed: dict[str, Any] = {}
        origin = ""
        folders = [root / parent for parent in reversed(below.parents)] if root in roots else []
        for folder in folders:  # the nearest last
            if folder not in of_folder:
                of_folder[folder] = _values(folder / DEFAULT_FILE, fixed)
            own = of_folder[folder]
            origin = str(folder / DEFAULT_FILE) if own else origin
            if any(name in own for name in _SIZES):
                changed = {name: value for name, value in changed.items() if name not in _SIZES}
                changed |= dict.fromkeys(_SIZES)
            changed |= own
        for text, (pattern, weights) in zip(settings.model_map, patterns, strict=True):
            if pattern.fullmatch(below.as_posix()) or pattern.fullmatch(below.name):
                changed["weights"] = weights
                unused.discard(text)
                break
        if not changed:
            groups.setdefault(settings, []).append(job)
            continue
        own_settings = settings_from(UpscaleConfig, {**settings.model_dump(exclude_unset=True), **changed}, origin)
        groups.setdefault(own_settings, []).append(job)
    for text in sorted(unused):
        observer.warn(f"--model-map {text}: no input matches")
    return [Group(group, found) for group, found in groups.items()]


def _root(source: Path) -> Path | None:
    """The folder below which an input was found; None for a file."""
    if glob.has_magic(str(source)) and not source.exists():
        return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), source.parts))
    return source if source.is_dir() else None


def _values(path: Path, fixed: Collection[str]) -> Mapping[str, Any]:
    """The settings of a folder in its pdd.yaml, without those that are `fixed`."""
    if not path.is_file():
        return {}
    values = read_section(path, UpscaleConfig, "upscale")
    if path.resolve() == DEFAULT_FILE.resolve():  # the settings of the whole call, which were read already
        return {}
    for name in values:
        if name not in PER_FILE:
            raise InputError(
                f"{path}: {name} can't be set for a folder of the input",
                f"Set it for the whole command. A folder may set {', '.join(PER_FILE)}.",
            )
    has_size = any(name in fixed for name in _SIZES)
    return {name: value for name, value in values.items() if name not in fixed and not (has_size and name in _SIZES)}


def _parse(text: str) -> tuple[re.Pattern[str], str]:
    """The pattern and the weights of a --model-map: ** is any text, * and ? are within a name."""
    pattern, equals, weights = text.rpartition("=")
    if not equals or not pattern or not weights:
        raise InputError(f"--model-map {text}: not in the form PATTERN=WEIGHTS", "For example: 'faces/**=realLR'")
    translated = "".join(
        {"**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
        for part in re.split(r"(\*\*|\*|\?)", pattern)
    )
    return re.compile(translated), weights
