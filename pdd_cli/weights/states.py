"""Weights file → tensors, without running any code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pdd_cli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth/.pt/.ckpt file, without running any code from it.

    A checkpoint that nests its tensors is unwrapped; of BasicSR's `params` and `params_ema` the latter is taken.
    Raises InputError for a file that can't be read or holds no tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such weights file: {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"can't read the weights file {path}: {error}") from error
    except Exception as error:
        # torch.load raises UnpicklingError, RuntimeError, EOFError and others, by where the file is broken.
        raise InputError(
            f"can't read the weights file {path}: it is damaged, or holds more than tensors",
            "pdd never runs code from a weights file. Convert it to safetensors where it was made.",
        ) from error
    for key in ("params_ema", "params", "state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not all(isinstance(value, torch.Tensor) for value in content.values())
        or not content
    ):
        raise InputError(f"{path} is not a weights file: it holds no plain table of tensors")
    return dict(content)
