"""What a file says beside its pixels: docs/upscale.md's table, cell by cell, by Pillow, tifffile and exiftool."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 - registers itself
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.encode import write_images
from pdd_cli.imaging.image import ImageSpec, ImageStream
from pdd_cli.imaging.metadata import GeoTag, Metadata
from pdd_cli.upscaling.jobs import Job, Result
from pdd_cli.upscaling.pipeline import run_jobs
from tests.helpers.networks import repeating, upscaler

pillow_heif.register_heif_opener()
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)
# A profile whose primaries are turned round: what it calls red is green.
_SRGB = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
_RED, _GREEN = _SRGB.index(b"rXYZ"), _SRGB.index(b"gXYZ")
_SRGB[_RED : _RED + 4], _SRGB[_GREEN : _GREEN + 4] = b"gXYZ", b"rXYZ"
PROFILE = bytes(_SRGB)
SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "TIFF": ".tif",
    "WebP": ".webp",
    "AVIF": ".avif",
    "HEIC": ".heic",
    "JPEG XL": ".jxl",
    "BMP": ".bmp",
}
XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:mwg-rs="http://www.metadataworkinggroup.com/schemas/regions/"
 xmlns:stDim="http://ns.adobe.com/xap/1.0/sType/Dimensions#" xmlns:stArea="http://ns.adobe.com/xmp/sType/Area#"
 xmp:Rating="4" tiff:ImageWidth="16" tiff:ImageLength="12" GPano:FullPanoWidthPixels="64"
 GPano:CroppedAreaTopPixels="5"><exif:PixelXDimension>16</exif:PixelXDimension>
<dc:title><rdf:Alt><rdf:li xml:lang="x-default">the lake</rdf:li></rdf:Alt></dc:title>
<mwg-rs:Regions rdf:parseType="Resource"><mwg-rs:AppliedToDimensions stDim:w="16" stDim:h="12" stDim:unit="pixel"/>
<mwg-rs:RegionList><rdf:Bag><rdf:li><rdf:Description mwg-rs:Name="Ann" mwg-rs:Type="Face"><mwg-rs:Area
 stArea:x="0.25" stArea:y="0.5" stArea:w="0.1" stArea:h="0.2" stArea:unit="normalized"/></rdf:Description></rdf:li>
</rdf:Bag></mwg-rs:RegionList></mwg-rs:Regions></rdf:Description></rdf:RDF></x:xmpmeta>"""
IPTC = b"\x1c\x02\x05\x00\x05Title\x1c\x02\x19\x00\x05birds\x1c\x02\x78\x00\x07Caption"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(*chunks: bytes, pixels: np.ndarray = PIXELS) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    data = target.getvalue()
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(segment: bytes, **options: object) -> bytes:
    target = io.BytesIO()
    IMAGE.save(target, "JPEG", **options)
    data = target.getvalue()
    return data[:2] + segment + data[2:]


def exif_of(path: Path) -> Image.Exif:
    with Image.open(path) as image:
        exif = image.getexif()
        for folder in (0x8769, 0x8825):
            exif.get_ifd(folder)
        return exif


def xmp_of(path: Path) -> bytes:
    if path.suffix == ".jxl":  # Pillow's plugin reads none
        return path.read_bytes()
    with Image.open(path) as image:
        found = image.info.get("xmp", b"")
        return found if isinstance(found, bytes) else found.encode()


def info_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return dict(image.info)


# --- a file for each row, and what another program finds of it in an output -------------------------------------
# Each writes the input into a folder and returns it; each check returns "kept", "corrected" or "" for nothing.


def profile_input(folder: Path) -> Path:
    Image.new("RGB", (16, 12), (255, 0, 0)).save(folder / "in.png", icc_profile=PROFILE)
    return folder / "in.png"


def profile_seen(path: Path) -> str:
    pixel = np.asarray(Image.open(path).convert("RGB"))[5, 5].astype(int)
    if info_of(path).get("icc_profile") == PROFILE and abs(pixel - (255, 0, 0)).max() < 12:
        return "kept"
    return "corrected" if abs(pixel - (0, 255, 0)).max() < 12 else ""


def gamma_input(folder: Path) -> Path:
    gray = np.full((12, 16, 3), 128, np.uint8)
    (folder / "in.png").write_bytes(png_with(chunk(b"gAMA", struct.pack(">I", 100_000)), pixels=gray))
    return folder / "in.png"


