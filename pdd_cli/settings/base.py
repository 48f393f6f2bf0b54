"""Base of all settings, and the kinds of values that several commands have."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]


# Groups of options, in the order in which help shows them.
Panel = Literal[
    "Input", "Weights", "Source", "Model", "Size", "Metrics", "Comparison", "Method", "Training", "Output", "Run",
    "Computing", "General",
]  # fmt: skip


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line; one without it is only for files and `--set`.

    `flags`: its names, by default the field's own. `default`: what is done without it, where the value does not say
    so. `metavar`: the form of the value. `comma_separated`: several values are given as `A,B`. `argument`: it is given
    by position.
    """

    panel: Panel
    flags: tuple[str, ...] = ()
    default: str = ""
    metavar: str | None = None
    comma_separated: bool = False
    argument: bool = False

    def names(self, field: str) -> tuple[str, ...]:
        """The flags of the option of this field."""
        return self.flags or ("--" + field.replace("_", "-"),)


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys forbidden, ~ in paths expanded."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @field_validator("*")
    @classmethod
    def _home_isexpanded(cls, value: Any) -> Any:
        return expanded(value)


def expanded(value: Any) -> Any:
    """Paths with the home folder for ~, as shells do outside of quotes; of other texts those that begin with ~/."""
    if isinstance(value, tuple):
        return tuple(map(expanded, value))
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111 - leaves a user that isn't known as it is
    if isinstance(value, str) and value.startswith(("~/", f"~{os.sep}")):
        return os.path.expanduser(value)  # noqa: PTH111
    return value


Device = Annotated[str, Field(description="auto, cpu, cuda, cuda:N or mps."), Option("Computing", metavar="NAME")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    Field(description="Number format of the model; auto: the fastest here."),
    Option("Computing"),
]
Offline = Annotated[bool, Field(description="Never use the network."), Option("Computing")]
