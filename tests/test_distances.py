"""The method's definitions, computed once more in plain NumPy (float64)."""

import numpy as np
import pytest
import torch

from pdd_cli.adaptation.distances import inter_model_distance, intra_model_distance
from pdd_cli.adaptation.losses import (
    ALL_LAYERS,
    INTER_LAYERS,
    INTRA_LAYERS,
    PERCEPTUAL_LAYERS,
    adversarial_loss,
    consistency_loss,
    feature_distance_loss,
    haar,
    inter_loss,
    intra_loss,
    perceptual_loss,
    pixel_loss,
)

SHAPES = {layer: (2, 4 + 3 * index, 6, 5) for index, layer in enumerate(ALL_LAYERS)}


def features(seed):
    rng = np.random.default_rng(seed)
    return {layer: rng.normal(size=shape).astype(np.float32) for layer, shape in SHAPES.items()}


def tensors(arrays):
    return {layer: torch.from_numpy(array) for layer, array in arrays.items()}


@pytest.fixture
def four():
    return [features(seed) for seed in range(4)]  # S_s, S_t, G_s, G_t


def gram(f):
    n, c, h, w = f.shape
    result = np.zeros((n, c, c))
    for k in range(n):
        for i in range(c):
            for j in range(c):
                result[k, i, j] = (f[k, i].astype(np.float64) * f[k, j]).sum() / (c * h * w)
    return result


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_inter_model_distance(four):
    S, G = four[0]["conv2_1"], four[2]["conv2_1"]
    ours = inter_model_distance(torch.from_numpy(S), torch.from_numpy(G)).numpy()
    np.testing.assert_allclose(ours, gram(S - G), atol=1e-6)
    # The Gram matrix of the difference is not the difference of the Gram matrices.
    assert np.abs(ours - (gram(S) - gram(G))).max() > 1e-2


def test_intra_model_distance(four):
    s, t = four[0]["conv2_2"], four[1]["conv2_2"]
    ours = intra_model_distance(torch.from_numpy(t), torch.from_numpy(s)).numpy()
    np.testing.assert_allclose(ours, np.abs(t - s), atol=1e-6)


def test_inter_loss(four):
    S_s, S_t, G_s, G_t = four
    expected = 0.0
    for layer in ("conv2_1", "conv3_1", "conv4_1", "conv5_1"):
        difference = gram(S_t[layer] - G_t[layer]) - gram(S_s[layer] - G_s[layer])
        expected += 0.25 * np.sqrt((difference**2).sum())
    assert float(inter_loss(*map(tensors, four))) == pytest.approx(expected, rel=1e-4)
    assert set(INTER_LAYERS.values()) == {0.25}


def test_inter_loss_of_groups_is_the_mean_of_their_norms(four):
    """As two GPUs compute it, each for its part of the batch."""
    S_s, S_t, G_s, G_t = four
    expected = 0.0
    for element in range(2):
        for layer in INTER_LAYERS:
            one = slice(element, element + 1)
            difference = gram(S_t[layer][one] - G_t[layer][one]) - gram(S_s[layer][one] - G_s[layer][one])
            expected += 0.25 * np.sqrt((difference**2).sum()) / 2
    assert float(inter_loss(*map(tensors, four), group=1)) == pytest.approx(expected, rel=1e-4)
    assert float(inter_loss(*map(tensors, four), group=2)) == pytest.approx(float(inter_loss(*map(tensors, four))))


def test_intra_loss(four):
    S_s, S_t, G_s, G_t = four
    expected = 0.0
    for layer, weight in (("conv2_2", 0.1), ("conv3_4", 0.3), ("conv4_4", 1.0), ("conv5_4", 1.0)):
        prediction = softmax(np.abs(S_t[layer] - S_s[layer]).astype(np.float64))
        target = softmax(np.abs(G_t[layer] - G_s[layer]).astype(np.float64))
        expected += weight * -(target * np.log(prediction + 1e-6)).sum(axis=1).mean()
    assert float(intra_loss(*map(tensors, four))) == pytest.approx(expected, rel=1e-4)
    assert set(INTRA_LAYERS) == {"conv2_2", "conv3_4", "conv4_4", "conv5_4"}


