"""The PyTorch engine, which computes any model on any device, and the comparison of other engines with it."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.engines.base import Engine, FloatArray, spec_of
from pdd_cli.imaging.image import Array, to_float
from pdd_cli.runtime import Runtime, convert_memory_errors, to_channels_last, usable_cpus

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pdd_cli.models.loading import SRModel

Convert = Callable[["SRModel", "torch.dtype"], "SRModel | None"]
"""Returns the model with a faster implementation of its network in this precision; None if there is none."""

# Mean squared error against PyTorch in fp32, as a fraction of the output's variance, that counts as rounding.
_ROUNDING = 1e-6
# Accepted error of another engine in a lower precision, as a multiple of PyTorch's error in that precision. PyTorch
# stores fewer intermediate values in fp16 than engines for GPUs do; 16 times its error in fp16 is a quarter of that in
# bf16.
_ALLOWED = 2.0
_ALLOWED_GPU = 16.0
# Engines with devices that PyTorch may not have: they are compared with PyTorch on the CPU.
_OTHER_DEVICES = ("ncnn", "onnx")
# Sides of the images on which engines are compared: odd, because some pad rows or planes in memory.
_COMPARED = ((27, 25), (41, 42))
# LR pixels that keep a GPU busy: smaller frames are batched.
_GPU_PIXELS = 1 << 18
# Two implementations of a network are timed on an image of this side, with this number of passes.
_TIMED_SIDE, _TIMED_RUNS = 256, 2
# Rows that are rounded at once. Rounding takes two to four times their memory.
_ROWS = 256


class TorchEngine:
    """PyTorch in the runtime's precision, channels last.

    `convert`: returns a faster implementation of the network. It is used if it agrees with PyTorch and is faster.
    """

    name = "torch"

    def __init__(self, model: SRModel, runtime: Runtime, *, convert: Convert | None = None) -> None:
        import torch

        if runtime.device_type == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        self.model, self._model = spec_of(model), model
        to_channels_last(model.module, runtime.device)
        lowered = model if runtime.precision == "fp32" else _lowered(model, runtime)
        # A network that doesn't run in this precision is computed in fp32.
        self.runtime = runtime = runtime if lowered else Runtime(runtime.device_name, "fp32")
        self._fast = lowered or model
        self.batch_pixels = _GPU_PIXELS if runtime.device_type == "cuda" else 0
        self.uses_converted = convert is not None and runtime.precision != "fp32" and self._use_converted(convert)

    @cached_property
    def weights_sha256(self) -> str:
        from pdd_cli.models.loading import state_sha256

        return state_sha256(self._model.module.state_dict())

    @cached_property
    def bytes_per_pixel(self) -> int:
        return bytes_per_pixel(self._model)

    @convert_memory_errors()
    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        import torch

        runtime = Runtime(self.runtime.device_name, "fp32") if exact else self.runtime
        model = self._model if exact else self._fast
        batch = torch.from_numpy(lr).to(runtime.device, memory_format=torch.channels_last, copy=True)
        with torch.inference_mode(), runtime.autocast():
            # Converted to fp32 after the transfer.
            return np.asarray(model.upscale(batch).cpu().float().numpy())

    @convert_memory_errors()
    def run_rounded(self, lr: Array) -> Array | None:
        import torch

        batch = torch.from_numpy(to_float(lr)).to(self.runtime.device).permute(0, 3, 1, 2)
        with torch.inference_mode(), self.runtime.autocast():
            sr = self._fast.upscale(batch)
            if not torch.stack([sr.amin(), sr.amax()]).isfinite().all():
                return None
            # Like `from_float`; 16 bits as int16, because not every device supports uint16.
            top, zero = (255, 0) if lr.dtype == np.uint8 else (65535, 32768)
            exact = torch.float32 if top == 255 or self.runtime.device_type == "mps" else torch.float64
            sr = sr.permute(0, 2, 3, 1)
            found = torch.empty(sr.shape, dtype=torch.int16 if zero else torch.uint8, device=sr.device)
            for part, values in zip(found.split(_ROWS, dim=1), sr.split(_ROWS, dim=1), strict=True):
                part.copy_(values.to(exact).mul(top).round_().clamp_(0, top).sub_(zero))
            rounded = found.cpu().numpy()
        return np.asarray(rounded.view(np.uint16) ^ np.uint16(zero) if zero else rounded)

    def close(self) -> None:
        import torch

        del self._model, self._fast
        if self.runtime.device_type == "cuda":
            torch.cuda.empty_cache()

    def _use_converted(self, convert: Convert) -> bool:
        """Use the converted network if it agrees with PyTorch and is faster. Return whether it is used."""
        import torch

        plain = self._fast
        try:
            candidate = convert(self._model, torch.bfloat16 if self.runtime.precision == "bf16" else torch.float16)
            if candidate is not None:
                before = self._seconds()
                self._fast = candidate
                # Timed first, because kernels are tuned for the first input, which should have a common size.
                if self._seconds() < before and agrees_with_torch(self, self._model):
                    return True
        except Exception:  # kernel compilers raise many types; PyTorch's own implementation remains
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


def bytes_per_pixel(model: SRModel) -> int:
    """Estimate the peak memory of fp32 activations in bytes per LR pixel, from a forward pass of a small image.

    It is twice the largest input and output of a layer, because upsampled, concatenated or skip connection tensors
    exist beside them.
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


