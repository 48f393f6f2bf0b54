"""What computes a forward pass: PyTorch, or on a CPU Winograd's algorithm or OpenVINO."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pdd_cli.engines import cache as compiled
from pdd_cli.errors import InputError
from pdd_cli.imaging.decode import Array
from pdd_cli.imaging.encode import from_float, to_float
from pdd_cli.models.traits import ModelSpec
from pdd_cli.runtime import Runtime, usable_cpus, winograd_pays

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pdd_cli.models.loading import SRModel

FloatArray = npt.NDArray[np.float32]
EngineChoice = Literal["auto", "torch", "openvino", "winograd"]
Fuse = Callable[["SRModel", "torch.dtype"], "SRModel | None"]
"""What gives a model with another form of its network, computed in this precision; None where there is none."""

# The mean square error against PyTorch's fp32, as a share of the output's variance, that counts as rounding in fp32 …
_ROUNDING = 1e-6
# … and how many times PyTorch's own error in a lower precision another engine's may be in the same one.
_ALLOWED = 2.0
# What keeps a GPU busy, in LR pixels: smaller frames are computed several at a time.
_GPU_PIXELS = 1 << 18
# The side of the noise that two forms of a network are timed on, and how often.
_TIMED_SIDE, _TIMED_RUNS = 256, 2
# Rows that are rounded at once, which needs twice or four times their memory.
_ROWS = 256


class Engine(Protocol):
    """Computes the forward pass of one model."""

    name: str
    runtime: Runtime

    @property
    def model(self) -> ModelSpec: ...

    @property
    def weights_sha256(self) -> str:
        """By `state_sha256`: equal for equal weights, in whatever file they are."""
        ...

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of fp32 activations that a forward pass holds at once, per LR pixel: an estimate."""
        ...

    @property
    def batch_pixels(self) -> int:
        """LR pixels up to which several small images at once are faster than one after the other."""
        ...

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        """(N, in_channels, h, w) in 0..1 to (N, out_channels, h*scale, w*scale); `exact` computes in fp32.

        In memory the channels of the result lie next to each other, as they do in pictures.
        """
        ...

    def run_rounded(self, lr: Array) -> Array | None:
        """(N, h, w, in_channels) of 8 or 16 bits to (N, h*scale, w*scale, out_channels) of the same, clipped.

        None where a value isn't finite. Rounded on the device, which saves memory, time and most of the way back.
        """
        ...


