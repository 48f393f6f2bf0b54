"""Pairs SR images with their ground truth by name, never by position. Pure functions over paths."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Endings that data sets and tools add to the name of an image: 001_LR4 and 001_HR, 0801_x4, photo_out.
_ENDING = re.compile(
    r"(?:[._-](?:lr|hr|sr|gt|hq|lq|out|output|rlt|result|restored|upscaled|pdd|(?:real)?esrgan|bsrgan|swinir)\d{0,2}"
    r"|[._-]x\d{1,2}|[._-]\d{1,2}x|(?<=\d)x\d)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pairing:
    """`pairs`: SR image → ground truth. `ambiguous`: SR image → its candidates, where there are several."""

    pairs: dict[Path, Path]
    unmatched: tuple[Path, ...]  # SR images without ground truth
    unused: tuple[Path, ...]  # ground truth without an SR image
    ambiguous: dict[Path, tuple[Path, ...]]


def pair(images: Sequence[Path], folder: Path, references: Sequence[Path], reference_folder: Path) -> Pairing:
    """Pair `images` below `folder` with `references` below `reference_folder`.

    Tried in turn, each for the images that the ones before it left: the same relative path, the same without the
    suffix, the same stem in any folder, the same stem without the endings of data sets and tools (_LR4, _x4, _out).
    A key that several of those images or several of all references share pairs nothing. Where the two folders have
    subfolders in common, an image in another subfolder is not looked for in one of a different name.
    """
    keys: tuple[Callable[[Path, Path], str], ...] = (
        lambda path, root: path.relative_to(root).as_posix(),
        lambda path, root: path.relative_to(root).with_suffix("").as_posix(),
        lambda path, root: _subfolder(path, root) + "/" + plain_stem(path),
        lambda path, root: path.stem,
        lambda path, root: plain_stem(path),
    )
    ours, theirs = ({_subfolder(path, root) for path in paths} - {"."}
                    for paths, root in ((images, folder), (references, reference_folder)))  # fmt: skip
    same_layout = bool(ours & theirs)
    pairs: dict[Path, Path] = {}
    used: set[Path] = set()
    ambiguous: dict[Path, tuple[Path, ...]] = {}
    for key in keys:
        left = [image for image in images if image not in pairs]
        named = _grouped(references, reference_folder, key)
        for name, alike in _grouped(left, folder, key).items():
            found = named.get(name, [])
            if len(alike) != 1 or len(found) > 1:
                ambiguous |= {image: tuple(found) for image in alike if found}
            elif found and found[0] not in used:
                places = {_subfolder(alike[0], folder), _subfolder(found[0], reference_folder)}
                if same_layout and len(places - {"."}) == 2:
                    continue
                pairs[alike[0]] = found[0]
                used.add(found[0])
    return Pairing(
        pairs,
        tuple(image for image in images if image not in pairs),
        tuple(reference for reference in references if reference not in used),
        {image: found for image, found in ambiguous.items() if image not in pairs},
    )


def plain_stem(path: Path) -> str:
    """The stem without the endings that data sets and tools add: `Canon_001_LR4` → `Canon_001`, `a_x4_out` → `a`."""
    stem = path.stem
    while (shorter := _ENDING.sub("", stem)) and shorter != stem:
        stem = shorter
    return stem


def _grouped(paths: Sequence[Path], root: Path, key: Callable[[Path, Path], str]) -> dict[str, list[Path]]:
    groups = defaultdict(list)
    for path in paths:
        # é may be one character or two; macOS uses two in file names.
        groups[unicodedata.normalize("NFC", key(path, root))].append(path)
    return groups


def _subfolder(path: Path, root: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(root).parent.as_posix())
