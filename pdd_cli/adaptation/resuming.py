"""Whether a run that goes on is the one that was begun: the same settings, images and weights, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdd_cli.adaptation.checkpoint import checkpoint_inputs, checkpoint_settings
from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig, StaticGeneralist
from pdd_cli.weights.states import names_file

# What a resumed run may change: these don't alter what is learnt, or (steps) only how long.
_CHANGEABLE = {
    "steps", "name", "runs_dir", "checkpoint_every", "preview_every", "export", "device", "precision", "offline",
    "val_lr", "val_hr", "early_stopping", "tensorboard",
}  # fmt: skip
_SHOWN = 3


def absolute(config: AdaptConfig) -> AdaptConfig:
    """`config` with the inputs by absolute paths, so that they are found from any folder."""

    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()

    def weights(reference: str) -> str:
        return str(Path(reference).expanduser().resolve()) if names_file(reference) else reference

    generalist = config.generalist
    if isinstance(generalist, StaticGeneralist):
        generalist = generalist.model_copy(update={"weights": weights(generalist.weights)})
    return config.model_copy(
        update={
            **{name: whole(getattr(config, name)) for name in ("real_dir", "hr_dir", "val_lr", "val_hr")},
            "base": weights(config.base),
            "generalist": generalist,
            "features": config.features.model_copy(update={"weights": whole(config.features.weights)}),
        }
    )


def check_settings(checkpoint: Path, config: AdaptConfig) -> None:
    """Raise InputError where `config` isn't what the run of `checkpoint` began with, but for what may change."""
    # Where checksums were kept, they say whether images and weights are the same, whatever their path.
    by_content = checkpoint_inputs(checkpoint) is not None
    old = AdaptConfig.model_validate(checkpoint_settings(checkpoint))
    before, now = (_comparable(one, without_paths=by_content) for one in (old, config))
    changed = sorted(key for key in now if key not in _CHANGEABLE and now[key] != before[key])
    if changed:
        differences = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed)
        raise InputError(
            f"--resume: the settings differ from those of {checkpoint.parent}: {differences}", "Give them as they were."
        )


def check_inputs_are_same(checkpoint: Path, inputs: Mapping[str, Any]) -> None:
    """Raise InputError where images or weights aren't those that the run began with, as far as that is known."""
    for key, old in (checkpoint_inputs(checkpoint) or {}).items():
        now = inputs.get(key)
        if now == old:
            continue
        if not isinstance(old, dict) or not isinstance(now, dict):
            raise InputError(
                f"--resume: the weights of {key} aren't those that the run in {checkpoint.parent} began with",
                "Give the same weights, or start a new run under another --name.",
            )
        differences = {
            "changed": [name for name in old if name in now and old[name] != now[name]],
            "missing": [name for name in old if name not in now],
            "new": [name for name in now if name not in old],
        }
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
            for what, names in differences.items()
            if names
        )
        raise InputError(
            f"--resume: the images of {key} aren't those that the run in {checkpoint.parent} began with: {listed}",
            "Put them back as they were, or start a new run under another --name.",
        )


def _comparable(config: AdaptConfig, *, without_paths: bool) -> dict[str, Any]:
    """The settings in a form in which equal ones are equal."""
    settings = absolute(config).model_dump(mode="json")
    if without_paths:
        del settings["base"], settings["real_dir"]
        settings["hr_dir"] = settings["hr_dir"] is not None
        del settings["features"]["weights"]
        settings["generalist"].pop("weights", None)
    return settings
