"""Files ↔ arrays, against what Pillow, OpenCV and tifffile read and write."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from benchmarks.robustness.fuzz import handmade
from pdd_cli.errors import InputError, PddError
from pdd_cli.imaging import png, tiff
from pdd_cli.imaging.decode import decode_pages, image_size, read_image
from pdd_cli.imaging.encode import Encoding, write_image, write_images
from pdd_cli.imaging.find import find_images
from pdd_cli.imaging.formats import check_size
from pdd_cli.imaging.image import MOST_PIXELS, DecodedImage, ImageSpec, ImageStream, from_float
from pdd_cli.imaging.metadata import Metadata

pillow_heif.register_heif_opener()  # pillow_jxl registers itself
RNG = np.random.default_rng(0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


# (mode, file, channels, alpha, exact) of 8-bit images that Pillow writes.
MODES = [
    ("L", "a.png", 1, False),
    ("LA", "a.png", 1, True),
    ("RGB", "a.png", 3, False),
    ("RGBA", "a.png", 3, True),
    ("P", "a.png", 3, False),
    ("1", "a.png", 1, False),
    ("L", "a.tif", 1, False),
    ("LA", "a.tif", 1, True),
    ("RGB", "a.tiff", 3, False),
    ("RGBA", "a.tiff", 3, True),
    ("RGB", "a.bmp", 3, False),
    ("L", "a.bmp", 1, False),
    ("L", "a.jpg", 1, False),
    ("RGB", "a.JPEG", 3, False),
    ("CMYK", "a.jpg", 3, False),
    ("CMYK", "a.tif", 3, False),
    ("RGBA", "a.webp", 3, True),
    ("L", "a.heic", 1, False),
    ("RGB", "a.heic", 3, False),
    ("RGBA", "a.heif", 3, True),
    ("L", "a.jxl", 1, False),
    ("LA", "a.jxl", 1, True),
    ("RGB", "a.jxl", 3, False),
    ("RGBA", "a.jxl", 3, True),
]


@pytest.mark.parametrize(("mode", "name", "channels", "alpha"), MODES)
def test_each_mode_is_read_as_pillow_reads_it(tmp_path: Path, mode: str, name: str, channels: int, alpha: bool) -> None:
    path = tmp_path / name
    whole = Image.fromarray(random_pixels(11, 7, 4))
    (whole.convert("RGB") if mode == "P" else whole).convert(mode).save(path)
    picture = read_image(path)
    assert (picture.width, picture.height, picture.channels, picture.bits) == (7, 11, channels, 8)
    assert (picture.alpha is not None) == alpha
    with Image.open(path) as image:
        expected = np.asarray(image.convert({1: "L", 3: "RGB"}[channels] + "A" * alpha)).reshape(11, 7, -1)
    np.testing.assert_array_equal(picture.pixels, expected[..., :channels])
    if alpha:
        np.testing.assert_array_equal(picture.alpha, expected[..., -1])


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("channels", "alpha"), [(1, False), (1, True), (3, False), (3, True)])
@pytest.mark.parametrize("bits", [8, 16])
def test_lossless_formats_give_back_what_was_written(
    tmp_path: Path, suffix: str, channels: int, alpha: bool, bits: int
) -> None:
    dtype = {8: np.uint8, 16: np.uint16}[bits]
    icc = SRGB if channels == 3 else None
    written = DecodedImage(
        random_pixels(9, 6, channels, dtype=dtype),
        random_pixels(9, 6, dtype=dtype) if alpha else None,
        Metadata(icc, dpi=(300, 300)),
    )
    path = tmp_path / f"a.{suffix}"
    write_image(path, written)
    read = read_image(path)
    np.testing.assert_array_equal(read.pixels, written.pixels)
    assert (read.alpha is None) == (written.alpha is None)
    if written.alpha is not None:
        np.testing.assert_array_equal(read.alpha, written.alpha)
    assert read.metadata.icc == icc
    assert read.metadata.dpi == pytest.approx((300, 300), abs=0.1)
    if bits == 16 and channels == 3:  # and another program sees the same
        other = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(other[..., 2::-1], written.pixels)


def test_sixteen_bits_from_other_writers(tmp_path: Path) -> None:
    rgba = random_pixels(8, 5, 4, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), rgba[..., (2, 1, 0, 3)])
    tifffile.imwrite(tmp_path / "b.tif", rgba[..., :3], photometric="rgb", byteorder=">")
    tifffile.imwrite(
        tmp_path / "planes.tif", np.moveaxis(rgba[..., :3], -1, 0), photometric="rgb", planarconfig="separate"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "planes.tif").pixels, rgba[..., :3])
    Image.fromarray(rgba[..., 0]).save(tmp_path / "c.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, rgba[..., :3])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").alpha, rgba[..., 3])
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels, rgba[..., :3])
    np.testing.assert_array_equal(read_image(tmp_path / "c.png").pixels[..., 0], rgba[..., 0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_gray_with_alpha_of_16_bits_in_a_tiff(tmp_path: Path, order: str, compression: str | None, planar: str) -> None:
    values = random_pixels(9, 6, 2, dtype=np.uint16)
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, byteorder=order) as writer:
        for page in (stored, stored // 2):
            writer.write(
                page,
                photometric="minisblack",
                planarconfig=planar,
                extrasamples=["unassalpha"],
                compression=compression,
                extratags=[(274, 3, 1, 6, True)],
            )
    pages = list(decode_pages(path, path.read_bytes()))
    np.testing.assert_array_equal(pages[0].interleaved, np.rot90(values, -1))
    np.testing.assert_array_equal(pages[1].interleaved, np.rot90(values // 2, -1))
    assert image_size(path) == (9, 6)


def test_colours_multiplied_by_alpha_of_16_bits_become_straight(tmp_path: Path) -> None:
    for channels, photometric in ((1, "minisblack"), (3, "rgb")):
        straight = random_pixels(9, 6, channels, dtype=np.uint16)
        alpha = RNG.integers(2**14, 2**16, (9, 6, 1), np.uint16)
        stored = np.dstack([np.rint(straight * (alpha / 65535)).astype(np.uint16), alpha])
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, extrasamples=["assocalpha"])
        picture = read_image(tmp_path / "a.tif")
        np.testing.assert_allclose(picture.pixels.astype(int), straight, atol=3)
        np.testing.assert_array_equal(picture.alpha, alpha[..., 0])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "sixteen.tif", "sixteen.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset(tmp_path: Path, name: str, orientation: int) -> None:
    path = tmp_path / name
    stored = random_pixels(6, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    Image.fromarray(stored).save(path, exif=exif, quality=100, subsampling=0)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    if name == "sixteen.tif":
        stored = random_pixels(6, 4, 3, dtype=np.uint16)
        tifffile.imwrite(path, stored, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    elif name == "sixteen.png":
        data = path.read_bytes()
        at = data.index(b"eXIf")
        length = int.from_bytes(data[at - 4 : at], "big")
        write_image(path, DecodedImage(random_pixels(6, 4, 3, dtype=np.uint16)))
        stored = read_image(path).pixels
        plain = path.read_bytes()
        path.write_bytes(plain[:33] + data[at - 4 : at + 8 + length] + plain[33:])
    if name.startswith("sixteen"):
        marked = np.arange(24, dtype=np.uint8).reshape(6, 4)
        turned = io.BytesIO()
        Image.fromarray(marked).save(turned, "PNG", exif=exif)
        with Image.open(turned) as image:
            order = np.asarray(ImageOps.exif_transpose(image))
        upright = stored.reshape(24, 3)[order]
    picture = read_image(path)
    np.testing.assert_array_equal(picture.pixels, upright)
    assert image_size(path) == (picture.width, picture.height)
    write_image(tmp_path / "again.png", picture)
    with Image.open(tmp_path / "again.png") as image:
        assert image.getexif().get(0x0112, 1) == 1
        if not name.startswith("sixteen"):
            assert image.getexif()[0x010F].rstrip("\0") == "Maker"


def test_gray_palette_is_gray(tmp_path: Path) -> None:
    gray = random_pixels(5, 5)
    Image.fromarray(gray).convert("P").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels[..., 0], gray)


def test_profile_and_dpi_survive_a_jpeg(tmp_path: Path) -> None:
    picture = DecodedImage(random_pixels(8, 8, 3), metadata=Metadata(SRGB, dpi=(240, 240)))
    write_image(tmp_path / "a.jpg", picture)
    assert read_image(tmp_path / "a.jpg").metadata.icc == SRGB
    assert read_image(tmp_path / "a.jpg").metadata.dpi == (240, 240)


def test_stale_exif_is_dropped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "Model"
    exif[0x8769] = {0xA002: 4000, 0xA003: 3000, 0x8827: 100}  # width, height, ISO
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "a.jpg", exif=exif)
    write_image(tmp_path / "b.jpg", read_image(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif()[0x0110] == "Model"
        assert image.getexif().get_ifd(0x8769) == {0xA002: 8, 0xA003: 8, 0x8827: 100}


def test_alpha_is_laid_on_white_for_jpeg(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", DecodedImage(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)))
    assert (read_image(tmp_path / "a.jpg").pixels == 255).all()


def test_from_float_rounds_clips_and_refuses_nan() -> None:
    values = np.array([[-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]], np.float32)
    assert DecodedImage.from_float(values).pixels.ravel().tolist() == [0, 0, 0, 1, 255, 255]
    exact = random_pixels(4, 4, 3, dtype=np.uint16)
    np.testing.assert_array_equal(DecodedImage.from_float(DecodedImage(exact).to_float(), bits=16).pixels, exact)
    with pytest.raises(ValueError, match="finite"):
        DecodedImage.from_float(np.array([[np.nan]]))


def good_png() -> bytes:
    target = io.BytesIO()
    Image.fromarray(random_pixels(40, 40, 3)).save(target, "PNG")
    return target.getvalue()


def bomb() -> bytes:
    data = bytearray(good_png())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not a PNG"),
        (good_png()[:2000], "damaged"),
        (good_png()[:20], "damaged"),
        (good_png()[:100] + b"\0" * 50 + good_png()[150:], "damaged"),
        (bomb(), "too large"),
        (b"GIF89a" + b"\0" * 50, "not a PNG"),
    ],
)
def test_broken_files_are_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"broken\.png.*{reason}"):
        read_image(path)


def test_truncation_is_found_after_pyiqa_switched_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    Image.fromarray(random_pixels(64, 64, 3)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path / "a.jpg")


def test_missing_and_unsupported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_image(tmp_path / "none.png")
    tifffile.imwrite(tmp_path / "f.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(InputError, match="32-bit"):
        read_image(tmp_path / "f.tif")


def test_size_limits_are_reported() -> None:
    check_size(Path("a.jpg"), 65535, 1)
    with pytest.raises(InputError, match="JPEG"):
        check_size(Path("a.jpg"), 65536, 1)
    with pytest.raises(InputError, match="WEBP"):
        check_size(Path("a.webp"), 1, 16384)
    with pytest.raises(InputError, match="GIF"):
        check_size(Path("a.gif"), 65536, 1)
    with pytest.raises(InputError, match=r"\.ico"):
        check_size(Path("a.ico"), 1, 1)


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".cache/d.png", "note.txt", "sub/deep/ä ö.tiff"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    relative = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert relative == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/ä ö.tiff"]
    assert [path.name for path in find_images(tmp_path, recursive=False)] == ["a.JPG", "b.png"]
    with pytest.raises(InputError, match="no such folder"):
        find_images(tmp_path / "none")
    with pytest.raises(InputError, match="not a folder"):
        find_images(tmp_path / "b.png")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(path, DecodedImage(np.zeros((4, 4, 3), np.uint8)))
    before = path.read_bytes()

    def interrupted() -> Iterator[np.ndarray]:
        yield np.ones((2, 4, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_images(path, [ImageStream(ImageSpec(4, 4, 3), interrupted())])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# --- metadata, pages, streaming ---------------------------------------------------------------------------------

XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmp:Rating="4" tiff:Orientation="6" tiff:ImageWidth="40"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif", "heic", "jxl"])
def test_metadata_of_a_jpeg_survive_in_every_format(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif[0x8769] = {0x9003: "2020:01:02 03:04:05", 0x8827: 200}
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0)}
    source = Image.fromarray(random_pixels(16, 24, 3))
    source.save(tmp_path / "a.jpg", exif=exif, xmp=XMP, icc_profile=SRGB, dpi=(300, 300))
    path = tmp_path / f"b.{suffix}"
    write_image(path, read_image(tmp_path / "a.jpg"))
    with Image.open(path) as image:
        assert image.size == (16, 24)
        found = image.getexif()
        assert found.get(0x0112, 1) == 1
        assert found[0x010F].rstrip("\0") == "Maker"
        assert found.get_ifd(0x8769) == {0x9003: "2020:01:02 03:04:05", 0x8827: 200}
        assert found.get_ifd(0x8825) == {1: "N", 2: (52.0, 30.0, 0.0)}
        if suffix != "jxl":  # the plugin writes no profile
            assert image.info["icc_profile"] == SRGB
        xmp = path.read_bytes() if suffix == "jxl" else image.info["xmp"]  # … and reads no XMP
        assert b'Rating="4"' in xmp
        assert b'Orientation="1"' in xmp
        assert b'ImageWidth="16"' in xmp
        if suffix in ("png", "jpg", "tif"):
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert read_image(path).metadata.xmp == read_image(tmp_path / "a.jpg").metadata.xmp


# --- HEIC and JPEG XL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_heic_of_any_depth_is_read_whole(tmp_path: Path, mode: str, bits: int) -> None:
    top, count = (1 << bits) - 1, len(mode)
    levels = np.linspace(0, top, 96 * 64).astype(np.uint16).reshape(64, 96, 1).repeat(count, axis=2)
    data = levels.astype(np.uint8) if bits == 8 else levels
    file = pillow_heif.from_bytes(mode if bits == 8 else f"{mode};{bits}", (96, 64), data.tobytes())
    file.save(tmp_path / "a.heic", quality=100, chroma=444, bit_depth=bits)
    picture = read_image(tmp_path / "a.heic")
    assert picture.bits == (8 if bits == 8 else 16)
    np.testing.assert_allclose(picture.to_float() * top, levels[..., :3], atol=max(0.003 * top, 1.01))
    assert image_size(tmp_path / "a.heic") == (96, 64)


@pytest.mark.parametrize(("channels", "alpha"), [(1, False), (1, True), (3, False), (3, True)])
def test_sixteen_bits_become_ten_in_heic(tmp_path: Path, channels: int, alpha: bool) -> None:
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    picture = DecodedImage(np.repeat(ramp[..., None], channels, axis=2), ramp if alpha else None)
    write_image(tmp_path / "a.heic", picture, quality=100)
    read = read_image(tmp_path / "a.heic")
    assert (read.bits, read.channels, read.alpha is not None) == (16, channels, alpha)
    assert len(np.unique(read.pixels)) > 512  # more than 8 bits, or 9
    np.testing.assert_allclose(read.to_float(), picture.to_float(), atol=0.003)
    assert read.pixels.max() == 65535


def test_jpeg_xl_is_lossless_when_asked_and_keeps_16_bits_of_gray(tmp_path: Path) -> None:
    colour = DecodedImage(random_pixels(20, 30, 3), random_pixels(20, 30))
    write_image(tmp_path / "a.jxl", colour, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jxl").interleaved, colour.interleaved)
    gray = DecodedImage(random_pixels(20, 30, 1, dtype=np.uint16))
    write_image(tmp_path / "b.jxl", gray, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "b.jxl").pixels, gray.pixels)
    write_image(tmp_path / "c.jxl", DecodedImage(random_pixels(20, 30, 3, dtype=np.uint16)))
    assert read_image(tmp_path / "c.jxl").bits == 8


def test_jpeg_xl_of_another_colour_space_becomes_srgb(tmp_path: Path) -> None:
    # A profile whose primaries are turned round: what it calls red is green.
    profile = bytearray(SRGB)
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    write_image(
        tmp_path / "a.jxl", DecodedImage(np.full((8, 8, 3), (255, 0, 0), np.uint8), metadata=Metadata(bytes(profile)))
    )
    np.testing.assert_allclose(read_image(tmp_path / "a.jxl").pixels[4, 4], (0, 255, 0), atol=3)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 48), (300, 200), (7, 600), (9000, 2), (256, 128), (13, 5)])
def test_the_size_of_a_jpeg_xl_is_in_its_head(tmp_path: Path, size: tuple[int, int]) -> None:
    for container in (False, True):
        Image.fromarray(random_pixels(size[1], size[0])).save(tmp_path / "a.jxl", use_container=container, effort=1)
        assert image_size(tmp_path / "a.jxl") == size


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_a_jpeg_inside_a_jpeg_xl_is_turned_once(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(random_pixels(16, 24, 3)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl", lossless_jpeg=True)
    upright = read_image(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jxl").pixels, upright.pixels)
    assert image_size(tmp_path / "a.jxl") == (upright.width, upright.height)


def test_the_size_is_checked_before_a_jpeg_xl_is_decoded(tmp_path: Path) -> None:
    # 2^30 x 2^30 pixels in 12 bytes: sides of 30 bits.
    bits = 0 | 3 << 1 | ((1 << 30) - 1) << 3 | 0 << 33 | 3 << 36 | ((1 << 30) - 1) << 38
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bits.to_bytes(20, "little"))
    for read in (read_image, image_size):
        with pytest.raises(InputError, match="too large"):
            read(tmp_path / "a.jxl")


@pytest.mark.parametrize(
    ("suffix", "module", "name"), [("heic", "pillow_heif", "HEIC"), ("jxl", "pillow_jxl", "JPEG XL")]
)
def test_a_missing_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, name: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    write_image(path, DecodedImage(random_pixels(16, 16, 3)))
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"{name} needs a plugin.*pip install 'pdd-cli\[formats\]'"
    with pytest.raises(InputError, match=rf"a\.{suffix}: {message}"):
        read_image(path)
    with pytest.raises(InputError, match=message):
        write_image(path, DecodedImage(random_pixels(16, 16, 3)))


@pytest.mark.parametrize("bits", [8, 16])
def test_pages_of_a_tiff(tmp_path: Path, bits: int) -> None:
    dtype = {8: np.uint8, 16: np.uint16}[bits]
    pages = [random_pixels(5 + n, 9, 3, dtype=dtype) for n in range(3)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in pages:
            writer.write(page, photometric="rgb")
    path = tmp_path / "a.tif"
    read = list(decode_pages(path, path.read_bytes()))
    for picture, page in zip(read, pages, strict=True):
        np.testing.assert_array_equal(picture.pixels, page)
    write_images(tmp_path / "b.tif", [ImageStream(p.spec, [p.interleaved]) for p in read], count=3)
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        for page, expected in zip(file.pages, pages, strict=True):
            np.testing.assert_array_equal(page.asarray(), expected)


def test_pages_that_need_more_than_4_gib_together_become_a_big_tiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = DecodedImage(random_pixels(20, 30, 3))
    monkeypatch.setattr(tiff, "_BIG_TIFF", 2 * picture.pixels.nbytes)
    for count, is_big in ((1, False), (2, False), (3, True)):
        streams = [ImageStream(picture.spec, [picture.pixels]) for _ in range(count)]
        write_images(tmp_path / "a.tif", streams, count=count)
        with tifffile.TiffFile(tmp_path / "a.tif") as file:
            assert (file.is_bigtiff, len(file.pages)) == (is_big, count)
            np.testing.assert_array_equal(file.pages[count - 1].asarray(), picture.pixels)


def test_a_small_first_page_does_not_hide_that_the_others_need_a_big_tiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [random_pixels(4, 5, 3), random_pixels(20, 30, 3), random_pixels(20, 30)]
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb" if page.ndim == 3 else "minisblack")
    read = list(decode_pages(tmp_path / "in.tif", (tmp_path / "in.tif").read_bytes()))
    total = sum(page.nbytes for page in pages)
    for limit, is_big in ((total - 1, True), (total, False)):
        monkeypatch.setattr(tiff, "_BIG_TIFF", limit)
        streams = [ImageStream(page.spec, [page.interleaved], share=page.share) for page in read]
        write_images(tmp_path / "a.tif", streams, count=3)
        with tifffile.TiffFile(tmp_path / "a.tif") as written:
            assert (written.is_bigtiff, len(written.pages)) == (is_big, 3)
            np.testing.assert_array_equal(written.pages[2].asarray(), pages[2])


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_frames_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(random_pixels(8, 9, 3)) for _ in range(3)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[40, 80, 120], lossless=True)
    read = list(decode_pages(path, path.read_bytes()))
    for picture, frame in zip(read, frames, strict=True):
        np.testing.assert_array_equal(picture.pixels, np.asarray(frame))
    again = tmp_path / f"b.{suffix}"
    streams = [ImageStream(p.spec, [p.interleaved], duration=p.duration) for p in read]
    write_images(again, streams, count=3, encoding=Encoding(lossless=True))
    with Image.open(again) as image:
        for index, frame in enumerate(frames):
            image.seek(index)
            image.load()
            assert image.info["duration"] == (40, 80, 120)[index]
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(frame))


def animation(ops: list[tuple[int, int]], *, hidden: bool, colour: int, bits: int = 8) -> bytes:
    """An animated PNG of three frames, the second half transparent if `colour` has alpha; `hidden`: after a still."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    layers = [(np.full((12, 16, samples), 200), 0, 0), (np.full((4, 5, samples), 128), 3, 2)]
    layers += [(np.full((3, 3, samples), 60), 10, 6)]
    if colour in (4, 6):
        layers[0][0][..., -1] = layers[2][0][..., -1] = 255
    content = [png.SIGNATURE, png.chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 12, bits, colour, 0, 0, 0))]
    content += [png.chunk(b"acTL", struct.pack(">II", 3, 0))]

    def packed(pixels: np.ndarray) -> bytes:
        stored = pixels.astype(np.uint8) if bits == 8 else (pixels * 257).astype(">u2")
        return zlib.compress(b"".join(b"\0" + row.tobytes() for row in stored))

    if hidden:
        content.append(png.chunk(b"IDAT", packed(np.full((12, 16, samples), 7))))
    number = 0
    for (pixels, left, top), (disposal, blending) in zip(layers, ops, strict=True):
        height, width = pixels.shape[:2]
        place = struct.pack(">5I2H2B", number, width, height, left, top, 1, 10, disposal, blending)
        content.append(png.chunk(b"fcTL", place))
        if number == 0 and not hidden:
            content.append(png.chunk(b"IDAT", packed(pixels)))
        else:
            number += 1
            content.append(png.chunk(b"fdAT", struct.pack(">I", number) + packed(pixels)))
        number += 1
    return b"".join([*content, png.chunk(b"IEND", b"")])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("ops", [[(0, 0), (0, 1), (0, 1)], [(0, 0), (1, 1), (0, 1)], [(0, 0), (2, 1), (0, 0)]])
