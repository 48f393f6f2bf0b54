"""Choice of the device: `--engine`, `--device` and `--precision` together."""

from __future__ import annotations

from typing import cast

from pdd_cli.engines.ncnn_engine import check_ncnn, vulkan_index
from pdd_cli.engines.onnx_engine import check_onnxruntime
from pdd_cli.errors import InputError
from pdd_cli.gpus import ONNX_ONLY, onnx_providers, vulkan_devices
from pdd_cli.runtime import Precision, Runtime, choose_runtime
from pdd_cli.settings.base import EngineChoice

_DRIVERS = " A GPU needs a driver with Vulkan (Debian: mesa-vulkan-drivers)."


def choose_inference(engine: EngineChoice, device: str, precision: str) -> tuple[EngineChoice, Runtime]:
    """The engine that the options name, or that alone has the device, and the runtime.

    `--device vulkan:N` implies ncnn; `directml`, `coreml`, `rocm` and `tensorrt` imply onnx. These two engines compute
    in fp32 on the CPU, and by default in fp16 on a GPU. With `--device auto` the runtime is that of the CPU, and
    `select.open_engine` looks for a GPU.

    Raises InputError for a device that this machine doesn't have, which lists those that it has, or that the engine
    can't use, and for an engine that isn't installed.
    """
    kind = device.partition(":")[0]
    needed = "ncnn" if kind == "vulkan" else "onnx" if kind in ONNX_ONLY else None
    if needed is not None and engine not in ("auto", needed):
        raise InputError(
            f"--engine {engine} can't use --device {device}; --engine {needed} can", f"Add --engine {needed}."
        )
    engine = cast(EngineChoice, needed or engine)
    if engine == "ncnn":
        check_ncnn()
        return engine, Runtime(_ncnn_device(device), _precision(engine, device, precision))
    if engine == "onnx":
        check_onnxruntime(convert=False)
        return engine, Runtime(_onnx_device(device), _precision(engine, device, precision))
    try:
        return engine, choose_runtime(device, precision)
    except InputError as error:
        if device not in ("auto", "cpu"):
            error.hint = f"Devices here: {', '.join(devices_here())}."
        raise


def devices_here() -> list[str]:
    """The values of `--device` for this machine, with the names of the devices."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps (Apple GPU)")
    found += map(str, vulkan_devices())
    return found + [f"{device} (with --engine onnx)" for device in onnx_providers()]


def _ncnn_device(device: str) -> str:
    if device in ("auto", "cpu"):
        return "cpu"
    if device.partition(":")[0] == "vulkan":
        try:
            return f"vulkan:{vulkan_index(device)}"
        except ValueError:
            pass
    here = ", ".join(["cpu", *map(str, vulkan_devices())])
    raise InputError(
        f"--device {device}: ncnn finds no device of this name", f"Devices for --engine ncnn here: {here}.{_DRIVERS}"
    )


def _onnx_device(device: str) -> str:
    kind, _, number = device.partition(":")
    if device in ("auto", "cpu"):
        return "cpu"
    if kind in onnx_providers() and (number.isdecimal() or device == kind):
        return device
    here = ", ".join(["cpu", *onnx_providers()])
    raise InputError(
        f"--device {device}: the installed ONNX Runtime has no provider for it",
        f"Devices for --engine onnx here: {here}. Others need another package in place of onnxruntime, such as "
        "onnxruntime-gpu (cuda, tensorrt) or onnxruntime-directml.",
    )


def _precision(engine: str, device: str, precision: str) -> Precision:
    on_cpu = device in ("auto", "cpu")
    allowed = ("fp32",) if on_cpu else ("fp32", "fp16")
    if precision == "auto":
        return "fp32" if on_cpu else "fp16"
    if precision not in allowed:
        raise InputError(
            f"--engine {engine} computes in {' or '.join(allowed)} on --device {device}, not in {precision}",
            "Leave out --precision" + (", or name a GPU with --device." if on_cpu else "."),
        )
    return cast(Precision, precision)
