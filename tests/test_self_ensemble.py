"""The loss against the base's self-ensemble."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from pdd_cli.adaptation.losses import flip_or_transpose, self_ensemble_loss, undo_flip_or_transpose


@pytest.mark.parametrize("number", range(8))
def test_flips_and_transposes_are_undone(number):
    image = torch.rand(2, 3, 6, 6)
    turned = flip_or_transpose(image, number)
    assert torch.equal(undo_flip_or_transpose(turned, number), image)
    assert torch.equal(turned, image) == (number == 0)


def test_the_eight_are_different():
    image = torch.rand(1, 1, 5, 5)
    assert len({flip_or_transpose(image, number).numpy().tobytes() for number in range(8)}) == 8


def test_the_loss_is_the_error_of_all_bands_but_the_finest():
    """By Parseval the four bands together have the energy of the image, so the loss is that without HH."""
    ours, theirs = torch.rand(2, 3, 8, 12), torch.rand(2, 3, 8, 12)
    difference = (ours - theirs).double().numpy()
    checkerboard = np.array([[0.5, -0.5], [-0.5, 0.5]])
    filtered = [cv2.filter2D(plane, -1, checkerboard, anchor=(0, 0)) for image in difference for plane in image]
    finest = np.stack(filtered)[:, ::2, ::2]
    expected = 4 * np.square(difference).mean() - np.square(finest).mean()
    assert float(self_ensemble_loss(ours, theirs)) == pytest.approx(expected, rel=1e-5)
    pattern = torch.tensor(checkerboard, dtype=torch.float32).repeat(4, 6).expand(2, 3, -1, -1)
    assert float(self_ensemble_loss(ours + pattern, ours)) < 1e-10
