"""Less flicker in upscaled videos: a mean over time where the scene is still (`--temporal`)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from pdd_cli.imaging.image import Array

FRAMES = 4
"""Number of frames before each one that its mean includes, at most. Equal frames count once."""

WARM_UP = FRAMES + 1
"""Number of different frames that a resumed run computes again: the last one before it may be shown once more, with a
mean that includes `FRAMES` before that."""

# Frames are compared in squares of this many pixels a side.
_SIDE = 5
# Squares count as still if their mean squared difference is at most this (in levels of 255), and no longer at twice as
# much: from 3 levels to 10, according to the noise.
_LEAST, _MOST = 3.0**2, 10.0**2
# The noise is that of the stillest squares, in percent.
_STILLEST = 5


def bytes_needed(width: int, height: int) -> int:
    """The memory for upscaled frames of this size: those before, with 16 bits, and the sum and weights in fp32."""
    return width * height * (FRAMES * 3 * 2 + 2 * 3 * 4 + 2 * 4)


@dataclass(frozen=True)
class _Past:
    """An earlier frame, with its result of the model. `noise`: mean squared difference to the one before it."""

    frame: Array
    upscaled: Array
    noise: float


class TemporalMean:
    """The mean of each upscaled frame with those before it, for each square where the frames differ by noise only.

    The model's results are averaged, not its input: measured, that leaves less flicker at the same sharpness.
    """

    def __init__(self) -> None:
        self._before: deque[_Past] = deque(maxlen=FRAMES)
        self._mean: Array | None = None

    def add(self, frame: Array, upscaled: Array) -> Array:
        """The mean for the next frame.

        Args:
            frame: (h, w, 3) uint16, the frame as the model saw it.
            upscaled: (H, W, 3) of any unsigned integer type. If it is the very array of the call before, because the
                frames are equal, the mean of that call is returned.
        """
        import cv2

        if self._before and self._mean is not None and upscaled is self._before[-1].upscaled:
            return self._mean
        levels = frame.astype(np.float32) / 257
        differences = [_difference(levels, past.frame) for past in self._before]
        noise = float(np.percentile(differences[-1], _STILLEST)) if differences else 0.0
        # At a cut the frames before tell the noise.
        least = min([noise, *(past.noise for past in list(self._before)[1:])])
        limit = min(max(2 * least, _LEAST), _MOST)
        height, width = upscaled.shape[:2]
        total, count = upscaled.astype(np.float32), np.ones((height, width), np.float32)
        for past, difference in zip(self._before, differences, strict=True):
            weight = np.clip(2 - difference / limit, 0, 1)
            if weight.any():
                scaled = cv2.resize(weight, (width, height), interpolation=cv2.INTER_LINEAR)
                total += past.upscaled * scaled[..., None]
                count += scaled
        self._before.append(_Past(levels, upscaled, noise))
        total /= count[..., None]
        self._mean = np.rint(total).astype(upscaled.dtype)
        return self._mean


def _difference(one: Array, other: Array) -> Array:
    """(h, w), the mean squared difference in the square around each pixel."""
    import cv2

    squared: Array = ((one - other) ** 2).mean(axis=2)
    return np.asarray(cv2.boxFilter(squared, -1, (_SIDE, _SIDE)))
