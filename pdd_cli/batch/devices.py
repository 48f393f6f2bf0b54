"""Distributes jobs over processes and devices."""

from __future__ import annotations

import heapq
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from pdd_cli.imaging.decode import probe
from pdd_cli.ranks import Ranks
from pdd_cli.upscaling.jobs import Abandoned, Job, Result
from pdd_cli.upscaling.upscaler import OnTile, Upscaler
from pdd_cli.video.decode import is_video, video_size
from pdd_cli.video.images import frame_files


def partition(jobs: Sequence[Job], ranks: Ranks) -> list[Job]:
    """The jobs of one of several processes. All processes compute the same partition, by the pixels of the inputs.

    Each input, from the largest to the smallest, goes to the process with the fewest pixels so far. Unreadable inputs
    count as 0 pixels.
    """
    if ranks.size == 1:
        return list(jobs)
    pixels = [math.prod(input_size(job.source)) for job in jobs]
    loads = [(0, rank) for rank in range(ranks.size)]
    mine = []
    for index in sorted(range(len(jobs)), key=lambda index: (-pixels[index], index)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + pixels[index], rank))
        if rank == ranks.rank:
            mine.append(index)
    return [jobs[index] for index in sorted(mine)]


def input_size(source: Path) -> tuple[int, int, int]:
    """Width, height and (for a video approximate) number of frames from the header; zeros for an unreadable input."""
    try:
        if is_video(source):
            return video_size(source)
        if source.is_dir():
            files = frame_files(source)
            return *probe(files[0], most_pixels=2**62).size, len(files)
        header = probe(source, most_pixels=2**62)
    except Exception:  # the job itself will report it
        return 0, 0, 0
    return *header.size, header.frames


def output_pixels(job: Job, upscaler: Upscaler) -> int:
    """The approximate number of pixels that `job` computes; 0 if its input can't be read."""
    width, height, frames = input_size(job.source)
    if not width or not height:
        return 0
    return math.prod(upscaler.output_size(width, height)) * (
        frames if is_video(job.source) or is_video(job.target) else 1
    )


class Runner(Protocol):
    """A function that runs jobs one after another on one device, such as `run_jobs`."""

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
    """Call `run` with several upscalers at once. Each takes the next job when it is free.

    Results are yielded as jobs end. The first argument of the callbacks is the index of the upscaler; they are called
    from its thread.
    """
    if len(upscalers) == 1:
        yield from run(jobs, upscalers[0], on_start=partial(on_start, 0), on_tile=partial(on_tile, 0))
        return
    job_queue = _JobQueue(jobs)
    results: queue.Queue[Result | BaseException | None] = queue.Queue()

    def work(device: int) -> None:
        def tile(done: int, total: int) -> None:
            if job_queue.closed:
                raise Abandoned
            on_tile(device, done, total)

        try:
            for result in run(job_queue, upscalers[device], on_start=partial(on_start, device), on_tile=tile):
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
            job_queue.closed = True


class _JobQueue:
    """A sequence of jobs shared by several threads. Once it is `closed`, it yields no more jobs."""

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
