"""Upscales a folder of damaged and hostile images: none may crash, hang or take much memory, each must be reported.

Usage: python benchmarks/robustness/fuzz.py WORK [IMAGE...] [--files 300] [--weights realesr-animevideo] [--memory 2G]
Writes the files into WORK/in: mutations of small images of every format (from the IMAGEs, or generated), and
hand-made ones (huge declared sizes, decompression bombs, loops, other kinds of files). Runs `pdd upscale` once on all.
Prints a table by kind, and exits with 1 where a file has no result or no reason, takes over 10 s, or the process
takes more than --memory or dies.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 - registers itself
import tifffile
from PIL import Image

SECONDS = 10
Mutation = Callable[[bytes, np.random.Generator], bytes]


# --- files that were whole --------------------------------------------------------------------------------------


def seeds(images: list[Path]) -> list[tuple[str, bytes]]:
    """(suffix, content) of a small image in every format and a few variants."""
    pillow_heif.register_heif_opener()
    sources = [Image.open(path).convert("RGB").crop((0, 0, 48, 40)) for path in images]
    if not sources:
        noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
        sources = [Image.fromarray(noise)]
    exif = Image.Exif()
    exif[0x010F], exif[0x8769] = "Maker", {0x9003: "2020:01:02 03:04:05"}
    made = []

    def add(image: Image.Image, suffix: str, format: str, **options: object) -> None:
        target = io.BytesIO()
        image.save(target, format, **options)
        made.append((suffix, target.getvalue()))

    for image in sources:
        rgba = image.copy()
        rgba.putalpha(image.convert("L"))
        add(image, "png", "PNG", exif=exif)
        add(rgba.convert("P"), "png", "PNG")
        add(image, "jpg", "JPEG", exif=exif, progressive=True)
        add(image.convert("CMYK"), "jpg", "JPEG")
        add(rgba, "webp", "WEBP", lossless=True)
        add(image, "webp", "WEBP", save_all=True, append_images=[image.rotate(90)], duration=50)
        add(image, "bmp", "BMP")
        add(image, "avif", "AVIF")
        add(image, "heic", "HEIF")
        add(rgba, "jxl", "JXL", use_container=True)
        add(image, "jxl", "JXL")
        add(image, "tif", "TIFF", compression="tiff_lzw")
        add(image, "tif", "TIFF", save_all=True, append_images=[image, image])
        for channels, kind in ((3, "rgb"), (2, "minisblack")):
            target = io.BytesIO()
            pixels = np.asarray(rgba, np.uint16)[..., :channels] * 257
            extra = ["unassalpha"] if channels == 2 else None
            tifffile.imwrite(target, pixels, photometric=kind, extrasamples=extra, compression="zlib", predictor=True)
            made.append(("tif", target.getvalue()))
    return made


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(1, len(data))]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 40)):
        changed[at] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def wrong_head(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, min(len(data), 200), rng.integers(1, 9)):
        changed[at] = rng.integers(0, 256)
    return bytes(changed)


def huge_numbers(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(8, min(len(data), 400) - 4, rng.integers(1, 4)):
        changed[at : at + 4] = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff", b"\0\0\0\0")[at % 4]
    return bytes(changed)


def cut_and_pasted(data: bytes, rng: np.random.Generator) -> bytes:
    a, b, c = sorted(rng.integers(0, len(data), 3))
    return data[:b] + data[a:c] + data[c:] if rng.random() < 0.5 else data[:a] + data[b:]


MUTATIONS: tuple[Mutation, ...] = (truncated, flipped, wrong_head, huge_numbers, cut_and_pasted)


# --- files that were never whole --------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*item) for item in chunks) + chunk(b"IEND", b"")


def tiff(entries: list[tuple[int, int, int, int]], after: int = 0, tail: bytes = b"") -> bytes:
    """A little-endian TIFF of one folder; `after`: where it says that the next folder is."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", after) + tail


