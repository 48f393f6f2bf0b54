"""Files → files: which outputs a run makes, and making them; reading, computing and writing overlap."""

from __future__ import annotations

import glob
import heapq
import itertools
import json
import os
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pdd_cli.device import usable_cpus
from pdd_cli.distributed import World
from pdd_cli.encoding import (
    FORMATS,
    STREAMED,
    Encoding,
    Sheet,
    check_lossless,
    check_size,
    format_of,
    keeps_frames,
    left_out,
    load_plugin,
    stored_layout,
    write_sheets,
)
from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.images import Array, Picture, decode_pages, find_images, is_image, probe, read_bytes
from pdd_cli.inference.clips import CONTAINERS, check_video_name, is_video, video_pixels
from pdd_cli.inference.manifest import NAME, Manifest
from pdd_cli.inference.upscaler import OnTile, Upscaler
from pdd_cli.provenance import Provenance, made_by_pdd, source_of
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.store import read_card

FormatChoice = Literal["keep", "png", "jpg", "webp", "tiff", "bmp", "avif", "heic", "jxl", "mp4", "mov", "mkv", "webm"]
_VIDEO_FORMATS = ("mp4", "mov", "mkv", "webm")

# Bands of rows that wait to be written, and images whose writing isn't waited for.
_WAITING_BANDS = 2
_WAITING_IMAGES = 2
# A GPU makes images faster than one core compresses them.
_GPU_ENCODERS = 4
# What is larger, in bytes of pixels, is not decoded ahead.
_MOST_AHEAD = 100 << 20
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Job:
    """One image or video to upscale, and where it goes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Plan:
    """The jobs of a run, and what in the folders has none.

    `others`: how many files of each other kind there are, by suffix. `outputs`: how many files are outputs of earlier
    runs, which are no inputs beside what they were made from. `problems`: folders that can't be read.
    """

    jobs: list[Job] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    outputs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


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


# --- which outputs ----------------------------------------------------------------------------------------------


def plan_jobs(sources: Sequence[Path], output: str, *, format: FormatChoice, suffix: str, recursive: bool) -> Plan:
    """The jobs of files, folders and glob patterns; nothing is read but folders.

    One source: a folder goes to the same tree below `output`, a pattern too, from its first part without a wildcard
    on. A file goes to the file `output`, or into it when it is a folder, ends with a slash or has no suffix. Several
    sources: `output` is a folder; files and matches of patterns go into it, and a folder's tree below its own name.
    `suffix` is put behind each name.

    Raises InputError where there is nothing to do, two inputs would share an output, or an output would replace an
    input or another file that pdd has not made.
    """
    if output == "-":
        raise InputError("the output -: pdd doesn't write to a pipe", "Name a file or a folder.")
    plan = Plan()
    if len(sources) == 1:
        jobs = _jobs_of(sources[0], output, format, suffix, recursive, plan)
    else:
        if not _is_folder_name(output):
            raise InputError(
                f"{len(sources)} inputs, but the output {output} is a file",
                "Name a folder last, for example: pdd upscale *.jpg upscaled/",
            )
        folder = f"{output}/"
        jobs = []
        for source in sources:
            below = f"{folder}{source.resolve().name}" if source.is_dir() else folder
            jobs += _jobs_of(source, below, format, suffix, recursive, plan)
        jobs = list({job.source.resolve(): job for job in jobs}.values())  # named twice, made once
    refuse_collisions(jobs)
    if format in ("heic", "jxl"):
        load_plugin(FORMATS[f".{format}"])
    return replace(plan, jobs=jobs)


def _jobs_of(source: Path, output: str, format: FormatChoice, suffix: str, recursive: bool, plan: Plan) -> list[Job]:
    """The jobs of one file, folder or pattern; `plan` gets what has none."""

    def wanted(name: str) -> bool:
        if not _is_input(name):
            plan.others[Path(name).suffix.lower() or "without suffix"] += 1
        return _is_input(name)

    if source.is_dir():
        found = find_images(source, recursive=recursive, wanted=wanted, problems=plan.problems)
        return _folder_jobs(source, found, Path(output), format, suffix, plan)
    if source.exists():
        return [Job(source, _target_of_file(source, output, format, suffix))]
    if glob.has_magic(str(source)):
        root, matching = _matching(source)
        found = [path for path in matching if wanted(path.name)]
        return _folder_jobs(root, found, Path(output), format, suffix, plan, f"no images or videos match {source}")
    if str(source) == "-":
        raise InputError("the input -: pdd doesn't read from a pipe", "Name a file or a folder.")
    raise InputError(f"{source}: no such file or folder")


def _is_folder_name(output: str) -> bool:
    """Whether outputs go into `output`: a folder that exists, or a name with a slash at its end or without suffix."""
    path = Path(output)
    return path.is_dir() or output.endswith(("/", os.sep)) or (not path.suffix and not path.exists())


def manifest_folder(sources: Sequence[Path], output: str, jobs: Sequence[Job], *, strip: bool) -> Path | None:
    """The folder that holds the manifest of a run; None for a single file, which says itself that pdd made it.

    A file that is stripped of all metadata does not say so.
    """
    if len(sources) == 1 and sources[0].is_file():
        return jobs[0].target.parent if strip else None
    return Path(output)


def _matching(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the files that match; ** goes through folders."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    root = Path(*fixed)
    found = (Path(name) for name in glob.iglob(str(pattern), recursive=True))  # noqa: PTH207 - a pattern of any kind
    return root, sorted(path for path in found if path.is_file())


def _folder_jobs(
    source: Path, found: Sequence[Path], output: Path, format: FormatChoice, suffix: str, plan: Plan, nothing: str = ""
) -> list[Job]:
    if output.exists() and not output.is_dir():
        raise InputError(f"{source} is a folder, but {output} is a file", "Name a folder for the outputs.")
    if not output.exists() and _is_input(output):
        raise InputError(
            f"{source} is not a single file, but the output {output} is named like one",
            "Name a folder for the outputs, without such a suffix.",
        )
    inside, outside = source.resolve(), output.resolve()
    if inside == outside and not suffix:
        raise InputError(
            f"the outputs would go between the inputs in {source}",
            "Name another folder for the outputs, or add for example --suffix _x4.",
        )
    if outside != inside and outside.is_relative_to(inside):
        # What earlier runs have put there is no input.
        found = [path for path in found if not path.resolve().is_relative_to(outside)]
    made = _outputs_among(found, source)
    jobs = [Job(path, _named(output / path.relative_to(source), format, suffix)) for path in found if path not in made]
    if inside == outside:
        outputs = {job.target.resolve() for job in jobs}
        jobs = [job for job in jobs if job.source.resolve() not in outputs]
    plan.outputs.extend(sorted(made))
    if not jobs:
        kinds = f", only {_counted(plan.others)}" if plan.others else ""
        raise InputError(
            "\n".join([f"{nothing or f'{source}: no images or videos in it'}{kinds}", *plan.problems]),
            "pdd reads PNG, JPEG, WebP, TIFF, BMP, AVIF, HEIC and JPEG XL files, and videos.",
        )
    return jobs


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _outputs_among(found: Sequence[Path], source: Path) -> set[Path]:
    """Those of `found` that pdd has made from another one of them, as their manifest or they themselves say."""
    present = {path.resolve(): path for path in found}
    by_stem: dict[str, list[Path]] = {}
    for path in found:
        by_stem.setdefault(path.stem, []).append(path)
    folders = {parent for path in found for parent in path.parents if parent == source or source in parent.parents}
    records = {
        path.resolve(): made_from
        for folder in folders
        if (folder / NAME).is_file()
        for path, made_from in Manifest(folder, {}).inputs().items()
    }
    digests: dict[Path, str] = {}

    def is_output(path: Path) -> bool:
        real = path.resolve()
        made_from = records.get(real)
        if made_from is not None:
            return made_from.resolve() in present
        # --suffix only adds to the name of the input.
        stems = (path.stem[:end] for end in range(1, len(path.stem) + 1))
        inputs = [other for stem in stems for other in by_stem.get(stem, ()) if other != path]
        if real in records:  # of an earlier version, which didn't record the input
            return any(other.parent == path.parent and other.resolve() not in records for other in inputs)
        digest = source_of(path) if inputs else None
        if digest is None:
            return False
        for other in inputs:
            if other not in digests:
                try:
                    digests[other] = file_sha256(other)
                except OSError:
                    digests[other] = ""
        return digest in (digests[other] for other in inputs)

    return {path for path in found if is_output(path)}


def _target_of_file(source: Path, output: str, format: FormatChoice, suffix: str) -> Path:
    path = Path(output)
    check = check_video_name if is_video(source) else format_of
    if format != "keep" and (format in _VIDEO_FORMATS) != is_video(source):
        raise InputError(f"--format {format} isn't one for {source}", "Leave it out, or name another format.")
    if _is_folder_name(output):
        if not _is_input(source) and format == "keep":
            probe(source, most_pixels=2**62)  # which fails for what pdd doesn't read
            raise InputError(
                f"{source}: pdd reads it, but writes no files named {source.suffix or 'without a suffix'}",
                "Add --format png, or name the output file.",
            )
        target = _named(path / source.name, format, suffix)
        check(target)
        return target
    check(path)
    if format != "keep" and not _same_format(path, format):
        raise InputError(f"--format {format} contradicts the name {path}", "Leave one of them out.")
    return path.with_name(path.stem + suffix + path.suffix)


def _same_format(path: Path, format: FormatChoice) -> bool:
    named = FORMATS.get(f".{format}", format)
    return FORMATS.get(path.suffix.lower(), path.suffix.lower().lstrip(".")) == named


def _named(path: Path, format: FormatChoice, suffix: str) -> Path:
    """The name of the output for the input's; --format is of the images, or of the videos."""
    ending = path.suffix
    if format != "keep" and (format in _VIDEO_FORMATS) == is_video(path):
        ending = f".{format}"
    elif is_video(path) and ending.lower() not in CONTAINERS:
        ending = ".mkv"  # which holds whatever there is in it
    return path.with_name(path.stem + suffix + ending)


