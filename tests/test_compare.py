"""`pdd upscale IMAGE --compare A,B,…`: the page and the sheet against what `pdd upscale` makes of the whole image."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import pdd_cli
from pdd_cli.imaging.provenance import made_by_pdd
from pdd_cli.weights.states import state_sha256
from pdd_cli.weights.store import Card, Store
from tests.helpers.images import photo, psnr
from tests.helpers.networks import compact, saved

EXACT = ("--precision", "fp32", "--engine", "torch")


@pytest.fixture
def place(pdd, tmp_path: Path):
    """`pdd` in a folder with a photograph whose noisiest part is known, a base, and weights `mine` made from it."""
    pixels = photo(250, 300)
    pixels[:] = (90, 80, 70)
    pixels[140:200, 190:250] = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    base = load_file(saved(tmp_path, compact()))
    store = Store.default()
    store.add(Card(name="plain", architecture="Compact", scale=4, source="test", created=""), base)
    card = Card(
        name="mine", architecture="Compact", scale=4, source="test", created="",
        base="plain", base_sha256=state_sha256(base),
    )  # fmt: skip
    store.add(card, {key: value * 1.3 for key, value in base.items()})
    return pdd


def views(page: Path) -> dict[str, np.ndarray]:
    text = page.read_text()
    assert not re.search(r"""(?:https?:)?//[a-z]|url\(""", re.sub(r'"data:[^"]*"', "", text))  # no external files
    found = json.loads(re.search(r'<script type="application/json" id="views">(.*?)</script>', text)[1])
    return {
        view["label"]: np.asarray(Image.open(io.BytesIO(base64.b64decode(view["src"].split(",")[1])))) for view in found
    }


def test_each_version_is_what_upscale_makes(place) -> None:
    names = "plain,mine,mine@0.5,bicubic"
    done = place("upscale", "photo.png", "--compare", names, "--output", "c.html", "--crop", "100x80+60+50",
                 "--overlap", 24, *EXACT, "--json")  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [version["name"] for version in document["versions"]] == names.split(",")
    assert [version["strength"] for version in document["versions"]] == [1, 1, 0.5, None]
    assert all(version["seconds_whole_image"] > version["seconds"] > 0 for version in document["versions"])
    shown = views(Path("c.html"))
    assert list(shown) == ["plain", "mine", "mine at strength 0.5", "bicubic"]
    cut = np.s_[200:520, 240:640]
    for number, (label, weights, strength) in enumerate(
        [("plain", "plain", 1), ("mine", "mine", 1), ("mine at strength 0.5", "mine", 0.5)]
    ):
        made = place("upscale", "photo.png", f"{number}.png", "--weights", weights, "--strength", strength, *EXACT)
        assert made.code == 0, made.err
        assert psnr(shown[label], np.asarray(Image.open(f"{number}.png"))[cut]) > 60
    bicubic = Image.open("photo.png").resize((1200, 1000), Image.Resampling.BICUBIC)
    assert psnr(shown["bicubic"], np.asarray(bicubic)[cut]) > 60
    assert Image.open("c.png").format == "PNG"  # the sheet: four versions in two rows, each as wide as the part
    assert np.array_equal(np.asarray(Image.open("c.png"))[12:332, 12:412], shown["plain"])


def test_the_part_is_where_the_versions_differ_most(place) -> None:
    assert place("upscale", "photo.png", "--compare", "plain,nearest").code == 0
    again = place("upscale", "photo.png", "--compare", "mine,bicubic", "--json")  # replaces the page: pdd made it
    assert again.code == 0, again.err
    width, height, x, y = map(int, re.findall(r"\d+", json.loads(again.out)["crop"]))
    assert x <= 190
    assert x + width >= 250
    assert y <= 140
    assert y + height >= 200
    assert made_by_pdd(Path("compare.html"))
    assert made_by_pdd(Path("compare.png"))


def test_the_size_is_that_of_the_settings(place) -> None:
    found = pdd_cli.compare("photo.png", ["plain", "nearest"], "api.html", settings={"scale": 2.5, "device": "cpu"})
    assert [version.pixels.shape for version in found.versions] == [(480, 480, 3)] * 2
    lr = np.asarray(Image.open("photo.png"))[found.crop.y : found.crop.y + 192, found.crop.x : found.crop.x + 192]
    assert np.array_equal(found.versions[1].pixels[::5, ::5], lr[::2, ::2])