def gamma_seen(path: Path) -> str:
    with Image.open(path) as image:
        pixel, icc = image.convert("RGB").getpixel((5, 5)), image.info.get("icc_profile")
        if path.suffix == ".png":
            return "kept" if image.info.get("gamma") == 1.0 and pixel[1] == 128 else ""
        if icc and path.suffix != ".jxl":  # JPEG XL has one of the decoder's making
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            pixel = ImageCms.profileToProfile(image.convert("RGB"), source, target).getpixel((5, 5))
    return "corrected" if abs(pixel[1] - 188) <= 2 else ""  # 128 / 255 by the curve of sRGB


def hdr_input(folder: Path) -> Path:
    (folder / "in.png").write_bytes(png_with(chunk(b"cICP", bytes([9, 16, 0, 1]))))
    return folder / "in.png"


def hdr_seen(path: Path) -> str:
    data = path.read_bytes()
    is_png = path.suffix == ".png" and chunk(b"cICP", bytes([9, 16, 0, 1])) in data
    return "kept" if is_png or b"colrnclx\0\x09\0\x10" in data else ""


def exif_input(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x010F], exif[0x013B], exif[0x4746] = "Maker", "Somebody", 4
    exif[0x8769] = {0x9003: "2020:01:02 03:04:05", 0xA002: 16, 0xA003: 12, 0x9214: (4, 6, 2, 3), 0xA20E: 100.0}
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0)}
    IMAGE.save(folder / "in.jpg", exif=exif)
    return folder / "in.jpg"


def exif_seen(path: Path) -> str:
    exif = exif_of(path)
    place, when = exif.get_ifd(0x8825).get(2), exif.get_ifd(0x8769).get(0x9003)
    found = (str(exif.get(0x010F, "")).rstrip("\0"), exif.get(0x4746), place, when)
    return "kept" if found == ("Maker", 4, (52.0, 30.0, 0.0), "2020:01:02 03:04:05") else ""


def exif_sizes_seen(path: Path) -> str:
    values = exif_of(path).get_ifd(0x8769)
    found = (values.get(0xA002), values.get(0xA003), values.get(0x9214), values.get(0xA20E))
    return "corrected" if found == (32, 24, (8, 12, 4, 6), 200.0) else ""


def xmp_input(folder: Path) -> Path:
    IMAGE.save(folder / "in.jpg", xmp=XMP)
    return folder / "in.jpg"


def xmp_seen(path: Path) -> str:
    xmp = xmp_of(path)
    return "kept" if b'xmp:Rating="4"' in xmp and b"the lake" in xmp and b'mwg-rs:Name="Ann"' in xmp else ""


def xmp_sizes_seen(path: Path) -> str:
    xmp = xmp_of(path)
    wanted: tuple[bytes, ...] = (
        b'ImageWidth="32"',
        b'ImageLength="24"',
        b"<exif:PixelXDimension>32<",
        b'stDim:w="32"',
        b'stDim:h="24"',
    )
    wanted += (b'FullPanoWidthPixels="128"', b'CroppedAreaTopPixels="10"', b'stArea:x="0.25"', b'stArea:h="0.2"')
    return "corrected" if all(text in xmp for text in wanted) else ""


def iptc_input(folder: Path) -> Path:
    resource = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC + b"\0" * (len(IPTC) % 2)
    (folder / "in.jpg").write_bytes(jpeg_with(b"\xff\xed" + struct.pack(">H", len(resource) + 2) + resource))
    return folder / "in.jpg"


def iptc_seen(path: Path) -> str:
    if path.suffix == ".png":
        text = info_of(path).get("Raw profile type iptc", "")
        return "kept" if IPTC in bytes.fromhex("".join(text.split("\n")[3:])) else ""
    return "kept" if IPTC in path.read_bytes() else ""


def comment_input(folder: Path) -> Path:
    IMAGE.save(folder / "in.jpg", comment=b"a comment")
    return folder / "in.jpg"


def comment_seen(path: Path) -> str:
    info = info_of(path)
    return "kept" if b"a comment" in (info.get("comment"), info.get("Comment", "").encode()) else ""


def text_input(folder: Path) -> Path:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "nodes " * 400, zip=True)
    texts.add_itxt("Title", "Möwe 鳥", "de", "Titel")
    IMAGE.save(folder / "in.png", pnginfo=texts)
    return folder / "in.png"


def text_seen(path: Path) -> str:
    info = info_of(path)
    title = info.get("Title", "")
    found = (info.get("workflow"), str(title), getattr(title, "lang", ""), getattr(title, "tkey", ""))
    return "kept" if found == ("nodes " * 400, "Möwe 鳥", "de", "Titel") else ""


def parameters_input(folder: Path) -> Path:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a lake\nSteps: 20, Seed: 1")
    IMAGE.save(folder / "in.png", pnginfo=texts)
    return folder / "in.png"


