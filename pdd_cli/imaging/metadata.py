"""Metadata of image files: correction for a new size, and selection of the parts that a format supports."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from pdd_cli.errors import InputError
from pdd_cli.imaging import icc as profiles
from pdd_cli.imaging import xmp as packets

Size = tuple[int, int]
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
ORIENTATION, USER_COMMENT = 0x0112, 0x9286

# Tags of the main image that stay valid when the pixels change: author, date, device and place.
_KEPT = {0x010D, 0x010E, 0x010F, 0x0110, 0x011D, 0x011E, 0x011F, 0x0129, 0x0131, 0x0132, 0x013B, 0x013C, 0x0150, 0x4746}
_KEPT |= {0x4749, 0x8298, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F, 0xC614, 0xC615, 0xC62F}

# Tags of how the pixels are stored, and of data that `Metadata` has in other fields: resolution, XMP, IPTC, profile.
_STRUCTURE = {*range(0x00FE, 0x010D), *range(0x0111, 0x011D), *range(0x0120, 0x0126), 0x0128, 0x012D, 0x013D, 0x013E}
_STRUCTURE |= {0x013F, *range(0x0140, 0x0150), *range(0x0151, 0x015C), *range(0x0200, 0x0216), 0x02BC, 0x83BB, 0x8649}
_STRUCTURE |= {0x8773, EXIF_IFD, GPS_IFD, 0xA005, 0x1000, 0x1001, 0x1002, 0xC4A5}
_WIDTH, _HEIGHT, _INTEROPERABILITY, _AREA, _PLACE = 0xA002, 0xA003, 0xA005, 0x9214, 0xA214
_FOCAL_PLANE = (0xA20E, 0xA20F)
_X_RESOLUTION, _Y_RESOLUTION, _UNIT = 0x011A, 0x011B, 0x0128
PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS = 33550, 33922, 34264, 34735
GEO_TAGS = (PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS, 34736, 34737, 42113)
_RASTER_TYPE, _POINT = 1025, 2
_PQ, _HLG = 16, 18

# Exponents of the transfer characteristics of H.273; None stands for the sRGB curve. Browsers show images that are
# tagged with the BT.709 or BT.601 camera curve (1, 6) with the sRGB curve.
_GAMMAS: dict[int, float | None] = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}

# The fields of `Metadata` that each format supports.
_HOLDS = {
    "PNG": {"icc", "exif", "xmp", "dpi", "iptc", "comment", "text", "colour", "cicp", "plays"},
    "JPEG": {"icc", "exif", "xmp", "dpi", "iptc", "comment"},
    "TIFF": {"icc", "exif", "xmp", "dpi", "iptc", "geo"},
    "WEBP": {"icc", "exif", "xmp", "plays"},
    "AVIF": {"icc", "exif", "xmp"},
    "GIF": {"xmp", "comment", "plays"},
    "HEIF": {"icc", "exif", "xmp", "cicp"},
    "JXL": {"exif", "xmp"},
    "BMP": {"dpi"},
    "TGA": set(),
}

# Maximum number of bytes in a JPEG segment.
_MOST_JPEG = {"exif": 65_533, "xmp": 65_504, "iptc": 65_490, "comment": 65_533}


@dataclass(frozen=True)
class Text:
    """A text chunk of a PNG: iTXt if `language` (which may be empty) is set, else tEXt or zTXt."""

    keyword: str
    text: str
    language: str | None = None
    translated: str = ""


@dataclass(frozen=True)
class GeoTag:
    """A tag of a GeoTIFF: its code, data type and values, as in the file."""

    code: int
    type: int
    values: tuple[float, ...] | str


@dataclass(frozen=True)
class Metadata:
    """The metadata of an image file.

    Attributes:
        icc: ICC profile.
        exif: EXIF that begins with "Exif\\0\\0", without orientation, resolution and thumbnail.
        xmp: XMP packet.
        dpi: Horizontal and vertical resolution in pixels per inch.
        iptc: Records of IPTC-IIM.
        comment: Comment of a JPEG.
        text: Text chunks of a PNG.
        colour: gAMA, cHRM and sRGB chunks of a PNG, as (type, content).
        cicp: Primaries, transfer characteristics, matrix and full-range flag of ITU-T H.273.
        geo: Tags of a GeoTIFF.
        plays: How many times an animation is played; 0: endlessly.
        software: The program that writes the file, for the Software text of a PNG. Other formats have it in `exif`.
        lost: Names of input metadata that no output can contain.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    iptc: bytes | None = None
    comment: bytes | None = None
    text: tuple[Text, ...] = ()
    colour: tuple[tuple[bytes, bytes], ...] = ()
    cicp: tuple[int, int, int, int] | None = None
    geo: tuple[GeoTag, ...] = ()
    plays: int = 0
    software: str | None = None
    lost: tuple[str, ...] = ()

    @property
    def stripped(self) -> Metadata:
        """Only the metadata needed to display the pixels: the colour space and the number of plays of an animation."""
        return Metadata(icc=self.icc, colour=self.colour, cicp=self.cicp, plays=self.plays)

    def resized(self, before: Size, after: Size) -> Metadata:
        """The metadata for the image after it is resized from `before` to `after`, each (width, height)."""
        if before == after:
            return self
        factors = (after[0] / before[0], after[1] / before[1])
        return replace(
            self,
            exif=self.exif and _resized_exif(self.exif, after, factors),
            xmp=self.xmp and packets.resized(self.xmp, after, factors),
            geo=_resized_geo(self.geo, factors),
        )

    def held_by(self, format: str, *, gray: bool, animated: bool = False) -> tuple[Metadata, tuple[str, ...]]:
        """The metadata that `format` supports, and the names of the rest.

        If the format supports ICC profiles only, other descriptions of the colour space are converted to a profile.
        Raises InputError for HDR and other colours that the format can't describe.
        """
        holds = _HOLDS[format]
        kept, left = self, list(self.lost)
        if "cicp" not in holds and self.cicp is not None:
            kept = replace(kept, icc=kept.icc or _profile_of_cicp(self.cicp, format), cicp=None)
        if "colour" not in holds and self.colour:
            kept = replace(kept, icc=kept.icc or _profile_of_chunks(self.colour, gray=gray), colour=())
        if "text" not in holds and self.text:
            kept, rest = _with_parameters(kept, "exif" in holds)
            left += [f"PNG text ({', '.join(dict.fromkeys(text.keyword for text in rest))})"] if rest else []
        if self.comment and "comment" not in holds:
            left.append("JPEG comment")
        if self.iptc and "iptc" not in holds:
            left.append("IPTC")
        if self.geo and "geo" not in holds:
            left.append("GeoTIFF tags")
        if self.dpi and "dpi" not in holds and "exif" in holds:
            kept = replace(kept, exif=_with_resolution(kept.exif, self.dpi))
        left += [name.upper() for name in ("exif", "xmp") if getattr(kept, name) and name not in holds]
        if animated and self.plays and "plays" not in holds:
            left.append(f"the limit of {self.plays} plays")
        most = _MOST_JPEG if format == "JPEG" else {}
        large = {name for name, size in most.items() if len(getattr(kept, name) or b"") > size}
        left += [f"{name.upper()} (larger than a JPEG holds)" for name in sorted(large & holds)]
        holds = holds - large
        kept = replace(
            kept,
            exif=kept.exif if "exif" in holds else None,
            xmp=kept.xmp if "xmp" in holds else None,
            dpi=kept.dpi if "dpi" in holds else None,
            iptc=kept.iptc if "iptc" in holds else None,
            comment=kept.comment if "comment" in holds else None,
            text=kept.text if "text" in holds else (),
            geo=kept.geo if "geo" in holds else (),
        )
        return kept, tuple(dict.fromkeys(left))