def _is_input(path: Path | str) -> bool:
    return is_image(path) or is_video(path)


def refuse_collisions(
    jobs: Sequence[Job], protected: Iterable[Path] = (), hint: str = "Name another output, or add --suffix _x4."
) -> None:
    """Raise InputError where an output would replace an input or a `protected` file, or two inputs share an output.

    Files are compared as the file system does: links and other spellings of a name are seen through.
    """
    inputs = {_identity(path) for path in (*(job.source for job in jobs), *protected)}
    by_target: dict[Path, Path] = {}
    for job in jobs:
        if _identity(job.target) in inputs:
            raise InputError(f"the output {job.target} would replace an input", hint)
        other = by_target.setdefault(job.target.resolve(), job.source)
        if other != job.source:
            raise InputError(
                f"{other} and {job.source} would both become {job.target}",
                "Rename one of them, or upscale them into folders of their own.",
            )


def _identity(path: Path) -> tuple[int, int] | Path:
    """The same for all names of one file: its device and number, or the resolved path while it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return (status.st_dev, status.st_ino) if status.st_ino else path.resolve()


# --- making them ------------------------------------------------------------------------------------------------


def share_of(jobs: Sequence[Job], world: World) -> list[Job]:
    """The jobs that one of several processes does, by the pixels of the inputs: the same in each of them.

    The largest input goes to the process that has the least so far, and so on. What can't be read counts nothing.
    """
    if world.size == 1:
        return list(jobs)
    pixels = [_pixels(job.source) for job in jobs]
    loads = [(0, rank) for rank in range(world.size)]
    mine = []
    for index in sorted(range(len(jobs)), key=lambda index: (-pixels[index], index)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + pixels[index], rank))
        if rank == world.rank:
            mine.append(index)
    return [jobs[index] for index in sorted(mine)]


def _pixels(source: Path) -> int:
    try:
        if is_video(source):
            return video_pixels(source)
        header = probe(source, most_pixels=2**62)
    except Exception:  # which the job itself will name
        return 0
    return header.size[0] * header.size[1] * header.frames


class Runner(Protocol):
    """What does jobs in turn on one device: `run_jobs`, or another function of this kind."""

    def __call__(
        self, jobs: Iterable[Job], upscaler: Upscaler, *, on_start: Callable[[Job], None], on_tile: OnTile
    ) -> Iterator[Result]: ...


def run_on_devices(
    run: Runner,
    jobs: Sequence[Job],
    upscalers: Sequence[Upscaler],
    *,
    on_start: Callable[[int, Job], None] = lambda device, job: None,
    on_tile: Callable[[int, int, int], None] = lambda device, done, total: None,
) -> Iterator[Result]:
    """`run` with several upscalers at once: each takes the next job when it is free. Results come as jobs end.

    The callbacks get the place of the upscaler first, and are called from its thread.
    """
    if len(upscalers) == 1:
        yield from run(jobs, upscalers[0], on_start=partial(on_start, 0), on_tile=partial(on_tile, 0))
        return
    upcoming = _Shared(jobs)
    results: queue.Queue[Result | BaseException | None] = queue.Queue()

    def work(device: int) -> None:
        def tile(done: int, total: int) -> None:
            if upcoming.closed:
                raise _Abandoned
            on_tile(device, done, total)

        try:
            for result in run(upcoming, upscalers[device], on_start=partial(on_start, device), on_tile=tile):
                results.put(result)
            results.put(None)
        except BaseException as error:
            results.put(error)

    with ThreadPoolExecutor(len(upscalers), "device") as pool:
        try:
            working = [pool.submit(work, device) for device in range(len(upscalers))]
            ended = 0
            while ended < len(working):
                item = results.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    ended += 1
                else:
                    yield item
        finally:
            upcoming.closed = True


class _Shared:
    """One sequence of jobs that several threads take from; once it is `closed` nothing comes any more."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self.closed = False

    def __iter__(self) -> Iterator[Job]:
        return self

    def __next__(self) -> Job:
        with self._lock:
            if self.closed:
                raise StopIteration
            return next(self._jobs)


