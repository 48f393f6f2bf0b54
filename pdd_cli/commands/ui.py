"""`pdd ui`."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets

from pdd_cli.errors import InputError
from pdd_cli.options import Call, command
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import explicit_values
from pdd_cli.settings.ui import UiConfig, UiFlags
from pdd_cli.settings.upscale import UpscaleConfig


def _ui(call: Call[UiConfig, UiFlags]) -> None:
    """Open a page in the browser to adapt, compare and upscale without a terminal.

    The page can be reached only from this computer, with the address that is
    printed, and loads nothing from the network. The sections adapt and upscale
    of pdd.yaml apply. Ctrl-C stops it; an interrupted run can be continued.

    Examples:
      pdd ui
      pdd ui --port 8080 --no-browser
    """
    settings = call.settings()
    if importlib.util.find_spec("nicegui") is None:
        raise InputError("pdd ui needs the package nicegui", "Install it: pip install 'pdd-cli[ui]'")

    from pdd_cli.ui.server import free_port, serve

    def on_start(address: str) -> None:
        call.console.say(f"pdd ui: {address}  (Ctrl-C stops it)")

    port, token = free_port(settings.port), secrets.token_urlsafe(16)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        serve(
            port,
            token,
            adapt_settings=explicit_values(AdaptConfig, "adapt", options={}, file=call.file),
            upscale_settings=explicit_values(UpscaleConfig, "upscale", options={}, file=call.file),
            open_browser=not call.flags.no_browser,
            on_start=on_start,
        )


ui = command(UiConfig, "ui", UiFlags, _ui)
