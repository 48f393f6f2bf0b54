"""Jobs over processes and devices."""

from __future__ import annotations

import heapq
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
from pdd_cli.video.decode import is_video, video_pixels


def partition(jobs: Sequence[Job], ranks: Ranks) -> list[Job]:
    """The jobs that one of several processes does, by the pixels of the inputs: the same in each of them.

    The largest input goes to the process that has the least so far, and so on. What can't be read counts nothing.
    """
    if ranks.size == 1:
        return list(jobs)
    pixels = [_pixels(job.source) for job in jobs]
    loads = [(0, rank) for rank in range(ranks.size)]
    mine = []
    for index in sorted(range(len(jobs)), key=lambda index: (-pixels[index], index)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + pixels[index], rank))
        if rank == ranks.rank:
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
                raise Abandoned
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
