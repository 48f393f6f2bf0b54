"""Describe weights and image sets in words, for `pdd fetch-weights --info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.weights.catalog import CatalogEntry, find
from pdd_cli.weights.fetch_images import installed_set
from pdd_cli.weights.hub import fetch_from_hub, find_on_hub, read_card_on_hub
from pdd_cli.weights.image_sets import ImageSet, find_set
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.states import HUB_PREFIX, data_file, is_file_reference
from pdd_cli.weights.store import Card, Store, read_card

# Settings that other rows show, or that don't influence the weights.
_NOT_SHOWN = ("base", "teacher", "name", "real_dir", "root", "pairs_lr", "pairs_hr", "runs_dir", "device", "offline")


@dataclass(frozen=True)
class Description:
    """The facts about weights or an image set as rows of (label, text), and as plain values for JSON."""

    title: str
    rows: tuple[tuple[str, str], ...]
    document: Mapping[str, Any]


def describe(reference: str, store: Store, *, offline: bool = False) -> Description:
    """Describe installed weights, a weights file, weights on the Hub, or weights or an image set of the catalogue.

    Raises InputError for an unknown name, a missing file, or a file that isn't a super-resolution model; DownloadError
    if the Hub can't be reached or, `offline`, its cache doesn't have the file.
    """
    if reference.startswith(HUB_PREFIX):
        if not offline:
            return _of_hub(reference)
        path = fetch_from_hub(reference, offline=True, on_bytes=lambda done, total: None)
        card = read_card(path)
        return _of_card(reference, path, card) if card else _of_plain_file(path)
    if not is_file_reference(reference) and (entry := store.get(reference)):
        return _of_card(reference, entry.path, entry.card)
    path = data_file(Path(reference).expanduser())
    if path.is_file():
        card = read_card(path)
        return _of_card(reference, path, card) if card else _of_plain_file(path)
    if is_file_reference(reference):
        raise InputError(f"no such weights file: {reference}")
    if image_set := find_set(reference):
        return _of_image_set(image_set, store)
    return _of_catalogue(find(reference))


def changed_settings(card: Card) -> dict[str, Any]:
    """The settings of the run of adapted weights that differ from the defaults of this version, by dotted key."""
    settings = (card.adapted or {}).get("settings")
    if not isinstance(settings, dict):
        return {}
    defaults = flatten(AdaptConfig(real_dir=Path(), teacher=settings.get("teacher")).model_dump(mode="json"))
    return {
        key: value
        for key, value in flatten(settings).items()
        if key.split(".")[0] not in _NOT_SHOWN and key in defaults and defaults[key] != value
    }


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def facts(card: Card) -> list[tuple[str, str]]:
    """What a card says, as rows of (label, text)."""
    adapted, changed = card.adapted or {}, changed_settings(card)
    rows = [("architecture", _architecture(card.architecture, card.scale, card.parameters))]
    if card.base:
        rows.append(("base", card.base))
    if adapted:
        if adapted.get("teacher"):
            rows.append(("teacher", str(adapted["teacher"])))
        settings = adapted.get("settings") or {}
        domain = Path(str(settings.get("real_dir") or settings.get("pairs_lr") or "")).name
        counts = ((adapted.get("real_images"), "images"), (adapted.get("pairs"), "pairs with ground truth"))
        images = ", ".join(f"{count} {kind}" for count, kind in counts if count)
        hr = f"; HR: {adapted['hr_images']} images from {adapted['hr_from']}" if "hr_from" in adapted else ""
        rows.append(("domain", (", ".join(filter(None, (domain, images))) or "unknown") + hr))
        rows.append(("training", f"{adapted.get('steps', '?')} steps, features {adapted.get('features', '?')}"))
        rows.append(("settings", ", ".join(f"{key}={value}" for key, value in changed.items()) or "defaults"))
        reason = f". {adapted['reason']}" if adapted.get("reason") else ""
        rows.append(("verdict", f"{adapted.get('verdict', 'unknown')}{reason}"))
        strength = adapted.get("strength")
        if isinstance(strength, float | int) and adapted.get("verdict") != "reject":
            rows.append(("strength", f"{strength:g} (recommended)"))
        if "exported_strength" in adapted:
            rows.append(("exported at", f"strength {adapted['exported_strength']:g} of the training run's weights"))
    return [
        *rows,
        ("source", card.source),
        ("licence", card.licence),
        ("date", " ".join((card.created or "unknown").split("T")).replace("+00:00", " UTC")),
        ("written by", f"pdd {card.pdd_version or '(unknown version)'}"),
    ]


def _of_card(reference: str, path: Path, card: Card) -> Description:
    digest, size = file_sha256(path), path.stat().st_size
    rows = [*facts(card), ("size", _megabytes(size)), ("sha256", digest), ("file", str(path))]
    if card.sha256 and card.sha256 != digest:
        rows.insert(-2, ("source sha256", card.sha256))
    document = {
        "reference": reference, "installed": not is_file_reference(reference), "path": path, "bytes": size,
        "file_sha256": digest, **card.model_dump(), "changed_settings": changed_settings(card),
    }  # fmt: skip
    return Description(reference, tuple(rows), document)


def _of_hub(reference: str) -> Description:
    """Describe a weights file on the Hub. Of a safetensors file only the header is downloaded."""
    found = find_on_hub(reference)
    card = read_card_on_hub(found)
    if card is not None:
        rows = facts(card)
    else:
        said = {key: found.labels.get(key) for key in ("license_name", "license", "base_model", "tags")}
        rows = [("card", "none of pdd; the repository says:")]
        rows += [(key, ", ".join(value) if isinstance(value, list) else str(value)) for key, value in said.items()
                 if value]  # fmt: skip
    rows += [
        ("size", _megabytes(found.size) if found.size else "unknown"),
        ("sha256", found.sha256 or "unknown"),
        ("file", f"{found.name} in {found.repo} at {found.commit}"),
        ("installed", f"no; to use it: pdd upscale IN OUT --weights {reference}"),
    ]
    document = {
        "reference": reference, "installed": False, "repo": found.repo, "file": found.name, "commit": found.commit,
        "bytes": found.size, "file_sha256": found.sha256, **(card.model_dump() if card else {"labels": found.labels}),
    }  # fmt: skip
    return Description(reference, tuple(rows), document)


def _of_plain_file(path: Path) -> Description:
    from pdd_cli.models.loading import load_sr_model

    model = load_sr_model(path)
    parameters = sum(tensor.numel() for tensor in model.module.parameters())
    digest, size = file_sha256(path), path.stat().st_size
    rows = (
        ("architecture", _architecture(model.architecture, model.scale, parameters)),
        ("channels", f"{model.in_channels} in, {model.out_channels} out"),
        ("card", "none: origin, licence and date are unknown"),
        ("size", _megabytes(size)),
        ("sha256", digest),
        ("file", str(path)),
    )
    document = {
        "reference": str(path), "installed": False, "path": path, "bytes": size, "file_sha256": digest,
        "architecture": model.architecture, "scale": model.scale, "parameters": parameters,
        "in_channels": model.in_channels, "out_channels": model.out_channels,
    }  # fmt: skip
    return Description(str(path), rows, document)


def _of_catalogue(entry: CatalogEntry) -> Description:
    rows = (
        ("architecture", _architecture(entry.architecture, entry.scale, entry.parameters)),
        ("licence", entry.licence),
        ("download", f"{entry.file}, {_megabytes(entry.size) if entry.size else 'size unknown'}"),
        ("sha256", f"{entry.sha256}{'…' if len(entry.sha256) < 64 else ''}" if entry.sha256 else "not published"),
        *((f"source {number}", str(source)) for number, source in enumerate(entry.sources, 1)),
        ("installed", f"no; to install: pdd fetch-weights {entry.name}"),
    )
    return Description(entry.name, rows, {"reference": entry.name, **entry.as_document(), "installed": False})


def _of_image_set(image_set: ImageSet, store: Store) -> Description:
    folder = installed_set(image_set, store)
    rows = (
        ("images", f"{len(image_set.images)} {image_set.description}"),
        ("licence", image_set.licence),
        ("download", _megabytes(image_set.size)),
        ("source", image_set.origin),
        ("installed", str(folder) if folder else f"no; to install: pdd fetch-weights {image_set.name}"),
    )
    return Description(
        image_set.name, rows,
        {"reference": image_set.name, **image_set.as_document(), "installed": folder is not None, "path": folder},
    )  # fmt: skip


def _architecture(name: str, scale: int | None, parameters: int) -> str:
    return f"{name}{f' x{scale}' if scale else ''}, {parameters:,} parameters"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
