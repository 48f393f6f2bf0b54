"""The choice of an engine for a model on this machine."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
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
    """The engine for `--engine`, by `open_engine`, of a loaded model; nothing is cached."""
    return open_engine(lambda: model, None, runtime, choice, free=free)


def open_engine(
    load: Callable[[], SRModel], weights: str | None, runtime: Runtime, choice: EngineChoice, *, free: bool = False
) -> Engine:
    """The engine for `--engine`, of the model that `load` gives; it isn't loaded where the cache suffices.

    auto on a CPU is the first of `_candidates` that has a form of this model and agrees with PyTorch, else PyTorch.
    The comparison is made here, on noise, for this very model.

    Args:
        weights: their fingerprint (`cache.fingerprint`), by which the result is cached; None caches nothing.
        free: the engine may compute in another precision than the runtime's.
    """
    loaded = functools.cache(load)
    for kind, place in _candidates(runtime, choice, free=free):
        engine = _open(kind, loaded, weights, place, insist=choice == kind.name)
        if not isinstance(engine, Unfit):
            return engine
    return _pytorch(loaded(), runtime)


def _candidates(runtime: Runtime, choice: EngineChoice, *, free: bool) -> list[tuple[_Kind, Runtime]]:
    """The engines besides PyTorch that may be taken, the fastest first (docs/benchmarks.md), and each one's runtime."""
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
    """An engine that agrees with PyTorch, from the cache where it can be.

    With `insist` also one that doesn't agree; then raises InputError where the engine has no form of the model.
    """
    if weights is not None:
        known = cache.find(kind.name, weights, runtime.precision)
        if isinstance(known, Usable):
            with contextlib.suppress(RuntimeError, InputError):  # not what this library exported
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
    """PyTorch; on a GPU with Triton kernels where Triton is installed."""
    convert: Convert | None = None
    if runtime.device_type == "cuda":
        with contextlib.suppress(Exception):  # no Triton, or one that is too old
            from pdd_cli.engines.triton_conv import triton_model as convert
    return TorchEngine(model, runtime, convert=convert)