def run_jobs(
    jobs: Iterable[Job],
    upscaler: Upscaler,
    *,
    output: Output = Output(),
    manifest: Manifest | None = None,
    on_start: Callable[[Job], None] = lambda job: None,
    on_tile: OnTile = lambda done, total: None,
) -> Iterator[Result]:
    """Do the jobs in turn, yielding what became of each.

    Skipped, unless `output.overwrite`: with a `manifest`, what the same input, weights and settings have made already;
    without one, every output of pdd that exists. The next image is decoded and the last one encoded
    while one is computed. A job that fails doesn't stop the others; a full disk does (ResourceError), for it would
    stop them all.
    """
    waiting: deque[Callable[[], Result]] = deque()
    encoders = 1 if upscaler.engine.runtime.kind == "cpu" else min(_GPU_ENCODERS, usable_cpus())
    with ThreadPoolExecutor(1, "decode") as decoder, ThreadPoolExecutor(encoders, "encode") as encoder:
        try:
            ahead: deque[Future[_Loaded]] = deque()
            upcoming = iter(jobs)
            for job in itertools.islice(upcoming, 1):
                ahead.append(decoder.submit(_load, job, upscaler, output, manifest))
            while ahead:
                loaded = ahead.popleft().result()
                for job in itertools.islice(upcoming, 1):
                    ahead.append(decoder.submit(_load, job, upscaler, output, manifest))
                if loaded.result is not None:
                    waiting.append(_settled(loaded.result))
                else:
                    on_start(loaded.job)
                    waiting.append(_compute(loaded, upscaler, output, manifest, encoder, on_tile))
                while len(waiting) > (max(_WAITING_IMAGES, encoders) if ahead else 0):
                    yield waiting.popleft()()
        finally:
            decoder.shutdown(wait=False, cancel_futures=True)


