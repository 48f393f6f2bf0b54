"""Choose the engine for a model on this machine."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from pdd_cli.engines import cache
from pdd_cli.engines.base import Engine, Unfit, Usable
from pdd_cli.engines.ncnn_engine import NcnnEngine
from pdd_cli.engines.onnx_engine import OnnxEngine
from pdd_cli.engines.openvino_engine import OpenVINOEngine, try_openvino
from pdd_cli.engines.torch_engine import Convert, TorchEngine, agrees_with_torch
from pdd_cli.engines.winograd import winograd_may_pay, winograd_pays
from pdd_cli.engines.winograd.engine import WinogradEngine
from pdd_cli.errors import InputError
from pdd_cli.gpus import has_onnx_gpu_package, onnx_providers, vulkan_devices
from pdd_cli.runtime import Runtime
from pdd_cli.settings.base import EngineChoice

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel

_Kind = type[WinogradEngine] | type[OpenVINOEngine] | type[NcnnEngine] | type[OnnxEngine]
_Converted = WinogradEngine | OpenVINOEngine | NcnnEngine | OnnxEngine

# Engines are timed on an image of this side.
_TIMED_SIDE = 64


def choose_engine(
    model: SRModel, runtime: Runtime, choice: EngineChoice, *, free: bool = False, anywhere: bool = False
) -> Engine:
    """`open_engine` for a loaded model, without the cache."""
    return open_engine(lambda: model, None, runtime, choice, free=free, anywhere=anywhere)


def open_engine(
    load: Callable[[], SRModel],
    weights: str | None,
    runtime: Runtime,
    choice: EngineChoice,
    *,
    free: bool = False,
    anywhere: bool = False,
) -> Engine:
    """Open the engine that `--engine` names. The caller closes it.

    On a CPU, auto is the first of `_candidates` that can compute this model and agrees with PyTorch, else PyTorch.
    They are compared here, with this model, on noise. Those whose speed isn't known from measurements are also timed.

    Args:
        load: Loads the model. It is not called if the cache has the converted model.
        weights: The fingerprint of the weights (`cache.fingerprint`), the key in the cache; None: don't use the cache.
        free: The engine may use another precision than the runtime's.
        anywhere: On a machine without a GPU for PyTorch, it may use one that ncnn or ONNX Runtime finds.

    Raises:
        InputError: the engine that `choice` names can't compute this model or runtime.
    """
    candidates = _candidates(runtime, choice, free=free, anywhere=anywhere)
    return _first(candidates, functools.cache(load), weights, runtime, choice)


@dataclass(frozen=True)
class Tried:
    """An engine that auto tries, and the reason why it is not used; "" if it can be used."""

    name: str
    runtime: Runtime
    problem: str = ""


def try_engines(model: SRModel, runtime: Runtime) -> list[Tried]:
    """The engines in the order in which auto tries them for `model`, PyTorch last; auto takes the first usable one."""
    tried = []
    candidates = _candidates(runtime, "auto", free=True, anywhere=True)
    for number, candidate in enumerate(candidates, 1):
        engine = _open(candidate, candidates[number:], lambda: model, None, runtime, insist=False)
        if isinstance(engine, Unfit):
            tried.append(Tried(candidate.kind.name, candidate.runtime, engine.reason))
        else:
            engine.close()
            tried.append(Tried(candidate.kind.name, candidate.runtime))
    return [*tried, Tried(TorchEngine.name, runtime)]


@dataclass(frozen=True)
class _Candidate:
    """An engine to try on a device. If it is `timed`, it must also be faster than the CPU's that follow it."""

    kind: _Kind
    runtime: Runtime
    timed: bool = False


def _candidates(runtime: Runtime, choice: EngineChoice, *, free: bool, anywhere: bool) -> list[_Candidate]:
    """The engines to try before PyTorch, with their runtimes, fastest first (docs/benchmarks.md)."""
    exact = Runtime(runtime.device_name, "fp32") if free else runtime
    gpus = anywhere and runtime.device_type == "cpu"
    found: list[_Candidate] = []
    match choice:
        case "winograd":
            return [_Candidate(WinogradEngine, exact)]
        case "openvino":
            return [_Candidate(OpenVINOEngine, runtime)]
        case "ncnn" | "onnx":
            kind: _Kind = NcnnEngine if choice == "ncnn" else OnnxEngine
            devices = [*(_gpus(choice) if gpus else []), str(runtime.device_name)]
            return [_Candidate(kind, place) for device in devices for place in _precisions(device, runtime, free)]
        case "auto" if runtime.device_type == "cpu":
            if gpus:
                for name in _AUTO_ON_GPUS:
                    kind = NcnnEngine if name == "ncnn" else OnnxEngine
                    places = [place for device in _gpus(name) for place in _precisions(device, runtime, free)]
                    found += [_Candidate(kind, place, timed=True) for place in places]
            pays = winograd_pays(runtime)
            if exact.precision == "fp32" and (pays or winograd_may_pay(runtime)):
                found.append(_Candidate(WinogradEngine, exact, timed=not pays))
            if find_spec("openvino") is not None:
                found.append(_Candidate(OpenVINOEngine, runtime))
    return found