def test_perceptual_loss(four):
    a, b = four[0], four[1]
    weights = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
    expected = sum(weight * np.abs(a[layer] - b[layer]).mean() for layer, weight in weights.items())
    assert float(perceptual_loss(tensors(a), tensors(b))) == pytest.approx(expected, rel=1e-4)
    assert weights == PERCEPTUAL_LAYERS


def test_feature_distance_loss(four):
    a, b = four[0], four[1]
    expected = 0.0
    for layer in ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4"):
        x, y = (np.maximum(features[layer], 0).astype(np.float64) for features in (a, b))
        x, y = (features / np.maximum(np.sqrt((features**2).sum(1, keepdims=True)), 1e-6) for features in (x, y))
        expected += ((x - y) ** 2).sum(1).mean() / 5
    assert float(feature_distance_loss(tensors(a), tensors(b))) == pytest.approx(expected, rel=1e-4)
    # Where nothing is left after the ReLU there is no direction, and no gradient.
    dark = {layer: torch.full_like(value, -1.0).requires_grad_() for layer, value in tensors(a).items()}
    feature_distance_loss(dark, tensors(b)).backward()
    assert all(value.grad is None or torch.isfinite(value.grad).all() for value in dark.values())


def test_pixel_loss_is_the_weighted_haar_l1():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 2, 3, 8, 6))
    bands = []
    for image in (x, y):
        low = (image[..., 0::2, :] + image[..., 1::2, :]) / np.sqrt(2)
        high = (image[..., 0::2, :] - image[..., 1::2, :]) / np.sqrt(2)
        bands.append(
            [(part[..., 0::2] + sign * part[..., 1::2]) / np.sqrt(2) for part in (low, high) for sign in (1, -1)]
        )
    (ll, lh, hl, hh), (ll2, lh2, hl2, hh2) = bands
    l1 = lambda a, b: np.abs(a - b).mean()  # noqa: E731
    expected = l1(ll, ll2) + 0.1 * (l1(lh, lh2) + l1(hl, hl2)) / 2 + 0.01 * l1(hh, hh2)
    assert float(pixel_loss(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(expected, rel=1e-5)


def test_haar_keeps_the_energy():
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert sum(float(band.square().sum()) for band in haar(image)) == pytest.approx(float(image.square().sum()))


def test_adversarial_loss_is_binary_cross_entropy_with_logits():
    logits = torch.randn(2, 1, 4, 4)
    for real in (True, False):
        probability = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
        expected = -np.log(probability if real else 1 - probability).mean()
        assert float(adversarial_loss([logits], real=real)) == pytest.approx(expected, rel=1e-5)


def test_distances_are_zero_where_the_models_agree(four):
    S_s, S_t, _, _ = map(tensors, four)
    assert float(inter_loss(S_s, S_t, S_s, S_t)) == 0
    # Cross-entropy of a distribution with itself is its entropy: no other prediction does better.
    assert float(intra_loss(S_s, S_t, S_s, S_t)) < float(intra_loss(S_t, S_t, S_s, S_t))


def test_consistency_is_the_difference_of_low_frequencies():
    rng = np.random.default_rng(0)
    lr, sr = rng.random((2, 3, 12, 10)), rng.random((2, 3, 48, 40))
    difference = sr.reshape(2, 3, 12, 4, 10, 4).mean(axis=(3, 5)) - lr
    row = np.array([1, 4, 6, 4, 1]) / 16
    kernel = np.outer(row, row)
    windows = np.lib.stride_tricks.sliding_window_view(difference, (5, 5), axis=(2, 3))
    expected = np.abs((windows * kernel).sum(axis=(4, 5))).mean()
    found = consistency_loss(torch.from_numpy(sr), torch.from_numpy(lr), 4)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    # Fine detail is free: what vanishes when the image is brought back to LR size costs nothing.
    detail = torch.zeros(1, 3, 48, 40)
    detail[..., ::2, ::2], detail[..., 1::2, 1::2] = 0.3, -0.3
    smooth = torch.full((1, 3, 12, 10), 0.5)
    assert float(consistency_loss(0.5 + detail, smooth, 4)) < 1e-6
