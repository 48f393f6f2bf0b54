"""The forms of exported weights: pth (BasicSR), safetensors, ONNX and ncnn."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from pdd_cli.errors import InputError
from pdd_cli.exporting.names import paths_of
from pdd_cli.files import BeforeRename, atomic_write, no_check, write_text
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.models.onnx_graph import LR_SIDES, OPSET, psnr, write_onnx
from pdd_cli.settings.base import ExportForm
from pdd_cli.weights import ncnn
from pdd_cli.weights.states import HUB_PREFIX, state_sha256
from pdd_cli.weights.store import CARD_KEY, Card, write_weights
from pdd_cli.weights.wiring import Wiring, wiring_of

_MIN_PSNR_FP16 = 45.0  # dB, of the model with the weights of the ncnn file against the model


def check_packages(forms: Sequence[ExportForm], option: str) -> None:
    """Raise InputError if a package that one of `forms` needs isn't installed. `option` is named in the message."""
    if "onnx" not in forms:
        return
    missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise InputError(
            f"{option} onnx needs a package that isn't installed: {', '.join(missing)}",
            "Run: pip install 'pdd-cli[onnx]'",
        )


def check_architecture(forms: Sequence[ExportForm], model: SRModel, option: str) -> None:
    """Raise InputError if `model` can't be written in one of `forms`."""
    if "ncnn" in forms and _wiring(model) is None:
        raise InputError(
            f"{option} ncnn: only RRDBNet and SRVGGNetCompact can be written in this format, not {model.architecture}",
            f"Formats for {model.architecture}: pth, safetensors, onnx.",
        )


def try_forms(forms: Sequence[ExportForm], model: SRModel, option: str) -> None:
    """Raise InputError if `model` can't be written in one of `forms`, which may only be known by trying.

    Networks other than RRDBNet and SRVGGNetCompact are written as an ONNX graph into a temporary folder.
    """
    check_architecture(forms, model, option)
    if "onnx" in forms and _wiring(model) is None:
        with tempfile.TemporaryDirectory(prefix="pdd-") as folder:
            trial = Path(folder) / "trial.onnx"
            try:
                write("onnx", trial, model)
            except InputError as error:
                raise InputError(f"{option} onnx: {error.message.removeprefix(f'{trial}: ')}", error.hint) from error


def write(form: ExportForm, path: Path, model: SRModel, before_rename: BeforeRename = no_check) -> list[Path]:
    """Write `model` to the files `paths_of(form, path)` by `atomic_write`, and return them.

    `before_rename` is called once: the two files of ncnn are renamed one right after the other.

    `model` must be freshly loaded from a file, because the faster layers that training inserts can't be traced. Its
    card becomes part of a safetensors file and of an ONNX graph.

    Raises InputError if the file can't be written, doesn't compute the same as the model, or can't hold this
    architecture; ResourceError for a full disk.
    """
    card = model.card or card_of(model, path.stem, "unknown")
    match form:
        case "pth":
            _write_pth(path, model, before_rename)
        case "safetensors":
            write_weights(path, card, _state(model), before_rename)
        case "onnx":
            metadata = {"architecture": model.architecture, "scale": str(model.scale), "licence": card.licence}
            write_onnx(path, model, {**metadata, "opset": str(OPSET), CARD_KEY: card.as_json()}, before_rename)
        case "ncnn":
            _write_ncnn(path, model, before_rename)
    return paths_of(form, path)


def card_of(model: SRModel, name: str, source: str, strength: float = 1.0) -> Card:
    """The card of an export: that of the weights, if they have one, without the folders of their owner.

    Weights that were interpolated at `strength` are complete: the recommended strength becomes 1.
    """
    card = model.card
    if card is None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Card(name=name, architecture=model.architecture, scale=model.scale, source=source, created=now)
    adapted = None if card.adapted is None else _without_folders(card.adapted)
    if adapted is not None and strength != 1:
        adapted |= {"strength": 1.0, "exported_strength": strength}
    changed = {"base": _without_folders(card.base), "adapted": adapted, "content_sha256": state_sha256(_state(model))}
    if "steps from" in card.source and card.base and not card.base.startswith(HUB_PREFIX):
        # Earlier versions named the file of the base with its folders.
        changed["source"] = re.sub(r"(?<=steps from ).*[/\\]", "", card.source)
    return card.model_copy(update=changed)


def _without_folders(value: Any) -> Any:
    """`value` with absolute paths replaced by their last part."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _state(model: SRModel) -> dict[str, Tensor]:
    """The tensors, in fp32 and with BasicSR's keys where the architecture is one of BasicSR's."""
    return {key: value.detach().cpu().clone() for key, value in model.module.state_dict().items()}


def _wiring(model: SRModel) -> Wiring | None:
    return wiring_of(model.module.state_dict())


def _write_pth(path: Path, model: SRModel, before_rename: BeforeRename) -> None:
    """Write `params` and `params_ema`, which Real-ESRGAN's scripts, chaiNNer and spandrel read.

    Both hold the same weights, because some programs read one and some the other.
    """
    state = _state(model)
    with (
        atomic_write(path, before_rename) as temporary,
        temporary.open("wb") as file,
    ):  # a file, because torch hides the OSError of a path
        torch.save({"params": state, "params_ema": state}, file)


def _write_ncnn(path: Path, model: SRModel, before_rename: BeforeRename) -> None:
    """Write the `.bin`, then the `.param`, and compare their weights, read back, with those of the model."""
    check_architecture(["ncnn"], model, "--to")
    wiring = _wiring(model)
    assert wiring is not None
    state = {key: tensor.numpy() for key, tensor in _state(model).items()}
    text, weights = paths_of("ncnn", path)
    param, data = ncnn.write_network(wiring, state)
    again = model_from_state(ncnn.read_state(param, data, origin=str(weights)), origin=str(weights))
    height, width = (-(-side // model.size_multiple) * model.size_multiple for side in LR_SIDES[0])
    lr = torch.rand(1, model.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = psnr(again.module(lr), model.module(lr))
    if not found >= _MIN_PSNR_FP16:
        raise InputError(
            f"{path}: in fp16, which pdd uses in ncnn files, the weights give different images (PSNR {found:.1f} dB); "
            "the files were not written",
            "Choose another format, such as pth or onnx.",
        )
    with atomic_write(weights, before_rename) as temporary:
        temporary.write_bytes(data)
    write_text(text, param)
