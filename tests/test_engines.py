"""PyTorch in a lower precision: what is prepared once computes what autocast does in every pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from spandrel.architectures.DAT import DAT
from spandrel.architectures.RCAN import RCAN
from torch import Tensor, nn

from pdd_cli.engines.openvino_engine import OpenVINOEngine
from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.engines.winograd import kernel as winograd_kernel
from pdd_cli.engines.winograd.engine import WinogradEngine
from pdd_cli.errors import OutOfMemory
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.runtime import Runtime, available_cpus, choose_runtime, usable_cpus

BF16 = Runtime("cpu", "bf16")
LR = np.random.default_rng(0).random((2, 3, 17, 30), np.float32)

NETWORKS = {
    "RRDBNet": lambda: RRDBNet(features=8, growth=8, blocks=1),
    "Compact": lambda: SRVGGNetCompact(num_feat=8, num_conv=2),
    "DAT": lambda: DAT(embed_dim=16, depth=[1], num_heads=[2], split_size=[2, 4]),
    "RCAN": lambda: RCAN(n_feats=8, n_resblocks=1, n_resgroups=1, reduction=4),
}


class OwnPrecision(nn.Module):
    """Leaves autocast for a layer, whose weights must then stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.conv(x.float())


@pytest.mark.parametrize("name", [*NETWORKS, "own precision", "spectral norm"])
def test_bf16_is_autocasts_to_the_last_bit(name: str) -> None:
    torch.manual_seed(0)
    if name in NETWORKS:
        model = model_from_state(NETWORKS[name]().state_dict(), origin=name)
    else:
        normed = nn.utils.spectral_norm(nn.Conv2d(3, 3, 3, padding=1))
        module = (OwnPrecision() if name == "own precision" else normed).eval()
        model = SRModel(module=module, scale=1, in_channels=3, out_channels=3, architecture="test")
    engine = TorchEngine(model, BF16)
    found, exact = engine.run(LR), engine.run(LR, exact=True)
    with torch.inference_mode():
        lr = torch.from_numpy(LR).to(memory_format=torch.channels_last)
        full = model.upscale(lr.clone()).numpy()  # RCAN changes its input
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(found, model.upscale(lr.clone()).float().numpy())
    np.testing.assert_array_equal(exact, full)
    if name != "own precision":
        assert np.abs(found - exact).max() > 0


def test_a_cpu_is_chosen_by_name_or_without_a_gpu() -> None:
    runtime = choose_runtime("cpu", "fp32")
    assert (runtime.device_name, runtime.device_type, runtime.device) == ("cpu", "cpu", torch.device("cpu"))
    assert runtime == Runtime(torch.device("cpu"), "fp32")
    assert Runtime("cuda:1", "fp16").device_type == "cuda"
    found = choose_runtime("auto", "fp32").device_type
    assert found == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert 1 <= usable_cpus() <= available_cpus()


@pytest.mark.parametrize("kind", [TorchEngine, OpenVINOEngine, WinogradEngine])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_every_engine_raises_one_error_when_memory_runs_out(
    kind: type[TorchEngine] | type[OpenVINOEngine] | type[WinogradEngine],
) -> None:
    if kind is OpenVINOEngine:
        pytest.importorskip("openvino")
    if kind is WinogradEngine and winograd_kernel.kernel() is None:
        pytest.skip("there is no kernel for this CPU")
    engine = kind(
        model_from_state(SRVGGNetCompact(num_feat=16, num_conv=1).state_dict(), origin=""), Runtime("cpu", "fp32")
    )
    side = 1 << 24  # 3 petabytes, more than the addresses that a process has
    with pytest.raises(OutOfMemory):
        engine.run(np.broadcast_to(np.float32(0), (1, 3, side, side)))
    with pytest.raises(OutOfMemory):
        engine.run_rounded(np.broadcast_to(np.uint8(0), (1, side, side, 3)))
    assert np.isfinite(engine.run(LR)).all()
