"""`pdd export --to hub`, and `fetch-weights --info hf:…`, with a server on localhost that answers as the Hub does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load, save, save_file
from spandrel import ModelLoader

from pdd_cli.models.loading import interpolated, state_sha256
from pdd_cli.weights.store import Card, Store
from tests.helpers.commands import Outcome
from tests.helpers.hub import Hub, hub_serving, use_hub
from tests.helpers.images import photo
from tests.helpers.networks import compact

Pdd = Callable[..., Outcome]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_serving() as served:
        use_hub(monkeypatch, served.address, tmp_path)
        yield served


@pytest.fixture
def login(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")


def install(runs: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Installs `base` and `mine`, adapted from it in a run whose strength 0.5 is recommended; returns their tensors."""
    base = compact(2)
    mine = {key: tensor * 1.1 for key, tensor in base.items()}
    store = Store.default()
    fields: dict[str, Any] = {"architecture": "RealESRGAN Compact", "scale": 2, "licence": "BSD-3-Clause"}
    fields |= {"source": "pdd adapt, 8 steps from /home/someone/base.pth", "created": "2026-11-30T10:00:00+00:00"}
    store.add(Card(name="base", **fields), base)
    settings = {"real_dir": "/home/someone/photos", "hr_dir": "/home/someone/hr", "runs_dir": str(runs), "name": "mine"}
    adapted = {"verdict": "keep", "reason": "it is better by 1.2 dB", "strength": 0.5, "steps": 8, "real_images": 5}
    card = Card(name="mine", base="base", base_sha256=state_sha256(base), adapted={**adapted, "settings": settings},
                **fields)  # fmt: skip
    store.add(card, mine)
    if runs is not None:
        run = runs / "mine"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("adapt: {real_dir: /home/someone/photos}")
        save_file(mine, run / "best.safetensors")
        scores = {"consistency": 30.0, "drift": 0.5, "texture": 2.0, "grain": 1.0}
        found = [{"strength": strength, "score": strength, **scores} for strength in (0.5, 1.0)]
        (run / "verdict.json").write_text(json.dumps({"keep": True, "base": scores, "adapted": found}))
        picture = Image.fromarray(photo(24, 60))
        exif = Image.Exif()
        exif[0x010E] = "/home/someone/photos"
        picture.save(run / "comparison.png", exif=exif)
    return base, mine


