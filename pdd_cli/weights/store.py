"""The store: a folder of safetensors files whose headers contain a card.

Card and tensors share a file, so that an entry is replaced by one rename and keeps its provenance when it is copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from pydantic import BaseModel, ConfigDict

from pdd_cli.errors import InputError
from pdd_cli.files import BeforeRename, atomic_write, locked, no_check, write_errors
from pdd_cli.version import __version__
from pdd_cli.weights.states import SUFFIXES, state_sha256

if TYPE_CHECKING:
    from torch import Tensor

CARD_KEY = "pdd_card"
_ELSEWHERE = "Set PDD_HOME to a folder that you may write to."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A name with one of these suffixes would be taken for a file.
_FILE_ENDS = (*SUFFIXES, ".bin", ".param", ".onnx", ".zip")
# Device names of Windows, which are reserved with any suffix.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


class Card(BaseModel):
    """The description of installed weights and their origin."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    kind: str = "sr"  # "sr" (a super-resolution model), "features" (an ImageNet network) or "discriminator"
    architecture: str
    scale: int | None = None
    licence: str = "unknown"
    source: str
    sha256: str | None = None  # of the downloaded file
    tensors: int = 0
    parameters: int = 0
    created: str  # UTC, ISO 8601
    pdd_version: str | None = None  # the version that wrote the card
    content_sha256: str | None = None  # `state_sha256` of the tensors
    base: str | None = None  # adapted weights: name in the store or absolute path of their base
    base_sha256: str | None = None  # adapted weights: `state_sha256` of the base
    adapted: dict[str, Any] | None = None  # adapted weights: settings of the run, verdict and strength

    def as_json(self) -> str:
        """The card as ASCII text, as it is stored in files."""
        return json.dumps(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Entry:
    """An installed set of weights."""

    name: str
    path: Path
    card: Card

    def as_document(self) -> dict[str, object]:
        """The path and the card as plain values for JSON."""
        return {"path": self.path, **self.card.model_dump()}


def invalid_name_reason(name: str) -> str:
    """The reason why new weights can't have this name; "" if they can."""
    from pdd_cli.weights.catalog import CATALOG

    if not _NAME.fullmatch(name):
        return "a name consists of letters, digits, '.', '_' and '-', and starts with a letter or digit"
    if name.lower().endswith(_FILE_ENDS):
        return f"a name that ends in {Path(name).suffix} looks like a file name"
    if name.endswith(".") or name.split(".")[0].lower() in _DEVICES:
        return "some operating systems don't allow a file of this name"
    if name.lower() in {entry.name.lower() for entry in CATALOG}:
        return "it is the name of weights that pdd fetches"
    return ""


def valid_name_from(text: str) -> str:
    """`text`, such as the name of a folder, converted to a valid name of weights; unchanged if it is valid."""
    if not invalid_name_reason(text):
        return text
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:64].rstrip("-._")
    if invalid_name_reason(name):
        name = f"{name.replace('.', '-')}-adapted" if name else "adapted"
    return name


def home() -> Path:
    """The folder of pdd's data: `$PDD_HOME`, or the platform's data folder."""
    configured = os.environ.get("PDD_HOME")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_data_dir("pdd", appauthor=False))


def cache_home() -> Path:
    """The folder of data that pdd can recreate: `$PDD_HOME/cache`, or the platform's cache folder."""
    if os.environ.get("PDD_HOME"):
        return home() / "cache"
    return Path(platformdirs.user_cache_dir("pdd", appauthor=False))


