"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3) on CPUs: see README.md.

Kernels are generated with llvmlite and compiled for the CPU that runs them.
"""

from __future__ import annotations

import platform

from pdd_cli.runtime import Runtime, cpu_has_amx


def winograd_pays(runtime: Runtime) -> bool:
    """Whether Winograd's algorithm in fp32 is faster than convolutions in the runtime's precision, as measured on x86.

    Only bf16 products with AMX are faster than it.
    """
    if runtime.device_type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return runtime.precision == "fp32" or not cpu_has_amx()


def winograd_may_pay(runtime: Runtime) -> bool:
    """Whether Winograd's algorithm could be faster, so that its results and its time are worth a comparison.

    The kernel for ARM computes what PyTorch does in an emulator of Linux on ARM (benchmarks/robustness/arm.py), but its
    speed has not been measured. Training has no such comparison, and doesn't use it there.
    """
    return runtime.device_type == "cpu" and (platform.system(), platform.machine()) == ("Linux", "aarch64")
