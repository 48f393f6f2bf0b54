"""What the benchmarks share: the machine described, its matrix products timed, variants timed in turn, a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pdd_cli.runtime import available_cpus, cpu_has_fast_bf16

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
_SIDE = 2048


@dataclass(frozen=True)
class Timing:
    """Seconds of a variant over its rounds, the first ones left out; `cpu` counts all threads of this process."""

    median: float
    least: float
    most: float
    cpu: float

    def of_each(self, count: int) -> Timing:
        """Of one of `count` things that were done at once."""
        return Timing(*(value / count for value in astuple(self)))


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, what is installed, and the TFLOP/s of a square matrix product here and now."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        pass
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _FLAGS if f" {flag} " in f"{flags} "],
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "openvino", "spandrel")},
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    dtypes = {"fp32": torch.float32}
    if device.type != "cpu" or (cpu_has_fast_bf16() and "ONEDNN_MAX_CPU_ISA" not in os.environ):
        dtypes["bf16"] = torch.bfloat16  # which takes minutes elsewhere
    if device.type == "cuda":
        dtypes["fp16"] = torch.float16
    found["matmul_tflops"] = {name: round(matmul_tflops(device, dtype), 3) for name, dtype in dtypes.items()}
    return found


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of ten products of 2048 x 2048 matrices (8192 on a GPU)."""
    side = _SIDE if device.type == "cpu" else 4 * _SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[0] for _ in range(11)]
    return 2 * side**3 / min(seconds[1:]) / 1e12


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of all this process's threads, until the device has done `call`."""
    wait(device)
    started, cpu = time.perf_counter(), time.process_time()
    call()
    wait(device)
    return time.perf_counter() - started, time.process_time() - cpu


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    variants: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time the variants one after the other, `rounds` times over: what slows the machine slows them alike."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, call in variants.items():
            seconds = timed(call, device)
            if number >= warm_up:
                taken[name].append(seconds)
    return {name: summary(values) for name, values in taken.items()}


def summary(taken: Sequence[tuple[float, float]]) -> Timing:
    """Of (seconds, CPU seconds) of several rounds."""
    clock = [seconds for seconds, _ in taken]
    return Timing(statistics.median(clock), min(clock), max(clock), statistics.median(cpu for _, cpu in taken))


def show(title: str, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print the rows as a Markdown table, then everything as one line of JSON."""
    print(f"\n{title}\n{', '.join(f'{key} {_text(value)}' for key, value in machine.items())}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |")
    print("\n" + json.dumps({"benchmark": title, "machine": machine, "rows": rows, **more}, default=str), flush=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return " / ".join(f"{key} {_text(one)}" for key, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