@pytest.mark.parametrize("colour", [2, 4, 6])
def test_frames_are_blended_as_ffmpeg_does(
    tmp_path: Path, ops: list[tuple[int, int]], hidden: bool, colour: int
) -> None:
    """Pillow mixes the alpha of a half transparent frame like a colour: opaque pixels become holes."""
    data = animation(ops, hidden=hidden, colour=colour)
    with av.open(io.BytesIO(data), format="apng") as container:
        expected = [frame.to_ndarray(format="rgba") for frame in container.decode(video=0)]
    assert len(expected) == 3
    for picture, shown in zip(decode_pages(tmp_path / "a.png", data), expected, strict=True):
        assert picture.frames == 3
        assert picture.duration == 100
        pixels = np.broadcast_to(picture.pixels, (12, 16, 3)).astype(int)
        alpha = np.full((12, 16), 255) if picture.alpha is None else picture.alpha.astype(int)
        assert colour == 2 or np.abs(alpha - shown[..., 3]).max() <= 1  # FFmpeg clears RGB to black
        assert np.abs(pixels - shown[..., :3])[shown[..., 3] > 0].max() <= 1


@pytest.mark.parametrize("colour", [0, 2, 6])
def test_an_animation_of_16_bits_has_the_same_pixels_in_8(tmp_path: Path, colour: int) -> None:
    ops = [(0, 0), (0, 1), (0, 1)]
    deep, plain = (
        [p.pixels for p in decode_pages(tmp_path / "a.png", animation(ops, hidden=False, colour=colour, bits=bits))]
        for bits in (16, 8)
    )
    np.testing.assert_array_equal(deep, plain)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("samples", "bits"), [(1, 8), (3, 16), (4, 8)])
