"""Prepares a run of `adapt`: checks and loads settings, weights and images. Writes nothing."""

from __future__ import annotations

import contextlib
import copy
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pdd_cli.adaptation.checkpoint import TrainState, checkpoint_settings, load_checkpoint
from pdd_cli.adaptation.clips import clips_in
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.judge import Judge, describe_score, held_out_indices, stalled
from pdd_cli.adaptation.losses import DISCRIMINATOR_LAYERS
from pdd_cli.adaptation.preview import upscale_image
from pdd_cli.adaptation.resuming import absolute, as_started, check_inputs_are_same, check_settings
from pdd_cli.adaptation.sources import Source, read_sources
from pdd_cli.adaptation.teaching import Teacher
from pdd_cli.adaptation.tensorboard import check_tensorboard
from pdd_cli.adaptation.time_limit import TimeLimit
from pdd_cli.adaptation.train_step import Models, scheduled_rate
from pdd_cli.adaptation.trainable import check_channels, check_trainable, chosen_for, freeze_first, training_mode
from pdd_cli.adaptation.validation import pairs_to_score, read_pairs
from pdd_cli.data.datasets import RGB, AlignedPair, CropSampler, downscaled, hr_from_real, images_below, select
from pdd_cli.data.degradations import Degradation
from pdd_cli.data.properties import Properties, measure_properties, shows_blur
from pdd_cli.engines.winograd import winograd_pays
from pdd_cli.errors import DownloadError, InputError, ResourceError
from pdd_cli.exporting.formats import check_packages, try_forms
from pdd_cli.files import is_within
from pdd_cli.models.discriminator import FeatureDiscriminator, UNetDiscriminator
from pdd_cli.models.features import FeatureNetwork, feature_network
from pdd_cli.models.loading import SRModel, load_sr_model, state_sha256
from pdd_cli.ranks import SINGLE_PROCESS, Ranks
from pdd_cli.reporting.html import window
from pdd_cli.runtime import Runtime, is_out_of_memory, to_channels_last
from pdd_cli.settings.adapt import AdaptConfig, LossWeights, SyntheticSettings
from pdd_cli.upscaling.strength import at_strength, files_at_strength, recommended
from pdd_cli.weights.states import read_state
from pdd_cli.weights.store import Store, invalid_name_reason, valid_name_from

# Settings that may differ between the machines of one run.
_PER_MACHINE_SETTINGS = {
    "real_dir", "root", "pairs_lr", "pairs_hr", "hr_dir", "base", "name", "runs_dir", "features", "export", "device",
    "offline", "val_lr", "val_hr", "teacher",
}  # fmt: skip

_BLUR_IMAGES = 8  # images on which the blur of the source is measured
_BLUR_CROP = 48  # LR pixels

# The default degradation for x1 bases: moderate noise and JPEG compression.
_X1_DEGRADATION: dict[str, Any] = {"noise": (0.0, 15.0), "jpeg": (40.0, 95.0)}


@dataclass(frozen=True)
class WeightFiles:
    """The weights files that a run starts from, and the chosen feature network."""

    base: Path
    generalist: Path | None  # static mode only
    feature_network: str
    features: Path
    teacher: tuple[Path, ...] = ()  # a student's; and that of the teacher's base, if the two are to be blended


