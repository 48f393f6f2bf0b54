"""Upscales videos: decoding, upscaling and encoding overlap, and interrupted runs are resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.files import write_text
from pdd_cli.imaging.image import Array, DecodedImage, ImageSpec
from pdd_cli.imaging.provenance import sealed_text
from pdd_cli.upscaling.jobs import (
    Job,
    Output,
    Result,
    check_name,
    check_target,
    failed,
    hidden_folder,
    recorded,
    skipped,
)
from pdd_cli.upscaling.manifest import Manifest, key_of
from pdd_cli.upscaling.upscaler import OnTile, Upscaler
from pdd_cli.video.decode import (
    Clip,
    Frame,
    FrameReader,
    check_video_name,
    library_versions,
    read_clip,
    side_data_names,
)
from pdd_cli.video.encode import Codec, Extras, PartWriter, Target, assemble, choose_codec, choose_extras
from pdd_cli.video.frames import RECORD, FrameFolder, gives_frames, other_streams, skipped_frames
from pdd_cli.video.images import ImageSequenceReader, frame_files, is_image_sequence, read_image_clip
from pdd_cli.video.options import VideoOptions
from pdd_cli.video.still import open_still, plan_still, write_still
from pdd_cli.video.temporal import WARM_UP, TemporalMean, bytes_needed

PART_FRAMES = 96
"""Number of frames of a part, the most that is lost when a run is interrupted."""

_T = TypeVar("_T")

# Numbers of frames that wait to be upscaled, and that wait to be encoded.
_DECODE_AHEAD, _ENCODE_BEHIND = 2, 2
# Number of frames that an encoder keeps in memory, and the longest side that it supports.
_HELD_FRAMES = 64
_LONGEST_SIDE = 16_384


@dataclass(frozen=True)
class _Plan:
    """The plan for one video. `size`: (width, height) as stored. `memory`: peak of the process in bytes."""

    clip: Clip
    codec: Codec
    target: Target
    extras: Extras
    size: tuple[int, int]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    memory: int
    seconds: float

    @property
    def upright(self) -> tuple[int, int]:
        """`size` as displayed."""
        return _swap_if_rotated(self.size, self.clip)


@dataclass(frozen=True)
class _FramesPlan:
    """The plan for a folder of frames, with the fields of `_Plan`."""

    clip: Clip
    upright: tuple[int, int]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    memory: int
    seconds: float


def run_videos(
    jobs: Iterable[Job],
    upscaler: Upscaler,
    *,
    recipe: Mapping[str, object],
    options: VideoOptions = VideoOptions(),
    output: Output = Output(),
    manifest: Manifest | None = None,
    on_start: Callable[[Job], None] = lambda job: None,
    on_tile: OnTile = lambda done, total: None,
) -> Iterator[Result]:
    """Run the jobs one after another and yield the result of each, as `run_jobs` does for images.

    `on_tile` counts frames. `recipe`: the settings that, with the input, determine an output; `options` are among them.
    Unfinished videos of the same recipe are resumed. A failed job does not stop the others; a full disk does
    (ResourceError).
    """
    for job in jobs:
        started = time.perf_counter()
        parts = hidden_folder(job.target, "parts")
        try:
            digest = _digest(job.source)
            key, result = _skipped(job, digest, recipe, options, output, manifest)
            if result is not None:
                shutil.rmtree(parts, ignore_errors=True)  # left by a run that was interrupted just before its end
                yield result
                continue
            on_start(job)
            if options.preview is not None:
                still = open_still(job, upscaler, output, options)
                yield write_still(job, still, upscaler, digest, key, output, manifest, started)
                continue
            if gives_frames(job):
                frames = _plan_frames(job, upscaler, output, options, timed=False)
                folder = FrameFolder(parts, job.target, frames.clip, key, options.frame_format, output, digest)
                result = _write_frames(job, frames, upscaler, folder, on_tile, temporal=options.temporal)
                yield replace(result, seconds=time.perf_counter() - started)
                continue
            plan = _plan(job, digest, upscaler, output, options, timed=False)
            _check_memory(plan, upscaler)
            unfinished = _Parts(parts, job.target, plan, key)
            result = _upscale(
                job, plan, upscaler, unfinished, key, output, manifest, on_tile, temporal=options.temporal
            )
        except ResourceError:
            raise
        except Exception as error:
            yield failed(job, error, started)
        else:
            yield replace(result, seconds=time.perf_counter() - started)
        finally:
            upscaler.reserved = 0


def preview_videos(
    jobs: Sequence[Job],
    upscaler: Upscaler,
    *,
    recipe: Mapping[str, object],
    options: VideoOptions = VideoOptions(),
    output: Output = Output(),
    manifest: Manifest | None = None,
) -> Iterator[Result]:
    """The expected results of `run_videos`, from the first frame of each video."""
    for job in jobs:
        try:
            digest = _digest(job.source)
            _, result = _skipped(job, digest, recipe, options, output, manifest)
            if result is None and options.preview is not None:
                result = plan_still(job, open_still(job, upscaler, output, options), upscaler)
            elif result is None:
                plan: _Plan | _FramesPlan
                if gives_frames(job):
                    plan = _plan_frames(job, upscaler, output, options, timed=True)
                else:
                    plan = _plan(job, digest, upscaler, output, options, timed=True)
                    _check_memory(plan, upscaler)
                result = Result(
                    job,
                    "planned",
                    "; ".join(plan.notes),
                    plan.clip.upright,
                    plan.upright,
                    plan.clip.frames * upscaler.tiles(*plan.clip.upright),
                    plan.clip.frames * plan.seconds,
                    plan.clip.frames * plan.seconds,
                    plan.memory,
                    plan.clip.frames,
                    plan.left_out,
                )
            yield result
        except Exception as error:
            yield failed(job, error, time.perf_counter())
        finally:
            upscaler.reserved = 0


def _plan(job: Job, digest: str, upscaler: Upscaler, output: Output, options: VideoOptions, *, timed: bool) -> _Plan:
    """Plan a video before any work, and reserve the memory of its encoder. `digest`: SHA-256 of the input.

    Raises InputError if the video can't be processed.
    """
    check_name(job.target)
    check_video_name(job.target)
    read = read_image_clip if is_image_sequence(job.source) else read_clip
    clip = read(job.source, most_pixels=upscaler.most_pixels, options=options)
    codec, notes = choose_codec(clip, job.target, output.encoding, options)
    width, height = _swap_if_rotated(upscaler.output_size(*clip.upright), clip)
    size = (width - width % codec.chroma[0], height - height % codec.chroma[1])
    if size != (width, height):
        notes.append(f"{width}x{height} is cut to {size[0]}x{size[1]}: its chroma needs even sizes")
    if not 0 < min(size) <= max(size) <= _LONGEST_SIDE:
        raise InputError(
            f"{job.target}: {codec.name} can't hold {width}x{height} "
            f"({max(codec.chroma)} to {_LONGEST_SIDE} pixels a side)"
        )
    # Measured at 1920x1080: 4.2 bytes a pixel and frame for 8 bits (x264), 5.5 for 10 (x265).
    upscaler.reserved = _HELD_FRAMES * width * height * (5 if codec.bits == 8 else 6)
    upscaler.reserved += bytes_needed(width, height) if options.temporal else 0
    estimate = upscaler.estimate(ImageSpec(*clip.upright, 3, bits=16), streamed=False, timed=timed)
    made = ""
    if output.provenance is not None and not output.strip:
        made = sealed_text(replace(output.provenance, source_sha256=digest))
    target = Target(job.target, output.strip, made)
    extras, left_out, converted = choose_extras(clip, codec, target, convert_audio=options.convert_audio)
    notes += converted
    if clip.alpha:
        left_out["transparency"] = "the output has none"
    lost = side_data_names(clip.side - codec.kept_side_data)
    if lost:
        notes.append(f"properties of its frames that are not kept: {', '.join(lost)}")
    notes += [f"its {name} is not kept: {why}" for name, why in left_out.items()]
    return _Plan(
        clip,
        codec,
        target,
        extras,
        size,
        (*clip.notes, *notes),
        (*lost, *left_out),
        estimate.memory,
        estimate.seconds,
    )


def _check_memory(plan: _Plan, upscaler: Upscaler) -> None:
    try:
        upscaler.check_memory(plan.memory)
    except ResourceError as error:  # of this video alone
        raise InputError(f"{plan.clip.path}: {error.message}", "Ask for a smaller output.") from error


class _Parts:
    """The parts of a video in a folder next to the output. Parts of other settings or inputs are deleted."""

    def __init__(self, folder: Path, target: Path, plan: _Plan, key: str) -> None:
        self._folder, self._target, self._plan = folder, target, plan
        made_by = json.dumps([key, str(plan.codec), plan.size, PART_FRAMES, library_versions()])
        note = folder / "made-by"
        if not note.exists() or note.read_text(encoding="utf-8") != made_by:
            shutil.rmtree(folder, ignore_errors=True)
            write_text(note, made_by)
        self.paths: list[Path] = []
        while self._next().exists():
            self.paths.append(self._next())
        self._open: PartWriter | None = None
        self._count = 0
        self._abandoned = False

    @property
    def frames(self) -> int:
        """The number of frames in the finished parts, or more if the last part is the shorter end of the video."""
        return len(self.paths) * PART_FRAMES

    def add(self, time: int, pixels: Array) -> None:
        """Encode the next frame, unless an earlier one has failed."""
        if self._abandoned:
            return
        if self._open is None:
            plan = self._plan
            self._open = PartWriter(self._next(), self._target, plan.clip, plan.codec, plan.size)
            self._count = 0
        try:
            self._open.add(time, pixels)
        except BaseException:
            self.abandon()
            raise
        self._count += 1
        if self._count == PART_FRAMES:
            self.finish()

    def finish(self) -> None:
        """Close the part that is being written."""
        if self._open is not None:
            path = self._next()
            self._open.close()
            self._open = None
            self.paths.append(path)

    def abandon(self) -> None:
        """Delete the part that is being written, and start no other."""
        self._abandoned = True
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def remove(self) -> None:
        """Delete all parts."""
        self.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _next(self) -> Path:
        return self._folder / f"{len(self.paths):06d}.mkv"


class _Worker:
    """A thread that runs submitted functions one after another.

    When the context ends early, pending functions are dropped. The context waits until the thread is idle, even if it
    is interrupted, because files that the thread uses must not be closed.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._futures: deque[Future[object]] = deque()

    def __enter__(self) -> _Worker:
        return self

    def submit(self, function: Callable[..., _T], *arguments: object) -> Future[_T]:
        """Call `function` in the thread."""
        while self._futures and self._futures[0].done():
            self._futures.popleft()
        future = self._pool.submit(function, *arguments)
        self._futures.append(future)  # type: ignore[arg-type]
        return future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        while running := [future for future in self._futures if not future.done()]:
            with suppress(KeyboardInterrupt):
                wait(running)


