"""Lists of files for archives: inputs to read, inputs that failed, checksums of the outputs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pdd_cli.batch.plan import Plan
from pdd_cli.errors import InputError
from pdd_cli.upscaling.jobs import Result
from pdd_cli.weights.sources import file_sha256

_LINE = re.compile(rb"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}  # as in coreutils
_SHOWN = 3


def read_list(path: Path) -> list[Path]:
    """The paths in a list, one a line, or separated by NUL if the list contains one; `-` is stdin.

    Raises InputError if it can't be read, or is empty.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"--from-list {path}: can't be read: {error.strerror or error}") from error
    if b"\0" in data:
        names = data.split(b"\0")
    else:
        names = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        if all(name.endswith(b"\r") for name in names if name):  # from Windows
            names = [name.removesuffix(b"\r") for name in names]
    found = [Path(os.fsdecode(name)) for name in names if name]
    if not found:
        raise InputError(f"--from-list {path}: the list is empty", "There is nothing to do.")
    return found


def only_listed(plan: Plan, listed: Sequence[Path], source: Path) -> Plan:
    """The plan with only those inputs that are in the list read from `source`; the other entries become problems.

    Raises InputError if none is.
    """
    wanted = {path.resolve(): path for path in listed}
    jobs = [job for job in plan.jobs if job.source.resolve() in wanted]
    found = {job.source.resolve() for job in jobs}
    others = [path for real, path in wanted.items() if real not in found]
    if not jobs:
        raise InputError(
            f"--from-list {source}: none of its {len(wanted)} entries is among the inputs ({_named(others)})",
            "With INPUT, only those of its files that are in the list are upscaled.",
        )
    problems = [f"--from-list {source}: {path} is not among the inputs" for path in others]
    return replace(plan, jobs=jobs, problems=[*plan.problems, *problems])


def failed_list(plan: Plan, results: Sequence[Result]) -> bytes:
    """The inputs without a finished output as `read_list` reads them; empty if there is none."""
    finished = {result.job for result in results if result.status in ("done", "skipped")}
    names = [os.fsencode(job.source.absolute()) for job in plan.jobs if job not in finished]
    end = b"\0" if any(b"\n" in name for name in names) else b"\n"
    return b"".join(name + end for name in names)


def checksums(targets: Iterable[Path], path: Path) -> bytes:
    """The file `path` in the format of `sha256sum`, with names relative to its folder.

    Files that an earlier version of it lists are kept in it as long as they exist.
    """
    folder = path.resolve().parent
    digests = {name: digest for name, digest in _read_checksums(path).items() if _is_file(folder, name)}
    for target in targets:
        files = sorted(one for one in target.rglob("*") if one.is_file()) if target.is_dir() else [target]
        for file in files:
            if file.is_file():
                name = os.fsencode(os.path.relpath(file.absolute().parent.resolve() / file.name, folder))
                digests[name.replace(os.fsencode(os.sep), b"/")] = file_sha256(file).encode()
    return b"".join(_checksum_line(name, digest) for name, digest in sorted(digests.items()))


def _read_checksums(path: Path) -> Mapping[bytes, bytes]:
    found = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        if match := _LINE.fullmatch(line):
            escaped, digest, name = match.groups()
            found[_unescaped(name) if escaped else name] = digest
    return found


def _checksum_line(name: bytes, digest: bytes) -> bytes:
    """As coreutils escapes names with a backslash or a line end."""
    escaped = re.sub(rb"[\\\n\r]", lambda match: _ESCAPES[match[0]], name)
    return (b"\\" if escaped != name else b"") + digest + b"  " + escaped + b"\n"


def _unescaped(name: bytes) -> bytes:
    plain = {escape: character for character, escape in _ESCAPES.items()}
    return re.sub(rb"\\[\\nr]", lambda match: plain[match[0]], name)


def _is_file(folder: Path, name: bytes) -> bool:
    return (folder / os.fsdecode(name)).is_file()


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:_SHOWN])) + (", …" if len(paths) > _SHOWN else "")
