"""Reads the tensors of a weights file without running any code from it."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdd_cli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HUB_PREFIX = "hf:"  # of references to repositories of the Hugging Face Hub
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
_FILE_SUFFIXES = (*SUFFIXES, ".param", ".bin", ".onnx")
_NCNN_FP16 = b"\x47\x6b\x30\x01"  # the first bytes of an ncnn `.bin` with weights in fp16
_NCNN_FP32 = bytes(4)

# Names that training code uses for everything but the generator.
_OTHER = re.compile(r"(?i)optim|sched|discriminator|loss|^net_?d$|^d$")
_AVERAGED = re.compile(r"(?i)(?<![a-z])ema(?![a-z])")
_GENERATOR = re.compile(r"(?i)(net_?g|model_?g|generator|gen|g)(_ema)?")
# Prefixes that wrappers add to every key. `model.0` and `net.0` are names of layers.
_WRAPPED = re.compile(r"(?i)(module|_orig_mod|net_?g|model_?g|generator|gen|g|params|(model|net)(?!\.\d))(_ema)?\.")

_PYTORCH = "pdd reads PyTorch weights (.safetensors, .pth, .pt, .ckpt): use the file from which this one was made."
_NOT_ONNX = f"Only `pdd upscale` and `pdd evaluate` take ONNX models, as --weights. {_PYTORCH}"
_AGAIN = "Download or copy it again."
_UNPACK = "Unpack it and give the weights file inside."
# First bytes of files of other kinds, the kind, and a hint.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), kind, hint)
    for pattern, kind, hint in (
        (rb"(?i)\s*(<!doctype html|<html|<head)", "an HTML page",
         "The download requires a login, or the URL is that of a page: open it in a browser and save the file itself."),
        (rb"version https://git-lfs", "a Git LFS pointer",
         "Run `git lfs pull` in the clone, or download the file from its web page."),
        (rb"(\.\./)*\.?/?annex/objects", "a git-annex pointer", "Run `git annex get`."),
        (rb"\x08.[\x12\x1a\x3a\x42]", "an ONNX model", _NOT_ONNX),
        (rb"\x89HDF\r\n", "an HDF5 file (Keras)", _PYTORCH),
        (rb"....TFL3", "a TensorFlow Lite model", _PYTORCH),
        (rb"GGUF", "a GGUF file", _PYTORCH),
        (rb"ftrt|.{4}ptrt", "a TensorRT engine", _PYTORCH),
        (rb"7z\xbc\xaf|Rar!|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar", "an archive", _UNPACK),
        (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|II\*\0|MM\0\*", "an image", "Give the weights file, not an image."),
        (rb"%PDF", "a PDF document", _PYTORCH),
        (rb"\s*<", "an XML file", _PYTORCH),
        (rb"\s*[\[{]", "a JSON text", _AGAIN),
        (rb"[\x20-\x7e\s]+$", "a text file", _AGAIN),
    )
)  # fmt: skip


class UnsafePickleError(InputError):
    """A pickled file that contains more than tensors, so that reading it would run its code."""


def is_file_reference(reference: str) -> bool:
    """Whether a reference to weights is the path of a file, not a name."""
    if reference.startswith(HUB_PREFIX):
        return False
    path = Path(reference)
    return path.suffix.lower() in _FILE_SUFFIXES or len(path.parts) > 1


def data_file(path: Path) -> Path:
    """`path`; for the `.param` of an ncnn model its `.bin`, which identifies the weights.

    Raises InputError if one of the two files of an ncnn model is missing.
    """
    if path.suffix.lower() not in (".param", ".bin") or not path.is_file():
        return path
    param, data = path.with_suffix(".param"), path.with_suffix(".bin")
    if not data.is_file():
        raise _one_of_two(path, data)
    if not param.is_file():
        with data.open("rb") as opened:
            if opened.read(4) in (_NCNN_FP16, _NCNN_FP32):
                raise _one_of_two(path, param)
    return data


def files_of(path: Path) -> list[Path]:
    """The files of the weights at `path`: of an ncnn model the `.bin` and the `.param`."""
    param = path.with_suffix(".param")
    return [path, param] if path.suffix.lower() == ".bin" and param.is_file() else [path]


def _one_of_two(path: Path, other: Path) -> InputError:
    message = f"{path} is one of two files of an ncnn model; the other, {other.name}, is missing"
    return InputError(message, f"Put {other.name} beside it.")


def is_onnx(path: Path) -> bool:
    """Whether the file is an ONNX graph, by its suffix or else its content."""
    if path.suffix.lower() == ".onnx":
        return True
    try:
        with path.open("rb") as opened:
            kind = identify(opened.read(512))
    except OSError:
        return False
    return kind is not None and kind[0] == "an ONNX model"


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes and fp32 values. It is equal for equal weights, whatever the file format."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().float().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read_state(path: Path, table: str | None = None) -> dict[str, Tensor]:
    """The tensors of the network in a weights file, without running any code from it.

    The format is recognised by content, not by suffix: safetensors, a file of `torch.save`, or ncnn's `.bin` and
    `.param`. From a training checkpoint the generator is read: the one with the key `table` if there is such a key,
    else its moving average (`params_ema`) if there is one. Prefixes that wrappers add to the keys (`module.`) are
    removed.

    Raises InputError, which names the kind of file, if it is not a weights file.
    """
    try:
        with path.open("rb") as opened:
            head = opened.read(512)
    except FileNotFoundError:
        raise InputError(f"no such weights file: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a weights file", "Give the file in it.") from None
    except OSError as error:
        raise InputError(f"can't read the weights file {path}: {error.strerror}") from error
    if not head:
        raise InputError(f"{path} is empty (0 bytes)", _AGAIN)
    if head.startswith(b"7767517") or (path.suffix == ".bin" and path.with_suffix(".param").is_file()):
        return _read_ncnn(path)
    if head.startswith(_NCNN_FP16):
        raise _one_of_two(path, path.with_suffix(".param"))
    if head[8:9] == b"{":
        return _network(_read_safetensors(path), path, table)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _network(_read_pickled(path, head), path, table)
    other = identify(head)
    if other is not None:
        raise InputError(f"{path} is {other[0]}, not a weights file", other[1])
    raise InputError(f"{path} is not a weights file, or damaged", f"{_AGAIN} {_PYTORCH}")


def identify(head: bytes) -> tuple[str, str] | None:
    """The kind of a file that starts with `head`, and a hint, if it is known not to be a weights file; else None."""
    return next(((kind, hint) for pattern, kind, hint in _KINDS if pattern.match(head)), None)


def find_damage(path: Path) -> str:
    """The problem of a weights file, which is read completely; "" if none is found, or the format is unknown."""
    with path.open("rb") as opened:
        head = opened.read(512)
    other = identify(head)
    if not head or other is not None:
        return f"it is {other[0] if other else 'empty'}"
    try:
        if head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            return f"{broken} in it is damaged" if broken else ""
        if head[8:9] == b"{":
            _read_safetensors(path)
        elif head.startswith(b"MATLAB 5.0"):
            import scipy.io

            scipy.io.loadmat(path)
        elif head.startswith(b"\x80"):
            _read_pickled(path, head)
    except UnsafePickleError:
        return ""  # can't be checked further without running its code
    except InputError as error:
        return error.message
    except Exception as error:  # zipfile and scipy raise many kinds
        return f"it is damaged or incomplete ({type(error).__name__})"
    return ""


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or incomplete: {error}", _AGAIN) from error


def _read_pickled(path: Path, head: bytes) -> Any:
    """The content of a file of `torch.save`, which must consist of tensors in plain containers."""
    import torch

    if head.startswith(b"PK"):
        _check_archive(path)
    try:
        with path.open("rb") as opened:  # a file, because torch chooses the format of a path by its suffix
            return torch.load(opened, "cpu", weights_only=True)
    except Exception as error:
        # torch.load raises UnpicklingError, RuntimeError, EOFError or others, depending on where the file is damaged.
        found = re.search(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global|class) (\S+)", str(error))
        if found is not None or "weights_only" in str(error):
            object_type = f" ({found[1] or found[2]})" if found else ""
            raise UnsafePickleError(
                f"{path} contains Python objects{object_type}, not only tensors",
                "pdd never runs code from a weights file. Save only the tensors, in the program that made the file: "
                "torch.save(model.state_dict(), FILE)",
            ) from error
        raise InputError(f"{path} is damaged or incomplete", _AGAIN) from error


def _check_archive(path: Path) -> None:
    """Raise InputError for a zip archive that was not written by `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is incomplete: its end is missing", _AGAIN) from error
    inner = {name.split("/", 1)[1] for name in names if "/" in name}
    if "constants.pkl" in inner:
        raise InputError(
            f"{path} is a TorchScript program",
            "pdd never runs code from a weights file. Use the original weights or, if you trust the file, save its "
            "tensors: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
        )
    if "data.pkl" not in inner:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise InputError(f"{path} is a zip archive (of {shown or 'nothing'}), not a weights file", _UNPACK)


def _read_ncnn(path: Path) -> dict[str, Tensor]:
    from pdd_cli.weights import ncnn

    param, data = path.with_suffix(".param"), path.with_suffix(".bin")
    for one in (param, data):
        if not one.is_file():
            raise _one_of_two(path, one)
    return ncnn.read_state(param.read_text(errors="replace"), data.read_bytes(), origin=str(data))


def _network(content: Any, path: Path, table: str | None) -> dict[str, Tensor]:
    """The tensors of the network in `content`, which may be nested, with the keys of the network itself."""
    tables = list(_tables(content))
    if not tables:
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{path} is not a weights file: it contains no tensors ({keys or 'nothing'})")
    state = _select_table(tables, table)
    while True:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            first = key.split(".")[0]
            parts.setdefault(first if _GENERATOR.fullmatch(first) else "", {})[key] = tensor
        if len(parts) > 1 and any(parts):  # a generator beside its discriminator, losses, …
            state = _select_table([(name, part) for name, part in parts.items() if name])
        wrapped = {_WRAPPED.match(key) for key in state}
        prefixes = {found[0] if found else "" for found in wrapped}
        if len(prefixes) != 1 or "" in prefixes:
            return dict(state)
        state = {key.removeprefix(*prefixes): tensor for key, tensor in state.items()}


def _tables(content: Any, name: str = "", depth: int = 5) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name and tensors of every mapping in `content` that contains tensors."""
    import torch

    if not isinstance(content, Mapping) or not depth:
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor) and isinstance(key, str)}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        if not _OTHER.search(str(key)):
            yield from _tables(value, str(key), depth - 1)


def _select_table(tables: list[tuple[str, dict[str, Tensor]]], wanted: str | None = None) -> dict[str, Tensor]:
    """The table named `wanted`; without one the largest of `tables`, or the moving average of the same network."""
    sizes = [sum(tensor.numel() for tensor in state.values()) for _, state in tables]
    whole = [table for table, size in zip(tables, sizes, strict=True) if 2 * size >= max(sizes)]
    named = [table for table in whole if table[0] == wanted]
    averaged = named or [table for table in whole if _AVERAGED.search(table[0].replace("_", " "))]
    _, state = max(averaged or whole, key=lambda table: sum(tensor.numel() for tensor in table[1].values()))
    return state
