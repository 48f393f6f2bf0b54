"""report.html of a run: what it holds, against the files of the run."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from spandrel import ModelLoader

from tests.helpers.commands import Outcome, command
from tests.helpers.pages import Page

RUN = Path("runs/realLR")


def lines(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (RUN / name).read_text().splitlines()]


def picture(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_the_page_describes_the_run(pdd: Callable[..., Outcome], ground: Path, home: Path) -> None:
    done = pdd(*command(ground)[3:], "--name", "realLR", "--json")
    assert done.code == 0, done.err
    assert not (RUN / "tensorboard").exists()  # unasked
    text = (RUN / "report.html").read_text()
    assert not re.search(r"""(?:https?:)?//[a-z]|url\(""", re.sub(r'"data:[^"]*"', "", text))
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    verdict = json.loads((RUN / "verdict.json").read_text())
    assert any(verdict["reason"] in messages for messages in page.texts)
    if verdict["keep"]:
        assert any("pdd upscale IN OUT --weights realLR" in messages for messages in page.texts)
    # The table of judgements is that of the file, and each loss has its plot.
    for line in lines("judgements.jsonl"):
        assert repr(line["score"]) in page.values
    for loss in ("pixel", "perceptual", "adversarial", "inter", "intra", "consistency"):
        assert f"loss: {loss}" in page.texts
    assert "learning rate" in page.texts
    assert {"optimizer.learning_rate", "auto", "16"} <= set(page.texts)

    # Before and after: what the base and the weights give at the strength of the verdict.
    (card,) = json.loads(page.json)
    assert [view["label"] for view in card["views"]][:3] == ["LR nearest", "LR bicubic", "base"]
    lr = picture(card["views"][0]["src"])[::4, ::4]
    strength = verdict["strength"] or 1.0
    base = load_file(ground / "base.safetensors")
    adapted = load_file(home / "weights" / "realLR.safetensors")
    mixed = {key: base[key] + strength * (value - base[key]) for key, value in adapted.items()}
    for view, state in ((card["views"][2], base), (card["views"][3], mixed)):
        model = ModelLoader().load_from_state_dict(dict(state)).eval()
        expected = model(torch.tensor(lr).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).detach().numpy() * 255
        error = np.mean((picture(view["src"]) - expected) ** 2)
        assert 10 * np.log10(255**2 / error) > 25  # compressed
