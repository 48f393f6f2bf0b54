"""Settings of `pdd adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pdd_cli.settings.base import (
    Device,
    ExportForm,
    Fraction,
    NonNegative,
    Offline,
    Option,
    Positive,
    PositiveInt,
    Precision,
    Settings,
)


class EmaGeneralist(Settings):
    """The generalist is the exponential moving average of the specialist."""

    mode: Annotated[
        Literal["ema"],
        Field(description="Generalist: ema (moving average of the specialist) or static (a second, frozen model)."),
        Option("Method", flags=("--mode",)),
    ] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    # While S = G, every inter-model distance is exactly zero, and the Frobenius norm has no gradient there.
    warmup_steps: PositiveInt = 5


class StaticGeneralist(Settings):
    """The generalist is a second, frozen model."""

    mode: Literal["static"]
    weights: Annotated[
        str,
        Field(description="Frozen model for --mode static: NAME or FILE."),
        Option("Method", flags=("--generalist",)),
    ]
    warmup_steps: Annotated[int, Field(ge=0)] = 5


def _generalist_mode(value: Any) -> str:
    return str(value.get("mode", "ema") if isinstance(value, dict) else getattr(value, "mode", "ema"))


Generalist = Annotated[
    Annotated[EmaGeneralist, Tag("ema")] | Annotated[StaticGeneralist, Tag("static")], Discriminator(_generalist_mode)
]


class FeatureSettings(Settings):
    """The feature network that the distances and the perceptual loss use."""

    # auto: vgg19, else vgg16, else (with a warning) efficientnet-lite0, whichever is available first.
    network: Annotated[
        Literal["auto", "vgg19", "vgg16", "efficientnet-lite0"],
        Field(description="Feature network for the distances; auto: the first available one."),
        Option("Method", flags=("--features",)),
    ] = "auto"
    weights: Annotated[
        Path | None,
        Field(description="File with the weights of --features."),
        Option("Method", flags=("--feature-weights",)),
    ] = None

    @model_validator(mode="after")
    def _weights_name_their_network(self) -> FeatureSettings:
        if self.weights is not None and self.network == "auto":
            raise ValueError(f"--feature-weights {self.weights}: also give the network (--features vgg19)")
        return self


ImageSetName = Literal["div2k-valid", "kodak", "photos"]
OWN_HR = "own"
"""The value of `hr_dir` for HR images that are made from the real images."""

Range = tuple[float, float]


class SyntheticSettings(Settings):
    """The degradation of HR to LR in the synthetic domain. Without blur, noise and JPEG it is the paper's downsampling.

    For each crop, a value is drawn uniformly from each range.
    """

    filters: tuple[Literal["bicubic", "bilinear", "area"], ...] = Field(
        default=("bicubic", "bilinear", "area"), min_length=1
    )
    # Bicubic and bilinear filters: antialiased ones are closer to real cameras; the paper's code uses OpenCV's.
    antialias: bool = True
    # HR images are also used at these sizes, because a downscaled photograph is sharper per pixel.
    hr_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(1.0, 0.7, 0.5), min_length=1)
    # Fraction of the HR crops that come from the real images, downscaled, if there are other HR images and the real
    # ones are not noisy.
    own_share: Fraction = 0.5
    blur: Range | None = None  # standard deviation of a Gaussian, LR pixels
    noise: Range | None = None  # standard deviation of white noise, 8-bit levels
    # Quality, 1 to 100; auto: that of the real images, if they were compressed.
    jpeg: Range | Literal["auto"] | None = "auto"
    # Apply the degradation twice, with a random intermediate size (Real-ESRGAN's second order).
    second_order: bool = False

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> SyntheticSettings:
        for name, least, most in (("blur", 0, 8), ("noise", 0, 100), ("jpeg", 1, 100)):
            span = getattr(self, name)
            if span is not None and span != "auto" and not least <= span[0] <= span[1] <= most:
                raise ValueError(f"{name} {list(span)} is not a range [low, high] within {least} to {most}")
        return self


class LossWeights(Settings):
    """Weights of the terms of the objective (inter, intra, pixel, perceptual and adversarial are the paper's names).

    The defaults are for runs of hundreds of steps (docs/results.md). The paper's weights are in configs/paper/.
    """

    inter: Annotated[
        NonNegative,
        Field(description="Weight of the inter-model distance."),
        Option("Method", flags=("--inter-weight",)),
    ] = 1.0
    intra: Annotated[
        NonNegative,
        Field(description="Weight of the intra-model distance."),
        Option("Method", flags=("--intra-weight",)),
    ] = 1.0
    # The norm of the inter-model distance is taken over groups of this many crops, and averaged over the groups; None:
    # over the whole batch. The paper's code takes it over the 8 crops of each GPU.
    inter_group: PositiveInt | None = None
    pixel: NonNegative = 0.2
    perceptual: NonNegative = 1.0
    feature_distance: NonNegative = 16.0  # not in the paper: distance of features normalized to unit length
    # auto: 0.9, and 0.45 for noisy real images, because with more they get too much texture. The discriminator unet has
    # another scale: the paper's 0.01.
    adversarial: NonNegative | Literal["auto"] = "auto"
    # The adversarial losses of S_s and S_t are added, or averaged as in the paper.
    adversarial_reduction: Literal["sum", "mean"] = "sum"
    # Not in the paper: S_t, downscaled to LR size, must have the colours and coarse shading of its LR input.
    consistency: NonNegative = 5.0
    # Not in the paper: the finer shading of S_t follows the mean of the base over flips and transposes of the LR.
    self_ensemble: NonNegative = 15.0
    adversarial_on_target: bool = True
    # With a teacher: the student's SR of the real crops must equal the teacher's, pixel by pixel.
    teacher: NonNegative = 3.0
    # With a teacher: no pattern that repeats with every LR pixel.
    lattice: NonNegative = 100.0


class OptimizerSettings(Settings):
    """Adam, for the specialist and the discriminator."""

    # auto: 1e-4; 2e-4 if a part of the network is frozen.
    learning_rate: Positive | Literal["auto"] = "auto"
    discriminator_learning_rate: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    # Fractions of the run at which the learning rate is halved. The paper first halves it at 25k of 100k steps.
    halve_at: tuple[Fraction, ...] = (0.35, 0.55, 0.75, 0.9)
    # Fraction of the specialist's parameters, counted from its input, that keep the values of the base. auto: 0.65 of a
    # network as large as Real-ESRGAN's, which makes a step 1.4 times as fast; nothing of others.
    freeze: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"


# The defaults of a student. It moves much farther from its base than an adapted model does, and its steps are short.
STUDENT_DEFAULTS: dict[str, Any] = {
    "steps": 800,
    "imitation": 0.3,
    "crop": 32,
    "early_stopping": False,
    "generalist": {"decay": 0.99},
    "losses": {"adversarial": 1.0},
    "optimizer": {"learning_rate": 5e-4, "halve_at": (0.2, 0.69, 0.81, 0.91), "freeze": 0.0},
}

Quality = Literal["quick", "good", "best"]
PRESETS: dict[str, dict[str, int]] = {
    "quick": {"steps": 30, "checkpoint_every": 15, "preview_every": 15},
    "good": {},
    "best": {"steps": 200, "batch_size": 8},
}
"""The defaults that each quality replaces. Settings that the user sets win."""


class AdaptConfig(Settings):
    """`pdd adapt`."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("steps", "minutes"),)

    real_dir: Annotated[
        Path | None,
        Field(description="Folder of real LR images or videos from one source (with subfolders), or one video."),
        Option("Input"),
    ] = None
    # A published data set in place of `real_dir`, which is then its `root`.
    dataset: Annotated[
        Literal["realsr", "drealsr", "ntire20", "dped"] | None,
        Field(description="Adapt to the LR training images of this published data set, in the folder --root."),
        Option("Input"),
    ] = None
    root: Annotated[
        Path | None,
        Field(description="Folder with the unpacked files of --dataset."),
        Option("Input", metavar="DIR"),
    ] = None
    # Aligned pairs for supervised training, beside the real images or alone.
    pairs_lr: Annotated[
        Path | None,
        Field(description="LR images with ground truth from the same source, for supervised training."),
        Option("Input", metavar="DIR"),
    ] = None
    pairs_hr: Annotated[
        Path | None,
        Field(description="Ground truth of --pairs-lr, aligned and paired by name."),
        Option("Input", metavar="DIR"),
    ] = None
    # Fraction of the crops with ground truth that come from the pairs; the others are synthetic.
    pairs_share: Fraction = 0.5
    base: Annotated[
        str,
        Field(description="Weights to start from: NAME, FILE or hf:USER/NAME."),
        Option("Input"),
    ] = "realesrgan"
    teacher: Annotated[
        str | None,
        Field(description="Large adapted model that a small --base, the student, learns from: NAME or FILE."),
        Option("Input"),
    ] = None
    hr_dir: Annotated[
        Path | None,
        Field(
            description="Sharp HR photographs for the synthetic domain: a folder, an image set (div2k-valid, kodak, "
            "photos), or own (made from the real images)."
        ),
        Option("Input", metavar="DIR|NAME", default="an image set and the real images"),
    ] = None
    generalist: Generalist = EmaGeneralist()
    name: Annotated[
        str | None,
        Field(description="Name of the run and of its weights."),
        Option("Output", default="that of --real-dir, or else of --pairs-lr"),
    ] = None
    runs_dir: Annotated[
        Path,
        Field(description="Folder of the runs."),
        Option("Output"),
    ] = Path("runs")
    quality: Annotated[
        Quality,
        Field(
            description="quick: 30 steps, for a first impression, a third of the time of good; good: 100 steps; "
            "best: 200 steps with twice as many crops, four times the time of good."
        ),
        Option("Training"),
    ] = "good"
    steps: Annotated[
        PositiveInt,
        Field(
            description="Training steps; --quality changes the default; with --teacher the default is "
            f"{STUDENT_DEFAULTS['steps']}."
        ),
        Option("Training"),
    ] = 100
    minutes: Annotated[
        Positive | None,
        Field(description="Time for the whole run, without downloads; the number of steps is planned accordingly."),
        Option("Training", metavar="N"),
    ] = None
    batch_size: Annotated[
        PositiveInt,
        Field(description="Number of synthetic crops per step, and also of real crops, over all processes."),
        Option("Training"),
    ] = 4
    crop: Annotated[int, Field(ge=16, multiple_of=4)] = 48
    # Flat crops teach nothing. Up to `crop_candidates` random crops are tried until one has this much texture (standard
    # deviation of the Laplacian in 8-bit levels); if none has, the one with the most texture is used.
    crop_candidates: PositiveInt = 8
    crop_texture: NonNegative = 30.0
    # With a teacher: number of crops that the teacher upscales before the training. If there are HR images besides the
    # real images, a quarter to three quarters of the crops are made from them.
    teacher_crops: PositiveInt = 64
    # With a teacher: fraction of the run, at its start, in which the student learns only the pixels of its SR. These
    # steps take a fraction of the time of the others.
    imitation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0, description="Seed for the crops and initial weights."), Option("Training")] = 0
    features: FeatureSettings = FeatureSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    losses: LossWeights = LossWeights()
    optimizer: OptimizerSettings = OptimizerSettings()
    # unet: the paper's discriminator; features: heads on the feature network, which learn within hundreds of steps.
    discriminator: Literal["unet", "features"] = "features"
    # Fraction of the run in which only the discriminator is trained (in the paper: 300 of 100k steps).
    discriminator_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    # Fraction of the real images that is held out of training to judge the result.
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    # The run ends after this many judgements (one every `checkpoint_every` steps) without an improvement.
    early_stopping: Literal[False] | Annotated[int, Field(ge=1, strict=True)] = 20
    # Validation pairs from the same source. Their scores are reported; they influence neither training nor selection.
    val_lr: Annotated[
        Path | None,
        Field(description="LR images of validation pairs, whose scores are reported but don't affect the result."),
        Option("Input"),
    ] = None
    val_hr: Annotated[
        Path | None,
        Field(description="Ground truth of --val-lr, paired by name."),
        Option("Input"),
    ] = None
    # Files for other programs, in addition to the entry in the store.
    export: Annotated[
        tuple[ExportForm, ...],
        Field(description="Also write the weights in these formats for other programs; pth: BasicSR's format."),
        Option("Output", comma_separated=True),
    ] = ()
    checkpoint_every: PositiveInt = 50
    # The better of specialist and moving average at each judgement.
    keep_checkpoints: Annotated[
        Annotated[int, Field(ge=0)],
        Field(description="Keep the weights of the last N judgements, for use or for --judge."),
        Option("Training", metavar="N"),
    ] = 0
    preview_every: PositiveInt = 50
    tensorboard: bool = False  # also write TensorBoard events
    device: Device = "auto"
    precision: Precision = "auto"
    offline: Offline = False

    @field_validator("hr_dir", mode="before")
    @classmethod
    def _path_is_no_name(cls, value: Any) -> Any:
        """Make `./kodak` absolute: as a relative path it would equal `kodak`, the name of an image set."""
        names = (*get_args(ImageSetName), OWN_HR)
        if isinstance(value, str) and value not in names and str(Path(value)) in names:
            return Path.cwd() / value
        return value

    @model_validator(mode="before")
    @classmethod
    def _replace_defaults(cls, values: Any) -> Any:
        """Replace the defaults as the quality, or a teacher, requires."""
        if not isinstance(values, dict):
            return values
        if values.get("minutes") is not None and values.get("steps") is not None:
            raise ValueError("--minutes and --steps can't be combined: --minutes plans the number of steps")
        if not values.get("teacher"):
            return _with_defaults(values, PRESETS.get(str(values.get("quality")), {}))
        if values.get("pairs_lr") is not None:
            raise ValueError(
                "--teacher and --pairs-lr can't be combined: a student learns only from its teacher's images "
                "(to see scores with ground truth: --val-lr, --val-hr)"
            )
        if _generalist_mode(values.get("generalist", {})) == "static":
            raise ValueError("--teacher and --mode static can't be combined: a student is trained without a generalist")
        if values.get("minutes") is not None:
            raise ValueError("--teacher and --minutes can't be combined: give --steps")
        if values.get("quality", "good") != "good" and "steps" not in values:
            raise ValueError("--quality can't be combined with --teacher: give --steps")
        return _with_defaults(values, STUDENT_DEFAULTS)

    @model_validator(mode="after")
    def _pairs_have_both_sides(self) -> AdaptConfig:
        for kind, lr, hr in (("val", self.val_lr, self.val_hr), ("pairs", self.pairs_lr, self.pairs_hr)):
            if (lr is None) != (hr is None):
                raise ValueError(f"--{kind}-lr DIR and --{kind}-hr DIR must be given together")
        return self

    @model_validator(mode="before")
    @classmethod
    def _root_is_real_dir(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("dataset") and values.get("root") and not values.get("real_dir"):
            return {**values, "real_dir": values["root"]}
        return values

    @model_validator(mode="after")
    def _dataset_has_a_root(self) -> AdaptConfig:
        if (self.dataset is None) != (self.root is None):
            raise ValueError("--dataset NAME and --root DIR must be given together")
        if self.root is not None and self.real_dir != self.root:
            raise ValueError("--dataset already names the real images: omit --real-dir, or make it equal to --root")
        return self

    @model_validator(mode="after")
    def _images_suffice(self) -> AdaptConfig:
        if self.real_dir is not None:
            return self
        if self.pairs_lr is None:
            raise ValueError(
                "no images: give --real-dir DIR, or --dataset NAME --root DIR, or --pairs-lr DIR --pairs-hr DIR"
            )
        if self.generalist.mode == "static":
            raise ValueError("--mode static has no effect without --real-dir: training on pairs alone is supervised")
        if self.teacher is not None:
            raise ValueError("--teacher needs --real-dir: the student learns from the teacher's SR of these images")
        return self

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> AdaptConfig:
        group = self.losses.inter_group
        if group and self.batch_size % group:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of losses.inter_group {group}")
        return self

    @model_validator(mode="after")
    def _warmup_leaves_steps(self) -> AdaptConfig:
        # A run that is not longer than the warm-up would never use the distillation losses.
        distillation = 0 if self.teacher else self.generalist.warmup_steps
        if self.steps <= self.discriminator_warmup_steps + distillation:
            raise ValueError(
                f"--steps {self.steps} is too few: no step is left after the warm-up of "
                f"{self.discriminator_warmup_steps} + {distillation} steps"
            )
        return self

    def is_default(self, name: str) -> bool:
        """Whether the field `name` has the value of the preset."""
        default = type(self).model_fields[name].default
        return bool(getattr(self, name) == PRESETS[self.quality].get(name, default))

    @property
    def lr_dir(self) -> Path:
        """The folder of the LR images that are adapted to: `real_dir`, or else `pairs_lr`."""
        folder = self.real_dir or self.pairs_lr
        assert folder is not None  # see _images_suffice
        return folder

    @property
    def discriminator_warmup_steps(self) -> int:
        """Number of steps before the adversarial losses: the discriminator's warm-up, and a student's imitation."""
        return self.imitation_steps + round(self.discriminator_warmup * (self.steps - self.imitation_steps))

    @property
    def imitation_steps(self) -> int:
        """Number of steps at the start in which a student learns only the pixels of its teacher's SR."""
        return round(self.imitation * self.steps) if self.teacher else 0


def _with_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`values`, completed by `defaults` at every level."""
    completed = dict(values)
    for key, default in defaults.items():
        if key not in completed:
            completed[key] = default
        elif isinstance(default, dict) and isinstance(completed[key], dict):
            completed[key] = _with_defaults(completed[key], default)
    return completed


class AdaptFlags(Settings):
    """Flags of one call, which can't be set in a file."""

    resume: Annotated[bool, Field(description="Continue the run --name from its checkpoint."), Option("Run")] = False
    overwrite: Annotated[bool, Field(description="Replace a run and weights of the same name."), Option("Run")] = False
    judge: Annotated[
        Path | None,
        Field(description="With --resume: only judge these weights, such as a kept checkpoint; don't train."),
        Option("Run", metavar="FILE"),
    ] = None
    student: Annotated[
        str | None,
        Field(description="Afterwards also train this small base, with the result as its teacher, as NAME-student."),
        Option("Run", metavar="NAME|FILE"),
    ] = None
    verbose: Annotated[bool, Field(description="Print the losses of each step."), Option("Run")] = False
    dry_run: Annotated[
        bool, Field(description="Check everything and estimate time, memory and disk; write nothing."), Option("Run")
    ] = False
