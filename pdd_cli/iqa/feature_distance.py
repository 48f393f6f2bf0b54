"""How far an SR image is from its ground truth in a perceptual feature space; the lower, the more alike.

The distance of Zhang et al. (LPIPS, CVPR 2018) without learnt weights: features of the last convolution of each of the
five stages after the ReLU, scaled to unit length at each pixel over the channels; mean square difference summed over
channels, averaged over pixels and stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pdd_cli.models.features import FeatureNetwork

LAYERS = ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")  # VGG-16: its stages' last, conv3_3 and so on


def unit_features(network: FeatureNetwork, image: Tensor) -> list[Tensor]:
    """Features of `image` (N, 3, H, W) in 0..1, each (N, C, h, w) of unit length over C."""
    return at_unit_length(network(image, LAYERS))


def at_unit_length(features: Mapping[str, Tensor], shortest: float = 1e-10) -> list[Tensor]:
    """Those of `LAYERS`, from before to after the ReLU, of unit length over the channels.

    What is below `shortest` stays shorter than that, and its gradient bounded.
    """
    return [F.normalize(torch.relu(features[layer].float()), dim=1, eps=shortest) for layer in LAYERS]


def feature_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The distance of two images by their features at unit length."""
    return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)]).mean()
