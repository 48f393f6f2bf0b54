"""What computes a forward pass: PyTorch, or OpenVINO on a CPU."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pdd_cli.device import Runtime
from pdd_cli.errors import InputError
from pdd_cli.models.loading import SRModel

FloatArray = npt.NDArray[np.float32]
EngineChoice = Literal["auto", "torch", "openvino"]

# The mean square error against PyTorch's fp32, as a share of the output's variance, that counts as rounding in fp32 …
_ROUNDING = 1e-6
# … and how many times PyTorch's own error in a lower precision another engine's may be in the same one.
_ALLOWED = 2.0


class Engine(Protocol):
    """Computes the forward pass of one model."""

    name: str
    model: SRModel
    runtime: Runtime

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        """(N, in_channels, h, w) in 0..1 to (N, out_channels, h*scale, w*scale); `exact` computes in fp32."""
        ...


class TorchEngine:
    """PyTorch in the runtime's precision, channels last."""

    name = "torch"

    def __init__(self, model: SRModel, runtime: Runtime) -> None:
        self.model = model
        self.runtime = runtime
        model.module.to(runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        runtime = Runtime(self.runtime.device, "fp32") if exact else self.runtime
        batch = torch.from_numpy(lr).to(runtime.device, memory_format=torch.channels_last)
        with torch.inference_mode(), runtime.autocast():
            return np.asarray(self.model.upscale(batch).float().cpu().contiguous().numpy())


class OpenVINOEngine:
    """OpenVINO on the CPU in the runtime's precision, for any size of image.

    Raises InputError when OpenVINO isn't installed, the runtime isn't a CPU, or the model can't be converted.
    """

    name = "openvino"

    def __init__(self, model: SRModel, runtime: Runtime) -> None:
        if find_spec("openvino") is None:
            raise InputError("--engine openvino: OpenVINO isn't installed", "Run: pip install 'pdd-cli[openvino]'")
        if runtime.device.type != "cpu":
            raise InputError(f"--engine openvino runs on a CPU, not on {runtime.device}", "Add --device cpu.")
        self.model = model
        self.runtime = runtime
        self._converted = _convert(model)
        self._fast = replace(model, module=_Compiled(self._converted, runtime.precision))
        self._exact: SRModel | None = self._fast if runtime.precision == "fp32" else None

    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        if exact and self._exact is None:
            self._exact = replace(self.model, module=_Compiled(self._converted, "fp32"))
        model = self._exact if exact and self._exact is not None else self._fast
        with torch.inference_mode():
            return np.ascontiguousarray(model.upscale(torch.from_numpy(lr)).numpy())


def choose_engine(model: SRModel, runtime: Runtime, choice: EngineChoice) -> Engine:
    """The engine for `--engine`: auto is OpenVINO on a CPU where it is installed and agrees with PyTorch, else PyTorch.

    OpenVINO is the faster of the two on the CPU measured (docs/upscale.md); whether it computes the same is checked
    here for the very model, on noise.
    """
    if choice == "openvino":
        return OpenVINOEngine(model, runtime)
    if choice == "auto" and runtime.device.type == "cpu" and find_spec("openvino") is not None:
        try:
            engine = OpenVINOEngine(model, runtime)
        except InputError:
            return TorchEngine(model, runtime)
        if _agrees(engine):
            return engine
    return TorchEngine(model, runtime)


def bytes_per_pixel(model: SRModel) -> int:
    """Bytes of fp32 activations that a forward pass holds at once, per LR pixel: an estimate from a small one.

    The largest input and output of any one layer, twice: what is upsampled, concatenated or kept for a skip
    connection stands beside them.
    """
    side = max(16, model.size_minimum)
    largest = 0

    def record(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        nonlocal largest
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        largest = max(largest, sum(tensor.numel() for tensor in tensors) * 4)

    leaves = [module for module in model.module.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(record) for module in leaves]
    device = next(model.module.parameters()).device
    try:
        with torch.inference_mode():
            model.upscale(torch.zeros(1, model.in_channels, side, side, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return -(-2 * largest // side**2)


class _Compiled(nn.Module):
    """A converted network, compiled for the CPU in one precision, in the place of the PyTorch module."""

    def __init__(self, converted: Any, precision: str) -> None:
        super().__init__()
        import openvino

        hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
        settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        self._request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def forward(self, batch: Tensor) -> Tensor:
        self._request.start_async([np.ascontiguousarray(batch.numpy())])
        try:
            # In small waits, between which Python answers Ctrl-C.
            while not self._request.wait_for(100):
                pass
        except BaseException:
            self._request.cancel()
            raise
        return torch.from_numpy(np.array(self._request.get_output_tensor(0).data, np.float32))


def _convert(model: SRModel) -> Any:
    import openvino

    side = -(-max(32, model.size_minimum) // model.size_multiple) * model.size_multiple
    example = torch.zeros(1, model.in_channels, side, side)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace's, about its own future
            converted = openvino.convert_model(model.module, example_input=example)
            converted.reshape([-1, model.in_channels, -1, -1])
    except Exception as error:  # whatever tracing and conversion raise for an operation that they don't know
        raise InputError(
            f"--engine openvino: can't convert this {model.architecture} model", "Use --engine torch."
        ) from error
    return converted


def _agrees(engine: Engine) -> bool:
    """Whether `engine` is as near to PyTorch's fp32 as PyTorch is in its precision.

    On noise of two sizes: the second tells a conversion that was frozen to one size.
    """
    model, runtime = engine.model, engine.runtime
    same, full = TorchEngine(model, runtime), TorchEngine(model, Runtime(runtime.device, "fp32"))
    generator = np.random.default_rng(0)
    multiple = model.size_multiple
    for side in (max(24, model.size_minimum), max(40, model.size_minimum + 8)):
        side = -(-side // multiple) * multiple
        lr = generator.random((1, model.in_channels, side, side), np.float32)
        try:
            result, own, expected = engine.run(lr), same.run(lr), full.run(lr)
        except RuntimeError:
            return False
        allowed = max(_ROUNDING * float(expected.var()), _ALLOWED * _error(own, expected), 1e-14)
        if not _error(result, expected) <= allowed:  # NaN isn't either
            return False
    return True


def _error(result: FloatArray, expected: FloatArray) -> float:
    """Mean square error."""
    return float(np.mean((result - expected) ** 2))