def test_bands_of_any_height_make_the_same_file(tmp_path: Path, suffix: str, samples: int, bits: int) -> None:
    pixels = random_pixels(601, 300, samples, dtype={8: np.uint8, 16: np.uint16}[bits])
    pixels[100:400] = np.arange(300)[:, None] // 3  # rows for the filters to work on
    spec = ImageSpec(300, 601, samples - (samples == 4), samples == 4, bits)
    for name, cuts in (("a", [601]), ("b", [1, 2, 257, 600])):
        bands = np.split(pixels, cuts)
        write_images(tmp_path / f"{name}.{suffix}", [ImageStream(spec, [band for band in bands if len(band)])])
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}").interleaved, pixels)
    np.testing.assert_array_equal(read_image(tmp_path / f"b.{suffix}").interleaved, pixels)


def mutated(data: bytes, kind: int, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    if kind == 0:
        return bytes(changed[: rng.integers(1, len(data))])
    for at in rng.integers(0, min(len(data), 200) if kind == 1 else len(data), 1 + 8 * kind):
        changed[at] = rng.integers(0, 256)
    if kind == 3:
        at, length = sorted(rng.integers(0, len(data), 2))
        del changed[at:length]
    return bytes(changed)


def test_hostile_files_are_read_or_refused(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a file"):
        read_image(tmp_path / "pipe.png")
    refused = []
    for name, data in handmade(16 << 20):
        path = tmp_path / name
        path.write_bytes(data)
        try:
            picture = read_image(path)
            assert picture.width * picture.height <= MOST_PIXELS
        except InputError as error:
            refused.append(error.message.replace(f"{path}: ", "FILE "))
    assert len(refused) >= 25
    assert all("FILE" in message and "\n" not in message for message in refused)


def test_a_compression_that_needs_more_is_named(tmp_path: Path) -> None:
    values = random_pixels(9, 6, 2, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", extrasamples=["unassalpha"])
    data = (tmp_path / "a.tif").read_bytes()
    at = data.index(b"\x03\x01\x03\x00")  # the tag of the compression, a short
    (tmp_path / "a.tif").write_bytes(data[: at + 8] + b"\x05" + data[at + 9 :])
    with pytest.raises(InputError, match="LZW compression") as caught:
        read_image(tmp_path / "a.tif")
    assert "imagecodecs" in caught.value.hint


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "AVIF", "HEIF", "JXL"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, format: str) -> None:
    rng = np.random.default_rng(0)
    target = io.BytesIO()
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2020:01:02 03:04:05"}
    options = {} if format == "TIFF" else {"exif": exif.tobytes() if format == "JXL" else exif}
    Image.fromarray(random_pixels(24, 20, 3)).save(target, format, **options)
    path = tmp_path / "a.png"
    refused = 0
    for index in range(60):
        path.write_bytes(mutated(target.getvalue(), index % 4, rng))
        try:
            picture = read_image(path)
            assert picture.width * picture.height <= MOST_PIXELS
        except InputError:
            refused += 1
    assert 5 < refused <= 60


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(700, 130, 3), (3, 70_000, 2), (1, 1, 1), (0, 5, 3), (200_000,)])
def test_floats_become_the_nearest_integers(bits: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).uniform(-0.2, 1.2, shape).astype(np.float32)
    top = 2**bits - 1
    found = from_float(values, bits)
    assert found.dtype.itemsize * 8 == bits
    exact = values.astype(np.float64).clip(0, 1) * top
    assert (np.abs(found - exact) <= 0.5 + (1e-4 if bits == 8 else 0)).all()
    if values.size:
        values.flat[-1] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            from_float(values, bits)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp", "avif"])
