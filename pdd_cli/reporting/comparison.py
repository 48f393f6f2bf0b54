"""The page and the contact sheet of `pdd upscale --compare`: versions of a part of one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pdd_cli.imaging.image import Array
from pdd_cli.imaging.provenance import Provenance, sealed_text
from pdd_cli.reporting.html import render, view

# Longest side of a version on the contact sheet, and the sizes of its text and margins, in pixels.
_PANEL, _TEXT, _MARGIN = 768, 20, 12


@dataclass(frozen=True, eq=False)
class Panel:
    """One version: its (H, W, 3) uint8 `pixels`, the `seconds` for them, and those for the whole image."""

    label: str
    pixels: Array
    seconds: float
    whole_seconds: float

    @property
    def times(self) -> str:
        """The seconds in words."""
        digits = 0 if self.whole_seconds >= 10 else 1
        return f"{self.seconds:.1f} s; the whole image about {self.whole_seconds:.{digits}f} s"


def comparison_page(image: str, crop: str, panels: Sequence[Panel], made: Provenance) -> str:
    """A self-contained page: a slider between two versions, and all versions, with one zoom and position for all."""
    height, width = panels[0].pixels.shape[:2]
    views = [{**view(panel.label, panel.pixels, lossless=True), "times": panel.times} for panel in panels]
    record = sealed_text(made).replace("--", "- -")  # which would end the comment
    return render("comparison.html", image=image, crop=crop, views=views, width=width, height=height, record=record)


def contact_sheet(title: str, panels: Sequence[Panel]) -> Array:
    """(H, W, 3) uint8: all versions with their names and times, in a grid, and the title below."""
    height, width = panels[0].pixels.shape[:2]
    factor = min(1.0, _PANEL / max(height, width))
    # A small part is enlarged by a whole factor, so that its pixels stay squares.
    size = (round(width * factor), round(height * factor))
    if factor == 1 and (whole := _PANEL // max(height, width)) > 1:
        size = (width * whole, height * whole)
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    cell = (size[0] + _MARGIN, size[1] + 3 * _TEXT + _MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _TEXT + 2 * _MARGIN), "#1d2125")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    for index, panel in enumerate(panels):
        x, y = _MARGIN + index % columns * cell[0], _MARGIN + index // columns * cell[1]
        image = Image.fromarray(panel.pixels)
        way = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
        sheet.paste(image.resize(size, way), (x, y))
        for line, (text, colour) in enumerate(((panel.label, "#ffffff"), (panel.times, "#a2a9b1"))):
            draw.text((x, y + size[1] + 2 + line * (_TEXT + 4)), _fitting(text, font, size[0]), colour, font)
    below = (_MARGIN, _MARGIN + rows * cell[1])
    draw.text(below, _fitting(title, font, sheet.width - 2 * _MARGIN), "#ffffff", font)
    return np.asarray(sheet)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, cut at its end if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
