"""The LR and HR images of published data sets, paired by name, from the root folder of the set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pdd_cli.errors import InputError
from pdd_cli.imaging.find import find_images

DatasetName = Literal["realsr", "drealsr", "ntire20", "dped", "videolq"]


@dataclass(frozen=True)
class Dataset:
    """The LR images of a data set, and the HR image of each that has one; `problems` lists images without a partner."""

    root: Path
    lr: tuple[Path, ...]
    hr: dict[Path, Path]
    problems: tuple[str, ...] = ()

    @property
    def name_of(self) -> dict[Path, str]:
        """LR image → its path below the root."""
        return {path: path.relative_to(self.root).as_posix() for path in self.lr}


def find_dataset(name: DatasetName, root: Path) -> Dataset:
    """The test images of the x4 data set `name` below `root`, in the layout it is published in.

    realsr: Canon/Test/4/*_LR4.png beside *_HR.png, and Nikon likewise. drealsr: Test_x4/test_LR and test_HR, the names
    ending with _x1 or _x4. ntire20: Corrupted-va-x and DIV2K_valid_HR. dped: every image, no HR.
    videolq: one folder of frames a clip, no HR. Raises InputError where nothing is found.
    """
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder")
    match name:
        case "realsr":
            return _realsr(root)
        case "drealsr":
            lr, hr = _folder(root, "Test_x4/test_LR", name), _folder(root, "Test_x4/test_HR", name)
            return _paired(root, find_images(lr), find_images(hr), lambda path: re.sub(r"_x[14]$", "", path.stem))
        case "ntire20":
            lr, hr = _folder(root, "Corrupted-va-x", name), _folder(root, "DIV2K_valid_HR", name)
            return _paired(root, find_images(lr), find_images(hr), lambda path: path.stem)
        case "dped":
            images = find_images(root)
            if not images:
                raise InputError(f"--root {root}: no images in it")
            return Dataset(root, tuple(images), {})
        case "videolq":
            return _videolq(root)


def _realsr(root: Path) -> Dataset:
    folders = [folder for camera in ("Canon", "Nikon") for folder in sorted(root.rglob(f"{camera}/Test/4"))]
    if not folders:
        raise InputError(
            f"--root {root}: no Canon/Test/4 or Nikon/Test/4 below it", "Give the folder that RealSR was unpacked into."
        )
    images = [path for folder in folders for path in find_images(folder)]
    lr = [path for path in images if path.stem.endswith("_LR4")]
    hr = [path for path in images if path.stem.endswith("_HR")]
    found = _paired(root, lr, hr, lambda path: f"{path.parent}/{re.sub(r'_(LR4|HR)$', '', path.stem)}")
    others = [f"{path}: neither _LR4 nor _HR, left out" for path in images if path not in {*lr, *hr}]
    return Dataset(root, found.lr, found.hr, (*found.problems, *others))


def _videolq(root: Path) -> Dataset:
    images = find_images(root)
    # A folder that contains clips is not a clip itself.
    above = {root, *(parent for path in images for parent in path.parent.parents)}
    frames = [path for path in images if path.parent not in above]
    if not frames:
        raise InputError(f"--root {root}: no folders of frames in it (000/00000000.png, …)")
    outside = tuple(f"{path}: not in the folder of a clip, left out" for path in images if path.parent in above)
    clips: dict[Path, list[int]] = {}
    for path in frames:
        if path.stem.isdecimal():
            clips.setdefault(path.parent, []).append(int(path.stem))
    gaps = [
        f"{clip}: "
        + (f"frame {one + 1:08d} is" if other == one + 2 else f"frames {one + 1:08d} to {other - 1:08d} are")
        + " missing"
        for clip, numbers in clips.items()
        for one, other in pairwise(sorted(numbers))
        if other > one + 1
    ]
    return Dataset(root, tuple(frames), {}, (*outside, *gaps))


def _folder(root: Path, layout: str, name: str) -> Path:
    """The folder `layout` at any depth below `root`; `root` may also be the first folder of `layout`."""
    found = [folder for folder in sorted(root.rglob(layout)) if folder.is_dir()]
    if not found and root.name == layout.split("/")[0] and (root.parent / layout).is_dir():
        found = [root.parent / layout]
    if not found:
        raise InputError(f"--root {root}: {name} has a folder {layout}, which is missing")
    return found[0]


def _paired(root: Path, lr: Sequence[Path], hr: Sequence[Path], key: Callable[[Path], str]) -> Dataset:
    if not lr:
        raise InputError(f"--root {root}: no LR images where the data set keeps them")
    originals = {key(path): path for path in hr}
    pairs = {path: originals[key(path)] for path in lr if key(path) in originals}
    used = set(pairs.values())
    return Dataset(
        root,
        tuple(lr),
        pairs,
        (
            *(f"{path}: its HR image is missing" for path in lr if path not in pairs),
            *(f"{path}: its LR image is missing, left out" for path in hr if path not in used),
        ),
    )
