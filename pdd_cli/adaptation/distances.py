"""The two distances that the method compares (paper, section 3)."""

from __future__ import annotations

from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """Gram matrices F Fᵀ / (C·H·W): (N, C, H, W) to (N, C, C), in fp32."""
    n, c, h, w = features.shape
    flat = features.float().reshape(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


def inter_model_distance(specialist: Tensor, generalist: Tensor) -> Tensor:
    """How the two models differ on one domain: the Gram matrix of their features' difference.

    Features of both predictions for the same inputs, (N, C, H, W) each; result (N, C, C). Not the difference of two
    Gram matrices.
    """
    return gram(specialist.float() - generalist.float())


def intra_model_distance(target: Tensor, synthetic: Tensor) -> Tensor:
    """How one model's predictions differ between the domains: |φ(target) − φ(synthetic)|, elementwise.

    Features of one model's predictions, element i of the one batch paired with element i of the other,
    (N, C, H, W) each; result of that shape.
    """
    return (target.float() - synthetic.float()).abs()
