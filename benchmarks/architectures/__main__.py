"""Loads, upscales with, adapts and exports a small random network of every architecture of spandrel.

    python -m benchmarks.architectures WORK [--docs docs/weights.md] [NAME ...]

Each step of each network runs in a process of its own, with a limit of CPU time, because some crash. What was found is
kept in WORK/found.json, so that a stopped call continues; NAME repeats those. --docs replaces the table in this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.architectures.networks import NETWORKS
from benchmarks.architectures.steps import STEPS, outcome, preload

_SECONDS = 120  # of CPU time for a step
_BEGIN, _END = "<!-- begin: python -m benchmarks.architectures -->", "<!-- end -->"

Found = dict[str, dict[str, tuple[bool, str]]]  # architecture → step → success and text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures")
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", help="architectures to try again")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "found.json"
    found: Found = json.loads(kept.read_text()) if kept.exists() else {}
    preload()
    for step in STEPS:
        for name in NETWORKS:
            steps = found.setdefault(name, {})
            if step not in steps or name in options.names:
                steps[step] = _apart(step, name) if step == "load" or steps["load"][0] else (False, "")
                print(f"{step}: {name}: {'yes' if steps[step][0] else 'no'}: {steps[step][1][:200]}", flush=True)
                kept.write_text(json.dumps(found, indent=1))
    table = as_table(found)
    if options.docs:
        text = options.docs.read_text(encoding="utf-8")
        before, after = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
        options.docs.write_text(f"{text[:before]}\n{table}\n{text[after:]}", encoding="utf-8")
    else:
        print(table)


def _apart(step: str, name: str) -> tuple[bool, str]:
    """The outcome of the step in a process of its own, which starts with all packages already imported."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(theirs, step, name))
    process.start()
    theirs.close()
    try:
        result: tuple[bool, str] = ours.recv()
    except EOFError:
        result = (False, "")
    process.join()
    if result[1] or result[0]:
        return result
    code = process.exitcode or 0
    if -code == signal.SIGXCPU:
        return False, f"takes more than {_SECONDS} s"
    return False, f"crashes ({signal.Signals(-code).name})" if code < 0 else f"ends with exit code {code}"


def _child(pipe: Connection, step: str, name: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="pdd-architectures-") as folder:
        os.environ["PDD_HOME"] = f"{folder}/home"
        os.chdir(folder)
        pipe.send(outcome(step, name, Path(folder)))
        sys.stdout.flush()


def as_table(found: Found) -> str:
    """The Markdown table, and the reasons below it."""
    lines = [f"| architecture | {' | '.join(STEPS)} |", f"|---|{'---|' * len(STEPS)}"]
    reasons: list[str] = []
    for name, steps in sorted(found.items(), key=lambda item: item[0].lower()):
        cells = []
        for step in STEPS:
            if step not in steps:
                cells.append("not tried")
                continue
            success, text = steps[step][0], _short(steps[step][1], name)
            if not success and text and text not in reasons:
                reasons.append(text)
            cells.append("yes" if success else f"no [{reasons.index(text) + 1}]" if text else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(
        [*lines, "", f"Tried with spandrel {version('spandrel')}. Reasons of what doesn't work:", "", *notes]
    )


def _short(text: str, name: str) -> str:
    """One line of a message, without the parts that are the same for all, as Markdown."""
    text = " ".join(text.split()).removeprefix("--to onnx: ").replace(f"{name} can't be exported as ONNX ", "")
    text = text[1:].rstrip(")") if text.startswith("(") else text
    text = re.sub(r"\S*/onnxruntime_src\S*|Please feel free.*|\[Caused by.*", "", text).strip()
    text = text if len(text) <= 180 else text[:179].rstrip() + "…"
    return re.sub(r"([*_<>|\[\]`])", r"\\\1", text)


if __name__ == "__main__":
    main()
