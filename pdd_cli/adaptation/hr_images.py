"""Selects the HR images of a run: a folder, an image set by name, or the real images themselves."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pdd_cli.errors import DownloadError, InputError
from pdd_cli.settings.adapt import OWN_HR, AdaptConfig, ImageSetName
from pdd_cli.weights.fetch import OnEvent
from pdd_cli.weights.fetch_images import install_set, installed_set
from pdd_cli.weights.image_sets import IMAGE_SETS, ImageSet, find_set
from pdd_cli.weights.store import Store

_FETCHED = "photos"  # without --hr-dir; pip's settings reach it where the weights could be installed
_OWN_IS_WORSE = (
    "HR images are made only from your own images, by downscaling; a folder of sharp photographs as --hr-dir gives a "
    "better result, above all for noisy images"
)
_NAMES = (*get_args(ImageSetName), OWN_HR)


@dataclass(frozen=True)
class HRChoice:
    """The HR images of a run. `folder` is None if they are made from the real images."""

    folder: Path | None
    to_fetch: ImageSet | None = None  # must be installed first; `folder` is where it will be
    optional: bool = False  # if it can't be fetched, HR images are made from the real images

    def fetch(
        self, store: Store, *, offline: bool, warn: Callable[[str], None], on_event: OnEvent = lambda event: None
    ) -> None:
        """Install the image set that is missing. Raises DownloadError, or warns if it is optional."""
        if self.to_fetch is None:
            return
        try:
            install_set(self.to_fetch, store=store, offline=offline, on_event=on_event)
        except DownloadError as error:
            if not self.optional:
                raise
            warn(f"{error.message}: {_OWN_IS_WORSE}")

    def fetched(self, store: Store) -> HRChoice:
        """The choice after `fetch`."""
        missing = self.to_fetch is not None and installed_set(self.to_fetch, store) is None
        return HRChoice(None if missing else self.folder)

    def apply(self, config: AdaptConfig) -> AdaptConfig:
        """`config` whose `hr_dir` is the folder, or None."""
        return config.model_copy(update={"hr_dir": self.folder})


def choose_hr(config: AdaptConfig, store: Store, warn: Callable[[str], None], say: Callable[[str], None]) -> HRChoice:
    """The HR images that `--hr-dir` means. An existing folder is preferred to an image set of that name.

    Without `--hr-dir` an installed image set is used, else one is to be fetched. `hr_dir: null` in a file means `own`,
    as in the run folders of version 0.2.0.

    Raises InputError for a folder that doesn't exist, with a similar name of an image set.
    """
    path = config.hr_dir
    if config.real_dir is None:
        if path is not None:
            warn(f"--hr-dir {path} is not used: without --real-dir the model is trained on the pairs alone")
        return HRChoice(None)
    if path is None:
        return HRChoice(None) if "hr_dir" in config.model_fields_set else _default(config, store, warn, say)
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


def _default(config: AdaptConfig, store: Store, warn: Callable[[str], None], say: Callable[[str], None]) -> HRChoice:
    for image_set in IMAGE_SETS:
        folder = installed_set(image_set, store)
        if folder is not None:
            say(f"HR images: the installed image set '{image_set.name}' (to use others: --hr-dir)")
            return HRChoice(folder)
    image_set = next(known for known in IMAGE_SETS if known.name == _FETCHED)
    if config.offline:
        warn(f"no image set is installed, and --offline is on: {_OWN_IS_WORSE}")
        return HRChoice(None)
    say(
        f"HR images: the image set {image_set} will be downloaded from the package index, because sharp photographs "
        f"in addition to your own images give a better result (to use others: --hr-dir FOLDER; to use none: --hr-dir "
        f"{OWN_HR})"
    )
    return HRChoice(store.images / image_set.name, image_set, optional=True)


def _meaning(name: str) -> str:
    return "HR images made from the real images" if name == OWN_HR else f"the image set {find_set(name)}"
