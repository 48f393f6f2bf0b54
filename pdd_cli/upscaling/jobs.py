"""One input and its output: the job, its result, and the checks before it starts."""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import BeforeRename
from pdd_cli.imaging.encode import Encoding
from pdd_cli.imaging.formats import check_lossless, check_size
from pdd_cli.imaging.provenance import Provenance, made_by_pdd, made_of
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.upscaling.processing import Processing
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.store import read_card

_LONGEST_NAME = 255


@dataclass(frozen=True)
class Job:
    """One image or video to upscale, and the path of the output."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Output:
    """How outputs are written: whether to `overwrite` outputs or `strip` metadata, and the `provenance` to write."""

    encoding: Encoding = field(default_factory=Encoding)
    overwrite: bool = False
    strip: bool = False
    provenance: Provenance | None = None


@dataclass(frozen=True)
class Result:
    """The result of one job. Sizes are (width, height); `problem` is the reason of a failure, or a note.

    `left_out`: names of what the input has and the output lacks; `problem` lists them, too. `memory` (peak of the
    process, bytes) and `seconds` are estimates if the status is "planned". `traceback`: of an unexpected error.
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
    weights: str = ""  # as they were named


def results_to_json(results: Sequence[Result]) -> str:
    """Serialise results for another process."""
    return json.dumps([{**asdict(result), "job": [str(path) for path in astuple(result.job)]} for result in results])


def results_from_json(text: str) -> list[Result]:
    """Parse the results of `results_to_json`."""
    found = []
    for values in json.loads(text):
        job = Job(*(Path(path) for path in values.pop("job")))
        sizes = [size and tuple(size) for size in (values.pop("size_in"), values.pop("size_out"))]
        left_out = tuple(values.pop("left_out"))
        found.append(Result(job, size_in=sizes[0], size_out=sizes[1], left_out=left_out, **values))
    return found


def provenance_of(
    weights: Path,
    scale: int,
    strength: float = 1.0,
    correction: str = "none",
    processing: Processing = Processing(),
    denoise: float | None = None,
) -> Provenance:
    """The provenance of outputs made with the file `weights` and these settings."""
    card = read_card(weights)
    how = [f"x{scale}"]
    if strength != 1:
        how.append(f"strength {strength:g}")
    if denoise is not None:
        how.append(f"denoise {denoise:g}")
    if correction != "none":
        how.append(f"color correction {correction}")
    if str(processing):
        how.append(str(processing))
    # Others can look up the SHA-256 of the published file.
    digest = card.sha256 if card is not None and card.sha256 else file_sha256(weights)
    return Provenance(card.name if card is not None else weights.name, digest, ", ".join(how))


def skipped(job: Job, digest: str, key: str, output: Output, manifest: Manifest | None) -> Result | None:
    """The result of a job that can be skipped, else None.

    `digest`: SHA-256 of the input; `key`: the manifest's key of the new output. Without a manifest the result says if
    the output was made from another input, or with other weights or settings.

    Raises InputError if the output is a file that pdd did not make: no option replaces it.
    """
    if not job.target.exists():
        return None
    state = manifest.state(job.target, key) if manifest else "foreign"
    if state == "current" and not output.overwrite:
        return Result(job, "skipped")
    check_own(job.target, manifest=manifest)
    if output.overwrite or state == "stale":
        return None
    before, made = made_of(job.target), output.provenance
    others = ["from another input"] if before.source not in (None, digest) else []
    if made is not None and made.sha256:  # else a dry run with weights that aren't installed
        others += ["with other weights"] if before.weights not in (None, made.sha256) else []
        if made.options and before.options not in (None, made.options):
            others.append(f"with other settings (then: {before.options}; now: {made.options})")
    about = f"{job.target} was made {' and '.join(others)}: --overwrite makes it again" if others else ""
    return Result(job, "skipped", about)


APPEARED = "It appeared or changed during the work. Move it away, and run the same command again."
_OTHER_OUTPUT = (
    "Move it away, or name another output. For several inputs name a folder last: pdd upscale *.jpg upscaled/"
)


def check_own(target: Path, hint: str = _OTHER_OUTPUT, *, manifest: Manifest | None = None) -> None:
    """Raise InputError if `target` exists and pdd did not make it, according to its metadata or to the manifest."""
    if not target.exists() or (manifest.made(target) if manifest is not None else made_by_pdd(target)):
        return
    raise InputError(f"{target} exists and was not made by pdd, or was changed since: it is not replaced", hint)


@contextmanager
def recorded(job: Job, key: str, manifest: Manifest | None) -> Iterator[BeforeRename]:
    """The context in which the output of `job` is written and recorded. It yields the check before the rename.

    The check raises InputError if another program has written or changed the output since the job began.
    """

    def before_rename(temporary: Path) -> None:
        check_own(job.target, APPEARED, manifest=manifest)
        if manifest is not None:
            manifest.record(job.target, key, source=job.source, written=temporary)

    yield before_rename
    if manifest is not None:
        manifest.finish(job.target)


def check_target(job: Job, size: tuple[int, int], output: Output) -> None:
    """Raise InputError if the output's format can't hold the image, before any work."""
    check_size(job.target, *size)
    if output.encoding.lossless:
        check_lossless(job.target)
    check_name(job.target)


def check_name(target: Path) -> None:
    """Raise InputError for a name that is too long for file systems."""
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise InputError(f"{target}: the name is longer than {_LONGEST_NAME} bytes", "Use a shorter --suffix.")


def hidden_folder(target: Path, suffix: str) -> Path:
    """The folder next to `target` for its unfinished parts, with a short name of fixed length."""
    return target.with_name(f".pdd-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.{suffix}")


def failed(job: Job, error: Exception, started: float, done: Result | None = None) -> Result:
    """The result of a job that started at `started` and failed with `error`; `done`: its result so far."""
    size = done.size_in if done else None
    shown = "" if isinstance(error, PddError | MemoryError) else "".join(traceback.format_exception(error))
    seconds = time.perf_counter() - started
    return Result(job, "failed", reason(job, error), size_in=size, seconds=seconds, traceback=shown)


def reason(job: Job, error: Exception) -> str:
    """The reason why `job` failed, with the name of the file."""
    if isinstance(error, PddError):
        reason = f"{error.message}. {error.hint}" if error.hint else error.message
    elif isinstance(error, MemoryError):
        reason = "out of memory: the image is too large"
    else:
        reason = f"a bug in pdd: {type(error).__name__}: {error}. Please report it with the output of `pdd --debug`"
    return reason if str(job.source) in reason or str(job.target) in reason else f"{job.source}: {reason}"


class Abandoned(Exception):  # noqa: N818 - not a failure of its own
    """Raised in the thread that computes or writes an image that won't be finished."""
