"""TGA and DDS: read against ImageMagick, and against blocks written by hand; TGA is written."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import probe, read_image
from pdd_cli.imaging.encode import write_image
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.imaging.provenance import made_by_pdd
from tests.helpers.images import photo
from tests.helpers.networks import compact

RNG = np.random.default_rng(0)
WIDTH, HEIGHT = 10, 6


def by_imagemagick(path: Path) -> np.ndarray:
    """(H, W, 4), 8 bits."""
    if shutil.which("convert") is None:
        pytest.skip("ImageMagick isn't installed")
    command = ["convert", f"{path}[0]", "-auto-orient", "-depth", "8", "png32:-"]
    found = subprocess.run(command, capture_output=True, check=True)
    return np.asarray(Image.open(io.BytesIO(found.stdout)).convert("RGBA"))


def rgba(image: DecodedImage) -> np.ndarray:
    colours = image.pixels if image.channels == 3 else image.pixels.repeat(3, axis=2)
    alpha = image.alpha if image.alpha is not None else np.full(colours.shape[:2], 255, np.uint8)
    return np.dstack([colours, alpha])


def run_lengths(pixels: list[bytes]) -> bytes:
    """Runs that go on in the next row, and single pixels."""
    coded, at = b"", 0
    while at < len(pixels):
        count = 1
        while at + count < len(pixels) and pixels[at + count] == pixels[at] and count < 128:
            count += 1
        coded += bytes([0x80 | (count - 1) if count > 1 else 0]) + pixels[at]
        at += count
    return coded


def tga(path: Path, kind: int, bits: int, *, attributes: int = 0, origin: int = 0, map_bits: int = 24) -> Path:
    """A TGA of this type, by the specification, with pixels that repeat."""
    count, width = WIDTH * HEIGHT, -(-bits // 8)
    mapped = kind & 7 == 1
    values = RNG.integers(0, 256, (count, width), np.uint8)
    if mapped:
        values = RNG.integers(3, 3 + 20, (count, 1)).astype(np.uint8)
        values = np.hstack([values, np.zeros((count, width - 1), np.uint8)])
    values[15:28] = values[15]  # from the second row to the third
    pixels = [bytes(value) for value in values]
    palette = RNG.integers(0, 256, (20, -(-map_bits // 8)), np.uint8).tobytes() if mapped else b""
    header = struct.pack("<BBBHHBHHHHBB", 4, mapped, kind, 3 if mapped else 0, 20 if mapped else 0,
                         map_bits if mapped else 0, 0, 0, WIDTH, HEIGHT, bits, attributes | origin)  # fmt: skip
    path.write_bytes(header + b"name" + palette + (run_lengths(pixels) if kind & 8 else b"".join(pixels)))
    return path


@pytest.mark.parametrize("origin", [0, 0x20])
@pytest.mark.parametrize(
    ("kind", "bits", "attributes", "map_bits"),
    [(kind | coded, bits, attributes, map_bits)
     for coded in (0, 8)
     for kind, bits, attributes, map_bits in (
         (1, 8, 0, 24), (1, 8, 0, 15), (1, 8, 8, 32), (2, 16, 0, 0), (2, 24, 0, 0), (2, 32, 8, 0),
         (2, 32, 0, 0), (3, 8, 0, 0))],
)  # fmt: skip
def test_tga_is_read_as_by_imagemagick(tmp_path: Path, kind, bits, attributes, map_bits, origin) -> None:
    path = tga(tmp_path / "a.tga", kind, bits, attributes=attributes, map_bits=map_bits, origin=origin)
    found, wanted = read_image(path), by_imagemagick(path)
    assert np.abs(rgba(found).astype(int) - wanted).max() <= 1  # of 31 levels become 255
    header = probe(path)
    assert header.size == (WIDTH, HEIGHT)
    assert header.spec.bits == 8


def test_what_imagemagick_does_not_read_of_tga(tmp_path: Path) -> None:
    # One bit of alpha, as the specification has it.
    path = tga(tmp_path / "a.tga", 2, 16, attributes=1, origin=0x20)
    values = np.frombuffer(path.read_bytes()[22:], "<u2").reshape(HEIGHT, WIDTH)
    found = read_image(path)
    assert np.array_equal(found.alpha, (values >> 15) * 255)
    assert np.array_equal(found.pixels[..., 1], np.rint((values >> 5 & 31) / 31 * 255))
    # Texts: the ID in front of the pixels, and the author and comments of the extension area behind them.
    assert found.metadata.lost == ("texts of the TGA",)
    data = path.read_bytes()
    plain = b"\0" + data[1:18] + data[22:]
    for author in (b"", b"me"):
        extension = struct.pack("<H", 495) + author.ljust(493, b"\0")
        path.write_bytes(plain + extension + struct.pack("<II", len(plain), 0) + b"TRUEVISION-XFILE.\0")
        assert read_image(path).metadata.lost == (("texts of the TGA",) if author else ())
    # From the right.
    path = tga(tmp_path / "b.tga", 10, 24, origin=0x30)
    reversed_ = bytearray(path.read_bytes())
    right = read_image(path).pixels
    reversed_[17] = 0x20
    path.write_bytes(reversed_)
    assert np.array_equal(right, read_image(path).pixels[:, ::-1])
    # Indices of 16 bits.
    path = tga(tmp_path / "c.tga", 1, 16, origin=0x20)
    content = path.read_bytes()
    entries = np.frombuffer(content[22:82], np.uint8).reshape(20, 3)[:, ::-1]
    assert np.array_equal(read_image(path).pixels.reshape(-1, 3), entries[np.frombuffer(content[82:], "<u2") - 3])


def test_alpha_of_tga_that_is_not_meant(tmp_path: Path) -> None:
    for attributes in (8, 0):
        path = tga(tmp_path / "a.tga", 2, 32, attributes=attributes)
        data = bytearray(path.read_bytes())
        data[25::4] = bytes(WIDTH * HEIGHT)
        path.write_bytes(data)
        assert (read_image(path).alpha is not None) == (attributes == 8)
    assert read_image(tga(tmp_path / "b.tga", 2, 32, attributes=0)).alpha is not None


@pytest.mark.parametrize("cut", [30, 60])
@pytest.mark.parametrize("kind", [1, 2, 10])
def test_a_damaged_tga_is_an_error(tmp_path: Path, kind, cut) -> None:
    path = tga(tmp_path / "a.tga", kind, 8 if kind == 1 else 24)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a\.tga"):
        read_image(path)


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_tga_is_written_for_other_programs(tmp_path: Path, samples) -> None:
    values = RNG.integers(0, 256, (HEIGHT, WIDTH, samples), np.uint8)
    image = DecodedImage(values[..., : samples - (samples in (2, 4))], values[..., -1] if samples in (2, 4) else None)
    write_image(tmp_path / "a.tga", image)
    assert np.array_equal(by_imagemagick(tmp_path / "a.tga"), rgba(image))
    with Image.open(tmp_path / "a.tga") as opened:
        assert opened.mode == {1: "L", 2: "RGBA", 3: "RGB", 4: "RGBA"}[samples]
        assert np.array_equal(np.asarray(opened.convert("RGBA")), rgba(image))
    assert np.array_equal(rgba(read_image(tmp_path / "a.tga")), rgba(image))


def test_textures_of_a_folder(pdd) -> None:
    Path("in").mkdir()
    Image.fromarray(photo(16, 20)).save("in/a.tga")
    Image.fromarray(photo(16, 20)).save("in/b.dds")
    save_file(compact(), "model.safetensors")
    command = ("upscale", "in", "out", "--weights", "model.safetensors", "--json")
    done = json.loads(pdd(*command).out)
    assert [Path(file["output"]).name for file in done["files"]] == ["a.tga", "b.png"]
    assert Image.open("out/a.tga").size == Image.open("out/b.png").size == (80, 64)
    assert json.loads(pdd(*command).out)["skipped"] == 2
    assert pdd("upscale", "in/b.dds", "b.tga", "--weights", "model.safetensors").code == 0
    assert made_by_pdd(Path("b.tga"))
    assert by_imagemagick(Path("b.tga")).shape == (64, 80, 4)
    Path("b.tga").write_bytes(b"mine")
    assert pdd("upscale", "in/b.dds", "b.tga", "--weights", "model.safetensors", "--overwrite").code == 2
    failed = pdd("upscale", "in/b.dds", "b2.dds", "--weights", "model.safetensors")
    assert failed.code == 2
    assert "can't write this format" in failed.err


def dds(body: bytes, *, dxgi: int | None = None, fourcc: bytes = b"DX10", misc: int = 0, textures: int = 1,
        masks: tuple[int, ...] = (), bits: int = 0, mipmaps: int = 1, caps: int = 0) -> bytes:  # fmt: skip
    """A DDS of 8 x 4 pixels, by the documentation of DirectX."""
    flags = 0x40 | (len(masks) > 3) if masks else 0x4
    head = b"DDS " + struct.pack("<7I44x", 124, 0x1007, 4, 8, 0, 1, mipmaps)
    head += struct.pack("<2I4s5I", 32, flags, b"\0" * 4 if masks else fourcc, bits, *(*masks, 0, 0, 0, 0)[:4])
    head += struct.pack("<5I", 0x1000, caps, 0, 0, 0)
    if dxgi is not None:
        head += struct.pack("<5I", dxgi, 3, misc, textures, 0)
    return head + body


@pytest.mark.parametrize("compression", ["dxt1", "dxt5", "none"])
@pytest.mark.parametrize("mipmaps", [0, 3])
def test_dds_is_read_as_by_imagemagick(tmp_path: Path, compression, mipmaps) -> None:
    if shutil.which("convert") is None:
        pytest.skip("ImageMagick isn't installed")
    pixels = np.dstack([photo(16, 32), RNG.integers(0, 2, (16, 32), np.uint8) * 255])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    subprocess.run(["convert", tmp_path / "a.png", "-define", f"dds:compression={compression}",
                    "-define", f"dds:mipmaps={mipmaps}", tmp_path / "a.dds"], check=True)  # fmt: skip
    found = read_image(tmp_path / "a.dds")
    wanted = by_imagemagick(tmp_path / "a.dds")
    shown = wanted[..., 3] > 0
    assert np.abs(rgba(found).astype(int) - wanted)[shown].max() <= 2  # rounding of the colours between two
    assert np.array_equal(rgba(found)[..., 3], wanted[..., 3])
    assert found.metadata.lost == (("mipmaps",) if mipmaps else ())


def test_blocks_of_every_compression(tmp_path: Path) -> None:
    path = tmp_path / "a.dds"
    red = struct.pack("<HHI", 0xF800, 0, 0)  # BC1: both of its colours, all pixels the first
    clear = struct.pack("<HHI", 0, 0xF800, 0xFFFFFFFF)  # the first is not larger: index 3 is transparent
    half = bytes([128, 0]) + bytes(6)
    bc7 = (1 << 6 | 100 << 7 | 100 << 14 | 50 << 21 | 50 << 28 | 20 << 35 | 20 << 42 | 60 << 49 | 60 << 56).to_bytes(
        16, "little"
    )
    cases = {
        (71, 72): (red * 2, (255, 0, 0)),
        (74, 75): ((b"\x77" * 8 + red) * 2, (255, 0, 0, 119)),
        (77, 78): ((half + red) * 2, (255, 0, 0, 128)),
        (80,): (half * 2, (128,)),
        (83,): ((half + bytes([30, 0]) + bytes(6)) * 2, (128, 30, 0)),
        (98, 99): (bc7 * 2, (200, 100, 40, 120)),  # mode 6: 7 bits and a shared last one
        (28, 29): (bytes([1, 2, 3, 4]) * 32, (1, 2, 3, 4)),
        (87, 91): (bytes([1, 2, 3, 4]) * 32, (3, 2, 1, 4)),
        (88,): (bytes([1, 2, 3, 4]) * 32, (3, 2, 1)),
        (61,): (b"\7" * 32, (7,)),
    }
    for formats, (body, wanted) in cases.items():
        for dxgi in formats:
            path.write_bytes(dds(body, dxgi=dxgi))
            assert np.array_equal(read_image(path).interleaved, np.broadcast_to(wanted, (4, 8, len(wanted)))), dxgi
            assert probe(path).size == (8, 4)
    path.write_bytes(dds(red + clear, fourcc=b"DXT1"))
    assert np.array_equal(read_image(path).alpha, np.repeat([[255] * 4 + [0] * 4], 4, axis=0))
    path.write_bytes(dds((b"\x77" * 8 + red) * 2, fourcc=b"DXT2"))  # premultiplied
    assert np.array_equal(read_image(path).pixels[0, 0], (255, 0, 0))
    # 16 bits stay 16, and so do 10.
    path.write_bytes(dds(struct.pack("<4H", 1, 2000, 65535, 40000) * 32, dxgi=11))
    assert tuple(read_image(path).interleaved[0, 0]) == (1, 2000, 65535, 40000)
    path.write_bytes(dds(struct.pack("<I", 1023 | 512 << 10 | 3 << 30) * 32, dxgi=24))
    assert tuple(read_image(path).interleaved[0, 0]) == (65535, 32800, 0, 65535)
    path.write_bytes(dds(struct.pack("<H", 0xF81F) * 32, masks=(0xF800, 0x7E0, 0x1F), bits=16))
    assert tuple(read_image(path).interleaved[0, 0]) == (255, 0, 255)


@pytest.mark.parametrize(
    ("fourcc", "dxgi", "block_bytes", "stored"),
    [
        (b"DXT1", None, 8, 4), (b"DXT3", None, 16, 4), (b"DXT5", None, 16, 4), (b"ATI1", None, 8, 1),
        (b"BC4S", None, 8, 1), (b"BC5S", None, 16, 2), (b"DX10", 71, 8, 4), (b"DX10", 80, 8, 1),
        (b"DX10", 81, 8, 1), (b"DX10", 83, 16, 2), (b"DX10", 84, 16, 2),
    ],
)  # fmt: skip
def test_random_blocks_are_decoded_as_by_ffmpeg(tmp_path: Path, fourcc, dxgi, block_bytes, stored) -> None:
    path = tmp_path / "a.dds"
    for _ in range(20):
        path.write_bytes(dds(RNG.bytes(2 * block_bytes), fourcc=fourcc, dxgi=dxgi))
        with av.open(str(path)) as file:
            theirs = next(file.decode(video=0)).to_ndarray(format="rgba")[..., :stored]
        found = read_image(path)
        ours = rgba(found) if stored == 4 else found.pixels
        assert np.abs(ours[..., :stored].astype(int) - theirs).max() <= 1  # rounding
        assert stored != 2 or not ours[..., 2].any()


def test_signed_values_of_dds(tmp_path: Path) -> None:
    path = tmp_path / "a.dds"
    for head, values, wanted in (
        ({"dxgi": 51}, (-127, 127), (0, 255, 0)),
        ({"dxgi": 31}, (-128, 0, 127, 64), (0, 128, 255, 192)),
        ({"dxgi": 63}, (-64,), (63,)),
    ):
        path.write_bytes(dds(struct.pack(f"{len(values)}b", *values) * 32, **head))
        assert tuple(read_image(path).interleaved[0, 0]) == wanted
    path.write_bytes(dds(struct.pack("<h", -32767) * 16 + struct.pack("<h", 32767) * 16, dxgi=58))
    assert np.unique(read_image(path).pixels).tolist() == [0, 65535]
    signed = bytearray(dds(struct.pack("<2b", -127, 127) * 32, masks=(0xFF, 0xFF00, 0), bits=16))
    struct.pack_into("<I", signed, 80, 0x80000)  # DirectX 8's V8U8
    path.write_bytes(signed)
    assert tuple(read_image(path).interleaved[0, 0]) == (0, 255, 0)


def test_what_is_left_out_of_dds_is_named_and_errors_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.dds"
    red = struct.pack("<HHI", 0xF800, 0, 0) * 2
    path.write_bytes(dds(red, dxgi=71, misc=4))
    assert read_image(path).metadata.lost == ("the other faces of a cube map",)
    path.write_bytes(dds(red, dxgi=71, textures=3, mipmaps=4))
    assert read_image(path).metadata.lost == ("mipmaps", "2 more textures of an array")
    for data, words in (
        (dds(red * 2, dxgi=95), "HDR"),
        (dds(red, dxgi=1000), "DXGI format 1000"),
        (dds(red, fourcc=b"YUY2"), "YUY2"),
        (dds(red, fourcc=b"DXT1")[:-1], "truncated"),
        (dds(red, dxgi=71)[:130], "cut short"),
        (dds(red, fourcc=b"DXT1")[:60], "cut short"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=words):
            read_image(path)
