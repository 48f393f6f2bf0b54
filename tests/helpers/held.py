"""`pdd`, held at a moment of its own choosing: python -m tests.helpers.held NAME COUNT FOLDER ARGUMENTS

Where it is about to append to a file NAME, or to rename a file to it, for the COUNT-th time it makes FOLDER/held and
waits for FOLDER/go: what a test does meanwhile it does at that moment, however fast or busy the machine is.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any


def hold(name: str, count: int, folder: Path) -> None:
    seen = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[1] == "a":
            path = arguments[0]
        elif event == "os.rename":
            path = arguments[1]
        else:
            return
        if fnmatch.fnmatch(Path(os.fsdecode(path)).name, name) and next(seen) == count:
            (folder / "held").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)

    sys.addaudithook(watch)


if __name__ == "__main__":
    name, count, folder, *arguments = sys.argv[1:]
    hold(name, int(count), Path(folder))
    sys.argv[1:] = arguments
    from pdd_cli.cli import main

    main()
