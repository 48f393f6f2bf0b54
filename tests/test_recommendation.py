"""What `pdd upscale` takes from a weights card, and that a dry run installs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from pdd_cli.imaging.decode import read_image
from pdd_cli.models.loading import load_sr_model, state_sha256
from pdd_cli.weights.store import Card, Store


@pytest.fixture
def adapted(ground: Path, home: Path):
    """Installs weights that are not their base's, with this verdict and strength in their card."""

    def install(verdict: str, strength: float) -> None:
        state = load_file(ground / "base.safetensors")
        card = Card(
            name="mine",
            architecture="RRDBNet",
            scale=4,
            source="test",
            created="",
            base=str(ground / "base.safetensors"),
            base_sha256=state_sha256(load_sr_model(ground / "base.safetensors").module.state_dict()),
            adapted={"verdict": verdict, "strength": strength, "reason": "it is softer than the base"},
        )
        Store.default().add(card, {key: tensor * 1.05 for key, tensor in state.items()})

    return install


def test_the_recommended_strength_is_used_and_reported(pdd, adapted, ground: Path) -> None:
    adapted("keep", 0.5)
    lr = ground / "realLR/0.png"
    command = ("--weights", "mine", "--engine", "torch", "--json")
    found = pdd("upscale", lr, "default.png", *command)
    assert found.code == 0, found.err
    assert json.loads(found.out)["strength"] == 0.5
    assert "strength 0.5, as pdd adapt recommends" in found.err
    pdd("upscale", lr, "half.png", *command, "--strength", 0.5)
    one = pdd("upscale", lr, "one.png", *command, "--strength", 1)
    assert "recommends" not in one.err
    default, half, full = (read_image(Path(f"{name}.png")).pixels.astype(int) for name in ("default", "half", "one"))
    assert np.array_equal(default, half)
    assert not np.array_equal(default, full)
    assert "strength 0.5" in Image.open("default.png").getexif()[0x0131]


def test_evaluate_upscales_as_upscale_does(pdd, adapted, ground: Path) -> None:
    adapted("keep", 0.5)
    found = pdd("evaluate", "--lr-dir", ground / "realLR", "--weights", "mine", "--metrics", "psnr", "--json")
    assert found.code == 0, found.err
    assert "strength 0.5, as pdd adapt recommends" in found.err
    assert pdd("upscale", ground / "realLR", "plain", "--weights", "mine").code == 0
    names = sorted(path.name for path in Path("plain").glob("*.png"))
    assert names == ["0.png", "1.png", "2.png"]
    for name in names:
        assert np.array_equal(np.asarray(Image.open(f"upscaled/mine/{name}")), np.asarray(Image.open(f"plain/{name}")))


@pytest.mark.parametrize("options", [(), ("--strength", 0.5)])
def test_rejected_weights_are_warned_of(pdd, adapted, ground: Path, options: tuple[object, ...]) -> None:
    adapted("reject", 0.0)
    found = pdd("upscale", ground / "realLR/0.png", "a.png", "--weights", "mine", "--json", *options)
    assert found.code == 0, found.err
    assert "warning: pdd adapt rejected the weights mine: it is softer than the base" in found.err
    assert json.loads(found.out)["strength"] == (options[1] if options else 1)


def test_a_base_that_is_gone_is_named_with_a_way_out(pdd, adapted, ground: Path, tmp_path: Path) -> None:
    adapted("keep", 0.75)
    entry = Store.default().get("mine")
    Store.default().add(entry.card.model_copy(update={"base": str(tmp_path / "gone.pth")}), load_file(entry.path))
    found = pdd("upscale", ground / "realLR/0.png", "a.png", "--weights", "mine")
    assert found.code == 2
    assert "gone.pth" in found.err
    assert "--strength 1" in found.err


def test_a_dry_run_fetches_nothing(pdd, ground: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = pdd("upscale", ground / "realLR", "out", "--weights", "realesr-general", "--dry-run", "--json")
    assert found.code == 0, found.err
    document = json.loads(found.out)
    assert document["to_fetch"] == ["realesr-general"]
    assert [file["size_out"] for file in document["files"]] == [[160, 160]] * 3
    assert [file["seconds"] for file in document["files"]] == [0] * 3
    assert "realesr-general-x4v3.pth, 5 MB, from https://" in found.err
    assert not home.exists()
    assert pdd("upscale", ground / "realLR", "out", "--dry-run", "--offline").code == 4
    assert pdd("upscale", ground / "realLR", "out", "--dry-run", "--weights", "realesrgn").code == 2


@pytest.mark.parametrize("name", ["a.pcx", "a.ico", "notes.txt", "a"])
def test_an_input_of_another_kind_is_blamed_itself(pdd, ground: Path, name: str) -> None:
    if name in ("notes.txt", "a"):
        Path(name).write_text("a text")
    else:
        Image.new("RGB", (8, 8)).save(name)
    for output in ("out/", "out"):
        found = pdd("upscale", name, output)
        assert found.code == 2
        assert f"can't read {name}" in found.err
        assert "write" not in found.err
    found = pdd("upscale", name, "out.png", "--weights", ground / "base.safetensors")
    assert found.code == 3
    assert f"can't read {name}" in found.err


def test_an_image_under_another_name_needs_a_format(pdd, ground: Path) -> None:
    Path("scan.dat").write_bytes((ground / "realLR/0.png").read_bytes())
    found = pdd("upscale", "scan.dat", "out/")
    assert found.code == 2
    assert "scan.dat" in found.err
    assert "--format png" in found.err
    assert pdd("upscale", "scan.dat", "out/", "--format", "png", "--weights", ground / "base.safetensors").code == 0
    assert read_image(Path("out/scan.png")).width == 160
