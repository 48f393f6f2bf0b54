"""The distance of an SR image to its ground truth in a perceptual feature space; lower is better.

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

LAYERS = ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")  # VGG-16 has conv3_3 and so on in their place


def unit_features(network: FeatureNetwork, image: Tensor) -> list[Tensor]:
    """Features of `image` (N, 3, H, W) in 0..1, each (N, C, h, w) of unit length over C."""
    return at_unit_length(network(image, LAYERS))


def at_unit_length(features: Mapping[str, Tensor], shortest: float = 1e-10) -> list[Tensor]:
    """Apply the ReLU to the features of `LAYERS`, and scale them to unit length over the channels.

    Vectors shorter than `shortest` are divided by `shortest`, so that the gradient is bounded.
    """
    return [F.normalize(torch.relu(features[layer].float()), dim=1, eps=shortest) for layer in LAYERS]


def feature_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The distance of two images, from their features at unit length."""
    return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)]).mean()
