"""What made each output of a folder, so that a run does exactly what is missing or changed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError
from pdd_cli.files import write_text

NAME = ".pdd-manifest.jsonl"

State = Literal["current", "stale", "missing", "foreign"]


@dataclass(frozen=True)
class _Record:
    """`key` of the run that made the output; while it isn't `done` the file may be that of an earlier run."""

    key: str
    done: bool


class Manifest:
    """The records of the outputs in one folder: one line of JSON each, appended when an output is begun and done.

    `recipe` is what decides, with the input, what an output is: the weights and the settings. A line that was cut
    short by a power failure is passed over, and its output made again.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, object]) -> None:
        self._path = folder / NAME
        self._folder = folder
        self._recipe = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()
        self._read()

    def key(self, data: bytes) -> str:
        """What an output made now of an input of this content would be known by."""
        return f"{hashlib.sha256(data).hexdigest()}-{self._recipe[:16]}"

    def state(self, target: Path, key: str) -> State:
        """Whether the output `target` is what `key` makes; `foreign` is a file that no recorded run has made."""
        if not target.exists():
            return "missing"
        record = self._records.get(self._name(target))
        if record is None:
            return "foreign"
        return "current" if record == _Record(key, True) else "stale"

    def record(self, target: Path, key: str, *, done: bool) -> None:
        """Note that `target` is begun or done. Raises InputError, ResourceError where that can't be written."""
        name = self._name(target)
        line = json.dumps({"output": name, "key": key, "done": done}, ensure_ascii=False) + "\n"
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:
                    file.write(line.encode("utf-8", "surrogateescape"))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(f"can't write {self._path}: {error.strerror or error}") from error
            self._records[name] = _Record(key, done)

    def _name(self, target: Path) -> str:
        return target.relative_to(self._folder).as_posix()

    def _read(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"can't read {self._path}: {error.strerror or error}") from error
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        for line in lines:
            try:
                values = json.loads(line)
                self._records[str(values["output"])] = _Record(str(values["key"]), bool(values["done"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut short
        # Two lines an output are its life; what is more is from earlier runs. Rewritten too where a line was cut
        # short, lest the next one be appended to it.
        if len(lines) > 4 * len(self._records) + 100 or (data and not data.endswith(b"\n")):
            text = "".join(
                json.dumps({"output": name, "key": record.key, "done": record.done}, ensure_ascii=False) + "\n"
                for name, record in self._records.items()
            )
            write_text(self._path, text)
