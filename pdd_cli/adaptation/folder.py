"""The folder of a run of `adapt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from pdd_cli.files import write_errors


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
        """The best weights so far, by the judgements."""
        return self.path / "best.safetensors"

    @property
    def judgements(self) -> Path:
        """A line for each judgement: step, which weights, what was measured."""
        return self.path / "judgements.jsonl"

    @property
    def verdict(self) -> Path:
        return self.path / "verdict.json"

    @property
    def report(self) -> Path:
        """What there is to look at and to know of the run, as one page."""
        return self.path / "report.html"

    @property
    def board(self) -> Path:
        """Events for TensorBoard, where they are asked for."""
        return self.path / "tensorboard"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def holds_run(self) -> bool:
        """Whether a run of pdd has begun here."""
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and isinstance(content.get("adapt"), dict) and "real_dir" in content["adapt"]

    def clear(self) -> None:
        """Delete the files that a run writes, and nothing else. Raises InputError where that is not permitted."""
        files = [self.config, self.checkpoint, self.log, self.best, self.judgements, self.verdict, self.report]
        files += [self.path / f"{self.path.name}.{form}" for form in ("pth", "onnx", "safetensors")]
        files += [*self.previews.glob("step_*.png"), *self.board.glob("events.out.tfevents.*")]
        with write_errors(self.path):
            for file in files:
                file.unlink(missing_ok=True)
