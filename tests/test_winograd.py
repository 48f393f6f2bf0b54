"""Winograd's algorithm against spandrel's forward pass, and when it is taken."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from spandrel import ModelLoader
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import nn

from pdd_cli.engines.select import choose_engine, try_engines
from pdd_cli.engines.torch_engine import TorchEngine
from pdd_cli.engines.winograd import inference as winograd
from pdd_cli.engines.winograd import kernel as winograd_kernel
from pdd_cli.engines.winograd.engine import WinogradEngine
from pdd_cli.engines.winograd.training_kernel import TrainingEmitter
from pdd_cli.errors import InputError
from pdd_cli.models.loading import SRModel, model_from_state
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.runtime import Runtime
from pdd_cli.weights.store import cache_home
from pdd_cli.weights.wiring import wiring_of
from tests.helpers.commands import environment

CPU, BF16 = Runtime("cpu", "fp32"), Runtime("cpu", "bf16")
NETWORKS = {
    "rrdbnet": lambda: RRDBNet(blocks=2),
    "rrdbnet-x2": lambda: RRDBNet(blocks=1, unshuffle=2),
    "rrdbnet-x1, narrow": lambda: RRDBNet(features=32, blocks=1, unshuffle=4),
    "rrdbnet, gray": lambda: RRDBNet(blocks=1, in_channels=1, out_channels=1),
    "compact": lambda: SRVGGNetCompact(num_conv=3),
    "compact-x2": lambda: SRVGGNetCompact(num_feat=24, num_conv=2, upscale=2),
    "compact, wide": lambda: SRVGGNetCompact(num_feat=80, num_conv=2),
    "compact-x1": lambda: SRVGGNetCompact(num_feat=48, num_conv=4, upscale=1),
}
SLOW = ("rrdbnet", "rrdbnet, gray")
# What x86 CPUs have; each runs where its instructions are.
CPUS = {"skylake-avx512": (winograd_kernel.AVX512, "avx512f"), "haswell": (winograd_kernel.AVX2, "avx2")}

pytestmark = pytest.mark.skipif(winograd_kernel.kernel() is None, reason="there is no kernel for this CPU")


def state_of(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):  # as strong as in trained networks; ESRGAN's own beginning is weak
                nn.init.kaiming_normal_(layer.weight, 0.2)
                layer.bias.uniform_(-0.1, 0.1)
            if isinstance(layer, nn.PReLU):
                layer.weight.uniform_(-0.5, 1.5)
    return dict(network.state_dict())


def spandrels(state: dict[str, torch.Tensor], lr: np.ndarray) -> np.ndarray:
    """(h, w, C) to (h*scale, w*scale, C) by spandrel's network in fp64, by which fp32's own rounding is seen."""
    model = ModelLoader().load_from_state_dict(dict(state))
    with torch.inference_mode():
        batch = torch.from_numpy(lr).permute(2, 0, 1)[None].double()
        return model.model.double().eval()(batch)[0].permute(1, 2, 0).numpy()


def network_of(state: dict[str, torch.Tensor], kernel: winograd_kernel.Kernel, *, threads: int) -> winograd.Network:
    wiring = wiring_of(state)
    assert wiring is not None
    return winograd.Network(wiring, {key: value.numpy() for key, value in state.items()}, kernel, threads=threads)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]
)
def test_it_computes_what_spandrels_network_does(name: str, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_STRIP", 0)  # the strips of the last layers are as narrow as can be: 64 rows
    shape, needed = CPUS[cpu]
    if not llvm.get_host_cpu_features().get(needed):
        pytest.skip(f"this CPU has no {needed}")
    state = state_of(name)
    kernel = winograd_kernel.Kernel(shape, cpu=cpu, features="", triple=llvm.get_process_triple())
    network = network_of(state, kernel, threads=3)
    channels = 1 if "gray" in name else 3
    generator = np.random.default_rng(0)
    # One size after another in the same memory: larger, smaller, partial tiles, fewer pixels than a tile.
    for height, width in ((16, 24), (44, 52), (12, 20), (36, 4), (4, 4), (8, 76)):
        lr = generator.random((height, width, channels), np.float32)
        expected = spandrels(state, lr)
        error = np.abs(network(lr) - expected).max()
        assert error < 2e-5 * np.abs(expected).max(), (height, width)
        assert np.isfinite(expected).all()
        assert expected.std() > 0.05


def test_any_size_and_several_images(tmp_path: Path) -> None:
    """Sizes that aren't whole tiles, or what an unshuffling network needs: padded as PyTorch's engine pads them."""
    for name in ("rrdbnet", "rrdbnet-x2", "compact"):
        model = model_from_state(state_of(name), origin=name)
        engine, plain = WinogradEngine(model, CPU), TorchEngine(model, CPU)
        assert engine.weights_sha256 == plain.weights_sha256
        for size in ((1, 1), (17, 23), (5, 130)):
            lr = np.random.default_rng(1).random((2, 3, *size), np.float32)
            found, expected = engine.run(lr), plain.run(lr)
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("emitter", "products"),
    [
        (winograd_kernel.Emitter, winograd_kernel.NEON.tiles),
        (TrainingEmitter, winograd_kernel.NEON.tiles + winograd_kernel.NEON.rows),
    ],
)
def test_a_kernel_for_arm_is_compiled(emitter: type[winograd_kernel.Emitter], products: int) -> None:
    """Its instructions multiply and add vectors; it can't be run here."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip("this LLVM compiles for x86 only")
    assert winograd_kernel.shape_of({}, triple) == winograd_kernel.NEON
    machine = target.create_target_machine(cpu="cortex-a76", opt=3)
    module = llvm.parse_assembly(str(emitter(winograd_kernel.NEON, triple).emit()))
    assert machine.emit_assembly(module).count("fmla") >= products * winograd_kernel.NEON.vectors