def _upscale(
    job: Job,
    plan: _Plan,
    upscaler: Upscaler,
    parts: _Parts,
    key: str,
    output: Output,
    manifest: Manifest | None,
    on_tile: OnTile,
    *,
    temporal: bool,
) -> Result:
    clip, first = plan.clip, parts.frames
    reader = (ImageSequenceReader if clip.index < 0 else FrameReader)(clip, skip=0 if temporal else first)
    frames = iter(reader)
    try:
        computed = _compute(
            clip,
            upscaler,
            frames,
            lambda time, pixels: parts.add(time, _rotate_back(pixels, plan)),
            parts.finish,
            on_tile,
            first=first,
            temporal=temporal,
        )
    except PddError as error:
        if _is_of_machine(error):
            parts.abandon()
        else:
            parts.remove()  # it would fail there again
        raise
    except BaseException:
        parts.abandon()
        raise
    finally:
        frames.close()
    with recorded(job, key, manifest) as before_rename:
        assemble(
            clip, plan.codec, plan.target, plan.extras, parts.paths, reader.times, reader.end,
            length=PART_FRAMES, before_rename=before_rename,
        )  # fmt: skip
    parts.remove()
    return Result(
        job,
        "done",
        "; ".join([*plan.notes, *reader.notes()]),
        clip.upright,
        plan.upright,
        computed.tiles,
        model_seconds=computed.model_seconds,
        frames=len(reader.times),
        left_out=(*plan.left_out, *reader.left_out),
    )