def parameters_seen(path: Path) -> str:
    comment = exif_of(path).get_ifd(0x8769).get(0x9286, b"")
    texts = (info_of(path).get("parameters"), comment[8:].decode("utf-16-be") if comment else "")
    return "kept" if "a lake\nSteps: 20, Seed: 1" in texts else ""


def pages_input(folder: Path) -> Path:
    names = [(269, 2, 0, "a document", True), (285, 2, 0, "page one", True)]
    tifffile.imwrite(folder / "in.tif", PIXELS, photometric="rgb", extratags=names, metadata=None)
    return folder / "in.tif"


def pages_seen(path: Path) -> str:
    exif = exif_of(path)
    return "kept" if (exif.get(269), exif.get(285)) == ("a document", "page one") else ""


def geo_input(folder: Path) -> Path:
    tags = [(33550, 12, 3, (10.0, 20.0, 0.0), True), (33922, 12, 6, (0, 0, 0, 400_000.0, 5_000_000.0, 0), True)]
    tags.append((34735, 3, 8, (1, 1, 0, 1, 1024, 0, 1, 1), True))
    tifffile.imwrite(folder / "in.tif", PIXELS, photometric="rgb", extratags=tags, metadata=None)
    return folder / "in.tif"


def geo_seen(path: Path) -> str:
    if path.suffix != ".tif":
        return ""
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        scale, keys = tags.valueof(33550), tags.valueof(34735)
    return "corrected" if (scale, keys) == ((5.0, 10.0, 0.0), (1, 1, 0, 1, 1024, 0, 1, 1)) else ""


def bands_input(folder: Path) -> Path:
    five = np.dstack([PIXELS, PIXELS[..., :2]])
    extra = ["unspecified", "unspecified"]
    tifffile.imwrite(folder / "in.tif", five, photometric="rgb", extrasamples=extra, metadata=None)
    return folder / "in.tif"


def nothing_seen(path: Path) -> str:
    return ""


def gain_map_input(folder: Path) -> Path:
    xmp = XMP.replace(b" xmp:Rating", b' xmlns:h="http://ns.adobe.com/hdr-gain-map/1.0/" h:Version="1.0" xmp:Rating')
    IMAGE.save(folder / "in.jpg", "MPO", save_all=True, append_images=[IMAGE.convert("L").resize((4, 3))], xmp=xmp)
    return folder / "in.jpg"


def gain_map_seen(path: Path) -> str:
    return "kept" if b"hdr-gain-map" in xmp_of(path) else ""


def dpi_input(folder: Path) -> Path:
    IMAGE.save(folder / "in.jpg", dpi=(240, 120))
    return folder / "in.jpg"


def dpi_seen(path: Path) -> str:
    exif = exif_of(path)
    found = info_of(path).get("dpi") or (exif.get(0x011A), exif.get(0x011B))
    return "kept" if np.allclose(np.array(found, float), (240, 120), atol=0.5) else ""


def animation_input(folder: Path) -> Path:
    frames = [Image.fromarray(np.roll(PIXELS, n)) for n in range(3)]
    frames[0].save(folder / "in.png", save_all=True, append_images=frames[1:], duration=[40, 80, 120], loop=3)
    return folder / "in.png"


def animation_seen(path: Path) -> str:
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) == 1:
            return "–"
        times = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            times.append(image.info.get("duration"))
        return "kept" if (times, image.info.get("loop")) == ([40, 80, 120], 3) else ""


