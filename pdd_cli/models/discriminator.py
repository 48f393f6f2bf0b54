"""The U-Net discriminator of Real-ESRGAN, under the key names of its published weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm


class UNetDiscriminator(nn.Module):
    """Per-pixel realness: (N, 3, H, W) in 0..1, H and W multiples of 8, to logits (N, 1, H, W).

    Spectral normalisation, skip connections. Source: Wang et al., Real-ESRGAN (2021), section 3.3.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        f = features

        def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
            return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False))

        self.conv0 = nn.Conv2d(3, f, 3, padding=1)
        self.conv1 = conv(f, 2 * f, 4, 2)
        self.conv2 = conv(2 * f, 4 * f, 4, 2)
        self.conv3 = conv(4 * f, 8 * f, 4, 2)
        self.conv4 = conv(8 * f, 4 * f)
        self.conv5 = conv(4 * f, 2 * f)
        self.conv6 = conv(2 * f, f)
        self.conv7 = conv(f, f)
        self.conv8 = conv(f, f)
        self.conv9 = nn.Conv2d(f, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x0 = _activate(self.conv0(image))
        x1 = _activate(self.conv1(x0))
        x2 = _activate(self.conv2(x1))
        x3 = _activate(self.conv3(x2))
        x = _activate(self.conv4(_double(x3))) + x2
        x = _activate(self.conv5(_double(x))) + x1
        x = _activate(self.conv6(_double(x))) + x0
        x = _activate(self.conv8(_activate(self.conv7(x))))
        return self.conv9(x)  # type: ignore[no-any-return]


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
