"""The images below a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pdd_cli.errors import InputError
from pdd_cli.imaging.formats import FORMATS, READ_ONLY


def find_images(
    folder: Path,
    *,
    recursive: bool = True,
    wanted: Callable[[str], bool] | None = None,
    problems: list[str] | None = None,
) -> list[Path]:
    """The images below `folder`, by suffix, sorted. Hidden files and folders are skipped, links are followed once.

    `wanted` selects files by name; by default it is `is_image`. Subfolders that can't be read are added to `problems`.

    Raises InputError if `folder`, or without `problems` a subfolder, can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found: list[Path] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        text = f"can't read the folder {error.filename}: {error.strerror}"
        if problems is None or Path(error.filename) == folder:
            raise InputError(text) from error
        problems.append(text)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that was visited, or a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".") and (wanted or is_image)(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def is_image(path: Path | str) -> bool:
    """Whether the suffix is one of a format that pdd reads."""
    return Path(path).suffix.lower() in {**FORMATS, **READ_ONLY}
