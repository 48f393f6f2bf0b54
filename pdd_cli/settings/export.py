"""Settings of `pdd export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pdd_cli.settings.base import ExportForm, Fraction, Offline, Option, Settings


class ExportConfig(Settings):
    """`pdd export`."""

    weights: Annotated[
        str,
        Field(description="The model: NAME, FILE or hf:USER/NAME."),
        Option("Model", argument=True, metavar="WEIGHTS"),
    ]
    output: Annotated[
        str | None,
        Field(description="Folder for the files, or a file name for a single format."),
        Option("Output", argument=True, metavar="OUT", default="the current folder"),
    ] = None
    to: Annotated[
        tuple[ExportForm | Literal["hub"], ...],
        Field(description="Formats to write; pth: BasicSR's format; hub: upload to the Hugging Face Hub."),
        Option("Output", comma_separated=True, default="the suffix of OUT"),
    ] = ()
    repo: Annotated[
        str | None,
        Field(description="Repository for --to hub; it is created if it doesn't exist."),
        Option("Hugging Face Hub", metavar="USER/NAME"),
    ] = None
    private: Annotated[bool, Field(description="Make a new repository private."), Option("Hugging Face Hub")] = False
    pictures: Annotated[
        bool,
        Field(description="Show crops of the run's images, before and after, in the model card."),
        Option("Hugging Face Hub", flags=("--pictures/--no-pictures",), default="pictures"),
    ] = True
    strength: Annotated[
        Fraction | None,
        Field(description="Strength of adapted weights, from 0 (their base) to 1 (fully adapted)."),
        Option("Model", default="as recommended in their card"),
    ] = None
    offline: Offline = False


class ExportFlags(Settings):
    """Flags of one call, which can't be set in a file."""

    overwrite: Annotated[bool, Field(description="Replace files that pdd wrote."), Option("Output")] = False