def kept_exif(exif: Image.Exif, size: Size) -> tuple[bytes | None, tuple[str, ...]]:
    """The EXIF that stays valid for the upright image of (width, height) `size`, and the names of removed tags."""
    kept, lost = Image.Exif(), []
    turned = exif.get(ORIENTATION, 1) != 1
    for tag in exif:
        if tag in _KEPT and not (tag == 0x010E and _is_of_a_program(exif[tag])):
            kept[tag] = exif[tag]
        elif tag in _KEPT:
            lost.append("ImageDescription written for a program")
        elif tag not in _STRUCTURE and tag not in GEO_TAGS:
            lost.append(f"TIFF tag {tag}")
    for ifd in (EXIF_IFD, GPS_IFD):
        values = {tag: value for tag, value in exif.get_ifd(ifd).items() if tag != _INTEROPERABILITY}
        if ifd == EXIF_IFD and turned:
            lost += ["subject area"] if {_AREA, _PLACE} & values.keys() else []
            values = {tag: value for tag, value in values.items() if tag not in (_AREA, _PLACE)}
        values |= {tag: side for tag, side in zip((_WIDTH, _HEIGHT), size, strict=True) if tag in values}
        if values:
            kept[ifd] = values
    if not len(kept):
        return None, tuple(lost)
    return exif_bytes(kept), tuple(lost)