class TorchEngine:
    """PyTorch in the runtime's precision, channels last.

    With `fuse` in the form that it gives where that computes the same in less time.
    """

    name = "torch"

    def __init__(self, model: SRModel, runtime: Runtime, *, fuse: Fuse | None = None) -> None:
        import torch

        if runtime.kind == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        self.model = model
        self.runtime = runtime
        model.module.to(runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fast = model if runtime.precision == "fp32" else _lowered(model, runtime)
        self.batch_pixels = _GPU_PIXELS if runtime.kind == "cuda" else 0
        self.fused = fuse is not None and runtime.precision != "fp32" and self._fuse(fuse)

    @cached_property
    def weights_sha256(self) -> str:
        from pdd_cli.models.loading import state_sha256

        return state_sha256(self.model.module.state_dict())

    @cached_property
    def bytes_per_pixel(self) -> int:
        return bytes_per_pixel(self.model)

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        import torch

        runtime = Runtime(self.runtime.place, "fp32") if exact else self.runtime
        model = self.model if exact else self._fast
        batch = torch.from_numpy(lr).to(runtime.device, memory_format=torch.channels_last, copy=True)
        with torch.inference_mode(), runtime.autocast():
            # Brought to fp32 on this side of the bus.
            return np.asarray(model.upscale(batch).cpu().float().numpy())

    def run_rounded(self, lr: Array) -> Array | None:
        import torch

        batch = torch.from_numpy(to_float(lr)).to(self.runtime.device).permute(0, 3, 1, 2)
        with torch.inference_mode(), self.runtime.autocast():
            sr = self._fast.upscale(batch)
            if not torch.stack([sr.amin(), sr.amax()]).isfinite().all():
                return None
            # As `from_float` does it; 16 bits as signed ones, which every device has.
            top, zero = (255, 0) if lr.dtype == np.uint8 else (65535, 32768)
            exact = torch.float32 if top == 255 or self.runtime.kind == "mps" else torch.float64
            sr = sr.permute(0, 2, 3, 1)
            found = torch.empty(sr.shape, dtype=torch.int16 if zero else torch.uint8, device=sr.device)
            for part, values in zip(found.split(_ROWS, dim=1), sr.split(_ROWS, dim=1), strict=True):
                part.copy_(values.to(exact).mul(top).round_().clamp_(0, top).sub_(zero))
            rounded = found.cpu().numpy()
        return np.asarray(rounded.view(np.uint16) ^ np.uint16(zero) if zero else rounded)

    def _fuse(self, fuse: Fuse) -> bool:
        """Take another form of the network, and tell whether it was taken."""
        import torch

        plain = self._fast
        try:
            candidate = fuse(self.model, torch.bfloat16 if self.runtime.precision == "bf16" else torch.float16)
            if candidate is not None:
                before = self._seconds()
                self._fast = candidate
                # Timed first: kernels are tuned on what they see first, which should be of a common size.
                if self._seconds() < before and _agrees(self, self.model):
                    return True
        except Exception:  # whatever a compiler of kernels raises; there is another form
            pass
        self._fast = plain
        return False

    def _seconds(self) -> float:
        lr = np.zeros((1, _TIMED_SIDE, _TIMED_SIDE, self.model.in_channels), np.uint8)
        self.run_rounded(lr)
        started = time.perf_counter()
        for _ in range(_TIMED_RUNS):
            self.run_rounded(lr)
        return time.perf_counter() - started


class WinogradEngine:
    """Winograd's algorithm on the CPU, in fp32: for RRDBNet and SRVGGNetCompact.

    Of a loaded model, or of one that was converted before. Raises InputError when the runtime isn't a CPU in fp32,
    there is no kernel for this CPU, or the model is another.
    """

    name = "winograd"

    def __init__(self, model: SRModel | compiled.ExportedModel, runtime: Runtime) -> None:
        if runtime.kind != "cpu" or runtime.precision != "fp32":
            raise InputError(
                f"--engine winograd computes in fp32 on a CPU, not on {runtime}", "Add --device cpu --precision fp32."
            )
        from pdd_cli.engines.winograd import inference as winograd
        from pdd_cli.engines.winograd import kernel as winograd_kernel

        kernel = winograd_kernel.kernel()
        if kernel is None:
            raise InputError("--engine winograd: this CPU has neither AVX2 nor NEON", "Use --engine auto.")
        if isinstance(model, compiled.ExportedModel):
            self.converted = model
        else:
            self.converted = _describe(model, _winograd_state(model), 0)
        self.model = self.converted.traits
        try:
            self._network = winograd.Network(compiled.tensors(self.converted.program), self.model.scale, kernel)
        except (KeyError, ValueError) as error:
            raise InputError("--engine winograd: layers that it doesn't know", "Use --engine auto.") from error
        self.bytes_per_pixel = self._network.bytes_per_pixel
        self.runtime = runtime
        self.weights_sha256 = self.converted.weights_sha256
        self.batch_pixels = 0

    def exported(self) -> bytes:
        return compiled.bytes_of(self.converted.program)

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        images, _, height, width = lr.shape
        scale = self.model.scale
        found = np.empty((images, height * scale, width * scale, self.model.out_channels), np.float32)
        for image, target in zip(lr.transpose(0, 2, 3, 1), found, strict=True):
            target[:] = self._infer(image)
        return found.transpose(0, 3, 1, 2)

    def run_rounded(self, lr: Array) -> Array | None:
        found = []
        for image in lr:
            sr = self._infer(to_float(image))
            try:
                found.append(from_float(sr, 8 * lr.itemsize))
            except ValueError:
                return None
        return np.stack(found)

    def _infer(self, lr: FloatArray) -> FloatArray:
        """(h, w, C) to (h*scale, w*scale, C), until the next call."""
        height, width = lr.shape[:2]
        bottom, right = self.model.lacking(height), self.model.lacking(width)
        if bottom or right:
            lr = np.pad(lr, ((0, bottom), (0, right), (0, 0)), mode="edge")
        return self._network(lr)[: height * self.model.scale, : width * self.model.scale]


class OpenVINOEngine:
    """OpenVINO on the CPU in the runtime's precision, for any size of image.

    Of a loaded model, or of one that was converted before. Raises InputError when OpenVINO isn't installed, the runtime
    isn't a CPU, or the model can't be converted.
    """

    name = "openvino"

    def __init__(self, model: SRModel | compiled.ExportedModel, runtime: Runtime) -> None:
        if find_spec("openvino") is None:
            raise InputError("--engine openvino: OpenVINO isn't installed", "Run: pip install 'pdd-cli[openvino]'")
        if runtime.kind != "cpu":
            raise InputError(f"--engine openvino runs on a CPU, not on {runtime.place}", "Add --device cpu.")
        if isinstance(model, compiled.ExportedModel):
            self.converted = model
        else:
            self.converted = _describe(model, compiled.convert(model), bytes_per_pixel(model))
        self.model = self.converted.traits
        self.runtime = runtime
        self.weights_sha256 = self.converted.weights_sha256
        self.bytes_per_pixel = self.converted.bytes_per_pixel
        self.batch_pixels = 0
        self.compiled = self.converted.compile(runtime.precision)
        self._fast = self.compiled.create_infer_request()
        self._exact = self._fast if runtime.precision == "fp32" else None

    def exported(self) -> bytes:
        return bytes(self.compiled.export_model().getvalue())

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        if exact and self._exact is None:
            self._exact = self.converted.compile("fp32").create_infer_request()
        sr = self._infer(self._exact if exact else self._fast, lr)
        # A copy, for the next call writes there.
        return np.array(sr.transpose(0, 2, 3, 1), np.float32, order="C").transpose(0, 3, 1, 2)

    def run_rounded(self, lr: Array) -> Array | None:
        sr = self._infer(self._fast, to_float(lr.transpose(0, 3, 1, 2)))
        found = np.empty((len(sr), *sr.shape[2:], sr.shape[1]), lr.dtype)
        try:
            for image, planes in zip(found, sr, strict=True):
                for channel, plane in enumerate(planes):
                    image[..., channel] = from_float(plane, 8 * lr.itemsize)
        except ValueError:
            return None
        return found

    def _infer(self, request: Any, lr: FloatArray) -> FloatArray:
        """(N, C, h, w) to the network's own output, until the next call."""
        height, width = lr.shape[-2:]
        bottom, right = self.model.lacking(height), self.model.lacking(width)
        if bottom or right:
            lr = np.pad(lr, ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge")
        request.start_async([np.ascontiguousarray(lr)])
        try:
            # In small waits, between which Python answers Ctrl-C.
            while not request.wait_for(100):
                pass
        except BaseException:
            request.cancel()
            raise
        sr: FloatArray = request.get_output_tensor(0).data
        return sr[..., : height * self.model.scale, : width * self.model.scale]


_Kind = type[WinogradEngine] | type[OpenVINOEngine]


def choose_engine(model: SRModel, runtime: Runtime, choice: EngineChoice, *, free: bool = False) -> Engine:
    """The engine for `--engine`, by `open_engine`, of a loaded model; nothing is kept."""
    return open_engine(lambda: model, None, runtime, choice, free=free)


def open_engine(
    load: Callable[[], SRModel], weights: str | None, runtime: Runtime, choice: EngineChoice, *, free: bool = False
) -> Engine:
    """The engine for `--engine`, of the model that `load` loads, which isn't loaded where what it needs is cached.

    auto is on a CPU the first of those in `_candidates` that has a form of this model and agrees with PyTorch, else
    PyTorch. Whether it computes the same is checked here for the very model, on noise. `weights`: their fingerprint
    (`compiled.fingerprint`), under which what is found out of a model is kept. `free`: the precision may be another
    than the runtime's.
    """
    loaded = functools.cache(load)
    for kind, place in _candidates(runtime, choice, free=free):
        try:
            engine, agrees = _open(kind, loaded, weights, place, insist=choice == kind.name)
        except InputError:
            if choice == kind.name:
                raise
            continue
        if agrees or choice == kind.name:
            return engine
    return _pytorch(loaded(), runtime)


def _candidates(runtime: Runtime, choice: EngineChoice, *, free: bool) -> list[tuple[_Kind, Runtime]]:
    """The engines besides PyTorch that may be taken, the fastest first (docs/benchmarks.md), and each one's runtime."""
    exact = Runtime(runtime.place, "fp32") if free else runtime
    if choice == "winograd":
        return [(WinogradEngine, exact)]
    if choice == "openvino":
        return [(OpenVINOEngine, runtime)]
    found: list[tuple[_Kind, Runtime]] = []
    if choice == "auto" and runtime.kind == "cpu":
        if exact.precision == "fp32" and winograd_pays(runtime):
            found.append((WinogradEngine, exact))
        if find_spec("openvino") is not None:
            found.append((OpenVINOEngine, runtime))
    return found


def _open(
    kind: _Kind, load: Callable[[], SRModel], weights: str | None, runtime: Runtime, *, insist: bool
) -> tuple[Engine, bool]:
    """An engine, and whether it agrees with PyTorch; from the cache where it can be.

    Raises InputError where it has no form of the model, or was found to disagree; if we `insist`, not for the latter.
    """
    if weights is not None:
        known = compiled.find(kind.name, weights, runtime.precision)
        if known is not None and not known.agrees and not insist:
            raise InputError(f"--engine {kind.name} was found unfit for this model", "Use --engine auto.")
        if known is not None and known.program is not None:
            with contextlib.suppress(RuntimeError):  # not what this library exported
                return kind(known, runtime), known.agrees
    model = load()
    try:
        engine = kind(model, runtime)
    except InputError:
        if weights is not None and not insist:
            compiled.keep(kind.name, weights, runtime.precision, _describe(model, None, 0), b"")
        raise
    agrees = _agrees(engine, model)
    if weights is not None:
        converted = replace(engine.converted, agrees=agrees)
        compiled.keep(kind.name, weights, runtime.precision, converted, engine.exported())
    return engine, agrees


def _pytorch(model: SRModel, runtime: Runtime) -> TorchEngine:
    """PyTorch, on a GPU with kernels of our own where Triton is there."""
    fuse: Fuse | None = None
    if runtime.kind == "cuda":
        with contextlib.suppress(Exception):  # no Triton, or one that is too old
            from pdd_cli.engines.triton_conv import fused as fuse
    return TorchEngine(model, runtime, fuse=fuse)


def bytes_per_pixel(model: SRModel) -> int:
    """Bytes of fp32 activations that a forward pass holds at once, per LR pixel: an estimate from a small one.

    The largest input and output of any one layer, twice: what is upsampled, concatenated or kept for a skip
    connection stands beside them.
    """
    import torch

    side = max(16, model.size_minimum)
    largest = 0

    def record(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        nonlocal largest
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, torch.Tensor)]
        largest = max(largest, sum(tensor.numel() for tensor in tensors) * 4)

    leaves = [module for module in model.module.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(record) for module in leaves]
    device = next(model.module.parameters()).device
    try:
        with torch.inference_mode():
            model.upscale(torch.zeros(1, model.in_channels, side, side, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return -(-2 * largest // side**2)


def _lowered(model: SRModel, runtime: Runtime) -> SRModel:
    """A copy whose convolutions and linear layers have their weights in the runtime's precision.

    Autocast makes just these of them in every pass anew, so that the results are the same to the last bit. Where its
    network doesn't run so, `model` itself.
    """
    import torch
    from torch import nn

    from pdd_cli.models.rrdbnet import ActivatedConv2d

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, ActivatedConv2d)
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float16
    lowered = replace(model, module=copy.deepcopy(model.module))
    for layer in lowered.module.modules():
        if (
            type(layer) in layers and not layer._forward_pre_hooks
        ):  # other subclasses and hooks compute with their weights
            layer.to(dtype)
    side = model.size_minimum + model.lacking(model.size_minimum)
    try:
        with torch.inference_mode(), runtime.autocast():
            lowered.upscale(torch.zeros(1, model.in_channels, side, side, device=runtime.device))
    except RuntimeError:
        return model
    return lowered


def _winograd_state(model: SRModel) -> dict[str, FloatArray]:
    """The tensors of a network that Winograd's algorithm has a form of. Raises InputError for another."""
    if model.architecture not in ("RRDBNet", "RealESRGAN Compact"):
        raise InputError(f"--engine winograd: it has no form of this {model.architecture} model", "Use --engine auto.")
    return {key: value.detach().float().cpu().numpy() for key, value in model.module.state_dict().items()}


def _describe(model: SRModel, program: Any, bytes_per_pixel: int) -> compiled.ExportedModel:
    from pdd_cli.models.loading import state_sha256

    traits = ModelSpec(**{field.name: getattr(model, field.name) for field in fields(ModelSpec)})
    return compiled.ExportedModel(traits, state_sha256(model.module.state_dict()), bytes_per_pixel, program)


def _agrees(engine: Engine, model: SRModel) -> bool:
    """Whether `engine` is as near to PyTorch's fp32 as PyTorch is in its precision.

    On noise of two sizes: the second tells a conversion that was frozen to one size.
    """
    runtime = engine.runtime
    same, full = TorchEngine(model, runtime), TorchEngine(model, Runtime(runtime.place, "fp32"))
    generator = np.random.default_rng(0)
    multiple = model.size_multiple
    for side in (max(24, model.size_minimum), max(40, model.size_minimum + 8)):
        side = -(-side // multiple) * multiple
        lr = generator.random((1, model.in_channels, side, side), np.float32)
        try:
            result, own, expected = engine.run(lr), same.run(lr), full.run(lr)
        except RuntimeError:
            return False
        allowed = max(_ROUNDING * float(expected.var()), _ALLOWED * _error(own, expected), 1e-14)
        if not _error(result, expected) <= allowed:  # NaN isn't either
            return False
    return True


def _error(result: FloatArray, expected: FloatArray) -> float:
    """Mean square error."""
    return float(np.mean((result - expected) ** 2))