def _compute(
    clip: Clip,
    upscaler: Upscaler,
    frames: Iterator[Frame],
    add: Callable[[int, Array], None],
    finish: Callable[[], None],
    on_tile: OnTile,
    *,
    first: int,
    temporal: bool,
) -> _ComputedFrames:
    """Upscale the frames. `add` takes the time and the upright pixels of each, in a thread; `finish` follows there.

    `first`: the number of the first frame for `add`; those before it have no pixels, or are only averaged with it, if
    `temporal` is set.
    """
    computed = _ComputedFrames(clip, upscaler)
    mean = TemporalMean() if temporal else None

    def put(number: int, frame: Frame, upscaled: Array) -> None:
        if mean is not None and frame.pixels is not None:
            upscaled = mean.add(clip.part(frame.pixels), upscaled)
        if number >= first:
            add(frame.time, upscaled)

    with _Worker("decode") as decoder, _Worker("encode") as encoder:
        batch_size = upscaler.batch(*clip.upright)
        ahead = deque(decoder.submit(next, frames, None) for _ in range(_DECODE_AHEAD + batch_size - 1))
        waiting: deque[Future[None]] = deque()

        def upcoming() -> Iterator[Frame]:
            while (frame := ahead.popleft().result()) is not None:
                ahead.append(decoder.submit(next, frames, None))
                yield frame

        decoded: Iterator[tuple[int, Frame]] = enumerate(upcoming())
        if temporal:
            decoded = _with_warm_up(decoded, first)
        while some := list(itertools.islice(decoded, batch_size)):
            shown = [(number, frame) for number, frame in some if frame.pixels is not None]
            found = computed.upscale([frame.pixels for _, frame in shown if frame.pixels is not None])
            for (number, frame), upscaled in zip(shown, found, strict=True):
                waiting.append(encoder.submit(put, number, frame, upscaled))
                while len(waiting) > _ENCODE_BEHIND + batch_size - 1:
                    waiting.popleft().result()
            done = some[-1][0] + 1
            on_tile(done, max(clip.frames, done))
        for future in waiting:
            future.result()
        encoder.submit(finish).result()
    return computed


