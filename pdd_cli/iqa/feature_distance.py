"""How far an SR image is from its ground truth in a perceptual feature space; the lower, the more alike.

The distance of Zhang et al. (LPIPS, CVPR 2018) without learnt weights: features of the last convolution of each of the
five stages after the ReLU, scaled to unit length at each pixel over the channels; mean square difference summed over
channels, averaged over pixels and stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_cli.models.features import FeatureNetwork

LAYERS = ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")  # VGG-16: its stages' last, conv3_3 and so on


def unit_features(network: FeatureNetwork, image: Tensor) -> list[Tensor]:
    """Features of `image` (N, 3, H, W) in 0..1, each (N, C, h, w) of unit length over C."""
    features = network(image, LAYERS)
    return [torch.nn.functional.normalize(torch.relu(features[layer].float()), dim=1, eps=1e-10) for layer in LAYERS]


def feature_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The distance of two images by their `unit_features`."""
    return float(torch.stack([(a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)]).mean())
