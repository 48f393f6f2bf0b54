"""Atomic writes: all files that pdd writes go through this module."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.system import try_lock

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ENCODING_ERRORS = "backslashreplace"
"""Error handler for file names that aren't UTF-8. The escaped name is valid in JSON and reads back to the same name."""

_TEMPORARY = ".pdd-tmp-"
_RENAME_SECONDS = 0.1  # a writer releases its lock just before it renames the file


BeforeRename = Callable[[Path], None]
"""Is called with a finished temporary file just before it gets its name. If it raises, that name is left alone."""


def no_check(temporary: Path) -> None:
    """The `BeforeRename` for files in folders of pdd."""


@contextlib.contextmanager
def atomic_write(path: Path, before_rename: BeforeRename = no_check) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block succeeds, rename it to `path` after an fsync.

    If the block or `before_rename` raises, the temporary file is removed and `path` is unchanged. `before_rename` is
    the place to check that `path` may be replaced: minutes may have passed since the work began. The temporary name
    starts with a dot and keeps the suffix, because some writers choose the format by the suffix.

    Raises ResourceError if the disk is full, InputError if the folder can't be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor):
                try_lock(descriptor)  # held until the file is written
                yield temporary
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
            # The file is closed here: Windows can't rename an open file.
            temporary.chmod(0o666 & ~_umask())
            before_rename(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(path: Path, hint: str = "Choose a folder that you may write to.") -> Iterator[None]:
    """Convert errors of writing `path` to a ResourceError (disk full) or an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path, hint) from error
    except Exception as error:
        if isinstance(error, PddError) or not _is_disk_full(error):
            raise
        raise _explain(OSError(errno.ENOSPC, ""), path, hint) from error


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None], hint: str) -> Iterator[bool]:
    """Hold the lock file `path`, one process at a time; `on_wait` is called before waiting for another process.

    Yields whether it had to wait; then the other process may have done the work. Raises as `write_errors` does.
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
    """Remove temporary files that killed processes left in `folders`, except files that are being written."""
    unlocked = [path for folder in folders for path in folder.glob(f"{_TEMPORARY}*") if not _is_locked(path)]
    if unlocked:
        time.sleep(_RENAME_SECONDS)
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
    """Write `text` atomically as UTF-8 to `path`. Bytes of file names that aren't Unicode are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=ENCODING_ERRORS)


def append_line(path: Path, line: str) -> None:
    """Append a line to the text file `path`. A line that a full disk cut short has no line end."""
    with write_errors(path), path.open("a", encoding="utf-8", errors=ENCODING_ERRORS) as file:
        file.write(line + "\n")


def check_log(path: Path) -> None:
    """Create the JSON lines file `path` if it doesn't exist.

    Raises InputError if it can't be written, or if it holds something else.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            if not _is_log_line(file.readline(1 << 16)):
                raise InputError(
                    f"--log {path}: the file is not a log of pdd, so nothing is added to it", "Choose another."
                )


def _is_log_line(line: bytes) -> bool:
    """Whether `line` is the first of a log, or empty."""
    try:
        values = json.loads(line) if line else {"time": "", "input": "", "status": ""}
    except ValueError:
        return False
    return isinstance(values, dict) and {"time", "input", "status"} <= values.keys()


def is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is `folder` or is inside it. Links and letter case are resolved."""
    real = path.resolve()
    return any(_is_same(place, folder) for place in (real, *real.parents))


@functools.cache
def is_case_insensitive(folder: Path) -> bool:
    """Whether the file system of `folder`, which need not exist, takes names that differ only by case for the same."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=_TEMPORARY) as opened:
            path = Path(opened.name)
            return path.with_name(path.name.swapcase()).exists()
    except OSError:  # nothing can be written there anyway
        return False


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return one == other.resolve()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a library's error means a full disk: safetensors quotes the system error, torch raises a second error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return True
        if any(f"(os error {code})" in str(error) for code in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explain(error: OSError, path: Path, hint: str) -> InputError | ResourceError:
    if error.errno in FULL_DISK:
        return ResourceError(
            f"no space left on the disk while writing {path}", "Free some space and run the command again."
        )
    return InputError(f"can't write {path}: {error.strerror or error}", hint)
