"""`--weights hf:USER/NAME[/FILE][@REVISION]`: weights in any repository of the Hugging Face Hub, here on localhost."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from pdd_cli.errors import InputError
from pdd_cli.weights.hub import HubReference, choose, parse
from tests.helpers.commands import Outcome
from tests.helpers.hub import use_hub
from tests.helpers.images import photo
from tests.helpers.networks import compact
from tests.helpers.server import Server, serving

Pdd = Callable[..., Outcome]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as state:
        state.linked = True
        use_hub(monkeypatch, state.address, tmp_path)
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


def upscale(pdd: Pdd, weights: str, *more: str) -> Outcome:
    Image.fromarray(photo(16, 16)).save("in.png")
    options = ("--device", "cpu", "--engine", "torch", *more)
    return pdd("upscale", "in.png", "out.png", "--weights", weights, *options)


def pth() -> bytes:
    buffer = io.BytesIO()
    torch.save(compact(2), buffer)
    return buffer.getvalue()


def test_weights_are_fetched_once_and_taken_from_the_cache_offline(server: Server, pdd: Pdd) -> None:
    publish(server, {"README.md": b"hello", "model.safetensors": save(compact(2)), "model.pth": pth()})
    refused = upscale(pdd, "hf:someone/models", "--dry-run")
    assert refused.code == 4
    assert "dry run" in refused.err
    done = upscale(pdd, "hf:someone/models")
    assert done.code == 0, done.err
    assert Image.open("out.png").size == (32, 32)
    assert not any(path.endswith(".pth") for path, _ in server.requests)
    server.requests.clear()
    done = upscale(pdd, "hf:someone/models", "--offline", "--overwrite")
    assert done.code == 0, done.err
    assert server.requests == []


def test_a_revision_and_a_file_can_be_named(server: Server, pdd: Pdd) -> None:
    publish(server, {"a/x2.pth": pth(), "a/other.pth": b"no weights"}, revision="v2")
    done = upscale(pdd, "hf:someone/models/a/x2.pth@v2")
    assert done.code == 0, done.err


def test_failures_are_reported(server: Server, pdd: Pdd) -> None:
    publish(server, {"README.md": b"hello"})
    for weights, code, words in (
        ("hf:someone/models", 2, "has no weights (README.md)"),
        ("hf:someone/models/x.pth", 2, "has no file x.pth"),
        ("hf:someone", 2, "hf:USER/NAME"),
        ("hf:someone/nothing", 4, "hf:someone/nothing: "),
    ):
        done = upscale(pdd, weights)
        assert done.code == code, done.err
        assert words in done.err
    publish(server, {"model.pth": pth()}, sha256="1" * 64)
    done = upscale(pdd, "hf:someone/models")
    assert done.code == 4
    assert "sha256" in done.err


def test_references_are_parsed_and_files_chosen() -> None:
    assert parse("hf:a/b") == HubReference("a/b", None, None)
    assert parse("hf:a/b/c/d.pth@main") == HubReference("a/b", "c/d.pth", "main")
    wanted = parse("hf:a/b")
    assert choose("hf:a/b", wanted, ["x.pth", "y.safetensors"]) == "y.safetensors"
    with pytest.raises(InputError, match="2 weights files"):
        choose("hf:a/b", wanted, ["x.pth", "y.pth"])


def test_evaluate_export_and_adapt_take_them_too(server: Server, pdd: Pdd, ground: Path) -> None:
    publish(server, {"model.pth": (ground / "base.safetensors").read_bytes()})
    for arguments in (
        ("evaluate", "--lr-dir", str(ground / "realLR"), "--weights", "hf:someone/models", "--metrics", "entropy",
         "--upscaled-dir", "up", "--device", "cpu"),
        ("export", "hf:someone/models", "--to", "pth"),
        ("adapt", "--real-dir", str(ground / "realLR"), "--base", "hf:someone/models", "--name", "mine", "--hr-dir",
         "own", "--device", "cpu", "--steps", "8", "--batch-size", "1", "--set", "crop=16",
         "--features", "efficientnet-lite0", "--feature-weights", str(ground / "features.safetensors")),
    ):  # fmt: skip
        done = pdd(*arguments)
        assert done.code == 0, done.err
    assert [path.name for path in Path("up").iterdir() if path.is_dir()] == ["someone-models"]
    info = json.loads(pdd("fetch-weights", "--info", "mine", "--json").out)["weights"][0]
    assert info["base"] == "hf:someone/models"
