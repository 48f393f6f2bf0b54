"""Interpolation between the weights of an adapted model and of its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdd_cli.errors import InputError, PddError
from pdd_cli.observer import Observer
from pdd_cli.weights.store import read_card

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel


@dataclass(frozen=True)
class Recommendation:
    """What `pdd adapt` recommends: the `strength` to use, 1 by default, and the reason why it `rejected` weights."""

    strength: float = 1.0
    rejected: str = ""


def split_strength(name: str) -> tuple[str, float | None]:
    """The weights and the strength of NAME@STRENGTH; None for a name without one.

    Raises InputError for a strength that is not within 0 and 1.
    """
    weights, _, text = name.rpartition("@")
    try:
        strength = float(text)
    except ValueError:  # a revision of the Hub, or a file with @ in its name
        return name, None
    if not weights:
        return name, None
    if not 0 <= strength <= 1:
        raise InputError(f"{name}: the strength {text} is not within 0 and 1")
    return weights, strength


def recommended(path: Path) -> Recommendation:
    """The recommendation in the card of the weights at `path`."""
    card = read_card(path)
    adapted = card.adapted if card is not None and card.adapted is not None else {}
    strength = adapted.get("strength")
    if adapted.get("verdict") == "reject":
        return Recommendation(rejected=str(adapted.get("reason") or "the base is better"))
    if adapted.get("verdict") == "keep" and isinstance(strength, float | int) and 0 < strength < 1:
        return Recommendation(float(strength))
    return Recommendation()


def choose_strength(path: Path, requested: float | None, *, name: str, observer: Observer) -> float:
    """The `requested` strength for the weights at `path`, or else the recommended one, which is reported.

    Rejected weights are warned of. `name` is for messages.
    """
    recommendation = recommended(path)
    if recommendation.rejected:
        observer.warn(f"pdd adapt rejected the weights {name}: {recommendation.rejected}")
    if requested is not None:
        return requested
    if recommendation.strength != 1:
        strength = recommendation.strength
        observer.say(f"{name}: strength {strength:g}, as pdd adapt recommends (--strength 1: full)")
    return recommendation.strength


def files_at_strength(path: Path, strength: float, find: Callable[[str], Path]) -> list[Path]:
    """The weights files that `at_strength` uses for the one at `path`."""
    card = read_card(path) if strength != 1 else None
    if card is None or card.base is None:
        return [path]
    try:
        return [path, find(card.base)]
    except PddError:  # reported by `at_strength`
        return [path]


def at_strength(adapted: SRModel, strength: float, *, name: str, find: Callable[[str], Path]) -> SRModel:
    """Interpolate between the base (`strength` 0) and the adapted model (1), in place.

    `find` returns the weights file for the name of the base in the card; `name` is for messages. Raises InputError if
    the base is unknown or not found, or its checksum is another one than in the card.
    """
    if strength == 1:
        return adapted
    from pdd_cli.models.loading import interpolated, load_sr_model, state_sha256

    card = adapted.card
    if card is None or card.base is None or card.base_sha256 is None:
        raise InputError(
            f"--strength {strength:g}: the base of {name} is unknown",
            "Only weights made by `pdd adapt` name their base. Leave out --strength.",
        )
    try:
        base = load_sr_model(find(card.base))
    except PddError as error:
        raise InputError(
            f"--strength {strength:g}: the base of {name}, {card.base}, can't be loaded: {error.message}", error.hint
        ) from error
    ours, theirs = adapted.module.state_dict(), base.module.state_dict()
    if state_sha256(theirs) != card.base_sha256:
        raise InputError(
            f"--strength {strength:g}: {card.base} isn't the base that {name} was adapted from (other tensors)",
            f"Install the weights that were used then as {card.base}, or leave --strength out.",
        )
    if {key: tensor.shape for key, tensor in ours.items()} != {key: tensor.shape for key, tensor in theirs.items()}:
        raise InputError(f"--strength {strength:g}: {name} and its base {card.base} are networks of different shapes")
    adapted.module.load_state_dict(interpolated(theirs, ours, strength))
    return adapted
