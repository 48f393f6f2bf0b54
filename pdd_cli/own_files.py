"""Text files that pdd writes where the user says: reports, lists, checksums. A file that pdd didn't write is kept.

Such files have no room for provenance, so the SHA-256 of what pdd wrote is recorded in `PDD_HOME`, by path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import ENCODING_ERRORS, atomic_write, locked, write_text
from pdd_cli.weights.store import home

_RECORD = "written.json"


def check_own_file(path: Path, option: str) -> None:
    """Raise InputError if writing `path`, which `option` names, would replace something that pdd didn't write.

    An empty file may be replaced.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_file():
        raise InputError(f"{option} {path}: not a regular file", "Choose another file.")
    if path.stat().st_size and _digest(path.read_bytes()) not in _recorded().get(_key(path), []):
        raise InputError(
            f"{option} {path} exists and was not written by pdd, or was changed since: it is not replaced",
            "Move it away, or choose another file.",
        )


def write_own_file(path: Path, content: str | bytes, option: str) -> None:
    """Write `content` atomically, and record it. Raises InputError as `check_own_file` does."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", ENCODING_ERRORS)
    path = path.resolve()  # a link stays, and the file that it points to is written
    check_own_file(path, option)
    # Recorded first: if pdd is killed between the two, the old file and the new one are both known.
    with contextlib.suppress(PddError), locked(home() / f"{_RECORD}.lock", lambda: None, "Check PDD_HOME."):
        records = {key: digests for key, digests in _recorded().items() if Path(key).exists()}
        key = _key(path)
        records[key] = [*records.get(key, [])[-1:], _digest(data)]
        write_text(home() / _RECORD, json.dumps(records, indent=1))
    with atomic_write(path, lambda temporary: check_own_file(path, option)) as temporary:
        temporary.write_bytes(data)


def _recorded() -> dict[str, list[str]]:
    """The SHA-256 of the last contents that pdd wrote, by path."""
    try:
        content = json.loads((home() / _RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(path: Path) -> str:
    return path.resolve().as_posix().encode("utf-8", ENCODING_ERRORS).decode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
