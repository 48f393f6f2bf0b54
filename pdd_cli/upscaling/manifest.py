"""Records of how each output of a folder was made, so that a run makes only missing or outdated outputs."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError
from pdd_cli.files import atomic_write, write_errors
from pdd_cli.imaging.provenance import Provenance, made_by_pdd
from pdd_cli.version import __version__
from pdd_cli.weights.sources import file_sha256

NAME = ".pdd-manifest.jsonl"
_PART = ".pdd-manifest.{}.jsonl"

State = Literal["current", "stale", "missing", "foreign"]


@dataclass(frozen=True)
class _Record:
    """The `key` of an output; until it is `done` the file may be from an earlier run.

    `about`: how it was made; empty in a manifest of an earlier version. Until it is done, `earlier_sha256` in it lists
    the outputs that the file may still be.
    """

    key: str
    done: bool
    about: Mapping[str, object]

    def line(self, name: str) -> bytes:
        values = {"output": name, **self.about, "key": self.key, "done": self.done}
        # A name that isn't UTF-8 holds surrogates; as escapes they are valid JSON, and read back to the same name.
        return json.dumps(values, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


def key_of(digest: str, recipe: Mapping[str, object]) -> str:
    """The key of an output: the SHA-256 of its input, and a digest of the weights and settings."""
    made_by = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
    return f"{digest}-{made_by[:16]}"


def recorded(folder: Path) -> set[Path]:
    """The outputs recorded in the manifest of `folder`, if there is one."""
    if not (folder / NAME).is_file():
        return set()
    return {folder / name for name in Manifest(folder, {}).outputs}


class Manifest:
    """The records of the outputs in one folder, as lines of JSON, appended before and after an output gets its name.

    `recipe`: the weights and settings that determine an output together with its input. `provenance` is the readable
    form of it. `part`: the number of this process if several write to the folder. Each appends to its own file, because
    appends from several machines to one file may be lost. A line cut short by a power failure is ignored, and its
    output is made again.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, object],
        *,
        provenance: Provenance | None = None,
        part: int | None = None,
    ) -> None:
        self._folder = folder
        self._whole = folder / NAME
        self._path = self._whole if part is None else folder / _PART.format(part)
        self._recipe = recipe
        self._provenance = provenance
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()
        self._lines = 0
        self._cut = False
        # Parts exist during a run of several processes, or after one that died. They are newer than the whole.
        for path in (self._whole, *self._parts()):
            self._read(path)

    @property
    def outputs(self) -> list[str]:
        """Paths of the outputs, relative to the folder."""
        return list(self._records)

    def key(self, digest: str) -> str:
        """The key of a new output of an input with this SHA-256."""
        return key_of(digest, self._recipe)

    def state(self, target: Path, key: str) -> State:
        """The state of the output `target` for `key`; `foreign`: not recorded, or changed since."""
        if not target.exists():
            return "missing"
        record = self._records.get(self._name(target))
        if record is not None and record.done and record.key == key:
            return "current"
        return "stale" if record is not None and self.made(target) else "foreign"

    def made(self, target: Path) -> bool:
        """Whether pdd made the file `target`, and nothing has changed it since."""
        known = self._digests(self._name(target))
        return bool(known and file_sha256(target) in known) or made_by_pdd(target)

    def record(self, target: Path, key: str, *, source: Path, written: Path) -> None:
        """Record that the finished file `written` is about to replace `target`; `finish` follows.

        Raises InputError or ResourceError if that can't be written.
        """
        name = self._name(target)
        # If pdd is killed between the two, the old file and the new one are both known.
        about = {**self._about(written, source, key), "earlier_sha256": self._digests(name)}
        self._append(name, _Record(key, done=False, about=about))

    def finish(self, target: Path) -> None:
        """Record that `target` is done. Raises as `record` does."""
        name = self._name(target)
        record = self._records[name]
        about = {key: value for key, value in record.about.items() if key != "earlier_sha256"}
        self._append(name, _Record(record.key, done=True, about=about))

    def _append(self, name: str, record: _Record) -> None:
        with self._lock, write_errors(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(record.line(name))
                file.flush()
                os.fsync(file.fileno())
            self._records[name] = record

    def _digests(self, name: str) -> list[str]:
        """The SHA-256 of each output of this name that pdd may have left."""
        record = self._records.get(name)
        about = record.about if record is not None else {}
        earlier = about.get("earlier_sha256")
        known = [about.get("output_sha256"), *(earlier if isinstance(earlier, list) else [])]
        return [str(digest) for digest in known if digest]

    def _about(self, written: Path, source: Path, key: str) -> dict[str, object]:
        made = self._provenance
        return {
            "input": source.absolute(),
            "input_sha256": key.partition("-")[0],
            "output_sha256": file_sha256(written),
            "weights": made.model if made else None,
            "weights_sha256": made.sha256 if made else None,
            "how": made.how if made else None,
            "settings": {name: value for name, value in self._recipe.items() if name != "weights"},
            "pdd": __version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def inputs(self) -> dict[Path, Path | None]:
        """The recorded outputs, and the input of each if it is known."""
        inputs = {name: record.about.get("input") for name, record in self._records.items()}
        return {self._folder / name: Path(str(source)) if source else None for name, source in inputs.items()}

    def weights_of(self, target: Path) -> str:
        """Name and SHA-256 of the weights that made the output `target`; "" if they are not recorded."""
        record = self._records.get(self._name(target))
        about = record.about if record is not None else {}
        return f"{about['weights']} (sha256 {about['weights_sha256']})" if about.get("weights") else ""

    def tidy(self) -> None:
        """Merge all records into one file, a line each, if there are parts, cut lines or many old lines.

        Only one process may call it, while no other writes.
        """
        parts = self._parts()
        # A run writes two lines per output; more are from earlier runs.
        if not parts and not self._cut and self._lines <= 4 * len(self._records) + 100:
            return
        with atomic_write(self._whole) as temporary:
            temporary.write_bytes(b"".join(record.line(name) for name, record in self._records.items()))
        # Deleted last: until then they hold the same records.
        for path in parts:
            path.unlink(missing_ok=True)
        self._lines, self._cut = len(self._records), False

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(_PART.format("*")))

    def _name(self, target: Path) -> str:
        return target.relative_to(self._folder).as_posix()

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"can't read {path}: {error.strerror or error}") from error
        self._lines += data.count(b"\n")
        # The next line would be appended to one that is cut short.
        self._cut = self._cut or (bool(data) and not data.endswith(b"\n"))
        # Not splitlines(): a name may contain other line ends of Unicode, which JSON doesn't escape.
        for line in data.decode("utf-8", "surrogateescape").split("\n"):
            try:
                values = json.loads(line)
                name, key, done = str(values.pop("output")), str(values.pop("key")), bool(values.pop("done"))
                self._records[name] = _Record(key, done, values)
            except (ValueError, KeyError, TypeError):
                continue  # cut short