def _skipped(
    job: Job,
    digest: str,
    recipe: Mapping[str, object],
    options: VideoOptions,
    output: Output,
    manifest: Manifest | None,
) -> tuple[str, Result | None]:
    """The key of the new output, and the result of a job that can be skipped. Raises InputError as `skipped` does."""
    if gives_frames(job) and options.preview is None:
        key = key_of(digest, {**recipe, "frames": options.frame_format})
        return key, skipped_frames(job, key, overwrite=output.overwrite)
    key = key_of(digest, recipe)
    return key, skipped(job, digest, key, output, manifest)


def _plan_frames(job: Job, upscaler: Upscaler, output: Output, options: VideoOptions, *, timed: bool) -> _FramesPlan:
    """Plan a folder of frames. Raises InputError if the video can't be processed."""
    check_name(job.target)
    clip = read_clip(job.source, most_pixels=upscaler.most_pixels, options=options)
    size = upscaler.output_size(*clip.upright)
    check_target(Job(job.source, Path(f"{job.target}.{options.frame_format}")), size, output)
    upscaler.reserved = bytes_needed(*size) if options.temporal else 0
    estimate = upscaler.estimate(ImageSpec(*clip.upright, 3, bits=16), streamed=False, timed=timed)
    upscaler.check_memory(estimate.memory)
    notes, left_out = list(clip.notes), other_streams(clip)
    if clip.alpha:
        left_out.append("transparency")
    lost = side_data_names(clip.side)
    if clip.aspect not in (0, 1):
        notes.append(f"its pixels are {clip.aspect.numerator}:{clip.aspect.denominator}, not square")
    notes += [f"its {name} is not kept: the output is images" for name in left_out]
    if lost:
        notes.append(f"properties of its frames that are not kept: {', '.join(lost)}")
    return _FramesPlan(clip, size, tuple(notes), (*lost, *left_out), estimate.memory, estimate.seconds)


