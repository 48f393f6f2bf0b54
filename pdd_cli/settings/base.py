"""The base class of all settings, and the types that several commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]


# Groups of options, in the order of the help text.
Panel = Literal[
    "Input", "Weights", "Source", "Model", "Textures", "Size", "Metrics", "Comparison", "Method", "Training", "Output",
    "Video", "Hugging Face Hub", "Run", "Computing", "General",
]  # fmt: skip


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line. Fields without it can be set in files and by `--set` only.

    `flags`: its names; by default derived from the field's name. `default`: text that describes the default, if the
    default value doesn't. `metavar`: placeholder of the value in the help. `comma_separated`: several values are given
    as `A,B`. `argument`: it is a positional argument; `checked_later`: the command itself finds that it is missing.
    """

    panel: Panel
    flags: tuple[str, ...] = ()
    default: str = ""
    metavar: str | None = None
    comma_separated: bool = False
    argument: bool = False
    checked_later: bool = False

    def names(self, field: str) -> tuple[str, ...]:
        """The flags of the option for this field."""
        return self.flags or ("--" + field.replace("_", "-"),)


class Settings(BaseModel):
    """Base class of all settings: frozen, unknown keys are errors, ~ in paths is expanded."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    # Groups of fields of which one replaces the others: a source of higher precedence that sets one unsets the others.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return expand_home(value)


def expand_home(value: Any) -> Any:
    """Replace ~ by the home folder in a path, a text that starts with ~/, or a tuple of these."""
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111 - keeps ~NAME of an unknown user; Path raises
    if isinstance(value, str) and value.startswith(("~/", f"~{os.sep}")):
        return os.path.expanduser(value)  # noqa: PTH111
    return value


ExportForm = Literal["pth", "safetensors", "onnx", "ncnn"]
Device = Annotated[str, Field(description="auto, cpu, cuda, cuda:N or mps."), Option("Computing", metavar="NAME")]
EngineChoice = Literal["auto", "torch", "openvino", "winograd", "ncnn", "onnx"]
Engine = Annotated[
    EngineChoice,
    Field(description="Inference engine; auto: the fastest one that agrees with PyTorch."),
    Option("Computing"),
]
INFERENCE_DEVICES = "auto, cpu, cuda, cuda:N, mps, vulkan:N, directml, coreml, rocm, tensorrt."
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    Field(description="Number format of the computation; auto: the fastest on this device."),
    Option("Computing"),
]
Offline = Annotated[bool, Field(description="Never use the network."), Option("Computing")]

# The switches at inference.
Strength = Annotated[
    Fraction | None,
    Field(description="Strength of adapted weights, from 0 (their base) to 1 (fully adapted)."),
    Option("Model", default="as recommended in their card"),
]
Denoise = Annotated[
    Fraction | None,
    Field(description="For --weights realesr-general only: from 0 (keep the noise) to 1 (remove it)."),
    Option("Model", default="1"),
]
ColorCorrection = Annotated[
    Literal["none", "mean-std", "low-frequency", "wavelet"],
    Field(description="Transfer the colours of the input to the output."),
    Option("Model"),
]
Tta = Annotated[
    bool,
    Field(description="Average over 8 flips and transposes: fewer artefacts, but softer; takes 8 times as long."),
    Option("Model", flags=("--tta",)),
]
Mix = Annotated[
    Fraction,
    Field(description="Fraction of a plain resize to blend into the output, from 0 to 1."),
    Option("Model"),
]
SnapFlats = Annotated[
    bool,
    Field(description="Make nearly white and nearly black flat areas pure white and black, for scanned text."),
    Option("Model", flags=("--snap-flats",)),
]
