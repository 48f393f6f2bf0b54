"""3x3 convolutions and their gradients by Winograd's algorithm, in fp32, on a CPU.

`accelerate` replaces the computation of a network's layers and keeps their parameters and names. A residual dense block
is one operation on one tensor: each convolution reads its first channels and writes the following ones.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pdd_cli.engines.winograd.kernel import GAP, MAX_TILES, PLACES, SCRATCH, Kernel, kernel, pause_address, tiles_along
from pdd_cli.engines.winograd.training_kernel import (
    CHANNELS,
    CONVOLVE,
    CORRELATE,
    FIELDS,
    GATE,
    TEAM,
    TRANSFORM,
    TrainingEmitter,
)
from pdd_cli.models.rrdbnet import ActivatedConv2d, ResidualDenseBlock
from pdd_cli.runtime import usable_cpus
from pdd_cli.weights.wiring import LEAKY_SLOPE, dense_block

_SHARED_CACHE = 1 << 22  # maximum bytes of a dense block's maps for the images that are computed together
_MIN_TILES = 64  # with fewer, transforming the weights costs more than the algorithm saves
_MAX_CHANNELS = 512
_ALIGNMENT = 64


def accelerate(network: nn.Module) -> None:
    """Make `network` compute its 3x3 convolutions by Winograd's algorithm, in place.

    Does nothing if there is no kernel for this CPU, or PyTorch doesn't use OpenMP threads.
    """
    if _machine() is None:
        return
    for module in network.modules():
        if type(module) in _REPLACEMENTS and _is_plain_3x3(module):
            module.__class__ = _REPLACEMENTS[type(module)]
        elif type(module) is ResidualDenseBlock:
            module.__class__ = WinogradDenseBlock


def can_accelerate() -> bool:
    """Whether `accelerate` has a kernel for this CPU and finds PyTorch's OpenMP threads. Import torch before."""
    return _machine() is not None


def _is_plain_3x3(layer: nn.Module) -> bool:
    assert isinstance(layer, nn.Conv2d)
    return (
        (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def _has_tiles(x: Tensor) -> bool:
    images, _, height, width = x.shape
    return x.device.type == "cpu" and images * tiles_along(height) * tiles_along(width) >= _MIN_TILES


class _Winograd(nn.Conv2d):
    slope = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not _has_tiles(x):
            return super().forward(x)
        # All in fp32, including the first and last layers, which have too few channels for the kernel.
        with torch.autocast("cpu", enabled=False):
            if not self.is_wide:
                return super().forward(x.float())
            bias = None if self.bias is None else _aligned(self.bias.float())
            arguments = (_kernel_layout(x), _kernel_layout(self.weight), bias, self.slope)
            return _Convolution.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]

    @property
    def is_wide(self) -> bool:
        """Whether the kernel supports its numbers of channels."""
        widths = (self.in_channels, self.out_channels)
        return all(width % CHANNELS == 0 and width <= _MAX_CHANNELS for width in widths)


class WinogradConv2d(_Winograd):
    """nn.Conv2d with 3x3 taps."""


class WinogradActivatedConv2d(_Winograd, ActivatedConv2d):
    """ActivatedConv2d with 3x3 taps."""

    slope = LEAKY_SLOPE


_REPLACEMENTS: dict[type, type] = {nn.Conv2d: WinogradConv2d, ActivatedConv2d: WinogradActivatedConv2d}


class WinogradDenseBlock(ResidualDenseBlock):
    """ResidualDenseBlock whose maps share one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5]
        if not (_has_tiles(x) and all(isinstance(layer, _Winograd) and layer.is_wide for layer in layers)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            parameters = []
            for layer in layers:
                assert layer.bias is not None
                parameters += [_kernel_layout(layer.weight), _aligned(layer.bias.float())]
            return _DenseBlock.apply(_kernel_layout(x), *parameters)  # type: ignore[no-any-return,no-untyped-call]


class _Convolution(torch.autograd.Function):
    """x (N, C, h, w), weight (K, C, 3, 3), bias (K) or None, slope of the leaky ReLU, to (N, K, h, w).

    All tensors are fp32, channels-last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
        out = _empty_map(x, weight.shape[0])
        program = _Program()
        program.convolve(x, program.transform(weight), out, bias=bias, slope=slope)
        program.run()
        ctx.slope = slope
        ctx.save_for_backward(x, weight, *([] if slope == 1 else [out]))
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *activated = ctx.saved_tensors
        gradient = _kernel_layout(gradient)
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None, None, None]
        program = _Program()
        for out in activated:
            given, gradient = gradient, torch.empty_like(gradient)
            program.gate(out, given, gradient, ctx.slope)
        if of_x:
            found[0] = of_input = _empty_map(x, x.shape[1])
            program.convolve(gradient, program.transform_back(weight), of_input)
        if of_weight:
            found[1] = of_taps = torch.empty_like(weight)
            program.correlate(x, gradient, of_taps)
        program.run()
        if of_bias:
            found[2] = gradient.sum((0, 2, 3))
        return tuple(found)