@dataclass(eq=False)
class Run:
    """A run that is ready to train. `loop.train` trains it; `publish` registers the weights and writes the report."""

    name: str
    config: AdaptConfig  # `loop.train` replaces it if `time_limit` changes the last step
    folder: RunFolder
    resumed: bool
    sources: Sequence[Source]
    properties: Properties  # of the real images
    models: Models
    features_name: str
    sampler: CropSampler
    judge: Judge
    state: TrainState
    inputs: dict[str, Any]  # checksums of the images and weights that the run uses
    warn: Callable[[str], None]
    say: Callable[[str], None] = lambda text: None
    teacher: Teacher | None = None  # the run trains a student
    time_limit: TimeLimit | None = None  # --minutes

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values, with absolute paths."""
        return absolute(self.config.model_copy(update={"name": self.name})).model_dump(mode="json")

    @property
    def stopped_early(self) -> bool:
        """Whether the last `early_stopping` judgements brought no improvement."""
        scores: dict[int, float] = {}
        for judged in self.state.judgements:
            scores[judged["step"]] = max(judged["score"], scores.get(judged["step"], judged["score"]))
        patience = self.config.early_stopping
        return patience is not False and stalled(list(scores.values()), patience)

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the losses, as numbers."""
        weights = self.config.losses
        if weights.adversarial != "auto":
            return weights
        of_features = 0.45 if self.properties.noisy else 0.9
        return weights.model_copy(update={"adversarial": 0.01 if self.config.discriminator == "unet" else of_features})

    @property
    def hr_from(self) -> str:
        """The origin of the HR images."""
        if self.config.teacher is not None:
            return f"the teacher {self.config.teacher}"
        if self.config.real_dir is None:
            return "the pairs"
        return self._synthetic_hr_from + (" and the pairs" if self.sampler.pairs else "")

    @property
    def lr_images(self) -> str:
        """The number of LR images that are trained on, in words."""
        real, pairs = len(self.sampler.real), len(self.sampler.pairs)
        counts = ((real, "real images"), (pairs, "pairs with ground truth"))
        return " and ".join(f"{count} {kind}" for count, kind in counts if count)

    @property
    def judged_on(self) -> str:
        """The images that the verdict rests on, in words."""
        if self.judge.held_out_pairs:
            return f"{self.judge.held_out_pairs.found} pairs with ground truth"
        return f"{len(self.judge.images)} real images"

    @property
    def _synthetic_hr_from(self) -> str:
        if self.config.hr_dir is None:
            return "the real images, downscaled"
        return "hr_dir and the real images, downscaled" if self.sampler.own_share else "hr_dir"

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.steps or self.stopped_early

    @property
    def verdict_so_far(self) -> str:
        """The judgement of the weights that would be kept now, in a few words: the best one, of a student the last."""
        judgements = self.state.judgements
        if not judgements:
            first = min(self.config.checkpoint_every, self.config.steps)
            return f"first judged at step {first}"
        if self.teacher:
            judgements = [judged for judged in judgements if judged["step"] == judgements[-1]["step"]]
        return f"so far {describe_score(max(judged['score'] for judged in judgements))}"

    @property
    def resume_command(self) -> str:
        """The command that continues this run."""
        runs = self.folder.path.parent
        where = "" if runs == AdaptConfig.model_fields["runs_dir"].default else f" --runs-dir {shlex.quote(str(runs))}"
        return f"pdd adapt --resume --name {self.name}{where}"


