"""What `pdd upscale` keeps of image files, checked by exiftool and ImageMagick, which pdd doesn't use.

Usage: python benchmarks/robustness/roundtrip.py FOLDER [IMAGE...]  (needs exiftool and ImageMagick)
Writes generated files of every mode, depth, format and metadata into FOLDER/in (and the real IMAGEs), upscales them
with a network that repeats each pixel, and prints a table: what went in, what came out, and what differs without
being documented in docs/upscale.md. Exits with 1 where something does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 - registers itself
import tifffile
import torch
from PIL import Image, ImageCms
from torch import nn

from pdd_cli.batch.plan import plan_jobs
from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import Runtime
from pdd_cli.upscaling.jobs import Output
from pdd_cli.upscaling.pipeline import run_jobs
from pdd_cli.upscaling.upscaler import Upscaler

RNG = np.random.default_rng(0)
SCALE = 2
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmp:Rating="4" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
# What each suffix holds, by docs/upscale.md.
SIXTEEN = {".png", ".tif", ".tiff"}
ALPHA = {".png", ".tif", ".tiff", ".webp", ".avif", ".bmp", ".heic", ".jxl"}
KEPT_TAGS = ("Make", "Artist", "DateTimeOriginal", "ISO", "GPSLatitude", "Rating")


def pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : shape[0] * 1j, 0 : 1 : shape[1] * 1j]
    planes = np.stack([x, y, 1 - x * y, 0.2 + 0.8 * x][: shape[2] if len(shape) > 2 else 1], axis=-1)
    values: np.ndarray = (planes * np.iinfo(dtype).max).astype(dtype)
    return values if len(shape) > 2 else values[..., 0]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F], tags[0x013B], tags[0x0112] = "Maker", "Somebody", orientation
    tags[0x8769] = {0x9003: "2020:01:02 03:04:05", 0x8827: 200, 0xA002: 24, 0xA003: 16}
    tags[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0), 3: "E", 4: (13.0, 24.0, 0.0)}
    return tags


def generate(folder: Path) -> None:
    pillow_heif.register_heif_opener()
    h, w = 16, 24
    rgba = Image.fromarray(pixels(h, w, 4))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    everything = {"icc_profile": srgb, "dpi": (300, 300)}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = rgba.convert("RGB").convert("P") if mode == "P" else rgba.convert(mode)
        image.save(folder / f"{mode}.png")
        if mode not in ("LA",):
            image.save(folder / f"{mode}.tif")
    for mode in ("L", "RGB", "CMYK"):
        rgba.convert(mode).save(folder / f"{mode}.jpg", quality=98)
        rgba.convert(mode).save(folder / f"{mode}-lzw.tif", compression="tiff_lzw")
    for mode in ("L", "RGB"):
        rgba.convert(mode).save(folder / f"{mode}.bmp")
        rgba.convert(mode).save(folder / f"{mode}.avif", quality=98)
    for mode in ("RGB", "RGBA"):
        rgba.convert(mode).save(folder / f"{mode}.webp", lossless=True)
    for mode in ("L", "RGB", "RGBA"):
        rgba.convert(mode).save(folder / f"{mode}.heic", quality=98, chroma=444)
        rgba.convert(mode).save(folder / f"{mode}.jxl", lossless=True)
    ten = pillow_heif.from_bytes("RGB;10", (w, h), (pixels(h, w, 3, dtype=np.uint16) >> 6).tobytes())
    ten.save(folder / "10x3.heic", quality=98, chroma=444, bit_depth=10)
    rgba.save(folder / "RGBA.avif", quality=98)
    rgba.convert("RGB").save(folder / "transparent.png", transparency=tuple(pixels(h, w, 4)[0, 0, :3].tolist()))
    for channels in (3, 4):
        deep = pixels(h, w, channels, dtype=np.uint16)
        cv2.imwrite(str(folder / f"16x{channels}.png"), deep[..., [2, 1, 0, 3][:channels]])
        extra = ["unassalpha"] if channels == 4 else None
        tifffile.imwrite(folder / f"16x{channels}.tif", deep, photometric="rgb", extrasamples=extra)
        tifffile.imwrite(
            folder / f"16x{channels}-big-endian.tif", deep, photometric="rgb", extrasamples=extra, byteorder=">"
        )
    Image.fromarray(pixels(h, w, dtype=np.uint16)).save(folder / "16x1.png")
    Image.fromarray(pixels(h, w, dtype=np.uint16)).save(folder / "16x1.tif")
    deep = pixels(h, w, 2, dtype=np.uint16)
    tifffile.imwrite(folder / "16x2.tif", deep, photometric="minisblack", extrasamples=["unassalpha"])
    for orientation in (1, 3, 6, 8):
        for suffix in ("jpg", "png", "webp", "tif", "avif", "heic", "jxl"):
            xmp = XMP.replace(b'Orientation="6"', b'Orientation="%d"' % orientation)
            options: dict[str, Any] = {**everything, "exif": exif(orientation), "xmp": xmp}
            name = folder / f"metadata-{orientation}.{suffix}"
            if suffix == "png":
                del options["xmp"]
            if suffix == "jxl":
                options["exif"] = exif(1).tobytes()  # the orientation of JPEG XL isn't that of its EXIF
            if suffix == "tif":  # Pillow can't write the EXIF that it made itself into a TIFF
                data = options.pop("exif").tobytes()
                options["exif"] = Image.Exif()
                options["exif"].load(data)
            rgba.convert("RGB").save(name, **options)
    rgba.convert("RGB").save(folder / "xmp.png")
    (folder / "m.xmp").write_bytes(XMP)
    command: list[str | Path] = ["exiftool", "-q", "-overwrite_original", "-tagsfromfile", folder / "m.xmp", "-xmp:all"]
    subprocess.run([*command, folder / "xmp.png"], check=True)
    (folder / "m.xmp").unlink()
    pages = [Image.fromarray(pixels(h + 2 * n, w, 3)) for n in range(3)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    frames = [Image.fromarray(np.roll(pixels(h, w, 3), 5 * n, axis=1)) for n in range(3)]
    for suffix in ("png", "webp", "avif"):
        frames[0].save(
            folder / f"animated.{suffix}", save_all=True, append_images=frames[1:], duration=80, lossless=True
        )


def seen(path: Path) -> dict[str, object]:
    """What exiftool and ImageMagick say of the first page, and how many pages there are."""
    result = subprocess.run(
        ["exiftool", "-j", "-n", "-icc_profile:ProfileDescription", "-Orientation", "-XResolution", "-ThumbnailOffset"]
        + [f"-{tag}" for tag in (*KEPT_TAGS, "ExifImageWidth", "XMP-tiff:Orientation", "FrameCount")]
        + [path],
        capture_output=True,
        text=True,
        check=True,
    )
    tags = json.loads(result.stdout)[0]
    tags.pop("SourceFile")
    identify = subprocess.run(
        ["identify", "-format", "%w %h %z %[channels] %[colorspace] %[type]\\n", path],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = identify.stdout.strip().splitlines()
    if not lines:  # a format that this ImageMagick doesn't read
        return {"tags": tags, "pages": None}
    width, height, depth, channels, space, *_ = lines[0].split()
    return {
        "tags": tags,
        "pages": len(lines),
        "size": (int(width), int(height)),
        "depth": int(depth),
        "alpha": "a" in channels.removeprefix("graya").removeprefix("gray") or channels.startswith("graya"),
        "gray": "gray" in channels.lower() or space.lower().endswith("gray"),
    }


def differences(before: Path, after: Path) -> list[str]:
    a, b = seen(before), seen(after)
    problems = []
    tags_a, tags_b = dict(a["tags"]), dict(b["tags"])  # type: ignore[call-overload]
    turned = tags_a.get("Orientation", 1) in (5, 6, 7, 8)
    for tag in KEPT_TAGS:
        if tag in tags_a and tags_a[tag] != tags_b.get(tag):
            problems.append(f"{tag}: {tags_a[tag]} became {tags_b.get(tag)}")
    if tags_b.get("Orientation", 1) != 1:
        problems.append(f"orientation {tags_b['Orientation']}")
    if "ExifImageWidth" in tags_b or "ThumbnailOffset" in tags_b:
        problems.append("stale sizes or thumbnail")
    if (
        "ProfileDescription" in tags_a
        and after.suffix != ".jxl"
        and tags_a["ProfileDescription"] != tags_b.get("ProfileDescription")
    ):
        problems.append("profile lost")
    resolution = tags_a.get("XResolution")
    same_kind = after.suffix in (".png", ".jpg", ".tif", ".bmp") and before.suffix == after.suffix
    if same_kind and resolution and abs(float(tags_b.get("XResolution", 0)) - float(resolution)) > 1:
        problems.append(f"resolution {resolution} became {tags_b.get('XResolution')}")
    if a["pages"] and b["pages"]:
        width, height = cast(tuple[int, int], a["size"])
        if turned and before.suffix not in (".avif", ".heic"):
            width, height = height, width
        if b["size"] != (width * SCALE, height * SCALE):
            problems.append(f"size {a['size']} became {b['size']}")
        if a["pages"] != b["pages"]:
            problems.append(f"{a['pages']} pages became {b['pages']}")
        if a["depth"] == 16 and b["depth"] != 16 and after.suffix in SIXTEEN:
            problems.append(f"depth {a['depth']} became {b['depth']}")
        if a["alpha"] != b["alpha"] and after.suffix in ALPHA:
            problems.append(f"alpha {a['alpha']} became {b['alpha']}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path, nargs="*")
    arguments = parser.parse_args()
    source, target = arguments.folder / "in", arguments.folder / "out"
    source.mkdir(parents=True)
    generate(source)
    for path in arguments.images:
        shutil.copy(path, source / f"real-{path.name}")

    module = nn.Upsample(scale_factor=SCALE)
    module.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    model = SRModel(module=module, scale=SCALE, in_channels=3, out_channels=3, architecture="repeat")
    worker = Upscaler(TorchEngine(model, Runtime(torch.device("cpu"), "fp32")), tile=0, overlap=0, notify=print)
    jobs = plan_jobs([source], str(target), format="keep", suffix="", recursive=True).jobs
    failed = 0
    for result in run_jobs(jobs, worker, output=Output()):
        problems = [result.problem] if result.status != "done" else differences(result.job.source, result.job.target)
        failed += bool(problems)
        kind = "" if result.status != "done" else str({k: v for k, v in seen(result.job.target).items() if k != "tags"})
        print(f"{result.job.source.name:28} {'; '.join(problems) or 'kept':40} {kind}")
    print(f"{len(jobs)} files, {failed} with differences that are not documented")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
