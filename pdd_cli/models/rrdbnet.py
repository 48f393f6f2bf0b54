"""RRDBNet, the generator of ESRGAN, Real-ESRGAN and BSRGAN. All published key layouts can be loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdd_cli.weights.wiring import LEAKY_SLOPE, RESIDUAL_SCALE, rrdbnet_size


class ActivatedConv2d(nn.Conv2d):
    """A convolution and the LeakyReLU after it, with a slope of 0.2."""

    def forward(self, x: Tensor) -> Tensor:
        # In place: the convolution's backward pass doesn't need its output, and LeakyReLU's needs only the sign.
        return F.leaky_relu(super().forward(x), LEAKY_SLOPE, inplace=True)


class ResidualDenseBlock(nn.Module):
    """Five densely connected 3x3 convolutions; (N, features, h, w) to the same shape."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = ActivatedConv2d(features, growth, 3, padding=1)
        self.conv2 = ActivatedConv2d(features + growth, growth, 3, padding=1)
        self.conv3 = ActivatedConv2d(features + 2 * growth, growth, 3, padding=1)
        self.conv4 = ActivatedConv2d(features + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            parts.append(conv(torch.cat(parts, 1)))
        return torch.add(x, self.conv5(torch.cat(parts, 1)), alpha=RESIDUAL_SCALE)


class ResidualInResidualDenseBlock(nn.Module):
    """Three residual dense blocks with a skip connection scaled by 0.2."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(features, growth)
        self.rdb2 = ResidualDenseBlock(features, growth)
        self.rdb3 = ResidualDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=RESIDUAL_SCALE)


class RRDBNet(nn.Module):
    """x4 generator; with `unshuffle` 2 or 4 its input is pixel-unshuffled first, which makes it x2 or x1.

    Input (N, in_channels, h, w) in 0..1, h and w multiples of `unshuffle`; output (N, out_channels, h*scale, w*scale),
    nominally 0..1, not clipped. Source: Wang et al., ESRGAN (2018), Real-ESRGAN (2021).
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        features: int = 64,
        growth: int = 32,
        blocks: int = 23,
        unshuffle: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.unshuffle = in_channels, out_channels, unshuffle
        self.scale = 4 // unshuffle
        self.conv_first = nn.Conv2d(in_channels * unshuffle**2, features, 3, padding=1)
        self.body = nn.Sequential(*(ResidualInResidualDenseBlock(features, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        self.conv_up1 = ActivatedConv2d(features, features, 3, padding=1)
        self.conv_up2 = ActivatedConv2d(features, features, 3, padding=1)
        self.conv_hr = ActivatedConv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.unshuffle > 1:
            x = F.pixel_unshuffle(x, self.unshuffle)
        first = self.conv_first(x)
        x = first + self.conv_body(self.body(first))
        x = self.conv_up1(F.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.conv_up2(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_last(self.conv_hr(x))  # type: ignore[no-any-return]


# The keys of ESRGAN and BSRGAN, and the corresponding keys of Real-ESRGAN, which this module uses.
_RENAMES = (
    (r"model\.0\.", "conv_first."),
    (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"model\.1\.sub\.\d+\.(weight|bias)", r"conv_body.\1"),
    (r"model\.3\.", "conv_up1."),
    (r"model\.6\.", "conv_up2."),
    (r"model\.8\.", "conv_hr."),
    (r"model\.10\.", "conv_last."),
    (r"RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"trunk_conv\.", "conv_body."),
    (r"upconv(\d)\.", r"conv_up\1."),
    (r"HRconv\.", "conv_hr."),
)


def standard_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the keys of ESRGAN and BSRGAN renamed to those of this module; other keys are kept."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in _RENAMES:
            if re.match(pattern, key):
                key = re.sub(f"^{pattern}", replacement, key)
                break
        renamed[key] = tensor
    return renamed


def rrdbnet_from_state(state: Mapping[str, Tensor]) -> RRDBNet | None:
    """The RRDBNet with the weights `state`, in any key layout; None if they belong to another network."""
    state = standard_keys(state)
    size = rrdbnet_size(state)
    if size is None:
        return None
    # The meta device skips the initialisation: the weights are assigned below.
    with torch.device("meta"):
        network = RRDBNet(**asdict(size))
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    if expected != {key: tensor.shape for key, tensor in state.items()}:
        return None
    network.load_state_dict({key: tensor.float().clone() for key, tensor in state.items()}, assign=True)
    return network.requires_grad_(True)
