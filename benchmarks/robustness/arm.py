"""Runs the Winograd kernels for 64-bit ARM in an emulator and compares them with PyTorch.

Usage: python -m benchmarks.robustness.arm

It needs Linux on another CPU, QEMU's user-mode emulator and a cross compiler (Debian: qemu-user, gcc-aarch64-linux-gnu
and libc6-dev-arm64-cross). The networks are built, divided into programs and threads as `pdd` does; only the machine
code runs in the emulator, in memory that both processes share at the same address. The emulator keeps the memory order
of the CPU below it, which on x86 is stricter than ARM's: it can't show a missing fence.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from unittest.mock import patch

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
import torch
from spandrel import ModelLoader
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor, nn

from pdd_cli.engines.winograd import inference, training
from pdd_cli.engines.winograd.kernel import NEON, Emitter
from pdd_cli.engines.winograd.training_kernel import FIELDS, TEAM, TrainingEmitter
from pdd_cli.models.rrdbnet import ActivatedConv2d, RRDBNet
from pdd_cli.weights.wiring import wiring_of

FloatArray = npt.NDArray[np.float32]

TRIPLE, CPU = "aarch64-unknown-linux-gnu", "cortex-a76"
EMULATOR, COMPILER = "qemu-aarch64", "aarch64-linux-gnu-gcc"
_ADDRESS, _SIZE = 1 << 40, 1 << 30  # of the shared memory; a sparse file
_MAP_FIXED_NOREPLACE = 0x100000
_TRAINING_SCRATCH = 1 << 22  # bytes per thread
THREADS = 3
_TRANSFORM, _RUN, _TEAM, _COUNT = range(4)  # requests to the driver
WAITS, WAKES, FAILURES = range(3)  # what it counts

_DRIVER = """
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern void run(int64_t *, int64_t, int64_t *, float *, int64_t, int64_t);
extern void transform(float *, int64_t, int64_t, float *);
extern void team(void *) __attribute__((weak));
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
extern int omp_get_thread_num(void), omp_get_num_threads(void);

static _Atomic int64_t counts[3];

static int64_t pause_thread(int64_t number, int64_t a, int64_t operation, int64_t c, int64_t d, int64_t e, int64_t f) {
    int wakes = operation == 129;
    counts[wakes]++;
    int64_t result = syscall(number, a, operation, c, d, e, f);
    if (result < 0 && (wakes || (errno != EAGAIN && errno != ETIMEDOUT && errno != EINTR))) counts[2]++;
    return result;
}

static void *serve(void *request) {
    int64_t *r = request, pause = (int64_t)(intptr_t)pause_thread;
    switch (r[1]) {
    case 0: transform((float *)r[2], r[3], r[4], (float *)r[5]); break;
    case 1: run((int64_t *)r[2], r[3], (int64_t *)r[4], (float *)r[5], r[6], pause); break;
    case 2: {
        int64_t *team_values = (int64_t *)r[2];
        team_values[5] = pause;
        team_values[6] = (int64_t)(intptr_t)omp_get_thread_num;
        team_values[7] = (int64_t)(intptr_t)omp_get_num_threads;
        GOMP_parallel(team, team_values, (unsigned)r[3], 0);
        break;
    }
    }
    int64_t reply[2] = {r[0], counts[r[2] % 3]};
    free(r);
    if (write(1, reply, sizeof reply) != sizeof reply) _exit(3);
    return 0;
}

