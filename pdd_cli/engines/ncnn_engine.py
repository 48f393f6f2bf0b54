"""The ncnn engine: RRDBNet and SRVGGNetCompact on the CPU or, through Vulkan, on a GPU of any vendor."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.engines.base import FloatArray, Usable, pad_to_size, round_images, spec_of
from pdd_cli.errors import InputError, OutOfMemory
from pdd_cli.gpus import vulkan_devices
from pdd_cli.imaging.image import Array, to_float
from pdd_cli.runtime import Precision, Runtime, convert_memory_errors, usable_cpus
from pdd_cli.weights.ncnn import write_network
from pdd_cli.weights.wiring import wiring_of

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel

_OUT_OF_MEMORY = -100  # returned by ncnn


class NcnnEngine:
    """ncnn on the CPU in fp32, or on a Vulkan device in fp32 or fp16.

    `model`: a loaded or an exported model. Raises InputError if ncnn isn't installed, the device isn't one of these, or
    the model is another one; RuntimeError if the exported bytes aren't an ncnn model.
    """

    name = "ncnn"

    def __init__(self, model: SRModel | Usable, runtime: Runtime) -> None:
        check_ncnn()
        allowed = {"cpu": ("fp32",), "vulkan": ("fp32", "fp16")}.get(runtime.device_type, ())
        if runtime.precision not in allowed:
            raise InputError(
                f"--engine ncnn computes in fp32 on a CPU, in fp16 or fp32 on a Vulkan device, not on {runtime}",
                "Add --device cpu or vulkan:0, and leave out --precision.",
            )
        if isinstance(model, Usable):
            self.model, self.weights_sha256 = model.spec, model.weights_sha256
            self.bytes_per_pixel = model.bytes_per_pixel
            self._exported = model.exported
        else:
            from pdd_cli.engines.torch_engine import bytes_per_pixel
            from pdd_cli.models.loading import state_sha256

            self.model, self.weights_sha256 = spec_of(model), state_sha256(model.module.state_dict())
            self._exported, self.bytes_per_pixel = _convert(model), bytes_per_pixel(model)
        self.runtime = runtime
        self.batch_pixels = 0
        self._fast = self._open(runtime.precision)
        self._exact = self._fast if runtime.precision == "fp32" else None

    def export(self) -> Usable:
        return Usable(self.model, self.weights_sha256, self.bytes_per_pixel, self._exported)

    @convert_memory_errors()
    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        if exact and self._exact is None:
            self._exact = self._open("fp32")
        net = self._exact if exact else self._fast
        sr = np.stack([self._infer(net, image).transpose(1, 2, 0) for image in lr])
        return sr.transpose(0, 3, 1, 2)

    @convert_memory_errors()
    def run_rounded(self, lr: Array) -> Array | None:
        return round_images((self._infer(self._fast, to_float(image.transpose(2, 0, 1))) for image in lr), lr.dtype)

    def close(self) -> None:
        for net in {id(net): net for net in (self._fast, self._exact) if net is not None}.values():
            net.clear()
        self._fast = self._exact = None
        self._exported = b""

    def _infer(self, net: Any, lr: FloatArray) -> FloatArray:
        """Upscale (C, h, w) to (C, h*scale, w*scale)."""
        import ncnn

        height, width = lr.shape[1:]
        lr = pad_to_size(lr, self.model)
        channels, rows, columns = lr.shape
        image = ncnn.Mat(columns, rows, channels)
        if image.empty():
            raise OutOfMemory(f"ncnn: no memory for an image of {columns}x{rows} pixels")
        np.asarray(image)[:] = lr  # ncnn pads planes, so it can't use the array itself
        extractor = net.create_extractor()
        code = extractor.input("data", image)
        if code == 0:
            code, output = extractor.extract("output")
        if code == _OUT_OF_MEMORY:
            raise OutOfMemory(f"ncnn: out of memory for an image of {columns}x{rows} pixels")
        if code != 0:
            raise RuntimeError(f"ncnn: error {code} for an image of {columns}x{rows} pixels on {self.runtime}")
        scale = self.model.scale
        sr: FloatArray = np.array(output, np.float32)
        return sr[:, : height * scale, : width * scale]

    def _open(self, precision: Precision) -> Any:
        """An ncnn.Net with the weights."""
        import ncnn

        param, separator, weights = self._exported.partition(b"\0")
        net = ncnn.Net()
        net.opt.num_threads = usable_cpus()
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = precision == "fp16"
        # Sums in fp16 lose much of the precision and overflow; realesrgan-ncnn-vulkan doesn't use them either.
        net.opt.use_fp16_arithmetic = False
        if self.runtime.device_type == "vulkan":
            net.opt.use_vulkan_compute = True
            net.set_vulkan_device(vulkan_index(self.runtime.device_name))
        with tempfile.TemporaryDirectory(prefix="pdd-ncnn-") as folder:
            path = Path(folder, "weights.bin")
            path.write_bytes(weights)
            # ncnn reads only the names of files.
            if not separator or net.load_param_mem(param.decode()) or net.load_model(str(path)):
                raise RuntimeError("not an ncnn model")
        return net


def check_ncnn() -> None:
    """Raise InputError unless ncnn is installed."""
    if find_spec("ncnn") is None:
        raise InputError(
            "--engine ncnn needs a package that isn't installed: ncnn", "Run: pip install 'pdd-cli[vulkan]'"
        )


def vulkan_index(device_name: object) -> int:
    """The number of the Vulkan device with this name (`vulkan:N`). Raises ValueError if there is none."""
    number = str(device_name).partition(":")[2] or "0"
    if not number.isdecimal() or int(number) >= len(vulkan_devices()):
        raise ValueError(f"no Vulkan device {device_name}")
    return int(number)


def _convert(model: SRModel) -> bytes:
    """The `.param`, a zero byte and the `.bin` in fp32. Raises InputError for other architectures."""
    state = {key: value.detach().float().cpu().numpy() for key, value in model.module.state_dict().items()}
    wiring = wiring_of(state)
    if wiring is None:
        raise InputError(
            f"--engine ncnn can't compute this {model.architecture} model: only RRDBNet and SRVGGNetCompact",
            "Use --engine auto, or --engine onnx.",
        )
    param, weights = write_network(wiring, state, half=False)
    return param.encode() + b"\0" + weights