def preview_jobs(
    jobs: Sequence[Job], upscaler: Upscaler, *, output: Output = Output(), manifest: Manifest | None = None
) -> Iterator[Result]:
    """What `run_jobs` would do, from the headers of the images alone (and their content, where a manifest is asked)."""
    for job in jobs:
        try:
            key = manifest.key(sha256(read_bytes(job.source)).hexdigest()) if manifest else ""
            result = skipped(job, key, output, manifest)
            if result is not None:
                yield result
                continue
            header = probe(job.source, most_pixels=upscaler.most_pixels)
            width, height = header.size
            size_out = upscaler.output_size(width, height)
            _check_target(job, size_out, output)
            estimate = upscaler.estimate(header.layout, streamed=format_of(job.target) in STREAMED)
            upscaler.check_memory(estimate.memory)
        except Exception as error:
            yield failed(job, error, time.perf_counter())
            continue
        frames = header.frames if keeps_frames(job.target) else 1
        yield Result(
            job,
            "planned",
            "; ".join(_about_frames(job, header.frames)),
            header.size,
            size_out,
            upscaler.tiles(width, height) * frames,
            estimate.seconds * frames,
            estimate.seconds * frames,
            estimate.memory,
        )


@dataclass(frozen=True)
class _Loaded:
    """An input that was read: `result` where that is the end of it, else its pages, decoded or about to be."""

    job: Job
    result: Result | None = None
    data: bytes = b""
    digest: str = ""  # SHA-256 of the data
    key: str = ""
    pages: Iterator[Picture] = field(default_factory=lambda: iter(()))


