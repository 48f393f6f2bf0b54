"""Images that are decoded when they are used, for folders that don't fit in memory."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pdd_cli.errors import InputError

_RGB = NDArray[np.uint8]  # (H, W, 3)

_WINDOW_BYTES = 512 << 20
_WINDOW_IMAGES = 32
_DECODED_PER_STEP = 16 << 20  # bytes of decoded images
_MOST_PER_STEP = 8
_ORDER = 1 << 32  # distinguishes this random sequence from those of crops


@dataclass(frozen=True)
class ImageFile:
    """An image file whose header was read."""

    path: Path
    size: tuple[int, int]  # (width, height) in pixels
    sha256: str


@dataclass(eq=False)
class LazyImages(Sequence[_RGB]):
    """Images that are decoded when they are used.

    An index decodes one image and keeps nothing. Crops are drawn from `window`: at each step a few decoded images that
    stay in memory for some steps, so that not every crop needs to decode an image. Windows depend only on the seed, the
    step and the sizes of the images, so that runs can be repeated, resumed and distributed.

    An image that can't be decoded is reported once, and the next one is used instead.
    """

    files: Sequence[ImageFile]
    decode: Callable[[Path], _RGB]  # raises InputError
    report: Callable[[str], None]
    variants: Callable[[_RGB], list[_RGB]] = lambda image: [image]  # the images that are made from a decoded one
    copies: float = 1.0  # memory of the variants, as a multiple of that of the decoded image
    broken: set[Path] = field(default_factory=set)
    _decoded: dict[int, list[_RGB]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> _RGB: ...
    @overload
    def __getitem__(self, index: slice) -> LazyImages: ...
    def __getitem__(self, index: int | slice) -> _RGB | LazyImages:
        chosen = range(len(self))[index]
        return self.select(chosen) if isinstance(chosen, range) else self._load(chosen)[0]

    def select(self, indices: Iterable[int]) -> LazyImages:
        """The images with these indices."""
        return self._copy(files=[self.files[index] for index in indices])

    def derive(self, function: Callable[[_RGB], list[_RGB]], copies: float) -> LazyImages:
        """The images that `function` makes from each image; they take `copies` times its memory."""
        before = self.variants
        return self._copy(
            variants=lambda image: [made for variant in before(image) for made in function(variant)],
            copies=self.copies * copies,
        )

    def window(self, seed: int, step: int) -> list[_RGB]:
        """All variants of the decoded images from which the crops of `step` are drawn."""
        with self._lock:
            indices = self._indices(seed, step)
            self._decoded = {index: self._decoded[index] for index in indices if index in self._decoded}
            for index in indices:
                if index not in self._decoded:
                    self._decoded[index] = self._load(index)
            return [variant for index in indices for variant in self._decoded[index]]

    @property
    def window_bytes(self) -> float:
        """The most memory of a window."""
        return sum(sorted(self._bytes, reverse=True)[: self._window_size])

    @property
    def facts(self) -> str:
        """A text that differs for other images."""
        return repr([(file.size, file.sha256) for file in self.files])

    def _copy(self, **changes: object) -> LazyImages:
        return replace(self, **changes, _decoded={}, _lock=threading.Lock())  # type: ignore[arg-type]

    def _load(self, index: int) -> list[_RGB]:
        for offset in range(len(self)):
            path = self.files[(index + offset) % len(self)].path
            if path in self.broken:
                continue
            try:
                return self.variants(self.decode(path))
            except InputError as error:
                self.broken.add(path)
                self.report(error.message)
        raise InputError(f"no image in {self.files[0].path.parent} can be decoded", "Give a folder of other images.")

    def _indices(self, seed: int, step: int) -> list[int]:
        """The indices of the images of a window.

        Windows move through a random order of all images, then through the next, by a few images at each step.
        """
        first = step * self._per_step
        places = (divmod(place, len(self)) for place in range(first, first + self._window_size))
        return list(dict.fromkeys(int(_order(seed, turn, len(self))[place]) for turn, place in places))

    @functools.cached_property
    def _bytes(self) -> list[float]:
        """The memory of the variants of each image."""
        return [3 * file.size[0] * file.size[1] * self.copies for file in self.files]

    @functools.cached_property
    def _window_size(self) -> int:
        """The number of images in a window, which fits even if they are the largest."""
        total, count = 0.0, 0
        for size in sorted(self._bytes, reverse=True)[:_WINDOW_IMAGES]:
            total += size
            count += total <= _WINDOW_BYTES
        return max(1, count)

    @functools.cached_property
    def _per_step(self) -> int:
        """The number of images that are new in each window: fewer of large images, which take longer to decode."""
        mean = sum(self._bytes) / self.copies / len(self)
        return min(max(1, math.floor(_DECODED_PER_STEP / mean)), _MOST_PER_STEP, self._window_size)


@functools.lru_cache(4)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, turn, _ORDER)).permutation(count)
