"""Networks of 3x3 convolutions on a GPU: one Triton kernel for a convolution, its bias, activation and residuals.

Feature maps are channels-last with a border of one zero pixel. The maps of a dense block share one tensor: each
convolution reads its first channels and writes the following ones, so nothing is concatenated. Nearest-neighbour
upsampling is part of reading.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from pdd_cli.models.loading import SRModel
from pdd_cli.weights.wiring import Convolution, Wiring, wiring_of

# Channels are padded to multiples of what tensor cores multiply at once; more outputs don't fit the registers.
_GRANULE = 16
_MAX_OUTPUTS = 128
# Pixels and input channels of a step, warps, and pipeline stages; the autotuner picks the fastest on the card.
_CONFIGS = [
    triton.Config({"PIXELS": pixels, "CHANNELS": channels}, num_warps=warps, num_stages=stages)
    for pixels, channels, warps, stages in ((128, 32, 4, 4), (128, 64, 4, 3), (256, 32, 8, 3), (64, 32, 4, 4))
]


@triton.jit(do_not_specialize=["count", "height", "width"])  # type: ignore[untyped-decorator]
def convolve(  # type: ignore[no-untyped-def]  # annotations would be Triton's
    x,
    weight,
    bias,
    slope,
    residual1,
    residual2,
    out,
    count,
    height,
    width,
    x_stride,
    residual1_stride,
    residual2_stride,
    out_stride,
    residual_scale,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STORED: tl.constexpr,
    UPSAMPLE_LOG2: tl.constexpr,
    BORDER: tl.constexpr,
    ACTIVATE: tl.constexpr,
    RESIDUALS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A 3x3 convolution as matrix products: each program computes PIXELS of the `count` output pixels, all channels.

    x: (N, h + 2, w + 2, x_stride), of which the first INPUTS channels are read. h, w are height, width, or half of them
    with UPSAMPLE_LOG2 1, which first doubles x by nearest neighbours. weight: (9, INPUTS, OUTPUTS). Then bias, a leaky
    ReLU with a slope per channel (ACTIVATE), and up to two RESIDUALS: residual1 + residual_scale * result, then
    residual2 + residual_scale * that. The first STORED channels are written to out: (N, height + 2 * BORDER, width +
    2 * BORDER, out_stride). The residuals have a border of 1.
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = pixel < count
    pixel = tl.minimum(pixel, count - 1)
    column = pixel % width
    row = pixel // width % height
    image = pixel // width // height
    channel = tl.arange(0, CHANNELS)
    output = tl.arange(0, OUTPUTS)

    total = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    # All nine taps of some channels before the next channels, because they read the same cache lines.
    for step in range(0, INPUTS // CHANNELS * 9):
        tap = step % 9
        first = step // 9 * CHANNELS
        y = (row + tap // 3 + UPSAMPLE_LOG2) >> UPSAMPLE_LOG2
        z = (column + tap % 3 + UPSAMPLE_LOG2) >> UPSAMPLE_LOG2
        place = (image * ((height >> UPSAMPLE_LOG2) + 2) + y) * ((width >> UPSAMPLE_LOG2) + 2) + z
        values = tl.load(
            x + (place.to(tl.int64) * x_stride)[:, None] + (first + channel)[None, :], cache_modifier=".ca"
        )
        filters = tl.load(weight + (tap * INPUTS + first + channel)[:, None] * OUTPUTS + output[None, :])
        total = tl.dot(values, filters, total, input_precision="ieee")

    total += tl.load(bias + output)[None, :]
    if ACTIVATE:
        total = tl.where(total < 0, total * tl.load(slope + output)[None, :], total)
    stored = there[:, None] & (output < STORED)[None, :]
    centre = ((image * (height + 2) + row + 1) * (width + 2) + column + 1).to(tl.int64)
    if RESIDUALS > 0:
        total = total * residual_scale + tl.load(
            residual1 + (centre * residual1_stride)[:, None] + output[None, :], mask=stored, other=0
        )
    if RESIDUALS > 1:
        total = total * residual_scale + tl.load(
            residual2 + (centre * residual2_stride)[:, None] + output[None, :], mask=stored, other=0
        )
    target = ((image * (height + 2 * BORDER) + row + BORDER) * (width + 2 * BORDER) + column + BORDER).to(tl.int64)
    tl.store(out + (target * out_stride)[:, None] + output[None, :], total.to(out.dtype.element_ty), mask=stored)


def _prune_configs(configs: list[triton.Config], _: Any, **constants: Any) -> list[triton.Config]:
    inputs = constants["INPUTS"]
    if inputs % 32:
        return [triton.Config({"PIXELS": 128, "CHANNELS": _GRANULE}, num_warps=4, num_stages=4)]
    fitting = [config for config in configs if inputs % config.kwargs["CHANNELS"] == 0]
    return fitting[:1] if triton.knobs.runtime.interpret else fitting  # the interpreter isn't tuned


_tuned = triton.autotune(
    _CONFIGS,
    key=["INPUTS", "OUTPUTS", "UPSAMPLE_LOG2", "RESIDUALS"],
    prune_configs_by={"early_config_prune": _prune_configs},
    restore_value=["out"],
    cache_results=True,
)(convolve)
_launch_lock = threading.Lock()


class _Layer:
    """A convolution with its tensors in the layout of `convolve`. Raises ValueError if `convolve` can't compute it."""

    def __init__(self, convolution: Convolution, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._convolution = convolution
        outputs, inputs = convolution.outputs, _whole_granules(convolution.inputs)
        padded = max(_GRANULE, triton.next_power_of_2(outputs))
        if padded > _MAX_OUTPUTS or convolution.offset % _GRANULE:
            raise ValueError(convolution)
        missing = padded - outputs
        weight = state[f"{convolution.key}.weight"].detach().float()
        weight = F.pad(weight, (0, 0, 0, 0, 0, inputs - convolution.inputs, 0, missing))
        self._weight = weight.permute(2, 3, 1, 0).reshape(9, inputs, padded).to(dtype).contiguous()
        self._bias = F.pad(state[f"{convolution.key}.bias"].detach().float(), (0, missing))
        slope_or_key = convolution.slope
        if isinstance(slope_or_key, str):
            slope = state[slope_or_key].detach().float()
        else:
            slope = torch.full((outputs,), slope_or_key)
        self._slope = F.pad(slope, (0, missing)).to(weight.device)

    def __call__(self, maps: Mapping[str, Tensor]) -> None:
        """Read and write the maps (N, h + 2, w + 2, C) that the convolution names; its output may have no border."""
        layer = self._convolution
        x, out = maps[layer.x], maps[layer.out][..., layer.written]
        images, height, width = x.shape[0], (x.shape[1] - 2) << layer.upsample, (x.shape[2] - 2) << layer.upsample
        count = images * height * width
        residual1, residual2 = (*(maps[name] for name in layer.residuals), out, out)[:2]
        # The autotuner isn't thread-safe, and kernels run on the current device.
        with _launch_lock, torch.cuda.device_of(x):
            _tuned[lambda config: (triton.cdiv(count, config["PIXELS"]),)](
                x,
                self._weight,
                self._bias,
                self._slope,
                residual1,
                residual2,
                out,
                count,
                height,
                width,
                x.stride(2),
                residual1.stride(2),
                residual2.stride(2),
                out.stride(2),
                layer.residual_scale,
                INPUTS=self._weight.shape[1],
                OUTPUTS=self._weight.shape[2],
                STORED=layer.outputs,
                UPSAMPLE_LOG2=int(layer.upsample),
                BORDER=int(out.shape[1] > height),
                ACTIVATE=layer.slope != 1,
                RESIDUALS=len(layer.residuals),
                enable_fp_fusion=True,
            )


class TritonNetwork(nn.Module):
    """The forward pass of a network for (N, C, h, w), computed in `dtype` with sums in fp32.

    `state`: the tensors that `wiring` names. Raises ValueError for layers that `convolve` can't compute.
    """

    def __init__(self, wiring: Wiring, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._wiring, self._dtype = wiring, dtype
        self._layers = [_Layer(convolution, state, dtype) for convolution in wiring.layers]
        # Feature maps for the last input size, kept because their borders stay zero.
        self._maps: dict[str, Tensor] = {}
        self._size: Any = None

    def forward(self, lr: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h*scale, w*scale)."""
        wiring = self._wiring
        lr = F.pixel_unshuffle(lr, wiring.pixel_unshuffle).to(self._dtype)
        images, channels, height, width = lr.shape
        if (lr.shape, lr.device) != self._size:
            self._maps, self._size = {}, None  # freed before new ones are allocated
            self._maps = {
                name: lr.new_zeros(images, height * m.scale + 2, width * m.scale + 2, _whole_granules(m.channels))
                for name, m in wiring.maps.items()
                if name != "output"
            }
            self._size = (lr.shape, lr.device)
        self._maps["input"][:, 1:-1, 1:-1, :channels] = lr.permute(0, 2, 3, 1)
        last = wiring.maps["output"]
        output = lr.new_empty(images, height * last.scale, width * last.scale, last.channels)
        maps = {**self._maps, "output": output}
        for layer in self._layers:
            layer(maps)
        sr = F.pixel_shuffle(output.permute(0, 3, 1, 2), wiring.pixel_shuffle)
        return sr + F.interpolate(lr, scale_factor=wiring.pixel_shuffle) if wiring.global_residual else sr


def _whole_granules(channels: int) -> int:
    return channels + -channels % _GRANULE


def triton_model(model: SRModel, dtype: torch.dtype) -> SRModel | None:
    """`model` with its network computed by `convolve`, on the same device; None if `convolve` can't compute it."""
    state = model.module.state_dict()
    wiring = wiring_of(state)
    if wiring is None:
        return None
    try:
        return replace(model, module=TritonNetwork(wiring, state, dtype))
    except ValueError:  # unsupported numbers of channels
        return None
