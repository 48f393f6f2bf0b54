"""Building blocks of self-contained HTML pages with image comparison sliders, sortable tables and SVG plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from pdd_cli.imaging.image import Array

WINDOW = 512
"""Maximum side of the part of an image that a page shows, in pixels."""

GALLERY = """<p class="note">Drag over an image, or use the slider below it, to compare the two versions. The small
images show the marked region enlarged. Move it with the pointer, or with the arrow keys when the image has the
focus.</p>
<noscript><p>The images need JavaScript; tables and plots don't.</p></noscript>
<div id="gallery"></div>"""
"""The place of the cards on a page."""


def page(title: str, body: str, cards: Sequence[Mapping[str, Any]]) -> str:
    """A complete page with the text `title`, the HTML `body` (which contains `GALLERY`) and `card`s."""
    return render("page.html", title=title, body=body, cards=cards)


def render(template: str, **values: Any) -> str:
    """The text of a page made from a file in `templates`."""
    environment = Environment(loader=PackageLoader("pdd_cli.reporting"), autoescape=True, keep_trailing_newline=True)
    return environment.get_template(template).render(**values)


def card(
    name: str,
    views: Sequence[Mapping[str, str]],
    size: tuple[int, int],
    *,
    main: str,
    group: str = "all",
    note: str = "",
    scores: Sequence[Mapping[str, Any]] = (),
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """One image of the gallery. All `views` are shown with (width, height) = `size`; `main` is the label of one."""
    return {
        "id": anchor(name),
        "name": name,
        "group": group,
        "note": note,
        "width": size[0],
        "height": size[1],
        "main": main,
        "views": views,
        "scores": scores,
        "metrics": metrics,
    }


def view(label: str, pixels: Array, *, lossless: bool = False) -> dict[str, str]:
    """A labelled image of a page, from pixels (H, W, 3) uint8."""
    return {"label": label, "src": _webp(Image.fromarray(pixels), lossless=lossless)}


def lr_views(
    lr: Array, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> list[dict[str, str]]:
    """The LR image, or its part `box` (left, top, right, bottom), enlarged to (width, height) by two filters."""
    image = Image.fromarray(lr)
    ways = {"LR nearest": Image.Resampling.NEAREST, "LR bicubic": Image.Resampling.BICUBIC}
    return [
        {"label": label, "src": _webp(image.resize(size, way, box), lossless=way == Image.Resampling.NEAREST)}
        for label, way in ways.items()
    ]


def window(image: Array, other: Array | None = None, side: int = WINDOW) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the part of `image` that differs most from `other`, or has the most detail."""
    height, width = image.shape[:2]
    wide, high = min(width, side), min(height, side)
    if (wide, high) == (width, height):
        return 0, 0, width, height
    gray = image.mean(axis=2, dtype=np.float32)
    if other is None:
        activity = np.abs(np.diff(gray, axis=0, append=gray[-1:])) + np.abs(np.diff(gray, axis=1, append=gray[:, -1:]))
    else:
        activity = np.abs(gray - other.mean(axis=2, dtype=np.float32))
    sums = np.pad(activity.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))
    totals = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    y, x = np.unravel_index(int(totals.argmax()), totals.shape)
    return int(x), int(y), wide, high


def figure(label: str, size: tuple[int, int], drawn: str) -> str:
    """A plot: a caption and SVG elements on a canvas of (width, height)."""
    return (
        f"<figure><figcaption>{escape(label)}</figcaption>"
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(label)}">{drawn}</svg></figure>'
    )


def scroll(label: str, table: str) -> str:
    """A table in a scrollable box."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def anchor(name: str) -> str:
    """The HTML id of the card `name`."""
    return "image-" + base64.urlsafe_b64encode(name.encode("utf-8", "surrogateescape")).decode().rstrip("=")


def number(value: float | None, *, signed: bool = False) -> str:
    """The number with four decimals and a typographic minus sign; "–" for None."""
    if value is None:
        return "–"
    return (f"{value:+.4f}" if signed else f"{value:.4f}").replace("-", "−")


def short(value: float) -> str:
    """The number with three significant digits."""
    return f"{value:.3g}".replace("-", "−")


def spaced(values: Iterable[float], distance: float) -> Sequence[float]:
    """The values without those that are closer than `distance` to an earlier one."""
    kept: list[float] = []
    for value in values:
        if all(abs(value - other) >= distance for other in kept):
            kept.append(value)
    return kept


def _webp(image: Image.Image, *, lossless: bool = False) -> str:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=90, method=4, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
