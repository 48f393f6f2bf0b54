"""Settings of `pdd export`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pdd_cli.settings.base import ExportForm, Fraction, Offline, Option, Settings


class ExportConfig(Settings):
    """`pdd export`."""

    weights: Annotated[
        str,
        Field(description="The model: NAME or FILE."),
        Option("Model", argument=True, metavar="WEIGHTS"),
    ]
    output: Annotated[
        str | None,
        Field(description="Folder for the files, or a file if there is one form."),
        Option("Output", argument=True, metavar="OUT", default="the current folder"),
    ] = None
    to: Annotated[
        tuple[ExportForm, ...],
        Field(description="Forms to write; pth is that of BasicSR."),
        Option("Output", comma_separated=True, default="the form of OUT's suffix"),
    ] = ()
    strength: Annotated[
        Fraction | None,
        Field(description="Strength of adapted weights, from 0 (their base) to 1 (fully adapted)."),
        Option("Model", default="as recommended in their card"),
    ] = None
    offline: Offline = False


class ExportFlags(Settings):
    """Flags of one call, which can't be set in a file."""

    overwrite: Annotated[bool, Field(description="Replace files that exist."), Option("Output")] = False