def _lowered(model: SRModel, runtime: Runtime) -> SRModel | None:
    """A copy of `model` whose convolutions and linear layers have their weights in the runtime's precision.

    Autocast converts the same weights in every pass, so results are bitwise equal. Returns `model` itself if its
    network runs only with autocast, None if it doesn't run in this precision.
    """
    import torch
    from torch import nn

    from pdd_cli.models.rrdbnet import ActivatedConv2d

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, ActivatedConv2d)
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float16
    lowered = replace(model, module=copy.deepcopy(model.module))
    for layer in lowered.module.modules():
        if type(layer) in layers and not layer._forward_pre_hooks:  # subclasses and hooks may compute with the weights
            layer.to(dtype)
    side = model.size_minimum + model.lacking(model.size_minimum)
    for candidate in (lowered, model):
        with contextlib.suppress(RuntimeError), torch.inference_mode(), runtime.autocast():
            candidate.upscale(torch.zeros(1, model.in_channels, side, side, device=runtime.device))
            return candidate
    return None


def agrees_with_torch(engine: Engine, model: SRModel) -> bool:
    """Whether the error of `engine` against PyTorch in fp32 is rounding, or like that of PyTorch in its precision.

    They are compared on noise of two sizes, to reject a conversion that is fixed to one size.
    """
    on_gpu = engine.runtime.device_type != "cpu"
    runtime = Runtime("cpu", engine.runtime.precision) if engine.name in _OTHER_DEVICES else engine.runtime
    multiple = _ALLOWED_GPU if on_gpu and engine.name in _OTHER_DEVICES else _ALLOWED
    same, full = TorchEngine(model, runtime), TorchEngine(model, Runtime(runtime.device_name, "fp32"))
    generator = np.random.default_rng(0)
    for size in _COMPARED:
        height, width = (side + model.lacking(side) for side in size)
        lr = generator.random((1, model.in_channels, height, width), np.float32)
        try:
            result, own, expected = engine.run(lr), same.run(lr), full.run(lr)
        except RuntimeError:
            return False
        allowed = max(_ROUNDING * float(expected.var()), multiple * _error(own, expected), 1e-14)
        if not _error(result, expected) <= allowed:  # also false for NaN
            return False
    return True


def _error(result: FloatArray, expected: FloatArray) -> float:
    """Mean squared error."""
    return float(np.mean((result - expected) ** 2))
