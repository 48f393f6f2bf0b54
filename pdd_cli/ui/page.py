"""The page of the window. A `Session` is its state, which stays when the page is loaded again."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from nicegui import app, events, ui
from numpy.typing import NDArray
from PIL import Image
from starlette.responses import FileResponse, Response

import pdd_cli
from pdd_cli.batch.plan import find_inputs
from pdd_cli.errors import PddError
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.find import is_image
from pdd_cli.ui.worker import Event, Task, Worker
from pdd_cli.video.decode import is_video
from pdd_cli.weights.store import valid_name_from

_CROP = 96  # LR pixels on each side of the compared crop
_ZOOM = 448  # CSS pixels of the compared crop
_BASE = "realesrgan"
_PREVIEW_EVERY = 10  # steps


@dataclass
class Session:
    """The inputs and the running task of the window's only user."""

    worker: Worker = field(default_factory=Worker)
    folder: str = ""
    inputs: list[Path] = field(default_factory=list)  # images, videos and comics below the folder
    images: dict[str, Path] = field(default_factory=dict)  # those of `inputs`, by path relative to the folder
    note: str = "Choose the folder with your images."
    name: str = ""
    base: str = _BASE
    minutes: float | None = None
    adapt_settings: Mapping[str, Any] = field(default_factory=dict)  # those of the configuration file
    upscale_settings: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""
    weights: str = _BASE
    strength: float = 1.0
    image: str = ""
    center: tuple[int, int] | None = None
    fraction: float = 0.0
    status: str = ""
    messages: list[str] = field(default_factory=list)
    problem: str = ""
    verdict: str = ""
    report: str = ""
    resumable: bool = False
    preview: Path | None = None
    compared: tuple[Image.Image, Image.Image] | None = None
    outputs: list[str] = field(default_factory=list)
    idle: bool = True
    _started: float = 0.0
    _first: float | None = None
    _unit: str = ""

    def close(self) -> None:
        """End the working process."""
        self.worker.stop()

    @property
    def run_folder(self) -> Path:
        """The folder of the run: `runs/NAME` in the current folder, or in the `runs_dir` of the configuration file."""
        return Path(self.adapt_settings.get("runs_dir", "runs")) / self.name

    def choose(self, folder: str) -> None:
        """Use the LR images and videos in this folder and below."""
        path = Path(folder).expanduser()
        self.folder, self.inputs = str(path), inputs_in(path)
        self.images = {found.relative_to(path).as_posix(): found for found in self.inputs if is_image(found)}
        self.note = _counted(self.inputs) or f"{path}: no images or videos found"
        self.image, self.center = next(iter(self.images), ""), None
        if self.inputs:
            self.name = valid_name_from(path.resolve().name)
            self.output = str(path.resolve().with_name(f"{path.resolve().name}-upscaled"))

    def start(self, task: Task, arguments: Mapping[str, Any]) -> None:
        """Start a task and clear what the last one left."""
        self.messages, self.problem, self.fraction, self.status = [], "", 0.0, "starting"
        self._started, self._first, self._unit = time.monotonic(), None, ""
        self.idle = False
        self.worker.start(task, arguments)

    def adapt(self, *, resume: bool = False) -> None:
        """Start or continue the run."""
        self.verdict = self.report = ""
        self.preview, self.resumable = None, False
        settings: dict[str, Any] = {"preview_every": _PREVIEW_EVERY, **self.adapt_settings}
        if self.minutes is not None and not resume:  # the minutes of the page win over the steps of the file
            settings.pop("steps", None)
            settings["minutes"] = self.minutes
        self.start(
            "adapt",
            {
                "real_dir": self.folder,
                "base": self.base,
                "name": self.name,
                "resume": resume,
                "settings": settings,
            },
        )

    def upscale(self) -> None:
        """Start upscaling the folder."""
        self.outputs = []
        strength = {"strength": self.strength} if self.is_adapted(self.weights) else {}
        settings = {**self.upscale_settings, **strength}
        self.start(
            "upscale",
            {"source": self.folder, "output": self.output, "weights": self.weights, "settings": settings},
        )

    def compare(self) -> None:
        """Start upscaling the crop with the base and with the chosen weights."""
        if self.idle and self.image:
            adapted = self.is_adapted(self.weights)
            versions = [(self.weights, 0.0), (self.weights, self.strength)] if adapted else [(self.weights, None)] * 2
            crop = np.ascontiguousarray(self.crop())
            self.start("compare", {"versions": versions, "crop": crop, "settings": self.upscale_settings})

    def is_adapted(self, name: str) -> bool:
        """Whether these are adapted weights, which have a strength."""
        return any(entry.name == name and entry.card.adapted is not None for entry in pdd_cli.installed_weights())

    def weights_names(self) -> list[str]:
        """The weights to choose from: adapted ones first, then the installed ones and the default base."""
        names = [entry.name for entry in pdd_cli.installed_weights()]
        return names if _BASE in names else [*names, _BASE]

    def crop(self) -> NDArray[np.uint8]:
        """The part of the LR image around the chosen point, or the middle, as (h, w, 3) in 0..255."""
        picture = open_rgb(self.images[self.image])
        x, y = self.center or (picture.width // 2, picture.height // 2)
        left = max(0, min(x - _CROP // 2, picture.width - _CROP))
        top = max(0, min(y - _CROP // 2, picture.height - _CROP))
        return np.asarray(picture.crop((left, top, *_corner(picture, left, top))))

    def update(self) -> None:
        """Take what the working process has reported since the last call."""
        for event in self.worker.events():
            task = self.worker.task
            getattr(self, f"_on_{event['kind']}")(event)
            if task is None:
                self.idle = True
        if not self.idle and self.worker.task == "adapt":
            previews = sorted((self.run_folder / "previews").glob("step_*.png"))
            self.preview = previews[-1] if previews else None

    def _on_message(self, event: Event) -> None:
        self.messages.append(event["text"])
        self.status = event["text"]

    def _on_warning(self, event: Event) -> None:
        self.messages.append(f"warning: {event['text']}")

    def _on_progress(self, event: Event) -> None:
        done, total, unit = event["done"], event["total"], event["unit"]
        if unit != self._unit:
            self._unit, self._started, self._first = unit, time.monotonic(), done
        self.fraction = min(1.0, done / total) if total else 0.0
        amount = (
            f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB" if unit == "bytes" else f"{int(done)} of {total} {unit}"
        )
        self.status = " ".join(filter(None, [event["name"], amount, self._time_left(done, total)]))

    def _time_left(self, done: float, total: int) -> str:
        """An estimate from the part that is done since the start or resumption."""
        progress = done - (self._first or 0)
        if progress <= 0 or done >= total:
            return ""
        seconds = (time.monotonic() - self._started) * (total - done) / progress
        return f"· about {seconds / 60:.0f} min left" if seconds >= 90 else f"· about {seconds:.0f} s left"

    def _on_done(self, event: Event) -> None:
        result = event["result"]
        self.status = "finished"
        if "verdict" in result:
            self.fraction, self.report = 1.0, result["report"]
            self.verdict = f"{result['verdict']}: {result['reason']}"
            if result["name"]:
                rejected = result["keep"] is False  # then strength is 0, which is the base
                self.weights = self.base if rejected else result["name"]
                self.strength = 1.0 if rejected else result["strength"]
        elif "images" in result:
            base, adapted = (Image.fromarray(image) for image in result["images"])
            self.compared = base, adapted
        else:
            self.fraction, self.outputs = 1.0, result["outputs"]

    def _on_failed(self, event: Event) -> None:
        self.status = "stopped" if event["interrupted"] else "failed"
        self.problem = _sentences(event["message"], event["hint"])
        self.resumable = (self.run_folder / "checkpoint.pt").exists()

    def show(self) -> None:
        """Build the page."""
        if not any(getattr(route, "path", "") == "/report" for route in app.routes):
            app.add_api_route("/report", self._serve_report)
        _Page(self).build()

    def _serve_report(self) -> Response:
        return FileResponse(self.report) if self.report else Response("There is no report yet.", 404)


def inputs_in(folder: Path, *, recursive: bool = True) -> list[Path]:
    """The images, videos and comics in a folder, as `pdd upscale` finds them; none if it can't be read."""
    try:
        return find_inputs(folder, recursive=recursive)[0]
    except PddError:
        return []


def _counted(inputs: Sequence[Path]) -> str:
    """The number of inputs of each kind, in words; "" if there are none."""
    kinds = Counter("image" if is_image(path) else "video" if is_video(path) else "comic" for path in inputs)
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items()))


def open_rgb(path: Path) -> Image.Image:
    """An image as pdd reads it, in 8-bit RGB. Raises InputError if it can't be read."""
    return Image.fromarray(read_image(path).to_rgb8())


def _corner(picture: Image.Image, left: int, top: int) -> tuple[int, int]:
    return min(left + _CROP, picture.width), min(top + _CROP, picture.height)


class _Page:
    """The elements of one open page. They follow the session, which several pages may show."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._shown: dict[str, object] = {}

    def build(self) -> None:
        session = self._session
        ui.add_css(_CSS)
        with ui.column().classes("w-full max-w-4xl mx-auto p-4 gap-4"):
            with ui.row().classes("items-baseline"):
                ui.label("pdd").classes("text-2xl font-bold")
                ui.label("Adapt a super-resolution model to your images, then upscale with it.")
            with ui.card().classes("w-full"):
                self._folder_input("Folder of your images", "folder", session.choose)
                ui.label().bind_text_from(session, "note").mark("note")
                self._thumbnails = ui.row().classes("gap-2")
            with ui.tabs().classes("w-full text-current") as tabs:
                adapt, compare, upscale = ui.tab("1 Adapt"), ui.tab("2 Compare"), ui.tab("3 Upscale")
            with ui.tab_panels(tabs, value=adapt).classes("w-full"):
                with ui.tab_panel(adapt):
                    self._adapt_panel()
                with ui.tab_panel(compare):
                    self._compare_panel()
                with ui.tab_panel(upscale):
                    self._upscale_panel()
            self._progress_card()
        ui.timer(0.3, self._refresh)

    def _folder_input(self, label: str, attribute: str, on_choice: Callable[[str], None]) -> None:
        """A path to type or to choose in a dialog."""
        with ui.row().classes("w-full items-center no-wrap"):
            field_ = ui.input(label).bind_value(self._session, attribute).classes("grow")
            field_.on("change", lambda: on_choice(str(field_.value)) if field_.value else None)

            async def browse() -> None:
                if chosen := await _choose_folder(str(field_.value or Path.home())):
                    on_choice(chosen)

            ui.button("Browse", on_click=browse).props("flat")

    def _adapt_panel(self) -> None:
        session = self._session
        with ui.row().classes("w-full items-center"):
            ui.input("Name of the new weights").bind_value(session, "name").classes("grow")
            ui.select(session.weights_names(), label="Start from").bind_value(session, "base").classes("w-40")
            ui.number("Minutes", min=1, placeholder="as needed").bind_value(session, "minutes").classes("w-28")
        with ui.row():
            ui.button("Adapt", on_click=lambda: self._try(session.adapt)).bind_enabled_from(session, "idle")
            ui.button("Continue", on_click=lambda: self._try(lambda: session.adapt(resume=True))).bind_visibility_from(
                session, "resumable"
            ).bind_enabled_from(session, "idle")
        ui.label().bind_text_from(session, "verdict").bind_visibility_from(session, "verdict").classes("text-lg").mark(
            "verdict"
        )
        ui.link("Open the report", "/report", new_tab=True).bind_visibility_from(session, "report")
        self._preview = ui.image().classes("w-full max-w-2xl preview")

    def _compare_panel(self) -> None:
        session = self._session
        with ui.row().classes("w-full items-center"):
            self._image = self._select("Image", "image").classes("grow")
            self._compare_weights = self._select("Weights", "weights")
        with ui.row().classes("w-full items-center no-wrap"):
            ui.label("Strength")
            slider = ui.slider(min=0, max=1, step=0.05).bind_value(session, "strength").classes("grow")
            slider.on("change", lambda: self._try(session.compare))
            ui.label().bind_text_from(session, "strength", lambda value: f"{value:.2f}")
            ui.button("Compare", on_click=lambda: self._try(session.compare)).bind_enabled_from(session, "idle")
        ui.label("Click on the image to choose the part to compare.").classes("text-sm")
        with ui.row().classes("gap-4"):
            self._whole = ui.interactive_image(on_mouse=self._on_click, events=["click"], cross=True)
            self._whole.classes("max-w-xs")
            self._slider = ui.html("", sanitize=False)

    def _upscale_panel(self) -> None:
        session = self._session

        def choose(folder: str) -> None:
            session.output = folder

        self._folder_input("Folder for the results", "output", choose)
        with ui.row().classes("w-full items-center"):
            self._upscale_weights = self._select("Weights", "weights")
            ui.button("Upscale", on_click=lambda: self._try(session.upscale)).bind_enabled_from(session, "idle")
        ui.label().bind_text_from(
            session, "outputs", lambda outputs: f"{len(outputs)} files in {session.output}" if outputs else ""
        ).mark("outputs")

    def _select(self, label: str, attribute: str) -> ui.select:
        """A choice whose options and value `_refresh` sets together: a value without its option is an error."""

        def choose(event: events.ValueChangeEventArguments[Any]) -> None:
            if event.value is not None:
                setattr(self._session, attribute, event.value)

        return ui.select([], label=label, on_change=choose).classes("min-w-40")

    def _progress_card(self) -> None:
        session = self._session
        with ui.card().classes("w-full").bind_visibility_from(session, "status"):
            with ui.row().classes("w-full items-center no-wrap"):
                ui.label().bind_text_from(session, "status").classes("grow").mark("status")
                ui.button("Cancel", on_click=session.worker.cancel).bind_visibility_from(
                    session, "idle", lambda idle: not idle
                ).props("flat")
            ui.linear_progress(show_value=False).bind_value_from(session, "fraction")
            ui.label().bind_text_from(session, "problem").bind_visibility_from(session, "problem").classes(
                "text-negative"
            ).mark("problem")
            with ui.expansion("Messages").classes("w-full"):
                ui.label().bind_text_from(session, "messages", "\n".join).classes("whitespace-pre-wrap text-sm")

    def _on_click(self, event: events.MouseEventArguments) -> None:
        self._session.center = round(event.image_x), round(event.image_y)
        self._try(self._session.compare)

    def _try(self, action: Callable[[], None]) -> None:
        """Do what a button says, unless something is missing or a task is running."""
        session = self._session
        if not session.idle:
            return
        if not (session.images if action == session.compare else session.inputs):
            ui.notify("Choose a folder with images first.", type="warning")
            return
        with _errors_shown(session):
            action()

    def _refresh(self) -> None:
        session = self._session
        session.update()
        if self._changed("images", tuple(session.images.values())):
            self._thumbnails.clear()
            with self._thumbnails:
                for name, path in islice(session.images.items(), 8):
                    _thumbnail(name, path)
            self._shown.pop("image", None)
        if self._changed("image", session.image):
            self._image.set_options(list(session.images), value=session.image or None)
            with _errors_shown(session):
                self._whole.set_source(open_rgb(session.images[session.image]) if session.image else "")
        if self._changed("preview", session.preview):
            self._preview.set_visibility(session.preview is not None)
            if session.preview is not None:
                self._preview.set_source(Image.open(session.preview).convert("RGB"))
        if self._changed("compared", session.compared) and session.compared:
            self._slider.set_content(_divider(*session.compared))
        if self._changed("idle", session.idle) and session.idle:
            self._shown.pop("weights", None)  # there may be new ones
        if self._changed("weights", session.weights):
            names = session.weights_names()
            for select in (self._compare_weights, self._upscale_weights):
                select.set_options([*names, *({session.weights} - set(names))], value=session.weights)

    def _changed(self, name: str, value: object) -> bool:
        """Whether this page shows another value."""
        if name in self._shown and self._shown[name] == value:
            return False
        self._shown[name] = value
        return True


def _thumbnail(name: str, path: Path) -> None:
    try:
        small = open_rgb(path)
    except PddError:
        ui.label(f"{name} can't be read").classes("text-sm")
        return
    small.thumbnail((192, 192))
    ui.image(small).classes("w-24").tooltip(name)


@contextmanager
def _errors_shown(session: Session) -> Iterator[None]:
    """An image that can't be read is shown as the problem of the session."""
    try:
        yield
    except PddError as error:
        session.status, session.problem = "failed", _sentences(error.message, error.hint)


def _sentences(message: str, hint: str) -> str:
    return ". ".join(filter(None, [message.rstrip("."), hint]))


def _divider(before: Image.Image, after: Image.Image) -> str:
    """Two images on top of each other, with a divider that the mouse moves."""
    sources = [_png_uri(image) for image in (before, after)]
    return (
        f'<div class="compare" style="width:min(100%,{_ZOOM}px)">'
        f'<img src="{sources[0]}" alt="base"><img class="after" src="{sources[1]}" alt="weights">'
        '<input type="range" min="0" max="100" value="50" aria-label="divider" '
        "oninput=\"this.parentElement.style.setProperty('--at', this.value + '%')\">"
        "<span>left: base</span><span>right: weights</span></div>"
    )


def _png_uri(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


async def _choose_folder(start: str) -> str | None:
    """A dialog that lists folders. The result is the chosen folder, or None."""
    current = Path(start).expanduser()
    while not current.is_dir():
        current = current.parent
    with ui.dialog() as dialog, ui.card().classes("w-full max-w-lg"):
        title = ui.label().classes("font-bold break-all")
        listing = ui.column().classes("w-full gap-0 max-h-80 overflow-auto no-wrap")
        with ui.row():
            ui.button("Use this folder", on_click=lambda: dialog.submit(title.text))
            ui.button("Cancel", on_click=dialog.close).props("flat")

    def go(folder: Path) -> None:
        title.text = str(folder)
        listing.clear()
        with listing:
            for path, name in ((folder.parent, ".."), *((path, path.name) for path in _folders(folder))):
                ui.button(name, icon="folder", on_click=lambda path=path: go(path)).props("flat no-caps align=left")
            here = _counted(inputs_in(folder, recursive=False)) or "no images or videos"
            ui.label(f"{here} directly in this folder").classes("text-sm p-2")

    go(current.resolve())
    return await dialog  # type: ignore[no-any-return]


def _folders(folder: Path) -> Sequence[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


_CSS = """
.body--dark .text-negative { color: #ff8a80 !important; }
.compare { position: relative; --at: 50%; }
.compare img { width: 100%; display: block; image-rendering: pixelated; }
.compare img.after { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.compare input { width: 100%; }
.compare span { margin-right: 1em; font-size: 0.8em; }
"""