def zeros(count: int) -> bytes:
    """`count` zeros, compressed: a thousandth of it."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    return b"".join(parts) + compressor.flush()


def handmade(size: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of files that are made to do harm; bombs of `size` bytes."""
    bomb = zeros(size)
    plain = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    yield "declared-60000.png", png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(1000))))
    yield "declared-2G.png", png(2**31 - 1, 2**31 - 1, (b"IDAT", zlib.compress(bytes(1000))))
    yield "declared-13000-short.png", png(13_000, 13_000, (b"IDAT", zlib.compress(bytes(1000))))
    yield "declared-13000-short16.png", png(13_000, 13_000, (b"IDAT", zlib.compress(bytes(1000))), bits=16, colour=6)
    yield "pixels-bomb.png", png(16, 16, (b"IDAT", bomb))
    yield "text-bomb.png", png(16, 16, (b"zTXt", b"a\0\0" + bomb), (b"IDAT", zlib.compress(bytes(16 * 49))))
    yield "profile-bomb.png", png(16, 16, (b"iCCP", b"a\0\0" + bomb), (b"IDAT", zlib.compress(bytes(16 * 49))))
    yield "itxt-bomb.png", png(16, 16, (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb), (b"IDAT", b""))
    many = [(b"tEXt", b"k\0v")] * 20_000
    yield "many-chunks.png", png(16, 16, *many, (b"IDAT", zlib.compress(bytes(16 * 49))))
    yield "zero.png", png(0, 0, (b"IDAT", b""))
    yield "loop.tif", tiff([*plain, (273, 4, 1, 8), (279, 4, 1, 256)], after=8, tail=bytes(300))
    yield (
        "loop16.tif",
        tiff(
            [
                *((256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 2, 16 | 16 << 16), (259, 3, 1, 1), (262, 3, 1, 1)),
                *((273, 4, 1, 8), (277, 3, 1, 2), (279, 4, 1, 1024), (338, 3, 1, 2)),
            ],
            after=8,
            tail=bytes(2000),
        ),
    )
    yield "huge.tif", tiff([(256, 4, 1, 2**31), (257, 4, 1, 2**31), *plain[2:], (273, 4, 1, 8), (279, 4, 1, 256)])
    yield "many-strips.tif", tiff([*plain, (273, 4, 2**30, 8), (279, 4, 2**30, 8)], tail=bytes(300))
    yield "many-samples.tif", tiff([*plain[:5], (277, 3, 1, 65_535), (273, 4, 1, 8), (279, 4, 1, 256)])
    yield (
        "deflate-bomb.tif",
        tiff([*plain[:3], (259, 3, 1, 8), *plain[4:], (273, 4, 1, 122), (279, 4, 1, len(bomb))], tail=bytes(20) + bomb),
    )
    yield "huge.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6)
    yield "palette.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 9, 9, 1, 8, 0, 0, 0, 0, 2**31, 0)
    yield "canvas.webp", b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 2) + b"\xff" * 6
    sides = 0 | 3 << 1 | ((1 << 30) - 1) << 3 | 3 << 36 | ((1 << 30) - 1) << 38
    yield "huge.jxl", b"\xff\x0a" + sides.to_bytes(40, "little")
    yield "boxes.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + struct.pack(">I4sQ", 1, b"jxlc", 2**63) + bytes(50)
    yield "empty.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(80)
    yield "brand.heic", struct.pack(">I4s4sI4s", 24, b"ftyp", b"heic", 0, b"mif1") + bytes(300)
    yield "brands.heic", struct.pack(">I4s", 2**32 - 1, b"ftyp") + b"heic" * 50
    yield "brand.avif", struct.pack(">I4s4sI4s", 24, b"ftyp", b"avif", 0, b"mif1") + bytes(300)
    yield "scan.jpg", b"\xff\xd8\xff\xc0\0\x11\x08" + b"\xff\xff" * 2 + b"\3\1\x22\0\2\x11\1\3\x11\1" + bytes(500)
    yield "empty.png", b""
    yield "one-byte.jpg", b"\xff"
    yield "text.png", b"This is not an image.\n" * 20
    yield "page.jpg", b"<!doctype html><title>Not found</title>" + b" " * 400
    yield "drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "code.tif", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    yield "animation.png", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(300)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(64 << 20))
    yield "archive.png", archive.getvalue()


def write(folder: Path, images: list[Path], count: int, seed: int) -> dict[str, str]:
    """Write `count` files into `folder`; their names and kinds."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    kinds = {}
    for name, data in handmade(1 << 30):
        (folder / name).write_bytes(data)
        kinds[name] = "hand-made"
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to("no-such-file")
    kinds |= {"pipe.png": "hand-made", "nowhere.png": "hand-made"}
    whole = seeds(images)
    suffixes = sorted({suffix for suffix, _ in whole})
    for index in range(count - len(kinds)):
        suffix, data = whole[index % len(whole)]
        choice = index // len(whole) % (len(MUTATIONS) + 1)
        if choice == len(MUTATIONS):
            kind, suffix = "wrong extension", suffixes[(suffixes.index(suffix) + 1 + index) % len(suffixes)]
        else:
            kind, data = MUTATIONS[choice].__name__.replace("_", " "), MUTATIONS[choice](data, rng)
        name = f"{index:03}.{suffix}"
        (folder / name).write_bytes(data)
        kinds[name] = kind
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("images", type=Path, nargs="*")
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--weights", default="realesr-animevideo")
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = arguments.work / "in"
    kinds = write(source, arguments.images, arguments.files, arguments.seed)
    command = [sys.executable, "-m", "pdd_cli", "upscale", source, arguments.work / "out", "--json", "--offline"]
    command += ["--weights", arguments.weights, "--max-memory", arguments.memory]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS * arguments.files)
    (arguments.work / "stderr.txt").write_text(run.stderr)
    (arguments.work / "stdout.json").write_text(run.stdout)
    if run.returncode not in (0, 3):
        sys.exit(f"exit code {run.returncode}: {run.stderr[-2000:]}")
    document = json.loads(run.stdout)
    files = {Path(file["input"]).name: file for file in document["files"]}
    slow = sorted((file["seconds"], name) for name, file in files.items() if file["seconds"] > SECONDS)
    silent = [
        name for name, file in files.items() if file["status"] == "failed" and f"{source / name}" not in file["problem"]
    ]
    for kind in dict.fromkeys(kinds.values()):
        found = [files[name] for name in kinds if kinds[name] == kind and name in files]
        statuses = collections.Counter(file["status"] for file in found)
        longest = max((file["seconds"] for file in found), default=0)
        print(f"{kind:16} {len(found):3} files: {dict(statuses)}, longest {longest:.1f} s")
    missing = sorted(kinds.keys() - files.keys())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    limit = int(float(arguments.memory[:-1]) * {"M": 2**20, "G": 2**30}[arguments.memory[-1]])
    print(f"peak memory {peak / 2**30:.2f} GiB; without result: {missing}; without reason: {silent}; slow: {slow}")
    sys.exit(bool(missing or silent or slow) or peak > limit)


if __name__ == "__main__":
    main()
