"""Training crops of both domains: real LR, and synthetic LR with its HR."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdd_cli.data.degradations import Degradation, downsample
from pdd_cli.data.lazy_images import ImageFile, LazyImages
from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import decode_pages, read_bytes
from pdd_cli.imaging.find import find_images
from pdd_cli.weights.sources import file_sha256

RGB = NDArray[np.uint8]  # (H, W, 3)
_GRAY_TOLERANCE = 3  # 8-bit levels; JPEG files of gray images in colour


@dataclass(frozen=True, eq=False)
class Batch:
    """The crops of one step, fp32 in 0..1. Elements with the same index belong together.

    With a teacher there are only `lr_t` and `sr_t`; `lr_s` and `hr_s` are empty.
    """

    lr_s: Tensor  # (N, 3, crop, crop): LR with ground truth, synthetic or from aligned pairs
    hr_s: Tensor  # (N, 3, crop*scale, crop*scale): its HR
    lr_t: Tensor | None  # (N, 3, crop, crop): target (real) LR; None if there are only pairs
    sr_t: Tensor | None = None  # (N, 3, crop*scale, crop*scale): the teacher's SR of lr_t

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, in channels-last memory format."""

        def moved(crops: Tensor) -> Tensor:
            return crops.to(device, memory_format=torch.channels_last)

        lr_t, sr_t = (None if crops is None else moved(crops) for crops in (self.lr_t, self.sr_t))
        return Batch(moved(self.lr_s), moved(self.hr_s), lr_t, sr_t)


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """A real LR image (h, w, 3) and its ground truth (h*scale, w*scale, 3), which show the same at every pixel."""

    name: str
    lr: RGB
    hr: RGB


