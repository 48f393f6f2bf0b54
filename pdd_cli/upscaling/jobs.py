"""One input and its output: the job, what became of it, and what keeps an output from being made."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError, PddError
from pdd_cli.imaging.encode import Encoding
from pdd_cli.imaging.formats import check_lossless, check_size
from pdd_cli.imaging.provenance import Provenance, made_by_pdd
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.store import read_card

_LONGEST_NAME = 255


@dataclass(frozen=True)
class Job:
    """One image or video to upscale, and where it goes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Output:
    """How outputs are written: `overwrite` what is there, `strip` the metadata, with which `provenance` otherwise."""

    encoding: Encoding = field(default_factory=Encoding)
    overwrite: bool = False
    strip: bool = False
    provenance: Provenance | None = None


@dataclass(frozen=True)
class Result:
    """What became of one job. Sizes are (width, height); `problem` says why it failed, or what to know of it.

    `left_out`: names of what the input has and the output hasn't, which are in `problem`, too. `memory` (peak of the
    process, bytes) and `seconds` are estimates where the status is "planned". `traceback`: of an error that nobody
    expected.
    """

    job: Job
    status: Literal["done", "skipped", "failed", "planned"]
    problem: str = ""
    size_in: tuple[int, int] | None = None
    size_out: tuple[int, int] | None = None
    tiles: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    memory: int = 0
    frames: int = 0  # of a video
    left_out: tuple[str, ...] = ()
    traceback: str = ""


def results_to_json(results: Sequence[Result]) -> str:
    """The results as a text for another process."""
    return json.dumps([{**asdict(result), "job": [str(path) for path in astuple(result.job)]} for result in results])


def results_from_json(text: str) -> list[Result]:
    """What `results_to_json` was given."""
    found = []
    for values in json.loads(text):
        job = Job(*(Path(path) for path in values.pop("job")))
        sizes = [size and tuple(size) for size in (values.pop("size_in"), values.pop("size_out"))]
        left_out = tuple(values.pop("left_out"))
        found.append(Result(job, size_in=sizes[0], size_out=sizes[1], left_out=left_out, **values))
    return found


def provenance_of(weights: Path, scale: int, strength: float = 1.0, correction: str = "none") -> Provenance:
    """What outputs made with the file `weights` say of it and of these settings."""
    card = read_card(weights)
    how = [f"x{scale}"]
    if strength != 1:
        how.append(f"strength {strength:g}")
    if correction != "none":
        how.append(f"color correction {correction}")
    # The sha256 of the published file is what others can look up.
    digest = card.sha256 if card is not None and card.sha256 else file_sha256(weights)
    return Provenance(card.name if card is not None else weights.name, digest, ", ".join(how))


def skipped(job: Job, key: str, output: Output, manifest: Manifest | None) -> Result | None:
    """That a job has nothing to do, if so; `key` is the manifest's for what it would make.

    Raises InputError where the output is a file that pdd has not made: no option replaces it.
    """
    if not job.target.exists():
        return None
    state = manifest.state(job.target, key) if manifest else "foreign"
    if state == "current" and not output.overwrite:
        return Result(job, "skipped")
    if manifest is None or not manifest.made(job.target):
        check_own(job.target)
    return None if output.overwrite or state == "stale" else Result(job, "skipped")


def check_own(target: Path) -> None:
    """Raise InputError where `target` exists without a sign that pdd made it."""
    if target.exists() and not made_by_pdd(target):
        raise InputError(
            f"{target} exists and was not made by pdd, or was changed since: it is not replaced",
            "Move it away, or name another output. For several inputs name a folder last: pdd upscale *.jpg upscaled/",
        )


def check_target(job: Job, size: tuple[int, int], output: Output) -> None:
    """Raise InputError for what the format can't hold, before any work."""
    check_size(job.target, *size)
    if output.encoding.lossless:
        check_lossless(job.target)
    check_name(job.target)


def check_name(target: Path) -> None:
    """Raise InputError for a name that file systems don't take."""
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise InputError(f"{target}: the name is longer than {_LONGEST_NAME} bytes", "Use a shorter --suffix.")


def failed(job: Job, error: Exception, started: float, done: Result | None = None) -> Result:
    """That a job, begun at `started`, came to `error`; `done`: what was known of it."""
    size = done.size_in if done else None
    shown = "" if isinstance(error, PddError | MemoryError) else "".join(traceback.format_exception(error))
    seconds = time.perf_counter() - started
    return Result(job, "failed", reason(job, error), size_in=size, seconds=seconds, traceback=shown)


def reason(job: Job, error: Exception) -> str:
    """Why `job` failed, with its file."""
    if isinstance(error, PddError):
        reason = f"{error.message}. {error.hint}" if error.hint else error.message
    elif isinstance(error, MemoryError):
        reason = "out of memory: the image is too large"
    else:
        reason = f"a bug in pdd: {type(error).__name__}: {error}. Please report it with the output of `pdd --debug`"
    return reason if str(job.source) in reason or str(job.target) in reason else f"{job.source}: {reason}"


class Abandoned(Exception):  # noqa: N818 - not a failure of its own
    """Told to who computes or writes an image: it won't be finished."""
