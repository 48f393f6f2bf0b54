"""Engines' forms of a network, and the cache of what was converted once: converting takes seconds, loading tenths.

An entry of the cache is one file: a line of JSON, then the exported network. It is for one engine, version of its
library, set of weights, CPU and precision. One that can't be read counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import atomic_write
from pdd_cli.models.traits import ModelSpec
from pdd_cli.runtime import Precision, available_cpus, usable_cpus
from pdd_cli.system import cpu_features
from pdd_cli.weights.store import cache_home

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel

_FORMAT = 2
_LIBRARIES = {"openvino": "openvino", "winograd": "llvmlite"}
_SUFFIX = ".compiled"
# Bytes of all entries together; those not used for longest go first.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A network as an engine has it: `program` is that, or what was exported of it; None where it can't be converted.

    OpenVINO has a model of its own, Winograd's algorithm the tensors by name.

    `agrees`: it was found to compute what PyTorch does.
    """

    traits: ModelSpec
    weights_sha256: str
    bytes_per_pixel: int
    program: Any
    agrees: bool = False

    def compile(self, precision: Precision) -> Any:
        """OpenVINO's compiled model, for any size of image."""
        import openvino

        hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if usable_cpus() < available_cpus():
            settings["INFERENCE_NUM_THREADS"] = usable_cpus()
        core = openvino.Core()
        if isinstance(self.program, bytes):
            return core.import_model(self.program, "CPU", settings)
        return core.compile_model(self.program, "CPU", settings)


def convert(model: SRModel) -> Any:
    """The openvino.Model of a network. Raises InputError where it has an operation that isn't known."""
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    side = -(-max(32, model.size_minimum) // model.size_multiple) * model.size_multiple
    example = torch.zeros(1, model.in_channels, side, side)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch.jit.trace's, about its own future
            # Not checked by tracing and running it twice: what comes out is compared with PyTorch anyway.
            traced = torch.jit.trace(model.module, example, check_trace=False)
            # Not by openvino.convert_model, which first tries to report its use over the network.
            decoder = TorchScriptPythonDecoder(traced, example_input=(example,))
            frontend = FrontEndManager().load_by_framework("pytorch")
            converted = frontend.convert(frontend.load(decoder))
            converted.reshape([-1, model.in_channels, -1, -1])
    except Exception as error:  # whatever tracing and conversion raise for an operation that they don't know
        raise InputError(
            f"--engine openvino: can't convert this {model.architecture} model", "Use --engine torch."
        ) from error
    return converted


def fingerprint(files: Sequence[Path], strength: float) -> str:
    """What the weights are that are made of these files, without loading them."""
    digest = hashlib.sha256(repr(strength).encode())
    for path in files:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise InputError(f"can't read the weights file {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def tensors(program: Any) -> dict[str, Any]:
    """Tensors by name, of what `bytes_of` gave for them, or as they are. Raises RuntimeError for other bytes."""
    if not isinstance(program, bytes):
        return dict(program)
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(program))
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error


def bytes_of(program: Any) -> bytes:
    from safetensors.numpy import save

    return program if isinstance(program, bytes) else bytes(save(program))


def find(engine: str, weights: str, precision: Precision) -> ExportedModel | None:
    """The entry for the weights of this fingerprint; None where there is none that can be read."""
    path = _path(engine, weights, precision)
    try:
        with path.open("rb") as file:
            values, program = json.loads(file.readline()), file.read()
        if zlib.crc32(program) != values.pop("program_crc32"):
            return None
        os.utime(path)
        return ExportedModel(ModelSpec(**values.pop("traits")), program=program or None, **values)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(engine: str, weights: str, precision: Precision, converted: ExportedModel, exported: bytes) -> None:
    """Put an entry into the cache; where that can't be written, nothing is kept."""
    head = {
        "traits": asdict(converted.traits),
        "weights_sha256": converted.weights_sha256,
        "bytes_per_pixel": converted.bytes_per_pixel,
        "agrees": converted.agrees,
        "program_crc32": zlib.crc32(exported),
    }
    path = _path(engine, weights, precision)
    with contextlib.suppress(PddError, OSError):
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(exported)
        _trim(path)


def _path(engine: str, weights: str, precision: Precision) -> Path:
    from importlib.metadata import version

    made_for = (_FORMAT, engine, weights, precision, version(_LIBRARIES[engine]), sorted(cpu_features()))
    return cache_home() / "compiled" / (hashlib.sha256(repr(made_for).encode()).hexdigest()[:32] + _SUFFIX)


def _trim(newest: Path) -> None:
    """Delete the entries that weren't used for longest, until all fit; never the newest."""
    entries = sorted((path.stat().st_mtime, path) for path in newest.parent.glob(f"*{_SUFFIX}") if path != newest)
    size = newest.stat().st_size + sum(path.stat().st_size for _, path in entries)
    for _, path in entries:
        if size <= _MOST_BYTES:
            return
        size -= path.stat().st_size
        path.unlink(missing_ok=True)