def _is_of_a_program(description: object) -> bool:
    """Whether the description is meant for a program and contains sizes, such as tifffile's shape or OME-XML."""
    text = str(description).lstrip()
    return text.startswith('{"shape"') or (text.startswith("<?xml") and "<OME" in text)


def load_exif(exif: bytes | None) -> Image.Exif:
    """Parse `exif`, with its EXIF and GPS directories."""
    tags = Image.Exif()
    if exif:
        tags.load(exif)
        for ifd in (EXIF_IFD, GPS_IFD):
            values = tags.get_ifd(ifd)
            if values:
                tags[ifd] = dict(values)
    return tags


class ExifText(str):
    """Text that Pillow writes as it was read: Pillow reads Latin-1 and writes ASCII with question marks."""

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        try:
            return super().encode("latin-1")
        except UnicodeEncodeError:  # text that was not read from EXIF
            return super().encode()


def exif_bytes(tags: Image.Exif) -> bytes:
    """`tags` as an EXIF block whose text has the bytes that were read; cameras and programs write UTF-8."""
    for values in (tags, *(tags[ifd] for ifd in (EXIF_IFD, GPS_IFD) if isinstance(tags.get(ifd), dict))):
        for tag, value in list(values.items()):
            if isinstance(value, str) and not value.isascii():
                values[tag] = ExifText(value)
    return bytes(tags.tobytes())


def _resized_exif(exif: bytes, size: Size, factors: tuple[float, float]) -> bytes:
    tags = load_exif(exif)
    values = dict(tags.get_ifd(EXIF_IFD))
    if values:
        for tag, side in ((_WIDTH, size[0]), (_HEIGHT, size[1])):
            if tag in values:
                values[tag] = side
        for tag, factor in zip(_FOCAL_PLANE, factors, strict=True):
            if tag in values:
                values[tag] = float(values[tag]) * factor
        for tag in (_AREA, _PLACE):
            if tag in values:
                # x and y; of an area also its diameter, or its width and height.
                values[tag] = tuple(
                    min(65535, round(value * factors[index % 2])) for index, value in enumerate(values[tag])
                )
        tags[EXIF_IFD] = values
    return exif_bytes(tags)


def _with_resolution(exif: bytes | None, dpi: tuple[float, float]) -> bytes:
    tags = load_exif(exif)
    tags[_X_RESOLUTION], tags[_Y_RESOLUTION], tags[_UNIT] = dpi[0], dpi[1], 2
    return exif_bytes(tags)


def _with_parameters(metadata: Metadata, has_exif: bool) -> tuple[Metadata, list[Text]]:
    """Move the `parameters` text of Stable Diffusion to the EXIF UserComment.

    Its programs read it there in formats other than PNG. Returns the metadata and the other texts.
    """
    tags = load_exif(metadata.exif)
    values = dict(tags.get_ifd(EXIF_IFD))
    found = next((text for text in metadata.text if text.keyword == "parameters"), None)
    if not has_exif or found is None or USER_COMMENT in values:
        return metadata, list(metadata.text)
    values[USER_COMMENT] = b"UNICODE\0" + found.text.encode("utf-16-be")
    tags[EXIF_IFD] = values
    return replace(metadata, exif=exif_bytes(tags)), [text for text in metadata.text if text != found]


def _profile_of_cicp(cicp: tuple[int, int, int, int], format: str) -> bytes | None:
    primaries, transfer = cicp[:2]
    if transfer in (_PQ, _HLG):
        raise InputError(
            f"its colours are HDR ({'PQ' if transfer == _PQ else 'HLG'}), which can't be written to {format}",
            "Use --format png or heic.",
        )
    points = profiles.PRIMARIES.get(1 if primaries == 2 else primaries)
    if points is None or transfer not in _GAMMAS:
        raise InputError(
            f"its colours (primaries {primaries}, transfer {transfer} of H.273) can't be written to {format}",
            "Use --format png or heic.",
        )
    if points == profiles.SRGB_PRIMARIES and _GAMMAS[transfer] is None:
        return None
    return profiles.profile(points, _GAMMAS[transfer], gray=False)


