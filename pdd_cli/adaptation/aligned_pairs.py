"""Checks of pairs of a real LR image and its ground truth, for supervised training: names, sizes, alignment."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pdd_cli.data.datasets import RGB
from pdd_cli.iqa.pairing import Pairing

_MIN_SIDE = 16  # LR pixels
_SAME_SCENE = 0.5  # correlation, of the thumbnails or of the detail, of two images of one scene
_MIN_CONTRAST = 2.0  # standard deviation in 8-bit levels; a flat image can't be compared
_SEARCH = 8  # LR pixels
_MAX_SHIFT = 1  # LR pixels
_CLEARLY_BETTER = 0.05  # correlation at the best shift, compared with that at no shift

Size = tuple[int, int]


def without_partner(pairing: Pairing) -> list[str]:
    """A line for each LR image and each HR image that has no partner."""
    lines = []
    for path in pairing.unmatched:
        several = [other.name for other in pairing.ambiguous.get(path, ())]
        reason = f"several HR images match: {', '.join(several)}" if several else "no HR image of that name"
        lines.append(f"{path}: {reason}")
    return lines + [f"{path}: no LR image of that name" for path in pairing.unused]


def wrong_size(small: Size | None, large: Size | None, scale: int) -> str:
    """The reason why an LR and an HR image of these sizes (None: unreadable) are no pair; "" if they are one."""
    if small is None or large is None:
        return f"the {'LR' if small is None else 'HR'} image can't be read"
    width, height = small
    if min(small) < _MIN_SIDE:
        return f"the LR image is {width}x{height}: smaller than {_MIN_SIDE} pixels"
    if large != (width * scale, height * scale):
        return (
            f"the HR image is {large[0]}x{large[1]}, but must be {width * scale}x{height * scale}, "
            f"{scale} times the LR image"
        )
    return ""


def misaligned(lr: RGB, hr: RGB) -> str:
    """The reason why these images are no aligned pair; "" if they are one, or too flat to tell.

    Args:
        lr: (h, w, 3).
        hr: (h*scale, w*scale, 3).
    """
    size = (lr.shape[1], lr.shape[0])
    ours = cv2.cvtColor(np.ascontiguousarray(lr), cv2.COLOR_RGB2GRAY).astype(np.float32)
    theirs = cv2.cvtColor(cv2.resize(hr, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY).astype(np.float32)
    if min(ours.std(), theirs.std()) < _MIN_CONTRAST:
        return ""
    margin = min(_SEARCH, min(size) // 4)
    fine = [cv2.GaussianBlur(image, (0, 0), 1) - cv2.GaussianBlur(image, (0, 0), 4) for image in (ours, theirs)]
    correlations = cv2.matchTemplate(fine[1], fine[0][margin:-margin, margin:-margin], cv2.TM_CCOEFF_NORMED)
    y, x = np.unravel_index(int(correlations.argmax()), correlations.shape)
    shift = (int(x) - margin, int(y) - margin)
    best, unshifted = float(correlations[y, x]), float(correlations[margin, margin])
    thumbnails = (cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA) for image in (ours, theirs))
    same_scene = best > _SAME_SCENE or _correlation(*thumbnails) > _SAME_SCENE
    if not same_scene:
        return "the images show different scenes"
    if max(map(abs, shift)) > _MAX_SHIFT and best - unshifted > _CLEARLY_BETTER:
        return f"the images are not aligned: the HR image is shifted by about {shift[0]}, {shift[1]} LR pixels (x, y)"
    return ""


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])