@dataclass(frozen=True, eq=False)
class CropSampler:
    """Draws the batches of crops from the images of both domains."""

    real: Sequence[RGB]  # LR
    hr: Sequence[RGB]
    crop: int  # LR pixels
    scale: int
    degradation: Degradation
    seed: int
    candidates: int = 1  # number of random crops that are tried until …
    min_texture: float = math.inf  # … one has this much texture; if none has, the one with the most is used
    own_hr: Sequence[RGB] = ()  # HR made from the real images, from which …
    own_share: float = 0.0  # … this fraction of the synthetic crops is drawn
    pairs: Sequence[AlignedPair] = ()  # from which …
    pairs_share: float = 0.0  # … this fraction of the crops with ground truth is drawn

    @property
    def lr_images(self) -> Sequence[RGB]:
        """The LR images of the domain that is adapted to: the real ones or, without these, those of the pairs."""
        return self.real or [pair.lr for pair in self.pairs]

    def batch(self, step: int, size: int, first: int = 0) -> Batch:
        """The crops with ground truth and the real crops of `step`, `size` each, from element `first` on.

        An element depends only on the seed, the step and its index. So a resumed run sees the same crops as an
        uninterrupted one, and several processes together see the same crops as one process.
        """
        hr, own, real = (self._drawn_from(images, step) for images in (self.hr, self.own_hr, self.real))
        rngs = [np.random.default_rng((self.seed, step, first + number)) for number in range(size)]

        def with_ground_truth(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
            if self.pairs and (self.pairs_share == 1 or rng.random() < self.pairs_share):
                return self._crop_pair(rng)
            chosen = own if self.own_share and rng.random() < self.own_share else hr
            hr_s = stack([self._crop(chosen, self.crop * self.scale, rng)])
            return self.degradation.apply(hr_s, self.scale, rng), hr_s

        lr_s, hr_s = (torch.cat(parts) for parts in zip(*map(with_ground_truth, rngs), strict=True))
        lr_t = stack([self._crop(real, self.crop, rng) for rng in rngs]) if len(real) else None
        return Batch(lr_s, hr_s, lr_t)

    def real_crop(self, number: int, size: int, candidates: int) -> RGB:
        """Crop `number` of a random sequence of real crops: the first of `candidates` with some texture."""
        rng = np.random.default_rng((self.seed, number, size, candidates))
        return replace(self, candidates=candidates)._crop(self._drawn_from(self.real, number), size, rng)

    def synthetic_crop(self, number: int, size: int, candidates: int) -> RGB:
        """Crop `number` of a random sequence of LR crops made from the HR images, otherwise as `real_crop`."""
        rng = np.random.default_rng((self.seed, number, size, candidates, 1))
        hr = replace(self, candidates=candidates)._crop(self._drawn_from(self.hr, number), size * self.scale, rng)
        lr = self.degradation.apply(stack([hr]), self.scale, rng)[0].permute(1, 2, 0)
        return np.ascontiguousarray((lr.numpy() * 255).round().astype(np.uint8))

    def digest(self) -> str:
        """A checksum of the sizes and of every 16th row of all images; of lazy images, of their files."""
        digest = hashlib.sha256()
        for images in (self.real, self.hr, self.own_hr):
            if isinstance(images, LazyImages):
                digest.update(images.facts.encode())
                continue
            for image in images:
                digest.update(repr(image.shape).encode() + np.ascontiguousarray(image[::16]).tobytes())
        for image in (side for pair in self.pairs for side in (pair.lr, pair.hr)):
            digest.update(repr(image.shape).encode() + np.ascontiguousarray(image[::16]).tobytes())
        return digest.hexdigest()

    def _drawn_from(self, images: Sequence[RGB], step: int) -> Sequence[RGB]:
        """The decoded images from which the crops of `step` are drawn."""
        return images.window(self.seed, step) if isinstance(images, LazyImages) else images

    def _crop(self, images: Sequence[RGB], size: int, rng: np.random.Generator) -> RGB:
        """A random crop with some texture, because nothing is learnt from sky, walls and blur.

        It is not the most textured crop of all, which would always come from the same few images.
        """
        best = _random_crop(images, size, rng)
        for _ in range(self.candidates - 1):
            if texture(best) >= self.min_texture:
                break
            best = max(best, _random_crop(images, size, rng), key=texture)
        return best

    def _crop_pair(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Aligned crops of a pair, LR and HR, with some texture in the HR crop."""

        def draw() -> tuple[RGB, RGB]:
            pair = self.pairs[int(rng.integers(len(self.pairs)))]
            place = _Place.draw(pair.lr.shape[:2], self.crop, rng)
            return place.cut(pair.lr, self.crop), place.cut(pair.hr, self.crop, self.scale)

        best = draw()
        for _ in range(self.candidates - 1):
            if texture(best[1]) >= self.min_texture:
                break
            best = max(best, draw(), key=lambda crops: texture(crops[1]))
        lr, hr = best
        return stack([lr]), stack([hr])


def images_below(folder: Path, option: str) -> list[Path]:
    """The image files below `folder`. Raises InputError naming `option` if there is no such folder or no image."""
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: no such folder", "Give a folder of images; it is searched recursively.")
    found = find_images(folder)
    if not found:
        raise InputError(f"{option} {folder}: no images in it", "Give a folder of PNG, JPEG, WebP, TIFF or BMP.")
    return found


def read_folder(folder: Path, option: str, on_unreadable: Callable[[str], None]) -> list[RGB]:
    """All images below `folder` as 8-bit RGB. Unreadable images are reported to `on_unreadable` and skipped.

    Raises InputError naming `option` if the folder doesn't exist or no image in it can be read.
    """
    return read_images(images_below(folder, option), folder, option, on_unreadable)[0]


def read_images(
    paths: Sequence[Path], folder: Path, option: str, on_unreadable: Callable[[str], None]
) -> tuple[list[RGB], dict[str, str]]:
    """The images at `paths`, which are below `folder` or frames of videos, as in `read_folder`.

    Also their sha256 by relative path.
    """
    found: list[RGB] = []
    content: dict[str, str] = {}
    for path in paths:
        try:
            data = read_bytes(path)
            found.append(_decode(path, data))
            content[_relative_name(path, folder)] = hashlib.sha256(data).hexdigest()
        except InputError as error:
            on_unreadable(error.message)
    if not found:
        raise InputError(
            f"{option} {folder}: no readable image in it", "Give a folder of PNG, JPEG, WebP, TIFF or BMP."
        )
    return found, content


def lazy_images(
    sizes: Mapping[Path, tuple[int, int]], folder: Path, report: Callable[[str], None]
) -> tuple[LazyImages, dict[str, str]]:
    """The images at the paths in `sizes` (width, height), which are below `folder`, without decoding them.

    Images that can't be decoded later are reported to `report`. The second value is their sha256 by relative path.
    """
    files = [ImageFile(path, size, file_sha256(path)) for path, size in sizes.items()]
    content = {_relative_name(file.path, folder): file.sha256 for file in files}
    return LazyImages(files, lambda path: _decode(path, read_bytes(path)), report), content


def _relative_name(path: Path, folder: Path) -> str:
    """The name of an image: relative to `folder`, or the last two parts for a frame of a video, which is elsewhere."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else "/".join(path.parts[-2:])


def _decode(path: Path, data: bytes) -> RGB:
    """The first page of the image file with the content `data`."""
    return next(decode_pages(path, data)).to_rgb8()


def select(images: Sequence[RGB], indices: Iterable[int]) -> Sequence[RGB]:
    """The images with these indices; lazy images stay lazy."""
    return images.select(indices) if isinstance(images, LazyImages) else [images[index] for index in indices]


def texture(crop: RGB) -> float:
    """The amount of fine detail: the standard deviation of the Laplacian, in 8-bit levels."""
    return float(laplacian(crop).std())


def laplacian(image: RGB) -> NDArray[np.float32]:
    """The Laplacian of the luminance in 8-bit levels: (H, W, 3) to (H, W)."""
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.asarray(cv2.Laplacian(gray, cv2.CV_32F))


def as_gray(image: RGB) -> RGB:
    """The luma of `image` in all three channels."""
    return np.repeat(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)


def all_in_gray(images: Sequence[RGB]) -> Sequence[RGB]:
    """`as_gray` of each image; lazy images stay lazy."""
    if isinstance(images, LazyImages):
        return images.derive(lambda image: [as_gray(image)], 1.0)
    return [as_gray(image) for image in images]


def is_gray(image: RGB) -> bool:
    """Whether the channels of `image` are equal, but for rounding."""
    first = image[..., :1].astype(np.int16)
    return bool((np.abs(image - first) <= _GRAY_TOLERANCE).all())


def downscaled(images: Sequence[RGB], scales: Sequence[float], min_side: int) -> Sequence[RGB]:
    """Each image at each of `scales` (1 and below) at which its shorter side has at least `min_side` pixels.

    Photographs are seldom sharp at the pixel level; downscaled ones are.
    """

    def of(image: RGB) -> list[RGB]:
        return [_resize(image, scale) for scale in scales if scale == 1 or min(image.shape[:2]) * scale >= min_side]

    if isinstance(images, LazyImages):
        return images.derive(of, sum(scale**2 for scale in scales))
    return [result for image in images for result in of(image)]


def _resize(image: RGB, scale: float) -> RGB:
    if scale == 1:
        return image
    height, width = (round(side * scale) for side in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def hr_from_real(real: Sequence[RGB], crop: int) -> Sequence[RGB]:
    """Clean HR images made from the real LR images by downscaling, which removes their noise and blur.

    The factor is 2, or less for an image that would become smaller than `crop` pixels.
    """

    def of(image: RGB) -> RGB:
        factor = min(2.0, max(1.0, min(image.shape[:2]) / crop))
        return _as_rgb8(_to_hwc(downsample(stack([image]), factor, "bicubic")))

    if isinstance(real, LazyImages):
        return real.derive(lambda image: [of(image)], 1 / 4)
    return [of(image) for image in real]


def _random_crop(images: Sequence[RGB], size: int, rng: np.random.Generator) -> RGB:
    """A (size, size, 3) crop of a random image, flipped and transposed at random. Small images are mirrored."""
    image = images[int(rng.integers(len(images)))]
    return _Place.draw(image.shape[:2], size, rng).cut(image, size)


@dataclass(frozen=True)
class _Place:
    """The position of a square crop in an image, and how it is flipped and transposed."""

    y: int
    x: int
    flip_y: bool
    flip_x: bool
    transpose: bool

    @classmethod
    def draw(cls, shape: tuple[int, ...], size: int, rng: np.random.Generator) -> _Place:
        """A random place in an image of `shape` (height, width), mirrored to at least `size`."""
        height, width = (max(length, size) for length in shape)
        y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
        return cls(int(y), int(x), *map(bool, rng.integers(2, size=3)))

    def cut(self, image: RGB, size: int, scale: int = 1) -> RGB:
        """The crop, (size*scale, size*scale, 3), of `image`, which is `scale` times as large as that of `draw`."""
        size, y, x = size * scale, self.y * scale, self.x * scale
        height, width = image.shape[:2]
        if height < size or width < size:
            pad = [(0, max(0, size - height)), (0, max(0, size - width)), (0, 0)]
            image = np.pad(image, pad, mode="symmetric")
        crop = image[y : y + size, x : x + size]
        if self.flip_y:
            crop = crop[::-1]
        if self.flip_x:
            crop = crop[:, ::-1]
        return crop.transpose(1, 0, 2) if self.transpose else crop


def stack(crops: Sequence[RGB]) -> Tensor:
    """8-bit crops (H, W, 3) of one size as a batch (N, 3, H, W) in 0..1."""
    stacked = np.ascontiguousarray(np.stack(crops))
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def _to_hwc(image: Tensor) -> NDArray[np.float32]:
    return np.asarray(image[0].permute(1, 2, 0).numpy())


def _as_rgb8(image: NDArray[np.float32]) -> RGB:
    """(H, W, 1 or 3) in 0..1 to 8-bit RGB."""
    eight_bit = np.round(image * 255).astype(np.uint8)
    return np.repeat(eight_bit, 3, axis=2) if eight_bit.shape[2] == 1 else eight_bit
