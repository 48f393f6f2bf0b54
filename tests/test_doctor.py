"""`pdd doctor`: facts for bug reports, whatever the state of the installation."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pdd_cli import __version__, doctor
from tests.helpers.commands import Outcome


def test_the_facts_are_shown_without_network(pdd: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PDD_MIRROR", "https://me:secret@host/folder?key=secret")
    Path("pdd.yaml").write_text("adapt: [broken")
    done = pdd("doctor", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["pdd"].startswith(__version__)
    assert facts["packages"]["torch"]
    assert facts["auto, images"].split()[0] in ("winograd", "openvino", "torch", "ncnn", "onnx")
    assert facts["Vulkan devices"]
    assert facts["auto, training"].split()[0] in ("winograd", "torch")
    assert "libavcodec" in facts["FFmpeg"]
    assert facts["environment"]["PDD_MIRROR"] == "https://…@host/folder?…"
    assert "secret" not in done.out
    assert [label for label, value in facts.items() if str(value).startswith("failed")] == []
    shown = pdd("doctor")
    assert shown.code == 0
    assert len(shown.out.splitlines()) < 45
    assert max(map(len, shown.out.splitlines())) <= 100


def test_a_probe_that_fails_is_replaced_by_the_reason(
    pdd: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise OSError(f"libfoo.so in {Path.home()}/lib is missing")

    for name in ("_gpus", "_engines", "_ffmpeg", "_folders", "_packages"):
        monkeypatch.setattr(doctor, name, fail)
    facts = json.loads(pdd("doctor", "--json").out)
    assert facts["GPUs"] == facts["folders"] == "failed: OSError: libfoo.so in ~/lib is missing"
    assert pdd("doctor").code == 0


def test_the_home_folder_is_shown_as_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert doctor._private("/home/me/x (3), /home/me, /home/melanie") == "~/x (3), ~, /home/melanie"


def test_sizes_do_not_count_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(2_000_000))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert doctor._size(tmp_path) == "2.0 MB"
    assert doctor._size(tmp_path / "none") == "none"
