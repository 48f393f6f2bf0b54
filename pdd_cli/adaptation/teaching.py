"""The teacher of a student: a large model, whose SR of crops of the real images a small one learns from.

Some crops are made from the HR images, if there are any besides the real images: a student that saw only a few real
images is too soft on others. The fewer real images there are, the more crops are made from HR images.

The crops are upscaled once, before the first step, and kept in the run folder, so that a step costs no more than the
small network and the features. A step draws smaller crops from them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save_file
from torch import Tensor

from pdd_cli.adaptation.preview import to_rgb8, upscale_image
from pdd_cli.data.datasets import RGB, CropSampler, stack
from pdd_cli.data.lazy_images import LazyImages
from pdd_cli.files import atomic_write
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import Runtime

_MARGIN = 16  # LR pixels around a crop that the teacher sees and that aren't kept
_PLAIN_EVERY = 3  # every third crop is taken as it comes: students must learn skies and walls, too
_REAL_SHARE = (0.25, 0.75)  # of the crops are real, at least and at most, if there are photographs
_CANDIDATES = 8  # random crops that are tried for the others
_SAVE_SECONDS = 60  # time between savings


@dataclass(eq=False)
class Teacher:
    """A teacher, and its crops as far as they are computed."""

    model: SRModel
    name: str  # as the user gave it
    sha256: str  # of its tensors
    sampler: CropSampler
    count: int  # number of crops
    photographs: bool = False  # the sampler has HR images that are not made from the real images
    lr: list[RGB] = field(default_factory=list)
    sr: list[RGB] = field(default_factory=list)

    @property
    def side(self) -> int:
        """The side of a crop that is kept, in LR pixels."""
        return 4 * self.sampler.crop

    @property
    def total_bytes(self) -> int:
        """The size of all crops."""
        return self.count * 3 * self.side**2 * (1 + self.model.scale**2)

    @property
    def real_share(self) -> float:
        """The fraction of the crops that are real: together they are as large as all real images, within limits."""
        if not self.photographs:
            return 1.0
        if isinstance(self.sampler.real, LazyImages):  # too many for the memory
            return _REAL_SHARE[1]
        pixels = sum(image.shape[0] * image.shape[1] for image in self.sampler.real)
        return float(np.clip(pixels / (self.count * self.side**2), *_REAL_SHARE))

    def missing(self, path: Path) -> int:
        """The number of crops that the file `path` doesn't contain."""
        self._read(path)
        return max(0, self.count - len(self.lr))

    def compute(
        self, path: Path, runtime: Runtime, should_stop: Callable[[], bool], say: Callable[[str], None]
    ) -> bool:
        """Compute the crops that the file `path` doesn't contain yet, and write them to it.

        Returns whether all are computed; False after `should_stop()`.
        """
        self._read(path)
        if len(self.lr) < self.count:
            say(f"the teacher {self.name} upscales {self.count} crops, which all steps use")
        began = saved = time.monotonic()
        already = len(self.lr)
        while len(self.lr) < self.count and not should_stop():
            self.compute_next(runtime)
            if len(self.lr) == already + 2:
                left = (time.monotonic() - began) / 2 * (self.count - len(self.lr))
                say(f"the teacher needs about {max(1, round(left / 60))} minutes for the remaining crops")
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._write(path)
                saved = time.monotonic()
        if len(self.lr) > already:
            self._write(path)
        return len(self.lr) == self.count

    def compute_next(self, runtime: Runtime) -> None:
        """Upscale the next crop."""
        number, scale = len(self.lr), self.model.scale
        before, after = (math.ceil(count * self.real_share) for count in (number, number + 1))  # real crops
        is_real = after > before
        candidates = 1 if (before if is_real else number - before) % _PLAIN_EVERY == 0 else _CANDIDATES
        crop = self.sampler.real_crop if is_real else self.sampler.synthetic_crop
        lr = crop(number, self.side + 2 * _MARGIN, candidates)
        sr = to_rgb8(upscale_image(self.model, lr, runtime))
        self.lr.append(_inner(lr, _MARGIN))
        self.sr.append(_inner(sr, _MARGIN * scale))

    def load(self, content: bytes) -> None:
        """Take the crops from the content of a file of `compute`."""
        arrays = load(content)
        self.lr, self.sr = list(arrays["lr"]), list(arrays["sr"])

    def draw(self, step: int, size: int, first: int) -> tuple[Tensor, Tensor]:
        """The crops of elements `first` to `first + size` of `step`, fp32 in 0..1: LR, and the teacher's SR of it.

        They depend only on the seed, the step and the index, as those of the CropSampler.
        """
        crop, scale = self.sampler.crop, self.model.scale
        lr, sr = [], []
        for index in range(first, first + size):
            rng = np.random.default_rng((self.sampler.seed, step, index, 1))
            number, flips = int(rng.integers(len(self.lr))), tuple(rng.integers(2, size=3))
            y, x = (int(value) for value in rng.integers(self.side - crop + 1, size=2))
            lr.append(_turned(self.lr[number][y : y + crop, x : x + crop], flips))
            y, x, large = y * scale, x * scale, crop * scale
            sr.append(_turned(self.sr[number][y : y + large, x : x + large], flips))
        return stack(lr), stack(sr)

    def _write(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            save_file({"lr": np.stack(self.lr), "sr": np.stack(self.sr)}, temporary, {"inputs": self._inputs()})

    def _read(self, path: Path) -> None:
        """Take the crops from `path` if it has crops of the same images by the same teacher."""
        try:
            with safe_open(path, framework="numpy") as opened:
                if (opened.metadata() or {}).get("inputs") != self._inputs():
                    return
            self.load(path.read_bytes())
        except (OSError, SafetensorError):  # there is none, or it is damaged: it is computed again
            return

    def _inputs(self) -> str:
        """A checksum of everything that the crops depend on, except for their number."""
        photographs = (self.sampler.degradation, self.real_share) if self.photographs else None
        facts = (self.sha256, self.sampler.digest(), self.sampler.seed, self.side, photographs)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _inner(image: RGB, margin: int) -> RGB:
    return np.ascontiguousarray(image[margin:-margin, margin:-margin])


def _turned(crop: RGB, flips: tuple[int, ...]) -> RGB:
    flip_y, flip_x, transpose = flips
    crop = crop[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return crop.transpose(1, 0, 2) if transpose else crop