def _write_frames(
    job: Job, plan: _FramesPlan, upscaler: Upscaler, folder: FrameFolder, on_tile: OnTile, *, temporal: bool
) -> Result:
    """Upscale a video into a folder of frames. Finished frames stay if it is interrupted."""
    clip, first = plan.clip, folder.frames
    reader = FrameReader(clip, skip=0 if temporal else first)
    frames = iter(reader)
    try:
        computed = _compute(clip, upscaler, frames, folder.add, folder.finish, on_tile, first=first, temporal=temporal)
    except PddError as error:
        if not _is_of_machine(error):
            folder.remove()  # it would fail there again
        raise
    finally:
        frames.close()
    folder.publish(reader.times, reader.end)
    steps = {after - before for before, after in itertools.pairwise(reader.times)}
    varying = max(steps, default=0) - min(steps, default=0) > 0.002 / clip.time_base
    notes = [f"its frame rate varies: the times of the frames are in {RECORD}"] if varying else []
    return Result(
        job,
        "done",
        "; ".join([*plan.notes, *reader.notes(), *notes]),
        clip.upright,
        plan.upright,
        computed.tiles,
        model_seconds=computed.model_seconds,
        frames=len(reader.times),
        left_out=(*plan.left_out, *reader.left_out),
    )


class _ComputedFrames:
    """Upscales the frames of a clip; a frame that equals the one before it is not computed again.

    `tiles`, `model_seconds`: of the computed frames.
    """

    def __init__(self, clip: Clip, upscaler: Upscaler) -> None:
        self._clip, self._upscaler = clip, upscaler
        self._latest: tuple[Array, Array] | None = None  # the latest frame and its result
        self.tiles = 0
        self.model_seconds = 0.0

    def upscale(self, frames: Sequence[Array]) -> list[Array]:
        """The next frames, as stored, upscaled and upright. Raises PddError if the memory does not suffice."""
        new: list[Array] = []
        places = []  # of the result of each frame: before the new ones is the latest of the last call
        before = None if self._latest is None else self._latest[0]
        for frame in frames:
            if before is None or not np.array_equal(frame, before):
                new.append(frame)
            places.append(len(new) - 1)
            before = frame
        try:
            upscaled = self._upscaler.upscale_all([DecodedImage(self._clip.part(frame)) for frame in new])
        except ResourceError as error:  # of this video alone
            raise PddError(f"{self._clip.path}: {error.message}", error.hint) from error
        self.tiles += sum(result.tiles for result in upscaled)
        self.model_seconds += sum(result.model_seconds for result in upscaled)
        results = [result.picture.pixels for result in upscaled]
        if self._latest is not None:
            results.append(self._latest[1])  # at place -1
        found = [results[place] for place in places]
        if found and before is not None:
            self._latest = before, found[-1]
        return found


def _is_of_machine(error: PddError) -> bool:
    """Whether memory, a disk or a network share failed, and not the video: then another run may succeed."""
    return isinstance(error, ResourceError) or isinstance(error.__cause__, ResourceError | OSError)


def _with_warm_up(numbered: Iterator[tuple[int, Frame]], first: int) -> Iterator[tuple[int, Frame]]:
    """The frames from the number `first` on, after the last `WARM_UP` before it that differ from the one before."""
    before: deque[tuple[int, Frame]] = deque(maxlen=WARM_UP)
    latest: Array | None = None
    for number, frame in numbered:
        if number >= first:
            yield from before
            before.clear()
            yield number, frame
        elif frame.pixels is not None and (latest is None or not np.array_equal(frame.pixels, latest)):
            latest = frame.pixels
            before.append((number, frame))


def _swap_if_rotated(size: tuple[int, int], clip: Clip) -> tuple[int, int]:
    """Convert a (width, height) between stored and displayed orientation."""
    return size if clip.quarters % 2 == 0 else (size[1], size[0])


def _rotate_back(pixels: Array, plan: _Plan) -> Array:
    """The frame in stored orientation, cropped to the encoded size."""
    stored = np.rot90(pixels, -plan.clip.quarters)
    return stored[: plan.size[1], : plan.size[0]]


def _digest(path: Path) -> str:
    """The SHA-256 of a file, or of all frames in a folder, read in blocks. Raises InputError if it can't be read."""
    digest = hashlib.sha256()
    try:
        for file_path in frame_files(path) if path.is_dir() else [path]:
            with file_path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
