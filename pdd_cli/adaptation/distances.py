"""The two pairwise distances of the method (paper, section 3)."""

from __future__ import annotations

from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """Gram matrices F Fᵀ / (C·H·W): (N, C, H, W) to (N, C, C), in fp32."""
    n, c, h, w = features.shape
    flat = features.float().reshape(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


def inter_model_distance(specialist: Tensor, generalist: Tensor) -> Tensor:
    """The distance between the two models on one domain: the Gram matrix of the difference of their features.

    The arguments are features of both predictions for the same inputs, (N, C, H, W) each; the result is (N, C, C). It
    is not the difference of two Gram matrices.
    """
    return gram(specialist.float() - generalist.float())


def intra_model_distance(target: Tensor, synthetic: Tensor) -> Tensor:
    """The distance of one model's predictions between the domains: |φ(target) − φ(synthetic)|, elementwise.

    The arguments are features of one model's predictions, (N, C, H, W) each. Element i of one batch is paired with
    element i of the other. The result has the same shape.
    """
    return (target.float() - synthetic.float()).abs()
