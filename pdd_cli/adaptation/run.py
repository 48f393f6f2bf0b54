"""One run of `adapt`: its folder, from the checked settings to the registered weights."""

from __future__ import annotations

import contextlib
import copy
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from pdd_cli.adaptation.checkpoint import (
    TrainState,
    checkpoint_settings,
    load_checkpoint,
    save_checkpoint,
)
from pdd_cli.adaptation.export import check_export, export
from pdd_cli.adaptation.folder import RunFolder
from pdd_cli.adaptation.judge import STRENGTHS, Judgement, Verdict, decide, held_out, judge, stalled, too_little
from pdd_cli.adaptation.loop import StepReport, new_state, place, scheduled_rate, train
from pdd_cli.adaptation.preview import centre, sheet, to_rgb8, upscaled
from pdd_cli.adaptation.resuming import absolute, check_inputs_are_same, check_settings
from pdd_cli.adaptation.sources import Source, read_sources
from pdd_cli.adaptation.tensorboard import TensorBoardLog, check_board
from pdd_cli.adaptation.trainable import check_rgb, check_trainable
from pdd_cli.adaptation.validation import Pairs, Truth, read_pairs
from pdd_cli.config import AdaptConfig
from pdd_cli.data.datasets import RGB, CropSampler, downscaled, hr_from_real, images_below
from pdd_cli.data.degradations import Degradation
from pdd_cli.distributed import ALONE, World
from pdd_cli.errors import InputError, PddError, ResourceError
from pdd_cli.files import append_line, atomic_write, is_within, remove_leftovers, write_errors, write_text
from pdd_cli.models.features import FeatureNetwork, feature_network
from pdd_cli.models.loading import SRModel, interpolated, load_sr_model, state_sha256
from pdd_cli.reporting.adaptation import ReportImage, RunReport, as_page
from pdd_cli.reporting.html import window
from pdd_cli.runtime import Runtime, is_out_of_memory
from pdd_cli.weights.states import read_state
from pdd_cli.weights.store import Card, Entry, Store

# What may differ between the machines of one run.
_OF_A_MACHINE = {
    "real_dir", "hr_dir", "base", "name", "runs_dir", "features", "export", "device", "offline", "val_lr", "val_hr",
}  # fmt: skip

# Of a x1 base's synthetic domain, where none is set: a moderate camera, saved once or twice.
_X1_DEGRADATION = {"noise": (0.0, 15.0), "jpeg": (40.0, 95.0)}

PREVIEW_IMAGES = 4
PREVIEW_SIZE = 64  # LR pixels
_REPORT_IMAGES = 6
_REPORT_SIZE = 128


@dataclass(frozen=True)
class WeightFiles:
    """The weights that a run starts from, as files, and the feature network that was chosen."""

    base: Path
    generalist: Path | None  # static mode only
    feature_network: str
    features: Path


@dataclass(frozen=True)
class Judged:
    """What was found of a model: without ground truth, which counts, and with it where there are pairs."""

    judgement: Judgement
    truth: Truth | None

    def as_document(self) -> dict[str, Any]:
        return asdict(self.judgement) | ({"truth": asdict(self.truth)} if self.truth else {})


