"""Upscale image files; reading, computing and writing overlap."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256

import numpy as np

from pdd_cli.errors import InputError, ResourceError
from pdd_cli.imaging.decode import decode_pages, probe, read_bytes
from pdd_cli.imaging.encode import left_out, write_images
from pdd_cli.imaging.formats import STREAMED, format_of, keeps_frames, stored_spec
from pdd_cli.imaging.image import DecodedImage, ImageStream
from pdd_cli.runtime import usable_cpus
from pdd_cli.upscaling.jobs import Abandoned, Job, Output, Result, check_target, failed, recorded, skipped
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.upscaling.upscaler import OnTile, Upscaler
from pdd_cli.upscaling.writer import OutputWriter

PAGE_DURATION = 100.0
"""Milliseconds for which a page without a duration is shown in an animation, as browsers show frames without one."""
NO_TIMES = "its frames have no times: each is shown for 0.1 s"

# Images that may be waiting to be written.
_WAITING_IMAGES = 2
# Encoding threads with a GPU, which computes images faster than one core compresses them.
_GPU_ENCODERS = 4
# Larger images, in bytes of pixels, are not decoded ahead.
_MAX_AHEAD = 100 << 20


def run_jobs(
    jobs: Iterable[Job],
    upscaler: Upscaler,
    *,
    output: Output = Output(),
    manifest: Manifest | None = None,
    on_start: Callable[[Job], None] = lambda job: None,
    on_tile: OnTile = lambda done, total: None,
) -> Iterator[Result]:
    """Do the jobs in turn, and yield the result of each.

    Unless `output.overwrite` is set, outputs that exist are skipped: with a `manifest` those of the same input, weights
    and settings, without one all that pdd made. The next image is decoded and the last one encoded while one is
    computed. A failed job doesn't stop the others, but a full disk does (ResourceError), because all would fail.
    """
    waiting: deque[Callable[[], Result]] = deque()
    encoders = 1 if upscaler.engine.runtime.device_type == "cpu" else min(_GPU_ENCODERS, usable_cpus())
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
    """Predict the results of `run_jobs` from the headers of the images (and, with a manifest, their content)."""
    for job in jobs:
        try:
            digest = sha256(read_bytes(job.source)).hexdigest() if manifest or job.target.exists() else ""
            result = skipped(job, digest, manifest.key(digest) if manifest else "", output, manifest)
            if result is not None:
                yield result
                continue
            header = probe(job.source, most_pixels=upscaler.most_pixels)
            width, height = header.size
            size_out = upscaler.output_size(width, height)
            check_target(job, size_out, output)
            estimate = upscaler.estimate(header.spec, streamed=format_of(job.target) in STREAMED)
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
    """An input that was read: its `result` if the job is over, else its pages, which may be decoded later."""

    job: Job
    result: Result | None = None
    data: bytes = b""
    digest: str = ""  # SHA-256 of the data
    key: str = ""
    pages: Iterator[DecodedImage] = field(default_factory=lambda: iter(()))


def _load(job: Job, upscaler: Upscaler, output: Output, manifest: Manifest | None) -> _Loaded:
    """Read and decode the input of `job` unless it is skipped. Runs in the decoding thread."""
    started = time.perf_counter()
    size_in = None
    try:
        data = read_bytes(job.source)
        digest = sha256(data).hexdigest()
        key = manifest.key(digest) if manifest else ""
        result = skipped(job, digest, key, output, manifest)
        if result is not None:
            return _Loaded(job, result)
        header = probe(job.source, data, most_pixels=upscaler.most_pixels)
        size_in = header.size
        check_target(job, upscaler.output_size(*header.size), output)
        estimate = upscaler.estimate(header.spec, streamed=format_of(job.target) in STREAMED, timed=False)
        upscaler.check_memory(estimate.memory)
        pages = decode_pages(job.source, data, most_pixels=upscaler.most_pixels)
        if header.spec.bytes <= _MAX_AHEAD:
            pages = itertools.chain([next(pages)], pages)
        return _Loaded(job, None, data, digest, key, pages)
    except Exception as error:
        return _Loaded(job, failed(job, error, started, Result(job, "failed", size_in=size_in)))


def _compute(
    loaded: _Loaded,
    upscaler: Upscaler,
    output: Output,
    manifest: Manifest | None,
    encoder: ThreadPoolExecutor,
    on_tile: OnTile,
) -> Callable[[], Result]:
    """Compute the image of `loaded` while `encoder` writes it. The returned function waits for the file."""
    job, started = loaded.job, time.perf_counter()
    pages = loaded.pages
    while True:
        writer = OutputWriter(encoder, partial(_write, loaded, output, manifest))
        image = None
        notes: dict[str, None] = {}
        done = Result(job, "done")
        try:
            with writer.opened():
                for index, image in enumerate(pages):
                    count = image.frames if keeps_frames(job.target) else 1
                    if index == count:
                        break
                    run = upscaler.start(image, on_tile)
                    if upscaler.processing.normal_map:
                        _check_height(job, image)
                    stream = replace(run.output, metadata=run.output.metadata.stripped) if output.strip else run.output
                    notes |= dict.fromkeys([*image.notes, *_about_frames(job, image.frames)])
                    if count > 1 and _needs_time(job, image):
                        stream = replace(stream, duration=PAGE_DURATION)
                        notes[NO_TIMES] = None
                    writer.put(stream, count)
                    left = dict.fromkeys((*done.left_out, *_left_out(job, image, stream, count)))
                    done = replace(
                        done,
                        problem="; ".join([*notes, *_as_line(left)]),
                        left_out=tuple(left),
                        size_in=done.size_in or (image.width, image.height),
                        size_out=done.size_out or (stream.spec.width, stream.spec.height),
                        tiles=done.tiles + run.tiles,
                        model_seconds=done.model_seconds + run.model_seconds,
                    )
        except MemoryError:
            try:
                if image is None:
                    raise
                upscaler.shrink(image)
            except Exception as error:
                return _settled(failed(job, error, started, done))
            pages = decode_pages(job.source, loaded.data, most_pixels=upscaler.most_pixels)
        except Abandoned:
            raise
        except Exception as error:
            return _settled(failed(job, error, started, done))
        else:
            return partial(_finished, job, writer, started, done)


def _write(
    loaded: _Loaded, output: Output, manifest: Manifest | None, images: Iterator[ImageStream], count: int
) -> None:
    """Write one output and its record. Runs in the encoding thread."""
    made = None
    if output.provenance is not None and not output.strip:
        made = replace(output.provenance, source_sha256=loaded.digest)
    with recorded(loaded.job, loaded.key, manifest) as before_rename:
        write_images(
            loaded.job.target,
            images,
            count=count,
            encoding=output.encoding,
            provenance=made,
            before_rename=before_rename,
        )


def _settled(result: Result) -> Callable[[], Result]:
    return lambda: result


def _finished(job: Job, writer: OutputWriter, started: float, done: Result) -> Result:
    try:
        writer.wait()
    except ResourceError:
        raise
    except Exception as error:
        return failed(job, error, started, done)
    return replace(done, seconds=time.perf_counter() - started)


def _needs_time(job: Job, image: DecodedImage) -> bool:
    """Whether a page without a duration becomes a frame that needs one; AVIF has none of 0."""
    format = format_of(job.target)
    return format != "TIFF" and (image.duration is None or (format == "AVIF" and image.duration == 0))


def _about_frames(job: Job, frames: int) -> list[str]:
    if frames == 1 or keeps_frames(job.target):
        return []
    return [f"only the first of {frames} frames is kept: {format_of(job.target)} holds one"]


def _check_height(job: Job, picture: DecodedImage) -> None:
    """Raise InputError if the output can't hold the alpha of a normal map, which is no transparency."""
    if picture.alpha is not None and not stored_spec(job.target, picture.spec).alpha:
        raise InputError(
            f"{job.target}: {format_of(job.target)} can't hold the alpha of a normal map (its heights)",
            "Use --format png.",
        )


def _left_out(job: Job, picture: DecodedImage, stream: ImageStream, count: int) -> tuple[str, ...]:
    """Names of what the output can't hold of `picture`. Raises InputError for colours that it can't hold."""
    names = left_out(job.target, stream, count=count)
    alpha = picture.alpha
    if alpha is None or stored_spec(job.target, stream.spec).alpha or (alpha == np.iinfo(alpha.dtype).max).all():
        return names
    return (*names, "transparency (laid on white)")


def _as_line(left: Iterable[str]) -> list[str]:
    return [f"left out: {', '.join(left)}"] if left else []
