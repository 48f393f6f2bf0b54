"""No option of a command replaces a file that pdd didn't write, or was changed since: reports, lists, images, weights.

`tests/test_manifest.py` and `tests/test_adapt.py` have more about images and run folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from pdd_cli.settings.adapt import AdaptConfig, AdaptFlags
from pdd_cli.settings.base import Option
from pdd_cli.settings.evaluate import EvaluateConfig
from pdd_cli.settings.export import ExportConfig, ExportFlags
from pdd_cli.settings.fetch import FetchConfig, FetchFlags
from pdd_cli.settings.upscale import UpscaleConfig, UpscaleFlags
from tests.helpers.commands import Outcome, command
from tests.helpers.images import photo

MODELS = [
    ("adapt", AdaptConfig), ("adapt", AdaptFlags), ("upscale", UpscaleConfig), ("upscale", UpscaleFlags),
    ("evaluate", EvaluateConfig), ("export", ExportConfig), ("export", ExportFlags), ("fetch-weights", FetchConfig),
    ("fetch-weights", FetchFlags),
]  # fmt: skip
UPSCALE = ("upscale", "in", "out", "--weights", "base.safetensors", "--engine", "torch", "--overwrite")
COMPARE = ("upscale", "in/a.png", "--compare", "bicubic,nearest", "--output", "mine.html")
EVALUATE = ("evaluate", "in", "--metrics", "entropy")
EXPORT = ("export", "base.safetensors", "exported", "--overwrite", "--to")

# Option that names the file (as the audit below finds it) or argument, file, command, exit code.
CASES: list[tuple[str, str, tuple[str, ...], int]] = [
    ("upscale --log", "mine.jsonl", (*UPSCALE, "--log", "mine.jsonl"), 2),
    ("upscale --failed-list", "mine.txt", (*UPSCALE, "--failed-list", "mine.txt"), 2),
    ("upscale --checksums", "mine.txt", (*UPSCALE, "--checksums", "mine.txt"), 2),
    ("upscale --output", "mine.html", COMPARE, 2),
    ("upscale --output", "mine.png", COMPARE, 2),
    ("upscale OUTPUT", "mine.png", ("upscale", "in/a.png", "mine.png", *UPSCALE[3:]), 2),
    ("upscale OUTPUT", "out/a.png", UPSCALE, 3),
    ("upscale OUTPUT", "out/a.jpg", (*UPSCALE, "--format", "jpg"), 3),
    ("upscale OUTPUT", "out", ("upscale", "in", "out", *UPSCALE[3:]), 2),
    *(("evaluate --output", f"mine.{form}", (*EVALUATE, "--output", f"mine.{form}"), 2)
      for form in ("html", "csv", "json", "md", "tex")),
    ("evaluate --upscaled-dir", "upscaled/base/a.png",
     ("evaluate", "--lr-dir", "in", "--weights", "base.safetensors", "--metrics", "entropy"), 2),
    *(("export OUT", f"exported/{name}", (*EXPORT, form), 2)
      for form, name in (("pth", "base.pth"), ("safetensors", "base.safetensors"), ("onnx", "base.onnx"),
                         ("ncnn", "base-4x.param"), ("ncnn", "base-4x.bin"))),
    ("adapt --runs-dir", "runs/realLR/config.yaml", ("adapt",), 2),
    ("adapt --runs-dir", "runs/realLR/report.html", ("adapt",), 2),
]  # fmt: skip


def options() -> Iterator[str]:
    """All options that name a file or folder to write, by their type, group and help text."""
    for name, model in MODELS:
        for key, field in model.model_fields.items():
            writes = re.search(r"(?i)\b(writ|append|folder for)", field.description or "")
            for option in field.metadata:
                if isinstance(option, Option) and not option.argument and "Path" in str(field.annotation):
                    named = f"{name} {option.names(key)[0]}"
                    if option.panel == "Output" or writes:
                        yield named


EXISTING = set(options())


def test_every_option_that_writes_a_file_is_tested() -> None:
    assert EXISTING - {case for case, *_ in CASES} == set()


@pytest.mark.parametrize(("option", "name", "arguments", "code"), [
    case for case in CASES if "--" not in case[0] or case[0] in EXISTING
])  # fmt: skip
def test_a_file_of_someone_else_is_kept(
    pdd: Callable[..., Outcome], ground: Path, option: str, name: str, arguments: tuple[str, ...], code: int
) -> None:
    Path("in").mkdir()
    Image.fromarray(photo(24, 24)).save("in/a.png")
    Path("base.safetensors").write_bytes((ground / "base.safetensors").read_bytes())
    mine = Path(name)
    mine.parent.mkdir(parents=True, exist_ok=True)
    if mine.suffix in (".png", ".jpg"):
        Image.fromarray(photo(96, 96, seed=1)).save(mine)
    else:
        mine.write_text("mine")
    before = mine.read_bytes()
    if arguments == ("adapt",):
        arguments = (*command(ground, "--overwrite", steps=6)[3:],)

    found = pdd(*arguments)

    assert found.code == code, found.err
    assert mine.name in found.err or str(mine.parent) in found.err
    assert mine.read_bytes() == before
    left = {path for path in Path().rglob("*") if path.is_file()} - {mine, Path("in/a.png"), Path("base.safetensors")}
    assert {path for path in left if path.name not in (".pdd-manifest.jsonl",)} == set()
