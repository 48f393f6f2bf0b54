"""Training by Winograd's algorithm: forward passes and gradients against PyTorch's in fp64, and when it is used."""

from __future__ import annotations

import copy
import ctypes
import functools
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest
import torch
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet as SpandrelRRDBNet
from torch import Tensor, nn

from pdd_cli.adaptation.prepare import move_to_device
from pdd_cli.engines.winograd import training as winograd
from pdd_cli.engines.winograd.kernel import AVX2, AVX512, Kernel
from pdd_cli.engines.winograd.training_kernel import CONVOLVE, CORRELATE, FIELDS, TrainingEmitter
from pdd_cli.models.discriminator import UNetDiscriminator
from pdd_cli.models.features import VGG
from pdd_cli.models.rrdbnet import ActivatedConv2d, RRDBNet
from pdd_cli.runtime import Runtime

CPUS = {"skylake-avx512": (AVX512, "avx512f"), "haswell": (AVX2, "avx2")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(winograd._machine() is None, reason="there is no kernel for this CPU, or no OpenMP"),
]


@pytest.fixture(params=CPUS)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel is that of this CPU."""
    needed = CPUS[request.param][1]
    if not llvm.get_host_cpu_features().get(needed):
        pytest.skip(f"this CPU has no {needed}")
    monkeypatch.setattr(winograd, "_machine", lambda: machine_of(request.param))
    return str(request.param)


@functools.cache
def machine_of(cpu: str) -> winograd._Machine:
    options: dict[str, Any] = {"cpu": cpu, "features": "", "triple": llvm.get_process_triple()}
    return winograd._Machine(Kernel(CPUS[cpu][0], **options, emitter=TrainingEmitter))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kinds of the steps that the kernel was asked for."""
    asked: list[int] = []
    run = winograd._Machine.run

    def recorded(self: winograd._Machine, program: Any) -> None:
        asked.extend(program[:, FIELDS.index("kind")].tolist())
        run(self, program)

    monkeypatch.setattr(winograd._Machine, "run", recorded)
    return asked


def strong(network: nn.Module) -> nn.Module:
    """With weights as strong as in trained networks; ESRGAN's own beginning is weak."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -0.1, 0.1)
    return network


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def results(network: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor | None]:
    """What the network gives, then the gradients of its weighted sum by x and by each parameter."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    out = network(x)
    (out * weights).sum().backward()
    return [None if one is None else one.clone() for one in (out, x.grad, *(p.grad for p in network.parameters()))]


def check(network: nn.Module, x: Tensor, weights: Tensor, allowed: float, reference: nn.Module | None = None) -> None:
    """That it gives what the reference, by default itself, gives in fp64, also in its gradients.

    A gradient jumps where rounding changes the sign of one in a million values before a ReLU.
    """
    reference = copy.deepcopy(reference or network).double()
    expected = results(reference, x.double(), weights.double())
    winograd.accelerate(network)
    found = results(network, x, weights)
    assert distance(found[0], expected[0]) < 1e-5
    for gradient, right in zip(found[1:], expected[1:], strict=True):
        if right is not None:
            assert distance(gradient, right) < allowed


@pytest.mark.parametrize("kind", [nn.Conv2d, ActivatedConv2d])
@pytest.mark.parametrize(
    ("inputs", "outputs", "size"),
    # Whole tiles, some of them partial, one row of tiles, fewer than are computed together.
    [
        (64, 32, (4, 32, 32)),
        (32, 96, (3, 37, 51)),
        (96, 64, (1, 3, 290)),
        (512, 64, (2, 23, 21)),
        (64, 512, (1, 30, 34)),
    ],
)
def test_a_convolution_and_its_gradients(
    cpu: str, steps: list[int], kind: type[nn.Conv2d], inputs: int, outputs: int, size: tuple[int, ...]
) -> None:
    images, height, width = size
    layer = strong(nn.Sequential(kind(inputs, outputs, 3, padding=1, bias=images != 3)))
    check(layer, torch.randn(images, inputs, height, width), torch.randn(images, outputs, height, width), 1e-5)
    assert steps.count(CONVOLVE) == 2
    assert steps.count(CORRELATE) == 1