def test_a_file_that_lacks_an_image_or_a_row_is_no_output(tmp_path: Path, suffix: str) -> None:
    whole = random_pixels(256, 20, 3)
    path = tmp_path / f"a.{suffix}"
    for images, bands in ((2, [whole]), (3, [whole[:100]]), (3, [whole, whole[:1]])):
        streams = [ImageStream(ImageSpec(20, 256, 3), bands, duration=100) for _ in range(images)]
        with pytest.raises((PddError, ValueError)):
            write_images(path, streams, count=3)
        assert not list(tmp_path.iterdir())


# --- kinds of files that others write ---------------------------------------------------------------------------


def with_chunk(data: bytes, kind: bytes, content: bytes, *, damaged: bool = False) -> bytes:
    """The PNG `data` with a chunk more, behind its header."""
    checksum = zlib.crc32(kind + content) ^ damaged
    return data[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum) + data[33:]


def encoded(pixels: np.ndarray, format: str, **options: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format, **options)
    return target.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_white_may_be_zero(tmp_path: Path, dtype: type, planar: str, alpha: bool, compression: str | None) -> None:
    gray = random_pixels(9, 6, dtype=dtype)
    clear = random_pixels(9, 6, dtype=dtype)
    stored = np.iinfo(dtype).max - gray
    options: dict[str, object] = {}
    if alpha:
        stored = np.stack([stored, clear], axis=0 if planar == "separate" else -1)
        options = {"planarconfig": planar, "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite", compression=compression, **options)
    picture = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.pixels[..., 0], gray)
    if alpha:
        np.testing.assert_array_equal(picture.alpha, clear)


