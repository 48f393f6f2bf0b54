"""`pdd upscale --failed-list --from-list --checksums --log`: lists for archives, checked with coreutils."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdd_cli.batch.lists import checksums, read_list
from pdd_cli.errors import InputError
from pdd_cli.version import __version__
from tests.helpers.commands import Outcome
from tests.helpers.images import photo, save

needs_coreutils = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")


@pytest.fixture
def batch(pdd: Callable[..., Outcome], ground: Path) -> Callable[..., Outcome]:
    """`pdd upscale in out …` with a tiny network: two images, one of them in a subfolder, and a damaged one."""
    Path("in/sub").mkdir(parents=True)
    save(Path("in/a.png"), photo(8, 8))
    save(Path("in/sub/b.png"), photo(8, 8, seed=1))
    Path("in/sub/damaged.png").write_bytes(b"damaged")

    def run(*more: object) -> Outcome:
        return pdd("upscale", "in", "out", "--weights", ground / "base.safetensors", "--engine", "torch", *more)

    return run


def valid(checksum_file: Path) -> list[str]:
    """The names that `sha256sum --check` finds correct; it must find nothing else."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", checksum_file.name],
        cwd=checksum_file.parent, capture_output=True, check=True,
    )  # fmt: skip
    lines = os.fsdecode(done.stdout.rstrip(b"\n")).split("\n")
    assert all(line.endswith(": OK") for line in lines)
    return [line.removesuffix(": OK") for line in lines]


