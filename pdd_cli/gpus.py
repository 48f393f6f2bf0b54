"""GPUs that PyTorch need not support: Vulkan devices (through ncnn) and execution providers of ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

_KINDS = ("discrete GPU", "integrated GPU", "virtual GPU", "CPU")
# The providers of ONNX Runtime by the names that `--device` takes. `auto` tries them in this order.
_PROVIDERS = {
    "cuda": ("CUDAExecutionProvider",),
    "rocm": ("ROCMExecutionProvider", "MIGraphXExecutionProvider"),
    "directml": ("DmlExecutionProvider",),
    "coreml": ("CoreMLExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"),
}
# Distributions of ONNX Runtime with providers for GPUs; the plain one has only CoreML, on macOS.
_GPU_DISTRIBUTIONS = ("gpu", "directml", "rocm", "migraphx", "silicon", "trt-rtx", "windowsml")
ONNX_ONLY = frozenset(_PROVIDERS) - {"cuda"}
"""Device types that only ONNX Runtime knows."""


def is_pytorch_device(name: str) -> bool:
    """Whether `--device` names a device type of PyTorch, not one that only ncnn or ONNX Runtime has."""
    return name.partition(":")[0] not in {"vulkan", *ONNX_ONLY}


@dataclass(frozen=True)
class VulkanDevice:
    """A Vulkan device. A `kind` "CPU" is a software implementation, such as Mesa's lavapipe."""

    index: int
    name: str
    kind: str
    driver: str

    @property
    def is_gpu(self) -> bool:
        return self.kind != "CPU"

    def __str__(self) -> str:
        return f"vulkan:{self.index} ({self.name}, {'software on the CPU' if not self.is_gpu else self.kind})"


@functools.cache
def vulkan_devices() -> tuple[VulkanDevice, ...]:
    """The devices that ncnn finds; none without ncnn or a Vulkan driver."""
    if find_spec("ncnn") is None:
        return ()
    import ncnn

    with _quiet():  # ncnn prints the features of each device
        count = ncnn.get_gpu_count()
    devices = []
    for index in range(count):
        info = ncnn.get_gpu_info(index)
        kind = _KINDS[info.type()] if info.type() < len(_KINDS) else "GPU"
        devices.append(VulkanDevice(index, info.device_name(), kind, f"{info.vendor_id()}.{info.driver_version()}"))
    return tuple(devices)


def vulkan_memory(index: int) -> int:
    """Bytes of memory that a program may use on a Vulkan device."""
    import ncnn

    return int(ncnn.get_gpu_device(index).get_heap_budget()) << 20


def onnx_providers() -> dict[str, str]:
    """The GPU providers of the installed ONNX Runtime by device type; whether a GPU is there is not known."""
    if find_spec("onnxruntime") is None:
        return {}
    import onnxruntime

    installed = onnxruntime.get_available_providers()
    found: dict[str, str] = {}
    for device, names in _PROVIDERS.items():
        for name in names:
            if name in installed:
                found.setdefault(device, name)
    return found


def has_onnx_gpu_package() -> bool:
    """Whether a distribution of ONNX Runtime is installed that may find GPUs. Importing it takes most of a second."""
    return find_spec("onnxruntime") is not None and (
        sys.platform == "darwin" or any(_is_installed(f"onnxruntime-{kind}") for kind in _GPU_DISTRIBUTIONS)
    )


def _is_installed(distribution: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what libraries write to stderr."""
    sys.stderr.flush()
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