class _DenseBlock(torch.autograd.Function):
    """x and five pairs of weight and bias to the output of ResidualDenseBlock; all fp32, channels-last.

    A few images go through the whole block before the next ones, so that their maps stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        *dense, last = dense_block(x.shape[1], weights[0].shape[0])
        whole, out = _empty_map(x, last.inputs), torch.empty_like(x)
        whole[:, : x.shape[1]] = x
        program = _Program()
        filters = [program.transform(weight) for weight in weights]
        for images in _image_chunks(whole):
            some = whole[images]
            for layer, by, bias in zip(dense, filters, biases, strict=False):
                new = some[:, layer.written]
                program.convolve(some[:, : layer.inputs], by, new, bias=bias, slope=LEAKY_SLOPE)
            program.convolve(
                some, filters[4], out[images], bias=biases[4], residual1=x[images], residual_scale=last.residual_scale
            )
        program.run()
        ctx.save_for_backward(whole, *weights)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        *dense, last = dense_block(weights[4].shape[0], weights[0].shape[0])
        gradient = _kernel_layout(gradient)
        of_last = gradient * last.residual_scale
        of_whole = torch.empty_like(whole)
        of_weights = [torch.empty_like(weight) for weight in weights] if any(ctx.needs_input_grad[1:]) else []
        program = _Program()
        filters = [program.transform_back(weight) for weight in weights]
        for images in _image_chunks(whole):
            some, of_some = whole[images], of_whole[images]
            program.convolve(of_last[images], filters[4], of_some)
            for layer, by in reversed(list(zip(dense, filters, strict=False))):
                of_out, of_read = of_some[:, layer.written], of_some[:, : layer.inputs]
                program.gate(some[:, layer.written], of_out, of_out, LEAKY_SLOPE)
                program.convolve(of_out, by, of_read, residual1=of_read)
            of_outs = [*(of_some[:, layer.written] for layer in dense), of_last[images]]
            for layer, of_out, of_weight in zip([*dense, last], of_outs, of_weights, strict=False):
                program.correlate(some[:, : layer.inputs], of_out, of_weight, add=images.start > 0)
        program.run()
        found: list[Tensor | None] = [None] * 10
        if of_weights:
            found[::2] = of_weights
            found[1::2] = [*(of_whole[:, layer.written].sum((0, 2, 3)) for layer in dense), of_last.sum((0, 2, 3))]
        return (of_whole[:, : last.outputs] + gradient, *found)


@dataclass(frozen=True)
class _Filter:
    """Transformed weights in the kernel's layout."""

    inputs: int
    outputs: int
    packed: Tensor