@contextlib.contextmanager
def memory_errors(config: AdaptConfig) -> Iterator[None]:
    """Convert out-of-memory errors, of the machine or of the GPU, to a ResourceError with a hint."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"out of memory with batch_size {config.batch_size} and crops of {config.crop} LR pixels",
            "Close other programs, or start again with a smaller --batch-size, --set crop=32, or a smaller --base.",
        ) from error


def prepare_run(
    config: AdaptConfig,
    weights: WeightFiles,
    runtime: Runtime,
    *,
    name: str,
    resume: bool,
    overwrite: bool,
    warn: Callable[[str], None],
    say: Callable[[str], None] = lambda text: None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Run:
    """Check and load everything that a run needs; write nothing. `warn` receives warnings, `say` progress messages.

    Raises InputError if images, weights or the run folder can't be used.
    """
    folder = RunFolder(config.runs_dir / name)
    if resume and folder.checkpoint.exists():
        config = as_started(config, folder.checkpoint)
    if ranks.is_first:
        check_inputs(config, folder, resume=resume, overwrite=overwrite)
    base = load_sr_model(weights.base)
    check_trainable(base, config.base, runtime)
    if ranks.is_first:
        try_forms(config.export, base, "--export")
    generalist = base
    if weights.generalist is not None and config.generalist.mode == "static":
        generalist = load_sr_model(weights.generalist)
        check_channels(generalist, config.generalist.weights)
        if generalist.scale != base.scale:
            raise InputError(
                f"generalist.weights {config.generalist.weights} upscales x{generalist.scale}, "
                f"base {config.base} x{base.scale}",
                "Specialist and generalist must have the same scale.",
            )
    features = feature_network(weights.feature_network, read_state(weights.features), origin=str(weights.features))
    move_to_device(features, runtime)

    images = read_sources(config, base.scale, warn, say)
    gray = base.in_channels == 1 or images.are_gray
    if gray:
        reason = f"{config.base} is a model for gray images" if base.in_channels == 1 else "the LR images are gray"
        say(f"{reason}: all images are converted to gray")
        images = images.in_gray()
    lr_images = images.real or [pair.lr for pair in images.pairs]
    real, hr, pairs = lr_images, images.hr, images.pairs
    properties = measure_properties(real)
    kept_out = held_out_indices(len(real), config.held_out)
    judged_on = select(real, kept_out) or real
    real = select(real, [index for index in range(len(real)) if index not in kept_out])
    held_out_pairs: Sequence[AlignedPair] = []
    if pairs:
        kept_out = held_out_indices(len(pairs), config.held_out)
        held_out_pairs = [pairs[index] for index in kept_out] or pairs
        pairs = [pair for index, pair in enumerate(pairs) if index not in kept_out]
    hr_crop = config.crop * base.scale
    degradation = _degradation(config.synthetic, properties)
    if (
        base.scale == 1
        and config.real_dir is not None
        and not (degradation.blur or degradation.noise or degradation.jpeg)
    ):
        degradation = replace(degradation, **_X1_DEGRADATION)
        warn(
            f"{config.base} restores images without upscaling them: noise and JPEG compression are added to the "
            "synthetic images, which would otherwise have nothing to restore (settings: synthetic.noise, .jpeg, .blur)"
        )
    scales = config.synthetic.hr_scales
    # From noisy images the model would learn to add noise.
    own_share = config.synthetic.own_share if hr and not properties.noisy else 0.0
    if properties.noisy and not hr and config.real_dir is not None and config.teacher is None:
        warn(
            "HR images made from noisy images teach the model to add noise: give sharp photographs instead "
            "(--hr-dir FOLDER, or --hr-dir photos to download some)"
        )
    own_hr: Sequence[RGB] = ()
    if config.real_dir is not None and (own_share or not hr):
        own_hr = downscaled(hr_from_real(real, hr_crop), scales, hr_crop)
    sampler = CropSampler(
        real if config.real_dir is not None else [],
        downscaled(hr, scales, hr_crop) if hr else own_hr,
        config.crop,
        base.scale,
        degradation,
        config.seed,
        config.crop_candidates,
        config.crop_texture,
        own_hr if own_share else (),
        own_share,
        pairs,
        config.pairs_share if config.real_dir is not None else 1.0,
    )

    if ranks.size > 1:
        facts = config.model_dump(mode="json", exclude=_PER_MACHINE_SETTINGS)
        seen = {"images": sampler.digest(), "feature weights": state_sha256(features.state_dict())}
        ranks.require_same({**facts, **seen, "precision": runtime.precision})
    validation_pairs = None
    if ranks.is_first and config.val_lr is not None and config.val_hr is not None:
        validation_pairs = read_pairs(config.val_lr, config.val_hr, base.scale, features)
        validation_pairs = validation_pairs.in_gray() if gray else validation_pairs
    judge = Judge(base, judged_on, real, validation_pairs, runtime)
    if held_out_pairs:
        trained = [pair.lr for pair in pairs]
        judge = replace(
            judge, held_out_pairs=pairs_to_score(held_out_pairs, base.scale, features), pairs_trained_on=trained
        )
    if reason := judge.insufficient:
        warn(f"not enough images to judge the result: {reason}")

    inputs = {
        "base": state_sha256(base.module.state_dict()),
        "generalist": None if generalist is base else state_sha256(generalist.module.state_dict()),
        "features": state_sha256(features.state_dict()),
        **{source.option: dict(source.content) for source in images.sources},
    }
    teacher = None
    if config.teacher is not None:
        model = _load_teacher(weights.teacher, config, base, warn, say)
        sha256 = inputs["teacher"] = state_sha256(model.module.state_dict())
        photographs = config.hr_dir is not None
        teacher = Teacher(model, config.teacher, sha256, sampler, config.teacher_crops, photographs)
    state = new_state(config, base, generalist, sampler, features, runtime)
    if resume and ranks.is_first:
        check_inputs_are_same(folder.checkpoint, inputs)
        load_checkpoint(folder.checkpoint, state)
        old = AdaptConfig.model_validate(checkpoint_settings(folder.checkpoint))
        if old.steps != config.steps:
            new_rate, old_rate = (scheduled_rate(one, state.step) for one in (config, old))
            warn(
                f"{config.steps} steps instead of {old.steps}: the learning rate follows the schedule for "
                f"{config.steps} steps, {new_rate:g} of the initial rate at step {state.step} (before: {old_rate:g}); "
                f"the warm-up of {state.warmup_steps} steps is not repeated"
            )
    move_to_device(base.module, runtime)
    if ranks.is_first:
        properties = properties.with_blur(_upscaled_crops(base, lr_images, runtime))
        say(f"the real images: {properties.describe()}")
    if teacher is not None:
        move_to_device(teacher.model.module, runtime)
    return Run(
        name=name,
        config=config,
        folder=folder,
        resumed=resume,
        sources=images.sources,
        properties=properties,
        models=Models(base, generalist, features, config.generalist, runtime, ranks),
        features_name=weights.feature_network,
        sampler=sampler,
        judge=replace(judge, teacher=teacher.model) if teacher else judge,
        state=state,
        inputs=inputs,
        warn=warn,
        say=say,
        teacher=teacher,
    )


def _upscaled_crops(base: SRModel, images: Sequence[RGB], runtime: Runtime) -> list[tuple[RGB, NDArray[np.float32]]]:
    """The most detailed crop of each of a few images, evenly spread, with its SR by the base."""
    crops = []
    for index in sorted({round(index) for index in np.linspace(0, len(images) - 1, _BLUR_IMAGES)}):
        x, y, width, height = window(images[index], side=_BLUR_CROP)
        lr = np.ascontiguousarray(images[index][y : y + height, x : x + width])
        if shows_blur(lr):
            crops.append((lr, upscale_image(base, lr, runtime)))
    return crops


def _degradation(synthetic: SyntheticSettings, properties: Properties) -> Degradation:
    """The degradation of the synthetic domain; JPEG compression as in the real images unless it is set."""
    jpeg = properties.jpeg if synthetic.jpeg == "auto" else synthetic.jpeg
    return Degradation(
        synthetic.filters, synthetic.blur, synthetic.noise, jpeg, synthetic.second_order, synthetic.antialias
    )


def new_state(
    config: AdaptConfig,
    base: SRModel,
    generalist: SRModel,
    sampler: CropSampler,
    features: FeatureNetwork,
    runtime: Runtime,
) -> TrainState:
    """The state before the first step: the specialist starts from `base`, the discriminator from scratch."""
    torch.manual_seed(config.seed)
    specialist = training_mode(copy.deepcopy(base.module)).requires_grad_(True)
    freeze, rate = chosen_for(specialist, config.optimizer)
    freeze_first(specialist, freeze)
    frozen = copy.deepcopy(generalist.module).eval().requires_grad_(False)
    discriminator: nn.Module = UNetDiscriminator()
    if config.discriminator == "features":
        hr = sampler.batch(0, 8).hr_s.to(runtime.device)
        with torch.no_grad(), runtime.autocast():
            phi = features(hr, DISCRIMINATOR_LAYERS)
        rms = {layer: value.float().square().mean((0, 2, 3)).sqrt().clamp_min(1e-3) for layer, value in phi.items()}
        discriminator = FeatureDiscriminator(rms)
    for network in (specialist, frozen, discriminator):
        move_to_device(network, runtime)
    betas = config.optimizer.betas
    return TrainState(
        specialist=specialist,
        generalist=frozen,
        discriminator=discriminator,
        optimizer=torch.optim.Adam(specialist.parameters(), rate, betas, fused=True),
        discriminator_optimizer=torch.optim.Adam(
            discriminator.parameters(), config.optimizer.discriminator_learning_rate, betas, fused=True
        ),
        warmup_steps=config.discriminator_warmup_steps,
        imitation_steps=config.imitation_steps,
    )


def move_to_device(network: nn.Module, runtime: Runtime) -> None:
    """Move a network to the device, in channels-last format, and on suitable CPUs use Winograd convolutions."""
    to_channels_last(network, runtime.device)
    if winograd_pays(runtime):
        from pdd_cli.engines.winograd.training import accelerate

        accelerate(network)


def check_name(name: str, store: Store, *, replace: bool) -> None:
    """Raise InputError for a name that `upscale --weights NAME` would not find, or that other weights have."""
    if problem := invalid_name_reason(name):
        raise InputError(f"--name {name}: {problem}", f"Choose another --name, such as {valid_name_from(name)}.")
    if not replace and store.get(name) is not None:
        raise InputError(
            f"weights named '{name}' are already installed", "Choose another --name, or replace them with --overwrite."
        )


def default_name(lr_dir: Path, say: Callable[[str], None]) -> str:
    """The default name of a run: that of the folder of its images, without characters that a name can't have."""
    folder = lr_dir.resolve().name
    name = valid_name_from(folder)
    if name != folder:
        say(
            f"the run and its weights are named '{name}', because '{folder}' is not a valid name (to change it: --name)"
        )
    return name


