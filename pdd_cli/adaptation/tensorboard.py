"""A run as events that TensorBoard shows."""

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
    """Writes into `folder`; without one it does nothing.

    When that fails the run goes on without: `notify` says so, once.
    """

    def __init__(self, folder: Path | None, notify: Callable[[str], None]) -> None:
        self._folder = folder
        self._notify = notify
        self._writer: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Begin after `step`: what earlier writers said of later steps counts no more."""
        self.close()
        if self._folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            with self._or_without():
                self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, flush_secs=10)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""
        if self._folder is not None and self._writer is not None:
            with self._or_without():
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, step)

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """One image."""
        if self._folder is not None and self._writer is not None:
            with self._or_without():
                self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._folder is not None and self._writer is not None:
            with self._or_without():
                self._writer.close()
            self._writer = None

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind the writer's thread has met
            self._notify(f"TensorBoard's events in {self._folder} can't be written, the run goes on without: {error}")
            self._folder = None


def check_board() -> None:
    """Raise InputError where the package that writes the events isn't installed."""
    try:
        import torch.utils.tensorboard.writer  # noqa: F401
    except ImportError as error:
        raise InputError(
            "tensorboard: true needs a package that isn't installed", "Run: pip install 'pdd-cli[tensorboard]'"
        ) from error
