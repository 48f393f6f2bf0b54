"""Reads the training images of a run: selects the usable images of each folder and reports the rest."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.data.datasets import RGB, images_below, lazy_images, read_images
from pdd_cli.data.layouts import Side, select_images
from pdd_cli.errors import InputError, ResourceError
from pdd_cli.imaging.decode import image_size
from pdd_cli.imaging.provenance import made_by_pdd
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.system import free_memory
from pdd_cli.upscaling.manifest import recorded

Callback = Callable[[str], None]

# Bytes of the decoded images of a folder, with their copies. Images of a larger folder are decoded when they are used.
# The limit doesn't depend on the machine, because the images of a step, and so the result, depend on it.
_LARGEST_IN_MEMORY = 3 << 29


@dataclass(frozen=True)
class Source:
    """A summary of one folder of images. Sizes are (width, height) in pixels."""

    option: str
    folder: Path
    used: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    small: int  # number of images smaller than a crop
    left_out: tuple[str, ...]  # a line for each image or kind of image that is not used
    content: Mapping[str, str]  # relative path → sha256 of the used images


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a run, decoded or lazy. `hr` is empty if HR is to be made from the real images."""

    real: Sequence[RGB]
    hr: Sequence[RGB]
    sources: list[Source]


def read_sources(config: AdaptConfig, scale: int, warn: Callback, say: Callback) -> Images:
    """Read the images that `config` names. Those of a large folder are decoded when they are used.

    `warn` receives warnings, `say` progress messages.

    Raises InputError for a folder without a readable image, ResourceError if the images don't fit in memory.
    """
    real, of_real = _read(config.real_dir, "LR", config.crop, scale, 1.0, warn, say)
    if config.hr_dir is None:
        return Images(real, [], [of_real])
    copies = sum(part**2 for part in config.synthetic.hr_scales)
    hr, of_hr = _read(config.hr_dir, "HR", config.crop * scale, scale, copies, warn, say)
    return Images(real, hr, [of_real, of_hr])


def _read(
    folder: Path, side: Side, crop: int, scale: int, copies: float, warn: Callback, say: Callback
) -> tuple[Sequence[RGB], Source]:
    option = "--real-dir" if side == "LR" else "--hr-dir"
    paths = images_below(folder, option)
    paths, of_pdd = _without_outputs(paths, folder)
    paths, of_other_kinds = select_images(paths, folder, side, scale, lambda text: warn(f"{option}: {text}"))
    left_out = of_pdd + of_other_kinds
    if not paths:
        raise InputError(
            f"{option} {folder}: no usable image in it, only {'; '.join(left_out)}", "Name another folder."
        )
    unreadable: list[str] = []
    headers = _sizes(paths, unreadable.append)
    needed = sum(3 * width * height * copies for width, height in headers.values())
    images: Sequence[RGB]
    if needed <= _LARGEST_IN_MEMORY:
        _check_memory(needed, f"its {len(paths)} images take", option, folder)
        say(f"reading the {len(paths)} images of {option} {folder}")
        images, content = read_images(paths, folder, option, left_out.append)
        sizes = [(image.shape[1], image.shape[0]) for image in images]
    else:
        say(
            f"checking the {len(paths)} images of {option} {folder}: they take {needed / 2**30:.1f} GiB decoded, "
            "so they are decoded when they are used"
        )
        images, content = lazy_images(headers, folder, lambda text: warn(f"{option}: {text}; another image is used"))
        window = images.derive(lambda image: [image], copies)
        _check_memory(window.window_bytes, "the images of a step take", option, folder)
        sizes = list(headers.values())
        left_out += unreadable
    for reason in left_out:
        warn(f"{option}: left out: {reason}")
    by_size = sorted(sizes, key=math.prod)
    small = sum(min(size) < crop for size in by_size)
    if small:
        warn(f"{small} of {len(images)} images of {option} are smaller than a crop of {crop} pixels: mirrored")
    return images, Source(option, folder, len(images), by_size[0], by_size[-1], small, tuple(left_out), content)


def _without_outputs(paths: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """`paths` without outputs of pdd, which are upscaled images and the images in run folders."""
    holds_run = functools.cache(lambda parent: RunFolder(parent).holds_run)
    outputs = functools.cache(recorded)
    of_runs = {path for path in paths if any(holds_run(parent) for parent in path.parents)}
    upscaled = {
        path
        for path in paths
        if path not in of_runs and (any(path in outputs(parent) for parent in path.parents) or made_by_pdd(path))
    }
    kinds = ((of_runs, "in run folders of pdd"), (upscaled, "that are outputs of pdd"))
    left_out = [f"{len(found)} images {kind}" for found, kind in kinds if found]
    return [path for path in paths if path not in of_runs | upscaled], left_out


def _sizes(paths: Sequence[Path], on_unreadable: Callback) -> dict[Path, tuple[int, int]]:
    """(width, height) of the images, from their headers."""
    sizes = {}
    for path in paths:
        try:
            sizes[path] = image_size(path)
        except InputError as error:
            on_unreadable(error.message)
    return sizes


def _check_memory(needed: float, subject: str, option: str, folder: Path) -> None:
    """Raise ResourceError if `needed` bytes of decoded images, described by `subject`, don't fit in memory."""
    free = free_memory()
    if needed > free:
        raise ResourceError(
            f"{option} {folder}: {subject} {needed / 2**30:.1f} GiB of memory decoded, {free / 2**30:.1f} GiB are free",
            "Use fewer or smaller images, such as the most detailed part of each.",
        )
