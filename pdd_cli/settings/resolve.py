"""Merges the settings from the command line, `--set` and one YAML file.

Precedence: command line > `--set` > `--config` FILE (or `./pdd.yaml`) > the defaults of the models.
A file has one section for each command: `adapt:`, `upscale:`, `evaluate:`, `fetch-weights:`, `export:`, `ui:`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from pdd_cli.errors import InputError
from pdd_cli.settings.base import Option, Settings, expand_home

DEFAULT_FILE = Path("pdd.yaml")


class _File(Settings):
    """The sections that a configuration file may have. Each is validated by its own command."""

    adapt: dict[str, Any] = Field(default={})
    upscale: dict[str, Any] = Field(default={})
    evaluate: dict[str, Any] = Field(default={})
    fetch_weights: dict[str, Any] = Field(default={}, alias="fetch-weights")
    export: dict[str, Any] = Field(default={})
    ui: dict[str, Any] = Field(default={})


Section = Literal["adapt", "upscale", "evaluate", "fetch-weights", "export", "ui"]
T = TypeVar("T", bound=Settings)


def resolve(
    model: type[T],
    section: Section,
    *,
    options: Mapping[str, object],
    overrides: Sequence[str] = (),
    file: Path | None = None,
    stored: Path | None = None,
) -> T:
    """The settings of one command, merged from all sources.

    `options`: dotted key → value from the command line; None means not set. `overrides`: `key.path=value` texts whose
    value is YAML. `file`: a YAML file; by default `./pdd.yaml` is read if it exists. `stored`: the file of an earlier
    run, whose settings replace `./pdd.yaml` and the defaults.

    Raises InputError that names the key, the value and the allowed values.
    """
    values: dict[str, Any] = {}
    if stored is not None:
        values = _read_section(stored, section)
        _check(model, values, str(stored), partial=True)
    explicit = explicit_values(model, section, options=options, overrides=overrides, file=file, default=stored is None)
    _override(model, values, explicit)
    return _check(model, values, "")


def settings_from(model: type[T], options: Mapping[str, object], origin: str = "") -> T:
    """The settings made from `options` (dotted key → value) and the defaults. Raises InputError as `resolve` does.

    `origin`: the file to name in messages.
    """
    values: dict[str, Any] = {}
    for key, option in options.items():
        _put(values, key, option)
    return _check(model, values, origin)


def explicit_values(
    model: type[T],
    section: Section,
    *,
    options: Mapping[str, object],
    overrides: Sequence[str] = (),
    file: Path | None = None,
    default: bool = True,
) -> dict[str, Any]:
    """The values that `options`, `overrides` and `file` set (see `resolve`), without defaults and possibly incomplete.

    `default`: whether to read `./pdd.yaml`.
    """
    values: dict[str, Any] = {}
    path = file or (DEFAULT_FILE if default and DEFAULT_FILE.exists() else None)
    if path is not None:
        values = read_section(expand_home(path), model, section)
    assigned: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise InputError(f"--set {text}: not in the form key.path=value", "For example: --set losses.intra=0.5")
        _put(assigned, key.strip(), _yaml(value, f"--set {text}"))
    _override(model, values, assigned)
    given: dict[str, Any] = {}
    for key, option in options.items():
        if option is not None:
            _put(given, key, option)
    _override(model, values, given)
    return values


def read_section(path: Path, model: type[Settings], section: Section) -> dict[str, Any]:
    """The values that one command has in a YAML file. Raises InputError that names the file and the key."""
    values = _read_section(path, section)
    _check(model, values, str(path), partial=True)
    return values


def as_yaml(settings: Settings) -> str:
    """The settings as YAML text from which the model gives an equal value."""
    import yaml

    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _read_section(path: Path, section: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the config file {path} is not UTF-8 text") from error
    content = _yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected sections such as `{section}:` with settings below them")
    sections = _check(_File, content, str(path))
    return dict(sections.model_dump(by_alias=True)[section])


def _yaml(text: str, origin: str) -> Any:
    import yaml  # here, and in as_yaml, because `pdd --help` doesn't need YAML

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{origin}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error


def _override(model: type[Settings], values: dict[str, Any], newer: Mapping[str, Any]) -> None:
    """Merge the settings of a source of higher precedence into `values`."""
    for group in model.alternatives:
        if any(newer.get(key) is not None for key in group):
            for key in group:
                values.pop(key, None)
    _merge(values, newer)


def _merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Merge `overrides` into `values`, key by key."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _put(values: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InputError(f"{key}: {parent} is a single value ({below!r}), nothing can be set below it")
        values = below
    values[last] = value


def _check(model: type[T], values: Mapping[str, Any], origin: str, *, partial: bool = False) -> T:
    """Validate the values. `partial` ignores missing ones, which another source may set."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [p for p in error.errors() if not (partial and p["type"] in ("missing", "value_error"))]
        if not problems:
            return None  # type: ignore[return-value]  # the caller of a partial check takes no result
        where = f"{origin}: " if origin else ""
        by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
        for problem in problems:
            by_key.setdefault(_path(problem, model), []).append(problem)
        raise InputError("\n".join(where + _explain(path, found, model) for path, found in by_key.items())) from error


def _path(problem: ErrorDetails, model: type[BaseModel]) -> tuple[str, ...]:
    """The keys that lead to the problem, without the names that pydantic gives to the members of a union."""
    path: list[str] = []
    models = [model]
    for index, part in enumerate(problem["loc"]):
        fields = [field for m in models for name, field in m.model_fields.items() if part == (field.alias or name)]
        unknown = problem["type"] == "extra_forbidden" and index == len(problem["loc"]) - 1
        if fields or unknown or isinstance(part, int):
            path.append(str(part))
            models = [sub for field in fields for sub in models_in(field.annotation)] or models
    return tuple(path)


def _explain(path: Sequence[str], problems: Sequence[ErrorDetails], model: type[Settings]) -> str:
    """The message for one key: key, value, allowed values. For a union there is one problem for each member."""
    problem = problems[0]
    key = ".".join(path) or "settings"
    value = problem["input"]
    match problem["type"]:
        case "missing":
            return f"{key}: missing; give {_option(path, model)}"
        case "extra_forbidden":
            known = _keys(model, path[:-1])
            close = difflib.get_close_matches(path[-1], known, 1)
            return f"{key}: no such setting{f'; did you mean {close[0]}?' if close else ''} (known: {', '.join(known)})"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            shown = str(value) if isinstance(value, Path) else repr(value)
            return f"{key}: {shown} is not allowed: {' or '.join(_allowed(problem['msg']) for problem in problems)}"


def _allowed(message: str) -> str:
    """pydantic's message without the parts that our message already contains."""
    return message.removeprefix("Input should be ").removesuffix(", unable to parse string as an integer")


def _option(path: Sequence[str], model: type[BaseModel]) -> str:
    """The option of the command line that sets it."""
    models, fields = [model], []
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [sub for field in fields for sub in models_in(field.annotation)]
    for option in (part for field in fields for part in field.metadata):
        if isinstance(option, Option):
            return option.metavar or path[-1] if option.argument else option.names(path[-1])[0]
    return f"--set {'.'.join(path)}=…"


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The names of the settings below `path`."""
    models = [model]
    for part in path:
        models = [sub for m in models if part in m.model_fields for sub in models_in(m.model_fields[part].annotation)]
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for part in get_args(annotation) for model in models_in(part)]
