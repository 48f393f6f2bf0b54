"""Loads the weights of `upscale` and creates an upscaler for each device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pdd_cli.engines.base import Engine
from pdd_cli.engines.cache import fingerprint
from pdd_cli.engines.devices import choose_inference
from pdd_cli.engines.select import open_engine
from pdd_cli.errors import DownloadError, InputError
from pdd_cli.gpus import is_pytorch_device
from pdd_cli.imaging.provenance import Provenance
from pdd_cli.observer import Observer
from pdd_cli.ranks import Ranks
from pdd_cli.runtime import Runtime, choose_runtime, resident_memory
from pdd_cli.settings.base import EngineChoice
from pdd_cli.settings.upscale import UpscaleConfig
from pdd_cli.upscaling.jobs import provenance_of
from pdd_cli.upscaling.processing import Processing
from pdd_cli.upscaling.resizing import SizeRequest
from pdd_cli.upscaling.strength import at_strength, choose_strength, files_at_strength
from pdd_cli.upscaling.upscaler import Upscaler
from pdd_cli.weights.catalog import DENOISING
from pdd_cli.weights.catalog import find as find_published
from pdd_cli.weights.fetch import ensure
from pdd_cli.weights.states import HUB_PREFIX, is_onnx
from pdd_cli.weights.store import Store

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel


@dataclass(frozen=True)
class LoadedUpscalers:
    """An upscaler for each device, and the provenance to record in the outputs.

    `to_fetch`: names of weights that a dry run did not fetch.
    """

    upscalers: list[Upscaler]
    provenance: Provenance
    strength: float
    to_fetch: Sequence[str]


class Loader(Protocol):
    """A function such as `load_upscalers`."""

    def __call__(
        self, settings: UpscaleConfig, ranks: Ranks, observer: Observer, *, dry_run: bool
    ) -> AbstractContextManager[LoadedUpscalers]: ...


@dataclass(frozen=True)
class _Weights:
    """The file of the weights (None: not fetched), and all files that are blended at `strength`.

    `keeps_noise`: the file of the same network that keeps noise, which is blended in as --denoise says.
    """

    path: Path | None
    files: Sequence[Path]
    strength: float
    to_fetch: Sequence[str]
    keeps_noise: Path | None = None


@contextmanager
def load_upscalers(
    settings: UpscaleConfig, ranks: Ranks, observer: Observer, *, dry_run: bool
) -> Iterator[LoadedUpscalers]:
    """Load the models; their engines are closed at the end of the context.

    One process on each machine fetches the weights. A dry run fetches nothing.
    """
    names = ranks.devices(settings.device)
    places = [choose_inference(settings.engine, name, settings.precision) for name in names]
    weights = ranks.first_per_machine(partial(_find_weights, settings, observer, dry_run=dry_run))
    as_onnx = weights.path is not None and is_onnx(weights.path)
    if as_onnx:
        places = [_onnx_place(settings, name) for name in names]
    for name in weights.to_fetch:
        observer.say(f"dry run: the weights {name} are not installed; the run would fetch them ({_published(name)})")
    load = partial(_load_model, settings, weights)
    blend = weights.strength if weights.keeps_noise is None or settings.denoise is None else settings.denoise
    known = fingerprint(weights.files, blend) if weights.path is not None else None
    free = settings.precision == "auto" and not as_onnx

    def open_one(name: str, choice: EngineChoice, runtime: Runtime) -> Engine:
        if weights.path is None:
            choice, runtime = "torch", choose_runtime(name if is_pytorch_device(name) else "cpu", "fp32")
        return open_engine(load, None if as_onnx else known, runtime, choice, free=free, anywhere=name == "auto")

    with ExitStack() as opened:
        engines = [
            opened.enter_context(closing(open_one(name, *place))) for name, place in zip(names, places, strict=True)
        ]
        shown = "; ".join(f"{engine.runtime}, {engine.name}" for engine in engines)
        processes = f", {ranks.size} processes" if ranks.size > 1 else ""
        model = engines[0].model
        observer.say(f"{settings.weights}: {model.architecture} x{model.scale} on {shown}{processes}")
        max_memory_bytes = settings.max_memory_bytes
        if max_memory_bytes is not None:
            # The devices share the memory that the models leave.
            used = min(resident_memory(), max_memory_bytes)
            max_memory_bytes = used + (max_memory_bytes - used) // len(engines)
        processing = processing_of(settings)
        upscalers = [
            Upscaler(
                engine,
                tile=settings.tile,
                overlap=settings.overlap,
                notify=observer.warn,
                size=_size(settings),
                correction=settings.color_correction,
                processing=processing,
                max_memory=max_memory_bytes,
            )
            for engine in engines
        ]
        if weights.path is None:
            provenance = Provenance(settings.weights, "")
        else:
            provenance = provenance_of(
                weights.path, model.scale, weights.strength, settings.color_correction, processing, settings.denoise
            )
        yield LoadedUpscalers(upscalers, provenance, weights.strength, weights.to_fetch)


class KeptUpscalers:
    """Loads as `load_upscalers` does, but keeps the last upscalers loaded until others are needed or it is closed."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._kept: tuple[UpscaleConfig, LoadedUpscalers] | None = None

    @contextmanager
    def load(
        self, settings: UpscaleConfig, ranks: Ranks, observer: Observer, *, dry_run: bool
    ) -> Iterator[LoadedUpscalers]:
        """A context, at whose end the upscalers stay loaded."""
        if self._kept is None or self._kept[0] != settings:
            self.close()
            self._kept = (
                settings,
                self._opened.enter_context(load_upscalers(settings, ranks, observer, dry_run=dry_run)),
            )
        yield self._kept[1]

    def close(self) -> None:
        """Close the engines."""
        self._kept = None
        self._opened.close()