int main(int count, char **arguments) {
    void *address = (void *)strtoull(arguments[2], 0, 10);
    size_t size = strtoull(arguments[3], 0, 10);
    if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, atoi(arguments[1]), 0) != address) return 2;
    for (;;) {
        int64_t *request = malloc(64);
        if (read(0, request, 64) != 64) return 0;
        pthread_t thread;
        if (pthread_create(&thread, 0, serve, request)) return 4;
        pthread_detach(thread);
    }
}
"""


def missing() -> str:
    """What this machine lacks for the emulator; "" if it has all."""
    if sys.platform != "linux":
        return "Linux"
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        return "an LLVM that compiles for ARM"
    return " and ".join(name for name in (EMULATOR, COMPILER) if shutil.which(name) is None)


class Emulator:
    """A process that runs a kernel for ARM, with the interface of `kernel.Kernel`; leaving its context ends it.

    Nothing may be `missing`. Raises RuntimeError if the program can't be built; requests do if the emulator ends.
    """

    shape = NEON

    def __init__(self, emitter: type[Emitter] = Emitter) -> None:
        self._memory = _shared_memory()
        with tempfile.TemporaryDirectory(prefix="pdd-arm-") as name:
            driver = _built(emitter, Path(name))
            self._process = subprocess.Popen(
                [EMULATOR, str(driver), str(self._memory.file), str(_ADDRESS), str(_SIZE)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds=[self._memory.file],
            )  # fmt: skip
            self._numbers = itertools.count()
            self._asked: dict[int, Future[int]] = {}
            self._programs: dict[int, list[int]] = {}
            self._lock = threading.Lock()
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            self.count(WAITS)  # it has been loaded

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()  # threads may still wait for others
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()

    def transform(self, weight: int, inputs: int, outputs: int, packed: int) -> None:
        taps = self._memory.copy(weight, 4 * 9 * inputs * outputs)
        self.ask(_TRANSFORM, taps, inputs, outputs, packed).result()

    def __call__(self, program: int, layers: int, sync: int, scratch: int, threads: int, pause: int) -> None:
        with self._lock:  # the first thread copies what all of them share
            if sync not in self._programs:
                rows = self._memory.copy(program, 8 * layers * len(Emitter.fields))
                self._programs[sync] = [threads, rows, self._memory.copy(sync, 8 * (1 + 2 * layers))]
            _, rows, shared = self._programs[sync]
        self.ask(_RUN, rows, layers, shared, scratch, threads).result()
        with self._lock:
            self._programs[sync][0] -= 1
            if not self._programs[sync][0]:
                del self._programs[sync]

    def count(self, what: int) -> int:
        """How often threads have slept, have woken others, or failed to."""
        return self.ask(_COUNT, what).result()

    def ask(self, kind: int, *values: int) -> Future[int]:
        """Start a request, in a thread of its own in the emulator."""
        found: Future[int] = Future()
        number = next(self._numbers)
        self._asked[number] = found
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("8q", number, kind, *values, *[0] * (6 - len(values))))
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        while len(reply := self._process.stdout.read(16) or b"") == 16:
            number, value = struct.unpack("2q", reply)
            self._asked.pop(number).set_result(value)
        for asked in list(self._asked.values()):
            asked.set_exception(RuntimeError(f"{EMULATOR} ended with status {self._process.wait()}"))


class _SharedMemory:
    """Memory at the same address in this process and in the emulator. It is never freed."""

    def __init__(self) -> None:
        self.file = os.memfd_create("pdd-arm")
        os.truncate(self.file, _SIZE)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE
        if libc.mmap(_ADDRESS, _SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.file, 0) != _ADDRESS:
            raise RuntimeError("the address of the shared memory is in use")
        self._end = _ADDRESS
        self._lock = threading.Lock()

    def allocate(self, size: int) -> FloatArray:
        """Allocate `size` bytes of zeros."""
        with self._lock:
            first = self._end
            self._end += -(-max(size, 4) // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._end > _ADDRESS + _SIZE:
            raise MemoryError("the memory that is shared with the emulator is full")
        return np.ctypeslib.as_array((ctypes.c_float * (size // 4)).from_address(first))

    def copy(self, address: int, size: int) -> int:
        """The address of a copy."""
        found = int(self.allocate(size).ctypes.data)
        ctypes.memmove(found, address, size)
        return found


@functools.lru_cache(maxsize=1)
def _shared_memory() -> _SharedMemory:
    return _SharedMemory()


def _built(emitter: type[Emitter], folder: Path) -> Path:
    """The program for ARM that contains the kernel."""
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=CPU, opt=3)
    kernel, driver = folder / "kernel.o", folder / "driver"
    kernel.write_bytes(machine.emit_object(llvm.parse_assembly(str(emitter(NEON, TRIPLE).emit()))))
    driver.with_suffix(".c").write_text(_DRIVER)
    command = [COMPILER, "-O2", "-static", "-fopenmp", str(driver.with_suffix(".c")), str(kernel), "-o", str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(built.stderr)
    return driver


# --- inference ------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "compact x4, 64 channels": lambda: SRVGGNetCompact(num_conv=2),
    "compact x2, 24 channels": lambda: SRVGGNetCompact(num_feat=24, num_conv=2, upscale=2),
    "RRDBNet x4, 64 channels": lambda: RRDBNet(blocks=1),
    "RRDBNet x2, 32 channels": lambda: RRDBNet(features=32, blocks=1, unshuffle=2),
    "RRDBNet x1, 32 channels": lambda: RRDBNet(features=32, blocks=1, unshuffle=4),
}
SIZES = ((20, 12), (8, 16), (36, 4), (4, 4))  # one after another in the same memory


def compare_network(emulator: Emulator, network: nn.Module, sizes: Sequence[tuple[int, int]], threads: int) -> float:
    """The largest error against spandrel's network in fp64, relative to the largest value."""
    state = _strong(network).state_dict()
    wiring = wiring_of(state)
    assert wiring is not None
    reference = ModelLoader().load_from_state_dict(dict(state)).model.double().eval()
    largest = 0.0
    with patch.object(inference, "_memory", _shared_memory().allocate), patch.object(inference, "_STRIP", 0):
        found = inference.Network(wiring, {k: v.numpy() for k, v in state.items()}, emulator, threads=threads)  # type: ignore[arg-type]
        for height, width in sizes:
            lr = np.random.default_rng(0).random((height, width, 3), np.float32)
            with torch.inference_mode():
                expected = reference(torch.from_numpy(lr).permute(2, 0, 1)[None].double())[0].permute(1, 2, 0).numpy()
            error = np.abs(found(lr) - expected)
            largest = max(largest, float(np.where(np.isfinite(error), error, np.inf).max() / np.abs(expected).max()))
    return largest