def test_one_bit_where_white_is_zero(tmp_path: Path) -> None:
    bits = random_pixels(9, 16) > 127
    for compression in (None, "group4", "tiff_lzw"):
        options = {} if compression is None else {"compression": compression}
        Image.fromarray(bits).save(tmp_path / "a.tif", tiffinfo={262: 0}, **options)
        with Image.open(tmp_path / "a.tif") as image:
            expected = np.asarray(image.convert("L"))
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[..., 0], expected)


def test_extra_bands_are_no_alpha_and_named(tmp_path: Path) -> None:
    values = random_pixels(9, 6, 5)
    for count, extra, alpha in ((4, ["unspecified"], None), (5, ["unspecified", "unassalpha"], 4), (4, None, 3)):
        options = {} if extra is None else {"extrasamples": extra}
        tifffile.imwrite(tmp_path / "a.tif", values[..., :count], photometric="rgb", **options)
        if extra is None:  # as old programs have it: without the tag
            data = (tmp_path / "a.tif").read_bytes().replace(struct.pack("<H", 338), struct.pack("<H", 32999))
            (tmp_path / "a.tif").write_bytes(data)
        picture = read_image(tmp_path / "a.tif")
        np.testing.assert_array_equal(picture.pixels, values[..., :3])
        assert (picture.alpha is None) == (alpha is None)
        if alpha is not None:
            np.testing.assert_array_equal(picture.alpha, values[..., alpha])
        assert any("bands" in name for name in picture.metadata.lost) == (extra is not None)


