"""The server of the window: on this computer only, and only for those who know the token."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from pdd_cli.errors import InputError

HOST = "127.0.0.1"
_COOKIE = "pdd_token"
_HOST_NAMES = {"127.0.0.1", "localhost"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class TokenGuard:
    """ASGI middleware: refuses every request without the token, and those that came by another host name.

    The token is in the address at first, and then in a cookie. The check of the host name prevents pages of other
    sites, whose names are made to point to this computer, from using the window.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, _, port = headers.get("host", "").partition(":")
        name = f"{_COOKIE}_{port}"  # browsers send the cookies of all ports: several windows may be open
        from_address = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        cookie = SimpleCookie(headers.get("cookie", "")).get(name)
        known = [one.encode() for one in (from_address, cookie.value if cookie else "")]
        is_local = host in _HOST_NAMES and (port.isdecimal() or not port)
        if not is_local or not any(secrets.compare_digest(self._token.encode(), one) for one in known):
            await _refuse(scope, send)
            return

        async def send_with_cookie(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and from_address:
                cookie_text = f"{name}={self._token}; Path=/; HttpOnly; SameSite=Strict"
                message["headers"] = [*message.get("headers", []), (b"set-cookie", cookie_text.encode())]
            await send(message)

        await self._app(scope, receive, send_with_cookie)


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"Open the address that pdd ui has printed.\n"})


def free_port(wanted: int) -> int:
    """`wanted`, or any free port if it is 0. Raises InputError if it is in use."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, wanted))
        except OSError as error:
            raise InputError(
                f"--port {wanted}: {error.strerror or error}", "Use another port, or leave --port out for any free one."
            ) from error
        return int(listener.getsockname()[1])


def serve(
    port: int,
    token: str,
    *,
    adapt_settings: Mapping[str, Any],
    upscale_settings: Mapping[str, Any],
    open_browser: bool,
    on_start: Callable[[str], None],
) -> None:
    """Serve the window until Ctrl-C.

    Args:
        adapt_settings: Settings of `adapt` that have no element on the page.
        upscale_settings: The same of `upscale`.
        port: A free port.
        token: The secret in the address.
        open_browser: Open the page in the default browser.
        on_start: Called with the address when the server accepts connections.
    """
    import webbrowser

    from nicegui import app, background_tasks, ui

    from pdd_cli.ui.page import Session

    address = f"http://{HOST}:{port}/?token={token}"
    session = Session(adapt_settings=adapt_settings, upscale_settings=upscale_settings)

    async def announce() -> None:
        while True:  # the server accepts connections a moment after its start-up
            try:
                _, writer = await asyncio.open_connection(HOST, port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                break
        on_start(address)
        if open_browser:
            webbrowser.open(address)

    app.add_middleware(TokenGuard, token=token)
    app.on_startup(lambda: background_tasks.create(announce(), name="announce"))
    app.on_shutdown(session.close)
    ui.run(
        session.show, host=HOST, port=port, title="pdd", dark=None, reload=False, show=False,
        show_welcome_message=False, uvicorn_logging_level="error",
    )  # fmt: skip