@pytest.mark.parametrize("together", [1, 2])
def test_spandrels_rrdbnet_and_its_gradients(
    cpu: str, steps: list[int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_SHARED_CACHE", together * 4 * 192 * 29 * 34)
    network = strong(RRDBNet(blocks=2)).to(memory_format=torch.channels_last)
    reference = SpandrelRRDBNet(num_blocks=2)
    for mine, theirs in zip(network.state_dict().values(), reference.state_dict().values(), strict=True):
        theirs.copy_(mine)
    keys = list(network.state_dict())
    check(network, torch.rand(2, 3, 29, 34), torch.randn(2, 3, 116, 136), 1e-2, reference)
    assert list(network.state_dict()) == keys
    assert steps.count(CORRELATE) == 2 * 3 * 5 * (2 // together) + 4


def test_the_discriminator_and_the_features(cpu: str, steps: list[int]) -> None:
    x = torch.rand(2, 3, 96, 96)
    discriminator = UNetDiscriminator()
    with torch.no_grad():
        for _ in range(20):
            discriminator(x)  # spectral normalisation begins with random vectors
    check(discriminator.eval(), x, torch.randn(2, 1, 96, 96), 5e-3)
    assert steps.count(CORRELATE) == 5
    steps.clear()
    check(ThirdStage(strong(VGG((2, 2, 3, 3, 3)))), x, torch.randn(2, 256, 24, 24), 5e-3)
    assert steps.count(CORRELATE) == 6


class ThirdStage(nn.Module):
    def __init__(self, vgg: nn.Module) -> None:
        super().__init__()
        self.vgg = vgg

    def forward(self, x: Tensor) -> Tensor:
        return self.vgg(x, ["conv3_3"])["conv3_3"]  # type: ignore[no-any-return]


def test_the_number_of_threads_changes_nothing(cpu: str) -> None:
    layer = strong(nn.Sequential(ActivatedConv2d(64, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)))
    winograd.accelerate(layer)
    x, weights = torch.randn(1, 64, 50, 50), torch.randn(1, 32, 50, 50)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(results(layer, x, weights))
    finally:
        torch.set_num_threads(threads)
    for one, other, again in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(other, again)


def test_tensors_as_they_come(cpu: str) -> None:
    """Contiguous ones, bf16, at any address; without a gradient, and with the gradient of x alone."""
    layer = strong(nn.Sequential(nn.Conv2d(32, 64, 3, padding=1)))
    odd = torch.randn(1 + 2 * 32 * 40 * 40)[1:].view(2, 32, 40, 40)
    for x in (odd, odd.contiguous(memory_format=torch.channels_last)[:1], odd.bfloat16()):
        expected = copy.deepcopy(layer).double()(x.double())
        fast = copy.deepcopy(layer)
        winograd.accelerate(fast)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert distance(fast(x), expected) < 1e-5
        fast.requires_grad_(False)
        given = x.clone().requires_grad_()
        fast(given).sum().backward()
        assert given.grad is not None
        assert given.grad.dtype == x.dtype
        assert next(fast.parameters()).grad is None


def test_what_has_too_little_to_do_is_left_to_pytorch(cpu: str, steps: list[int]) -> None:
    others = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
    )
    winograd.accelerate(others)
    others(torch.rand(1, 3, 64, 64))
    layer = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    winograd.accelerate(layer)
    layer(torch.rand(1, 32, 8, 8))
    assert not steps
    layer(torch.rand(1, 32, 32, 32))
    assert steps


def test_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for runtime, amx, expected in (
        (Runtime("cpu", "fp32"), True, True),
        (Runtime("cpu", "bf16"), False, True),
        (Runtime("cpu", "bf16"), True, False),
    ):
        monkeypatch.setattr("pdd_cli.engines.winograd.cpu_has_amx", lambda amx=amx: amx)
        network = RRDBNet(blocks=1)
        move_to_device(network, runtime)
        assert isinstance(network.conv_body, winograd.WinogradConv2d) == expected
        assert network.conv_body.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_threads_are_pytorchs_own() -> None:
    """Other packages bring a copy of the same library, whose threads would be further ones."""
    library = Path(winograd._openmp())
    copies = [path for path in Path(torch.__file__).parents[1].glob("*.libs/libgomp*") if path != library]
    for path in copies:
        ctypes.CDLL(str(path))
    assert any(str(path) in Path("/proc/self/maps").read_text() for path in copies) or not copies
    assert Path(winograd._openmp()) == library
    own = Path(torch.__file__).parent / "lib"
    assert library.parent == own or not list(own.glob("lib*omp*"))


def test_pytorch_with_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS have no such file; nothing is changed then."""
    monkeypatch.setattr(winograd, "_openmp", lambda: "/nowhere/libgomp.so.1")
    monkeypatch.setattr(winograd, "_machine", winograd._machine.__wrapped__)
    network = RRDBNet(blocks=1)
    winograd.accelerate(network)
    assert type(network.conv_body) is nn.Conv2d
