"""Settings of `pdd upscale`."""

from __future__ import annotations

import re
from fractions import Fraction as Rational
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from pdd_cli.settings.base import (
    INFERENCE_DEVICES,
    ColorCorrection,
    Denoise,
    Device,
    Engine,
    Mix,
    Offline,
    Option,
    Precision,
    Settings,
    SnapFlats,
    Strength,
    Tta,
)

FormatChoice = Literal[
    "keep", "png", "jpg", "webp", "gif", "tiff", "bmp", "tga", "avif", "heic", "jxl", "mp4", "mov", "mkv", "webm"
]
Side = Annotated[int, Field(ge=1, le=1_000_000)]


def _several(value: Any) -> Any:
    """A single path, which a configuration file may contain, as a tuple."""
    return (value,) if isinstance(value, str | Path) else value


def seconds_of(time: str) -> Rational:
    """The seconds of a time such as 12.5, 1:30 or 00:01:30.250. Raises ValueError for other texts."""
    if not re.fullmatch(r"(\d+:)?(\d+:)?\d+(\.\d+)?", time):
        raise ValueError(f"{time} is not a time: use seconds (12.5) or HH:MM:SS.mmm (00:01:30.250)")
    seconds = Rational(0)
    for part in time.split(":"):
        seconds = 60 * seconds + Rational(part)
    return seconds


def rate_of(rate: str) -> Rational:
    """The frames per second of a text such as 25, 23.976 or 24000/1001. Raises ValueError for other texts."""
    try:
        value = Rational(rate)
    except (ValueError, ZeroDivisionError):
        value = Rational(0)
    if not 0 < value <= 1000:
        raise ValueError(f"{rate} is not a frame rate: use a number such as 25 or 24000/1001, at most 1000")
    # 23.976, 29.97 and 59.94 stand for multiples of 1/1.001.
    exact = Rational(round(value * Rational(1001, 1000)) * 1000, 1001)
    return exact if abs(exact - value) < Rational(1, 1000) and value.denominator > 1 else value


def _checked_rate(rate: str) -> str:
    rate_of(rate)
    return rate


def _checked_time(time: str) -> str:
    seconds_of(time)
    return time


Rate = Annotated[str, BeforeValidator(str), AfterValidator(_checked_rate)]
Time = Annotated[str, BeforeValidator(str), AfterValidator(_checked_time)]


def _any_input(inputs: tuple[Path, ...], others: ValidationInfo) -> tuple[Path, ...]:
    if not inputs and others.data.get("from_list") is None:
        raise ValueError("missing; give INPUT or --from-list FILE")
    return inputs


