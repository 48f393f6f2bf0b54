"""The file formats: their suffixes and their limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import ImageSpec

FORMATS = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".jif": "JPEG",
    ".jfi": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".tga": "TGA",
    ".avif": "AVIF",
    ".avifs": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jxl": "JXL",
}
"""Suffixes and formats that pdd reads and writes; HEIF and JXL need Pillow's plugins."""

READ_ONLY = {".dds": "DDS"}
"""Suffixes and formats that are found in folders and not written; the outputs are PNG."""

STREAMED = ("PNG", "TIFF")
"""The formats that are written row by row."""

_LONGEST_SIDE = {"JPEG": 65_535, "GIF": 65_535, "WEBP": 16_383, "AVIF": 65_535, "TGA": 65_535}
# For HEIF the limit of libheif, which most programs use.
_MOST_BYTES = {"BMP": 2**32 - 1, "HEIF": 2**32}
_SIXTEEN_BIT = ("PNG", "TIFF", "HEIF")
_WITH_ALPHA = ("PNG", "WEBP", "GIF", "TIFF", "BMP", "TGA", "AVIF", "HEIF", "JXL")
_LOSSY_ONLY = ("JPEG", "AVIF", "HEIF", "GIF")
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")


def format_of(path: Path) -> str:
    """The format of the suffix of `path`. Raises InputError for one that pdd doesn't write."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: can't write this format", f"Use one of {', '.join(FORMATS)}.") from None


def load_plugin(format: str) -> None:
    """Register Pillow's plugin for HEIF or JXL. Raises InputError if it isn't installed."""
    try:
        if format == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener()
        elif format == "JXL":
            import pillow_jxl  # noqa: F401 - registers itself
    except ImportError as error:
        name = {"HEIF": "HEIC", "JXL": "JPEG XL"}[format]
        raise InputError(f"{name} needs a plugin that isn't installed: run pip install 'pdd-cli[formats]'") from error


def check_size(path: Path, width: int, height: int) -> None:
    """Raise InputError if the format of `path` can't hold an image of this size."""
    format = format_of(path)
    longest = _LONGEST_SIDE.get(format, 2**31 - 1)
    if max(width, height) > longest:
        raise InputError(
            f"{path}: {width}x{height} is too large for {format} (at most {longest} pixels a side)",
            "Use --format png or tiff.",
        )
    if width * height * 4 > _MOST_BYTES.get(format, 2**62):
        raise InputError(
            f"{path}: {width}x{height} is too large for {format} (at most 4 GiB)", "Use --format png or tiff."
        )


def check_lossless(path: Path) -> None:
    """Raise InputError if the format of `path` is always lossy."""
    if format_of(path) in _LOSSY_ONLY:
        raise InputError(
            f"{path}: {format_of(path)} can't be written losslessly",
            "Use --format png, tiff, webp or jxl, or leave --lossless out.",
        )


def keeps_frames(path: Path) -> bool:
    """Whether the format of `path` holds several pages or frames."""
    return format_of(path) in (*_ANIMATED, "TIFF")


def stored_spec(path: Path, spec: ImageSpec) -> ImageSpec:
    """The spec of `spec` in the file `path`: JPEG has no alpha; only PNG, TIFF, HEIF and gray JPEG XL have 16 bits."""
    format = format_of(path)
    deep = format in _SIXTEEN_BIT or (format == "JXL" and spec.samples == 1)
    return replace(
        spec,
        bits=spec.bits if deep else 8,
        alpha=spec.alpha and format in _WITH_ALPHA,
    )
