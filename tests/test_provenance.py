"""What an output says of its origin, against exiftool and ImageMagick, and that pdd knows its own files by it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from pdd_cli.imaging.decode import read_image
from pdd_cli.imaging.encode import write_images
from pdd_cli.imaging.formats import FORMATS
from pdd_cli.imaging.image import ImageSpec, ImageStream
from pdd_cli.imaging.metadata import Metadata
from pdd_cli.imaging.provenance import Provenance, made_by_pdd, source_of
from pdd_cli.version import __version__
from tests.helpers.images import photo
from tests.helpers.networks import compact
from tests.test_video import rgb_frames
from tests.test_video_options import lossless, needs_ffmpeg

MADE = Provenance("realsr", "ab" * 32, "x4, strength 0.5", "cd" * 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
HISTORY = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    b' xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"'
    b' xmlns:stEvt="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#" xmlns:my="urn:mine" my:note="a&#10;b &lt; c">'
    b"<dc:title><rdf:Alt><rdf:li xml:lang='x-default'>M\xc3\xb6we</rdf:li></rdf:Alt></dc:title>"
    b'<xmpMM:History><rdf:Seq><rdf:li stEvt:action="saved" stEvt:softwareAgent="GIMP"/></rdf:Seq></xmpMM:History>'
    b"</rdf:Description></rdf:RDF></x:xmpmeta>" + b" " * 200 + b'<?xpacket end="w"?>'
)

needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")


def write(path: Path, metadata: Metadata = Metadata(), pages: int = 1, pixels: np.ndarray = PIXELS) -> Path:
    spec = ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2])
    streams = [ImageStream(spec, [np.roll(pixels, page)], metadata, 40.0) for page in range(pages)]
    write_images(path, streams, count=pages, provenance=MADE)
    return path


def exiftool(path: Path) -> dict[str, object]:
    found = subprocess.run(["exiftool", "-json", "-G1", "-struct", path], capture_output=True, check=True)
    return dict(json.loads(found.stdout)[0])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("pages", [1, 3])
def test_every_format_says_who_made_it_until_it_is_changed(tmp_path: Path, suffix: str, pages: int) -> None:
    path = write(tmp_path / f"a{suffix}", pages=pages)
    assert made_by_pdd(path)
    assert source_of(path) == "cd" * 32
    with Image.open(path) as image:
        image.load()
        assert image.size == (40, 30)
    data = bytearray(path.read_bytes())
    for at in (len(data) // 2, len(data) - 1):
        data[at] ^= 1
        path.write_bytes(data)
        assert not made_by_pdd(path)
        data[at] ^= 1


@needs_exiftool
@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if FORMATS[suffix] not in ("BMP", "GIF", "TGA")])
def test_exiftool_reads_it(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0131] = "darktable 4.8"
    exif[0x010F] = "Canon"
    tags = exiftool(write(tmp_path / f"a{suffix}", Metadata(exif=exif.tobytes(), xmp=HISTORY)))
    text = f"pdd {__version__}: upscaled with realsr, x4, strength 0.5 (weights sha256 {'ab' * 32})"
    assert tags["IFD0:Software"] == text
    assert tags["IFD0:Make"] == "Canon"
    assert "algorithmically" in str(tags["XMP-iptcExt:DigitalSourceType"]).lower()
    assert tags["XMP-xmp:CreatorTool"] == "darktable 4.8"
    assert [event["SoftwareAgent"] for event in tags["XMP-xmpMM:History"]] == [
        "GIMP",
        "darktable 4.8",
        f"pdd {__version__}",
    ]
    assert tags["XMP-xmpMM:History"][-1]["Parameters"] == text
    assert tags["XMP-dc:Title"] == "Möwe"
    assert not [key for key in tags if "Warning" in key]


@needs_exiftool
@needs_ffmpeg
def test_a_gif_holds_xmp_where_exiftool_and_ffmpeg_expect_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    Image.fromarray(PIXELS).save(path, save_all=True, append_images=[Image.fromarray(255 - PIXELS)])
    subprocess.run(["exiftool", "-q", "-XMP-dc:Title=Möwe", "-XMP-xmp:Rating=4", path], check=True)
    tags = exiftool(write(tmp_path / "b.gif", read_image(path).metadata, pages=2))
    assert tags["XMP-dc:Title"] == "Möwe"
    assert tags["XMP-xmp:Rating"] == 4
    assert tags["XMP-xmpMM:History"][-1]["SoftwareAgent"] == f"pdd {__version__}"
    assert not [key for key in tags if "Warning" in key]
    decoded = subprocess.run(
        ["ffmpeg", "-v", "warning", "-i", tmp_path / "b.gif", "-f", "framecrc", "-"], capture_output=True, text=True
    )
    assert decoded.stderr == ""
    assert len([line for line in decoded.stdout.splitlines() if not line.startswith("#")]) == 2


def test_xmp_keeps_all_else_and_states_each_thing_once(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    path = write(tmp_path / "a.png", Metadata(xmp=HISTORY))
    again = read_image(path).metadata.xmp
    write_images(path, [ImageStream(ImageSpec(40, 30, 3), [PIXELS], Metadata(xmp=again))], provenance=MADE)
    xmp = read_image(path).metadata.xmp
    tree = ET.fromstring(xmp.decode())
    attributes = [(name, value) for element in tree.iter() for name, value in element.attrib.items()]
    assert ("{urn:mine}note", "a\nb < c") in attributes
    names = [name for name, _ in attributes]
    assert names.count("{urn:pdd-cli:provenance}Seal") == 1
    assert names.count("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == 1
    assert made_by_pdd(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("digitalCapture", "algorithmicallyEnhanced"),
        ("trainedAlgorithmicMedia", "trainedAlgorithmicMedia"),
        ("compositeWithTrainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"),
    ],
)
def test_generated_images_keep_their_source_type(tmp_path: Path, before: str, after: str) -> None:
    space = "http://cv.iptc.org/newscodes/digitalsourcetype/"
    xmp = HISTORY.replace(
        b"<dc:title>",
        b'<e:DigitalSourceType xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">%b</e:DigitalSourceType><dc:title>'
        % f"{space}{before}".encode(),
    )
    found = read_image(write(tmp_path / "a.webp", Metadata(xmp=xmp))).metadata.xmp
    assert found.count(b"DigitalSourceType=") == 1
    assert found.count(b"DigitalSourceType>") == 0
    assert f'"{space}{after}"'.encode() in found


@pytest.mark.parametrize(
    "xmp", [b"no XML", b"<a/>", b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>", b"\xff\xfe<\0", HISTORY[:300]]
)
def test_what_is_not_xmp_is_left_as_it_is(tmp_path: Path, xmp: bytes) -> None:
    path = write(tmp_path / "a.webp", Metadata(xmp=xmp))
    assert xmp in path.read_bytes()
    assert b"pdd " in path.read_bytes()  # in EXIF
    assert not made_by_pdd(path)


@needs_exiftool
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_a_file_edited_by_another_program_is_no_longer_pdds(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    subprocess.run(["exiftool", "-q", "-overwrite_original", "-XMP:Rating=5", path], check=True)
    assert not made_by_pdd(path)
    assert source_of(path) == "cd" * 32


@pytest.mark.parametrize(
    "content", [b"", b"pdd-seal-", b"pdd-seal-" + b"0" * 64, b"\x89PNG\r\n\x1a\npdd-seal-" + b"0" * 70]
)
def test_files_of_others_are_not_pdds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert not made_by_pdd(path)
    assert not made_by_pdd(tmp_path / "absent")


def test_deep_and_gray_images_too(tmp_path: Path) -> None:
    for suffix in (".png", ".tif", ".heic", ".bmp", ".webp", ".jxl", ".avif"):
        assert made_by_pdd(write(tmp_path / f"gray{suffix}", pixels=PIXELS[..., :1]))
    deep = PIXELS.astype(np.uint16) * 257
    for suffix in (".png", ".tif", ".heic"):
        path = tmp_path / f"deep{suffix}"
        write_images(path, [ImageStream(ImageSpec(40, 30, 3, bits=16), [deep])], provenance=MADE)
        assert made_by_pdd(path)


@pytest.mark.skipif(shutil.which("identify") is None, reason="ImageMagick is not installed")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_imagemagick_reads_it_without_a_warning(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    found = subprocess.run(["identify", "-verbose", path], capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stderr == ""
    if suffix in (".png", ".jpg"):
        assert f"pdd {__version__}: upscaled with realsr" in found.stdout


@pytest.mark.slow
def test_a_single_output_that_was_made_otherwise_is_skipped_and_named(pdd) -> None:
    for number in range(2):
        Image.fromarray(photo(8, 8, number)).save(f"{number}.png")
        save_file(compact(2 + number), f"{number}.safetensors")
    for target in ("out.png", "out.tga", "out.gif"):
        made = [
            pdd("upscale", f"{source}.png", target, "--weights", f"{weights}.safetensors")
            for source, weights in ((0, 0), (0, 0), (1, 0), (0, 1))
        ]
        assert [done.code for done in made] == [0] * 4
        assert ["from another input" in done.err for done in made] == [False, False, True, False]
        assert ["with other weights" in done.err for done in made] == [False, False, False, True]
        assert ["skipped: up to date" in done.err for done in made] == [False, True, False, False]


@pytest.mark.slow
def test_a_single_output_that_was_made_with_other_settings_says_which(pdd) -> None:
    save_file(compact(2), "m.safetensors")
    Image.fromarray(photo(8, 8)).save("a.png")
    with zipfile.ZipFile("a.cbz", "w") as archive:
        archive.write("a.png")
    lossless(Path("a.mkv"), rgb_frames(3))
    cases = [
        ("a.png", "out.png", ("--tta", "--scale", "3"), "--scale 3 --tta"),
        ("a.png", "out.bmp", ("--width", "20"), "--width 20"),
        ("a.cbz", "out.cbz", ("--format", "webp", "--mix", "0.5"), "--mix 0.5 --format webp"),
        ("a.mkv", "out.mkv", ("--end", "0.05"), "--end 0.05"),
    ]
    for source, target, options, text in cases:
        command = ("upscale", source, target, "--weights", "m.safetensors", "--engine", "torch", "--json")

        def note(*more: str, command: tuple[str, ...] = command) -> str:
            return json.loads(pdd(*command, *more).out)["files"][0]["problem"]

        assert "settings" not in note() + note()  # made, then skipped
        again = f"{target} was made with other settings ({{}}): --overwrite makes it again"
        assert note(*options) == again.format(f"then: defaults; now: {text}")
        assert "settings" not in note(*options, "--overwrite")
        assert note() == again.format(f"then: {text}; now: defaults")


@pytest.mark.slow
def test_upscale_says_it_in_each_output_unless_metadata_is_stripped(tmp_path: Path, pdd, ground: Path) -> None:
    weights = ground / "base.safetensors"
    lr = ground / "realLR" / "0.png"
    assert pdd("upscale", lr, tmp_path / "a.jpg", "--weights", weights, "--color-correction", "mean-std").code == 0
    software = str(Image.open(tmp_path / "a.jpg").getexif()[0x0131])
    assert software.startswith(f"pdd {__version__}: upscaled with base.safetensors, x4, color correction mean-std")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in software
    assert made_by_pdd(tmp_path / "a.jpg")
    assert source_of(tmp_path / "a.jpg") == hashlib.sha256(lr.read_bytes()).hexdigest()
    assert pdd("upscale", lr, tmp_path / "b.jpg", "--weights", weights, "--strip-metadata").code == 0
    assert b"pdd" not in (tmp_path / "b.jpg").read_bytes()
    assert not made_by_pdd(tmp_path / "b.jpg")
