"""The description of the networks' wiring against the networks' tensors; the engines' tests compute with it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import nn

from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.weights.wiring import wiring_of
from tests.helpers.networks import swinir


@pytest.mark.parametrize(
    ("network", "scale"),
    [
        (RRDBNet(features=16, growth=8, blocks=2), 4),
        (RRDBNet(features=8, growth=8, blocks=1, unshuffle=2, in_channels=1, out_channels=1), 2),
        (SRVGGNetCompact(num_feat=8, num_conv=3, upscale=3), 3),
        (SRVGGNetCompact(num_feat=8, num_conv=1, upscale=1, num_in_ch=1, num_out_ch=1), 1),
    ],
)
def test_it_names_every_tensor_and_map(network: nn.Module, scale: int) -> None:
    state = network.state_dict()
    wiring = wiring_of(state)
    assert wiring is not None
    assert wiring.shapes == {key: tensor.shape for key, tensor in state.items()}
    assert wiring.maps["output"].scale * wiring.pixel_shuffle == scale * wiring.pixel_unshuffle
    written = {"input"}
    for layer in wiring.layers:
        assert {layer.x, *layer.residuals} <= written  # nothing is read before it is written
        assert layer.inputs <= wiring.maps[layer.x].channels
        assert layer.written.stop <= wiring.maps[layer.out].channels
        assert wiring.maps[layer.out].scale == wiring.maps[layer.x].scale << layer.upsample
        written.add(layer.out)
    assert written == set(wiring.maps)


def test_other_networks_have_none() -> None:
    assert wiring_of({}) is None
    assert wiring_of(swinir()) is None
    assert wiring_of(SRVGGNetCompact(num_feat=8, num_conv=2, act_type="relu").state_dict()) is None
    assert wiring_of(nn.ModuleDict({"body": nn.Sequential(nn.LayerNorm(3), nn.Conv2d(3, 3, 3))}).state_dict()) is None
    state = RRDBNet(features=8, growth=8, blocks=1).state_dict()
    del state["conv_hr.bias"]
    assert wiring_of(state) is None


def test_it_needs_no_pytorch() -> None:
    code = "import sys, pdd_cli.weights.wiring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
