"""The images that a run is given: which of a folder's are used, and what there is to say of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.data.datasets import RGB, images_below, read_images
from pdd_cli.data.layouts import Side, select_images
from pdd_cli.errors import InputError, ResourceError
from pdd_cli.imaging.decode import image_size
from pdd_cli.imaging.provenance import made_by_pdd
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.system import free_memory
from pdd_cli.upscaling.manifest import recorded

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What a folder of images gave. Sizes are width, height in pixels."""

    option: str
    folder: Path
    used: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    small: int  # how many are smaller than a crop
    left_out: tuple[str, ...]  # which, and why
    content: Mapping[str, str]  # the used images below the folder, and their sha256


@dataclass(frozen=True, eq=False)
class Images:
    """The decoded images of a run; no `hr` where they are to be made of the real ones."""

    real: list[RGB]
    hr: list[RGB]
    sources: list[Source]


def read_sources(config: AdaptConfig, scale: int, notify: Notify, say: Notify) -> Images:
    """Decode the images that `config` names. `notify` is given warnings, `say` what is being done.

    Raises InputError for a folder without a readable image, ResourceError where the memory can't hold them.
    """
    if config.hr_dir is None:
        notify(
            "no --hr-dir given: the synthetic domain's HR is made from your own images by downscaling; "
            "a folder of sharp photographs as --hr-dir gives better results"
        )
    real, of_real = _read(config.real_dir, "LR", config.crop, scale, 1.0, notify, say)
    if config.hr_dir is None:
        return Images(real, [], [of_real])
    copies = sum(part**2 for part in config.synthetic.hr_scales)
    hr, of_hr = _read(config.hr_dir, "HR", config.crop * scale, scale, copies, notify, say)
    return Images(real, hr, [of_real, of_hr])


def _read(
    folder: Path, side: Side, crop: int, scale: int, copies: float, notify: Notify, say: Notify
) -> tuple[list[RGB], Source]:
    option = "--real-dir" if side == "LR" else "--hr-dir"
    paths = images_below(folder, option)
    paths, of_pdd = _without_own(paths, folder)
    paths, of_other_kinds = select_images(paths, folder, side, scale, lambda text: notify(f"{option}: {text}"))
    left_out = of_pdd + of_other_kinds
    if not paths:
        raise InputError(
            f"{option} {folder}: no image to use in it, only {'; '.join(left_out)}", "Name another folder."
        )
    _check_memory(paths, option, folder, copies)
    say(f"reading the {len(paths)} images of {option} {folder}")
    images, content = read_images(paths, folder, option, left_out.append)
    for reason in left_out:
        notify(f"{option}: left out: {reason}")
    by_size = sorted(((image.shape[1], image.shape[0]) for image in images), key=math.prod)
    small = sum(min(size) < crop for size in by_size)
    if small:
        notify(f"{small} of {len(images)} images of {option} are smaller than a crop of {crop} pixels: mirrored")
    return images, Source(option, folder, len(images), by_size[0], by_size[-1], small, tuple(left_out), content)


def _without_own(paths: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """`paths` without what pdd has made: the pictures in run folders, and upscaled images."""
    holds_run = functools.cache(lambda parent: RunFolder(parent).holds_run)
    outputs = functools.cache(recorded)
    of_runs = {path for path in paths if any(holds_run(parent) for parent in path.parents)}
    upscaled = {
        path
        for path in paths
        if path not in of_runs and (any(path in outputs(parent) for parent in path.parents) or made_by_pdd(path))
    }
    kinds = ((of_runs, "in run folders of pdd"), (upscaled, "that pdd has upscaled"))
    left_out = [f"{len(found)} images {kind}" for found, kind in kinds if found]
    return [path for path in paths if path not in of_runs | upscaled], left_out


def _check_memory(paths: Sequence[Path], option: str, folder: Path, copies: float) -> None:
    """Raise ResourceError where the decoded images, `copies` times as large as the files' own, can't be held."""
    needed = 0.0
    for path in paths:
        try:
            width, height = image_size(path)
        except InputError:
            continue  # said where it is decoded
        needed += 3 * width * height * copies
    free = free_memory()
    if needed > free:
        raise ResourceError(
            f"{option} {folder}: its {len(paths)} images take {needed / 2**30:.1f} GiB of memory decoded, "
            f"{free / 2**30:.1f} GiB are free",
            "Use fewer of them, or smaller ones: cut out of each what has most detail.",
        )
