"""The names of exported files."""

from __future__ import annotations

import re
from pathlib import Path

from pdd_cli.settings.base import ExportForm

SUFFIXES: dict[ExportForm, tuple[str, ...]] = {
    "pth": (".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "ncnn": (".param", ".bin"),
}
"""The suffixes of the files of each form. The first is the default; ncnn always writes both."""
# The scale that upscayl-ncnn reads from the name of a model: the first of these that the name contains.
_SCALES_IN_NAMES = (1, 2, 3, 4, 8)


def paths_of(form: ExportForm, path: Path) -> list[Path]:
    """The files of `form`: `path`, or for ncnn the `.param` and the `.bin` of this name."""
    return [path.with_suffix(suffix) for suffix in SUFFIXES["ncnn"]] if form == "ncnn" else [path]


def default_path(form: ExportForm, folder: Path, name: str, scale: int) -> Path:
    """The path of the export of the model `name`. A name for ncnn contains the scale; see `name_with_scale`."""
    return folder / f"{name_with_scale(name, scale) if form == 'ncnn' else name}{SUFFIXES[form][0]}"


def scale_in_name(name: str) -> int | None:
    """The scale that Upscayl reads from the name of a model, such as 4 from `photo-4x`; None if there is none."""
    lower = name.lower()
    return next((scale for scale in _SCALES_IN_NAMES if f"x{scale}" in lower or f"{scale}x" in lower), None)


def name_with_scale(name: str, scale: int) -> str:
    """`name`, with `-4x` appended unless Upscayl already reads this scale from it.

    Another scale in the name, which Upscayl might find first, is separated: `a2x` at scale 4 becomes `a2_x-4x`.
    """
    found = scale_in_name(name)
    if found == scale:
        return name
    if found is not None:
        name = re.sub(r"(?i)(?<=\d)(?=x)|(?<=x)(?=\d)", "_", name)
    return f"{name}-{scale}x"
