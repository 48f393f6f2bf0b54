"""Networks of 3x3 convolutions on a GPU: one Triton kernel for a convolution, its bias, activation and residuals.

Feature maps lie in memory with the channels next to each other and a border of one zero pixel. A dense block is one
such map: its convolutions read the front of it and write slices behind that, so that nothing is ever concatenated. An
enlargement by nearest neighbours is done in reading.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import RRDBNet

# Channels are padded to what tensor cores multiply at once; more than the second number of them don't fit registers.
_GRANULE = 16
_MOST_OUTPUTS = 128
# Pixels and input channels of one step, warps, and steps whose data are under way; the card decides which is fastest.
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
    """A 3x3 convolution as products of matrices: PIXELS of the `count` output pixels, all OUTPUTS channels.

    x: (N, h + 2, w + 2, x_stride), of which the first INPUTS channels count; h, w are height, width, or half of them
    with UPSAMPLE_LOG2 1, which doubles x by nearest neighbours first. weight: (9, INPUTS, OUTPUTS). Then bias, a leaky
    ReLU with a slope for each channel (ACTIVATE), and up to two RESIDUALS: residual1 + residual_scale * result, then
    residual2 + residual_scale * that. The first STORED channels are written to out: (N, height + 2 * BORDER, width +
    2 * BORDER, out_stride); the residuals have a border of 1.
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
    # All nine neighbours of some channels before the next channels: what they share is in the cache then.
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


def _fitting(configs: list[triton.Config], _: Any, **constants: Any) -> list[triton.Config]:
    inputs = constants["INPUTS"]
    if inputs % 32:
        return [triton.Config({"PIXELS": 128, "CHANNELS": _GRANULE}, num_warps=4, num_stages=4)]
    fitting = [config for config in configs if inputs % config.kwargs["CHANNELS"] == 0]
    return fitting[:1] if triton.knobs.runtime.interpret else fitting  # which has nothing to measure


_tuned = triton.autotune(
    _CONFIGS,
    key=["INPUTS", "OUTPUTS", "UPSAMPLE_LOG2", "RESIDUALS"],
    prune_configs_by={"early_config_prune": _fitting},
    restore_value=["out"],
    cache_results=True,
)(convolve)
_starting = threading.Lock()


