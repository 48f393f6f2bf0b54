"""Whole files only: every write of pdd goes through here."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pdd_cli.errors import InputError, ResourceError

_TEMPORARY = ".pdd-tmp-"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; when the block ends well, it becomes `path` (fsync, rename).

    When the block raises, the temporary file is removed and `path` is as it was before. The temporary name starts
    with a dot and keeps the suffix, so that writers that choose the format by suffix work.

    Raises ResourceError when the disk is full, InputError when the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
    except OSError as error:
        raise _explain(error, path) from error
    temporary = Path(name)
    try:
        _lock(descriptor)  # as long as it is being written
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove the temporary files that processes which were killed have left in `folders`; not those being written."""
    for path in (path for folder in folders for path in folder.glob(f"{_TEMPORARY}*")):
        with contextlib.suppress(OSError), path.open("rb+") as file:
            if _lock(file.fileno()):
                path.unlink()


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or its process ends; False where another has, or locks aren't known."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explain(error: OSError, path: Path) -> InputError | ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left on the disk while writing {path}", "Free some space and run it again.")
    return InputError(f"can't write {path}: {error.strerror or error}", "Choose a folder that you may write to.")
