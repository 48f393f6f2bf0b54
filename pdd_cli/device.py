"""Device and precision: chosen once, passed on as one value."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from pdd_cli.errors import InputError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]

# Without one of these Linux has no GPU that PyTorch could use: the drivers of NVIDIA, Jetson, WSL and AMD.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")


@dataclass(frozen=True)
class Runtime:
    """Where a network runs, and in which precision its convolutions are computed (weights stay fp32).

    `place`: a device by PyTorch's name. Importing PyTorch takes seconds, which a CPU doesn't always need.
    """

    place: str | torch.device
    precision: Precision

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", str(self.place))

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.place)

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return str(self.place).split(":")[0]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast context for this precision; for fp32 a context that does nothing."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        import torch

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.kind, dtype)

    def __str__(self) -> str:
        return f"{self.place}, {self.precision}"


def choose_runtime(device: str = "auto", precision: str = "auto") -> Runtime:
    """Turn `--device` and `--precision` into a Runtime that works on this machine.

    `device`: auto, cpu, cuda, cuda:N or mps. `precision`: auto, fp32, bf16 or fp16. auto takes bf16 where the device
    computes it faster than fp32 (a CPU with AMX or AVX512-BF16, a GPU from Ampere on) and fp32 elsewhere.

    Raises InputError for a device that this machine doesn't have, or fp16 on a CPU.
    """
    chosen = _choose_device(device)
    if precision == "auto":
        precision = "bf16" if _computes_bf16_fast(chosen) else "fp32"
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: not a precision", "Use auto, fp32, bf16 or fp16.")
    if precision == "fp16" and chosen == "cpu":
        raise InputError("--precision fp16 doesn't run on a CPU", "Use auto, fp32 or bf16.")
    return Runtime(chosen, cast(Precision, precision))


def cpu_computes_bf16_fast() -> bool:
    """Whether this CPU has AMX-BF16 or AVX512-BF16; without them bf16 is slower than fp32."""
    return cpu_has_amx() or "avx512_bf16" in _cpu_flags()


def cpu_has_amx() -> bool:
    """Whether this CPU has AMX-BF16, with which bf16 is many times as fast as fp32."""
    return "amx_bf16" in _cpu_flags()


def winograd_pays(runtime: Runtime) -> bool:
    """Whether Winograd's algorithm in fp32 is faster than convolutions in the runtime's precision.

    Only AMX multiplies in bf16 faster than it saves multiplications. ARM's kernel no ARM has run yet.
    """
    if runtime.kind != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return runtime.precision == "fp32" or not cpu_has_amx()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def available_cpus() -> int:
    """The logical cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def usable_cpus() -> int:
    """How many threads can run at once: on the available cores, fewer where a container is granted less time."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available_cpus(), math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # "max", or no such group
        return available_cpus()


def available_memory(device: torch.device | str) -> int:
    """Bytes that a computation may still take on `device`."""
    if str(device).startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of returning it to the system and asking for it anew.

    With glibc, which otherwise does so for what is larger than some MiB: every step of training would begin with the
    system zeroing hundreds of MiB.
    """
    try:
        configure = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # by the numbers of malloc.h
    configure(trim_threshold, 2**31 - 1)
    configure(mmap_threshold, 2**30)


def resident_memory() -> int:
    """Bytes of memory that this process holds now; 0 where the system doesn't tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on the GPU, else in memory; 0 where the system doesn't tell."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the memory of the machine or of the device ran out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("not enough memory", "out of memory", "can't allocate memory", "bad_alloc")
    )


def _choose_device(name: str) -> str:
    if name == "cpu" or (name == "auto" and _has_surely_no_gpu()):
        return "cpu"
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: not a device", "Use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise InputError(f"--device {name}: this machine has {count} CUDA devices", "Use --device cpu or auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: no Apple GPU here", "Use --device cpu or auto.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: not supported", "Use auto, cpu, cuda, cuda:N or mps.")
    return str(device)


def _has_surely_no_gpu() -> bool:
    return sys.platform == "linux" and not any(Path(driver).exists() for driver in _GPU_DRIVERS)


def _computes_bf16_fast(device: str) -> bool:
    if device == "cpu":
        return cpu_computes_bf16_fast()
    import torch

    return device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
