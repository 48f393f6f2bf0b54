"""The use case of `pdd upscale IMAGE --compare A,B,…`: a part of one image by several versions, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pdd_cli.batch.loading import load_upscalers
from pdd_cli.batch.plan import check_collisions
from pdd_cli.errors import InputError
from pdd_cli.files import atomic_write
from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.encode import as_shown, write_images
from pdd_cli.imaging.image import Array, DecodedImage, ImageStream
from pdd_cli.imaging.provenance import Provenance, seal
from pdd_cli.observer import Observer
from pdd_cli.ranks import SINGLE_PROCESS
from pdd_cli.reporting.comparison import Panel, comparison_page, contact_sheet
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.upscaling.jobs import APPEARED, Job, check_own
from pdd_cli.upscaling.resizing import SizeRequest
from pdd_cli.upscaling.strength import split_strength
from pdd_cli.upscaling.upscaler import Upscaler
from pdd_cli.video.decode import is_video
from pdd_cli.weights.catalog import DENOISING
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.store import Store

RESAMPLED = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
"""Versions without a model."""

# Longest side of the part that is shown, in LR pixels.
_SHOWN = 192
# The part is chosen among this many places with the most detail, squares of this side, which all versions compute.
_PLACES, _PLACE = 6, 64


@dataclass(frozen=True)
class Box:
    """A part of an image, in its pixels."""

    x: int
    y: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.x}+{self.y}"

    def cut(self, image: Array) -> Array:
        return image[self.y : self.y + self.height, self.x : self.x + self.width]


@dataclass(frozen=True, eq=False)
class VersionResult:
    """One version: its (H, W, 3) uint8 `pixels` of the part, the seconds for them, and those for the whole image."""

    name: str
    strength: float | None  # None: without a model
    pixels: Array
    seconds: float
    whole_seconds: float

    @property
    def label(self) -> str:
        """The name, with the strength unless it is 1."""
        name = _split(self.name)[0]
        return name if self.strength in (None, 1) else f"{name} at strength {self.strength:g}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The versions of the part `crop` of the image `source`, and the files that show them."""

    source: Path
    crop: Box
    scale: float
    versions: Sequence[VersionResult]
    page: Path
    sheet: Path

    def as_document(self) -> dict[str, object]:
        """The result as `pdd upscale --compare --json` prints it."""
        return {
            "input": self.source,
            "crop": str(self.crop),
            "scale": round(self.scale, 4),
            "page": self.page,
            "sheet": self.sheet,
            "versions": [
                {
                    "name": version.name,
                    "strength": version.strength,
                    "seconds": round(version.seconds, 3),
                    "seconds_whole_image": round(version.whole_seconds, 3),
                }
                for version in self.versions
            ],
        }


def compare_versions(
    settings: UpscaleConfig,
    names: Sequence[str],
    *,
    page: Path,
    crop: str | None = None,
    observer: Observer = Observer(),
) -> Comparison:
    """Upscale a part of one image by each of `names`, and write a page and a contact sheet (PNG) that show them.

    Args:
        settings: The settings of `pdd upscale`; its weights and strength are those of each version.
        names: NAME, FILE, hf:…, each also with @STRENGTH; bicubic, lanczos or nearest.
        page: The page, a `.html` file. The sheet has the same name with `.png`.
        crop: The part as "WxH+X+Y"; by default, among the most detailed places, the one where the versions differ most.
        observer: Receives messages.

    Raises:
        InputError: bad names, input, crop or output; nothing is written.
        DownloadError: weights can't be fetched.
    """
    source = _the_image(settings.input)
    sheet = _check_output(page, source)
    for name in names:
        _split(name)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"--compare {','.join(names)}: at least two different versions are needed",
            f"For example: --compare realesrgan,{'bicubic' if names[0] != 'bicubic' else 'lanczos'}",
        )
    picture = read_image(source)
    given = None if crop is None else _parse_crop(crop, picture)
    with observer.fetching() as on_event:
        for weights, _ in map(_split, names):
            if weights not in RESAMPLED:
                ensure(weights, store=Store.default(), offline=settings.offline, on_event=on_event)
    with ExitStack() as opened:
        models: dict[str, tuple[Upscaler, float]] = {}
        for name in names:
            weights, strength = _split(name)
            if weights not in RESAMPLED:
                # A part of a texture doesn't repeat.
                denoise = settings.denoise if weights in DENOISING else None
                own = settings.model_copy(
                    update={"weights": weights, "strength": strength, "denoise": denoise, "seamless": "none"}
                )
                loaded = opened.enter_context(load_upscalers(own, SINGLE_PROCESS, observer, dry_run=False))
                models[name] = (loaded.upscalers[0], loaded.strength)
        scale = _scale(settings, picture, [upscaler for upscaler, _ in models.values()])
        for upscaler, _ in models.values():
            upscaler.size = SizeRequest(scale=scale)
        upscale = partial(_upscale, scale=scale, models=models, overlap=settings.overlap)
        box = given or _most_different(picture, names, upscale)
        versions = []
        with observer.progress("versions", len(names)) as progress:
            for name in names:
                progress.start(0, name)
                started = time.perf_counter()
                pixels, computed = upscale(name, picture, box)
                seconds = time.perf_counter() - started
                whole = seconds * picture.width * picture.height / computed
                versions.append(
                    VersionResult(name, models[name][1] if name in models else None, pixels, seconds, whole)
                )
                progress.advance()
    result = Comparison(source, box, scale, versions, page, sheet)
    _write(result)
    return result


