"""The ONNX engine: ONNX Runtime on the CPU, or on a GPU with one of its execution providers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.engines.base import FloatArray, Usable, pad_to_size, round_images, spec_of
from pdd_cli.errors import InputError, PddError
from pdd_cli.gpus import onnx_providers
from pdd_cli.imaging.image import Array, to_float
from pdd_cli.runtime import Precision, Runtime, convert_memory_errors

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel
    from pdd_cli.models.onnx_model import OnnxGraph


class OnnxEngine:
    """ONNX Runtime in fp32 on the CPU, in fp32 or fp16 on a GPU.

    `model`: a loaded model of any format, also an ONNX file, or an exported model. Raises InputError if a package isn't
    installed, the model can't be exported, or ONNX Runtime can't use the device; RuntimeError if the exported bytes
    aren't a graph.
    """

    name = "onnx"

    def __init__(self, model: SRModel | Usable, runtime: Runtime) -> None:
        check_onnxruntime(convert=False)
        self.runtime = runtime
        self.batch_pixels = 0
        if isinstance(model, Usable):
            self.model, self.weights_sha256 = model.spec, model.weights_sha256
            self.bytes_per_pixel = model.bytes_per_pixel
            self._source: str | bytes = model.exported
        else:
            from pdd_cli.engines.torch_engine import bytes_per_pixel
            from pdd_cli.models.loading import state_sha256
            from pdd_cli.models.onnx_model import OnnxNetwork, assumed_bytes_per_pixel

            self.model, self.weights_sha256 = spec_of(model), state_sha256(model.module.state_dict())
            if isinstance(model.module, OnnxNetwork):
                self._source, self.bytes_per_pixel = str(model.module.path), assumed_bytes_per_pixel(model)
            else:
                check_onnxruntime()
                self._source, self.bytes_per_pixel = _convert(model), bytes_per_pixel(model)
        self._fast: OnnxGraph | None = self._open(runtime.precision)
        self._exact = self._fast if runtime.precision == "fp32" else None

    def export(self) -> Usable:
        assert isinstance(self._source, bytes)
        return Usable(self.model, self.weights_sha256, self.bytes_per_pixel, self._source)

    @convert_memory_errors()
    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        if exact and self._exact is None:
            self._exact = self._open("fp32")
        graph = self._exact if exact else self._fast
        sr = np.stack([self._infer(graph, image).transpose(1, 2, 0) for image in lr])
        return sr.transpose(0, 3, 1, 2)

    @convert_memory_errors()
    def run_rounded(self, lr: Array) -> Array | None:
        return round_images((self._infer(self._fast, to_float(image.transpose(2, 0, 1))) for image in lr), lr.dtype)

    def close(self) -> None:
        self._fast = self._exact = None
        self._source = b""

    def _infer(self, graph: OnnxGraph | None, lr: FloatArray) -> FloatArray:
        """Upscale (C, h, w) to (C, h*scale, w*scale)."""
        assert graph is not None, "closed"
        height, width = (side * self.model.scale for side in lr.shape[1:])
        return graph.run(pad_to_size(lr, self.model)[None])[0, :, :height, :width]

    def _open(self, precision: Precision) -> OnnxGraph:
        from pdd_cli.models.onnx_model import OnnxGraph, open_session

        source = self._source
        kind, _, number = str(self.runtime.device_name).partition(":")
        provider = "CPUExecutionProvider" if kind == "cpu" else onnx_providers().get(kind, kind)
        try:
            if precision == "fp16":
                source = _halved(source)
            return OnnxGraph(open_session(source, provider, int(number or 0)))
        except Exception as error:  # its exceptions have no common class
            if kind == "cpu":
                raise RuntimeError(str(error)) from error
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"--engine onnx --device {self.runtime.device_name}: {why}", "Use another device, such as --device cpu."
            ) from error


def check_onnxruntime(*, convert: bool = True) -> None:
    """Raise InputError unless ONNX Runtime, and with `convert` onnx, are installed."""
    needed = ("onnxruntime", "onnx") if convert else ("onnxruntime",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f"--engine onnx needs a package that isn't installed: {', '.join(missing)}",
            "Run: pip install 'pdd-cli[onnx]'",
        )


def _convert(model: SRModel) -> bytes:
    from pdd_cli.models.onnx_graph import onnx_graph

    try:
        return onnx_graph(model, {})
    except PddError as error:
        raise InputError(f"--engine onnx: {error.message}", "Use --engine torch.") from error


def _halved(source: str | bytes) -> bytes:
    """The graph in fp16, with input and output in fp32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    halved: Any = convert_float_to_float16(graph, keep_io_types=True)
    return bytes(halved.SerializeToString())
