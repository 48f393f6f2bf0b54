"""The filters that OpenCV computes against PyTorch's, and pyiqa's metrics with them against pyiqa's without."""

from __future__ import annotations

import pyiqa
import pytest
import torch
import torch.nn.functional as F
from pyiqa.utils.img_util import imread2tensor

from pdd_cli.iqa.filtering import FastFilters
from tests.helpers.images import DATA, needs_data


def image(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 255 * torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7), (11, 11)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_filter_is_pytorchs(size: tuple[int, int], channels: int) -> None:
    pixels, weight = image(1, channels, 40, 31), image(channels, 1, *size)
    pixels[..., :20, :] = 0
    expected = F.conv2d(pixels, weight, groups=channels)
    with FastFilters():
        found = F.conv2d(pixels, weight, stride=1, padding=0, groups=channels)
        of_a_view = F.conv2d(pixels[..., ::2], weight, groups=channels)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(of_a_view, F.conv2d(pixels[..., ::2], weight, groups=channels), rtol=1e-12, atol=1e-8)
    if size[0] * size[1] < 50:  # larger ones go through Fourier transforms
        assert (found == 0).equal(expected == 0)  # niqe counts signs: what is black must stay exactly 0


def test_all_other_convolutions_stay_pytorchs() -> None:
    pixels, weight = image(1, 2, 20, 20), image(2, 1, 3, 3)
    cases = [
        (pixels, image(4, 2, 3, 3), {}),
        (pixels, weight, {"groups": 2, "stride": 2}),
        (pixels, weight, {"groups": 2, "padding": 1}),
        (pixels, weight, {"groups": 2, "padding": "same"}),
        (pixels, weight, {"groups": 2, "dilation": 2}),
        (pixels, weight, {"groups": 2, "bias": image(2)}),
        (pixels.repeat(2, 1, 1, 1), weight, {"groups": 2}),
        (pixels.float(), weight.float(), {"groups": 2}),
        (pixels[0], weight, {"groups": 2}),
    ]
    for inputs, weights, options in cases:
        with FastFilters():
            found = F.conv2d(inputs, weights, **options)
        assert found.equal(F.conv2d(inputs, weights, **options))
    with FastFilters(), pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        F.conv2d(pixels, image(2, 1, 21, 3), groups=2)


@needs_data
@pytest.mark.parametrize("name", ["ssim", "ms_ssim", "niqe"])
def test_metrics_are_pyiqas_on_photographs(name: str) -> None:
    options = {"pretrained_model_path": str(DATA / "iqa/niqe_modelparameters.mat")} if name == "niqe" else {}
    metric = pyiqa.create_metric(name, device="cpu", **options)
    folders = [sorted((DATA / "iqa/calibration" / kind).iterdir()) for kind in ("dist", "ref")]
    for paths in zip(*folders, strict=True):
        images = [imread2tensor(str(path), rgb=True)[None, :, :208, :208] for path in paths]
        for pixels in images:
            pixels[..., :20, :] = 0  # as the bars of a film
            pixels[..., -20:, :] = 1  # as a blown sky
        arguments = images[: 1 if name == "niqe" else 2]
        expected = float(metric(*arguments))
        with FastFilters():
            assert float(metric(*arguments)) == pytest.approx(expected, abs=1e-9)
