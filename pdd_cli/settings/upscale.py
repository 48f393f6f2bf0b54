"""Settings of `pdd upscale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pdd_cli.settings.base import Device, Fraction, Offline, Precision, Settings

Side = Annotated[int, Field(ge=1, le=1_000_000)]


def _several(value: Any) -> Any:
    """One path, as a configuration file may give it, as a tuple of one."""
    return (value,) if isinstance(value, str | Path) else value


class UpscaleConfig(Settings):
    """`pdd upscale`."""

    input: Annotated[tuple[Path, ...], BeforeValidator(_several), Field(min_length=1)]
    output: str  # not a Path, which would lose the trailing slash that says "a folder"
    weights: str = "realesrgan"
    tile: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    overlap: Annotated[int, Field(ge=0)] = 64
    # At most one of these; without them the model's own scale.
    scale: Annotated[float, Field(gt=0, le=64)] | None = None
    width: Side | None = None
    height: Side | None = None
    long_side: Side | None = None
    fit: Annotated[str, Field(pattern=r"^[1-9]\d{0,6}x[1-9]\d{0,6}$")] | None = None
    strength: Fraction | None = None  # None: as the weights' card recommends
    color_correction: Literal["none", "mean-std", "low-frequency"] = "none"
    format: Literal["keep", "png", "jpg", "webp", "tiff", "bmp", "avif", "heic", "jxl", "mp4", "mov", "mkv", "webm"] = (
        "keep"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    lossless: bool = False
    strip_metadata: bool = False
    suffix: str = ""
    recursive: bool = True
    overwrite: bool = False
    log: Path | None = None  # a line of JSON for each file, as it ends
    engine: Literal["auto", "torch", "openvino", "winograd"] = "auto"
    device: Device = "auto"
    precision: Precision = "auto"
    max_memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[MG]$")] | None = None
    offline: Offline = False

    @model_validator(mode="after")
    def _one_size(self) -> UpscaleConfig:
        given = [name for name in ("scale", "width", "height", "long_side", "fit") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{names} contradict each other (to stay within a width and a height: --fit WxH)")
        return self

    @property
    def most_memory(self) -> int | None:
        """`max_memory` in bytes; M and G are 2^20 and 2^30."""
        if self.max_memory is None:
            return None
        return int(float(self.max_memory[:-1]) * {"M": 2**20, "G": 2**30}[self.max_memory[-1]])