def check_waiting(emulator: Emulator) -> None:
    """A thread that waits sleeps until the last one wakes it; one whose partners never come leaves when told to.

    Raises AssertionError.
    """
    memory, layers = _shared_memory(), 3
    program = memory.allocate(8 * layers * len(Emitter.fields))  # zeros: layers without tiles
    for late in (True, False):
        sync = memory.allocate(8 * (1 + 2 * layers)).view(np.int64)
        before = [emulator.count(what) for what in (WAITS, WAKES)]
        arguments = (program.ctypes.data, layers, sync.ctypes.data, memory.allocate(64).ctypes.data, 2)
        asked = [emulator.ask(_RUN, *arguments)]
        while emulator.count(WAITS) == before[0]:
            time.sleep(0.01)
        assert not asked[0].done()
        if late:
            asked.append(emulator.ask(_RUN, *arguments))
        else:
            sync[0] = 1
        for one in asked:
            one.result(timeout=60)
        assert emulator.count(WAKES) - before[1] == (layers if late else 0)
        assert sync[2::2].tolist() == ([2] * layers if late else [1, 0, 0])
    assert emulator.count(FAILURES) == 0


# --- training -------------------------------------------------------------------------------------------------------


class EmulatedMachine:
    """What `training` needs of its machine. Tensors are copied to the shared memory and back."""

    shape = NEON
    constants = training._Machine.constants

    def __init__(self, emulator: Emulator, threads: int) -> None:
        self._emulator, self._threads = emulator, threads
        self._memory, self._constants = _shared_memory(), dict[float, Tensor]()
        self._scratch = self._memory.allocate(threads * _TRAINING_SCRATCH)

    def run(self, program: training._Program) -> None:
        storages = {s.data_ptr(): s for s in (tensor.untyped_storage() for tensor in program._held)}
        copies = {first: self._memory.copy(first, storage.nbytes()) for first, storage in storages.items()}
        rows = np.array(program._steps, np.int64)
        for place in map(FIELDS.index, TrainingEmitter.pointers):
            for row in rows:
                for first, storage in storages.items():
                    if first <= row[place] < first + storage.nbytes():
                        row[place] += copies[first] - first
                        break
                else:
                    assert not row[place], "an address of no tensor"
        sync = self._memory.allocate(8 * (1 + 2 * len(rows)))
        values = {
            "program": self._memory.copy(rows.ctypes.data, rows.nbytes), "steps": len(rows), "sync": sync.ctypes.data,
            "scratch": self._scratch.ctypes.data, "scratch_bytes": _TRAINING_SCRATCH,
        }  # fmt: skip
        team = np.array([values.get(name, 0) for name in TEAM], np.int64)
        self._emulator.ask(_TEAM, self._memory.copy(team.ctypes.data, team.nbytes), self._threads).result()
        for first, storage in storages.items():
            ctypes.memmove(first, copies[first], storage.nbytes())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution, 64 to 32": (lambda: nn.Conv2d(64, 32, 3, padding=1), (2, 64, 21, 30)),
    "the same with LeakyReLU": (lambda: ActivatedConv2d(32, 96, 3, padding=1), (1, 32, 35, 37)),
    "RRDBNet": (lambda: RRDBNet(features=32, blocks=1), (2, 3, 21, 22)),
}