def test_files_of_others_are_not_replaced(place) -> None:
    for name in ("compare.html", "compare.png"):
        Path(name).write_bytes(b"mine")
        failed = place("upscale", "photo.png", "--compare", "plain,bicubic")
        assert failed.code == 2
        assert name in failed.err
        assert Path(name).read_bytes() == b"mine"
        Path(name).unlink()
    failed = place("upscale", "photo.png", "--compare", "plain,bicubic", "--output", "photo.html")
    assert failed.code == 2
    assert "replace an input" in failed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["photo.png", "--compare", "plain"], "at least two"),
        (["photo.png", "--compare", "plain,plain"], "at least two different"),
        (["photo.png", "--compare", "plain,plian"], "plian"),
        (["photo.png", "--compare", "plain,mine@2"], "the strength 2 is not within 0 and 1"),
        (["photo.png", "--compare", "plain,plain@0.5"], "the base of plain is unknown"),
        (["photo.png", "--compare", "plain,bicubic@0.5"], "bicubic has no strength"),
        ([".", "--compare", "plain,bicubic"], "is a folder"),
        (["a.mp4", "--compare", "plain,bicubic"], "is a video"),
        (["none.png", "--compare", "plain,bicubic"], "no such file"),
        (["photo.png", "photo.png", "--compare", "plain,bicubic"], "not 2 inputs"),
        (["photo.png", "--compare", "plain,bicubic", "--output", "x.txt"], "not an HTML page"),
        (["photo.png", "--compare", "plain,bicubic", "--crop", "20x20+290+0"], "not inside the image"),
        (["photo.png", "--compare", "plain,bicubic", "--crop", "20"], "crop: '20' is not allowed"),
        (["photo.png", "--compare", "plain,bicubic", "--dry-run"], "--dry-run"),
        (["photo.png", "--compare", "plain,bicubic", "--watch"], "--watch"),
        (["photo.png", "--compare", "plain,bicubic", "--log", "x.jsonl"], "can't be combined with --log"),
        (["photo.png", "--compare", "plain,bicubic", "--set", "weights=plain"], "can't be combined with --weights"),
        (["photo.png", "out.png", "--crop", "20x20+0+0"], "--crop is for videos"),
        (["photo.png"], "no output for photo.png"),
        ([], "input: missing"),
    ],
)
def test_wrong_use_is_explained_and_nothing_is_written(place, arguments, words) -> None:
    Path("a.mp4").touch()
    before = sorted(Path().iterdir())
    failed = place("upscale", *arguments)
    assert failed.code == 2
    assert words in failed.err
    assert sorted(Path().iterdir()) == before


def test_evaluate_takes_strengths_too(place) -> None:
    Path("lr").mkdir()
    Image.fromarray(photo(20, 24)).save("lr/a.png")
    found = place("evaluate", "--lr-dir", "lr", "--weights", "plain,mine@0.5", "--metrics", "entropy", "--json")
    assert found.code == 0, found.err
    assert place("upscale", "lr/a.png", "half.png", "--weights", "mine", "--strength", 0.5).code == 0
    made = np.asarray(Image.open("upscaled/mine@0.5/a.png"))
    assert np.array_equal(made, np.asarray(Image.open("half.png")))
    assert not np.array_equal(made, np.asarray(Image.open("upscaled/plain/a.png")))
    failed = place("evaluate", "--lr-dir", "lr", "--weights", "plain,mine@1.5", "--metrics", "entropy")
    assert failed.code == 2
    assert "the strength 1.5 is not within 0 and 1" in failed.err


def test_evaluate_takes_the_switches_of_upscale(place) -> None:
    Path("lr").mkdir()
    Image.fromarray(photo(20, 24)).save("lr/a.png")
    switches = ("--tta", "--mix", 0.25, "--color-correction", "wavelet", "--strength", 0.5, "--precision", "fp32")
    found = place("evaluate", "--lr-dir", "lr", "--weights", "mine,mine@1", "--metrics", "entropy", *switches)
    assert found.code == 0, found.err
    for name, strength in (("mine@0.5", 0.5), ("mine@1", 1)):
        more = ("--strength", strength, "--weights", "mine", "--overwrite")
        assert place("upscale", "lr/a.png", "made.png", *switches, *more).code == 0
        assert np.array_equal(np.asarray(Image.open(f"upscaled/{name}/a.png")), np.asarray(Image.open("made.png")))
    failed = place("evaluate", "--lr-dir", "lr", "--weights", "plain", "--metrics", "entropy", "--denoise", 0.5)
    assert (failed.code, "--denoise needs a pair of models" in failed.err) == (2, True)
    failed = place("evaluate", "lr", "--tta")
    assert (failed.code, "--tta applies to the images of --weights" in failed.err) == (2, True)
