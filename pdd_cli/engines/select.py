"""Choose the engine for a model on this machine."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pdd_cli.engines import cache
from pdd_cli.engines.base import Engine, Unfit, Usable
from pdd_cli.engines.openvino_engine import OpenVINOEngine
from pdd_cli.engines.torch_engine import Convert, TorchEngine, agrees_with_torch
from pdd_cli.engines.winograd import winograd_pays
from pdd_cli.engines.winograd.engine import WinogradEngine
from pdd_cli.errors import InputError
from pdd_cli.runtime import Runtime
from pdd_cli.settings.upscale import EngineChoice

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel

_Kind = type[WinogradEngine] | type[OpenVINOEngine]


def choose_engine(model: SRModel, runtime: Runtime, choice: EngineChoice, *, free: bool = False) -> Engine:
    """`open_engine` for a loaded model, without the cache."""
    return open_engine(lambda: model, None, runtime, choice, free=free)


def open_engine(
    load: Callable[[], SRModel], weights: str | None, runtime: Runtime, choice: EngineChoice, *, free: bool = False
) -> Engine:
    """Open the engine that `--engine` names. The caller closes it.

    On a CPU, auto is the first of `_candidates` that can compute this model and agrees with PyTorch, else PyTorch.
    They are compared here, with this model, on noise.

    Args:
        load: Loads the model. It is not called if the cache has the converted model.
        weights: The fingerprint of the weights (`cache.fingerprint`), the key in the cache; None: don't use the cache.
        free: The engine may use another precision than the runtime's.

    Raises:
        InputError: the engine that `choice` names can't compute this model or runtime.
    """
    loaded = functools.cache(load)
    for kind, place in _candidates(runtime, choice, free=free):
        engine = _open(kind, loaded, weights, place, insist=choice == kind.name)
        if not isinstance(engine, Unfit):
            return engine
    return _pytorch(loaded(), runtime)


@dataclass(frozen=True)
class Tried:
    """An engine that auto tries, and the reason why it is not used; "" if it can be used."""

    name: str
    runtime: Runtime
    problem: str = ""


def try_engines(model: SRModel, runtime: Runtime) -> list[Tried]:
    """The engines in the order in which auto tries them for `model`, PyTorch last; auto takes the first usable one."""
    tried = []
    for kind, place in _candidates(runtime, "auto", free=True):
        engine = _open(kind, lambda: model, None, place, insist=False)
        if isinstance(engine, Unfit):
            tried.append(Tried(kind.name, place, engine.reason))
        else:
            engine.close()
            tried.append(Tried(kind.name, place))
    return [*tried, Tried(TorchEngine.name, runtime)]


def _candidates(runtime: Runtime, choice: EngineChoice, *, free: bool) -> list[tuple[_Kind, Runtime]]:
    """The engines to try before PyTorch, with their runtimes, fastest first (docs/benchmarks.md)."""
    exact = Runtime(runtime.device_name, "fp32") if free else runtime
    if choice == "winograd":
        return [(WinogradEngine, exact)]
    if choice == "openvino":
        return [(OpenVINOEngine, runtime)]
    found: list[tuple[_Kind, Runtime]] = []
    if choice == "auto" and runtime.device_type == "cpu":
        if exact.precision == "fp32" and winograd_pays(runtime):
            found.append((WinogradEngine, exact))
        if find_spec("openvino") is not None:
            found.append((OpenVINOEngine, runtime))
    return found


def _open(
    kind: _Kind, load: Callable[[], SRModel], weights: str | None, runtime: Runtime, *, insist: bool
) -> WinogradEngine | OpenVINOEngine | Unfit:
    """Open an engine that agrees with PyTorch, from the cache if possible.

    With `insist` it need not agree; then raises InputError if the engine can't compute the model.
    """
    if weights is not None:
        known = cache.find(kind.name, weights, runtime.precision)
        if isinstance(known, Usable):
            with contextlib.suppress(RuntimeError, InputError):  # not exported by this library
                return kind(known, runtime)
        elif known is not None and not insist:
            return known
    model = load()
    try:
        engine = kind(model, runtime)
    except InputError as error:
        if insist:
            raise
        unfit = Unfit(error.message)
    else:
        if agrees_with_torch(engine, model):
            if weights is not None:
                cache.keep(kind.name, weights, runtime.precision, engine.export())
            return engine
        if not insist:
            engine.close()
        unfit = Unfit(f"{kind.name} and PyTorch give different results for this model")
    if weights is not None:
        cache.keep(kind.name, weights, runtime.precision, unfit)
    return engine if insist else unfit


def _pytorch(model: SRModel, runtime: Runtime) -> TorchEngine:
    """PyTorch, on a GPU with Triton kernels if Triton is installed."""
    convert: Convert | None = None
    if runtime.device_type == "cuda":
        with contextlib.suppress(Exception):  # Triton is missing or too old
            from pdd_cli.engines.triton_conv import triton_model as convert
    return TorchEngine(model, runtime, convert=convert)