def weight_files(settings: AdaptConfig, get: Callable[[str], Path], warn: Callable[[str], None]) -> WeightFiles:
    """The files of base, generalist and features. `get` returns the file of a name or path or raises DownloadError."""
    base = get(settings.base)
    generalist = get(settings.generalist.weights) if settings.generalist.mode == "static" else None
    teacher: tuple[Path, ...] = ()
    if settings.teacher is not None:
        path = get(settings.teacher)
        teacher = tuple(files_at_strength(path, recommended(path).strength, get))
    network, file = settings.features.network, settings.features.weights
    if file is not None:
        return WeightFiles(base, generalist, network, get(str(file)), teacher)
    if network != "auto":
        return WeightFiles(base, generalist, network, get(network), teacher)
    for candidate in ("vgg19", "vgg16"):
        try:
            return WeightFiles(base, generalist, candidate, get(candidate), teacher)
        except (DownloadError, InputError):
            warn(f"{candidate} is not available; trying the next feature network")
    warn(
        "neither VGG-19 nor VGG-16 is available: distances are measured with efficientnet-lite0, for which the method "
        "was not designed; the result is better with VGG (pdd fetch-weights vgg19 --from FILE)"
    )
    return WeightFiles(base, generalist, "efficientnet-lite0", get("efficientnet-lite0"), teacher)


