"""Super-resolution models in ONNX files, and the graphs of ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pdd_cli.errors import InputError
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import usable_cpus

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)  # of which the sides of images may have to be multiples
_TRIAL_SIDE = 17
# A graph doesn't tell the memory of its feature maps: two maps of this many channels at output size are assumed.
_ASSUMED_CHANNELS = 128
_OTHERS = "Or use the .pth or .safetensors file from which it was made."


class OnnxGraph:
    """A session of ONNX Runtime whose graph has one input and one output. Half-precision graphs are converted to."""

    def __init__(self, session: Any) -> None:
        (source,) = session.get_inputs()
        self._session, self._input = session, source.name
        self._dtype = np.float16 if source.type == "tensor(float16)" else np.float32

    def run(self, lr: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The output for one image (1, C, h, w)."""
        (sr,) = self._session.run(None, {self._input: np.ascontiguousarray(lr, self._dtype)})
        return np.asarray(sr, np.float32)


def open_session(graph: str | bytes, provider: str = "CPUExecutionProvider", number: int = 0) -> Any:
    """A session for a graph (a file or its content) on the device `number` of an execution provider.

    ONNX Runtime falls back to the CPU without an exception. Raises RuntimeError then.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal only: errors are also raised as exceptions
    options.intra_op_num_threads = usable_cpus()
    if provider == "DmlExecutionProvider":  # as its documentation demands
        options.enable_mem_pattern = False
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    settings = {"device_id": str(number)} if number else {}
    providers = [(provider, settings), *(["CPUExecutionProvider"] if provider != "CPUExecutionProvider" else [])]
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime can't start its {provider}: a driver or library of it is missing")
    return session


class OnnxNetwork(nn.Module):
    """The graph of an ONNX Runtime session: (N, C, h, w) to (N, C, h*scale, w*scale), one image after the other."""

    def __init__(self, session: Any, path: Path) -> None:
        super().__init__()
        self.graph, self.path = OnnxGraph(session), path
        # They make the `state_sha256` and the device of the module.
        sha256 = hashlib.sha256(path.read_bytes()).digest()
        self.register_buffer("sha256", torch.tensor(list(sha256), dtype=torch.uint8))
        self.register_parameter("unused", nn.Parameter(torch.zeros(1), requires_grad=False))

    def forward(self, lr: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(self.graph.run(image[None])) for image in lr.numpy()])


def load_onnx_model(path: Path) -> SRModel:
    """Load the graph, from one image (1, C, height, width), RGB or gray in 0..1, to one image.

    Raises InputError if ONNX Runtime isn't installed or can't load the graph, or if the graph isn't such a model.
    """
    if find_spec("onnxruntime") is None:
        raise InputError(
            f"{path}: an ONNX model needs a package that isn't installed: onnxruntime",
            "Run: pip install 'pdd-cli[onnx]'",
        )
    session = _session(path)
    channels = _channels(session, path)
    network = OnnxNetwork(session, path)
    scale, multiple, out_channels = _measure(network, channels, path)
    metadata = session.get_modelmeta().custom_metadata_map
    if (stated := metadata.get("scale")) and stated != str(scale):
        raise InputError(f"{path}: its metadata say x{stated}, but its output is x{scale}", "The file is damaged.")
    return SRModel(
        module=network.eval(),
        scale=scale,
        in_channels=channels,
        out_channels=out_channels,
        architecture=f"ONNX {metadata['architecture']}" if "architecture" in metadata else "ONNX",
        size_multiple=multiple,
        size_minimum=multiple,
    )


def assumed_bytes_per_pixel(model: SRModel) -> int:
    """A cautious estimate of the memory of the graph's activations, in bytes per LR pixel."""
    return 2 * _ASSUMED_CHANNELS * model.scale**2 * 4


def _session(path: Path) -> Any:
    import onnxruntime

    try:
        return open_session(str(path))
    except Exception as error:  # its exceptions have no common class
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} can't load this graph: {why}",
            f"Export it again with a standard opset, such as 17, or update onnxruntime. {_OTHERS}",
        ) from error


def _channels(session: Any, path: Path) -> int:
    """The number of channels. Raises InputError unless the graph takes one image of any size."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if inputs else []
    kinds = {one.type for one in (*inputs, *outputs)}
    if (len(inputs), len(outputs), len(shape)) != (1, 1, 4) or not kinds <= {"tensor(float)", "tensor(float16)"}:
        described = ", ".join(f"{one.name} {json.dumps(one.shape)} {one.type}" for one in (*inputs, *outputs))
        raise InputError(
            f"{path}: not a super-resolution model: pdd needs one image as input and one as output, in floats; "
            f"the graph has {described}"
        )
    batch, channels, height, width = shape
    if isinstance(height, int) or isinstance(width, int):
        raise InputError(
            f"{path}: the graph takes only images of {width}x{height} pixels",
            f"Export it with dynamic height and width, as `pdd export --to onnx` does. {_OTHERS}",
        )
    if batch not in (1, None) and isinstance(batch, int):
        raise InputError(f"{path}: the graph takes only {batch} images at once", f"Export it for one image. {_OTHERS}")
    return channels if isinstance(channels, int) else 3


def _measure(network: OnnxNetwork, channels: int, path: Path) -> tuple[int, int, int]:
    """The scale, the multiple that sides must be of, and the number of output channels, found with small images."""
    why = ""
    for multiple in _MULTIPLES:
        try:
            shapes = list(_shapes(network, channels, multiple))
        except Exception as error:  # its exceptions have no common class
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        scales = {(out[2] / size[0], out[3] / size[1]) for size, out in shapes}
        (horizontal, vertical), *others = scales
        if not others and horizontal == vertical and horizontal == int(horizontal) and shapes[0][1][1] in (1, 3):
            return int(horizontal), multiple, shapes[0][1][1]
        (height, width), out = shapes[0]
        why = f"of an image of {width}x{height} pixels it makes one of shape {list(out)}"
    raise InputError(
        f"{path}: not a super-resolution model with one whole-numbered scale: {why}",
        f"pdd needs a graph from (1, 3, height, width) to (1, 3, height*scale, width*scale). {_OTHERS}",
    )


def _shapes(network: OnnxNetwork, channels: int, multiple: int) -> Iterator[tuple[tuple[int, int], tuple[int, ...]]]:
    """Two sizes of images whose sides are odd multiples of `multiple`, and the shapes of the graph's output."""
    side = multiple * (-(-_TRIAL_SIDE // multiple) | 1)
    for height, width in ((side, side + 2 * multiple), (side + 2 * multiple, side)):
        sr = network.graph.run(np.full((1, channels, height, width), 0.5, np.float32))
        if sr.ndim != 4:
            raise ValueError(f"its output has the shape {list(sr.shape)}")
        yield (height, width), sr.shape
