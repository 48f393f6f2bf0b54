"""The Python interface of upscaling: a model for arrays, and a function for files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdd_cli.batch.loading import load_upscalers
from pdd_cli.batch.run import run
from pdd_cli.errors import InputError, PartialFailure
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.observer import Observer
from pdd_cli.ranks import SINGLE_PROCESS
from pdd_cli.settings.resolve import settings_from
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.upscaling.upscaler import Upscaler

Array = npt.NDArray[Any]


class Model:
    """A loaded super-resolution model. `close`, or a `with` statement, frees its memory and threads."""

    def __init__(self, upscaler: Upscaler, close: Callable[[], None]) -> None:
        self._upscaler = upscaler
        self.close = close

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def scale(self) -> int:
        """The scale of the model. Outputs have another size if `settings` specify one."""
        return self._upscaler.scale

    @property
    def architecture(self) -> str:
        """The name of the architecture, such as RRDBNet."""
        return self._upscaler.engine.model.architecture

    def upscale(self, image: Array) -> Array:
        """Upscale one image.

        Args:
            image: (H, W) or (H, W, C), uint8 or uint16, C as in `pdd_cli.upscale`.

        Returns:
            (H', W') or (H', W', C) of the same type.

        Raises:
            InputError: the array has another shape or type.
            ResourceError: out of memory.
        """
        if image.dtype not in (np.uint8, np.uint16):
            raise InputError(
                f"the array has the type {image.dtype}, not uint8 or uint16",
                "Scale the values to 0..255 or 0..65535 and convert them with `astype`.",
            )
        channels = image[..., None] if image.ndim == 2 else image
        if channels.ndim != 3 or not 1 <= channels.shape[2] <= 4 or not channels.size:
            raise InputError(f"the array has the shape {image.shape}, not (H, W) or (H, W, 1 to 4)")
        has_alpha = channels.shape[2] in (2, 4)
        pixels = np.ascontiguousarray(channels[..., :-1] if has_alpha else channels)
        alpha = np.ascontiguousarray(channels[..., -1]) if has_alpha else None
        whole: Array = self._upscaler.upscale(DecodedImage(pixels, alpha)).picture.interleaved
        return whole[..., 0] if image.ndim == 2 else whole


def open_model(values: Mapping[str, Any]) -> Model:
    """Load the model for settings of `upscale`."""
    settings = settings_from(UpscaleConfig, {**values, "input": ("",), "output": ""})
    opened = ExitStack()
    loaded = opened.enter_context(load_upscalers(settings, SINGLE_PROCESS, Observer(), dry_run=False))
    return Model(loaded.upscalers[0], opened.close)


def upscale_files(sources: Sequence[Path], output: str, values: Mapping[str, Any], observer: Observer) -> list[Path]:
    """Upscale files and return the outputs in the order of `sources`. Raises PartialFailure that names failures."""
    settings = settings_from(UpscaleConfig, {**values, "input": tuple(sources), "output": output})
    outcome = run(settings, fixed=values, observer=observer)
    try:
        outcome.raise_for_failures()
    except PartialFailure as error:
        failed = [result.problem for result in outcome.results if result.status == "failed"]
        raise PartialFailure("\n".join([error.message, *failed, *outcome.plan.problems]), error.hint) from None
    return [result.job.target for result in outcome.results]
