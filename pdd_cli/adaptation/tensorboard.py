"""Logging of a run for TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pdd_cli.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoardLog:
    """Writes events into `folder`; does nothing if that is None.

    If writing fails, `warn` is called once and logging is disabled; the run continues.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._writer: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Start logging after `step`, and invalidate earlier events of later steps."""
        self.close()
        if self._folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            with self._disable_on_error():
                self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, flush_secs=10)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by tag."""
        if self._folder is not None and self._writer is not None:
            with self._disable_on_error():
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Log one image."""
        if self._folder is not None and self._writer is not None:
            with self._disable_on_error():
                self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write all remaining events."""
        if self._folder is not None and self._writer is not None:
            with self._disable_on_error():
                self._writer.close()
            self._writer = None

    @contextlib.contextmanager
    def _disable_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any kind, from the writer's thread
            self._warn(f"can't write TensorBoard events into {self._folder}; the run continues without them: {error}")
            self._folder = None


def check_tensorboard() -> None:
    """Raise InputError if the package that writes the events isn't installed."""
    try:
        import torch.utils.tensorboard.writer  # noqa: F401
    except ImportError as error:
        raise InputError(
            "tensorboard: true needs a package that isn't installed", "Run: pip install 'pdd-cli[tensorboard]'"
        ) from error
