"""The folder of a run of `adapt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pdd_cli.errors import InputError
from pdd_cli.exporting.hub_upload import BEST, COMPARISON
from pdd_cli.exporting.names import SUFFIXES, default_path, paths_of
from pdd_cli.exporting.ownership import is_own
from pdd_cli.files import write_errors
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.store import valid_name_from


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, `runs/NAME/`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def best(self) -> Path:
        """The weights with the best judgement so far; those of the last judgement if the run trains a student."""
        return self.path / BEST

    @property
    def teacher_crops(self) -> Path:
        """Crops of the real images and their SR by the teacher."""
        return self.path / "teacher_crops.safetensors"

    @property
    def judgements(self) -> Path:
        """A line for each judgement: step, which weights, measured values."""
        return self.path / "judgements.jsonl"

    @property
    def verdict(self) -> Path:
        return self.path / "verdict.json"

    @property
    def report(self) -> Path:
        """The report of the run as one HTML page."""
        return self.path / "report.html"

    @property
    def comparison(self) -> Path:
        """Crops of images, upscaled with the base and with the adapted weights, for a model card."""
        return self.path / COMPARISON

    @property
    def tensorboard(self) -> Path:
        """The folder of the TensorBoard events, if they are enabled."""
        return self.path / "tensorboard"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def checkpoints(self) -> Path:
        """The folder of the weights of the last judgements, if they are kept."""
        return self.path / "checkpoints"

    def kept(self) -> list[Path]:
        """The kept weights, oldest first."""
        return sorted(self.checkpoints.glob("step_*.safetensors"))

    @property
    def holds_run(self) -> bool:
        """Whether the folder contains a run of pdd."""
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and isinstance(content.get("adapt"), dict) and "real_dir" in content["adapt"]

    def clear(self) -> None:
        """Delete the files that a run writes, and nothing else. Raises InputError if a file can't be deleted."""
        files = [self.config, self.checkpoint, self.log, self.best, self.judgements, self.verdict, self.report]
        files.append(self.teacher_crops)
        files.append(self.comparison)
        name = self.path.name
        exports = {  # the scale is a part of ncnn's file names
            file: form
            for form in SUFFIXES
            for scale in range(1, 17)
            for file in paths_of(form, default_path(form, self.path, name, scale))
        }
        files += [file for file, form in exports.items() if file.is_file() and is_own(form, file)]
        files += [*self.kept(), *self.previews.glob("step_*.png"), *self.tensorboard.glob("events.out.tfevents.*")]
        with write_errors(self.path):
            for file in files:
                file.unlink(missing_ok=True)


def find_run(given: Mapping[str, Any]) -> RunFolder:
    """The folder of the run to resume, from the other settings that are given.

    Raises InputError if they don't identify one run.
    """
    runs = Path(given.get("runs_dir") or AdaptConfig.model_fields["runs_dir"].default).expanduser()
    if given.get("name"):
        named = Path(given["name"]).expanduser()
        return RunFolder(named if len(named.parts) > 1 else runs / named)
    if lr_dir := given.get("real_dir") or given.get("root") or given.get("pairs_lr"):
        return RunFolder(runs / valid_name_from(Path(lr_dir).expanduser().resolve().name))
    found = sorted(path.parent for path in runs.glob("*/checkpoint.pt"))
    if len(found) == 1:
        return RunFolder(found[0])
    raise InputError(
        "--resume: name the run to continue with --name",
        f"In {runs}: {', '.join(path.name for path in found)}." if found else f"There is no run in {runs}.",
    )