@dataclass(frozen=True)
class Store:
    """The weights installed in one folder."""

    root: Path

    @classmethod
    def default(cls) -> Store:
        """The store of `home()`."""
        return cls(home() / "weights")

    @property
    def downloads(self) -> Path:
        """The folder of incomplete downloads, which can be resumed."""
        return self.root.parent / "downloads"

    @property
    def images(self) -> Path:
        """The folder of the installed image sets, each a folder with its name."""
        return self.root.parent / "images"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder on the store's disk. Raises InputError if it can't be created."""
        with write_errors(self.downloads, _ELSEWHERE):
            self.downloads.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=self.downloads, prefix="scratch-")
        with folder as path:
            yield Path(path)

    @contextlib.contextmanager
    def locked(self, name: str, on_wait: Callable[[], None]) -> Iterator[bool]:
        """Lock the download of `name` against other processes; see `files.locked`."""
        with locked(self.downloads / f"{name}.lock", on_wait, _ELSEWHERE) as waited:
            yield waited

    def path(self, name: str) -> Path:
        """The path of the entry `name`, which need not exist. Raises InputError for an invalid name."""
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is not a valid name of weights",
                "Use letters, digits, '.', '_' and '-', and start with a letter or digit.",
            )
        return self.root / f"{name}.safetensors"

    def get(self, name: str) -> Entry | None:
        """The entry `name`, or None if it isn't installed."""
        path = self.path(name)
        if not path.is_file():
            return None
        card = read_card(path)
        if card is None:
            raise InputError(f"{path} has no card of pdd", f"Delete it, then run: pdd fetch-weights {name}")
        return Entry(name, path, card)

    def entries(self) -> Iterator[Entry]:
        """All installed entries, sorted by name. Files without a card are skipped."""
        for path in sorted(self.root.glob("*.safetensors")):
            card = read_card(path)
            if card is not None:
                yield Entry(path.stem, path, card)

    def add(self, card: Card, state: Mapping[str, Tensor]) -> Entry:
        """Install `state` atomically as `card.name`, replacing an entry of that name."""
        path = self.path(card.name)
        return Entry(card.name, path, write_weights(path, card, state))

    def remove(self, names: Sequence[str], *, overwrite: bool = False) -> list[Removed]:
        """Delete the entries `names` with their cards. All names are checked first.

        Raises InputError for a name that isn't installed or, without `overwrite`, is the base of other entries, and
        for a file that can't be deleted, or that pdd didn't write.
        """
        names = list(dict.fromkeys(names))
        found = []
        for name in names:
            path = self.path(name)
            if not path.is_file():
                raise InputError(
                    f"no weights named '{name}' are installed", "pdd fetch-weights --list shows the names."
                )
            if read_card(path) is None:
                raise InputError(
                    f"{path} has no card of pdd: it is damaged, or pdd didn't write it",
                    "Nothing was removed. Delete it yourself.",
                )
            found.append(Removed(name, path, path.stat().st_size))
        users = {name: [other.name for other in self.entries() if other.card.base == name] for name in names}
        for name, others in users.items():
            left = [other for other in others if other not in names]
            if left and not overwrite:
                raise InputError(
                    f"'{name}' is the base of {', '.join(left)}: --strength needs it",
                    "Nothing was removed. --overwrite removes it anyway.",
                )
        for removed in found:
            with write_errors(removed.path):
                removed.path.unlink()
        return found


def write_weights(path: Path, card: Card, state: Mapping[str, Tensor], before_rename: BeforeRename = no_check) -> Card:
    """Write `state` by `atomic_write` as a safetensors file with `card`, which is completed and returned."""
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    card = card.model_copy(
        update={
            "tensors": len(tensors),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "pdd_version": __version__,
            "content_sha256": state_sha256(tensors),
        }
    )
    metadata = {"format": "pt", "architecture": card.architecture, "licence": card.licence, CARD_KEY: card.as_json()}
    if card.scale is not None:
        metadata["scale"] = str(card.scale)
    with atomic_write(path, before_rename) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return card


@dataclass(frozen=True)
class Removed:
    """An entry that was deleted, and the number of bytes that this freed."""

    name: str
    path: Path
    freed: int


def read_card(path: Path) -> Card | None:
    """The card in the header of a safetensors file; None if it has none, or isn't a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            return card_from(opened.metadata())
    except (SafetensorError, OSError):
        return None


def card_from(metadata: Mapping[str, str] | None) -> Card | None:
    """The card in the metadata of a safetensors file; None if it has none."""
    text = (metadata or {}).get(CARD_KEY)
    try:
        return Card.model_validate(json.loads(text)) if text else None
    except ValueError:  # invalid JSON, or an invalid card
        return None