@pytest.mark.slow
@pytest.mark.usefixtures("login")
def test_what_is_uploaded_comes_back(pdd: Pdd, hub: Hub, tmp_path: Path) -> None:
    base, mine = install(tmp_path / "runs")
    done = pdd("export", "mine", "--to", "hub,pth", "--repo", "someone/photos-2x", "--private", "out", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert Path("out/mine.pth").exists()
    repo = hub.repos["someone/photos-2x"]
    assert repo.private
    commit, files = repo.commits[-1]
    assert document["uploaded"]["commit"] == commit
    assert set(files) == {".gitattributes", "README.md", "mine.safetensors", "mine.onnx", "comparison.png"}
    assert "crops of your images" in done.err

    # Software that is not pdd gives the same image, at the recommended strength.
    lr = torch.rand(1, 3, 20, 16)
    expected = ModelLoader().load_from_state_dict(interpolated(base, mine, 0.5)).model.eval()(lr).detach().numpy()
    found = ModelLoader().load_from_state_dict(load(files["mine.safetensors"])).model.eval()(lr).detach().numpy()
    assert np.array_equal(found, expected)
    session = onnxruntime.InferenceSession(files["mine.onnx"], providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"lr": lr.numpy()})[0] - expected).max() < 1e-4

    # The card: for the Hub and for people; nothing of the owner's folders.
    text = files["README.md"].decode()
    header = yaml.safe_load(text.split("---")[1])
    assert (header["license"], header["pipeline_tag"]) == ("bsd-3-clause", "image-to-image")
    assert {"super-resolution", "pdd", "2x"} <= set(header["tags"])
    for words in ("--weights hf:someone/photos-2x", "it is better by 1.2 dB", "| strength 0.5 |", "| base | 0.000 |",
                  "(comparison.png)", "| domain | photos, 5 images |", "BSD-3-Clause"):  # fmt: skip
        assert words in text
    assert all(b"/home/someone" not in content and b"runs/mine" not in content for content in files.values())
    picture = Image.open(BytesIO(files["comparison.png"]))
    assert not picture.getexif()
    assert np.array_equal(np.asarray(picture), photo(24, 60))

    # Back again, verified, by its commit; the card says where it is from.
    hub.sent.clear()
    info = pdd("fetch-weights", "--info", "hf:someone/photos-2x", "--json")
    assert info.code == 0, info.err
    for words in ("base", "photos, 5 images", "keep. it is better by 1.2 dB", "BSD-3-Clause", commit):
        assert words in " ".join(info.err.split())
    assert json.loads(info.out)["weights"][0]["adapted"]["exported_strength"] == 0.5
    Image.fromarray(photo(16, 16)).save("in.png")
    options = ("--device", "cpu", "--engine", "torch", "--precision", "fp32", "--json")
    for weights, out in ((f"hf:someone/photos-2x@{commit}", "theirs.png"), ("mine", "ours.png")):
        done = pdd("upscale", "in.png", out, "--weights", weights, *options)
        assert done.code == 0, done.err
    assert np.array_equal(np.asarray(Image.open("theirs.png")), np.asarray(Image.open("ours.png")))
    offline = pdd("fetch-weights", "--info", f"hf:someone/photos-2x@{commit}", "--offline")
    assert (offline.code, "it is better by 1.2 dB" in " ".join(offline.out.split())) == (0, True)

    # Again: only with --overwrite, in a new commit.
    done = pdd("export", "mine", "--to", "hub", "--repo", "someone/photos-2x")
    assert (done.code, "it already has README.md, comparison.png, mine.onnx" in done.err) == (2, True)
    again = ("export", "mine", "--to", "hub", "--repo", "someone/photos-2x", "--overwrite", "--no-pictures")
    assert pdd(*again, "--strength", "1").code == 0
    newest = repo.commits[-1][1]
    assert torch.equal(load(newest["mine.safetensors"])["body.0.weight"], mine["body.0.weight"])
    assert "comparison.png" not in newest["README.md"].decode()


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("present", ["other weights", "damaged", "nothing"])
def test_pictures_of_another_run_are_not_uploaded(pdd: Pdd, hub: Hub, tmp_path: Path, present: str) -> None:
    # The card is another's and names a folder of this machine.
    base, _ = install(tmp_path / "runs")
    weights = tmp_path / "runs/mine/best.safetensors"
    weights.unlink()
    if present == "other weights":
        save_file(base, weights)
    elif present == "damaged":
        weights.write_bytes(b"{}")
    done = pdd("export", "mine", "--to", "hub", "--repo", "someone/photos-2x")
    assert done.code == 0, done.err
    assert f"the model card has no pictures and no scores: {weights} doesn't contain these weights" in done.err
    files = hub.repos["someone/photos-2x"].commits[-1][1]
    assert "comparison.png" not in files
    assert "| base | 0.000 |" not in files["README.md"].decode()


@pytest.mark.usefixtures("login")
def test_a_repository_of_others_is_not_replaced(pdd: Pdd, hub: Hub) -> None:
    install()
    theirs = {"README.md": b"---\nlicense: mit\n---\n# mine", "mine.safetensors": b"theirs"}
    hub.add("someone/other", theirs)
    done = pdd("export", "mine", "--to", "hub", "--repo", "someone/other", "--overwrite")
    assert (done.code, "its model card was not written by pdd" in done.err) == (2, True)
    assert hub.repos["someone/other"].commits[-1][1] == theirs


