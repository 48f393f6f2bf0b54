"""No option of a command replaces a file that pdd didn't write, or was changed since: reports, lists, images, weights.

`tests/test_manifest.py` and `tests/test_adapt.py` have more about images and run folders.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from pdd_cli.imaging.provenance import made_by_pdd
from pdd_cli.settings.adapt import AdaptConfig, AdaptFlags
from pdd_cli.settings.base import Option
from pdd_cli.settings.evaluate import EvaluateConfig
from pdd_cli.settings.export import ExportConfig, ExportFlags
from pdd_cli.settings.fetch import FetchConfig, FetchFlags
from pdd_cli.settings.upscale import UpscaleConfig, UpscaleFlags
from pdd_cli.upscaling.manifest import NAME
from tests.helpers.commands import Hold, Outcome, command
from tests.helpers.images import photo
from tests.test_video import rgb_frames
from tests.test_video_options import lossless

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


# --- files that another program writes during the work -------------------------------------------------------------

MINE = b"written by another program"
SINGLE = ("--weights", "base.safetensors", "--engine", "torch", "--overwrite")
# The file that appears when pdd has begun to write it, the command, the exit code.
APPEARING: list[tuple[str, tuple[str, ...], int]] = [
    *((f"out/a.{form}", (*UPSCALE, "--format", form), 3) for form in ("png", "jpg", "tiff")),
    ("out/a.png", (*UPSCALE, "--strip-metadata"), 3),
    *((f"b.{form}", ("upscale", "in/a.png", f"b.{form}", *SINGLE), 3) for form in ("png", "webp", "bmp")),
    *((f"b{form}", ("upscale", f"a{form}", f"b{form}", *SINGLE), 3) for form in (".cbz", ".zip")),
    ("out/a.cbz", ("upscale", "a.cbz", "in", "out", *SINGLE), 3),
    *((f"b.{form}", ("upscale", "a.mkv", f"b.{form}", *SINGLE), 3) for form in ("mkv", "mp4")),
    ("b.png", ("upscale", "a.mkv", "b.png", *SINGLE, "--preview", "0"), 3),
    ("mine.txt", (*UPSCALE, "--failed-list", "mine.txt"), 3),
    ("mine.sums", (*UPSCALE, "--checksums", "mine.sums"), 3),
    ("mine.html", COMPARE, 2),
    ("mine.png", COMPARE, 2),
    *((f"mine.{form}", (*EVALUATE, "--output", f"mine.{form}"), 2) for form in ("html", "csv", "json")),
    *((f"exported/base{form}", (*EXPORT, form[1:]), 2) for form in (".pth", ".safetensors", ".onnx")),
    ("exported/base-4x.bin", (*EXPORT, "ncnn"), 2),
]  # fmt: skip

_awaited: dict[Path, Path] = {}
"""When pdd begins to write the first file, another program writes the second, which may be the same."""


def _another_program(event: str, arguments: tuple[object, ...]) -> None:
    if event != "tempfile.mkstemp" or not _awaited:
        return
    temporary = Path(str(arguments[0])).absolute()
    for path in list(_awaited):
        if temporary.match(f".pdd-tmp-*{path.suffix}") and temporary.parent == path.parent:
            _awaited.pop(path).write_bytes(MINE)


@pytest.fixture(scope="module", autouse=True)
def _watching() -> None:
    sys.addaudithook(_another_program)  # it can't be removed, and does nothing in other tests


@pytest.fixture
def inputs(pdd: Callable[..., Outcome], ground: Path) -> Iterator[Callable[..., Outcome]]:
    """`pdd` in a folder with images, comics, a video and a model."""
    Path("in").mkdir()
    for name in "ab":
        Image.fromarray(photo(24, 24)).save(f"in/{name}.png")
    for archive in ("a.cbz", "a.zip"):
        with zipfile.ZipFile(archive, "w") as opened:
            opened.write("in/a.png", "1.png")
    lossless(Path("a.mkv"), rgb_frames(2))
    Path("base.safetensors").write_bytes((ground / "base.safetensors").read_bytes())
    yield pdd
    _awaited.clear()


@pytest.mark.parametrize("earlier", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "own"])
@pytest.mark.parametrize(("name", "arguments", "code"), APPEARING)
def test_a_file_that_appears_during_the_work_is_kept(
    inputs: Callable[..., Outcome], name: str, arguments: tuple[str, ...], code: int, *, earlier: bool
) -> None:
    if earlier:  # pdd's own output, in place of which another program writes
        assert inputs(*arguments).code == 0
        assert Path(name).exists()
    _awaited[Path(name).absolute()] = Path(name)

    found = inputs(*arguments)

    assert not _awaited
    assert found.code == code, found.err
    # The two files of ncnn are checked against each other.
    assert name.replace(".bin", ".param") in found.err.replace("\n", "") or Path(name).name in found.err
    assert Path(name).read_bytes() == MINE
    assert not list(Path().rglob(".pdd-tmp-*"))
    if "in" in arguments[1:3] and arguments[0] == "upscale":  # the rest goes on
        others = [path for path in Path("out").rglob("[ab].*") if path != Path(name)]
        assert others
        assert all("--strip-metadata" in arguments or made_by_pdd(path) for path in others)
    Path(name).rename("moved")
    Path("exported/base-4x.param").unlink(missing_ok=True)  # alone it isn't recognised
    assert inputs(*arguments).code == 0
    assert Path(name).exists()


def test_a_log_that_another_program_replaces_is_not_extended(inputs: Callable[..., Outcome]) -> None:
    _awaited[Path("out/a.png").absolute()] = log = Path("log.jsonl")
    found = inputs(*UPSCALE, "--log", log)
    assert found.code == 0
    assert "log.jsonl: the file is not a log of pdd" in found.err
    assert log.read_bytes() == MINE


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--scale", "2")])
def test_a_file_in_place_of_an_output_that_was_only_started_is_kept(
    inputs: Callable[..., Outcome], options: tuple[str, ...]
) -> None:
    """Earlier versions recorded an output before they computed it, and were perhaps interrupted then."""
    Path("out").mkdir()
    Path("out", NAME).write_text('{"output": "a.png", "key": "k", "done": false}\n')
    Path("out/a.png").write_bytes(Path("in/b.png").read_bytes())
    found = inputs(*UPSCALE[:-1], *options)
    assert found.code == 3
    assert "a.png exists and was not made by pdd" in found.err
    assert Path("out/a.png").read_bytes() == Path("in/b.png").read_bytes()
    assert made_by_pdd(Path("out/b.png"))


_RENAME, _SECOND_RECORD = ("a.png", 1), (NAME, 2)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [_RENAME, _SECOND_RECORD], ids=["before the rename", "after the rename"])
def test_a_run_killed_at_the_rename_knows_its_outputs_again(
    inputs: Callable[..., Outcome], tmp_path: Path, moment: tuple[str, int]
) -> None:
    """Also without metadata, by the manifest alone: the old output as well as the new one."""
    arguments = (*UPSCALE[:-1], "--strip-metadata")
    assert inputs(*arguments).code == 0
    old = Path("out/a.png").read_bytes()
    hold = Hold(tmp_path / "hold", *moment)
    process = subprocess.Popen(
        [sys.executable, *hold.command, *arguments, "--scale", "2"], env={**os.environ, "PYTHONPATH": hold.path}
    )
    hold.wait(process)
    process.kill()
    process.wait()
    assert (Path("out/a.png").read_bytes() == old) == (moment == _RENAME)
    found = inputs(*arguments, "--scale", "2")
    assert found.code == 0, found.err
    assert Image.open("out/a.png").size == (48, 48)
