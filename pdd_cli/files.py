"""Whole files only: every write of pdd goes through here."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.system import try_lock

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNENCODABLE = "backslashreplace"
"""Of names that aren't UTF-8: what becomes of them is still valid JSON, which reads back to the same name."""

_TEMPORARY = ".pdd-tmp-"
_RENAMED_AFTER = 0.1  # seconds; a writer gives up its lock just before it renames the file


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; when the block ends well, it becomes `path` (fsync, rename).

    When the block raises, the temporary file is removed and `path` is as it was before. The temporary name starts
    with a dot and keeps the suffix, so that writers that choose the format by suffix work.

    Raises ResourceError when the disk is full, InputError when the folder can't be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor):
                try_lock(descriptor)  # as long as it is being written
                yield temporary
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
            # Closed by now: Windows doesn't rename a file that is open.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(path: Path, hint: str = "Choose a folder that you may write to.") -> Iterator[None]:
    """Whatever keeps `path` from being written, as a ResourceError (a full disk) or InputError that names it."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path, hint) from error
    except Exception as error:
        if isinstance(error, PddError) or not _is_of_full_disk(error):
            raise
        raise _explain(OSError(errno.ENOSPC, ""), path, hint) from error


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None], hint: str) -> Iterator[bool]:
    """Hold the lock file `path`, one process at a time; `on_wait` is called before waiting for another process.

    Yields whether it had to wait: what the block is for may be done by now. Raises as `write_errors` does.
    """
    from filelock import FileLock, Timeout

    with write_errors(path, hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        waited = False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            on_wait()
            lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove the temporary files that processes which were killed have left in `folders`; not those being written."""
    unlocked = [path for folder in folders for path in folder.glob(f"{_TEMPORARY}*") if not _is_locked(path)]
    if unlocked:
        time.sleep(_RENAMED_AFTER)
    for path in unlocked:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb+") as file:
            return not try_lock(file.fileno())
    except OSError:
        return True


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all; what isn't Unicode (a file's name) as an escape."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=UNENCODABLE)


def append_line(path: Path, line: str) -> None:
    """Add a line to the text file `path`. What a full disk cuts short has no line end."""
    with write_errors(path), path.open("a", encoding="utf-8", errors=UNENCODABLE) as file:
        file.write(line + "\n")


def check_log(path: Path) -> None:
    """Make the JSON lines file `path` where it isn't there.

    Raises InputError where nothing can be added to it, and for a file that holds something else.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            if file.read(1) not in (b"", b"{"):
                raise InputError(f"--log {path}: the file is no log of pdd, so nothing is added to it", "Name another.")


def is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is `folder` or lies below it, through links and spellings of names."""
    real = path.resolve()
    return any(_is_same(place, folder) for place in (real, *real.parents))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return one == other.resolve()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Whether a library's error is of one: safetensors quotes the system's, torch fails while it handles it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return True
        if any(f"(os error {code})" in str(error) for code in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explain(error: OSError, path: Path, hint: str) -> InputError | ResourceError:
    if error.errno in FULL_DISK:
        return ResourceError(f"no space left on the disk while writing {path}", "Free some space and run it again.")
    return InputError(f"can't write {path}: {error.strerror or error}", hint)