@pytest.mark.usefixtures("login")
def test_failed_uploads_are_reported(pdd: Pdd, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    for arguments, code, words in (
        (("--to", "hub"), 2, "--to hub needs --repo USER/NAME"),
        (("--to", "pth", "--repo", "someone/x"), 2, "--repo needs --to hub"),
        (("--to", "hub", "--repo", "x"), 2, "Write USER/NAME."),
        (("--to", "hub", "--repo", "a/b/c"), 2, "Write USER/NAME."),
        (("--to", "hub", "--repo", "someone/..x"), 2, "Write USER/NAME."),
        (("--to", "hub", "--repo", "someone/x", "--offline"), 2, "can't be combined with --offline"),
        (("--to", "hub", "--repo", "nobody/x"), 4, "answered 403"),
    ):
        done = pdd("export", "mine", *arguments)
        assert (done.code, words in done.err) == (code, True), done.err
    for refused, words in (
        ("POST /someone/x.git/info/lfs/objects/batch", "answered 403"),
        ("PUT /lfs", "answered 403"),
        ("POST /api/models/someone/x/commit/main", "answered 403"),
    ):
        hub.status = {refused: 403}
        done = pdd("export", "mine", "--to", "hub", "--repo", "someone/x", "--no-pictures")
        assert (done.code, words in done.err) == (4, True), done.err
        assert set(hub.repos["someone/x"].commits[-1][1]) == {".gitattributes"}
    hub.status = {"POST /api/models/someone/x/commit/main": 403}
    done = pdd("export", "mine", "--to", "hub,pth", "--repo", "someone/x")  # the file is written all the same
    assert (done.code, Path("mine.pth").exists()) == (3, True), done.err
    hub.status = {}
    monkeypatch.setenv("HF_TOKEN", "expired")
    done = pdd("export", "mine", "--to", "hub", "--repo", "someone/x")
    assert (done.code, "answered 401" in done.err, "The token is invalid" in done.err) == (4, True, True)
    monkeypatch.delenv("HF_TOKEN")
    done = pdd("export", "mine", "--to", "hub", "--repo", "someone/x")
    assert (done.code, "not logged in" in done.err) == (4, True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    done = pdd("export", "mine", "--to", "hub", "--repo", "someone/x")
    assert (done.code, "127.0.0.1 refuses the connection" in done.err) == (4, True)


def test_references_that_are_no_weights_are_named(pdd: Pdd, hub: Hub) -> None:
    hub.add("someone/models", {"model.pth": b"<!doctype html>", "README.md": b"hello"})
    hub.add("someone/text", {"README.md": b"hello"})
    hub.datasets.add("someone/images")
    Image.fromarray(photo(16, 16)).save("in.png")
    for command in (("fetch-weights", "--info"), ("upscale", "in.png", "out.png", "--weights")):
        for reference, code, words in (
            ("hf:someone/models@v9", 2, "has no revision v9\nIts branches and tags: main."),
            ("hf:someone/images", 2, "someone/images is a dataset, not a model"),
            ("hf:someone/text", 2, "has no weights (README.md)"),
            ("hf:someone/gone", 4, "there is no model someone/gone on the Hub, or it is private"),
        ):
            done = pdd(*command, reference)
            assert (done.code, words in done.err) == (code, True), done.err
    done = pdd("upscale", "in.png", "out.png", "--weights", "hf:someone/models")
    assert (done.code, "an HTML page" in done.err) == (2, True), done.err


def test_info_of_a_large_file_downloads_only_its_header(pdd: Pdd, hub: Hub) -> None:
    state = {**compact(2), "unused": torch.zeros(500_000)}
    card = Card(name="theirs", architecture="RealESRGAN Compact", scale=2, licence="MIT", source="test", created="2026")
    hub.add("a/b", {"model.safetensors": save(state, {"pdd_card": card.as_json()})})
    hub.add("a/plain", {"x.pth": b"PK", "README.md": b"---\nlicense: mit\ntags: [sr]\nbase_model: c/d\n---\n"})
    done = pdd("fetch-weights", "--info", "hf:a/b", "hf:a/plain", "--json")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["weights"]
    assert (first["name"], first["licence"], first["file"]) == ("theirs", "MIT", "model.safetensors")
    assert hub.sent["/a/b/resolve/" + first["commit"] + "/model.safetensors"] < 200_000
    assert second["labels"]["base_model"] == "c/d"
    assert "none of pdd; the repository says:" in " ".join(done.err.split())