ROWS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], str]]] = {
    "colour profile (ICC)": (profile_input, profile_seen),
    "gAMA and cHRM of PNG": (gamma_input, gamma_seen),
    "HDR by PQ or HLG (cICP, nclx)": (hdr_input, hdr_seen),
    "EXIF: author, camera, date, place, rating": (exif_input, exif_seen),
    "EXIF: sizes in pixels": (exif_input, exif_sizes_seen),
    "XMP: title, rating, keywords": (xmp_input, xmp_seen),
    "XMP: sizes, panorama, regions in pixels": (xmp_input, xmp_sizes_seen),
    "IPTC: title, keywords, caption": (iptc_input, iptc_seen),
    "comment of JPEG or GIF": (comment_input, comment_seen),
    "text of PNG: workflow and others": (text_input, text_seen),
    "text of PNG: parameters (Stable Diffusion)": (parameters_input, parameters_seen),
    "TIFF: document and page name": (pages_input, pages_seen),
    "GeoTIFF: scale and place": (geo_input, geo_seen),
    "bands of a TIFF beyond RGB and alpha": (bands_input, nothing_seen),
    "HDR gain map of JPEG": (gain_map_input, gain_map_seen),
    "resolution (dpi)": (dpi_input, dpi_seen),
    "times and repetitions of an animation": (animation_input, animation_seen),
}


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/upscale.md: kind → format → word."""
    text = (Path(__file__).parent.parent / "docs/upscale.md").read_text()
    lines = text[text.index("| metadata | PNG |") :].split("\n\n")[0].splitlines()
    formats, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(formats[1:], row[1:], strict=True)) for row in rows}


def test_the_documented_kinds_are_those_that_are_tested() -> None:
    assert list(documented()) == list(ROWS)
    assert all(list(cells) == list(SUFFIXES) for cells in documented().values())


def upscaled(source: Path, target: Path) -> Result:
    (result,) = run_jobs([Job(source, target)], upscaler(repeating(2)))
    return result


@pytest.mark.parametrize("kind", ROWS)
def test_each_format_keeps_or_names_what_is_documented(tmp_path: Path, kind: str) -> None:
    make, seen = ROWS[kind]
    source = make(tmp_path)
    found = {}
    for format, suffix in SUFFIXES.items():
        target = tmp_path / f"out{suffix}"
        result = upscaled(source, target)
        if result.status == "failed":
            found[format] = "refused" if re.search(r"HDR.*--format", result.problem) else result.problem
            continue
        assert result.status == "done"
        word = seen(target)
        found[format] = word or ("named" if result.left_out else "lost without a word")
        assert bool(result.left_out) == (word == ""), result.left_out
        assert all(name in result.problem for name in result.left_out)
    assert found == documented()[kind]


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES.values() if suffix != ".bmp"])
def test_exiftool_finds_it_too(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "in.jpg"
    IMAGE.save(source, xmp=XMP, comment=b"a comment")
    iptc = ["-IPTC:Keywords=birds", "-IPTC:Caption-Abstract=Caption"] if suffix in (".png", ".jpg", ".tif") else []
    written = [*iptc, "-IFD0:Rating=5", "-EXIF:LensModel=Lens 50mm", "-XMP-dc:Subject=lake", "-GPSLatitude=52.5"]
    subprocess.run(["exiftool", "-q", "-overwrite_original", *written, source], check=True)
    target = tmp_path / f"out{suffix}"
    upscaled(source, target)
    found = subprocess.run(["exiftool", "-json", "-n", "-G1", target], capture_output=True, check=True)
    tags = json.loads(found.stdout)[0]
    expected = {"IFD0:Rating": 5, "ExifIFD:LensModel": "Lens 50mm", "XMP-dc:Subject": "lake", "GPS:GPSLatitude": 52.5}
    expected |= {"XMP-tiff:ImageWidth": 32, "XMP-GPano:FullPanoWidthPixels": 128}
    expected |= {"IPTC:Keywords": "birds", "IPTC:Caption-Abstract": "Caption"} if iptc else {}
    assert {key: tags.get(key) for key in expected} == expected
    assert not [key for key in tags if "Warning" in key], tags


# --- corrections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_are_turned_with_the_picture(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    dark = np.full((12, 16, 3), 255, np.uint8)
    dark[5:7, 3:5] = 0  # where the face of XMP is
    Image.fromarray(dark).save(tmp_path / "in.png", exif=exif, xmp=XMP)
    data = tmp_path / "in.jpg"
    Image.fromarray(dark).save(data, exif=exif, xmp=XMP, quality=100, subsampling=0)
    picture = read_image(data)
    rows, columns = np.nonzero(picture.pixels[..., 0] < 128)
    x, y = (columns.mean() + 0.5) / picture.width, (rows.mean() + 0.5) / picture.height
    xmp = picture.metadata.xmp
    assert xmp is not None
    area = {key: float(re.search(rf'stArea:{key}="([\d.]+)"'.encode(), xmp)[1]) for key in "xywh"}
    assert (area["x"], area["y"]) == pytest.approx((x, y), abs=0.01)
    swapped = orientation >= 5
    assert (area["w"], area["h"]) == ((0.2, 0.1) if swapped else (0.1, 0.2))
    assert f'stDim:w="{12 if swapped else 16}"'.encode() in xmp


@pytest.mark.parametrize("of_centres", [False, True])
def test_places_on_the_earth_stay_where_they_are(of_centres: bool) -> None:
    keys = GeoTag(34735, 3, (1, 1, 0, 1, 1025, 0, 1, 2 if of_centres else 1))
    scale, tie = GeoTag(33550, 12, (10.0, 20.0, 0.0)), GeoTag(33922, 12, (3.0, 2.0, 0.0, 400_000.0, 5_000_000.0, 0.0))
    matrix = GeoTag(34264, 12, (10.0, 1.0, 0, 400_000.0, 2.0, -20.0, 0, 5_000_000.0, 0, 0, 0, 0, 0, 0, 0, 1.0))
    before = Metadata(geo=(keys, scale, tie, matrix))
    after = before.resized((16, 12), (64, 36))
    shift = 0.5 if of_centres else 0.0  # a pixel of this number has its place there in the image

    def places(metadata: Metadata, x: float, y: float) -> list[float]:
        """Where (x, y), in pixels from the image's corner, is by scale and tie point, and by the matrix."""
        (sx, sy, _), (i, j, _, east, north, _), m = (np.array(tag.values) for tag in metadata.geo[1:])
        x, y = x - shift, y - shift
        by_tie = [east + (x - i) * sx, north - (y - j) * sy]
        return [*by_tie, m[0] * x + m[1] * y + m[3], m[4] * x + m[5] * y + m[7]]

    for x, y in ((0, 0), (16, 12), (3.5, 2.25)):
        assert places(after, x * 4, y * 3) == pytest.approx(places(before, x, y))


