"""The Winograd engine: `inference.Network` behind the interface of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pdd_cli.engines.base import FloatArray, Usable, spec_of
from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, from_float, to_float
from pdd_cli.runtime import Runtime, convert_memory_errors
from pdd_cli.weights.wiring import wiring_of

if TYPE_CHECKING:
    from pdd_cli.models.loading import SRModel


class WinogradEngine:
    """Winograd's algorithm on the CPU, in fp32: for RRDBNet and SRVGGNetCompact.

    `model`: a loaded or an exported model. Raises InputError if the runtime isn't a CPU in fp32, there is no kernel for
    this CPU, or the model is another one; RuntimeError if the exported bytes aren't safetensors.
    """

    name = "winograd"

    def __init__(self, model: SRModel | Usable, runtime: Runtime) -> None:
        if runtime.device_type != "cpu" or runtime.precision != "fp32":
            raise InputError(
                f"--engine winograd computes in fp32 on a CPU, not on {runtime}", "Add --device cpu --precision fp32."
            )
        from pdd_cli.engines.winograd import inference, kernel

        compute = kernel.kernel()
        if compute is None:
            raise InputError("--engine winograd: this CPU has neither AVX2 nor NEON", "Use --engine auto.")
        if isinstance(model, Usable):
            self.model, self.weights_sha256 = model.spec, model.weights_sha256
            self._state = _loaded(model.exported)
        else:
            from pdd_cli.models.loading import state_sha256

            self.model, self.weights_sha256 = spec_of(model), state_sha256(model.module.state_dict())
            self._state = {
                key: value.detach().float().cpu().numpy() for key, value in model.module.state_dict().items()
            }
        wiring = wiring_of(self._state)
        try:
            if wiring is None:
                raise ValueError("neither RRDBNet nor SRVGGNetCompact")
            self._network = inference.Network(wiring, self._state, compute)
        except ValueError as error:
            raise InputError(
                f"--engine winograd can't compute this {self.model.architecture} model ({error})", "Use --engine auto."
            ) from error
        self.bytes_per_pixel = self._network.bytes_per_pixel
        self.runtime = runtime
        self.batch_pixels = 0

    def export(self) -> Usable:
        from safetensors.numpy import save

        return Usable(self.model, self.weights_sha256, self.bytes_per_pixel, bytes(save(self._state)))

    @convert_memory_errors()
    def run(self, lr: FloatArray, *, exact: bool = False) -> FloatArray:
        images, _, height, width = lr.shape
        scale = self.model.scale
        found = np.empty((images, height * scale, width * scale, self.model.out_channels), np.float32)
        for image, target in zip(lr.transpose(0, 2, 3, 1), found, strict=True):
            target[:] = self._infer(image)
        return found.transpose(0, 3, 1, 2)

    @convert_memory_errors()
    def run_rounded(self, lr: Array) -> Array | None:
        found = []
        for image in lr:
            sr = self._infer(to_float(image))
            try:
                found.append(from_float(sr, 8 * lr.itemsize))
            except ValueError:
                return None
        return np.stack(found)

    def close(self) -> None:
        self._network.close()
        self._state = {}

    def _infer(self, lr: FloatArray) -> FloatArray:
        """Upscale (h, w, C) to (h*scale, w*scale, C). The next call overwrites the result."""
        height, width = lr.shape[:2]
        bottom, right = self.model.padding(height, width)
        if bottom or right:
            lr = np.pad(lr, ((0, bottom), (0, right), (0, 0)), mode="edge")
        return self._network(lr)[: height * self.model.scale, : width * self.model.scale]


def _loaded(exported: bytes) -> dict[str, FloatArray]:
    """Read safetensors. Raises RuntimeError for other bytes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(exported))
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error
