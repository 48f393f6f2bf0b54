"""Device and precision, chosen once and passed on as one value."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from pdd_cli import system
from pdd_cli.errors import InputError, OutOfMemory
from pdd_cli.gpus import is_pytorch_device, vulkan_memory
from pdd_cli.system import available_cpus, cpu_features, free_memory, keep_freed_memory, resident_memory, usable_cpus

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["fp32", "bf16", "fp16"]

__all__ = [
    "Precision",
    "Runtime",
    "available_cpus",
    "available_memory",
    "choose_runtime",
    "convert_memory_errors",
    "cpu_has_amx",
    "cpu_has_fast_bf16",
    "is_out_of_memory",
    "keep_freed_memory",
    "peak_memory",
    "resident_memory",
    "to_channels_last",
    "usable_cpus",
]  # fmt: skip

# Device files of the GPU drivers that PyTorch can use on Linux: NVIDIA, Jetson, WSL and AMD.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")

# Bytes, of GPUs whose memory is not known.
_ASSUMED_GPU_MEMORY = 4 << 30


@dataclass(frozen=True)
class Runtime:
    """The device of a network and the precision of its convolutions (weights stay fp32).

    `device_name` is a device in PyTorch's notation, or for other engines vulkan:N or a device type of ONNX Runtime. It
    is text, so that PyTorch, which takes seconds to import, is imported only when needed.
    """

    device_name: str | torch.device
    precision: Precision

    def __post_init__(self) -> None:
        object.__setattr__(self, "device_name", str(self.device_name))

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.device_name)

    @property
    def device_type(self) -> str:
        """cpu, cuda, mps, vulkan or a device type of ONNX Runtime."""
        return str(self.device_name).split(":")[0]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast context for this precision; for fp32 a null context."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        import torch

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype)

    def __str__(self) -> str:
        return f"{self.device_name}, {self.precision}"


def choose_runtime(device: str = "auto", precision: str = "auto") -> Runtime:
    """Turn `--device` and `--precision` into a Runtime that works on this machine.

    `device`: auto, cpu, cuda, cuda:N or mps. `precision`: auto, fp32, bf16 or fp16. auto selects bf16 if the device
    computes it faster than fp32 (a CPU with AMX or AVX512-BF16, an NVIDIA GPU from Ampere on), else fp32.

    Raises InputError for a device that this machine doesn't have, and for fp16 on a CPU.
    """
    chosen = _choose_device(device)
    if precision == "auto":
        precision = "bf16" if _has_fast_bf16(chosen) else "fp32"
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: not a precision", "Use auto, fp32, bf16 or fp16.")
    if precision == "fp16" and chosen == "cpu":
        raise InputError("--precision fp16 doesn't run on a CPU", "Use auto, fp32 or bf16.")
    return Runtime(chosen, cast(Precision, precision))


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU has AMX-BF16 or AVX512-BF16; without them bf16 is slower than fp32."""
    return not cpu_features().isdisjoint(("amx_bf16", "amx-bf16", "avx512_bf16", "avx512bf16"))


def cpu_has_amx() -> bool:
    """Whether this CPU has AMX-BF16, which makes bf16 many times as fast as fp32."""
    return not cpu_features().isdisjoint(("amx_bf16", "amx-bf16"))


def available_memory(device: torch.device | str) -> int:
    """Bytes of memory that a computation can still use on `device`."""
    kind, _, number = str(device).partition(":")
    if kind == "vulkan":
        return vulkan_memory(int(number or 0))
    if kind == "cuda":
        import torch

        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info(device)
            return int(free)
    return free_memory() if kind in ("cpu", "mps") else min(free_memory(), _ASSUMED_GPU_MEMORY)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used so far: GPU memory for a GPU, else main memory."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return system.peak_memory()


@contextlib.contextmanager
def convert_memory_errors() -> Iterator[None]:
    """Convert the libraries' out-of-memory errors to OutOfMemory; also usable as a decorator."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from error


def to_channels_last(network: nn.Module, device: torch.device) -> None:
    """Move a network to the device, and its 4-D tensors to the memory format that convolutions compute fastest in.

    A network with the attribute `contiguous_only` keeps its format.
    """
    import torch

    network.to(device)
    if getattr(network, "contiguous_only", False):
        return
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the machine or the device ran out of memory.

    PyTorch on CPUs and OpenVINO raise a plain RuntimeError, so the error's text is checked, only here.
    """
    if isinstance(error, MemoryError) or "OutOfMemory" in str(error):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("not enough memory", "out of memory", "can't allocate memory", "bad_alloc", "failed to allocate")
    )


def _choose_device(name: str) -> str:
    if name == "cpu" or (name == "auto" and _has_no_gpu_driver()):
        return "cpu"
    if not is_pytorch_device(name):
        raise InputError(
            f"--device {name}: PyTorch can't use it; only `pdd upscale` and `pdd evaluate --weights` can",
            "Use auto, cpu, cuda, cuda:N or mps.",
        )
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


def _has_no_gpu_driver() -> bool:
    return sys.platform == "linux" and not any(Path(driver).exists() for driver in _GPU_DRIVERS)


def _has_fast_bf16(device: str) -> bool:
    if device == "cpu":
        return cpu_has_fast_bf16()
    import torch

    return device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
