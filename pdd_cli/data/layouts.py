"""Recognises the LR and HR images of published data sets by the names of files and folders.

RealSR: Canon/Train/4/Canon_001_LR4.png and Canon_001_HR.png. DRealSR: Train_x4/train_LR, train_HR. NTIRE 2020:
Corrupted-tr-x, DIV2K_train_HR. DF2K: DIV2K_train_HR, DIV2K_train_LR_bicubic/X4. Others have folders LR and HR, or lq
and gt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import image_size
from pdd_cli.imaging.find import find_images

Side = Literal["LR", "HR"]
TrainingSet = Literal["realsr", "drealsr", "ntire20", "dped"]

_SIDES: dict[str, Side] = {"LR": "LR", "LQ": "LR", "HR": "HR", "HQ": "HR", "GT": "HR"}
_LABEL = re.compile(r"(?i)(?<![a-z])(LR|LQ|HR|HQ|GT)(?:x?(\d+))?(?![a-z\d])")
_SCALE = re.compile(r"(?i)(?<![a-z])x(\d+)(?![a-z\d])")
_SPLITS = (("test", r"test|testing|valid|validation|val|va"), ("train", r"train|training|tr"))
_SHOWN = 3


def training_images(name: TrainingSet, root: Path, scale: int) -> list[Path]:
    """The LR training images for `scale` of the data set `name` below `root`, in the layout it is published in.

    realsr: Canon/Train/4/*_LR4.png, and Nikon likewise. drealsr: Train_x4/train_LR. ntire20: Corrupted-tr-x. dped:
    training_data/iphone and other phones, without the camera of its ground truth.

    Raises InputError where nothing is found.
    """
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder", "Give the folder that the data set was unpacked into.")
    match name:
        case "realsr":
            layouts, ending = [f"{camera}/Train/{scale}" for camera in ("Canon", "Nikon")], f"_LR{scale}"
        case "drealsr":
            layouts, ending = [f"Train_x{scale}/train_LR"], ""
        case "ntire20":
            layouts, ending = ["Corrupted-tr-x"], ""
        case "dped":
            layouts, ending = [f"training_data/{phone}" for phone in ("iphone", "sony", "blackberry")], ""
    folders = [folder for layout in layouts for folder in sorted(root.rglob(layout)) if folder.is_dir()]
    found = [path for folder in folders for path in find_images(folder) if path.stem.endswith(ending)]
    if not found:
        raise InputError(
            f"--root {root}: no LR training images of {name} for x{scale} in it: expected {' or '.join(layouts)}",
            "Give the folder that the data set was unpacked into, or give the images as --real-dir DIR.",
        )
    return found


def select_images(
    paths: Sequence[Path], folder: Path, side: Side, scale: int, warn: Callable[[str], None]
) -> tuple[list[Path], list[str]]:
    """The images of `side` among `paths`, which are below `folder`, and a line for each kind of image left out.

    Images are left out only if they have a counterpart on the other side. `warn` is called for images whose names or
    sizes merely suggest the other side. Of LR images for several scales, those for `scale` are selected; of training
    and test images, those for training.
    """
    other: Side = "HR" if side == "LR" else "LR"
    labels = _labels(paths, folder)
    of_other = [path for path in paths if labels[path] == other]
    keys = {_key(path) for path in paths if labels[path] != other}
    left_out: list[str] = []
    kept = list(paths)
    if any(_key(path) in keys for path in of_other):
        kept = [path for path in paths if labels[path] != other]
        left_out.append(_line(of_other, folder, f"{other} images of a data set"))
    elif of_other:
        warn(
            f"{len(of_other)} of {len(paths)} images have names of {other} images ({_names(of_other, folder)}); "
            f"{side} images belong here"
        )
    if side == "LR" and any(labels[path] == "LR" for path in kept):
        scales = {path: _scale(path, folder) for path in kept}
        if scale in scales.values():
            others = [path for path in kept if scales[path] not in (scale, None)]
            if others:
                kept = [path for path in kept if path not in set(others)]
                left_out.append(_line(others, folder, f"LR images for a scale other than x{scale}"))
    splits = {path: _split(path, folder) for path in kept}
    if {"train", "test"} <= set(splits.values()):
        tests = [path for path in kept if splits[path] == "test"]
        kept = [path for path in kept if splits[path] != "test"]
        left_out.append(_line(tests, folder, "test images of a data set"))
    if side == "LR":
        enlarged = _enlarged(kept)
        if enlarged:
            warn(
                f"{len(enlarged)} of {len(kept)} images are exactly 2, 3, 4 or 8 times as large as another of the same "
                f"name ({_names(enlarged, folder)}): HR images do not belong here"
            )
    return kept, left_out


def _labels(paths: Sequence[Path], folder: Path) -> dict[Path, Side | None]:
    """The side of each image. An image without a label is the counterpart of the labelled images with the same key."""
    labels = {path: _label(path, folder) for path in paths}
    keys = {side: {_key(path) for path in paths if labels[path] == side} for side in ("LR", "HR")}
    for path in [path for path in paths if labels[path] is None]:
        in_lr, in_hr = (_key(path) in keys[side] for side in ("LR", "HR"))
        if in_lr != in_hr:
            labels[path] = "HR" if in_lr else "LR"
    return labels


def _label(path: Path, folder: Path) -> Side | None:
    """The side named by the file, else by the nearest folder."""
    for part in reversed(_names_of(path, folder)):
        found = _LABEL.findall(part)
        if found:
            return _SIDES[found[-1][0].upper()]
    return None


def _scale(path: Path, folder: Path) -> int | None:
    for part in reversed(_names_of(path, folder)):
        found = [scale for _, scale in _LABEL.findall(part) if scale] or _SCALE.findall(part)
        if found:
            return int(found[-1])
    return None


def _split(path: Path, folder: Path) -> str | None:
    """The split (train or test) named by the folders between `folder` and the image."""
    for name in reversed(path.relative_to(folder).parts[:-1]):
        for split, words in _SPLITS:
            if re.search(rf"(?i)(?<![a-z])({words})(?![a-z])", name):
                return split
    return None


def _names_of(path: Path, folder: Path) -> list[str]:
    """The name of `folder`, the names of the folders below it, and the name of the image without suffix."""
    *folders, name = path.relative_to(folder).parts
    return [folder.resolve().name, *folders, Path(name).stem]


def _key(path: Path) -> str:
    """The part of the name that an LR image and its HR image have in common."""
    stem = _SCALE.sub("", _LABEL.sub("", re.sub(r"(?i)(\d)(x\d+)$", r"\1_\2", path.stem)))
    return re.sub(r"[_.-]+", "_", stem).strip("_").lower()


def _enlarged(paths: Sequence[Path]) -> list[Path]:
    """Images whose size is exactly 2, 3, 4 or 8 times that of another image with the same key."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_key(path), []).append(path)
    found = []
    for group in groups.values():
        if len(group) == 1:
            continue
        sizes = {}
        for path in group:
            try:
                sizes[path] = image_size(path)
            except InputError:
                continue  # reported when it is read
        for path, (width, height) in sizes.items():
            if any((width, height) == (w * n, h * n) for w, h in sizes.values() for n in (2, 3, 4, 8)):
                found.append(path)
    return found


def _line(paths: Sequence[Path], folder: Path, kind: str) -> str:
    return f"{len(paths)} {kind} ({_names(paths, folder)})"


def _names(paths: Sequence[Path], folder: Path) -> str:
    shown = ", ".join(path.relative_to(folder).as_posix() for path in paths[:_SHOWN])
    return shown + (", …" if len(paths) > _SHOWN else "")
