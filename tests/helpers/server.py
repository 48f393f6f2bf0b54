"""A real HTTP server on localhost that serves files, with the failings that real servers have."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """`files`: path → content. `break_after`: bytes after which each of the next answers is cut, one entry an answer.

    `requests` gathers (path, Range header) of what was asked for.
    """

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    html: set[str] = field(default_factory=set)
    ranges: bool = True
    tags: bool = True  # says which version of a file it sends
    status: dict[str, int] = field(default_factory=dict)  # path → what it answers instead of the file
    redirects: dict[str, str] = field(default_factory=dict)  # path → address
    linked: bool = False  # says the file's sha256 as the Hugging Face Hub does: this one, or the right one
    linked_as: str = ""
    silent: set[str] = field(default_factory=set)  # paths that get no answer
    after_break: Callable[[], None] = lambda: None
    stopped: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0].split("#")[0]
            asked = self.headers.get("Range")
            state.requests.append((path, asked))
            if path in state.silent:
                state.stopped.wait(60)
                self.close_connection = True
                return
            if path in state.redirects:
                self.send_response(302)
                self.send_header("Location", state.redirects[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if path in state.status or path not in state.files:
                self.send_response(state.status.get(path, 404))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = state.files[path]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            if self.headers.get("If-Range", tag) != tag:
                start = 0
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            kind = "text/html" if path in state.html or path.endswith("/") else "application/octet-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content) - start))
            # What the Hugging Face Hub's client wants to know of a file.
            if state.tags:
                self.send_header("ETag", tag)
            if state.linked:
                self.send_header("X-Linked-ETag", state.linked_as or tag)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if not body:
                return
            piece = content[start:]
            if state.break_after and kind != "text/html":
                piece = piece[: state.break_after.pop(0)]
                self.wfile.write(piece)
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                state.after_break()
                return
            self.wfile.write(piece)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Server(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
