"""Settings of single files: pdd.yaml in folders of the input, --model-map; and pairs of models (--denoise)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel import ModelLoader

import pdd_cli
from pdd_cli.weights.store import Card, Store
from tests.helpers.images import photo, psnr, resized
from tests.helpers.networks import compact


@pytest.fixture
def place(pdd):
    for number, name in enumerate(("a.png", "faces/b.png", "faces/old/c.png", "text/d.png")):
        path = Path("in", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(10 + number, 12)).save(path)
    save_file(compact(), "four.safetensors")
    save_file(compact(2), "two.safetensors")
    return pdd


def sizes(folder: str = "out") -> dict[str, float]:
    """The factor of each output."""
    return {
        path.relative_to(folder).as_posix(): Image.open(path).width / 12 for path in sorted(Path(folder).rglob("*.png"))
    }


def test_the_nearest_folder_decides_and_the_command_line_more(place) -> None:
    Path("in/faces/pdd.yaml").write_text("upscale: {weights: two.safetensors, mix: 1}")
    Path("in/faces/old/pdd.yaml").write_text("upscale: {scale: 3}")
    Path("pdd.yaml").write_text("upscale: {weights: four.safetensors, scale: 5}")
    command = ("upscale", "in", "out", "--json")
    done = place(*command)
    assert done.code == 0, done.err
    assert sizes() == {"a.png": 5, "faces/b.png": 5, "faces/old/c.png": 3, "text/d.png": 5}
    document = json.loads(done.out)
    assert [file["weights"].split(".")[0] for file in document["files"]] == ["four", "two", "two", "four"]
    assert document["other_kinds"] == {}
    # mix: 1 is a plain resize, which shows whether it was used.
    plain = resized(np.asarray(Image.open("in/faces/old/c.png")), (36, 36))
    assert np.abs(np.asarray(Image.open("out/faces/old/c.png")) - plain).max() <= 1

    assert json.loads(place(*command).out)["skipped"] == 4
    Path("in/faces/old/pdd.yaml").write_text("upscale: {scale: 2.5}")
    assert json.loads(place(*command).out)["done"] == 1
    # Given for the call, also as another size option, a setting holds everywhere.
    Path("pdd.yaml").write_text("upscale: {weights: four.safetensors}")
    assert place(*command[:2], "b", "--width", 48, "--set", "mix=0").code == 0
    assert set(sizes("b").values()) == {4}
    pdd_cli.upscale("in", "c", weights="two.safetensors", settings={"scale": 1})
    assert set(sizes("c").values()) == {1}


def test_other_weights_for_files_that_match(place) -> None:
    Path("in/text/pdd.yaml").write_text("upscale: {scale: 3}")
    mapped = ("--model-map", "faces/**=two.safetensors", "--model-map", "b.png=none.pth")
    done = place("upscale", "in", "out", "--weights", "four.safetensors", *mapped)
    assert done.code == 0, done.err
    assert sizes() == {"a.png": 4, "faces/b.png": 2, "faces/old/c.png": 2, "text/d.png": 3}
    for pattern, wanted in (("faces/*", (2, 4)), ("?.png", (2, 2)), ("*/old/*", (4, 2)), ("Faces/**", (4, 4))):
        place("upscale", "in", "out", "--weights", "four.safetensors", "--model-map", f"{pattern}=two.safetensors")
        assert (sizes()["faces/b.png"], sizes()["faces/old/c.png"]) == wanted
    assert place("upscale", "in", "dry", *mapped[:2], "--weights", "four.safetensors", "--dry-run").code == 0
    assert not Path("dry").exists()


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("upscale: {tile: 32}", (), "in/text/pdd.yaml: tile can't be set for a folder"),
        ("upscale: {mix: 3}", (), "in/text/pdd.yaml: mix: 3"),
        ("upscale: {weigths: a}", (), "did you mean weights"),
        ("upscale: {weights: none.pth}", (), "no such weights file: none.pth"),
        ("upscale: {width: 8, scale: 2}", (), "can't be combined"),
        ("upscale: {normal_map: true}", ("--color-correction", "wavelet"), "in/text/pdd.yaml: settings: --normal-map"),
        ("", ("--model-map", "faces"), "PATTERN=WEIGHTS"),
        ("", ("--model-map", "**=none.pth"), "no such weights file: none.pth"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(place, text, options, words) -> None:
    Path("in/text/pdd.yaml").write_text(text)
    Path("pdd.yaml").write_text("upscale: {weights: four.safetensors}")
    failed = place("upscale", "in", "out", *options)
    assert failed.code == 2
    assert words in failed.err
    assert not Path("out").exists()


def test_denoise_interpolates_between_the_two_models(pdd) -> None:
    strong, weak = compact(), {key: value * 1.2 for key, value in compact().items()}
    store = Store.default()
    for name, state in (("realesr-general", strong), ("realesr-general-wdn", weak), ("other", strong)):
        store.add(Card(name=name, architecture="Compact", scale=4, source="test", created=""), state)
    Path("in").mkdir()
    lr = photo(12, 16)
    Image.fromarray(lr).save("in/a.png")
    for denoise in (0, 0.25, 1):
        command = ("upscale", "in", "out", "--weights", "realesr-general", "--denoise", denoise, "--json")
        done = pdd(*command, "--precision", "fp32")
        assert json.loads(done.out)["done"] == 1, done.err
        state = {key: denoise * strong[key] + (1 - denoise) * weak[key] for key in strong}
        model = ModelLoader().load_from_state_dict(state).eval()
        with torch.inference_mode():
            wanted = model(torch.from_numpy(lr).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).numpy()
        assert psnr(np.asarray(Image.open("out/a.png")) / 255, wanted.clip(0, 1), 1) > 50
    failed = pdd("upscale", "in", "out", "--weights", "other", "--denoise", 0.5)
    assert failed.code == 2
    assert "other has no second model" in failed.err
