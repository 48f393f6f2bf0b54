"""The engine of models in ONNX files: ONNX Runtime on the CPU."""

from __future__ import annotations

from functools import cached_property

from pdd_cli.engines.torch_engine import TorchEngine


class OnnxEngine(TorchEngine):
    """`TorchEngine` for a model whose module is an `OnnxNetwork`, which passes images to ONNX Runtime."""

    name = "onnx"

    @cached_property
    def bytes_per_pixel(self) -> int:
        from pdd_cli.models.onnx_model import assumed_bytes_per_pixel

        return assumed_bytes_per_pixel(self._model)
