"""The process that does the work of the window, one task at a time, through the Python interface.

It is a process of its own, so that the page answers while a model computes, and so that ending a task at once is safe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pdd_cli import Observer, PddError, Progress

if TYPE_CHECKING:
    from pdd_cli.weights.fetch import FetchEvent

Task = Literal["adapt", "upscale", "compare"]
Event = dict[str, Any]
"""`kind` is message, warning, progress (`name`, `done`, `total`, `unit`), done (`result`) or failed (`message`, `hint`,
`interrupted`)."""


class Worker:
    """Starts the process, sends tasks and receives events. The process is started with the first task."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self.task: Task | None = None

    def start(self, task: Task, arguments: Mapping[str, Any]) -> None:
        """Start a task. Raises RuntimeError while another one runs."""
        if self.task is not None:
            raise RuntimeError(f"{self.task} is running")
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), name="pdd ui worker", daemon=True)
            self._process.start()
            theirs.close()
        self.task = task
        self._connection.send((task, dict(arguments)))

    def events(self) -> Iterator[Event]:
        """The events since the last call. The last event of a task is done or failed."""
        while self.task is not None:
            try:
                if not self._connection.poll():
                    return
                event: Event = self._connection.recv()
            except (EOFError, OSError):
                event = _failed(
                    "the working process has ended", "It may have been out of memory. Finished files are kept."
                )
                self.stop()
            if event["kind"] in ("done", "failed"):
                self.task = None
            if event.get("interrupted"):
                self.stop()  # a library that was interrupted while it was imported can't be used any more
            yield event

    def cancel(self) -> None:
        """Ask the task to stop: `adapt` saves its state after this step, `upscale` keeps the finished files."""
        if self.task is not None:
            self._connection.send("cancel")

    def stop(self) -> None:
        """End the process at once. Files are complete or absent, because they are written to temporary ones first."""
        process, self._process, self.task = self._process, None, None
        if process is not None:
            process.kill()
            process.join()
            self._connection.close()


class _Reporter(Observer):
    """Sends what the core reports."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self.stopping = threading.Event()

    def stop_requested(self) -> bool:
        return self.stopping.is_set()

    def say(self, text: str) -> None:
        self._send({"kind": "message", "text": text})

    def warn(self, text: str) -> None:
        self._send({"kind": "warning", "text": text})

    @contextmanager
    def fetching(self) -> Iterator[Callable[[FetchEvent], None]]:
        def on_event(event: FetchEvent) -> None:
            if event.kind == "progress":
                self._send(_progress(f"download of {event.name}", event.done, event.total or 0, "bytes"))
            else:
                self.say(f"{event.name}: {event.kind} {event.text}")

        yield on_event

    def progress(
        self, description: str, total: int, *, workers: int = 1, pixels: int = 0
    ) -> AbstractContextManager[Progress]:
        return _sent_progress(self._send, description, total)


@contextmanager
def _sent_progress(send: Callable[[Event], None], unit: str, total: int) -> Iterator[Progress]:
    yield _SentProgress(send, unit, total)


class _SentProgress(Progress):
    """The progress in steps of `adapt`, or in files of `upscale` with the parts of the current file as fractions."""

    def __init__(self, send: Callable[[Event], None], unit: str, total: int) -> None:
        self._send, self._unit, self._total = send, unit, total
        self._files = 0
        self._name = ""

    def start(self, worker: int, name: str, unit: str = "", pixels: int = 0) -> None:
        self._name = name
        self._send(_progress(name, self._files, self._total, self._unit))

    def step(self, worker: int, done: int, total: int) -> None:
        if self._unit == "steps":
            self._send(_progress("", done, total, "steps"))
        elif total:
            self._send(_progress(self._name, self._files + done / total, self._total, self._unit))

    def advance(self, *, not_computed: int = 0) -> None:
        self._files += 1
        self._send(_progress(self._name, self._files, self._total, self._unit))


def _progress(name: str, done: float, total: int, unit: str) -> Event:
    return {"kind": "progress", "name": name, "done": done, "total": total, "unit": unit}


def _failed(message: str, hint: str = "", *, interrupted: bool = False) -> Event:
    return {"kind": "failed", "message": message, "hint": hint, "interrupted": interrupted}


def _serve(connection: Connection) -> None:
    """Do the tasks that arrive, until the other end closes."""
    sending = threading.Lock()
    arrived = threading.Condition()  # guards the next three
    queue: list[tuple[Task, dict[str, Any]]] = []
    running: Task | None = None
    reporter: _Reporter | None = None

    def send(event: Event) -> None:
        with sending:
            connection.send(event)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if running is not None:  # else it came after the end of the task
            raise KeyboardInterrupt

    def listen() -> None:
        while True:
            try:
                received = connection.recv()
            except (EOFError, OSError):  # the window is closed
                os._exit(0)
            with arrived:
                not_begun = received == "cancel" and bool(queue)
                if not_begun:
                    queue.clear()
                elif received != "cancel":
                    queue.append(received)
                    arrived.notify()
                elif running == "adapt" and reporter is not None:
                    reporter.stopping.set()
                elif running is not None:
                    _interrupt_main_thread()
            if not_begun:
                send(_failed("interrupted", interrupted=True))

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=listen, daemon=True, name="listener").start()
    while True:
        try:
            try:
                with arrived:
                    while not queue:
                        arrived.wait()
                    task, arguments = queue.pop(0)
                    reporter, running = _Reporter(send), task
                event: Event = {"kind": "done", "result": _TASKS[task](arguments, reporter)}
            finally:
                running = None
        except KeyboardInterrupt:
            event = _failed("interrupted", interrupted=True)
        except PddError as error:
            event = _failed(error.message, error.hint, interrupted=error.exit_code == 130)
        except Exception as error:
            event = _failed(f"a bug in pdd: {type(error).__name__}: {error}", "Please report it.")
        send(event)


def _interrupt_main_thread() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _adapt(arguments: Mapping[str, Any], observer: Observer) -> Event:
    import pdd_cli

    result = pdd_cli.adapt(**arguments, observer=observer)
    return {
        "name": result.weights.name if result.weights else "",
        "keep": result.verdict.keep,
        "verdict": result.verdict.label,
        "reason": result.verdict.reason,
        "strength": result.verdict.strength,
        "report": str(result.report or ""),
    }


def _upscale(arguments: Mapping[str, Any], observer: Observer) -> Event:
    import pdd_cli

    return {"outputs": [str(path) for path in pdd_cli.upscale(**arguments, observer=observer)]}


def _compare(arguments: Mapping[str, Any], observer: Observer) -> Event:
    """The SR of an LR crop by several weights. `versions` are pairs of a reference and a strength or None."""
    import pdd_cli

    images = []
    for weights, strength in arguments["versions"]:
        settings = {**arguments["settings"], **({} if strength is None else {"strength": strength})}
        with pdd_cli.load_model(weights, settings=settings) as model:
            images.append(model.upscale(arguments["crop"]))
    return {"images": images}


_TASKS: dict[Task, Callable[[Mapping[str, Any], Observer], Event]] = {
    "adapt": _adapt,
    "upscale": _upscale,
    "compare": _compare,
}
