"""Facts about the installation and the machine, for bug reports. Nothing here uses the network."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pdd_cli.system import available_cpus, cpu_features, cpu_name, free_memory, usable_cpus
from pdd_cli.version import __version__

if TYPE_CHECKING:
    from pdd_cli.engines.select import Tried

Value = str | dict[str, str]

_PACKAGES = (
    "torch", "torchvision", "spandrel", "pyiqa", "numpy", "pillow", "av", "opencv-python", "llvmlite", "safetensors",
    "huggingface_hub", "openvino", "onnx", "onnxruntime", "ncnn", "triton", "pillow-heif", "pillow-jxl-plugin",
    "tensorboard",
)  # fmt: skip
# Instruction sets that engines or libraries use, by the names of Linux and LLVM.
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_vnni", "avx512vnni", "avx512_bf16", "avx512bf16",
    "amx_bf16", "amx-bf16", "amx_int8", "amx-int8", "neon", "asimd", "asimdhp", "bf16", "sve",
)  # fmt: skip
# Variables that pdd, or a library on its behalf, reads.
_VARIABLES = (
    "PDD_HOME", "PDD_MIRROR", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "TORCH_HOME",
    "PIP_INDEX_URL", "PIP_CONFIG_FILE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "no_proxy", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK",
)  # fmt: skip
_CODECS = ("libx264", "libx265", "libsvtav1", "prores_ks", "ffv1")


def examine() -> dict[str, Value]:
    """The facts by label, in the order in which they are shown. A fact that can't be found out is the reason."""
    probes: dict[str, Callable[[], Value]] = {
        "pdd": lambda: f"{__version__} in {Path(__file__).parent}",
        "Python": lambda: f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}",
        "system": platform.platform,
        "packages": _packages,
        "CPU": _cpu,
        "cores": lambda: f"{available_cpus()} available, {usable_cpus()} used",
        "memory": lambda: f"{free_memory() / 2**30:.1f} of {_total_memory() / 2**30:.1f} GiB free",
        "GPUs": _gpus,
        "OpenVINO devices": _openvino_devices,
        "Vulkan devices": _vulkan_devices,
        "ONNX Runtime": _onnx_providers,
        "auto, images": _engines,
        "auto, training": _training,
        "FFmpeg": _ffmpeg,
        "folders": _folders,
        "environment": _environment,
    }
    return {label: _probe(probe) for label, probe in probes.items()}


def _probe(probe: Callable[[], Value]) -> Value:
    """The value of a probe with ~ for the home folder, or the reason why there is none."""
    try:
        value = probe()
    except Exception as error:  # any library may fail in its own way; the other facts are still needed
        value = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
    return {key: _private(text) for key, text in value.items()} if isinstance(value, dict) else _private(value)


def _private(text: str) -> str:
    """`text` without the name of the user's home folder and without passwords in addresses."""
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=[/\\\s,:)]|$)", "~", text)
    return re.sub(r"(//)[^/@\s]*@", r"\1…@", text)


def _packages() -> Value:
    found, missing = {}, []
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    return found | ({"not installed:": ", ".join(missing)} if missing else {})


def _cpu() -> Value:
    features = cpu_features()
    return f"{cpu_name()}; {' '.join(flag for flag in _FEATURES if flag in features) or 'no vector instructions'}"


def _total_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _gpus() -> Value:
    import torch

    found = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.major}.{facts.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    built_for = (torch.version.cuda and f"CUDA {torch.version.cuda}") or torch.version.hip or "CPUs only"
    return found or f"none for PyTorch (built for {built_for})"


def _openvino_devices() -> Value:
    try:
        import openvino
    except ImportError:
        return "not installed"
    core = openvino.Core()
    return {name: str(core.get_property(name, "FULL_DEVICE_NAME")).strip() for name in core.available_devices}


def _vulkan_devices() -> Value:
    from importlib.util import find_spec

    from pdd_cli.gpus import vulkan_devices

    if find_spec("ncnn") is None:
        return "unknown without ncnn (pip install 'pdd-cli[vulkan]')"
    found = {}
    for one in vulkan_devices():
        note = "" if one.is_gpu else " (software, which auto doesn't take)"
        found[f"vulkan:{one.index}"] = f"{one.name}, {one.kind}{note}"
    return found or "none: no driver with Vulkan"


def _onnx_providers() -> Value:
    try:
        import onnxruntime
    except ImportError:
        return "not installed"
    return ", ".join(onnxruntime.get_available_providers())


def _engines() -> Value:
    """What `--engine auto` takes for a small RRDBNet with random weights."""
    import torch

    from pdd_cli.engines.select import try_engines
    from pdd_cli.models.loading import model_from_state
    from pdd_cli.models.rrdbnet import RRDBNet
    from pdd_cli.runtime import choose_runtime

    runtime = choose_runtime()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = RRDBNet(blocks=1).state_dict()
    tried = try_engines(model_from_state(state, origin="a test network"), runtime)
    taken = next(engine for engine in tried if not engine.problem)
    order = ", ".join(_place(engine) + (f" ({engine.problem})" if engine.problem else "") for engine in tried)
    return f"{taken.name} on {taken.runtime}: the first of {order} that can compute a test network as PyTorch does"


def _place(engine: Tried) -> str:
    return engine.name if engine.runtime.device_type == "cpu" else f"{engine.name} on {engine.runtime}"


def _training() -> Value:
    from pdd_cli.engines.winograd import winograd_pays
    from pdd_cli.runtime import choose_runtime

    runtime = choose_runtime()
    if runtime.device_type != "cpu":
        return f"torch on {runtime}"
    if not winograd_pays(runtime):
        return f"torch on {runtime}: winograd is slower in this precision, or isn't used on this kind of CPU"
    import torch  # noqa: F401 - loads the OpenMP library that the kernel uses

    from pdd_cli.engines.winograd.training import can_accelerate

    if can_accelerate():
        return f"winograd on cpu, fp32: faster here than PyTorch in {runtime.precision}"
    return f"torch on {runtime}: winograd finds no OpenMP threads of PyTorch, or no AVX2"


def _ffmpeg() -> Value:
    import av

    codecs = [name for name in _CODECS if name in av.codecs_available]
    libraries = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    return {"PyAV": av.__version__, **libraries, "encoders:": " ".join(codecs)}


def _folders() -> Value:
    import torch
    from huggingface_hub import constants

    from pdd_cli.weights.store import Store, cache_home

    store = Store.default()
    places = {
        "weights": store.root, "images": store.images, "downloads": store.downloads, "cache": cache_home(),
        "hub": Path(constants.HF_HUB_CACHE), "torch": Path(torch.hub.get_dir()),
    }  # fmt: skip
    return {name: f"{place} ({_size(place)})" for name, place in places.items()}


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "none"
    return f"{sum(_file_sizes(folder)) / 1e6:.1f} MB"


def _file_sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                yield 0 if path.is_symlink() else path.stat().st_size
            except OSError:  # deleted meanwhile
                continue


def _environment() -> Value:
    found = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if "HF_TOKEN" in found:
        found["HF_TOKEN"] = "(set)"
    return {name: re.sub(r"\?.*", "?…", text) for name, text in found.items()} or "none of the variables that pdd reads"
