"""Builds command-line options from settings models, so that name, help, default and choices are defined only once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from rich.markup import escape

from pdd_cli.console import Console
from pdd_cli.settings.base import Option, Panel, Settings
from pdd_cli.settings.resolve import Section, explicit_values, models_in, resolve, settings_from

S = TypeVar("S", bound=Settings)
F = TypeVar("F", bound=Settings)

_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class General(Settings):
    """Options of every command."""

    config: Annotated[
        Path | None,
        Field(description="YAML file with a section for each command."),
        Option("General", default="./pdd.yaml"),
    ] = None
    set: Annotated[
        tuple[str, ...],
        Field(description="Any setting; may be given several times."),
        Option("General", metavar="KEY=VALUE"),
    ] = ()
    as_json: Annotated[
        bool, Field(description="Print one JSON document on stdout."), Option("General", flags=("--json",))
    ] = False
    debug: Annotated[bool, Field(description="Show a traceback when something fails."), Option("General")] = False


@dataclass(frozen=True)
class Call(Generic[S, F]):
    """One call of a command: its unresolved settings, its flags, and its console."""

    model: type[S]
    section: Section
    options: Mapping[str, object]
    overrides: Sequence[str]
    file: Path | None
    flags: F
    console: Console

    def settings(self, options: Mapping[str, object] | None = None, stored: Path | None = None) -> S:
        """The resolved settings. `options` override those of the call; `stored` is an earlier run's config file."""
        return resolve(
            self.model,
            self.section,
            options={**self.options, **(options or {})},
            overrides=self.overrides,
            file=self.file,
            stored=stored,
        )

    def given(self) -> set[str]:
        """The settings of the command line and of --set, without those of files."""
        values = explicit_values(
            self.model, self.section, options=self.options, overrides=self.overrides, default=False
        )
        return set(values)

    def explicit_values(self) -> dict[str, Any]:
        """The values that the user set, without the defaults."""
        return explicit_values(self.model, self.section, options=self.options, overrides=self.overrides, file=self.file)


def command(model: type[S], section: Section, flags: type[F], run: Callable[[Call[S, F]], None]) -> Callable[..., None]:
    """The function that Typer registers for `run`. The docstring of `run` is the help text.

    Its parameters are the fields of `model` (nested ones included) and `flags` that carry an `Option`.
    """
    settings = {key.replace(".", "_"): (key, field) for key, field in _fields(model).items()}
    switches = _fields(flags)
    fields = {name: field for name, (_, field) in settings.items()} | switches | _fields(General)
    panels = get_args(Panel)
    by_panel = sorted(fields.items(), key=lambda item: panels.index(item[1].option.panel))
    parameters = sorted((_parameter(*item) for item in by_panel), key=_is_optional)

    def call(context: typer.Context, **values: Any) -> None:
        chosen = {name: _value(field, values[name]) for name, field in fields.items()}
        run(
            Call(
                model,
                section,
                options={key: chosen[name] for name, (key, _) in settings.items()},
                overrides=values["set"] or (),
                file=values["config"],
                flags=settings_from(flags, {name: chosen[name] for name in switches if chosen[name] is not None}),
                console=Console(json=bool(chosen["as_json"] or context.find_root().params.get("json"))),
            )
        )

    call.__doc__ = run.__doc__
    parameters.insert(0, inspect.Parameter("context", _KEYWORD, annotation=typer.Context))
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads them from here
    return call


@dataclass(frozen=True)
class _Field:
    """The properties of a settings field that the command line needs."""

    annotations: tuple[Any, ...]
    description: str
    option: Option
    default: object = None
    is_required: bool = False

    @property
    def is_multiple(self) -> bool:
        return any(
            get_origin(part) is tuple for annotation in self.annotations for part in (annotation, *get_args(annotation))
        )

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, if the type lists all of them."""
        leaves = self._leaves
        listed = [get_args(leaf) for leaf in leaves if get_origin(leaf) is Literal]
        return tuple(str(value) for values in listed for value in values) if len(listed) == len(leaves) else ()

    @property
    def kind(self) -> Any:
        """The type of one value; `str` if several types are possible, because the model parses it."""
        kinds = set(self._leaves)
        return kinds.pop() if kinds in ({bool}, *({kind} for kind in _METAVARS)) else str

    @property
    def _leaves(self) -> list[Any]:
        return [leaf for annotation in self.annotations for leaf in _leaves(annotation)]

    @property
    def help(self) -> str:
        choices = f" One of {', '.join(self.choices)}." if self.choices else ""
        default = self.option.default or format_default(self.default)
        # Square brackets are markup in Typer's help.
        return escape(f"{self.description}{choices}" + (f" [default: {default}]" if default else ""))


def _fields(model: type[BaseModel]) -> dict[str, _Field]:
    """The fields with an `Option` by dotted key. Members of a union that share a key are one field."""
    found: dict[str, list[FieldInfo]] = {}
    for key, field in _all_fields(model):
        found.setdefault(key, []).append(field)
    fields = {}
    for key, branches in found.items():
        for field in branches:
            for option in field.metadata:
                if isinstance(option, Option):
                    annotations = tuple(branch.annotation for branch in branches)
                    fields[key] = _Field(
                        annotations, field.description or "", option, field.default, field.is_required()
                    )
    return fields


def _all_fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield path + name, field
        for nested in models_in(field.annotation):
            yield from _all_fields(nested, f"{path}{name}.")


_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _parameter(name: str, field: _Field) -> inspect.Parameter:
    option = field.option
    kind: Any = Literal[field.choices] if field.choices else field.kind  # type: ignore[valid-type]
    if field.is_multiple:
        kind = str if option.comma_separated else GenericAlias(list, (kind,))
    info: Any
    if option.argument:
        info = typer.Argument(help=field.help, metavar=option.metavar, show_default=False)
    else:
        form = "A,B,…" if option.comma_separated else "NAME" if field.choices else _METAVARS.get(field.kind)
        info = typer.Option(
            *option.names(name),
            help=field.help,
            metavar=option.metavar or form,
            rich_help_panel=option.panel,
            show_default=False,
        )
    annotated: Any = Annotated
    if option.argument and field.is_required and not option.checked_later:
        return inspect.Parameter(name, _KEYWORD, annotation=annotated[kind, info])
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=annotated[kind | None, info])


def _is_optional(parameter: inspect.Parameter) -> bool:
    return parameter.default is not inspect.Parameter.empty


def _value(field: _Field, value: Any) -> object:
    """The value passed to the model; None for an option that was not used."""
    if field.option.comma_separated and value is not None:
        return tuple(part.strip() for part in value.split(",") if part.strip()) or None
    return (tuple(value) or None) if isinstance(value, list) else value


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types of single values in an annotation, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif origin in (Union, UnionType, tuple):
        for part in get_args(annotation):
            if part not in (NoneType, ...):
                yield from _leaves(part)
    else:
        yield annotation


def format_default(default: object) -> str:
    """A default as a user would type it; "" for a default that means "not set"."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, float):
        return f"{default:g}"
    return str(default) if isinstance(default, (str, int, Path)) and not isinstance(default, bool) else ""
