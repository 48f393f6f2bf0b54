"""Reads the training images of a run: selects the usable images of each folder and reports the rest."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pdd_cli.adaptation.aligned_pairs import misaligned, without_partner, wrong_size
from pdd_cli.adaptation.clips import ClipFrames, clips_in, sample_clips
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.data.datasets import (
    RGB,
    AlignedPair,
    all_in_gray,
    as_gray,
    images_below,
    is_gray,
    lazy_images,
    read_images,
)
from pdd_cli.data.layouts import Side, select_images, training_images
from pdd_cli.errors import InputError, ResourceError
from pdd_cli.imaging.decode import image_size
from pdd_cli.imaging.find import find_images
from pdd_cli.imaging.provenance import made_by_pdd
from pdd_cli.iqa.pairing import pair
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.system import free_memory
from pdd_cli.upscaling.manifest import recorded

Callback = Callable[[str], None]

# Bytes of the decoded images of a folder, with their copies. Images of a larger folder are decoded when they are used.
# The limit doesn't depend on the machine, because the images of a step, and so the result, depend on it.
_LARGEST_IN_MEMORY = 3 << 29
_GRAY_CHECKED = 16


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
    frames: ClipFrames | None = None  # of videos; their files exist as long as this object


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a run, decoded or lazy. `hr` is empty if HR is to be made from the real images."""

    real: Sequence[RGB]  # empty if there are only pairs
    hr: Sequence[RGB]
    sources: list[Source]
    pairs: Sequence[AlignedPair] = ()

    @property
    def are_gray(self) -> bool:
        """Whether all LR images are gray; of many, a few are checked."""
        lr = self.real or [pair.lr for pair in self.pairs]
        indices = sorted({round(index * (len(lr) - 1) / _GRAY_CHECKED) for index in range(_GRAY_CHECKED + 1)})
        return all(is_gray(lr[index]) for index in indices)

    def in_gray(self) -> Images:
        """The images without colour."""
        pairs = [replace(pair, lr=as_gray(pair.lr), hr=as_gray(pair.hr)) for pair in self.pairs]
        return replace(self, real=all_in_gray(self.real), hr=all_in_gray(self.hr), pairs=pairs)


def read_sources(config: AdaptConfig, scale: int, warn: Callback, say: Callback) -> Images:
    """Read the images that `config` names. Those of a large folder are decoded when they are used.

    `warn` receives warnings, `say` progress messages.

    Raises InputError for a folder without a readable image or a usable pair, ResourceError if the images don't fit in
    memory.
    """
    real: Sequence[RGB] = []
    hr: Sequence[RGB] = []
    pairs: Sequence[AlignedPair] = []
    sources: list[Source] = []
    if config.pairs_lr is not None and config.pairs_hr is not None:
        pairs, sources = _read_pairs(config.pairs_lr, config.pairs_hr, config.crop, scale, warn, say)
    if config.real_dir is not None:
        selected = training_images(config.dataset, config.real_dir, scale) if config.dataset else None
        real, source = _read(config.real_dir, "LR", config.crop, scale, 1.0, warn, say, selected)
        sources.append(source)
    if config.hr_dir is not None:
        copies = sum(part**2 for part in config.synthetic.hr_scales)
        hr, source = _read(config.hr_dir, "HR", config.crop * scale, scale, copies, warn, say)
        sources.append(source)
    return Images(real, hr, sources, pairs)


