"""`pdd ui`: the guard of its server, the process that works, and the whole window in a real browser."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pdd_cli.ui.server import Receive, Scope, Send, TokenGuard
from pdd_cli.ui.worker import Event, Worker
from tests.helpers.commands import Outcome, invoke

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 500  # s; a busy machine


@pytest.fixture
def place(ground: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with LR images, a tiny installed base, and settings with which a run takes seconds."""
    folder = tmp_path / "place"
    shutil.copytree(ground / "realLR", folder / "photos")
    for file in ("base.safetensors", "features.safetensors"):
        shutil.copy(ground / file, folder)
    (folder / "pdd.yaml").write_text(
        "adapt: {batch_size: 1, crop: 16, device: cpu, hr_dir: own, offline: true, checkpoint_every: 4, steps: 8,\n"
        "        features: {network: efficientnet-lite0, weights: features.safetensors}}\n"
        "upscale: {device: cpu, engine: torch}\n"
    )
    monkeypatch.chdir(folder)
    assert invoke("fetch-weights", "tiny", "--from", "base.safetensors").code == 0
    return folder


@contextmanager
def _window(place: Path) -> Iterator[tuple[str, int, str]]:
    """The host, port and token of a running `pdd ui`."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}  # NiceGUI looks for them
    command = [sys.executable, "-m", "pdd_cli", "ui", "--no-browser"]
    process = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"pdd ui: http://(127\.0\.0\.1):(\d+)/\?token=([\w-]+)  .*\n", line)
        assert found, line
        yield found[1], int(found[2]), found[3]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _status(host: str, port: int, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers


def test_only_those_who_know_the_token_are_answered_and_the_port_is_taken(pdd: Callable[..., Outcome]) -> None:
    with _window(Path()) as (host, port, token):
        assert _status(host, port, "/")[0] == 403
        assert _status(host, port, "/?token=wrong")[0] == 403
        assert _status(host, port, "/?token=%C3%A9")[0] == 403
        assert _status(host, port, f"/?token={token}", Host="evil.example")[0] == 403
        assert _status(host, port, "/_nicegui_ws/socket.io/?EIO=4&transport=polling")[0] == 403
        status, headers = _status(host, port, f"/?token={token}")
        assert status == 200
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert _status(host, port, "/", Cookie=cookie.split(";")[0])[0] == 200
        assert _status(host, port, "/report", Cookie=cookie.split(";")[0])[0] == 404
        listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=False).stdout
        assert f"0.0.0.0:{port}" not in listening
        done = pdd("ui", "--no-browser", "--port", port)
        assert done.code == 2
        assert f"--port {port}" in done.err


def test_two_windows_at_once_keep_their_cookies() -> None:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def answers() -> list[int]:
        found: list[MutableMapping[str, Any]] = []
        cookies: dict[str, str] = {}  # a browser's, of the host

        async def receive() -> MutableMapping[str, Any]:
            return {}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                found.append(message)
                for key, value in message["headers"]:
                    if key == b"set-cookie":
                        cookie, _, _ = value.decode().partition(";")
                        cookies.update([cookie.split("=")])

        guards = {port: TokenGuard(page, f"token-{port}") for port in (8001, 8002)}
        for query in ("token=token-{}", ""):
            for port, guard in guards.items():
                header = "; ".join(f"{key}={value}" for key, value in cookies.items())
                headers: list[tuple[bytes, bytes]] = [
                    (b"host", f"127.0.0.1:{port}".encode()),
                    (b"cookie", header.encode()),
                ]
                scope = {"type": "http", "headers": headers, "query_string": query.format(port).encode()}
                await guard(scope, receive, send)
        return [message["status"] for message in found]

    assert asyncio.run(answers()) == [200] * 4


def _wait(worker: Worker, until: Callable[[Event], bool]) -> list[Event]:
    """The events up to the first that fulfils the condition."""
    events: list[Event] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for event in worker.events():
            events.append(event)
            if until(event):
                return events
        time.sleep(0.02)
    raise AssertionError(f"nothing fulfils the condition: {events[-5:]}")


def _ended(event: Event) -> bool:
    return event["kind"] in ("done", "failed")


@pytest.fixture
def worker(place: Path) -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


def test_one_process_does_one_task_after_another(worker: Worker, place: Path) -> None:
    lr = np.asarray(Image.open(place / "photos/0.png"))
    settings = {"device": "cpu", "engine": "torch"}
    worker.start("compare", {"versions": [("tiny", None)], "crop": lr, "settings": settings})
    with pytest.raises(RuntimeError, match="compare is running"):
        worker.start("upscale", {})
    (sr,) = _wait(worker, _ended)[-1]["result"]["images"]
    arguments = {"source": "photos", "output": "out", "weights": "tiny", "settings": settings}
    worker.start("upscale", arguments)
    outputs = _wait(worker, _ended)[-1]["result"]["outputs"]
    assert [Path(path).name for path in outputs] == ["0.png", "1.png", "2.png"]
    assert np.array_equal(np.asarray(Image.open("out/0.png")), sr)
    worker.start("upscale", {**arguments, "source": "nowhere"})
    failed = _wait(worker, _ended)[-1]
    assert "nowhere" in failed["message"]
    assert not failed["interrupted"]


@pytest.mark.slow
def test_adapt_stops_with_its_state_saved_and_continues(worker: Worker, place: Path) -> None:
    from pdd_cli.settings.adapt import AdaptConfig
    from pdd_cli.settings.resolve import explicit_values

    settings = {**explicit_values(AdaptConfig, "adapt", options={}), "steps": 5000}
    arguments = {"real_dir": "photos", "base": "tiny", "name": "mine", "settings": settings}
    worker.start("adapt", arguments)
    _wait(worker, lambda event: event["kind"] == "progress" and event["done"] >= 2)
    worker.cancel()
    events = _wait(worker, _ended)
    assert events[-1]["interrupted"]
    assert Path("runs/mine/checkpoint.pt").exists()
    reached = int(re.findall(r"after step (\d+) of 5000", events[-1]["message"])[0])
    worker.start("adapt", {**arguments, "resume": True, "settings": {**settings, "steps": reached + 8}})
    events = _wait(worker, _ended)
    assert events[-1]["kind"] == "done", events[-1]
    assert next(event for event in events if event["kind"] == "progress")["done"] == reached
    assert Path(events[-1]["result"]["report"]).exists()


def test_a_killed_process_is_reported_and_replaced(worker: Worker, place: Path) -> None:
    worker.start("upscale", {"source": "photos", "output": "out", "weights": "tiny"})
    assert worker._process is not None
    assert worker._process.pid is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    assert "has ended" in _wait(worker, _ended)[-1]["message"]
    worker.start("upscale", {"source": "photos", "output": "out", "weights": "tiny"})
    assert _wait(worker, _ended)[-1]["kind"] == "done"


def test_a_task_is_cancelled_before_it_has_begun(worker: Worker, place: Path) -> None:
    arguments = {"source": "photos", "output": "out", "weights": "tiny"}
    worker.start("upscale", arguments)
    worker.cancel()
    event = _wait(worker, _ended)[-1]
    assert (event["kind"], event["interrupted"]) == ("failed", True)
    worker.start("upscale", arguments)
    assert _wait(worker, _ended)[-1]["kind"] == "done"


def test_the_page_reads_images_as_pdd_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pdd_cli.ui.page import Session, open_rgb

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my photos"
    folder.mkdir()
    levels = np.linspace(0, 65535, 120, dtype=np.uint16).reshape(10, 12)
    Image.fromarray(levels).save(folder / "deep.png")
    found = np.asarray(open_rgb(folder / "deep.png"))
    assert np.array_equal(found, np.repeat((levels / 257).round().astype(np.uint8)[..., None], 3, 2))
    (folder / "torn.tga").write_bytes((folder / "deep.png").read_bytes()[:60])
    session = Session(adapt_settings={"runs_dir": "elsewhere"})
    session.choose("my photos")
    assert list(session.images) == ["deep.png", "torn.tga"]
    assert session.name == "my-photos"
    assert session.run_folder == Path("elsewhere/my-photos")


def test_the_page_takes_folders_of_subfolders_and_videos(tmp_path: Path) -> None:
    from pdd_cli.ui.page import Session

    for name in ("one/a.png", "two/a.png", "two/clip.mp4", "comics/c.cbz", "two/notes.txt", ".hidden/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(levels).save(tmp_path / "two/a.png")
    session = Session()
    session.choose(str(tmp_path))
    assert session.note == "1 comic, 2 images, 1 video"
    assert list(session.images) == ["one/a.png", "two/a.png"]
    session.image = "two/a.png"
    assert np.array_equal(session.crop(), levels)
    (tmp_path / "two/a.png").unlink()
    session.choose(str(tmp_path / "two"))
    assert (session.note, session.image, session.name) == ("1 video", "", "two")
    session.choose(str(tmp_path / "three"))
    assert session.note == f"{tmp_path / 'three'}: no images or videos found"


@pytest.mark.parametrize(("keep", "strength", "chosen"), [(True, 0.5, ("new", 0.5)), (False, 0.0, ("tiny", 1.0))])
def test_rejected_weights_are_not_chosen(keep: bool, strength: float, chosen: tuple[str, float]) -> None:
    from pdd_cli.ui.page import Session

    session = Session(base="tiny")
    result = {"name": "new", "keep": keep, "verdict": "", "reason": "", "strength": strength, "report": ""}
    session._on_done({"kind": "done", "result": result})
    assert (session.weights, session.strength) == chosen


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_window_in_a_browser(place: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE * 1000)
    foreign: list[str] = []
    with _window(place) as (host, port, token), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        address = f"http://{host}:{port}/"
        page.on("request", lambda one: None if one.url.startswith((address, "data:")) else foreign.append(one.url))
        page.goto(f"{address}?token={token}")

        page.get_by_label("Folder of your images").fill(str(place / "photos"))
        page.keyboard.press("Enter")
        expect(page.get_by_text("3 images", exact=True)).to_be_visible()
        expect(page.get_by_label("Name of the new weights")).to_have_value("photos")  # the page has taken the folder
        page.get_by_label("Name of the new weights").fill("mine")
        page.get_by_label("Start from").click()
        page.get_by_role("option", name="tiny").click()
        page.get_by_role("button", name="Adapt", exact=True).click()
        expect(page.get_by_text("finished", exact=True)).to_be_visible()
        page.screenshot(path=tmp_path / "adapt.png")
        assert (place / "runs/mine/report.html").exists()

        page.get_by_role("tab", name="Compare").click()
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.locator(".compare img")).to_have_count(2)
        page.screenshot(path=tmp_path / "compare.png")

        page.get_by_role("tab", name="Upscale").click()
        page.get_by_role("button", name="Upscale", exact=True).click()
        expect(page.get_by_text("3 files in")).to_be_visible()
        page.screenshot(path=tmp_path / "upscale.png")

        page.set_viewport_size({"width": 390, "height": 800})
        page.emulate_media(color_scheme="dark")
        page.get_by_role("tab", name="Adapt").click()
        page.get_by_label("Name of the new weights").fill("other")
        page.get_by_label("Minutes").fill("5")
        page.get_by_role("button", name="Adapt", exact=True).click()
        expect(page.locator(".preview")).to_be_hidden()  # that of the run before
        expect(page.get_by_text(re.compile("[1-9] of [0-9]+ steps"))).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_text("stopped", exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="Continue")).to_be_visible()
        page.screenshot(path=tmp_path / "phone.png")
        assert (place / "runs/other/checkpoint.pt").exists()
        assert sorted(path.name for path in (place / "photos-upscaled").glob("*.png")) == ["0.png", "1.png", "2.png"]
        browser.close()
    assert not foreign