def _profile_of_chunks(chunks: Iterable[tuple[bytes, bytes]], *, gray: bool) -> bytes | None:
    """An ICC profile for the gAMA and cHRM chunks. None if the colours are sRGB."""
    found = dict(chunks)
    if b"sRGB" in found:
        return None
    gamma, points = None, profiles.SRGB_PRIMARIES
    if b"gAMA" in found:
        (value,) = struct.unpack(">I", found[b"gAMA"])
        gamma = None if abs(value - 45455) < 100 else 100_000 / value
    if b"cHRM" in found:
        given = tuple(value / 100_000 for value in struct.unpack(">8I", found[b"cHRM"]))
        if not np.allclose(given, profiles.SRGB_PRIMARIES, atol=0.002):
            points = given
    if gamma is None and (points == profiles.SRGB_PRIMARIES or gray):
        return None
    # With other primaries, the gAMA value of sRGB stands for a power curve, not for the sRGB curve.
    if gamma is None and b"gAMA" in found:
        gamma = 2.2
    return profiles.profile(points, gamma, gray=gray)


def _resized_geo(tags: tuple[GeoTag, ...], factors: tuple[float, float]) -> tuple[GeoTag, ...]:
    """GeoTIFF tags for pixels that are smaller by `factors` (x, y).

    If coordinates refer to pixel centres (RasterPixelIsPoint), the position of the first pixel changes, too.
    """
    fx, fy = factors
    centre = 0.5 if _is_of_centres(tags) else 0.0

    def corrected(tag: GeoTag) -> GeoTag:
        values: Any = tag.values
        if tag.code == PIXEL_SCALE:
            return replace(tag, values=(values[0] / fx, values[1] / fy, *values[2:]))
        if tag.code == TIE_POINTS:
            points = list(values)
            points[0::6] = [(x + centre) * fx - centre for x in points[0::6]]
            points[1::6] = [(y + centre) * fy - centre for y in points[1::6]]
            return replace(tag, values=tuple(points))
        if tag.code == TRANSFORMATION:
            matrix = np.array(values, float).reshape(4, 4)
            # Old pixel = (new + centre) / factor - centre.
            step = np.eye(4)
            step[0, 0], step[1, 1] = 1 / fx, 1 / fy
            step[0, 3], step[1, 3] = centre / fx - centre, centre / fy - centre
            return replace(tag, values=tuple(float(value) for value in (matrix @ step).ravel()))
        return tag

    return tuple(corrected(tag) for tag in tags)


def _is_of_centres(tags: tuple[GeoTag, ...]) -> bool:
    keys = next((tag.values for tag in tags if tag.code == GEO_KEYS), ())
    return any(keys[at] == _RASTER_TYPE and keys[at + 3] == _POINT for at in range(4, len(keys) - 3, 4))


Notes = tuple[str, ...]
NO_NOTES: Notes = ()


def true_exif(exif: Image.Exif, size: tuple[int, int]) -> tuple[bytes | None, Notes, Notes]:
    """`kept_exif`, and notes for the user: damaged EXIF is left out with a note."""
    try:
        return (*kept_exif(exif, size), ())
    except Exception:
        # Pillow raises many kinds of errors for tags with values of a wrong type. The image is kept without EXIF.
        return None, (), ("its EXIF is damaged and left out",)


def true_xmp(packet: object, orientation: int, size: tuple[int, int]) -> tuple[bytes | None, Notes]:
    """The XMP `packet` for the upright image, and the names of removed data. See `xmp.upright`."""
    if isinstance(packet, str):
        packet = packet.encode()
    if not isinstance(packet, bytes) or not packet.strip(b"\0 \n"):
        return None, ()
    return packets.upright(packet, orientation, size)


def dpi_of(values: object) -> tuple[float, float] | None:
    """The two `values` as a resolution in pixels per inch. None if they aren't two plausible numbers."""
    try:
        x, y = (float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 1e5 and 1 <= y < 1e5 else None


def dpi_of_exif(exif: Image.Exif) -> tuple[float, float] | None:
    """The resolution in pixels per inch from the tags of `exif`. None without a plausible one."""
    unit = {2: 1.0, 3: 2.54}.get(exif.get(0x0128, 2), 1.0)
    try:
        return dpi_of([float(exif[0x011A]) * unit, float(exif[0x011B]) * unit])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def photoshop_block(iptc: bytes) -> bytes:
    """IPTC as a Photoshop resource block."""
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