_AUTO_ON_GPUS = ("onnx", "ncnn")


def _gpus(engine: str) -> list[str]:
    """The GPU that `engine` would use on its own, if there is one. TensorRT is left out: it compiles for minutes."""
    if engine == "onnx":
        if not has_onnx_gpu_package():
            return []
        return [device for device in onnx_providers() if device != "tensorrt"][:1]
    gpus = [device for device in vulkan_devices() if device.is_gpu]
    gpus.sort(key=lambda device: device.kind != "discrete GPU")
    return [f"vulkan:{device.index}" for device in gpus[:1]]


def _precisions(device: str, runtime: Runtime, free: bool) -> list[Runtime]:
    """The runtimes to try on a device: with `free` first in fp16 on a GPU."""
    if device == "cpu":
        return [runtime]
    if free:
        return [Runtime(device, "fp16"), Runtime(device, "fp32")]
    return [Runtime(device, runtime.precision)] if runtime.precision in ("fp32", "fp16") else []


def _first(
    candidates: Sequence[_Candidate], load: Callable[[], SRModel], weights: str | None, asked: Runtime, choice: str
) -> Engine:
    """Open the first engine that can be used, else PyTorch in the runtime that was `asked` for."""
    for number, candidate in enumerate(candidates, 1):
        insist = choice == candidate.kind.name and number == len(candidates)
        engine = _open(candidate, candidates[number:], load, weights, asked, insist=insist)
        if not isinstance(engine, Unfit):
            return engine
    return _pytorch(load(), asked)


def _open(
    candidate: _Candidate,
    rest: Sequence[_Candidate],
    load: Callable[[], SRModel],
    weights: str | None,
    asked: Runtime,
    *,
    insist: bool,
) -> _Converted | Unfit:
    """Open an engine that agrees with PyTorch, from the cache if possible; `rest`: the candidates that follow it.

    With `insist` it need not agree; then raises InputError if the engine can't compute the model.
    """
    kind, runtime, timed = candidate.kind, candidate.runtime, candidate.timed
    if weights is not None:
        known = cache.find(kind.name, weights, runtime, timed=timed)
        if isinstance(known, Usable):
            with contextlib.suppress(RuntimeError, InputError):  # not exported by this library
                return kind(known, runtime)
        elif known is not None and not insist:
            return known
    model = load()
    try:
        if kind is OpenVINOEngine:
            _check_openvino(model, runtime)
        engine = kind(model, runtime)
    except InputError as error:
        if insist:
            raise
        unfit = Unfit(error.message)
    else:
        if insist and weights is None:
            return engine
        agrees = agrees_with_torch(engine, model)
        problem = "" if agrees else f"{engine.name} and PyTorch give different results for this model"
        if timed and not problem:
            others = [other for other in rest if other.runtime.device_type == "cpu"]
            with contextlib.closing(_first(others, lambda: model, weights, asked, "auto")) as other:
                problem = _slower(engine, other)
        if not problem:
            if weights is not None:
                cache.keep(kind.name, weights, runtime, engine.export(), timed=timed)
            return engine
        if not insist:
            engine.close()
        unfit = Unfit(problem)
    if weights is not None:
        cache.keep(kind.name, weights, runtime, unfit, timed=timed)
    return engine if insist else unfit


def _check_openvino(model: SRModel, runtime: Runtime) -> None:
    """Raise InputError if OpenVINO crashes with the model (CRAFT, GRL), tried in another process."""
    from pdd_cli.models.isolation import may_crash, run_apart

    if may_crash(model):
        try:
            run_apart(try_openvino, model, runtime.precision)
        except InputError as error:
            raise InputError(f"--engine openvino: {error.message}", "Use --engine torch.") from error


def _slower(engine: Engine, other: Engine) -> str:
    """The reason not to use `engine` where `other` is faster, else ""."""
    if _seconds(engine) <= _seconds(other):
        return ""
    return f"slower on {engine.runtime} than {other.name} on {other.runtime}"


def _seconds(engine: Engine) -> float:
    """The time for a small image; the first one is not counted."""
    lr = np.zeros((1, engine.model.in_channels, _TIMED_SIDE, _TIMED_SIDE), np.float32)
    engine.run(lr)
    started = time.perf_counter()
    engine.run(lr)
    return time.perf_counter() - started


def _pytorch(model: SRModel, runtime: Runtime) -> TorchEngine:
    """PyTorch, on a GPU with Triton kernels if Triton is installed."""
    convert: Convert | None = None
    if runtime.device_type == "cuda":
        with contextlib.suppress(Exception):  # Triton is missing or too old
            from pdd_cli.engines.triton_conv import triton_model as convert
    return TorchEngine(model, runtime, convert=convert)
