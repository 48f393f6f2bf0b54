"""Discriminators of real HR and SR: Real-ESRGAN's U-Net, or small heads on frozen perceptual features."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from pdd_cli.models.rrdbnet import ActivatedConv2d


class UNetDiscriminator(nn.Module):
    """Per-pixel realness: (N, 3, H, W) in 0..1, H and W multiples of 8, to logits (N, 1, H, W).

    It has spectral normalisation, skip connections and the key names of the published weights. Source: Wang et al.,
    Real-ESRGAN (2021), section 3.3.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        f = features

        def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
            return spectral_norm(ActivatedConv2d(inputs, outputs, kernel, stride, padding=1, bias=False))

        self.conv0 = ActivatedConv2d(3, f, 3, padding=1)
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
        x0 = self.conv0(image)
        x1 = self.conv1(x0)
        x2 = self.conv2(x1)
        x = self.conv4(_double(self.conv3(x2))) + x2
        x = self.conv5(_double(x)) + x1
        x = self.conv6(_double(x)) + x0
        return self.conv9(self.conv8(self.conv7(x)))  # type: ignore[no-any-return]


class FeatureDiscriminator(nn.Module):
    """Realness of frozen perceptual features: {layer: (N, C, h, w)} to logits (N, 1, h, w) for each layer of `rms`.

    It uses features that training computes anyway and that represent edges and textures from the start, so it learns in
    tens of steps what a separate network learns in thousands. Source of the idea: Sauer et al., Projected GANs Converge
    Faster (2021). `rms`: for each layer the root mean square of each channel on real HR, (C); features are divided by
    it.
    """

    def __init__(self, rms: Mapping[str, Tensor], width: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for layer, values in rms.items():
            self.heads[layer] = nn.Sequential(
                spectral_norm(nn.Conv2d(len(values), width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 3, padding=1)),
            )
            self.register_buffer(f"rms_{layer}", values.clone().view(1, -1, 1, 1))

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        return [head(features[layer] / self.get_buffer(f"rms_{layer}")) for layer, head in self.heads.items()]


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
