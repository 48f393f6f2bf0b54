"""The terms of the objective: distillation losses and supervised losses. All are computed in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pdd_cli.adaptation.distances import inter_model_distance, intra_model_distance
from pdd_cli.iqa.feature_distance import at_unit_length, feature_distance
from pdd_cli.ranks import SINGLE_PROCESS, Ranks

Features = Mapping[str, Tensor]  # layer -> (N, C, H, W), before the ReLU

# Layer weights (paper, section 4.1) by VGG-19 layer; models/features.py maps the layers to those of other networks.
INTER_LAYERS = {"conv2_1": 0.25, "conv3_1": 0.25, "conv4_1": 0.25, "conv5_1": 0.25}
INTRA_LAYERS = {"conv2_2": 0.1, "conv3_4": 0.3, "conv4_4": 1.0, "conv5_4": 1.0}
PERCEPTUAL_LAYERS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
# The layers that the feature discriminator uses: from fine texture to parts of objects.
DISCRIMINATOR_LAYERS = ("conv2_2", "conv3_4", "conv4_4")
ALL_LAYERS = tuple(sorted({*INTER_LAYERS, *INTRA_LAYERS, *PERCEPTUAL_LAYERS}))
STUDENT_LAYERS = tuple(sorted({*PERCEPTUAL_LAYERS, *DISCRIMINATOR_LAYERS}))

_LOG_EPSILON = 1e-6


def inter_loss(
    S_s: Features, S_t: Features, G_s: Features, G_t: Features, ranks: Ranks = SINGLE_PROCESS, group: int | None = None
) -> Tensor:
    """Σ_l a_l ‖A_t − A_s‖_F, where A is the inter-model distance in each domain.

    The norm is taken over the whole batch tensor, of which each process of `ranks` holds a part; or over each `group`
    of elements, with the mean over the groups (the paper's code: 8, the crops of one GPU). The gradient is undefined if
    S equals G exactly (then A is zero in both domains).
    """
    norms = []
    for layer in INTER_LAYERS:
        A_t = inter_model_distance(S_t[layer], G_t[layer])
        A_s = inter_model_distance(S_s[layer], G_s[layer])
        parts = (A_t - A_s).flatten().unflatten(0, (len(A_t) // group if group else 1, -1))
        norms.append(torch.linalg.vector_norm(parts, dim=1).mean())
    total = torch.zeros((), device=norms[0].device)
    over_batch = torch.stack(norms) if group else ranks.norm(torch.stack(norms))
    for weight, norm in zip(INTER_LAYERS.values(), over_batch, strict=True):
        total = total + weight * norm
    return total


def intra_loss(S_s: Features, S_t: Features, G_s: Features, G_t: Features) -> Tensor:
    """Σ_l b_l CE(B_S, B_G): cross-entropy between channel softmaxes of the intra-model distances, mean over pixels."""
    total = torch.zeros((), device=S_s["conv2_2"].device)
    for layer, weight in INTRA_LAYERS.items():
        prediction = intra_model_distance(S_t[layer], S_s[layer]).softmax(1)
        target = intra_model_distance(G_t[layer], G_s[layer]).softmax(1)
        total = total - weight * (target * torch.log(prediction + _LOG_EPSILON)).sum(1).mean()
    return total


def haar(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of the orthonormal Haar wavelet: (N, C, H, W) with even H, W to LL, LH, HL, HH of (N, C, H/2, W/2)."""
    a, b = image[..., 0::2, 0::2], image[..., 0::2, 1::2]
    c, d = image[..., 1::2, 0::2], image[..., 1::2, 1::2]
    return (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2


def pixel_loss(S_s: Tensor, hr_s: Tensor) -> Tensor:
    """L1(LL) + 0.1 L1(LH and HL, concatenated) + 0.01 L1(HH) of the Haar wavelet; images (N, C, H, W) in 0..1."""
    ll, lh, hl, hh = haar(S_s.float() - hr_s.float())
    return ll.abs().mean() + 0.1 * torch.cat((lh, hl), 1).abs().mean() + 0.01 * hh.abs().mean()


def perceptual_loss(S_s: Features, hr_s: Features) -> Tensor:
    """Σ_l c_l L1(φ_l(S_s), φ_l(hr_s))."""
    total = torch.zeros((), device=S_s["conv1_2"].device)
    for layer, weight in PERCEPTUAL_LAYERS.items():
        total = total + weight * F.l1_loss(S_s[layer].float(), hr_s[layer].float())
    return total


def feature_distance_loss(S_s: Features, hr_s: Features) -> Tensor:
    """`iqa.feature_distance` (LPIPS without learned weights), which compares features normalized to unit length."""
    return feature_distance(at_unit_length(S_s, 1e-6), at_unit_length(hr_s, 1e-6))


def consistency_loss(S_t: Tensor, lr_t: Tensor, scale: int) -> Tensor:
    """L1 between the low frequencies of S_t, downscaled to LR size, and those of its LR input.

    Shapes: S_t (N, C, h*scale, w*scale), lr_t (N, C, h, w). Both are blurred over 5 LR pixels, so that the model
    doesn't have to reproduce the noise and compression blocks of the LR.
    """
    difference = F.avg_pool2d(S_t.float(), scale) - lr_t.float()
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=difference.device) / 16
    kernel = torch.outer(weights, weights).expand(difference.shape[1], 1, 5, 5)
    return F.conv2d(difference, kernel, groups=difference.shape[1]).abs().mean()


def lattice_loss(sr: Tensor, target: Tensor, scale: int) -> Tensor:
    """The part of the error that repeats with every LR pixel, as networks that end in a pixel shuffle leave it.

    The error of each of the scale² pixels of an LR pixel is averaged over neighbourhoods of 8x8 LR pixels, and the mean
    over the scale² pixels is subtracted: errors of texture and of colour cancel out, a pattern of dots doesn't. L1 of
    what is left. Shapes: (N, C, h*scale, w*scale).
    """
    phases = F.pixel_unshuffle(sr.float() - target.float(), scale)
    means = F.avg_pool2d(phases, min(8, *phases.shape[-2:])).unflatten(1, (-1, scale**2))
    pattern: Tensor = means - means.mean(2, keepdim=True)
    return pattern.abs().mean()


def self_ensemble_loss(S_t: Tensor, base_t: Tensor) -> Tensor:
    """Mean square of the difference between two SR images in LL, LH and HL of the Haar wavelet, summed over the bands.

    `base_t` is the base's SR of a flipped or transposed copy of the LR. Over many steps the loss leads to the mean over
    all eight copies (Timofte et al., Seven ways to improve SR, 2016), which has less error than each of them. HH, where
    the mean is too smooth, is left to the adversarial loss. Not in the paper.
    """
    ll, lh, hl, _ = haar(S_t.float() - base_t.float())
    return ll.square().mean() + lh.square().mean() + hl.square().mean()


def flip_or_transpose(images: Tensor, number: int) -> Tensor:
    """One of the eight flips and transposes (0 to 7) of square images (N, C, H, W)."""
    images = images.transpose(-1, -2) if number & 4 else images
    return images.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit])


def undo_flip_or_transpose(images: Tensor, number: int) -> Tensor:
    """The inverse of `flip_or_transpose`."""
    images = images.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit])
    return images.transpose(-1, -2) if number & 4 else images


def adversarial_loss(logits: Sequence[Tensor], *, real: bool) -> Tensor:
    """Vanilla GAN loss: binary cross-entropy with logits against "all real" or "all fake".

    `logits`: (N, 1, h, w) for each scale or layer of the discriminator. Mean over pixels, then over scales or layers.
    """
    losses = [F.softplus((-one if real else one).float()).mean() for one in logits]
    return torch.stack(losses).mean()