class _Convolution:
    """One layer as `convolve` wants it. Raises ValueError for one that it can't do."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype, slope: Tensor | None = None) -> None:
        self.outputs, inputs = layer.weight.shape[:2]
        padded = max(_GRANULE, triton.next_power_of_2(self.outputs))
        if padded > _MOST_OUTPUTS or layer.kernel_size != (3, 3) or layer.bias is None:
            raise ValueError(layer)
        missing = padded - self.outputs
        self.inputs = inputs + -inputs % _GRANULE
        weight = F.pad(layer.weight.detach().float(), (0, 0, 0, 0, 0, self.inputs - inputs, 0, missing))
        self.weight = weight.permute(2, 3, 1, 0).reshape(9, self.inputs, padded).to(dtype).contiguous()
        self.bias = F.pad(layer.bias.detach().float(), (0, missing))
        self.slope = None
        if slope is not None:
            self.slope = F.pad(slope.detach().float().to(weight.device).expand(self.outputs), (0, missing))

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        *residuals: Tensor,
        residual_scale: float = 1.0,
        upsample: bool = False,
        border: bool = True,
    ) -> None:
        """From (N, h + 2, w + 2, C) into `out`, with h and w doubled if `upsample`, and a border only if `border`."""
        images, height, width = x.shape[0], (x.shape[1] - 2) << upsample, (x.shape[2] - 2) << upsample
        count = images * height * width
        residual1, residual2 = (*residuals, out, out)[:2]
        # The tuner isn't made for several threads, and what it starts runs on the current device.
        with _starting, torch.cuda.device_of(x):
            _tuned[lambda config: (triton.cdiv(count, config["PIXELS"]),)](
                x,
                self.weight,
                self.bias,
                self.bias if self.slope is None else self.slope,
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
                residual_scale,
                INPUTS=self.inputs,
                OUTPUTS=self.weight.shape[2],
                STORED=self.outputs,
                UPSAMPLE_LOG2=int(upsample),
                BORDER=int(border),
                ACTIVATE=self.slope is not None,
                RESIDUALS=len(residuals),
                enable_fp_fusion=True,
            )


class _Maps:
    """The feature maps of the last size of input, kept: their borders are zero and stay so."""

    def __init__(self) -> None:
        self._of: Any = None
        self._maps: list[Tensor] = []

    def __call__(self, like: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
        """For (N, C, h, w) `like` and each (times, channels): (N, times * h + 2, times * w + 2, channels)."""
        images, _, height, width = like.shape
        of = (images, height, width, like.dtype, like.device, sizes)
        if of != self._of:
            self._of, self._maps = None, []  # freed before the others are made
            self._maps = [
                torch.zeros(images, height * n + 2, width * n + 2, channels, dtype=like.dtype, device=like.device)
                for n, channels in sizes
            ]
            self._of = of
        return self._maps


def _inside(pixels: Tensor) -> Tensor:
    return pixels[:, 1:-1, 1:-1]


class TritonRRDBNet(nn.Module):
    """RRDBNet's forward pass for (N, C, h, w), computed in `dtype` with sums in fp32."""

    def __init__(self, network: RRDBNet, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._unshuffle = dtype, network.unshuffle
        self._growth = len(network.state_dict()["body.0.rdb1.conv1.bias"])
        if network.conv_first.out_channels % _GRANULE or self._growth % _GRANULE:
            raise ValueError("channels that don't fill tensor cores")

        def layer(convolution: nn.Conv2d, *, activate: bool = False) -> _Convolution:
            return _Convolution(convolution, dtype, torch.tensor(0.2) if activate else None)

        self._first, self._last = layer(network.conv_first), layer(network.conv_last)
        self._dense = [
            layer(getattr(block, name), activate=name != "conv5")
            for residual in network.body
            for block in residual.children()
            for name in ("conv1", "conv2", "conv3", "conv4", "conv5")
        ]
        self._body = layer(network.conv_body)
        self._up1, self._up2 = layer(network.conv_up1, activate=True), layer(network.conv_up2, activate=True)
        self._hr = layer(network.conv_hr, activate=True)
        self._maps = _Maps()

    def forward(self, lr: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h*scale, w*scale)."""
        if self._unshuffle > 1:
            lr = F.pixel_unshuffle(lr, self._unshuffle)
        lr = lr.to(self._dtype)
        features, growth = self._first.outputs, self._growth
        inputs, dense = self._first.inputs, features + 4 * growth
        head, first, half, full, hr, *blocks = self._maps(
            lr, (1, inputs), (1, features), (2, features), (4, features), (4, features), *[(1, dense)] * 3
        )
        _inside(head)[..., : lr.shape[1]] = lr.permute(0, 2, 3, 1)
        self._first(head, first)
        blocks[0][..., :features] = first
        for index in range(0, len(self._dense), 5):
            # Three blocks in turn; the third adds the input of the first, and takes its place.
            place = index // 5 % 3
            block, after = blocks[place], blocks[(place + 1) % 3]
            for number in range(4):
                self._dense[index + number](block, block[..., features + number * growth :])
            residuals = (block, after) if place == 2 else (block,)
            self._dense[index + 4](block, after, *residuals, residual_scale=0.2)
        self._body(blocks[0], blocks[1], first)
        self._up1(blocks[1], half, upsample=True)
        self._up2(half, full, upsample=True)
        self._hr(full, hr)
        sr = torch.empty(*_inside(hr).shape[:3], self._last.outputs, dtype=self._dtype, device=lr.device)
        self._last(hr, sr, border=False)
        return sr.permute(0, 3, 1, 2)


class TritonCompact(nn.Module):
    """SRVGGNetCompact's forward pass for (N, C, h, w), computed in `dtype` with sums in fp32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        layers: Any = list(network.body)  # type: ignore[arg-type]
        slopes = [activation.weight for activation in layers[1::2]]
        self._layers = [
            _Convolution(layer, dtype, slope) for layer, slope in zip(layers[::2], [*slopes, None], strict=True)
        ]
        self._dtype, self._scale = dtype, int(network.upscale)  # type: ignore[arg-type]
        self._maps = _Maps()

    def forward(self, lr: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h*scale, w*scale)."""
        lr = lr.to(self._dtype)
        first, *_, last = self._layers
        head, *maps = self._maps(lr, (1, first.inputs), *[(1, last.inputs)] * 2)
        _inside(head)[..., : lr.shape[1]] = lr.permute(0, 2, 3, 1)
        x = head
        for number, layer in enumerate(self._layers[:-1]):
            layer(x, maps[number % 2])
            x = maps[number % 2]
        found = torch.empty(*_inside(x).shape[:3], last.outputs, dtype=self._dtype, device=lr.device)
        last(x, found, border=False)
        sr = F.pixel_shuffle(found.permute(0, 3, 1, 2), self._scale)
        return sr + F.interpolate(lr, scale_factor=self._scale, mode="nearest")


def triton_model(model: SRModel, dtype: torch.dtype) -> SRModel | None:
    """`model` with its network computed by `convolve`, on the same device; None for another kind of network."""
    network = model.module
    try:
        if isinstance(network, RRDBNet):
            made: nn.Module = TritonRRDBNet(network, dtype)
        elif model.architecture == "RealESRGAN Compact":
            made = TritonCompact(network, dtype)
        else:
            return None
    except ValueError:  # layers of another kind or number of channels
        return None
    return replace(model, module=made)