def _load(job: Job, upscaler: Upscaler, output: Output, manifest: Manifest | None) -> _Loaded:
    """Read and decode the input of `job`, where it is to be done. Runs in the decoding thread."""
    started = time.perf_counter()
    size_in = None
    try:
        data = read_bytes(job.source)
        digest = sha256(data).hexdigest()
        key = manifest.key(digest) if manifest else ""
        result = skipped(job, key, output, manifest)
        if result is not None:
            return _Loaded(job, result)
        header = probe(job.source, most_pixels=upscaler.most_pixels)
        size_in = header.size
        _check_target(job, upscaler.output_size(*header.size), output)
        estimate = upscaler.estimate(header.layout, streamed=format_of(job.target) in STREAMED, timed=False)
        upscaler.check_memory(estimate.memory)
        pages = decode_pages(job.source, data, most_pixels=upscaler.most_pixels)
        if header.layout.bytes <= _MOST_AHEAD:
            pages = itertools.chain([next(pages)], pages)
        return _Loaded(job, None, data, digest, key, pages)
    except Exception as error:
        return _Loaded(job, failed(job, error, started, Result(job, "failed", size_in=size_in)))


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


def _check_target(job: Job, size: tuple[int, int], output: Output) -> None:
    """What the format can't hold, told before any work."""
    check_size(job.target, *size)
    if output.encoding.lossless:
        check_lossless(job.target)
    check_name(job.target)


def check_name(target: Path) -> None:
    """Raise InputError for a name that file systems don't take."""
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise InputError(f"{target}: the name is longer than {_LONGEST_NAME} bytes", "Use a shorter --suffix.")


def _compute(
    loaded: _Loaded,
    upscaler: Upscaler,
    output: Output,
    manifest: Manifest | None,
    encoder: ThreadPoolExecutor,
    on_tile: OnTile,
) -> Callable[[], Result]:
    """Compute the image of `loaded` while `encoder` writes it; what is returned waits for the file to be whole."""
    job, started = loaded.job, time.perf_counter()
    pages = loaded.pages
    while True:
        channel = _Channel()
        picture = None
        future: Future[None] | None = None
        done = Result(job, "done")
        try:
            for index, picture in enumerate(pages):
                count = picture.frames if keeps_frames(job.target) else 1
                if index == count:
                    break
                run = upscaler.start(picture, on_tile)
                sheet = replace(run.sheet, metadata=run.sheet.metadata.stripped) if output.strip else run.sheet
                if future is None:
                    future = encoder.submit(_write, loaded, channel, count, output, manifest)
                channel.put(sheet, future)
                for band in sheet.bands:
                    channel.put(band, future)
                left = dict.fromkeys((*done.left_out, *_left_out(job, picture, sheet, count)))
                done = replace(
                    done,
                    problem="; ".join([*picture.notes, *_about_frames(job, picture.frames), *_as_line(left)]),
                    left_out=tuple(left),
                    size_in=done.size_in or (picture.width, picture.height),
                    size_out=done.size_out or (sheet.layout.width, sheet.layout.height),
                    tiles=done.tiles + run.tiles,
                    model_seconds=done.model_seconds + run.model_seconds,
                )
            assert future is not None
            channel.put(None, future)
        except BaseException as error:
            channel.abandon()
            if future is not None and not isinstance(error, _WriterFailed):
                future.exception()  # until the temporary file is gone
            if isinstance(error, MemoryError | RuntimeError) and picture is not None:
                try:
                    upscaler.shrink_after(error, picture)
                except Exception as final:
                    return _settled(failed(job, final, started, done))
                pages = decode_pages(job.source, loaded.data, most_pixels=upscaler.most_pixels)
                continue
            if isinstance(error, Exception) and not isinstance(error, _WriterFailed | _Abandoned):
                return _settled(failed(job, error, started, done))
            if not isinstance(error, _WriterFailed):  # its own reason comes with the future
                raise
        return partial(_finished, job, future, started, done)


