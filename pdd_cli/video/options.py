"""The options of `pdd upscale` that only videos have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pdd_cli.settings.upscale import UpscaleConfig, rate_of, seconds_of


@dataclass(frozen=True)
class Box:
    """A part of a picture, in pixels."""

    width: int
    height: int
    left: int
    top: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.left}+{self.top}"

    @classmethod
    def parse(cls, text: str) -> Box:
        """The box of a text such as 640x360+20+0."""
        return cls(*(int(number) for number in re.split(r"[x+]", text)))


@dataclass(frozen=True)
class VideoOptions:
    """What is upscaled of a video, and how it is encoded.

    `start`, `end`: seconds from the beginning of the file; frames from `start` on and before `end` are upscaled.
    `crop`: the part of each frame, upright. `preview`: only the frame that is shown at this second, as an image.
    `encoder`: FFmpeg's name; None: chosen by the container. `rate_factor`, `preset`: of the encoder.
    `fps`: frames per second of a folder of frames. `audio`: a file whose audio becomes that of frames that are images.
    `frame_format`: the suffix of the images if the output is a folder of frames.
    `deinterlace`: make each frame of its two fields. `convert_audio`: encode audio that the container can't hold.
    `temporal`: mean over time where the scene is still.
    """

    start: Fraction | None = None
    end: Fraction | None = None
    crop: Box | None = None
    preview: Fraction | None = None
    encoder: str | None = None
    rate_factor: int | None = None
    preset: str | None = None
    fps: Fraction | None = None
    audio: Path | None = None
    frame_format: str = "png"
    deinterlace: bool = False
    convert_audio: bool = False
    temporal: bool = False

    @classmethod
    def of(cls, settings: UpscaleConfig) -> VideoOptions:
        """The options in the settings of `pdd upscale`."""
        times = (settings.start, settings.end, settings.preview)
        start, end, preview = (None if text is None else seconds_of(text) for text in times)
        crop = None if settings.crop is None else Box.parse(settings.crop)
        return cls(
            start,
            end,
            crop,
            preview,
            settings.encoder,
            settings.crf,
            settings.preset,
            None if settings.fps is None else rate_of(settings.fps),
            settings.audio,
            settings.format,
            settings.deinterlace,
            settings.keep_audio == "convert",
            settings.temporal,
        )