class _Program:
    """Steps for the kernel. Keeps the tensors alive until they are computed."""

    def __init__(self) -> None:
        machine = _machine()
        assert machine is not None
        self._machine = machine
        self._steps: list[list[int]] = []
        self._held: list[Tensor] = []

    def transform(self, weight: Tensor) -> _Filter:
        """The filter of a convolution with weights (K, C, 3, 3)."""
        taps = weight.permute(2, 3, 1, 0).contiguous()
        row, column, channel, _ = taps.stride()
        return self._transform(
            taps, row, column, channel, _Filter(weight.shape[1], weight.shape[0], _empty_packed(weight))
        )

    def transform_back(self, weight: Tensor) -> _Filter:
        """The filter whose convolution with the gradient of the output gives the gradient of the input."""
        # Taps rotated by 180 degrees, inputs and outputs exchanged.
        channel, _, row, column = weight.stride()
        last = weight[:, :, 2:, 2:]
        return self._transform(
            last, -row, -column, channel, _Filter(weight.shape[0], weight.shape[1], _empty_packed(weight))
        )

    def convolve(
        self,
        x: Tensor,
        by: _Filter,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        slope: float = 1.0,
        residual1: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        """out = leaky ReLU(conv(x) + bias); with a residual, residual1 + residual_scale * that."""
        machine = self._machine
        bias = machine.constants(0.0) if bias is None else bias
        slopes = machine.constants(slope)
        self._step(
            CONVOLVE, x=x, out=out, residual1=residual1, residual_scale=residual_scale,
            residuals=int(residual1 is not None), inputs=by.inputs, outputs=by.outputs,
            packed=by.packed.data_ptr(), bias=bias.data_ptr(), slope=slopes.data_ptr(),
            tiles_per_batch=machine.shape.tiles_per_batch(by.inputs, by.outputs),
        )  # fmt: skip
        self._held += [by.packed, bias, slopes]

    def correlate(self, x: Tensor, gradient: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out = the gradient of the weights; with `add` it is added to out."""
        tiles_per_batch = min(MAX_TILES, SCRATCH // (4 * PLACES * 2 * CHANNELS))
        channel, _, row, column = out.stride()
        self._step(
            CORRELATE, x=x, residual1=gradient, inputs=x.shape[1], outputs=gradient.shape[1],
            tiles_per_batch=tiles_per_batch, residuals=int(add), address=out.data_ptr(),
            tap_row=row, tap_column=column, tap_channel=channel,
        )  # fmt: skip
        self._held.append(out)

    def gate(self, x: Tensor, gradient: Tensor, out: Tensor, slope: float) -> None:
        """out = gradient, multiplied by the slope where x is negative."""
        rows = x.shape[0] * x.shape[2]
        self._step(GATE, x=x, residual1=gradient, out=out, outputs=x.shape[1], tiles=rows, residual_scale=slope)

    def run(self) -> None:
        if self._steps:
            self._machine.run(np.array(self._steps, np.int64))

    def _transform(self, taps: Tensor, row: int, column: int, channel: int, to: _Filter) -> _Filter:
        values = {
            "kind": TRANSFORM, "weight": taps.data_ptr(), "tap_row": row, "tap_column": column, "tap_channel": channel,
            "inputs": to.inputs, "outputs": to.outputs, "packed": to.packed.data_ptr(),
        }  # fmt: skip
        self._steps.append([values.get(name, 0) for name in FIELDS])
        self._held.append(taps)
        return to

    def _step(
        self,
        kind: int,
        *,
        x: Tensor,
        residual1: Tensor | None = None,
        out: Tensor | None = None,
        address: int = 0,
        residual_scale: float = 1.0,
        **values: int,
    ) -> None:
        images, _, height, width = x.shape
        columns, per_image = tiles_along(width), tiles_along(height) * tiles_along(width)
        values = {
            "kind": kind, "height": height, "width": width, "columns": columns, "per_image": per_image,
            "tiles": images * per_image, "residual_scale": int(np.float32(residual_scale).view(np.uint32)),
            "out": address, **values,
        }  # fmt: skip
        for name, found in (("x", x), ("residual1", residual1), ("out", out)):
            if found is not None:
                image, _, row, pixel = found.stride()
                values |= {name: found.data_ptr(), f"{name}_image": image, f"{name}_row": row, f"{name}_pixel": pixel}
                self._held.append(found)
        self._steps.append([values.get(name, 0) for name in FIELDS])


class _Machine:
    """The kernel, PyTorch's threads, and their scratch memory.

    Threads of its own would compete for the cores with PyTorch's, which spin for a while when they are idle. Raises
    OSError or AttributeError if PyTorch doesn't use OpenMP threads.
    """

    def __init__(self, compute: Kernel) -> None:
        self._compute = compute  # keeps the machine code alive
        self.shape = compute.shape
        library = ctypes.CDLL(_openmp())
        pointer = ctypes.c_void_p
        prototype = ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_uint, ctypes.c_uint)
        self._parallel = prototype(("GOMP_parallel", library))
        self._team = compute.address("team")
        widest = 4 * PLACES * (2 * GAP + compute.shape.tiles * 2 * _MAX_CHANNELS)
        own = 4 * PLACES * (3 * GAP + CHANNELS * CHANNELS)
        self._scratch = torch.empty(usable_cpus(), (max(SCRATCH, widest) + own) // 4 // CHANNELS * CHANNELS)
        self._constants: dict[float, Tensor] = {}
        self._busy = threading.Lock()
        self._given = {
            "scratch": self._scratch.data_ptr(),
            "scratch_bytes": 4 * self._scratch.stride(0),
            "pause": pause_address(),
            "thread_number": ctypes.cast(library.omp_get_thread_num, pointer).value or 0,
            "thread_count": ctypes.cast(library.omp_get_num_threads, pointer).value or 0,
        }

    def constants(self, value: float) -> Tensor:
        """The same value for each channel."""
        if value not in self._constants:
            self._constants[value] = torch.full((_MAX_CHANNELS,), value)
        return self._constants[value]

    def run(self, program: Any) -> None:
        sync = np.zeros(1 + 2 * len(program), np.int64)
        values = {"program": program.ctypes.data, "steps": len(program), "sync": sync.ctypes.data, **self._given}
        team = np.array([values[name] for name in TEAM], np.int64)
        with self._busy:
            self._parallel(self._team, team.ctypes.data, min(len(self._scratch), torch.get_num_threads()), 0)


@functools.lru_cache(maxsize=1)
def _machine() -> _Machine | None:
    compute = kernel(TrainingEmitter)
    try:
        return None if compute is None else _Machine(compute)
    except (OSError, AttributeError):
        return None


def _openmp() -> str:
    """The OpenMP library that PyTorch uses; other packages may have loaded others. Raises OSError."""
    loaded = Path("/proc/self/maps").read_text().split()
    found = {path for path in loaded if re.search(r"/lib(gomp|iomp5|omp)[.-][^/]*$", path)}
    if not found:
        raise OSError("no OpenMP")
    return min(found, key=lambda path: ("/torch/" not in path, path))


def _image_chunks(whole: Tensor) -> Iterator[slice]:
    """Slices of the batch whose maps fit the cache that the cores share."""
    count = max(1, _SHARED_CACHE // (4 * whole[0].numel()))
    for first in range(0, len(whole), count):
        yield slice(first, first + count)


def _empty_packed(weight: Tensor) -> Tensor:
    """Allocate transformed weights."""
    return torch.empty(PLACES * weight.shape[0] * weight.shape[1])


def _kernel_layout(x: Tensor) -> Tensor:
    """`x` in the kernel's layout: fp32, channels-last, aligned to vectors."""
    return _aligned(x.float().contiguous(memory_format=torch.channels_last))


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _empty_map(x: Tensor, channels: int) -> Tensor:
    """Allocate a map of as many images and pixels."""
    images, _, height, width = x.shape
    return torch.empty((images, channels, height, width), memory_format=torch.channels_last)
