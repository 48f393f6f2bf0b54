"""Install any super-resolution model from a file under a free name."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from pdd_cli.errors import InputError
from pdd_cli.weights.image_sets import find_set
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.states import data_file, read_state, state_sha256
from pdd_cli.weights.store import Card, Entry, Store, invalid_name_reason, read_card

if TYPE_CHECKING:
    from torch import Tensor


def install_file(path: Path, name: str, *, store: Store, overwrite: bool = False) -> Entry:
    """Install the model in a weights file as `name`. With `overwrite` an installed model of this name is replaced.

    The card in the file, or the one in the file of the same name that ends in .json, is kept if it describes these
    weights. Otherwise a new card is written, with the architecture and scale that were recognised.

    Raises InputError for an invalid name or one in use, and for a file that isn't a super-resolution model.
    """
    check_free(name, store, overwrite=overwrite)
    from pdd_cli.models.loading import model_from_state

    path = data_file(path)
    state = read_state(path)
    card = read_card(path) or _card_beside(path, state)
    if card is not None and card.kind != "sr":
        raise InputError(f"{path}: {card.architecture}, not a super-resolution model")
    model = model_from_state(state, origin=str(path))
    facts = {
        "name": name,
        "architecture": model.architecture,
        "scale": model.scale,
        "sha256": file_sha256(path),
    }
    if card is None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        card = Card(**facts, source=f"file {path.name}", created=now)
    # Tensors may share memory, which safetensors can't store.
    return store.add(card.model_copy(update=facts), {key: tensor.clone() for key, tensor in state.items()})


def check_free(name: str, store: Store, *, overwrite: bool) -> None:
    """Raise InputError unless new weights can be installed as `name`."""
    reason = invalid_name_reason(name)
    if not reason and find_set(name):
        reason = "it is the name of an image set"
    if reason:
        raise InputError(f"weights can't be named {name!r}: {reason}", "Choose another name.")
    if store.path(name).exists() and not overwrite:
        raise InputError(
            f"weights named '{name}' are already installed",
            f"Choose another name, or replace them with --overwrite. To see them: pdd fetch-weights --info {name}",
        )


def _card_beside(path: Path, state: dict[str, Tensor]) -> Card | None:
    """The card in the .json file beside a weights file; None if there is none, or it describes other weights."""
    try:
        card = Card.model_validate(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    return card if card.content_sha256 in (None, state_sha256(state)) else None
