"""The Winograd kernels for ARM, which run in QEMU, against PyTorch; benchmarks/robustness/arm.py compares more."""

from __future__ import annotations

import pytest

from benchmarks.robustness import arm
from pdd_cli.engines.winograd.training_kernel import TrainingEmitter
from pdd_cli.models.rrdbnet import ActivatedConv2d

pytestmark = pytest.mark.skipif(bool(arm.missing()), reason=f"not found: {arm.missing()} (CONTRIBUTING.md)")


@pytest.mark.slow
def test_networks_and_threads_that_wait() -> None:
    with arm.Emulator() as emulator:
        for name in ("compact x2, 24 channels", "RRDBNet x1, 32 channels"):
            assert arm.compare_network(emulator, arm.NETWORKS[name](), [(20, 12), (4, 4)], arm.THREADS) < 2e-5, name
        arm.check_waiting(emulator)


@pytest.mark.slow
def test_a_convolution_and_its_gradients() -> None:
    with arm.Emulator(TrainingEmitter) as emulator:
        layer = ActivatedConv2d(32, 64, 3, padding=1)
        assert arm.compare_training(emulator, layer, (2, 32, 21, 30), arm.THREADS) < 1e-5
        assert emulator.count(arm.FAILURES) == 0