def _the_image(inputs: Sequence[Path]) -> Path:
    if len(inputs) != 1:
        raise InputError(f"--compare shows one image, not {len(inputs)} inputs", "Choose one of them.")
    (source,) = inputs
    if source.is_dir():
        raise InputError(f"--compare shows one image, and {source} is a folder", "Choose one of the images in it.")
    if is_video(source):
        raise InputError(f"--compare shows one image, and {source} is a video", "Give an image, such as one frame.")
    if not source.exists():
        raise InputError(f"{source}: no such file")
    return source


def _check_output(page: Path, source: Path) -> Path:
    """The contact sheet beside `page`. Raises InputError if one of them would replace a file that pdd didn't make."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output {page}: not an HTML page", "The name must end in .html.")
    sheet = page.with_suffix(".png")
    check_collisions([Job(source, page), Job(source, sheet)], hint="Name another --output.")
    for path in (page, sheet):
        check_own(path, "Move it away, or name another --output.")
    return sheet


def _split(name: str) -> tuple[str, float | None]:
    """The weights and the strength of a version. Raises InputError for a strength that is none."""
    weights, strength = split_strength(name)
    if strength is not None and weights in RESAMPLED:
        raise InputError(f"--compare {name}: {weights} has no strength", f"Write {weights}.")
    return weights, strength


def _parse_crop(text: str, picture: DecodedImage) -> Box:
    size, x, y = text.split("+")
    width, height = size.split("x")
    box = Box(int(x), int(y), int(width), int(height))
    if box.x + box.width > picture.width or box.y + box.height > picture.height:
        raise InputError(f"--crop {text} is not inside the image, which is {picture.width}x{picture.height} pixels")
    return box


def _scale(settings: UpscaleConfig, picture: DecodedImage, upscalers: Sequence[Upscaler]) -> float:
    """The scale of all versions: that of the settings, else the largest of the models."""
    native = max((upscaler.scale for upscaler in upscalers), default=4)
    size = upscalers[0].size if upscalers else SizeRequest(scale=settings.scale)
    return size.size_of(picture.width, picture.height, native)[0] / picture.width


def _upscale(
    name: str,
    picture: DecodedImage,
    box: Box,
    *,
    scale: float,
    models: dict[str, tuple[Upscaler, float]],
    overlap: int,
) -> tuple[Array, int]:
    """The version `name` of a part, (H, W, 3) uint8, and the number of LR pixels that were computed for it.

    The model also sees `overlap` pixels around the part, as around a tile.
    """
    x, y = max(box.x - overlap, 0), max(box.y - overlap, 0)
    around = Box(
        x, y, min(box.x + box.width + overlap, picture.width) - x, min(box.y + box.height + overlap, picture.height) - y
    )
    alpha = None if picture.alpha is None else np.ascontiguousarray(around.cut(picture.alpha))
    part = replace(picture, pixels=np.ascontiguousarray(around.cut(picture.pixels)), alpha=alpha)
    if name in models:
        pixels = as_shown(models[name][0].upscale(part).picture)
    else:
        size = SizeRequest(scale=scale).size_of(around.width, around.height, 1)
        pixels = np.asarray(Image.fromarray(as_shown(part)).resize(size, RESAMPLED[_split(name)[0]]))
    inside = Box(*(round(value * scale) for value in (box.x - x, box.y - y, box.width, box.height)))
    return np.ascontiguousarray(inside.cut(pixels)), around.width * around.height


def _most_different(picture: DecodedImage, names: Sequence[str], upscale: partial[tuple[Array, int]]) -> Box:
    """Among the places with the most detail, the surroundings of the one where the versions differ most."""
    width, height = min(_SHOWN, picture.width), min(_SHOWN, picture.height)
    if (width, height) == (picture.width, picture.height):
        return Box(0, 0, width, height)

    def difference(place: Box) -> float:
        versions = np.stack([upscale(name, picture, place)[0] for name in names]).astype(np.float32)
        return float(versions.std(axis=0).mean())

    place = max(_detailed_places(picture), key=difference)
    x = min(max(place.x + (place.width - width) // 2, 0), picture.width - width)
    y = min(max(place.y + (place.height - height) // 2, 0), picture.height - height)
    return Box(x, y, width, height)


def _detailed_places(picture: DecodedImage) -> list[Box]:
    """Squares of a grid over `picture`, those with the largest mean gradient."""
    gray = picture.to_float().mean(axis=2)
    if picture.alpha is not None:
        gray = gray * (picture.alpha > 0)
    detail = np.abs(np.diff(gray, axis=0, append=gray[-1:])) + np.abs(np.diff(gray, axis=1, append=gray[:, -1:]))
    width, height = min(_PLACE, picture.width), min(_PLACE, picture.height)
    places = [
        Box(x, y, width, height)
        for y in range(0, picture.height - height + 1, height)
        for x in range(0, picture.width - width + 1, width)
    ]
    return sorted(places, key=lambda place: float(place.cut(detail).mean()), reverse=True)[:_PLACES]


def _write(result: Comparison) -> None:
    panels = [
        Panel(version.label, version.pixels, version.seconds, version.whole_seconds) for version in result.versions
    ]
    names = ", ".join(version.name for version in result.versions)
    made = Provenance(names, "", f"comparison of {result.crop}", file_sha256(result.source))
    sheet = DecodedImage(contact_sheet(f"{result.source.name}, {result.crop}", panels))
    write_images(
        result.sheet,
        [ImageStream(sheet.spec, [sheet.pixels])],
        provenance=made,
        before_rename=lambda temporary: check_own(result.sheet, APPEARED),
    )
    with atomic_write(result.page, lambda temporary: check_own(result.page, APPEARED)) as temporary:
        temporary.write_text(
            comparison_page(result.source.name, str(result.crop), panels, made), encoding="utf-8", errors="replace"
        )
        seal(temporary)
