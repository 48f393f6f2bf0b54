"""Files → files: which outputs a run makes, and making them one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.images import check_size, find_images, format_of, image_size, read_image, write_image
from pdd_cli.inference.upscaler import OnTile, Upscaler

FormatChoice = Literal["keep", "png", "jpg", "webp", "tiff", "bmp"]


@dataclass(frozen=True)
class Job:
    """One image to upscale, and where it goes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Result:
    """What became of one job. Sizes are (width, height); `problem` says why it failed, or what to know of it."""

    job: Job
    status: Literal["done", "skipped", "failed", "planned"]
    problem: str = ""
    size_in: tuple[int, int] | None = None
    size_out: tuple[int, int] | None = None
    tiles: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0


def plan_jobs(source: Path, output: str, *, format: FormatChoice, suffix: str, recursive: bool) -> list[Job]:
    """The jobs of a file or folder `source`; nothing is read but folders.

    A folder goes to the same tree below `output`. A file goes to the file `output`, or into it when it is a folder,
    ends with a slash or has no suffix. `suffix` is put behind each name.

    Raises InputError where there is nothing to do, two inputs would share an output, or an output would replace an
    input.
    """
    if source.is_dir():
        jobs = _folder_jobs(source, Path(output), format, suffix, recursive)
    elif source.exists():
        jobs = [Job(source, _target_of_file(source, output, format, suffix))]
    else:
        raise InputError(f"{source}: no such file or folder")
    _refuse_collisions(jobs)
    return jobs


def run_jobs(
    jobs: Sequence[Job],
    upscaler: Upscaler,
    *,
    overwrite: bool,
    quality: int,
    on_start: Callable[[Job], None] = lambda job: None,
    on_tile: OnTile = lambda done, total: None,
) -> Iterator[Result]:
    """Do the jobs in turn, yielding what became of each; a job whose output exists is skipped unless `overwrite`.

    A job that fails doesn't stop the others; a full disk does (ResourceError), for it would stop them all.
    """
    for job in jobs:
        if not overwrite and job.target.exists():
            yield Result(job, "skipped")
            continue
        on_start(job)
        yield _run(job, upscaler, quality, on_tile)


def preview_jobs(jobs: Sequence[Job], upscaler: Upscaler, *, overwrite: bool) -> Iterator[Result]:
    """What `run_jobs` would do, from the headers of the images alone."""
    for job in jobs:
        if not overwrite and job.target.exists():
            yield Result(job, "skipped")
            continue
        try:
            width, height = image_size(job.source)
            size_out = (width * upscaler.scale, height * upscaler.scale)
            check_size(job.target, *size_out)
        except PddError as error:
            yield Result(job, "failed", _reason(error))
            continue
        tiles = len(upscaler.plan(height, width))
        yield Result(job, "planned", size_in=(width, height), size_out=size_out, tiles=tiles)


def _run(job: Job, upscaler: Upscaler, quality: int, on_tile: OnTile) -> Result:
    started = time.perf_counter()
    size_in = None
    try:
        picture = read_image(job.source)
        size_in = (picture.width, picture.height)
        check_size(job.target, picture.width * upscaler.scale, picture.height * upscaler.scale)
        result = upscaler.upscale(picture, on_tile)
    except (PddError, MemoryError) as error:
        seconds = time.perf_counter() - started
        return Result(job, "failed", _reason(error), size_in=size_in, seconds=seconds)
    try:
        write_image(job.target, result.picture, quality=quality)
    except ResourceError:
        raise
    except PddError as error:
        seconds = time.perf_counter() - started
        return Result(job, "failed", _reason(error), size_in=size_in, seconds=seconds)
    return Result(
        job,
        "done",
        f"only the first of {picture.frames} frames was upscaled" if picture.frames > 1 else "",
        size_in,
        (result.picture.width, result.picture.height),
        result.tiles,
        time.perf_counter() - started,
        result.model_seconds,
    )


def _reason(error: PddError | MemoryError) -> str:
    return error.message if isinstance(error, PddError) else "out of memory: the image is too large"


def _folder_jobs(source: Path, output: Path, format: FormatChoice, suffix: str, recursive: bool) -> list[Job]:
    if output.exists() and not output.is_dir():
        raise InputError(f"{source} is a folder, but {output} is a file", "Name a folder for the outputs.")
    inside, outside = source.resolve(), output.resolve()
    if inside == outside and not suffix:
        raise InputError(
            f"the outputs would go between the inputs in {source}",
            "Name another folder for the outputs, or add for example --suffix _x4.",
        )
    found = find_images(source, recursive=recursive)
    if outside != inside and outside.is_relative_to(inside):
        # What earlier runs have put there is no input.
        found = [path for path in found if not path.resolve().is_relative_to(outside)]
    jobs = [Job(path, _named(output / path.relative_to(source), format, suffix)) for path in found]
    if inside == outside:
        outputs = {job.target.resolve() for job in jobs}
        jobs = [job for job in jobs if job.source.resolve() not in outputs]
    if not jobs:
        raise InputError(f"{source}: no images in it", "pdd reads PNG, JPEG, WebP, TIFF and BMP files.")
    return jobs


def _target_of_file(source: Path, output: str, format: FormatChoice, suffix: str) -> Path:
    path = Path(output)
    if path.is_dir() or output.endswith(("/", os.sep)) or not path.suffix:
        target = _named(path / source.name, format, suffix)
        format_of(target)
        return target
    if format != "keep" and format_of(path) != format_of(Path(f"a.{format}")):
        raise InputError(f"--format {format} contradicts the name {path}", "Leave one of them out.")
    format_of(path)
    return path.with_name(path.stem + suffix + path.suffix)


def _named(path: Path, format: FormatChoice, suffix: str) -> Path:
    return path.with_name(path.stem + suffix + (path.suffix if format == "keep" else f".{format}"))


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    sources = {job.source.resolve() for job in jobs}
    by_target: dict[Path, Path] = {}
    for job in jobs:
        if job.target.resolve() in sources:
            raise InputError(
                f"the output {job.target} would replace an input", "Name another output, or add --suffix _x4."
            )
        other = by_target.setdefault(job.target, job.source)
        if other != job.source:
            raise InputError(
                f"{other} and {job.source} would both become {job.target}",
                "Rename one of them, or leave --format out.",
            )