def _load_teacher(
    files: tuple[Path, ...],
    config: AdaptConfig,
    base: SRModel,
    warn: Callable[[str], None],
    say: Callable[[str], None],
) -> SRModel:
    """The teacher as `pdd upscale --weights` would use it: at the strength that its card recommends."""
    name, recommendation = str(config.teacher), recommended(files[0])

    def find(reference: str) -> Path:
        if len(files) < 2:
            raise InputError(f"{reference} is not installed", f"pdd fetch-weights {reference}")
        return files[1]

    teacher = load_sr_model(files[0])
    check_channels(teacher, f"--teacher {name}")
    if teacher.scale != base.scale:
        raise InputError(
            f"--teacher {name} upscales x{teacher.scale}, --base {config.base} x{base.scale}",
            "Teacher and base must have the same scale: choose another --base.",
        )
    if recommendation.rejected:
        warn(f"pdd adapt rejected the teacher {name}: {recommendation.rejected}")
    if recommendation.strength != 1:
        say(f"the teacher {name} is used at strength {recommendation.strength:g}, as pdd adapt recommends")
    return at_strength(teacher, recommendation.strength, name=name, find=find)


def check_inputs(config: AdaptConfig, folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Raise InputError for problems that can be found before weights are downloaded and images are read."""
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    for option, images in _image_folders(config).items():
        if option != "--real-dir" or not clips_in(images):
            images_below(images, option)
    if config.tensorboard:
        check_tensorboard()
    check_packages(config.export, "--export")


def check_folder(folder: RunFolder, config: AdaptConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise InputError if the run can't start, or can't be resumed, in `folder`."""
    for option, images in _image_folders(config).items():
        if is_within(folder.path, images) or is_within(images, folder.path):
            raise InputError(
                f"the run folder {folder.path} and {option} {images} are the same or one contains the other",
                "Run folders and image folders must be separate: choose another --runs-dir or --name.",
            )
    if not resume:
        if folder.path.exists() and not folder.holds_run and not _is_empty(folder.path):
            raise InputError(
                f"{folder.path} exists and does not contain a run of pdd", "Choose another --name or --runs-dir."
            )
        if folder.checkpoint.exists() and not overwrite:
            raise InputError(
                f"{folder.path} already contains a run",
                "Continue it with --resume, replace it with --overwrite, or choose another --name.",
            )
        return
    if not folder.checkpoint.exists():
        raise InputError(f"--resume: there is no checkpoint in {folder.path}", "Omit --resume to start a run.")
    check_settings(folder.checkpoint, config)


def _image_folders(config: AdaptConfig) -> dict[str, Path]:
    """All folders of images in the settings, by option."""
    folders = {
        "--real-dir": config.real_dir,
        "--pairs-lr": config.pairs_lr,
        "--pairs-hr": config.pairs_hr,
        "--hr-dir": config.hr_dir,
        "--val-lr": config.val_lr,
        "--val-hr": config.val_hr,
    }
    return {option: folder for option, folder in folders.items() if folder is not None}


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
