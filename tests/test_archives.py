"""Comics (.cbz) and ZIP archives, read and written with Python's zipfile and tested with `unzip`."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from pdd_cli.imaging.provenance import made_by_pdd
from tests.helpers.commands import Hold
from tests.helpers.images import photo
from tests.helpers.networks import compact


def page(seed: int, format: str = "PNG", size: tuple[int, int] = (10, 12)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(*size, seed)).save(file, format)
    return file.getvalue()


@pytest.fixture
def comic(pdd):
    """`pdd` in a folder with a comic of three pages in an order of its own, and what else comics contain."""
    save_file(compact(2), "model.safetensors")
    with zipfile.ZipFile("comic.cbz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"scanned by me"
        archive.writestr(zipfile.ZipInfo("b/", (2001, 2, 3, 4, 5, 6)), b"")
        archive.writestr(zipfile.ZipInfo("b/10.png", (2001, 2, 3, 4, 5, 6)), page(1))
        archive.writestr("ComicInfo.xml", "<ComicInfo><Title>T</Title></ComicInfo>")
        archive.writestr("a – 2.jpg", page(2, "JPEG"))
        archive.writestr("__MACOSX/._x.png", b"junk")
        archive.writestr("a.webp", page(3, "WEBP"))
    return pdd


def upscaled(pdd, *arguments: object) -> dict[str, Any]:
    done = pdd("upscale", *arguments, "--weights", "model.safetensors", "--precision", "fp32", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_pages_are_upscaled_and_everything_else_is_kept(comic) -> None:
    document = upscaled(comic, "comic.cbz", "out.cbz")
    assert document["done"] == 1
    with zipfile.ZipFile("comic.cbz") as before, zipfile.ZipFile("out.cbz") as after:
        assert after.namelist() == before.namelist()
        assert after.getinfo("b/10.png").date_time == (2001, 2, 3, 4, 5, 6)
        assert after.comment.startswith(b"scanned by me\npdd ")
        for name in ("ComicInfo.xml", "__MACOSX/._x.png", "b/"):
            assert after.read(name) == before.read(name)
        Path("page.png").write_bytes(before.read("b/10.png"))
        for name, format in (("b/10.png", "PNG"), ("a – 2.jpg", "JPEG"), ("a.webp", "WEBP")):
            with Image.open(io.BytesIO(after.read(name))) as image:
                assert (image.size, image.format) == ((24, 20), format)
        upscaled(comic, "page.png", "page2.png")
        whole = np.asarray(Image.open(io.BytesIO(after.read("b/10.png"))))
        assert np.array_equal(whole, np.asarray(Image.open("page2.png")))
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-t", "-q", "out.cbz"], capture_output=True).returncode == 0
    assert made_by_pdd(Path("out.cbz"))
    assert not list(Path().glob(".pdd-*"))
    assert upscaled(comic, "comic.cbz", "out.cbz")["skipped"] == 1
    assert upscaled(comic, "comic.cbz", "out.cbz", "--overwrite", "--format", "png")["done"] == 1
    assert zipfile.ZipFile("out.cbz").namelist()[3] == "a – 2.png"
    with Path("out.cbz").open("r+b") as file:  # changed by another program
        file.seek(200)
        file.write(b"\1")
    assert comic("upscale", "comic.cbz", "out.cbz", "--weights", "model.safetensors", "--overwrite").code == 2


def test_comics_of_a_folder_and_a_page_that_is_damaged(comic) -> None:
    Path("in").mkdir()
    shutil.move("comic.cbz", "in/a.cbz")
    with zipfile.ZipFile("in/b.cbz", "w") as archive:
        archive.writestr("1.png", page(1))
        archive.writestr("2.png", b"no image")
    Path("in/c.zip").write_bytes(Path("in/b.cbz").read_bytes())
    Path("in/d.cbz").write_bytes(b"no archive")
    Path("in/e.png").write_bytes(page(4))
    done = comic("upscale", "in", "out", "--weights", "model.safetensors", "--json")
    assert done.code == 3
    document = json.loads(done.out)
    assert [file["status"] for file in document["files"]] == ["done", "done", "failed", "done"]
    assert "2.png is copied unchanged: not a PNG" in document["files"][1]["problem"]
    assert "not a ZIP archive" in document["files"][2]["problem"]
    assert document["other_kinds"] == {".zip": 1}
    assert zipfile.ZipFile("out/b.cbz").read("2.png") == b"no image"
    again = json.loads(comic("upscale", "in", "out", "--weights", "model.safetensors", "--json").out)
    assert again["skipped"] == 3
    changed = json.loads(comic("upscale", "in", "out", "--weights", "model.safetensors", "--scale", 1, "--json").out)
    assert changed["done"] == 3
    planned = json.loads(
        comic("upscale", "in/c.zip", "x.zip", "--weights", "model.safetensors", "--dry-run", "--json").out
    )
    assert planned["files"][0]["problem"] == "2 images; can't be read: 2.png"
    assert not Path("x.zip").exists()


@pytest.mark.slow
def test_an_interrupted_comic_continues(comic, tmp_path: Path) -> None:
    hold = Hold(tmp_path / "hold", "000003.jpg", 1)  # when the second page is about to be complete
    environment = {**os.environ, "PYTHONPATH": hold.path}
    arguments = ["upscale", "comic.cbz", "out.cbz", "--weights", "model.safetensors", "--precision", "fp32"]
    process = subprocess.Popen([sys.executable, *hold.command, *arguments], env=environment, text=True)
    hold.wait(process)
    process.kill()
    process.wait()
    assert not Path("out.cbz").exists()
    (done,) = upscaled(comic, "comic.cbz", "out.cbz")["files"]
    assert done["tiles"] == 2  # of three pages
    assert not list(Path().glob(".pdd-*"))
    upscaled(comic, "comic.cbz", "first.cbz")
    with zipfile.ZipFile("out.cbz") as one, zipfile.ZipFile("first.cbz") as other:
        for name in one.namelist():
            assert one.read(name) == other.read(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../up.png", "leads out of the archive"),
        ("/etc/a.png", "leads out of the archive"),
        ("a/../../b.png", "leads out of the archive"),
        ("C:\\a.png", "leads out of the archive"),
        ("a.txt", "no images in it"),
    ],
)
def test_hostile_and_empty_archives_fail(comic, name, words) -> None:
    with zipfile.ZipFile("bad.zip", "w") as archive:
        archive.writestr(name, page(1))
    failed = comic("upscale", "bad.zip", "out.zip", "--weights", "model.safetensors")
    assert failed.code == 3
    assert words in failed.err
    assert not Path("out.zip").exists()


def test_bombs_links_and_encrypted_members_fail(comic) -> None:
    with zipfile.ZipFile("bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", page(1))
    data = bytearray(Path("bad.zip").read_bytes())
    at = data.index(b"PK\1\2")
    struct.pack_into("<I", data, at + 24, 3_000_000_000)  # the size that it claims to expand to
    Path("bomb.zip").write_bytes(data)
    data = bytearray(Path("bad.zip").read_bytes())
    data[at + 8] |= 1
    Path("locked.zip").write_bytes(data)
    link = zipfile.ZipInfo("b.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile("bad.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    for path, words in (("bomb.zip", "bomb"), ("locked.zip", "encrypted"), ("bad.zip", "is a link")):
        failed = comic("upscale", path, "out.zip", "--weights", "model.safetensors")
        assert failed.code == 3
        assert words in failed.err
    failed = comic("upscale", "comic.cbz", "out.png", "--weights", "model.safetensors")
    assert failed.code == 2
    assert "is an archive" in failed.err


def test_members_that_cannot_be_unpacked_are_named_and_leave_nothing_behind(comic) -> None:
    with zipfile.ZipFile("good.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", page(1))
        archive.writestr("2.png", page(2))
    data = Path("good.zip").read_bytes()
    header, entry = data.rindex(b"PK\3\4"), data.rindex(b"PK\1\2")
    unknown = bytearray(data)
    for at in (header + 8, entry + 10):
        struct.pack_into("<H", unknown, at, 9)  # Deflate64, as Windows packs large folders
    Path("unknown.zip").write_bytes(unknown)
    Path("stream.zip").write_bytes(data[: header + 35] + b"\xff" * 20 + data[header + 55 :])
    Path("sum.zip").write_bytes(data[: entry + 16] + bytes([data[entry + 16] ^ 1]) + data[entry + 17 :])
    for name, words in (("unknown", "method is not supported. Pack"), ("stream", "damaged"), ("sum", "CRC")):
        failed = comic("upscale", f"{name}.zip", "out.zip", "--weights", "model.safetensors")
        assert failed.code == 3
        assert f"can't read {name}.zip: " in failed.err
        assert words in failed.err
        assert "bug" not in failed.err
    with zipfile.ZipFile("pages.zip", "w") as archive:
        archive.writestr("1.png", b"no image")
    failed = comic("upscale", "pages.zip", "out.zip", "--weights", "model.safetensors")
    assert "none of its 1 images could be upscaled" in failed.err
    assert not Path("out.zip").exists()
    assert not list(Path().glob(".pdd-*"))


def test_names_keep_their_bytes_and_a_dds_becomes_a_png(comic) -> None:
    japanese, russian = "ページ1.png".encode("cp932"), "ж.txt".encode("cp866")
    texture = io.BytesIO()
    Image.fromarray(photo(8, 8)).save(texture, "DDS")
    with zipfile.ZipFile("in.zip", "w") as archive:
        archive.writestr("J" * len(japanese), page(1))
        archive.writestr("R" * len(russian), b"text")
        archive.writestr("ä.jpg", page(2, "JPEG"))
        archive.writestr("wall.dds", texture.getvalue())
    data = Path("in.zip").read_bytes()
    for name in (japanese, russian):
        data = data.replace((b"J" if name is japanese else b"R") * len(name), name)
    Path("in.zip").write_bytes(data)
    upscaled(comic, "in.zip", "out.zip")
    written = Path("out.zip").read_bytes()
    for name in (japanese, russian):
        assert written.count(name) == 2  # before the data and in the directory
    with zipfile.ZipFile("in.zip") as before, zipfile.ZipFile("out.zip") as after:
        assert after.namelist() == [*before.namelist()[:3], "wall.png"]
        assert [info.flag_bits for info in after.infolist()] == [0, 0, 0x800, 0]
        assert Image.open(io.BytesIO(after.read("wall.png"))).size == (16, 16)
    refused = comic("upscale", "in.zip", "video.zip", "--format", "mp4", "--weights", "model.safetensors")
    assert refused.code == 2
    assert "--format mp4" in refused.err
    with zipfile.ZipFile("in.zip", "a") as archive:
        archive.writestr("wall.png", page(3))
    assert "would become wall.png" in comic("upscale", "in.zip", "x.zip", "--weights", "model.safetensors").err