def test_which_cpus_have_a_kernel() -> None:
    x86 = "x86_64-unknown-linux-gnu"
    assert winograd_kernel.shape_of({"avx512f": True, "avx2": True, "fma": True}, x86) == winograd_kernel.AVX512
    assert winograd_kernel.shape_of({"avx2": True, "fma": True}, x86) == winograd_kernel.AVX2
    assert winograd_kernel.shape_of({"avx2": True, "fma": False}, x86) is None
    assert winograd_kernel.shape_of({"neon": True}, "arm64-apple-darwin25") == winograd_kernel.NEON


@pytest.mark.parametrize("name", ["rrdbnet", "compact"])
def test_what_was_computed_before_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, whatever lies in the memory of the maps; values that aren't finite, too."""
    monkeypatch.setattr(winograd, "_STRIP", 0)
    engine = WinogradEngine(model_from_state(state_of(name), origin=name), CPU)
    lr = np.random.default_rng(0).random((1, 3, 37, 22), np.float32)
    expected = engine.run(lr)
    other = np.full_like(lr, 100)
    assert engine.run(other).max() > 10
    np.testing.assert_array_equal(engine.run(lr), expected)
    other[:] = np.nan
    assert np.isnan(engine.run(other)).all()
    assert engine.run_rounded(np.zeros((1, 37, 22, 3), np.uint8)) is not None
    np.testing.assert_array_equal(engine.run(lr), expected)


# --- when it is taken -----------------------------------------------------------------------------------------------


def test_auto_takes_it_for_fp32_and_where_bf16_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_state(state_of("compact"), origin="compact")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert choose_engine(model, CPU, "auto").name == "winograd"
    assert choose_engine(model, BF16, "auto").name != "winograd"  # asked for
    for amx in (True, False):
        monkeypatch.setattr("pdd_cli.engines.winograd.cpu_has_amx", lambda amx=amx: amx)
        engine = choose_engine(model, BF16, "auto", free=True)
        assert (engine.name == "winograd") == (not amx)
        assert engine.runtime.precision == ("bf16" if amx else "fp32")
    assert choose_engine(model, BF16, "winograd", free=True).runtime.precision == "fp32"
    assert choose_engine(model, CPU, "torch").name == "torch"