def test_cmyk_of_16_bits_is_that_of_8(tmp_path: Path) -> None:
    inks = random_pixels(9, 6, 4)
    tifffile.imwrite(tmp_path / "a.tif", inks.astype(np.uint16) * 257, photometric="separated")
    expected = np.asarray(Image.frombytes("CMYK", (6, 9), inks.tobytes()).convert("RGB"))
    picture = read_image(tmp_path / "a.tif")
    assert picture.bits == 16
    np.testing.assert_allclose(picture.pixels / 257, expected, atol=1)


@pytest.mark.parametrize(
    ("dtype", "reason"), [(np.float32, "floating-point"), (np.int16, "signed"), (np.uint32, "32-bit integers")]
)
@pytest.mark.parametrize("shape", [(9, 6), (9, 6, 3)])
def test_values_without_a_white_are_refused_for_that(
    tmp_path: Path, dtype: type, reason: str, shape: tuple[int, ...]
) -> None:
    photometric = "rgb" if len(shape) == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, dtype), photometric=photometric)
    for read in (read_image, image_size):
        with pytest.raises(InputError, match=reason) as caught:
            read(tmp_path / "a.tif")
        assert "16-bit" in caught.value.hint


def test_reduced_copies_are_no_pages(tmp_path: Path) -> None:
    large = random_pixels(64, 64, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(large, photometric="rgb", subifds=1)
        writer.write(large[::2, ::2], photometric="rgb", subfiletype=1)
        writer.write(large[::4, ::4], photometric="rgb", subfiletype=1)
        writer.write(large[:9], photometric="rgb")
    pages = list(decode_pages(tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes()))
    assert [(page.height, page.frames) for page in pages] == [(64, 2), (9, 2)]
    assert any("reduced copies" in name for name in pages[0].metadata.lost)


def test_camera_raw_is_refused_by_content_and_by_name(tmp_path: Path) -> None:
    thumbnail = random_pixels(12, 16, 3)
    for kind, tags in ((32803, [(50706, 1, 4, (1, 4, 0, 0), True)]), (32803, []), (34892, [])):
        with tifffile.TiffWriter(tmp_path / "photo.tif") as writer:  # as DNG, NEF, PEF and others are made
            writer.write(thumbnail, photometric="rgb", subifds=1, subfiletype=1, extratags=tags)
            shape = (48, 64) if kind == 32803 else (48, 64, 3)
            writer.write(random_pixels(*shape, dtype=np.uint16), photometric=kind, subfiletype=0)
        for read in (read_image, image_size):
            with pytest.raises(InputError, match="camera RAW") as caught:
                read(tmp_path / "photo.tif")
            assert "Develop" in caught.value.hint
    heads = {"cr2": b"II*\0\x10\0\0\0CR\2\0", "rw2": b"IIU\0\x08\0\0\0", "orf": b"IIRO\x08\0\0\0"}
    heads |= {"raf": b"FUJIFILMCCD-RAW 0201", "cr3": b"\0\0\0\x18ftypcrx ", "nef": encoded(thumbnail, "TIFF")}
    for suffix, head in heads.items():
        for name in (f"photo.{suffix}", "photo.jpg"):
            if name != "photo.jpg" or suffix != "nef":  # this one is a plain TIFF but for its name
                (tmp_path / name).write_bytes(head + bytes(500))
                with pytest.raises(InputError, match="camera RAW"):
                    read_image(tmp_path / name)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(9, 6, channels, dtype=np.uint16)
    pixels[:4, :3] = (1234, 5678, 9012)[:channels]
    pixels[5, 5] = 1234  # of RGB one channel alone is another colour
    write_image(tmp_path / "a.png", DecodedImage(pixels))
    key = struct.pack(f">{channels}H", *(1234, 5678, 9012)[:channels])
    (tmp_path / "a.png").write_bytes(with_chunk((tmp_path / "a.png").read_bytes(), b"tRNS", key))
    picture = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels, pixels)
    clear = (pixels == np.array((1234, 5678, 9012)[:channels])).all(axis=2)
    np.testing.assert_array_equal(picture.alpha, np.where(clear, 0, 65535))
    assert clear.sum() == 12 + (channels == 1)


