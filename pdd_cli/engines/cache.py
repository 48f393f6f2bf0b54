"""Cache of networks in an engine's own format: converting takes seconds, loading tenths of a second.

An entry is one file: a line of JSON, then the exported network. Its key is the engine, the version of the engine's
library, the weights, the CPU, the device and the precision. An entry that can't be read counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pdd_cli.engines.base import Unfit, Usable
from pdd_cli.errors import InputError, PddError
from pdd_cli.files import atomic_write
from pdd_cli.gpus import vulkan_devices
from pdd_cli.models.traits import ModelSpec
from pdd_cli.runtime import Runtime
from pdd_cli.system import cpu_features
from pdd_cli.weights.states import files_of
from pdd_cli.weights.store import cache_home

_FORMAT = 4
# The library of each engine: a distribution, for onnx a module.
_LIBRARIES = {"openvino": "openvino", "winograd": "llvmlite", "ncnn": "ncnn", "onnx": "onnxruntime"}
_SUFFIX = ".compiled"
# Maximum size of all entries together, in bytes; the least recently used are deleted first.
_MAX_BYTES = 1 << 30


def fingerprint(files: Sequence[Path], strength: float) -> str:
    """Identify the weights made from these files at this strength, without loading them.

    An ncnn model is identified by both of its files, so that a damaged `.param` is noticed.
    """
    digest = hashlib.sha256(repr(strength).encode())
    for path in (part for file in files for part in files_of(file)):
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise InputError(f"can't read the weights file {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def find(engine: str, weights: str, runtime: Runtime, *, timed: bool = False) -> Usable | Unfit | None:
    """Return the entry for the weights with this fingerprint; None if there is none or it can't be read.

    `timed`: the entry of an engine that is usable only if it is also faster than those of the CPU.
    """
    path = _path(engine, weights, runtime, timed)
    try:
        with path.open("rb") as file:
            head, exported = json.loads(file.readline()), file.read()
        if zlib.crc32(exported) != head["crc32"]:
            return None
        os.utime(path)
        if head["unfit"]:
            return Unfit(head["unfit"])
        return Usable(ModelSpec(**head["spec"]), head["weights_sha256"], head["bytes_per_pixel"], exported)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(engine: str, weights: str, runtime: Runtime, result: Usable | Unfit, *, timed: bool = False) -> None:
    """Write an entry to the cache. If it can't be written, nothing is cached."""
    exported = b""
    head: dict[str, object] = {"unfit": ""}
    if isinstance(result, Unfit):
        head["unfit"] = result.reason
    else:
        exported = result.exported
        head |= {
            "spec": asdict(result.spec),
            "weights_sha256": result.weights_sha256,
            "bytes_per_pixel": result.bytes_per_pixel,
        }
    head["crc32"] = zlib.crc32(exported)
    path = _path(engine, weights, runtime, timed)
    with contextlib.suppress(PddError, OSError):
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(exported)
        _trim(path)


def _path(engine: str, weights: str, runtime: Runtime, timed: bool) -> Path:
    device = str(runtime.device_name)
    if runtime.device_type == "vulkan":  # the number may belong to another device tomorrow
        known = {f"vulkan:{one.index}": f"{one.name} {one.driver}" for one in vulkan_devices()}
        device = known.get(device, device)
    key = (_FORMAT, engine, weights, runtime.precision, device, timed, _version(engine), sorted(cpu_features()))
    return cache_home() / "compiled" / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + _SUFFIX)


def _version(engine: str) -> str:
    """The version of the engine's library. ONNX Runtime has several distributions, so the module is asked."""
    from importlib import import_module
    from importlib.metadata import version

    if engine == "onnx":
        return str(import_module(_LIBRARIES[engine]).__version__)
    return version(_LIBRARIES[engine])


def _trim(newest: Path) -> None:
    """Delete the least recently used entries until the rest fit, but never `newest`."""
    entries = sorted((path.stat().st_mtime, path) for path in newest.parent.glob(f"*{_SUFFIX}") if path != newest)
    size = newest.stat().st_size + sum(path.stat().st_size for _, path in entries)
    for _, path in entries:
        if size <= _MAX_BYTES:
            return
        size -= path.stat().st_size
        path.unlink(missing_ok=True)
