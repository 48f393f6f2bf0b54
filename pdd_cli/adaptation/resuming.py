"""Checks that a resumed run has the same settings, images and weights as at its start, wherever the files are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdd_cli.adaptation.checkpoint import checkpoint_inputs, checkpoint_settings
from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig, StaticGeneralist
from pdd_cli.weights.states import is_file_reference

# Settings that a resumed run may change. They don't change what is learned; `steps` changes only how long.
_CHANGEABLE = {
    "steps", "minutes", "name", "runs_dir", "checkpoint_every", "preview_every", "export", "device", "precision",
    "offline", "val_lr", "val_hr", "early_stopping", "tensorboard", "keep_checkpoints",
}  # fmt: skip
# Settings that runs of earlier versions don't have, with the values that amount to what those versions did.
_VALUES_BEFORE: dict[str, dict[str, Any]] = {
    "losses": {"self_ensemble": 0.0},
    "synthetic": {"own_share": 0.0},
    "optimizer": {"freeze": 0.0},
}
_SHOWN = 3


def absolute(config: AdaptConfig) -> AdaptConfig:
    """`config` with absolute paths of the inputs, which are valid in any working directory."""

    def resolved(path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()

    def weights(reference: str) -> str:
        return str(Path(reference).expanduser().resolve()) if is_file_reference(reference) else reference

    generalist = config.generalist
    if isinstance(generalist, StaticGeneralist):
        generalist = generalist.model_copy(update={"weights": weights(generalist.weights)})
    return config.model_copy(
        update={
            **{
                name: resolved(getattr(config, name))
                for name in ("real_dir", "root", "pairs_lr", "pairs_hr", "hr_dir", "val_lr", "val_hr")
            },
            "base": weights(config.base),
            "teacher": config.teacher and weights(config.teacher),
            "generalist": generalist,
            "features": config.features.model_copy(update={"weights": resolved(config.features.weights)}),
        }
    )


def as_started(config: AdaptConfig, checkpoint: Path) -> AdaptConfig:
    """`config` in which settings that are newer than the run of `checkpoint` change nothing."""
    stored, update = checkpoint_settings(checkpoint), {}
    for section, before in _VALUES_BEFORE.items():
        newer = {key: value for key, value in before.items() if key not in stored.get(section, {})}
        update[section] = getattr(config, section).model_copy(update=newer)
    return config.model_copy(update=update)


def check_settings(checkpoint: Path, config: AdaptConfig) -> None:
    """Raise InputError if `config` differs from the settings of `checkpoint` in more than the changeable settings."""
    # If the checkpoint has checksums, images and weights are compared by content and may have moved.
    by_content = checkpoint_inputs(checkpoint) is not None
    old = AdaptConfig.model_validate(checkpoint_settings(checkpoint))
    before, now = (_comparable(as_started(one, checkpoint), without_paths=by_content) for one in (old, config))
    changed = sorted(key for key in now if key not in _CHANGEABLE and now[key] != before[key])
    if changed:
        differences = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed)
        raise InputError(
            f"--resume: the settings differ from those of {checkpoint.parent}: {differences}", "Use the same settings."
        )


def check_inputs_are_same(checkpoint: Path, inputs: Mapping[str, Any]) -> None:
    """Raise InputError if images or weights differ from those at the start of the run, if checksums are known."""
    for key, old in (checkpoint_inputs(checkpoint) or {}).items():
        now = inputs.get(key)
        if now == old:
            continue
        if not isinstance(old, dict) or not isinstance(now, dict):
            raise InputError(
                f"--resume: the weights of {key} differ from those with which the run in {checkpoint.parent} started",
                "Use the same weights, or start a new run under another --name.",
            )
        differences = {
            "changed": [name for name in old if name in now and old[name] != now[name]],
            "missing": [name for name in old if name not in now],
            "new": [name for name in now if name not in old],
        }
        listed = "; ".join(
            f"{len(names)} {change} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
            for change, names in differences.items()
            if names
        )
        raise InputError(
            f"--resume: the images of {key} differ from those with which the run in {checkpoint.parent} started: "
            f"{listed}",
            "Restore the images, or start a new run under another --name.",
        )


def _comparable(config: AdaptConfig, *, without_paths: bool) -> dict[str, Any]:
    """The settings as plain values that can be compared."""
    settings = absolute(config).model_dump(mode="json")
    if without_paths:
        del settings["base"]
        for key in ("real_dir", "root", "pairs_lr", "pairs_hr", "hr_dir", "teacher"):
            settings[key] = settings[key] is not None
        del settings["features"]["weights"]
        settings["generalist"].pop("weights", None)
    return settings
