"""Models of the user: `pdd fetch-weights NAME --from FILE`, `--info`, `--remove` and `--list`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pdd_cli.cli import app
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.catalog import CATALOG
from pdd_cli.weights.states import state_sha256
from pdd_cli.weights.store import Card, Entry, Store, read_card
from tests.helpers.commands import Outcome
from tests.helpers.images import photo
from tests.helpers.networks import compact, rrdbnet, swinir

Pdd = Callable[..., Outcome]


def adapted(name: str = "realLR", base: str = "realesrgan") -> Entry:
    """Weights in the store with the card of a run of `pdd adapt`."""
    settings = AdaptConfig(real_dir=Path("/photos/realLR"), steps=123, base=base).model_dump(mode="json")
    facts = {
        "steps": 123, "features": "vgg19", "real_images": 24, "verdict": "keep", "reason": "sharper", "strength": 0.75,
        "settings": settings,
    }  # fmt: skip
    card = Card(
        name=name, architecture="RRDBNet", scale=4, licence="MIT", source="pdd adapt", created="2026-11-29T14:00:00",
        base=base, adapted=facts,
    )  # fmt: skip
    return Store.default().add(card, rrdbnet())


@pytest.mark.parametrize(
    ("state", "architecture", "scale"),
    [(rrdbnet, "RRDBNet", 4), (lambda: compact(2), "RealESRGAN Compact", 2), (swinir, "SwinIR", 2)],
)
def test_any_model_is_installed_and_upscales(
    pdd: Pdd, state: Callable[[], Mapping[str, torch.Tensor]], architecture: str, scale: int
) -> None:
    tensors = dict(state())
    torch.save({"params_ema": tensors}, "x.pth")
    Image.fromarray(photo(24, 32)).save("in.png")
    done = pdd("fetch-weights", "their-model", "--from", "x.pth", "--json")
    assert done.code == 0, done.err
    card = json.loads(done.out)["weights"][0]
    assert (card["architecture"], card["scale"], card["licence"]) == (architecture, scale, "unknown")
    assert card["content_sha256"] == state_sha256(tensors)
    assert f"{architecture} x{scale}" in done.err
    for weights, output in (("their-model", "a.png"), ("x.pth", "b.png")):
        made = pdd("upscale", "in.png", output, "--weights", weights, "--device", "cpu", "--engine", "torch")
        assert made.code == 0, made.err
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))


def test_the_card_in_or_beside_the_file_is_kept(pdd: Pdd) -> None:
    entry = adapted()
    assert pdd("fetch-weights", "copy", "--from", entry.path).code == 0
    kept = Store.default().get("copy").card
    assert (kept.base, kept.licence, kept.adapted) == ("realesrgan", "MIT", entry.card.adapted)
    torch.save(dict(rrdbnet()), "beside.pth")
    Path("beside.json").write_text(entry.card.model_dump_json())
    assert pdd("fetch-weights", "beside", "--from", "beside.pth").code == 0
    assert Store.default().get("beside").card.licence == "unknown"  # the card is that of other values
    torch.save({key: value for key, value in rrdbnet_of(entry).items()}, "beside.pth")
    assert pdd("fetch-weights", "beside", "--from", "beside.pth", "--overwrite").code == 0
    assert Store.default().get("beside").card.licence == "MIT"


def rrdbnet_of(entry: Entry) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(entry.path)


def test_tensors_that_share_memory_are_installed(pdd: Pdd) -> None:
    state = dict(rrdbnet())
    state["body.0.rdb1.conv1.bias"] = state["body.0.rdb2.conv1.bias"]
    torch.save(state, "x.pth")
    assert pdd("fetch-weights", "shared", "--from", "x.pth").code == 0


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("realLR", "x.pth", "already installed"),
        ("a/b", "x.pth", "consists of letters"),
        ("x.onnx", "x.pth", "looks like a file name"),
        ("RealESRGAN", "x.pth", "that pdd fetches"),
        ("mine", "text.pth", "text file"),
        ("mine", "other.safetensors", "not an architecture"),
        ("mine", "missing.pth", "no such file"),
        ("mine", ".", "--from FILE"),
        ("bsrgan", "x.pth", "were expected"),
    ],
)
def test_bad_names_and_files_are_reported(pdd: Pdd, name: str, file: str, words: str) -> None:
    adapted()
    torch.save(dict(rrdbnet()), "x.pth")
    Path("text.pth").write_text("hello")
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    before = {path: path.read_bytes() for path in Store.default().root.iterdir()}
    done = pdd("fetch-weights", name, "--from", file)
    assert done.code == (4 if name == "bsrgan" else 2)
    assert words in done.err
    assert {path: path.read_bytes() for path in Store.default().root.iterdir()} == before


def test_info_describes_adapted_weights_in_words(pdd: Pdd) -> None:
    entry = adapted()
    for reference in ("realLR", entry.path):
        done = pdd("fetch-weights", "--info", reference)
        assert done.code == 0, done.err
        for words in ("RRDBNet x4", "realesrgan", "realLR, 24 images", "steps=123", "keep. sharper", "0.75", "MIT"):
            assert words in done.out
        assert "batch_size" not in done.out
        assert max(map(len, done.out.splitlines())) <= 80
    document = json.loads(pdd("fetch-weights", "--info", "realLR", "--json").out)["weights"][0]
    assert document["changed_settings"] == {"steps": 123}
    assert document["adapted"]["strength"] == 0.75


def test_info_describes_plain_files_the_catalogue_and_image_sets(pdd: Pdd) -> None:
    torch.save(compact(2), "x.pth")
    done = pdd("fetch-weights", "--info", "x.pth", "bsrgan", "kodak", "--json")
    assert done.code == 0, done.err
    plain, bsrgan, kodak = json.loads(done.out)["weights"]
    assert (plain["architecture"], plain["scale"]) == ("RealESRGAN Compact", 2)
    assert (bsrgan["bytes"], bsrgan["installed"]) == (67_046_751, False)
    assert kodak["images"] == 24
    for reference, words in (("none.pth", "no such"), ("bsrgn", "did you mean bsrgan"), (None, "needs a NAME")):
        failed = pdd("fetch-weights", "--info", *([reference] if reference else []))
        assert failed.code == 2
        assert words in failed.err


def test_remove_deletes_weights_but_not_the_base_of_others(pdd: Pdd) -> None:
    first, second = adapted("first"), adapted("second", base="first")
    for names, words in ((["first"], "is the base of second"), (["second", "none"], "no weights named 'none'")):
        done = pdd("fetch-weights", "--remove", *names)
        assert done.code == 2
        assert words in done.err
        assert first.path.exists()
        assert second.path.exists()
    done = pdd("fetch-weights", "--remove", "first", "second", "--json")
    assert done.code == 0
    assert [one["name"] for one in json.loads(done.out)["removed"]] == ["first", "second"]
    assert not first.path.exists()
    assert not second.path.exists()
    adapted("first"), adapted("second", base="first")
    done = pdd("fetch-weights", "--remove", "first", "--overwrite")
    assert done.code == 0
    assert "MB freed" in done.err
    assert pdd("fetch-weights", "--remove", "kodak").code == 2
    save_file({"x": torch.zeros(1)}, second.path.with_name("theirs.safetensors"))
    done = pdd("fetch-weights", "--remove", "second", "theirs")
    assert (done.code, "theirs.safetensors has no card of pdd" in done.err) == (2, True)
    assert second.path.exists()
    assert second.path.with_name("theirs.safetensors").exists()


def test_one_name_that_fails_does_not_end_the_others(pdd: Pdd) -> None:
    done = pdd("fetch-weights", "kodak", "efficientnet-lite0", "--source", "gdrive")
    assert done.code == 2
    assert "'kodak' has no source of this kind" in done.err
    assert "'efficientnet-lite0' has no source of this kind" in done.err


def test_the_list_fits_into_80_columns_with_own_models_first(pdd: Pdd) -> None:
    adapted("a-model-with-a-name-that-is-rather-long-for-a-table"), adapted("realesrgan")
    shown = CliRunner().invoke(app, ["fetch-weights", "--list"]).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.index("a-model") < shown.index("realesrgan") < shown.index("bsrgan")
    for known in CATALOG:
        assert known.name in shown


def test_a_file_of_the_store_can_be_read_after_it_was_renamed(pdd: Pdd) -> None:
    entry = adapted()
    entry.path.rename("sent.safetensors")
    assert pdd("fetch-weights", "received", "--from", "sent.safetensors").code == 0
    assert read_card(Store.default().path("received")).name == "received"