@dataclass(frozen=True)
class Conclusion:
    """The verdict, and what was found of the base and of the best weights by strength."""

    verdict: Verdict
    base: Judged
    adapted: Mapping[float, Judged]

    @property
    def strength(self) -> float:
        """The recommended strength; of rejected weights the full one."""
        return self.verdict.strength or max(self.adapted)

    def truth_document(self) -> dict[str, Any] | None:
        """What the pairs say of that strength and of the base; None without pairs."""
        ours, base = self.adapted[self.strength].truth, self.base.truth
        return {"base": asdict(base), "adapted": asdict(ours)} if ours and base else None

    def truth_in_words(self) -> str:
        """The same for people; "" without pairs."""
        ours, base = self.adapted[self.strength].truth, self.base.truth
        if ours is None or base is None:
            return ""
        text = f"by the ground truth, at strength {self.strength:g}: {ours.describe(base)}"
        better = ours.psnr > base.psnr
        if self.verdict.keep is not None and better == (ours.distance < base.distance) != self.verdict.keep:
            text += ". That speaks against the verdict: trust the ground truth, if the pairs look as your images do"
        return text


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to train."""

    name: str
    config: AdaptConfig
    folder: RunFolder
    resumed: bool
    sources: Sequence[Source]
    base: SRModel
    generalist: SRModel
    base_sha256: str
    features_name: str
    features: FeatureNetwork
    domains: CropSampler
    judged_on: Sequence[RGB]  # real images: held out of training, or all where there are too few
    pairs: Pairs | None  # with ground truth, for the reader
    state: TrainState
    runtime: Runtime
    world: World
    inputs: dict[str, Any]  # checksums of all that is trained on and from
    notify: Callable[[str], None]

    def train(self, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
        """Train to the last step, or until `should_stop()`; writes log, checkpoints and previews on the way.

        Raises ResourceError where memory or disk runs out; the last checkpoint is whole then.
        """
        try:
            with memory_errors(self.config):
                yield from self._train(should_stop)
        except ResourceError as error:
            if self.folder.checkpoint.exists():
                error.hint += f" The last checkpoint is whole: {self.resume_command} goes on from it."
            raise

    def _train(self, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
        if not self.world.is_first:
            if not self.world.any(False):
                yield from self._steps(lambda judge: False, lambda: None, should_stop)
            return
        self._open_folder()
        _cut_log(self.folder.log, self.state.step)
        _cut_log(self.folder.judgements, self.state.step)
        if self.world.any(self.finished):
            return
        base_panels = [self._picture(self.base, lr) for lr in self._preview_crops()]
        board = TensorBoardLog(self.folder.board if self.config.tensorboard else None, self.notify)
        board.begin(self.state.step)
        with contextlib.closing(board):
            for report in self._steps(
                lambda judge: self._save(judge, board), lambda: self._write_preview(base_panels, board), should_stop
            ):
                line = {
                    "step": report.step,
                    **report.losses,
                    "learning_rate": report.learning_rate,
                    "seconds": report.seconds,
                    **({"event": report.event} if report.event else {}),
                }
                append_line(self.folder.log, json.dumps(line))
                losses = {f"loss/{name}": value for name, value in report.losses.items()}
                board.scalars({**losses, "learning_rate": report.learning_rate}, report.step)
                if self.state.step < report.step:  # rolled back
                    board.begin(self.state.step)
                yield report

    def _steps(
        self, save: Callable[[bool], bool], preview: Callable[[], None], should_stop: Callable[[], bool]
    ) -> Iterator[StepReport]:
        return train(
            self.config, self.state, self.base, self.generalist, self.domains, self.features, self.runtime,
            save=save,
            restore=lambda: load_checkpoint(self.folder.checkpoint, self.state, self.world),
            preview=preview,
            should_stop=should_stop,
            world=self.world,
        )  # fmt: skip

    def _open_folder(self) -> None:
        if self.folder.checkpoint.exists() and not self.resumed:
            self.folder.clear()  # --overwrite: without it nobody gets here
        with write_errors(self.folder.path):
            self.folder.previews.mkdir(parents=True, exist_ok=True)
        remove_leftovers([self.folder.path, self.folder.previews])
        write_text(self.folder.config, yaml.safe_dump({"adapt": self._settings()}, sort_keys=False))

    def _save(self, judge: bool, board: TensorBoardLog) -> bool:
        """A checkpoint; with `judge` its weights are judged, and kept if they are the best so far.

        An interruption doesn't judge: the run that goes on from there is to be the one that wasn't interrupted, and
        torchrun gives it but 30 s to end. Whether the run has stalled is returned.
        """
        try:
            if judge:
                self._judge_candidates(board)
        finally:  # what was learnt stays, whatever went wrong in judging it
            save_checkpoint(self.folder.checkpoint, self.state, self._settings(), self.inputs)
        return self.stopped_early

    def _judge_candidates(self, board: TensorBoardLog) -> None:
        """Judge the weights of this step, and keep the best so far."""
        candidates = {"specialist": self.state.specialist}
        if self.config.generalist.mode == "ema":
            candidates["ema"] = self.state.generalist
        best = max((line["score"] for line in _read_lines(self.folder.judgements)), default=float("-inf"))
        for which, module in candidates.items():
            found = self.judge(replace(self.base, module=module))
            score = found.judgement.score(self.base_judged.judgement, self.base.scale)
            if score > best or not self.folder.best.exists():
                best = score
                with atomic_write(self.folder.best) as temporary:
                    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, temporary)
            line = {"step": self.state.step, "which": which, "score": score, **found.as_document()}
            append_line(self.folder.judgements, json.dumps(line))
            board.scalars(_tags(line), self.state.step)

    @property
    def stopped_early(self) -> bool:
        """Whether so many judgements as the settings say have brought nothing better."""
        scores: dict[int, float] = {}
        for line in _read_lines(self.folder.judgements):
            scores[line["step"]] = max(line["score"], scores.get(line["step"], line["score"]))
        patience = self.config.early_stopping
        return patience is not False and stalled(list(scores.values()), patience)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.steps or self.stopped_early

    @cached_property
    def base_judged(self) -> Judged:
        """What is found of the base."""
        return self.judge(self.base)

    def judge(self, model: SRModel) -> Judged:
        """Look at what `model` makes of the held-out images, and of the pairs where there are any."""
        truth = self.pairs.score(model, self.runtime) if self.pairs else None
        return Judged(judge(model, self.judged_on, self.runtime), truth)

    def conclude(self) -> Conclusion:
        """Judge the best weights at several strengths, and say whether they are better than the base."""
        base_state, best = self._base_state(), read_state(self.folder.best)
        trial = replace(self.base, module=copy.deepcopy(self.base.module))
        judged = {}
        for strength in STRENGTHS:
            trial.module.load_state_dict(interpolated(base_state, best, strength))
            judged[strength] = self.judge(trial)
        base = self.base_judged
        if reason := too_little(self.judged_on, self.domains.real):
            verdict = Verdict(None, f"too little to judge: {reason}", max(STRENGTHS))
        else:
            by_strength = {strength: found.judgement for strength, found in judged.items()}
            verdict = decide(by_strength, base.judgement, self.base.scale)
        return Conclusion(verdict, base, judged)

    def write_verdict(self, conclusion: Conclusion) -> None:
        """Write verdict.json."""
        write_text(self.folder.verdict, json.dumps(self._verdict_document(conclusion), indent=2) + "\n")

    def _verdict_document(self, conclusion: Conclusion) -> dict[str, Any]:
        verdict, base = conclusion.verdict, conclusion.base
        return {
            "keep": verdict.keep,
            "reason": verdict.reason,
            "strength": verdict.strength,
            "images": len(self.judged_on),
            "pairs": self.pairs.found if self.pairs else 0,
            "base": base.as_document(),
            "adapted": [
                {
                    "strength": strength,
                    "score": found.judgement.score(base.judgement, self.base.scale),
                    **found.as_document(),
                }
                for strength, found in conclusion.adapted.items()
            ],
        }

    def write_report(self, conclusion: Conclusion | None) -> Path:
        """Write the page; without a conclusion one without verdict and pictures, which takes no time."""
        page = as_page(
            RunReport(
                name=self.name,
                steps=self.state.step,
                most_steps=self.config.steps,
                facts={
                    "Base": f"{self.config.base} ({self.base.architecture} x{self.base.scale})",
                    "Features": self.features_name,
                    "Device": str(self.runtime),
                    "Real images": f"{len(self.domains.real)} trained on, {len(self.judged_on)} judged on",
                },
                settings=self._settings(),
                defaults={**AdaptConfig(real_dir=Path()).model_dump(mode="json"), "real_dir": None},
                log=_read_lines(self.folder.log),
                judgements=_read_lines(self.folder.judgements),
                base=self.base_judged.as_document(),
                verdict=self._verdict_document(conclusion) if conclusion else None,
                truth=conclusion.truth_in_words() if conclusion else "",
                shots=self._shots(conclusion.strength) if conclusion else (),
            )
        )
        write_text(self.folder.report, page)
        return self.folder.report

    def _shots(self, strength: float) -> list[ReportImage]:
        """Pictures of held-out images, where they have most detail, and of pairs; the best weights at `strength`."""
        adapted = replace(self.base, module=copy.deepcopy(self.base.module))
        adapted.module.load_state_dict(interpolated(self._base_state(), read_state(self.folder.best), strength))
        crops: list[tuple[str, str, RGB, RGB | None]] = []
        for number, image in enumerate(self.judged_on[:_REPORT_IMAGES], 1):
            x, y, width, height = window(image, side=_REPORT_SIZE)
            crop = np.ascontiguousarray(image[y : y + height, x : x + width])
            crops.append((f"image {number}", "held-out images", crop, None))
        if self.pairs:
            known = zip(self.pairs.names, self.pairs.lr, self.pairs.hr, strict=True)
            crops += [(name, "with ground truth", lr, hr) for name, lr, hr in list(known)[:_REPORT_IMAGES]]
        return [
            ReportImage(name, group, lr, self._picture(self.base, lr), self._picture(adapted, lr), hr)
            for name, group, lr, hr in crops
        ]

    def _base_state(self) -> dict[str, Tensor]:
        return {key: value.detach().cpu() for key, value in self.base.module.state_dict().items()}

    def register(self, store: Store, verdict: Verdict) -> Entry:
        """Put the best weights into the store under the run's name."""
        weights = read_state(self.folder.best)
        broken = [key for key, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            raise InputError(
                f"the adapted weights hold values that are not finite ({broken[0]}); nothing was registered"
            )
        base_card = self.base.card
        card = Card(
            name=self.name,
            architecture=self.base.architecture,
            scale=self.base.scale,
            licence=base_card.licence if base_card else "that of the base weights",
            source=f"pdd adapt, {self.state.step} steps from {self.config.base}",
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            base=absolute(self.config).base,
            base_sha256=self.base_sha256,
            adapted={
                "steps": self.state.step,
                "features": self.features_name,
                "real_images": len(self.domains.real),
                "hr_images": self.sources[-1].used if self.config.hr_dir else len(self.domains.real),
                "hr_from": "hr_dir" if self.config.hr_dir else "the real images, downscaled",
                "precision": self.runtime.precision,
                "verdict": verdict.word,
                "reason": verdict.reason,
                "strength": verdict.strength,
                "settings": self._settings(),
            },
        )
        return store.add(card, weights)

    def export(self, form: str) -> Path:
        """Write the best weights in a form for other programs; `runs/NAME/NAME.pth` and the like."""
        path = self.folder.path / f"{self.name}.{form}"
        export(path, load_sr_model(self.folder.best))
        return path

    def _settings(self) -> dict[str, Any]:
        return absolute(self.config.model_copy(update={"name": self.name})).model_dump(mode="json")

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        runs = self.folder.path.parent
        where = "" if runs == AdaptConfig.model_fields["runs_dir"].default else f" --runs-dir {shlex.quote(str(runs))}"
        return f"pdd adapt --resume --name {self.name}{where}"

    def _preview_crops(self) -> list[RGB]:
        return [centre(image, PREVIEW_SIZE) for image in self.domains.real[:PREVIEW_IMAGES]]

    def _picture(self, model: SRModel, lr: RGB) -> RGB:
        return to_rgb8(upscaled(model, lr, self.runtime))

    def _write_preview(self, base_panels: list[RGB], board: TensorBoardLog) -> None:
        adapted = replace(self.base, module=self.state.specialist)
        scale = self.base.scale
        rows = [
            (lr.repeat(scale, 0).repeat(scale, 1), base, self._picture(adapted, lr))
            for lr, base in zip(self._preview_crops(), base_panels, strict=True)
        ]
        path = self.folder.previews / f"step_{self.state.step:06d}.png"
        picture = sheet(rows, ("LR", "base", f"adapted, step {self.state.step}"))
        try:
            with atomic_write(path) as temporary:
                picture.save(temporary, "PNG")
        except PddError as error:
            self.notify(f"no preview of step {self.state.step}: {error.message}")
        board.picture("preview", picture, self.state.step)


@contextlib.contextmanager
def memory_errors(config: AdaptConfig) -> Iterator[None]:
    """Out of memory, of the machine or of the GPU, as a ResourceError with what would help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"out of memory with batch_size {config.batch_size} and crops of {config.crop} LR pixels",
            "Close other programs, or start anew with a smaller --batch-size, --set crop=32, or a smaller --base.",
        ) from error


def prepare_run(
    config: AdaptConfig,
    weights: WeightFiles,
    runtime: Runtime,
    *,
    name: str,
    resume: bool,
    overwrite: bool,
    notify: Callable[[str], None],
    say: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
) -> Run:
    """Check and load all that a run needs; nothing is written. `notify` is given warnings, `say` what is being done.

    Raises InputError for images, weights or a run folder that can't be used.
    """
    folder = RunFolder(config.runs_dir / name)
    if world.is_first:
        check_inputs(config, folder, resume=resume, overwrite=overwrite)
    base = load_sr_model(weights.base)
    check_trainable(base, config.base)
    generalist = base
    if weights.generalist is not None and config.generalist.mode == "static":
        generalist = load_sr_model(weights.generalist)
        check_rgb(generalist, config.generalist.weights)
        if generalist.scale != base.scale:
            raise InputError(
                f"generalist.weights {config.generalist.weights} upscales x{generalist.scale}, "
                f"base {config.base} x{base.scale}",
                "Specialist and generalist must have one scale.",
            )
    features = feature_network(weights.feature_network, read_state(weights.features), origin=str(weights.features))
    place(features, runtime)

    images = read_sources(config, base.scale, notify, say)
    real, hr = images.real, images.hr
    kept_out = held_out(len(real), config.held_out)
    judged_on = [real[index] for index in kept_out] or real
    real = [image for index, image in enumerate(real) if index not in kept_out]
    if reason := too_little(judged_on, real):
        notify(f"there is too little to judge the result on: {reason}")
    hr_crop = config.crop * base.scale
    synthetic = config.synthetic
    if base.scale == 1 and not (synthetic.blur or synthetic.noise or synthetic.jpeg):
        synthetic = synthetic.model_copy(update=_X1_DEGRADATION)
        notify(
            f"{config.base} restores images at their size: noise and JPEG compression are added to the synthetic "
            "domain, which has nothing to restore otherwise (synthetic.noise, .jpeg and .blur choose others)"
        )
    domains = CropSampler(
        real,
        downscaled(hr or hr_from_real(real, hr_crop), synthetic.hr_scales, hr_crop),
        config.crop,
        base.scale,
        Degradation(synthetic.filters, synthetic.blur, synthetic.noise, synthetic.jpeg, synthetic.second_order),
        config.seed,
        config.crop_candidates,
        config.crop_texture,
    )

    if world.size > 1:
        facts = config.model_dump(mode="json", exclude=_OF_A_MACHINE)
        seen = {"images": domains.digest(), "feature weights": state_sha256(features.state_dict())}
        world.require_same({**facts, **seen, "precision": runtime.precision})
    pairs = None
    if world.is_first and config.val_lr is not None and config.val_hr is not None:
        pairs = read_pairs(config.val_lr, config.val_hr, base.scale, features)

    base_sha256 = state_sha256(base.module.state_dict())
    inputs = {
        "base": base_sha256,
        "generalist": None if generalist is base else state_sha256(generalist.module.state_dict()),
        "features": state_sha256(features.state_dict()),
        **{source.option: dict(source.content) for source in images.sources},
    }
    state = new_state(config, base, generalist, domains, features, runtime)
    if resume and world.is_first:
        check_inputs_are_same(folder.checkpoint, inputs)
        load_checkpoint(folder.checkpoint, state)
        before = AdaptConfig.model_validate(checkpoint_settings(folder.checkpoint))
        if before.steps != config.steps:
            now, then = (scheduled_rate(one, state.step) for one in (config, before))
            notify(
                f"{config.steps} steps instead of {before.steps}: the learning rate is that of a run of "
                f"{config.steps}, {now:g} of the first at step {state.step} (it was {then:g}); "
                f"the warm-up of {state.warmup_steps} steps is not repeated"
            )
    place(base.module, runtime)
    return Run(
        name=name,
        config=config,
        folder=folder,
        resumed=resume,
        sources=images.sources,
        base=base,
        generalist=generalist,
        base_sha256=base_sha256,
        features_name=weights.feature_network,
        features=features,
        domains=domains,
        judged_on=judged_on,
        pairs=pairs,
        state=state,
        runtime=runtime,
        world=world,
        inputs=inputs,
        notify=notify,
    )


def check_inputs(config: AdaptConfig, folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Raise InputError for what is known to fail before weights are downloaded and images read."""
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    for option, images in _image_folders(config).items():
        images_below(images, option)
    if config.tensorboard:
        check_board()
    check_export(config.export)


def check_folder(folder: RunFolder, config: AdaptConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise InputError where the run can't begin in `folder`, or can't go on there."""
    for option, images in _image_folders(config).items():
        if is_within(folder.path, images) or is_within(images, folder.path):
            raise InputError(
                f"the run folder {folder.path} and {option} {images} lie in each other",
                "A run keeps its files apart from images: choose another --runs-dir or --name.",
            )
    if not resume:
        if folder.path.exists() and not folder.holds_run and not _is_empty(folder.path):
            raise InputError(
                f"{folder.path} exists and holds no run of pdd", "Choose another --name or --runs-dir for the run."
            )
        if folder.checkpoint.exists() and not overwrite:
            raise InputError(
                f"{folder.path} holds a run already",
                "Continue it with --resume, replace it with --overwrite, or choose another --name.",
            )
        return
    if not folder.checkpoint.exists():
        raise InputError(f"--resume: there is no checkpoint in {folder.path}", "Leave --resume out to start a run.")
    check_settings(folder.checkpoint, config)


def _image_folders(config: AdaptConfig) -> dict[str, Path]:
    """Every folder of images that the settings name, by its option."""
    folders = {
        "--real-dir": config.real_dir,
        "--hr-dir": config.hr_dir,
        "--val-lr": config.val_lr,
        "--val-hr": config.val_hr,
    }
    return {option: folder for option, folder in folders.items() if folder is not None}


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _tags(judged: Mapping[str, Any]) -> dict[str, float]:
    """A line of judgements.jsonl as TensorBoard's tags, those of one measure below each other."""
    values = {f"judgement/{key}": judged[key] for key in ("score", "consistency", "drift", "texture", "grain")}
    values |= {f"truth/{key}": value for key, value in judged.get("truth", {}).items()}
    return {f"{tag}/{judged['which']}": value for tag, value in values.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _cut_log(path: Path, step: int) -> None:
    """Drop the log's lines after `step`: those steps are done again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
