"""Settings of `pdd ui`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pdd_cli.settings.base import Option, Settings


class UiConfig(Settings):
    """`pdd ui`."""

    port: Annotated[
        int,
        Field(ge=0, le=65535, description="Port on this computer; 0: any free port."),
        Option("Run"),
    ] = 0


class UiFlags(Settings):
    """Flags of one call, which can't be set in a file."""

    no_browser: Annotated[bool, Field(description="Print the address; do not open a browser."), Option("Run")] = False