def _read_pairs(
    lr_folder: Path, hr_folder: Path, crop: int, scale: int, warn: Callback, say: Callback
) -> tuple[list[AlignedPair], list[Source]]:
    """The pairs whose images have the same name, fitting sizes and the same content; the others are reported.

    Raises InputError if there is none.
    """
    left_out: list[str] = []
    usable: list[list[Path]] = []
    sides: tuple[tuple[str, Path, Side], ...] = (("--pairs-lr", lr_folder, "LR"), ("--pairs-hr", hr_folder, "HR"))
    for option, folder, side in sides:
        paths, of_pdd = _without_outputs(images_below(folder, option), folder)
        selected, of_other_kinds = select_images(paths, folder, side, scale, lambda text: None)
        left_out += [f"{option}: {line}" for line in of_pdd + of_other_kinds]
        usable.append(selected)
    pairing = pair(usable[0], lr_folder, usable[1], hr_folder)
    left_out += without_partner(pairing)
    sizes = _sizes([path for both in pairing.pairs.items() for path in both], left_out.append)
    fitting: dict[Path, Path] = {}
    for small, large in pairing.pairs.items():
        reason = wrong_size(sizes.get(small), sizes.get(large), scale)
        if not reason:
            fitting[small] = large
        elif small in sizes and large in sizes:
            left_out.append(f"{small} and {large}: {reason}")
    needed = sum(3 * math.prod(sizes[path]) for both in fitting.items() for path in both)
    _check_memory(needed, f"its {len(fitting)} pairs take", "--pairs-lr", lr_folder)
    say(f"reading the {len(fitting)} pairs of --pairs-lr {lr_folder} and --pairs-hr {hr_folder}")
    pairs: list[AlignedPair] = []
    contents: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for small, large in fitting.items():
        try:
            (lr,), of_lr = read_images([small], lr_folder, "--pairs-lr", left_out.append)
            (hr,), of_hr = read_images([large], hr_folder, "--pairs-hr", left_out.append)
        except InputError:  # the reason is in `left_out`
            continue
        if reason := misaligned(lr, hr):
            left_out.append(f"{small} and {large}: {reason}")
            continue
        pairs.append(AlignedPair(small.relative_to(lr_folder).as_posix(), lr, hr))
        contents[0].update(of_lr)
        contents[1].update(of_hr)
    if not pairs:
        raise InputError(
            f"--pairs-lr {lr_folder}: it has no usable pair with --pairs-hr {hr_folder}: {_first(left_out)}",
            "Names must be equal, or differ only in an ending such as _LR4 and _HR, and the HR image must show "
            f"the same, {scale} times as large.",
        )
    for reason in left_out:
        warn(f"pairs: left out: {reason}")
    sources = []
    for (option, folder, _), content, images, least in zip(
        sides, contents, ([one.lr for one in pairs], [one.hr for one in pairs]), (crop, crop * scale), strict=True
    ):
        by_size = sorted(((image.shape[1], image.shape[0]) for image in images), key=math.prod)
        small_images = sum(min(size) < least for size in by_size)
        lines = tuple(left_out) if option == "--pairs-lr" else ()
        sources.append(Source(option, folder, len(images), by_size[0], by_size[-1], small_images, lines, content))
    return pairs, sources


def _first(lines: Sequence[str]) -> str:
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _read(
    folder: Path,
    side: Side,
    crop: int,
    scale: int,
    copies: float,
    warn: Callback,
    say: Callback,
    selected: Sequence[Path] | None = None,
) -> tuple[Sequence[RGB], Source]:
    """The usable images of a folder, or the `selected` ones."""
    option = "--real-dir" if side == "LR" else "--hr-dir"
    clips: list[Path] = []
    if selected is None and side == "LR":
        clips = [clip for clip in clips_in(folder) if not made_by_pdd(clip)]
    if selected is None:
        selected = (find_images(folder) if folder.is_dir() else []) if clips else images_below(folder, option)
        paths, left_out = _without_outputs(selected, folder)
        paths, of_other_kinds = select_images(paths, folder, side, scale, lambda text: warn(f"{option}: {text}"))
        left_out += of_other_kinds
    else:
        paths, left_out = _without_outputs(selected, folder)
    frames = sample_clips(folder, clips, warn, say) if clips else None
    if frames is not None:
        paths += frames.paths
        if not paths:
            raise InputError(f"{option} {folder}: no frame with any detail in its videos", "Choose another folder.")
    if not paths:
        raise InputError(
            f"{option} {folder}: no usable image in it, only {'; '.join(left_out)}", "Choose another folder."
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
        warn(f"{small} of {len(images)} images of {option} are smaller than a crop of {crop} pixels: they are mirrored")
    sizes_used = (by_size[0], by_size[-1])
    return images, Source(option, folder, len(images), *sizes_used, small, tuple(left_out), content, frames)


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
            f"{option} {folder}: {subject} {needed / 2**30:.1f} GiB when decoded, {free / 2**30:.1f} GiB are free",
            "Use fewer or smaller images, for example only the most detailed part of each.",
        )
