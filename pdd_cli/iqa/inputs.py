"""The inputs of an evaluation: sets of SR images, each image with its ground truth and LR input, paired by name."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdd_cli.errors import InputError
from pdd_cli.imaging.find import find_images
from pdd_cli.iqa.datasets import Dataset
from pdd_cli.iqa.metrics import Item
from pdd_cli.iqa.pairing import Pairing, pair
from pdd_cli.last_run import read_last_run


@dataclass(frozen=True)
class ImageSet:
    """The outputs of one model: `items` by the image's name, which is the same in every set."""

    name: str
    items: Mapping[str, Item]


@dataclass(frozen=True)
class Inputs:
    """`sets`: the evaluated set first, then the baselines. `problems` are failures; `notes` are information."""

    sets: tuple[ImageSet, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Partners:
    """The partner of each image, in another folder; `notes` and `problems` concern the images without one."""

    of: Mapping[Path, Path]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def gather(
    sr: Path | None,
    *,
    gt: Path | None = None,
    lr: Path | None = None,
    baselines: Sequence[Path] = (),
    dataset: Dataset | None = None,
) -> Inputs:
    """The images in `sr` (None: the outputs of the latest `pdd upscale`), each with its ground truth and LR image.

    `gt`, `lr`, `baselines`: folders, or single files where one image is scored. `dataset` gives both HR and LR.
    Raises InputError where a folder doesn't exist, holds no images, or holds no partner of any image in `sr`.
    """
    notes: list[str] = []
    problems: list[str] = list(dataset.problems) if dataset else []
    images, root, inputs = _images(sr, notes)
    partners: dict[str, _Partners] = {"gt": _Partners({}), "lr": _Partners(inputs)}
    if dataset is not None:
        partners["lr"] = _partners(images, root, list(dataset.lr), dataset.root, "LR image", f"--root {dataset.root}")
        if dataset.hr:
            originals = {image: dataset.hr.get(small) for image, small in partners["lr"].of.items()}
            partners["gt"] = _Partners({image: path for image, path in originals.items() if path})
    if gt is not None:
        partners["gt"] = _partners_in(images, root, gt, "ground truth", "--gt-dir")
    if lr is not None:
        partners["lr"] = _partners_in(images, root, lr, "LR image", "--lr-dir")
    names = {image: image.relative_to(root).as_posix() for image in images}
    mine = {
        names[image]: Item(image, partners["gt"].of.get(image), partners["lr"].of.get(image)) for image in images
    }  # fmt: skip
    sets = [ImageSet(_label(root if sr is None or sr.is_dir() else images[0]), mine)]
    for baseline in baselines:
        found = _partners_in(images, root, baseline, "image of the baseline", "--baseline")
        theirs = {name: Item(found.of[item.image], item.reference, item.lr) for name, item in mine.items()
                  if item.image in found.of}  # fmt: skip
        sets.append(ImageSet(_label(baseline), theirs))
        partners[f"baseline {baseline}"] = found
    for found in partners.values():
        notes += found.notes
        problems += found.problems
    return Inputs(_with_distinct_names(sets), tuple(notes), tuple(problems))


def upscaled_sets(dataset: Dataset, outputs: Mapping[str, Mapping[Path, Path]]) -> tuple[ImageSet, ...]:
    """One set for each model; `outputs` maps LR images of `dataset` to SR images, by model."""
    names = dataset.name_of
    return tuple(
        ImageSet(model, {names[lr]: Item(made[lr], dataset.hr.get(lr), lr) for lr in dataset.lr if lr in made})
        for model, made in outputs.items()
    )


def folders_as_dataset(lr: Path, gt: Path | None) -> Dataset:
    """A folder (or file) of LR images and one of HR images as a data set. Raises InputError as `gather` does."""
    images, root, _ = _images(lr, [])
    if gt is None:
        return Dataset(root, tuple(images), {})
    found = _partners_in(images, root, gt, "ground truth", "--gt-dir")
    return Dataset(root, tuple(images), dict(found.of), (*found.problems, *found.notes))


def _images(sr: Path | None, notes: list[str]) -> tuple[list[Path], Path, dict[Path, Path]]:
    """The images, the folder that their names are relative to, and their LR images where these are recorded."""
    if sr is None:
        latest = read_last_run()
        if latest is None:
            raise InputError(
                "nothing to score: no folder was given, and there is no earlier `pdd upscale`",
                "pdd evaluate SR_DIR",
            )
        made = {pair.sr: pair.lr for pair in latest.pairs if pair.sr.is_file()}
        if not made:
            raise InputError(
                f"the outputs of the latest `pdd upscale`, in {latest.output}, no longer exist", "pdd evaluate SR_DIR"
            )
        notes.append(f"scoring the outputs of the last `pdd upscale`: {latest.output}, weights {latest.weights}")
        root = Path(os.path.commonpath([str(image.parent) for image in made]))
        return list(made), root, {image: lr for image, lr in made.items() if lr.is_file()}
    if sr.is_file():
        return [sr], sr.parent, {}
    if not sr.exists():
        raise InputError(f"{sr}: no such file or folder")
    images = find_images(sr)
    if not images:
        raise InputError(f"{sr}: no images in it", "pdd reads PNG, JPEG, WebP, TIFF and BMP files.")
    return images, sr, {}


def _partners_in(images: Sequence[Path], root: Path, other: Path, kind: str, option: str) -> _Partners:
    """The partner of each image in the file or folder `other`; `kind` and `option` are for messages."""
    if not other.exists():
        raise InputError(f"{option} {other}: no such file or folder")
    if other.is_dir():
        return _partners(images, root, find_images(other), other, kind, f"{option} {other}")
    if len(images) != 1:
        raise InputError(
            f"{option} {other} is one file, but there are {len(images)} images to score", "Give a folder of images."
        )
    return _Partners({images[0]: other})


def _partners(
    images: Sequence[Path], root: Path, others: Sequence[Path], other_root: Path, kind: str, where: str
) -> _Partners:
    if not others:
        raise InputError(f"{where}: no images in it", "pdd reads PNG, JPEG, WebP, TIFF and BMP files.")
    found = pair(images, root, others, other_root)
    if not found.pairs:
        raise InputError(
            f"no image in {root} has the same name as an image in {where}",
            f"For example, {images[0].name} needs an image named {images[0].stem}.*",
        )
    problems = tuple(f"{image}: {_unpaired_reason(image, found, kind, other_root)}" for image in found.unmatched)
    notes = []
    moved = [
        f"{image.relative_to(root)} with {other.relative_to(other_root)}"
        for image, other in found.pairs.items()
        if image.relative_to(root).parent != other.relative_to(other_root).parent
    ]
    if moved:
        shown = ", ".join(moved[:3]) + (", …" if len(moved) > 3 else "")
        notes.append(f"{len(moved)} images are paired across subfolders, by names that occur only once: {shown}")
    if found.unused:
        shown = ", ".join(path.name for path in found.unused[:5]) + (", …" if len(found.unused) > 5 else "")
        notes.append(f"{len(found.unused)} of {len(others)} images in {where} have no counterpart to score: {shown}")
    return _Partners(found.pairs, tuple(notes), problems)


def _unpaired_reason(image: Path, found: Pairing, kind: str, folder: Path) -> str:
    several = [str(path) for path in found.ambiguous.get(image, ())]
    if several:
        return f"several in {folder} could be its {kind}: {', '.join(several)}"
    return f"no {kind} of that name in {folder}"


def _label(path: Path) -> str:
    return path.resolve().name or "images"


def _with_distinct_names(sets: Sequence[ImageSet]) -> tuple[ImageSet, ...]:
    """The same sets, renamed where several have one name."""
    named: dict[str, ImageSet] = {}
    for one in sets:
        names = (one.name if count == 1 else f"{one.name} ({count})" for count in itertools.count(1))
        name = next(name for name in names if name not in named)
        named[name] = ImageSet(name, one.items)
    return tuple(named.values())