def compare_training(emulator: Emulator, layer: nn.Module, size: tuple[int, ...], threads: int) -> float:
    """The largest distance of the output and the gradients to PyTorch's in fp64, relative to their norm."""
    network = _strong(nn.Sequential(layer)).to(memory_format=torch.channels_last)
    x = torch.rand(size)
    expected = _results(copy.deepcopy(network).double(), x.double())
    with _emulated(emulator, threads):
        training.accelerate(network)
        found = _results(network, x)
    return max(float((one.double() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@contextlib.contextmanager
def _emulated(emulator: Emulator, threads: int) -> Iterator[None]:
    machine = EmulatedMachine(emulator, threads)
    with (
        patch.object(training, "_machine", lambda: machine),
        patch.object(training._Program, "run", lambda program: machine.run(program)),
    ):
        yield


def _results(network: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = network(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = [out.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]
    return [one for one in found if one is not None]


def _strong(network: nn.Module) -> nn.Module:
    """With weights as strong as in trained networks; ESRGAN's own beginning is weak."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, 0.2)
                if layer.bias is not None:
                    layer.bias.uniform_(-0.1, 0.1)
            if isinstance(layer, nn.PReLU):
                layer.weight.uniform_(-0.5, 1.5)
    return network


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if lacking := missing():
        raise SystemExit(f"not found: {lacking}")
    print("| what | threads | largest error | seconds |\n|---|---|---|---|")

    def show(what: str, threads: int, compare: Callable[[], float]) -> None:
        started = time.perf_counter()
        print(f"| {what} | {threads} | {compare():.1e} | {time.perf_counter() - started:.0f} |", flush=True)

    with Emulator() as emulator:
        for (name, network), threads in itertools.product(NETWORKS.items(), (1, THREADS)):
            show(name, threads, lambda: compare_network(emulator, network(), SIZES, threads))  # noqa: B023
        check_waiting(emulator)
        sleeps, wakes, failures = (emulator.count(what) for what in (WAITS, WAKES, FAILURES))
        print(f"threads slept {sleeps} times, woke others {wakes} times; {failures} calls failed")
    with Emulator(TrainingEmitter) as emulator:
        for (name, (layer, size)), threads in itertools.product(LAYERS.items(), (1, THREADS)):
            show(f"training: {name}", threads, lambda: compare_training(emulator, layer(), size, threads))  # noqa: B023
        print(f"{emulator.count(FAILURES)} calls failed")


if __name__ == "__main__":
    main()
