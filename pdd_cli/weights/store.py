"""The store: one folder of weights, an entry being one safetensors file whose header holds its card.

Card and tensors share a file so that an entry is replaced in one rename, and keeps its provenance wherever it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from pydantic import BaseModel, ConfigDict

from pdd_cli.errors import InputError
from pdd_cli.files import atomic_write, locked, write_errors
from pdd_cli.version import __version__
from pdd_cli.weights.states import SUFFIXES, state_sha256

if TYPE_CHECKING:
    from torch import Tensor

_CARD_KEY = "pdd_card"
_ELSEWHERE = "Set PDD_HOME to a folder that you may write to."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A name with one of these ends would be taken for a file.
_FILE_ENDS = (*SUFFIXES, ".bin", ".param", ".onnx", ".zip")
# Windows keeps them for devices, whatever follows after a dot.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


class Card(BaseModel):
    """Where an entry's weights come from and what they are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    kind: str = "sr"  # "sr" (a super-resolution model), "features" (an ImageNet network) or "discriminator"
    architecture: str
    scale: int | None = None
    licence: str = "unknown"
    source: str
    sha256: str | None = None  # of the file that the weights were taken from
    tensors: int = 0
    parameters: int = 0
    created: str  # UTC, ISO 8601
    pdd_version: str | None = None  # that wrote the card
    content_sha256: str | None = None  # over the tensors (see `state_sha256`)
    base: str | None = None  # adapted models: the store name or absolute path of the weights they started from
    base_sha256: str | None = None  # … and the sha256 over its tensors (see `state_sha256`)
    adapted: dict[str, Any] | None = None  # adapted models: settings and features that made them


@dataclass(frozen=True)
class Entry:
    """An installed set of weights."""

    name: str
    path: Path
    card: Card

    def as_document(self) -> dict[str, object]:
        """The path and the card as plain values for JSON."""
        return {"path": self.path, **self.card.model_dump()}


def name_problem(name: str) -> str:
    """Why `name` can't be that of new weights; "" where it can."""
    from pdd_cli.weights.catalog import CATALOG

    if not _NAME.fullmatch(name):
        return "a name consists of letters, digits, '.', '_' and '-', the first a letter or digit"
    if name.lower().endswith(_FILE_ENDS):
        return f"a name that ends with {Path(name).suffix} is taken for a file"
    if name.endswith(".") or name.split(".")[0].lower() in _DEVICES:
        return "not every system allows a file of that name"
    if name.lower() in {entry.name.lower() for entry in CATALOG}:
        return "pdd fetches weights of that name"
    return ""


def name_from(text: str) -> str:
    """The weights name nearest to `text`, which may be any folder's name; `text` itself where it can be one."""
    if not name_problem(text):
        return text
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:64].rstrip("-._")
    if name_problem(name):
        name = f"{name.replace('.', '-')}-adapted" if name else "adapted"
    return name


def home() -> Path:
    """The folder of everything that pdd keeps: `$PDD_HOME`, or the platform's data folder."""
    configured = os.environ.get("PDD_HOME")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_data_dir("pdd", appauthor=False))


def cache_home() -> Path:
    """The folder of what pdd can make again: `$PDD_HOME/cache`, or the platform's cache folder."""
    if os.environ.get("PDD_HOME"):
        return home() / "cache"
    return Path(platformdirs.user_cache_dir("pdd", appauthor=False))


@dataclass(frozen=True)
class Store:
    """The entries below one folder."""

    root: Path

    @classmethod
    def default(cls) -> Store:
        """The store of `home()`."""
        return cls(home() / "weights")

    @property
    def downloads(self) -> Path:
        """Where downloads gather until they are whole; what was broken off waits there to go on."""
        return self.root.parent / "downloads"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the time of the block, on the store's disk. Raises InputError where none can be made."""
        with write_errors(self.downloads, _ELSEWHERE):
            self.downloads.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=self.downloads, prefix="scratch-")
        with folder as path:
            yield Path(path)

    @contextlib.contextmanager
    def locked(self, name: str, on_wait: Callable[[], None]) -> Iterator[bool]:
        """Hold what is fetched as `name` against other processes; see `files.locked`."""
        with locked(self.downloads / f"{name}.lock", on_wait, _ELSEWHERE) as waited:
            yield waited

    def path(self, name: str) -> Path:
        """Where the entry `name` is or would be. Raises InputError for a name that can't be a file name."""
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} can't be a weights name",
                "Use letters, digits, '.', '_' and '-', the first a letter or digit.",
            )
        return self.root / f"{name}.safetensors"

    def get(self, name: str) -> Entry | None:
        """The entry `name`, or None where it isn't installed."""
        path = self.path(name)
        if not path.is_file():
            return None
        card = read_card(path)
        if card is None:
            raise InputError(f"{path} holds no card of pdd", f"Delete it, then run: pdd fetch-weights {name}")
        return Entry(name, path, card)

    def entries(self) -> Iterator[Entry]:
        """All installed entries by name; a file without a card is skipped."""
        for path in sorted(self.root.glob("*.safetensors")):
            card = read_card(path)
            if card is not None:
                yield Entry(path.stem, path, card)

    def add(self, card: Card, state: Mapping[str, Tensor]) -> Entry:
        """Install `state` under `card.name`, replacing an entry of that name; whole or not at all."""
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
        path = self.path(card.name)
        with atomic_write(path) as temporary:
            text = json.dumps(card.model_dump(mode="json"))
            save_file(tensors, temporary, metadata={_CARD_KEY: text, "format": "pt"})
        return Entry(card.name, path, card)


def read_card(path: Path) -> Card | None:
    """The card in a safetensors file's header; None for a file without one, or one that isn't safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(_CARD_KEY)
    except (SafetensorError, OSError):
        return None
    try:
        return Card.model_validate(json.loads(text)) if text else None
    except ValueError:  # of JSON and of pydantic
        return None
