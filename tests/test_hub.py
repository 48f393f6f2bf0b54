"""`--weights hf:USER/NAME[/FILE][@REVISION]`: weights in any repository of the Hugging Face Hub, here on localhost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from pdd_cli.errors import InputError
from pdd_cli.weights.hub import HubReference, choose, parse
from tests.helpers.images import photo
from tests.helpers.networks import compact
from tests.helpers.server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        state.linked = True
        yield state


def publish(server: Server, files: dict[str, bytes], revision: str = "main", sha256: str | None = None) -> None:
    """Serve a repository as the Hub does; `sha256` is stated instead of the right one."""
    siblings = []
    for name, content in files.items():
        digest = sha256 or hashlib.sha256(content).hexdigest()
        lfs = {"sha256": digest, "size": len(content), "pointerSize": 130}
        siblings.append({"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs})
        server.files[f"/someone/models/resolve/{revision}/{name}"] = content
    info = {"id": "someone/models", "sha": "0" * 40, "siblings": siblings, "tags": [], "private": False}
    server.files[f"/api/models/someone/models/revision/{revision}"] = json.dumps(info).encode()
    server.files["/api/models/someone/models"] = json.dumps(info).encode()


def pdd(server: Server, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1",
        "PDD_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pdd_cli", *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def upscale(server: Server, tmp_path: Path, weights: str, *more: str) -> subprocess.CompletedProcess[str]:
    Image.fromarray(photo(16, 16)).save(tmp_path / "in.png")
    options = ("--device", "cpu", "--engine", "torch", *more)
    return pdd(server, tmp_path, "upscale", "in.png", "out.png", "--weights", weights, *options)


def pth() -> bytes:
    buffer = io.BytesIO()
    torch.save(compact(2), buffer)
    return buffer.getvalue()


def test_weights_are_fetched_once_and_taken_from_the_cache_offline(server: Server, tmp_path: Path) -> None:
    publish(server, {"README.md": b"hello", "model.safetensors": save(compact(2)), "model.pth": pth()})
    refused = upscale(server, tmp_path, "hf:someone/models", "--dry-run")
    assert refused.returncode == 4
    assert "dry run" in refused.stderr
    done = upscale(server, tmp_path, "hf:someone/models")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (32, 32)
    assert not any(path.endswith(".pth") for path, _ in server.requests)
    server.requests.clear()
    done = upscale(server, tmp_path, "hf:someone/models", "--offline", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert server.requests == []


def test_a_revision_and_a_file_can_be_named(server: Server, tmp_path: Path) -> None:
    publish(server, {"a/x2.pth": pth(), "a/other.pth": b"no weights"}, revision="v2")
    done = upscale(server, tmp_path, "hf:someone/models/a/x2.pth@v2")
    assert done.returncode == 0, done.stderr


def test_failures_are_reported(server: Server, tmp_path: Path) -> None:
    publish(server, {"README.md": b"hello"})
    for weights, code, words in (
        ("hf:someone/models", 2, "has no weights (README.md)"),
        ("hf:someone/models/x.pth", 2, "has no file x.pth"),
        ("hf:someone", 2, "hf:USER/NAME"),
        ("hf:someone/nothing", 4, "hf:someone/nothing: "),
    ):
        done = upscale(server, tmp_path, weights)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    publish(server, {"model.pth": pth()}, sha256="1" * 64)
    done = upscale(server, tmp_path, "hf:someone/models")
    assert done.returncode == 4
    assert "sha256" in done.stderr


def test_references_are_parsed_and_files_chosen() -> None:
    assert parse("hf:a/b") == HubReference("a/b", None, None)
    assert parse("hf:a/b/c/d.pth@main") == HubReference("a/b", "c/d.pth", "main")
    wanted = parse("hf:a/b")
    assert choose("hf:a/b", wanted, ["x.pth", "y.safetensors"]) == "y.safetensors"
    with pytest.raises(InputError, match="2 weights files"):
        choose("hf:a/b", wanted, ["x.pth", "y.pth"])


def test_evaluate_export_and_adapt_take_them_too(server: Server, tmp_path: Path, ground: Path) -> None:
    publish(server, {"model.pth": (ground / "base.safetensors").read_bytes()})
    for arguments in (
        ("evaluate", "--lr-dir", str(ground / "realLR"), "--weights", "hf:someone/models", "--metrics", "entropy",
         "--upscaled-dir", "up", "--device", "cpu"),
        ("export", "hf:someone/models", "--to", "pth"),
        ("adapt", "--real-dir", str(ground / "realLR"), "--base", "hf:someone/models", "--name", "mine", "--hr-dir",
         "own", "--device", "cpu", "--steps", "8", "--batch-size", "1", "--set", "crop=16",
         "--features", "efficientnet-lite0", "--feature-weights", str(ground / "features.safetensors")),
    ):  # fmt: skip
        done = pdd(server, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "up").iterdir() if path.is_dir()] == ["someone-models"]
    info = json.loads(pdd(server, tmp_path, "fetch-weights", "--info", "mine", "--json").stdout)["weights"][0]
    assert info["base"] == "hf:someone/models"
