"""The model card of weights on the Hugging Face Hub: README.md with a YAML header."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdd_cli.models.loading import SRModel
from pdd_cli.reporting.weights import facts
from pdd_cli.version import __version__
from pdd_cli.weights.states import HUB_PREFIX

MARK = "<!-- Written by pdd export. -->"
"""A line of each model card of pdd, by which `pdd export --overwrite` recognises it."""

# Identifiers of the Hub for licences; others are given by name.
_LICENCES = {
    "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "unknown", "unlicense", "wtfpl",
}  # fmt: skip
_SCORES = {
    "score": "score (dB)", "consistency": "consistency with the LR (dB)", "drift": "colour drift (ΔE)",
    "texture": "fine detail", "grain": "grain",
}  # fmt: skip


@dataclass(frozen=True)
class CardFile:
    """A file of the repository and its description."""

    name: str
    description: str
    sha256: str


def model_card(
    model: SRModel, repo: str, files: Sequence[CardFile], picture: str | None, verdict: Mapping[str, Any] | None
) -> str:
    """The text of README.md. `model.card` describes the weights; `verdict` is the content of the run's verdict.json."""
    card = model.card
    assert card is not None
    adapted = card.adapted or {}
    base = "" if card.base is None else f", adapted from {_plain(card.base)} to images of one source"
    lines = [
        "---",
        _header(model),
        "---",
        MARK,
        f"# {_plain(card.name)}",
        "",
        f"{model.scale}x super-resolution ({model.architecture}){base}, made with pdd {__version__}.",
        "",
    ]
    if picture:
        lines += [f"![LR image, base and adapted weights, side by side]({picture})", ""]
    if adapted:
        lines += ["## Verdict", "", f"{_plain(adapted.get('verdict', 'unknown'))}. {_plain(adapted.get('reason', ''))}"]
        if verdict:
            lines += ["", *_score_table(verdict)]
        lines += [
            "",
            "The scores are means over images that were held out from training. No ground truth is needed for them.",
            "",
        ]
    lines += [
        "## Use",
        "",
        f"    pdd upscale IN OUT --weights {HUB_PREFIX}{repo}",
        "",
        "The weights can be loaded by spandrel, chaiNNer and other programs that read this architecture.",
        "",
        "## Files",
        "",
        "| file | content | sha256 |",
        "|---|---|---|",
        *(f"| `{file.name}` | {file.description} | `{file.sha256}` |" for file in files),
        "",
        "## Origin",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {_plain(text)} |" for label, text in facts(card)),
        "",
        "The licence of adapted weights is that of their base. Check it, and whether you may share these weights.",
    ]
    return "\n".join(lines) + "\n"


def _header(model: SRModel) -> str:
    """The YAML header, by which the Hub finds and filters models."""
    from huggingface_hub import ModelCardData

    card = model.card
    assert card is not None
    tags = ["super-resolution", "image-upscaling", "pdd", f"{model.scale}x", _identifier(model.architecture)]
    licence = _identifier(card.licence)
    known = {"license": licence} if licence in _LICENCES else {"license": "other", "license_name": licence}
    base = card.base.removeprefix(HUB_PREFIX) if card.base and card.base.startswith(HUB_PREFIX) else ""
    if base:
        base = "/".join(base.split("@")[0].split("/")[:2])
    data = ModelCardData(library_name="pdd", pipeline_tag="image-to-image", tags=tags, base_model=base or None, **known)
    return str(data.to_yaml()).strip()


def _score_table(verdict: Mapping[str, Any]) -> list[str]:
    """The scores of the base and of the weights at each strength, as a table in Markdown."""
    rows = [("base", {"score": 0.0, **verdict["base"]})]
    rows += [(f"strength {found['strength']:g}", found) for found in verdict["adapted"]]
    keys = [key for key in _SCORES if all(isinstance(found.get(key), float | int) for _, found in rows)]
    return [
        f"| | {' | '.join(_SCORES[key] for key in keys)} |",
        f"|---|{'---|' * len(keys)}",
        *(f"| {name} | {' | '.join(f'{found[key]:.3f}' for key in keys)} |" for name, found in rows),
    ]


def _identifier(text: str) -> str:
    """`text` in lower case, with hyphens for other characters than letters, digits, points and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unknown"


def _plain(text: object) -> str:
    """`text` as one line without characters that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