class UpscaleConfig(Settings):
    """`pdd upscale`."""

    from_list: Annotated[
        Path | None,
        Field(
            description="Upscale the files in this list (with INPUT: only those of its files). One per line, or "
            "separated by NUL; - reads stdin."
        ),
        Option("Input", metavar="FILE"),
    ] = None
    input: Annotated[
        tuple[Path, ...],
        BeforeValidator(_several),
        AfterValidator(_any_input),
        Field(
            validate_default=True,
            description="Images, videos, folders or quoted patterns ('in/**/*.png').",
        ),
        Option("Input", argument=True, metavar="INPUT", checked_later=True),
    ] = ()
    output: Annotated[
        str,  # a Path would lose the trailing slash, which marks a folder
        Field(description="Folder for the outputs, or a file name for a single input."),
        Option("Output", argument=True, metavar="OUTPUT", checked_later=True),
    ]
    weights: Annotated[
        str,
        Field(description="The model: NAME, FILE or hf:USER/NAME."),
        Option("Model", flags=("--weights", "-n")),
    ] = "realesrgan"
    model_map: Annotated[
        tuple[str, ...],
        Field(description="Other weights for matching files, such as 'faces/**=realLR'; repeatable."),
        Option("Model", metavar="PATTERN=NAME"),
    ] = ()
    tile: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0)],
        Field(description="Longest side of a tile in LR pixels; 0: no tiles; auto: as the free memory allows."),
        Option("Computing", metavar="N"),
    ] = "auto"
    overlap: Annotated[
        Annotated[int, Field(ge=0)],
        Field(description="Margin around each tile in LR pixels that the model also sees."),
        Option("Computing"),
    ] = 64
    # At most one of these; without them the scale of the model.
    scale: Annotated[
        Annotated[float, Field(gt=0, le=64)] | None,
        Field(description="Output size as a multiple of the input's."),
        Option("Size", flags=("--scale", "-s"), default="the model's"),
    ] = None
    width: Annotated[
        Side | None,
        Field(description="Output width in pixels; keeps the aspect ratio."),
        Option("Size"),
    ] = None
    height: Annotated[
        Side | None,
        Field(description="Output height in pixels; keeps the aspect ratio."),
        Option("Size"),
    ] = None
    long_side: Annotated[
        Side | None,
        Field(description="Longer side of the output in pixels."),
        Option("Size"),
    ] = None
    fit: Annotated[
        Annotated[str, Field(pattern=r"^[1-9]\d{0,6}x[1-9]\d{0,6}$")] | None,
        Field(description="The largest output that fits in this box."),
        Option("Size", metavar="WxH"),
    ] = None
    strength: Strength = None
    denoise: Denoise = None
    color_correction: ColorCorrection = "none"
    tta: Tta = False
    mix: Mix = 0.0
    snap_flats: SnapFlats = False
    seamless: Annotated[
        Literal["none", "x", "y", "both"],
        Field(description="Axes along which the texture repeats, so that opposite edges still fit."),
        Option("Textures"),
    ] = "none"
    normal_map: Annotated[
        bool,
        Field(description="The images are normal maps: vectors are normalised, colours are not converted."),
        Option("Textures", flags=("--normal-map",)),
    ] = False
    format: Annotated[
        FormatChoice,
        Field(description="Format of the outputs (images or videos); keep: the input's format."),
        Option("Output"),
    ] = "keep"
    quality: Annotated[
        Annotated[int, Field(ge=1, le=100)],
        Field(description="Quality of lossy formats, 1 to 100."),
        Option("Output"),
    ] = 95
    lossless: Annotated[
        bool,
        Field(description="Write WebP, JPEG XL and .mkv losslessly; reject lossy formats."),
        Option("Output"),
    ] = False
    strip_metadata: Annotated[
        bool,
        Field(description="Drop EXIF, XMP, text, dpi and tags; keep only the colour profile."),
        Option("Output"),
    ] = False
    suffix: Annotated[
        str,
        Field(description="Text that is appended to the name of each output."),
        Option("Output", default="none"),
    ] = ""
    recursive: Annotated[
        bool,
        Field(description="Include subfolders."),
        Option("Input", flags=("--recursive/--no-recursive",), default="recursive"),
    ] = True
    overwrite: Annotated[
        bool,
        Field(description="Replace existing outputs of pdd; other files are never replaced."),
        Option("Output", flags=("--overwrite/--skip-existing",), default="skip"),
    ] = False
    log: Annotated[
        Path | None,
        Field(description="Append a line of JSON to this file for each finished input."),
        Option("Output", metavar="FILE"),
    ] = None
    failed_list: Annotated[
        Path | None,
        Field(description="Write the inputs without a finished output to this file, for --from-list."),
        Option("Output", metavar="FILE"),
    ] = None
    checksums: Annotated[
        Path | None,
        Field(description="Write the SHA-256 of all outputs to this file, for `sha256sum -c`."),
        Option("Output", metavar="FILE"),
    ] = None
    start: Annotated[
        Time | None,
        Field(description="Start of the part of a video to upscale: seconds or HH:MM:SS.mmm."),
        Option("Video", metavar="TIME"),
    ] = None
    end: Annotated[
        Time | None,
        Field(description="End of the part of a video to upscale."),
        Option("Video", metavar="TIME"),
    ] = None
    crop: Annotated[
        Annotated[str, Field(pattern=r"^[1-9]\d{0,6}x[1-9]\d{0,6}\+\d{1,7}\+\d{1,7}$")] | None,
        Field(
            description="Part of each video frame, or of the image for --compare, to upscale: width, height, "
            "left and top in pixels of the input."
        ),
        Option("Video", metavar="WxH+X+Y"),
    ] = None
    preview: Annotated[
        Time | None,
        Field(description="Upscale only the video frame at this time, as PNG or in the format of OUTPUT."),
        Option("Video", metavar="TIME"),
    ] = None
    deinterlace: Annotated[
        bool,
        Field(description="Deinterlace a video (bwdif); the frame rate stays the same."),
        Option("Video"),
    ] = False
    temporal: Annotated[
        bool,
        Field(description="Reduce flicker in a video: average up to 5 frames where the scene is still."),
        Option("Video", flags=("--temporal",)),
    ] = False
    keep_audio: Annotated[
        Literal["copy", "convert"],
        Field(description="Audio that the container can't hold: copy fails, convert re-encodes (AAC, Opus, FLAC)."),
        Option("Video"),
    ] = "copy"
    fps: Annotated[
        Rate | None,
        Field(description="Make a video of the images in the folder INPUT, with this number of frames per second."),
        Option("Video", metavar="RATE"),
    ] = None
    audio: Annotated[
        Path | None,
        Field(description="File to take the audio from, for a folder of frames or an animation."),
        Option("Video", metavar="FILE"),
    ] = None
    encoder: Annotated[
        Annotated[str, Field(pattern=r"^[\w-]+$")] | None,
        Field(description="FFmpeg's name of the video encoder, such as libx265, libsvtav1 or h264_nvenc."),
        Option("Video", metavar="NAME", default="depends on format and bit depth"),
    ] = None
    crf: Annotated[
        Annotated[int, Field(ge=0, le=63)] | None,
        Field(description="Constant rate factor of the encoder; lower means better quality and larger files."),
        Option("Video", default="from --quality"),
    ] = None
    preset: Annotated[
        Annotated[str, BeforeValidator(str), Field(pattern=r"^[\w-]+$")] | None,
        Field(description="Preset of the encoder, such as slow or fast for x264 and x265, 0 to 13 for SVT-AV1."),
        Option("Video", metavar="NAME", default="the encoder's"),
    ] = None
    engine: Engine = "auto"
    device: Annotated[
        Device,
        Field(description=f"{INFERENCE_DEVICES} Several: cuda:0,cuda:1."),
    ] = "auto"
    precision: Precision = "auto"
    max_memory: Annotated[
        Annotated[str, Field(pattern=r"^\d+(\.\d+)?[MG]$")] | None,
        Field(description="Maximum memory of the process, such as 800M or 2G."),
        Option("Computing", metavar="SIZE", default="the free memory"),
    ] = None
    offline: Offline = False

    @model_validator(mode="after")
    def _one_size(self) -> UpscaleConfig:
        given = [name for name in ("scale", "width", "height", "long_side", "fit") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{names} can't be combined (to limit both width and height: --fit WxH)")
        if self.normal_map and (self.color_correction != "none" or self.snap_flats):
            other = "--snap-flats" if self.snap_flats else f"--color-correction {self.color_correction}"
            raise ValueError(f"--normal-map and {other} can't be combined: normal maps hold vectors, not colours")
        return self

    @model_validator(mode="after")
    def _possible_video(self) -> UpscaleConfig:
        encoding = [name for name in ("encoder", "crf", "preset") if getattr(self, name) is not None]
        range_options = [name for name in ("start", "end") if getattr(self, name) is not None]
        range_options += ["temporal"] if self.temporal else []
        if self.lossless and encoding:
            raise ValueError(f"--lossless and --{encoding[0]} can't be combined: lossless videos are FFV1")
        if self.preview is not None and (encoding + range_options):
            other = (encoding + range_options)[0]
            raise ValueError(f"--preview and --{other} can't be combined: --preview makes an image")
        if self.end is not None and seconds_of(self.end) <= seconds_of(self.start or "0"):
            raise ValueError(f"--end {self.end} is not after --start {self.start or 0}")
        return self

    @property
    def max_memory_bytes(self) -> int | None:
        """`max_memory` in bytes; M and G are 2^20 and 2^30."""
        if self.max_memory is None:
            return None
        return int(float(self.max_memory[:-1]) * {"M": 2**20, "G": 2**30}[self.max_memory[-1]])


class UpscaleFlags(Settings):
    """Flags of one call, which can't be set in a file."""

    dry_run: Annotated[bool, Field(description="Show what would be done; write nothing."), Option("Output")] = False
    watch: Annotated[
        bool,
        Field(description="Watch the folder INPUT and upscale new files, until Ctrl-C."),
        Option("Input", flags=("--watch",)),
    ] = False
    compare: Annotated[
        tuple[str, ...],
        Field(
            description="Compare versions of one image before a batch: NAME, NAME@STRENGTH, FILE, bicubic, "
            "lanczos or nearest."
        ),
        Option("Comparison", comma_separated=True),
    ] = ()
    page: Annotated[
        Path,
        Field(description="Page that --compare writes; a contact sheet (.png) is written beside it."),
        Option("Comparison", flags=("--output", "-o")),
    ] = Path("compare.html")