def fetch_all(each: Sequence[UpscaleConfig], observer: Observer) -> None:
    """Install the weights of all these settings. Raises as `load_upscalers` does for them, before any is used."""
    for settings in each:
        weights = _find_weights(settings, _Fetching(observer), dry_run=False)
        if weights.strength != 1:
            _load_model(settings, weights)


class _Fetching(Observer):
    """Passes on downloads, and no messages, which `load_upscalers` repeats."""

    def __init__(self, observer: Observer) -> None:
        self.fetching = observer.fetching  # type: ignore[method-assign]


def _find_weights(settings: UpscaleConfig, observer: Observer, *, dry_run: bool) -> _Weights:
    check_denoise(settings)
    to_fetch: list[str] = []
    keeps_noise = None
    strength = 1.0 if settings.strength is None else settings.strength
    with observer.fetching() as on_event:

        def find(name: str) -> Path:
            try:
                return ensure(name, store=Store.default(), offline=settings.offline or dry_run, on_event=on_event)
            except DownloadError:
                if dry_run and not settings.offline and name not in to_fetch and not name.startswith(HUB_PREFIX):
                    to_fetch.append(name)
                raise

        try:
            path = find(settings.weights)
            if settings.denoise not in (None, 1):
                keeps_noise = find(DENOISING[settings.weights])
        except DownloadError:
            if not to_fetch:
                raise
            return _Weights(None, (), strength, to_fetch)
        strength = choose_strength(path, settings.strength, name=settings.weights, observer=observer)
        files = files_at_strength(path, strength, find)
    # If the base is not installed, a dry run uses strength 1, which has the same size, time and memory.
    strength = 1.0 if to_fetch else strength
    return _Weights(path, [*files, keeps_noise] if keeps_noise else files, strength, to_fetch, keeps_noise)


def check_denoise(settings: UpscaleConfig) -> None:
    """Raise InputError if the weights are none that --denoise works with."""
    if settings.denoise is not None and settings.weights not in DENOISING:
        raise InputError(
            f"--denoise needs a pair of models, one of which keeps noise; {settings.weights} has no second model",
            f"Use it with --weights {' or '.join(DENOISING)}.",
        )


def _load_model(settings: UpscaleConfig, weights: _Weights) -> SRModel:
    from pdd_cli.models.loading import load_sr_model, stand_in
    from pdd_cli.models.onnx_model import load_onnx_model

    if weights.path is None:
        return stand_in(settings.weights)
    find = partial(ensure, store=Store.default(), offline=settings.offline, on_event=lambda event: None)
    model = load_onnx_model(weights.path) if is_onnx(weights.path) else load_sr_model(weights.path)
    if weights.keeps_noise is not None and settings.denoise is not None:
        return _denoising(model, load_sr_model(weights.keeps_noise), settings)
    try:
        return at_strength(model, weights.strength, name=settings.weights, find=find)
    except InputError as error:
        if settings.strength is None and weights.strength != 1:
            error.hint += " Or use --strength 1, which doesn't need the base."
        raise


def _denoising(model: SRModel, keeps_noise: SRModel, settings: UpscaleConfig) -> SRModel:
    """Interpolate between the model that keeps noise (0) and the one that removes it (1), in place."""
    from pdd_cli.models.loading import interpolated

    ours, theirs = model.module.state_dict(), keeps_noise.module.state_dict()
    if {key: tensor.shape for key, tensor in ours.items()} != {key: tensor.shape for key, tensor in theirs.items()}:
        other = DENOISING[settings.weights]
        raise InputError(
            f"--denoise: {settings.weights} and {other} are networks of different shapes",
            "Install the published files of both.",
        )
    assert settings.denoise is not None
    model.module.load_state_dict(interpolated(theirs, ours, settings.denoise))
    return model


def _onnx_place(settings: UpscaleConfig, device: str) -> tuple[EngineChoice, Runtime]:
    """The engine and the runtime of an ONNX file. Raises InputError if the settings name others."""
    if settings.engine not in ("auto", "onnx"):
        raise InputError(f"{settings.weights}: --engine {settings.engine} can't compute an ONNX file", "Leave it out.")
    if settings.precision not in ("auto", "fp32"):
        raise InputError(
            f"{settings.weights}: ONNX files are computed in fp32, not with --precision {settings.precision}",
            "Leave out --precision, or use the .pth or .safetensors file from which it was made.",
        )
    return choose_inference("onnx", device, "fp32")


def processing_of(settings: UpscaleConfig) -> Processing:
    """The switches at inference."""
    return Processing(
        seamless=settings.seamless,
        normal_map=settings.normal_map,
        tta=settings.tta,
        mix=settings.mix,
        snap_flats=settings.snap_flats,
    )


def _size(settings: UpscaleConfig) -> SizeRequest:
    fit = None
    if settings.fit is not None:
        width, height = settings.fit.split("x")
        fit = (int(width), int(height))
    return SizeRequest(settings.scale, settings.width, settings.height, settings.long_side, fit)


def _published(name: str) -> str:
    """The file and first source of weights in the catalogue."""
    entry = find_published(name)
    size = f", {entry.size / 1e6:.0f} MB" if entry.size else ""
    return f"{entry.file}{size}, from {entry.sources[0]}"
