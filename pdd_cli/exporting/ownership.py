"""Whether an exported file was written by pdd, so that it may be replaced."""

from __future__ import annotations

from pathlib import Path

import torch

from pdd_cli.errors import InputError
from pdd_cli.exporting.names import paths_of
from pdd_cli.settings.base import ExportForm
from pdd_cli.weights import ncnn
from pdd_cli.weights.states import read_state
from pdd_cli.weights.store import CARD_KEY, read_card
from pdd_cli.weights.wiring import wiring_of


def is_own(form: ExportForm, file: Path) -> bool:
    """Whether `file` is an export of this form that pdd wrote; of ncnn, both files must be there.

    safetensors and ONNX files contain a card. A pth file has the tensors `params` and `params_ema` in the same memory.
    ncnn files are those that pdd would write for these weights.
    """
    match form:
        case "safetensors":
            return read_card(file) is not None
        case "pth":
            return _is_own_pth(file)
        case "onnx":
            return _is_own_onnx(file)
        case "ncnn":
            return _is_own_ncnn(file)


def check_target(form: ExportForm, file: Path, sources: list[Path], *, overwrite: bool) -> None:
    """Raise InputError if `file` exists, unless it may be replaced: with `overwrite`, an own file that is no source."""
    if file.is_symlink() and not file.exists():
        raise InputError(
            f"{file} is a link to a file that doesn't exist; it is not replaced", "Delete the link yourself."
        )
    if not file.exists():
        return
    if file.is_dir():
        raise InputError(f"can't write {file}: it is a folder")
    if any(one.exists() and file.samefile(one) for one in sources):
        raise InputError(f"{file} is the file to export; it is not replaced", "Choose another folder or file.")
    if not overwrite:
        raise InputError(f"{file} exists", "--overwrite replaces it if pdd wrote it.")
    if not is_own(form, file):
        raise InputError(
            f"{file} was not written by pdd (--to {form}); it is not replaced",
            "Choose another folder or file, or delete it yourself.",
        )


def _is_own_pth(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            content = torch.load(opened, "cpu", weights_only=True)
        return set(content) == {"params", "params_ema"} and all(
            tensor.data_ptr() == content["params_ema"][key].data_ptr() for key, tensor in content["params"].items()
        )
    except Exception:  # torch raises many kinds for files of other kinds
        return False


def _is_own_onnx(file: Path) -> bool:
    try:
        import onnx

        graph = onnx.load(str(file), load_external_data=False)
    except Exception:  # the package is missing, or the file is of another kind
        return False
    return any(entry.key == CARD_KEY for entry in graph.metadata_props)


def _is_own_ncnn(file: Path) -> bool:
    text, data = paths_of("ncnn", file)
    try:
        state = {key: tensor.numpy() for key, tensor in read_state(data).items()}
        wiring = wiring_of(state)
        return wiring is not None and ncnn.write_network(wiring, state) == (
            text.read_text(encoding="utf-8"),
            data.read_bytes(),
        )
    except (InputError, OSError, ValueError):
        return False
