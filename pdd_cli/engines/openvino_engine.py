"""The OpenVINO engine for CPUs. Models are converted from a PyTorch trace."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from pdd_cli.engines.base import FloatArray, Usable, pad_to_size, round_images, spec_of
from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, to_float
from pdd_cli.runtime import Precision, Runtime, available_cpus, convert_memory_errors, usable_cpus

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel


class OpenVINOEngine:
    """OpenVINO on the CPU in the runtime's precision, for images of any size.

    `model`: a loaded or an exported model. Raises InputError if OpenVINO isn't installed, the runtime isn't a CPU, or
    the model can't be converted; RuntimeError if the exported bytes aren't an OpenVINO model.
    """

    name = "openvino"

    def __init__(self, model: SRModel | Usable, runtime: Runtime) -> None:
        if find_spec("openvino") is None:
            raise InputError("--engine openvino: OpenVINO isn't installed", "Run: pip install 'pdd-cli[openvino]'")
        if runtime.device_type != "cpu":
            raise InputError(f"--engine openvino runs on a CPU, not on {runtime.device_name}", "Add --device cpu.")
        if isinstance(model, Usable):
            self.model, self.weights_sha256 = model.spec, model.weights_sha256
            self.bytes_per_pixel = model.bytes_per_pixel
            self._source: Any = model.exported
        else:
            from pdd_cli.engines.torch_engine import bytes_per_pixel
            from pdd_cli.models.loading import state_sha256

            self.model, self.weights_sha256 = spec_of(model), state_sha256(model.module.state_dict())
            self._source, self.bytes_per_pixel = _convert(model), bytes_per_pixel(model)
        self.runtime = runtime
        self.batch_pixels = 0
        self._compiled = _compile(self._source, runtime.precision)
        self._fast = self._compiled.create_infer_request()
        self._exact = self._fast if runtime.precision == "fp32" else None

    def export(self) -> Usable:
        exported = bytes(self._compiled.export_model().getvalue())
        return Usable(self.model, self.weights_sha256, self.bytes_per_pixel, exported)

    @convert_memory_errors()
    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        if exact and self._exact is None:
            self._exact = _compile(self._source, "fp32").create_infer_request()
        sr = self._infer(self._exact if exact else self._fast, lr)
        # Copied, because the next call overwrites the output buffer.
        return np.array(sr.transpose(0, 2, 3, 1), np.float32, order="C").transpose(0, 3, 1, 2)

    @convert_memory_errors()
    def run_rounded(self, lr: Array) -> Array | None:
        return round_images(self._infer(self._fast, to_float(lr.transpose(0, 3, 1, 2))), lr.dtype)

    def close(self) -> None:
        self._source = self._compiled = self._fast = self._exact = None

    def _infer(self, request: Any, lr: FloatArray) -> FloatArray:
        """Return the network's output buffer for (N, C, h, w). The next call overwrites it."""
        height, width = lr.shape[-2:]
        request.start_async([np.ascontiguousarray(pad_to_size(lr, self.model))])
        try:
            # Short waits, so that Python can handle Ctrl-C in between.
            while not request.wait_for(100):
                pass
        except BaseException:
            request.cancel()
            raise
        sr: FloatArray = request.get_output_tensor(0).data
        return sr[..., : height * self.model.scale, : width * self.model.scale]


def try_openvino(model: SRModel, precision: Precision) -> bytes:
    """Convert and run the model; called in another process (`isolation.run_apart`)."""
    engine = OpenVINOEngine(model, Runtime("cpu", precision))
    side = model.size_minimum + model.lacking(model.size_minimum)
    for height, width in ((side, side), (side + 24, side + 8)):
        engine.run(np.zeros((1, model.in_channels, height, width), np.float32))
    return b""


def _compile(source: Any, precision: Precision) -> Any:
    """Compile an openvino.Model, or load the bytes of a compiled one, for images of any size."""
    import openvino

    hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if usable_cpus() < available_cpus():
        settings["INFERENCE_NUM_THREADS"] = usable_cpus()
    core = openvino.Core()
    if isinstance(source, bytes):
        return core.import_model(source, "CPU", settings)
    return core.compile_model(source, "CPU", settings)


def _convert(model: SRModel) -> Any:
    """Convert a network to an openvino.Model. Raises InputError if OpenVINO doesn't support an operation."""
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    side = -(-max(32, model.size_minimum) // model.size_multiple) * model.size_multiple
    example = torch.zeros(1, model.in_channels, side, side)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch.jit.trace warns about its deprecation
            # check_trace would trace and run it twice; the result is compared with PyTorch anyway.
            traced = torch.jit.trace(model.module, example, check_trace=False)
            # Not with openvino.convert_model, which tries to send telemetry.
            decoder = TorchScriptPythonDecoder(traced, example_input=(example,))
            frontend = FrontEndManager().load_by_framework("pytorch")
            converted = frontend.convert(frontend.load(decoder))
            converted.reshape([-1, model.in_channels, -1, -1])
    except Exception as error:  # tracing and conversion raise many types for unsupported operations
        raise InputError(
            f"--engine openvino: can't convert this {model.architecture} model", "Use --engine torch."
        ) from error
    return converted