@needs_coreutils
def test_failed_inputs_are_listed_and_upscaled_later(batch: Callable[..., Outcome]) -> None:
    options = ("--failed-list", "failed.txt", "--checksums", "out/SHA256SUMS")
    assert batch(*options).code == 3
    damaged = Path("in/sub/damaged.png")
    assert Path("failed.txt").read_text() == f"{damaged.absolute()}\n"
    assert valid(Path("out/SHA256SUMS")) == ["a.png", "sub/b.png"]

    save(damaged, photo(8, 8, seed=2))
    done = batch("--from-list", "failed.txt", *options, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [Path(file["input"]).name for file in document["files"]] == ["damaged.png"]
    assert document["versions"]["pdd"] == __version__
    assert document["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert Path("failed.txt").read_bytes() == b""
    assert valid(Path("out/SHA256SUMS")) == ["a.png", "sub/b.png", "sub/damaged.png"]  # those of before are kept


def test_a_list_selects_among_the_inputs(batch: Callable[..., Outcome]) -> None:
    Path("list").write_bytes(b"in/a.png\0in/gone.png\0")
    done = batch("--from-list", "list", "--json")
    assert done.code == 3
    assert "in/gone.png is not among the inputs" in done.err
    assert [file["output"] for file in json.loads(done.out)["files"]] == ["out/a.png"]
    for content, words in ((b"elsewhere.png\n", "none of its 1 entries"), (b"\n", "the list is empty")):
        Path("list").write_bytes(content)
        found = batch("--from-list", "list")
        assert (found.code, words in found.err) == (2, True)


def test_a_list_can_be_the_input(batch: Callable[..., Outcome], pdd: Callable[..., Outcome], ground: Path) -> None:
    weights = ground / "base.safetensors"
    options = ("--weights", weights, "--engine", "torch", "--json")
    Path("list").write_text("in/a.png\nin/sub\nin/gone.png\nin/a.png\nlist\n")
    Path("in/sub/pdd.yaml").write_text("upscale: {scale: 3}")
    done = pdd("upscale", "--from-list", "list", "out", *options, "--model-map", f"sub/*={weights}", "--log", "log")
    assert done.code == 3
    assert "no input matches" not in done.err
    sizes = [json.loads(line)["size_out"] for line in Path("log").read_text().splitlines()]
    assert sizes[1] == [24, 24]
    assert {json.loads(line)["weights"] for line in Path("log").read_text().splitlines()} == {str(weights)}
    assert "in/gone.png: no such file or folder" in done.err
    document = json.loads(done.out)
    files = {Path(file["output"]).relative_to("out").as_posix(): file["status"] for file in document["files"]}
    assert files == {"a.png": "done", "sub/b.png": "done", "sub/damaged.png": "failed"}
    assert document["other_kinds"] == {"without suffix": 1}
    Path("list").write_text("in/gone.png\n")
    found = pdd("upscale", "--from-list", "list", "elsewhere", *options)
    assert found.code == 2
    assert "no image or video is listed" in found.err
    assert "in/gone.png" in found.err
    found = pdd("upscale", "--output", "x", *options)
    assert "give INPUT or --from-list FILE" in found.err


def test_lists_of_every_system(tmp_path: Path) -> None:
    path = tmp_path / "list"
    for content, names in (
        (b"a\nb c\n", ["a", "b c"]),
        (b"a\nb", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),
        (b"a\r\nb\n", ["a\r", "b"]),
        (b"with\nline end\0\xff\0", ["with\nline end", "\udcff"]),
    ):
        path.write_bytes(content)
        assert list(map(str, read_list(path))) == names
    with pytest.raises(InputError, match="can't be read"):
        read_list(tmp_path / "nowhere")


def test_a_list_can_come_from_stdin() -> None:
    program = "from pathlib import Path; from pdd_cli.batch.lists import read_list; print(read_list(Path('-')))"
    done = subprocess.run([sys.executable, "-c", program], input="a b\n", capture_output=True, text=True, check=True)
    assert "PosixPath('a b')" in done.stdout or "WindowsPath('a b')" in done.stdout


@needs_coreutils
@pytest.mark.skipif(os.name == "nt", reason="names that Windows doesn't have")
def test_checksums_of_odd_names_are_those_of_coreutils(tmp_path: Path) -> None:
    names = [b"plain", b"with space", b"line\nend", b"back\\slash", b"\\n", b"car\rriage", b"\xff", b"sub/file"]
    (tmp_path / "sub").mkdir()
    targets = [tmp_path / os.fsdecode(name) for name in names]
    for number, target in enumerate(targets):
        target.write_bytes(bytes([number]))
    path = tmp_path / "SHA256SUMS"
    path.write_bytes(checksums(targets, path))
    theirs = subprocess.run(
        [b"sha256sum", b"--", *names], cwd=tmp_path, capture_output=True, check=True
    ).stdout.splitlines()  # fmt: skip
    assert sorted(path.read_bytes().splitlines()) == sorted(theirs)
    assert len(valid(path)) == len(names)
    path.write_bytes(checksums([], path))  # read back and written again
    assert sorted(path.read_bytes().splitlines()) == sorted(theirs)


@pytest.mark.parametrize("option", ["--failed-list", "--checksums", "--log"])
@pytest.mark.parametrize("content", ["my notes\n", '{"my": "data"}\n'])
def test_a_file_that_pdd_did_not_write_is_kept(batch: Callable[..., Outcome], option: str, content: str) -> None:
    mine = Path("mine.txt")
    mine.write_text(content)
    found = batch(option, mine)
    assert found.code == 2
    assert "mine.txt" in found.err
    assert mine.read_text() == content
    assert not Path("out").exists()


def test_a_list_that_was_changed_is_kept(batch: Callable[..., Outcome]) -> None:
    assert batch("--failed-list", "failed.txt").code == 3
    assert batch("--failed-list", "failed.txt").code == 3  # pdd's own is replaced
    Path("failed.txt").write_text("changed\n")
    assert batch("--failed-list", "failed.txt").code == 2
    assert Path("failed.txt").read_text() == "changed\n"
    Path("link").symlink_to("list.txt")
    assert "not a regular file" in batch("--failed-list", "link").err
    assert "is also an output" in batch("--failed-list", "out/a.png").err
    assert "are the same file" in batch("--failed-list", "x", "--checksums", "x").err