def _write(loaded: _Loaded, channel: _Channel, count: int, output: Output, manifest: Manifest | None) -> None:
    """Write one output and its record. Runs in the encoding thread."""
    target = loaded.job.target
    made = None
    if output.provenance is not None and not output.strip:
        made = replace(output.provenance, source_sha256=loaded.digest)
    if manifest is not None:
        manifest.record(target, loaded.key, source=loaded.job.source, done=False)
    write_sheets(target, channel.sheets(), count=count, encoding=output.encoding, provenance=made)
    if manifest is not None:
        manifest.record(target, loaded.key, source=loaded.job.source, done=True)


def _settled(result: Result) -> Callable[[], Result]:
    return lambda: result


def _finished(job: Job, future: Future[None] | None, started: float, done: Result) -> Result:
    assert future is not None
    try:
        future.result()
    except ResourceError:
        raise
    except Exception as error:
        return failed(job, error, started, done)
    return replace(done, seconds=time.perf_counter() - started)


def failed(job: Job, error: Exception, started: float, done: Result | None = None) -> Result:
    """That a job, begun at `started`, came to `error`; `done`: what was known of it."""
    size = done.size_in if done else None
    shown = "" if isinstance(error, PddError | MemoryError) else "".join(traceback.format_exception(error))
    seconds = time.perf_counter() - started
    return Result(job, "failed", _reason(job, error), size_in=size, seconds=seconds, traceback=shown)


def _reason(job: Job, error: Exception) -> str:
    """Why `job` failed, with its file."""
    if isinstance(error, PddError):
        reason = f"{error.message}. {error.hint}" if error.hint else error.message
    elif isinstance(error, MemoryError):
        reason = "out of memory: the image is too large"
    else:
        reason = f"a bug in pdd: {type(error).__name__}: {error}. Please report it with the output of `pdd --debug`"
    return reason if str(job.source) in reason or str(job.target) in reason else f"{job.source}: {reason}"


def _about_frames(job: Job, frames: int) -> list[str]:
    if frames == 1 or keeps_frames(job.target):
        return []
    return [f"only the first of {frames} frames is kept: {format_of(job.target)} holds one"]


def _left_out(job: Job, picture: Picture, sheet: Sheet, count: int) -> tuple[str, ...]:
    """Names of what the output can't have of `picture`. Raises InputError for colours that it can't have."""
    names = left_out(job.target, sheet, count=count)
    alpha = picture.alpha
    if alpha is None or stored_layout(job.target, sheet.layout).alpha or (alpha == np.iinfo(alpha.dtype).max).all():
        return names
    return (*names, "transparency (laid on white)")


def _as_line(left: Iterable[str]) -> list[str]:
    return [f"left out: {', '.join(left)}"] if left else []


class _Abandoned(Exception):  # noqa: N818 - not a failure of its own
    """Told to who computes or writes an image: it won't be finished."""


class _WriterFailed(Exception):  # noqa: N818 - the failure is in the writer's future
    """Told to the computing thread: nobody takes its rows any more."""


class _Channel:
    """Carries sheets and their bands from the computing thread to the writing one; a few bands wait at most."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Sheet | Array | None] = queue.Queue(_WAITING_BANDS)
        self._abandoned = False

    def put(self, item: Sheet | Array | None, writer: Future[None]) -> None:
        """Hand over a sheet, a band of it, or None at the end. Raises _WriterFailed when the writer has ended."""
        while True:
            if writer.done():
                raise _WriterFailed
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def abandon(self) -> None:
        """Make the writer drop its file."""
        self._abandoned = True

    def sheets(self) -> Iterator[Sheet]:
        """The sheets, for the writer, which takes the bands of each before the next."""
        item = self._take()
        while isinstance(item, Sheet):
            bands = _Bands(self._take)
            yield replace(item, bands=bands)
            item = bands.after

    def _take(self) -> Sheet | Array | None:
        while True:
            if self._abandoned:
                raise _Abandoned
            try:
                return self._queue.get(timeout=0.2)
            except queue.Empty:
                continue


class _Bands:
    """The bands of one sheet; `after` is what came behind them."""

    def __init__(self, take: Callable[[], Sheet | Array | None]) -> None:
        self._take = take
        self.after: Sheet | None = None

    def __iter__(self) -> Iterator[Array]:
        while True:
            item = self._take()
            if item is None or isinstance(item, Sheet):
                self.after = item
                return
            yield item