def test_on_arm_auto_takes_it_if_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_state(state_of("compact"), origin="compact")
    seconds = {"winograd": 1.0}
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("pdd_cli.engines.select._seconds", lambda engine: seconds.get(engine.name, 2.0))
    for system in ("Darwin", "Linux"):
        monkeypatch.setattr("platform.system", lambda system=system: system)
        assert (choose_engine(model, CPU, "auto").name == "winograd") == (system == "Linux")
        assert choose_engine(model, CPU, "winograd").name == "winograd"
    seconds["winograd"] = 3.0
    other = choose_engine(model, CPU, "auto")
    assert other.name != "winograd"
    tried = {one.name: one.problem for one in try_engines(model, CPU)}
    assert tried["winograd"] == f"slower on cpu, fp32 than {other.name} on cpu, fp32"


@pytest.mark.parametrize("other", ["another network", "relu", "features", "bf16", "cuda", "old CPU"])
def test_what_it_cannot_do_is_reported(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, runtime = state_of("compact"), CPU
    if other == "features":
        state = dict(RRDBNet(features=24, growth=8, blocks=1).state_dict())
    elif other in ("bf16", "cuda"):
        runtime = BF16 if other == "bf16" else Runtime("cuda", "fp32")
    elif other == "old CPU":
        monkeypatch.setattr(winograd_kernel, "kernel", lambda: None)
    model = model_from_state(state, origin=other)
    if other == "another network":
        model = SRModel(module=nn.Conv2d(3, 3, 3).eval(), scale=1, in_channels=3, out_channels=3, architecture="test")
    elif other == "relu":  # as BasicSR's has it with another act_type
        network = SRVGGNetCompact(num_conv=2, act_type="relu").eval()
        model = SRModel(module=network, scale=4, in_channels=3, out_channels=3, architecture="RealESRGAN Compact")
    with pytest.raises(InputError, match="--engine winograd"):
        choose_engine(model, runtime, "winograd")
    if other not in ("bf16", "cuda"):
        assert choose_engine(model, runtime, "auto").name in ("openvino", "torch")


def test_auto_takes_another_where_it_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_state(state_of("compact"), origin="compact")
    call = winograd.Network.__call__
    monkeypatch.setattr(winograd.Network, "__call__", lambda network, lr: call(network, lr) + 0.01)
    assert choose_engine(model, CPU, "auto").name != "winograd"


def test_a_thread_stops_before_its_next_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the only one, which waits for no other: on one core Ctrl-C once took until the end of the image."""
    state, kernel = state_of("compact"), winograd_kernel.kernel()
    assert kernel is not None
    network = network_of(state, kernel, threads=1)
    compute, counted = winograd_kernel.Kernel.__call__, []

    def stopped(self: winograd_kernel.Kernel, program: int, length: int, sync: int, *more: int) -> None:
        counters = (ctypes.c_int64 * (1 + 2 * length)).from_address(sync)
        counters[0] = 1
        compute(self, program, length, sync, *more)
        counted.extend(counters[1:])

    monkeypatch.setattr(winograd_kernel.Kernel, "__call__", stopped)
    network(np.zeros((16, 16, 3), np.float32))
    assert counted
    assert not any(counted)  # neither a tile begun nor a layer done


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_ends_it_in_the_middle_of_an_image(tmp_path: Path) -> None:
    """With nothing half-written."""
    from PIL import Image

    weights = tmp_path / "model.safetensors"
    save_file(RRDBNet(blocks=1).state_dict(), weights)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)).save(tmp_path / "large.png")
    command = [sys.executable, "-m", "pdd_cli", "upscale", tmp_path / "large.png", tmp_path / "out.png"]
    options = ["--weights", weights, "--engine", "winograd", "--tile", "0", "--device", "cpu"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment(tmp_path))
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "winograd" in line
        times = psutil.Process(process.pid).cpu_times
        before = times().user
        while times().user < before + 1 and process.poll() is None:  # the whole image takes many times as much
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, messages = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, messages
    assert "interrupted" in messages
    assert not list(tmp_path.glob("out*"))


def test_threads_of_several_pictures_at_once_do_not_meet() -> None:
    """Two engines compute beside each other, as for two devices or while a picture is checked."""
    model = model_from_state(state_of("rrdbnet"), origin="rrdbnet")
    lr = np.random.default_rng(0).random((1, 3, 24, 36), np.float32)
    engines = [WinogradEngine(model, CPU) for _ in range(3)]
    expected = engines[0].run(lr)
    found: dict[int, np.ndarray] = {}
    workers = [
        threading.Thread(target=lambda number=number: found.update({number: engines[number].run(lr)}))
        for number in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in found.values():
        np.testing.assert_array_equal(result, expected)
    assert len(found) == 3
    assert F.mse_loss(torch.from_numpy(expected), torch.from_numpy(TorchEngine(model, CPU).run(lr))) < 1e-8


def test_a_thread_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    state, kernel = state_of("compact"), winograd_kernel.kernel()
    assert kernel is not None
    network = network_of(state, kernel, threads=2)
    compute, numbers = winograd_kernel.Kernel.__call__, iter(range(2))

    def one_fails(self: winograd_kernel.Kernel, *arguments: int) -> None:
        if next(numbers) == 1:
            raise MemoryError("no thread")
        compute(self, *arguments)

    monkeypatch.setattr(winograd_kernel.Kernel, "__call__", one_fails)
    with pytest.raises(MemoryError, match="no thread"):
        network(np.zeros((16, 16, 3), np.float32))


def test_threads_outlive_an_impatient_interruption_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C ends the wait for threads that compute still: what they write to must not be freed."""
    kernel, go_on, ended = winograd_kernel.kernel(), threading.Event(), threading.Event()
    assert kernel is not None

    def slow(self: winograd_kernel.Kernel, *arguments: int) -> None:
        go_on.wait()
        ended.set()

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    def twice_interrupted() -> weakref.ref[winograd.Network]:
        state = state_of("compact")
        network = network_of(state, kernel, threads=2)
        with contextlib.suppress(KeyboardInterrupt):
            network(np.zeros((16, 16, 3), np.float32))
        return weakref.ref(network)

    monkeypatch.setattr(winograd_kernel.Kernel, "__call__", slow)
    monkeypatch.setattr(winograd, "wait", interrupted)
    network = twice_interrupted()
    gc.collect()
    try:
        assert network() is not None
        assert not ended.is_set()
    finally:
        go_on.set()


@pytest.mark.skipif(sys.platform != "linux", reason="there a thread that waits only leaves its core to others")
def test_a_thread_that_waits_for_another_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spinning it would take the core from programs beside it, and from the very thread that it waits for."""
    state, kernel = state_of("compact"), winograd_kernel.kernel()
    assert kernel is not None
    network = network_of(state, kernel, threads=2)
    lr = np.random.default_rng(0).random((16, 16, 3), np.float32)
    expected = network(lr).copy()
    compute, numbers, used = winograd_kernel.Kernel.__call__, iter(range(2)), []

    def one_is_late(self: winograd_kernel.Kernel, *arguments: int) -> None:
        if next(numbers) == 1:
            time.sleep(1)
        before = time.thread_time()
        compute(self, *arguments)
        used.append(time.thread_time() - before)

    monkeypatch.setattr(winograd_kernel.Kernel, "__call__", one_is_late)
    np.testing.assert_array_equal(network(lr), expected)
    assert len(used) == 2
    assert max(used) < 0.3  # seconds of a core


@pytest.mark.parametrize("content", [b"", b"broken", bytes(32) + b"not what the digest is of"], ids=len)
def test_a_broken_cached_kernel_is_made_again(content: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features()
    shape = winograd_kernel.shape_of(features, triple)
    assert shape is not None

    def kernel() -> winograd_kernel.Kernel:
        return winograd_kernel.Kernel(shape, cpu=llvm.get_host_cpu_name(), features=features.flatten(), triple=triple)

    assert kernel().address("run")
    (kept,) = (cache_home() / "compiled").glob("*.kernel")
    whole = kept.read_bytes()
    parsed: list[str] = []
    parse = llvm.parse_assembly
    monkeypatch.setattr(llvm, "parse_assembly", lambda text: [parsed.append(text), parse(text)][1])
    assert kernel().address("run")
    assert parsed == [""]  # it was read
    kept.write_bytes(content)
    assert kernel().address("run")
    assert len(parsed) == 3
    assert kept.read_bytes() == whole
