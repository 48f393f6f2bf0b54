"""Kills `pdd upscale` with SIGKILL at random instants of a batch, again and again, then lets it run to its end.

Usage: python benchmarks/robustness/kill.py FOLDER_OF_IMAGES WORK_FOLDER [--weights realesr-animevideo] [--kills 20]
After each kill every file that can be seen in the output folder must equal, byte for byte, that of an undisturbed
run; after the last run all must be there, and nothing else. Exits with 1 where that doesn't hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from pdd_cli.upscaling.manifest import NAME as MANIFEST


def visible(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def count(folder: Path) -> int:
    """Outputs that are there."""
    return sum(not name.startswith(".") for _, _, names in os.walk(folder) for name in names)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weights", default="realesr-animevideo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    whole, killed = arguments.work / "whole", arguments.work / "killed"
    command = [sys.executable, "-m", "pdd_cli", "upscale", arguments.images]
    options = ["--weights", arguments.weights, "--offline", "--json"]
    subprocess.run([*command, whole, *options], check=True, capture_output=True)
    expected = visible(whole)
    print(f"undisturbed: {len(expected)} files", flush=True)
    problems = 0
    for number in range(1, arguments.kills + 1):
        before, begun = count(killed), size(killed / MANIFEST)
        # As many new outputs as bring the last kill near the end of the batch, and then a moment more.
        new = draw.randint(0, max(0, 2 * (len(expected) - before) // (arguments.kills - number + 1) - 3))
        process = subprocess.Popen([*command, killed, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (size(killed / MANIFEST) <= begun or count(killed) < before + new):
            time.sleep(0.01)
        after = draw.uniform(0, 3)
        time.sleep(after)
        process.kill()
        process.wait()
        made = visible(killed)
        wrong = [name for name, content in made.items() if content != expected.get(name)]
        left = sum(1 for path in killed.rglob(".pdd-tmp-*"))
        problems += len(wrong)
        print(
            f"kill {number:2}, {after:5.2f} s after {new} new: {len(made):3} files, {len(wrong)} wrong, {left} hidden",
            flush=True,
        )
    result = subprocess.run([*command, killed, *options], check=False, capture_output=True, text=True)
    document = json.loads(result.stdout)
    print(f"the last run made {document['done']}, skipped {document['skipped']}, exit code {result.returncode}")
    hidden = [path.name for path in killed.rglob(".*") if path.name != MANIFEST]
    same = visible(killed) == expected
    print(f"all {len(expected)} files equal: {same}; hidden files left: {len(hidden)}; wrong on the way: {problems}")
    sys.exit(not same or bool(hidden) or bool(problems) or result.returncode)


if __name__ == "__main__":
    main()
