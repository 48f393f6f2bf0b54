"""Pass the rows of one output from the thread that computes them to the thread that encodes them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from pdd_cli.imaging.image import Array, ImageStream
from pdd_cli.upscaling.jobs import Abandoned

# Maximum number of chunks of rows that wait to be written.
_WAITING_CHUNKS = 2


class OutputWriter:
    """Writes one file in a thread of `encoder` while its rows are computed. Only a few chunks of rows are queued.

    `write` takes the images of the file and their number.
    """

    def __init__(self, encoder: ThreadPoolExecutor, write: Callable[[Iterator[ImageStream], int], None]) -> None:
        self._encoder = encoder
        self._write = write
        self._queue: queue.Queue[ImageStream | Array | None] = queue.Queue(_WAITING_CHUNKS)
        self._abandoned = False
        self._future: Future[None] | None = None
        self._next: ImageStream | Array | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The context in which images are `put`. After it only queued rows remain; after an error the file is dropped.

        If writing fails, the rest of the block is skipped, and `wait` raises the error.
        """
        try:
            yield
            self._put(None)
        except _WriterEnded:
            pass
        except BaseException:
            self._abandoned = True
            if self._future is not None:
                self._future.exception()  # until the temporary file is gone
            raise

    def put(self, image: ImageStream, count: int) -> None:
        """Queue one of the `count` images of the file, with all its rows. The first one starts the writing."""
        if self._future is None:
            self._future = self._encoder.submit(self._write, self._images(), count)
        self._put(image)
        for rows in image.row_chunks:
            self._put(rows)

    def wait(self) -> None:
        """Wait until the file is written. Raises the error of writing it."""
        assert self._future is not None
        self._future.result()

    def _put(self, item: ImageStream | Array | None) -> None:
        while self._future is not None:
            if self._future.done():
                raise _WriterEnded
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _images(self) -> Iterator[ImageStream]:
        """The images for `write`, which must read all rows of an image before the next."""
        self._next = self._take()
        while isinstance(image := self._next, ImageStream):
            self._next = None
            yield replace(image, row_chunks=self._rows())

    def _rows(self) -> Iterator[Array]:
        while isinstance(item := self._take(), np.ndarray):
            yield item
        self._next = item

    def _take(self) -> ImageStream | Array | None:
        while True:
            if self._abandoned:
                raise Abandoned
            try:
                return self._queue.get(timeout=0.2)
            except queue.Empty:
                continue


class _WriterEnded(Exception):  # noqa: N818 - the failure is in the writer's future
    """The writing thread has ended, so rows can't be queued."""
