"""The GPU's kernels without a GPU: computed by Triton's interpreter, and compiled for the cards that there are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spandrel import ModelLoader
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor, nn

from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.runtime import Runtime
from pdd_cli.weights.wiring import wiring_of
from tests.helpers.images import psnr

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "rrdbnet": lambda: RRDBNet(blocks=1, features=32, growth=32),
    "rrdbnet-x2": lambda: RRDBNet(blocks=1, features=32, growth=32, unshuffle=2),
    "compact": lambda: SRVGGNetCompact(num_feat=64, num_conv=3),
    "compact-x2": lambda: SRVGGNetCompact(num_feat=24, num_conv=2, upscale=2),
    # Nothing for tensor cores.
    "narrow": lambda: RRDBNet(blocks=1, features=8, growth=8),
}
# The second has two images, the third is the first again: maps are kept from call to call. Four times as high and wide,
# an image takes several programs, the last one partly. Networks whose names end with -x2, which differ from others in
# their scale only, compute the first.
IMAGES = {"5x7": (1, 3, 5, 7), "4x2": (2, 3, 4, 2), "again": (1, 3, 5, 7)}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton_conv")
    generator = np.random.default_rng(0)
    np.savez(folder / "lr.npz", **{name: generator.random(shape, np.float32) for name, shape in IMAGES.items()})
    torch.manual_seed(0)
    for name, make in NETWORKS.items():
        state = make().state_dict()
        for key, value in state.items():
            if key.endswith("bias"):  # which begin as nearly nothing
                value.normal_(0, 0.1)
            elif value.ndim == 1:  # of PReLU: each channel another slope
                value.uniform_(0, 0.5)
        torch.save(state, folder / f"{name}.pt")
    subprocess.run([sys.executable, "-m", "tests.helpers.triton_conv_worker", str(folder)], check=True)
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernels_compute_what_spandrels_network_does(computed: Path, name: str) -> None:
    found = np.load(computed / f"{name}.npz")
    if name == "narrow":
        assert not found.files
        return
    model = ModelLoader().load_from_state_dict(torch.load(computed / f"{name}.pt", weights_only=True))
    images, sizes = np.load(computed / "lr.npz"), list(IMAGES)
    if name.endswith("-x2"):
        sizes = sizes[:1]
    else:
        assert psnr(found["fp16 5x7"], found["fp32 5x7"], float(found["fp32 5x7"].std())) > 50
    for size in sizes:
        lr = images[size]
        height, width = lr.shape[2:]
        padded = F.pad(torch.from_numpy(lr), (0, width % 2, 0, height % 2), mode="replicate")
        with torch.inference_mode():
            expected = model.model.eval()(padded if name == "rrdbnet-x2" else torch.from_numpy(lr)).numpy()
        expected = expected[..., : height * model.scale, : width * model.scale]
        np.testing.assert_allclose(found[f"fp32 {size}"], expected, atol=1e-5 * np.abs(expected).max())


class Card:
    """What Triton asks of a driver to compile for a card, as which it poses."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # by which what is compiled is remembered

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
def test_the_kernels_compile_for_cards_that_are_not_here(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    from pdd_cli.engines import triton_conv

    if architecture != 90:  # elsewhere one way to divide the work suffices
        prune = triton_conv._prune_configs
        monkeypatch.setattr(triton_conv._tuned, "early_config_prune", lambda *args, **named: prune(*args, **named)[:1])
    kernels: list[Any] = []

    class Compiling:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **named: kernels.extend(tuned.warmup(*args, grid=(1,), **named))

    tuned = triton_conv._tuned
    monkeypatch.setattr(triton_conv, "_tuned", Compiling())
    lr = torch.zeros(1, 3, 9, 7)
    monkeypatch.setattr(driver, "_active", Card(architecture))
    for network, dtype in ((RRDBNet(blocks=1), torch.bfloat16), (SRVGGNetCompact(num_conv=1), torch.float16)):
        wiring = wiring_of(network.state_dict())
        assert wiring is not None
        triton_conv.TritonNetwork(wiring, network.state_dict(), dtype)(lr)
    assert len(kernels) >= 5 * 3 + 6 + 3
    for kernel in set(kernels):
        assert any(sign in kernel.asm["ptx"] for sign in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))
        assert "cp.async" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 99 << 10, "more shared memory than a block gets on small cards"


class Mean(nn.Module):
    """The mean over three pixels each way: in one layer, or in `parts`, which take a second each on its own clock."""

    clock = 0.0

    def __init__(self, parts: int = 1, shift: float = 0) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.parts, self.shift = parts, shift

    def forward(self, x: Tensor) -> Tensor:
        Mean.clock += self.parts
        return torch.stack([self.layer(x) for _ in range(self.parts)]).mean(0) + self.shift


@pytest.mark.parametrize("other", ["faster", "slower", "wrong", "raising", "none"])
def test_another_form_is_taken_where_it_is_right_and_faster(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdd_cli.engines.torch_engine.time.perf_counter", lambda: Mean.clock)

    def model(module: nn.Module) -> SRModel:
        return SRModel(module=module.eval(), scale=1, in_channels=3, out_channels=3, architecture="test")

    torch.manual_seed(0)
    own = Mean(parts=1 if other == "slower" else 2)

    def convert(given: SRModel, dtype: torch.dtype) -> SRModel | None:
        assert dtype == torch.bfloat16
        if other == "raising":
            raise RuntimeError("no C compiler")
        if other == "none":
            return None
        made = Mean(parts=2 if other == "slower" else 1, shift=0.3 if other == "wrong" else 0)
        made.load_state_dict(own.state_dict())
        return model(made)

    engine = TorchEngine(model(own), Runtime("cpu", "bf16"), convert=convert)
    assert engine.uses_converted == (other == "faster")
    lr = np.random.default_rng(0).random((1, 3, 16, 16), np.float32)
    with torch.inference_mode():
        assert psnr(engine.run(lr), own(torch.from_numpy(lr)).numpy(), 1) > 40
    assert not TorchEngine(model(own), Runtime("cpu", "fp32"), convert=convert).uses_converted