@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, (0xF800, 0x07E0, 0x001F, 0)),
        (16, (0x7C00, 0x03E0, 0x001F, 0x8000)),
        (16, (0x0F00, 0x00F0, 0x000F, 0xF000)),
        (32, (0x000000FF, 0x0000FF00, 0x00FF0000, 0xFF000000)),
        (32, (0x3FF00000, 0x000FFC00, 0x000003FF, 0xC0000000)),
    ],
)
@pytest.mark.parametrize("header", [40, 108, 124])
@pytest.mark.parametrize("top_down", [False, True])
def test_bit_fields_of_a_bmp(tmp_path: Path, bits: int, masks: tuple[int, ...], header: int, top_down: bool) -> None:
    if header == 40 and masks[3]:
        masks = (*masks[:3], 0)  # which it has no place for
    values = RNG.integers(0, 2**bits, (5, 7), np.uint32)
    rows = np.zeros((5, -(-7 * bits // 32) * 32 // bits), f"<u{bits // 8}")
    rows[:, :7] = values if top_down else values[::-1]
    start = 14 + header + (12 if header == 40 else 0)
    info = struct.pack("<IiiHHIIiiII", header, 7, -5 if top_down else 5, 1, bits, 3, rows.nbytes, 0, 0, 0, 0)
    info += struct.pack("<4I", *masks)[: 12 if header == 40 else 16]
    body = info.ljust(start - 14, b"\0") + rows.tobytes()
    (tmp_path / "a.bmp").write_bytes(struct.pack("<2sIHHI", b"BM", 14 + len(body), 0, 0, start) + body)
    picture = read_image(tmp_path / "a.bmp")
    assert image_size(tmp_path / "a.bmp") == (7, 5)
    for channel, mask in enumerate(masks):
        if mask:
            lowest = mask & -mask
            expected = np.rint((values & mask) // lowest * (255 / (mask // lowest)))
            found = picture.alpha if channel == 3 else picture.pixels[..., channel]
            np.testing.assert_array_equal(found, expected)
    (tmp_path / "a.bmp").write_bytes((tmp_path / "a.bmp").read_bytes()[:-3])
    with pytest.raises(InputError, match="truncated"):
        read_image(tmp_path / "a.bmp")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_may_lack_its_end_mark_but_no_pixels(tmp_path: Path, mode: str, progressive: bool) -> None:
    target = io.BytesIO()
    Image.fromarray(random_pixels(40, 40, 3)).convert(mode).save(target, "JPEG", progressive=progressive)
    data, path = target.getvalue(), tmp_path / "a.jpg"
    path.write_bytes(data)
    whole = read_image(path)
    assert whole.notes == ()
    for end in (-1, -2):
        path.write_bytes(data[:end])
        picture = read_image(path)
        np.testing.assert_array_equal(picture.pixels, whole.pixels)
        assert picture.notes == ("its end mark is missing",)
    for missing in (5, 8, 20, 100, len(data) // 2):
        path.write_bytes(data[:-missing])
        with pytest.raises(InputError, match="damaged"):
            read_image(path)


def test_damage_beside_the_pixels_of_a_png_is_noted(tmp_path: Path) -> None:
    pixels = random_pixels(40, 40, 3)
    data, path = encoded(pixels, "PNG"), tmp_path / "a.png"
    large = zlib.compress(SRGB + bytes(1_500_000))
    for changed, note in (
        (with_chunk(data, b"tEXt", b"Comment\0hello", damaged=True), "tEXt"),
        (with_chunk(data, b"zTXt", b"Comment\0\0nothing compressed"), "zTXt"),
        (with_chunk(data, b"iCCP", b"name\0\0nothing compressed"), "colour profile"),
        (with_chunk(data, b"eXIf", b"garbage!garbage!"), "EXIF"),
        (with_chunk(data, b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000)), ""),
        (with_chunk(data, b"tEXt", b"workflow\0" + b"x" * 2_000_000), ""),
        (with_chunk(data, b"iCCP", b"name\0\0" + large), ""),
        (data[:-12], "end mark"),
        (data + b"garbage" * 50, ""),
    ):
        path.write_bytes(changed)
        picture = read_image(path)
        np.testing.assert_array_equal(picture.pixels, pixels)
        assert (note in " ".join(picture.notes)) if note else picture.notes == ()
        assert image_size(path) == (40, 40)
    at = data.index(b"IDAT") + 100
    for changed in (data[:-40], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
        path.write_bytes(changed)
        with pytest.raises(InputError, match="damaged"):
            read_image(path)


@pytest.mark.parametrize("order", [b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0"])
def test_exif_with_a_thumbnail_alone_is_not_damaged(tmp_path: Path, order: bytes) -> None:
    thumbnail = order + b"\0\0" + b"\0" * 40  # no tags in the first directory
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + thumbnail)
    assert not read_image(tmp_path / "a.jpg").notes


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_garbage_for_exif_is_noted(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(random_pixels(20, 20, 3), format, exif=b"Exif\0\0garbage!garbage!"))
    assert read_image(path).notes == ("its EXIF is damaged and left out",)


def test_the_content_decides_whatever_the_name(tmp_path: Path) -> None:
    pixels = random_pixels(20, 24, 3)
    for format in ("PNG", "WEBP", "BMP", "TIFF", "JXL", "GIF"):
        options = {"lossless": True} if format in ("WEBP", "JXL") else {}
        stored = np.full_like(pixels, (10, 200, 30)) if format == "GIF" else pixels
        for name in ("a.jpg", "a.tif", "a.heic", "a"):
            (tmp_path / name).write_bytes(encoded(stored, format, **options))
            np.testing.assert_array_equal(read_image(tmp_path / name).pixels, stored)
            assert image_size(tmp_path / name) == (24, 20)
    names = ("a.jfif", "b.jpe", "c.JIF", "d.apng", "e.dib", "f.hif", "g.avifs")
    for name in names:
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / name).touch()
    assert [path.name for path in find_images(tmp_path / "sub")] == list(names)


@pytest.mark.parametrize("depth", [10, 12])
def test_avif_of_more_than_8_bits_keeps_them_and_its_colours(tmp_path: Path, depth: int) -> None:
    levels = np.linspace(0, (1 << depth) - 1, 64 * 48).astype(np.uint16).reshape(48, 64, 1).repeat(3, axis=2)
    data = cv2.imencode(".avif", levels, [cv2.IMWRITE_AVIF_QUALITY, 100, cv2.IMWRITE_AVIF_DEPTH, depth])[1].tobytes()
    at = data.index(b"colrnclx")
    path = tmp_path / "a.avif"
    path.write_bytes(data[: at + 8] + struct.pack(">HH", 9, 16) + data[at + 12 :])  # BT.2020 and PQ
    picture = read_image(path)
    assert (picture.bits, picture.metadata.cicp) == (16, (9, 16, 0, 1))
    np.testing.assert_allclose(picture.to_float(), levels / ((1 << depth) - 1), atol=0.004)
    assert len(np.unique(picture.pixels)) > 600
    for suffix in ("png", "heic"):
        write_image(tmp_path / f"b.{suffix}", picture)
        again = read_image(tmp_path / f"b.{suffix}")
        assert (again.bits, again.metadata.cicp) == (16, (9, 16, 0, 1))
        np.testing.assert_allclose(again.to_float(), picture.to_float(), atol=0.004)
    for suffix in ("avif", "jpg", "webp", "tif", "jxl", "bmp"):
        with pytest.raises(InputError, match="PQ"):
            write_image(tmp_path / f"b.{suffix}", picture)


@pytest.mark.slow
def test_a_package_that_cannot_be_loaded_is_not_blamed_on_the_image(tmp_path: Path) -> None:
    """A server without libGL, and OpenCV for desktops, which facexlib asks for."""
    (tmp_path / "cv2").mkdir()
    reason = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2/__init__.py").write_text(f"raise ImportError({reason!r})\n")
    write_image(tmp_path / "deep.png", DecodedImage(np.full((4, 4, 3), 300, np.uint16)))
    read = f"from pdd_cli.imaging.decode import read_image; read_image(Path({str(tmp_path / 'deep.png')!r}))"
    score = "import sys; from pdd_cli.cli import main; sys.argv = ['pdd', 'evaluate', 'a.png']; main()"
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    for program in (read, score):
        done = subprocess.run(
            [sys.executable, "-c", f"from pathlib import Path; {program}"],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (1 if program is read else 2), done.stderr
        last = done.stderr[done.stderr.rindex("rror: ") :]
        assert "a package cannot be loaded: libGL.so.1" in last
        assert "damaged" not in last
        assert "bug" not in last
    assert "opencv-python-headless" in last