def test_a_profile_made_of_chromaticities_is_the_colours_that_a_browser_shows(tmp_path: Path) -> None:
    # Display P3: its red is outside of sRGB, a third of it is (92, 24, 24) there, by ImageMagick and by hand.
    chroma = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    pixels = np.full((12, 16, 3), (120, 60, 60), np.uint8)
    linear = np.where(pixels / 255 > 0, (pixels / 255) ** 2.2, 0)[0, 0]
    to_xyz = np.array([[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0, 0.04511, 1.04394]])
    to_srgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    values = (to_srgb @ to_xyz @ linear).clip(0, 1)
    expected = np.where(values > 0.0031308, 1.055 * values ** (1 / 2.4) - 0.055, 12.92 * values) * 255
    gamma = struct.pack(">I", 45455)
    (tmp_path / "in.png").write_bytes(png_with(chunk(b"gAMA", gamma), chunk(b"cHRM", chroma), pixels=pixels))
    upscaled(tmp_path / "in.png", tmp_path / "out.bmp")
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "out.bmp"))[5, 5], expected, atol=1.5)


def test_a_gif_that_plays_twice_plays_twice(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(PIXELS, n)).quantize(64) for n in range(3)]
    for loop, plays in ((None, 1), (0, 0), (1, 2), (4, 5)):
        options = {} if loop is None else {"loop": loop}
        frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=[70, 80, 90], **options)
        for suffix in ("webp", "png"):
            upscaled(tmp_path / "in.gif", tmp_path / f"{plays}.{suffix}")
            with Image.open(tmp_path / f"{plays}.{suffix}") as image:
                assert (image.info["loop"], image.n_frames) == (plays, 3)


def test_pages_of_different_sizes_are_no_animation(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        writer.write(PIXELS, photometric="rgb")
        writer.write(PIXELS[:5], photometric="rgb")
    for suffix in ("png", "webp"):
        result = upscaled(tmp_path / "in.tif", tmp_path / f"out.{suffix}")
        assert result.status == "failed"
        assert "--format tiff" in result.problem


def test_everything_of_a_png_comes_back_from_a_png(tmp_path: Path) -> None:
    metadata = read_image(text_input(tmp_path)).metadata
    write_images(tmp_path / "out.png", [ImageStream(ImageSpec(16, 12, 3), [PIXELS], metadata)])
    assert read_image(tmp_path / "out.png").metadata == metadata


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
def test_text_that_is_not_ascii_keeps_its_bytes(tmp_path: Path, suffix: str) -> None:
    """As exiftool and cameras write it, in UTF-8; in another encoding, too."""
    IMAGE.save(tmp_path / "in.jpg")
    names = {"Artist": "Zoë", "Copyright": "© 日本", "LensModel": "Objektiv é"}
    for options in ([f"-{name}={value}" for name, value in names.items()], ["-charset", "exif=latin", "-Make=Müller"]):
        subprocess.run(["exiftool", "-q", "-overwrite_original", *options, tmp_path / "in.jpg"], check=True)
    out = tmp_path / f"out.{suffix}"
    upscaled(tmp_path / "in.jpg", out)
    for name in (*names, "Make"):
        ours, theirs = (
            subprocess.run(["exiftool", "-b", f"-EXIF:{name}", path], capture_output=True, check=True).stdout
            for path in (out, tmp_path / "in.jpg")
        )
        assert ours == theirs != b"", name
