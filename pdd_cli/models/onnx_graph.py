"""Makes the ONNX graph of a model, and writes it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import BeforeRename, atomic_write, no_check
from pdd_cli.models.isolation import may_crash, run_apart
from pdd_cli.models.loading import SRModel
from pdd_cli.system import silenced

OPSET = 17
_HINT = "Choose another form, such as pth."
_MIN_PSNR = 60.0  # dB, of the output of the ONNX graph against that of PyTorch
LR_SIDES = ((32, 33), (33, 32), (17, 70), (70, 17), (64, 48))  # height, width of the test images


class _AnySize(nn.Module):
    """The model for any size: it pads the right and bottom by replication to a multiple, and crops the output.

    It has one input. PyTorch would make inputs of the network's optional arguments, too.
    """

    def __init__(self, model: SRModel) -> None:
        super().__init__()
        self.module = model.module
        self._model = model

    def forward(self, lr: Tensor) -> Tensor:
        multiple, scale = self._model.size_multiple, self._model.scale
        if multiple == 1:
            whole: Tensor = self.module(lr)
            return whole
        height, width = lr.shape[2], lr.shape[3]
        padded = F.pad(lr, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        sr: Tensor = self.module(padded)
        return sr[:, :, : height * scale, : width * scale]


def onnx_graph(model: SRModel, metadata: Mapping[str, str]) -> bytes:
    """The serialised graph from `lr` (N, C, h, w) to `sr` (N, C, h*scale, w*scale) for any h and w.

    h and w must be at least `model.size_minimum`. `metadata` becomes the graph's. Networks other than RRDBNet and
    SRVGGNetCompact are exported in another process, because some make PyTorch's exporter crash. Raises InputError if
    PyTorch can't export an operation.
    """
    if not may_crash(model):
        return graph_here(model, json.dumps(dict(metadata)))
    try:
        return run_apart(graph_here, model, json.dumps(dict(metadata)))
    except InputError as error:
        if error.hint:
            raise
        raise InputError(f"{model.architecture} can't be exported as ONNX: {error.message}", _HINT) from error


def graph_here(model: SRModel, metadata: str) -> bytes:
    """`onnx_graph` in this process; `metadata` is JSON."""
    import onnx

    model.module.eval().cpu()
    axes = {2: "height", 3: "width"}
    written = io.BytesIO()
    with _export_errors(model.architecture), _quiet():
        torch.onnx.export(
            _AnySize(model),
            (_examples(model)[0],),
            written,  # type: ignore[arg-type]
            input_names=["lr"],
            output_names=["sr"],
            dynamic_axes={"lr": axes, "sr": axes},
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=True,
        )
        graph = onnx.load_from_string(written.getvalue())
        onnx.helper.set_model_props(graph, json.loads(metadata))
        return bytes(graph.SerializeToString())


def write_onnx(path: Path, model: SRModel, metadata: Mapping[str, str], before_rename: BeforeRename = no_check) -> None:
    """Write `onnx_graph` to a file by `atomic_write`, and compare it with PyTorch.

    Raises InputError if the graph can't be made or doesn't compute the same as the model; it is not written then.
    """
    import onnxruntime

    with atomic_write(path, before_rename) as temporary:
        try:
            temporary.write_bytes(onnx_graph(model, metadata))
            for lr in _examples(model):
                with torch.inference_mode():
                    expected = model.upscale(lr)
                with _export_errors(model.architecture):
                    options = onnxruntime.SessionOptions()
                    options.log_severity_level = 4  # fatal only: errors are also raised as exceptions
                    session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
                    (found,) = session.run(None, {"lr": lr.numpy()})
                if not psnr(torch.from_numpy(found), expected) >= _MIN_PSNR:
                    raise InputError(
                        f"the ONNX graph of {model.architecture} and the model give different results for an "
                        f"image of {lr.shape[3]}x{lr.shape[2]} pixels; the graph was not written",
                        _HINT,
                    )
        except PddError as error:
            raise type(error)(f"{path}: {error.message}", error.hint) from error


def _examples(model: SRModel) -> list[Tensor]:
    """Noise of the sizes `LR_SIDES`, or larger if the model needs it."""
    sizes = [tuple(max(side, model.size_minimum) for side in size) for size in LR_SIDES]
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, model.in_channels, *size, generator=generator) for size in sizes]


def psnr(found: Tensor, expected: Tensor) -> float:
    """The PSNR in dB of two images in 0..1; 0 if their shapes differ, infinity if they are equal."""
    if found.shape != expected.shape:
        return 0.0
    error = float((found - expected).square().mean())
    return -10 * math.log10(error) if error > 0 else math.inf if error == 0 else math.nan


@contextlib.contextmanager
def _export_errors(architecture: str) -> Iterator[None]:
    """Convert errors of the exporter and of onnxruntime to InputError, except those that `atomic_write` converts."""
    try:
        yield
    except (PddError, OSError, MemoryError):
        raise
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(f"{architecture} can't be exported as ONNX ({type(error).__name__}: {why})", _HINT) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tracer's warnings about constant sizes, which the comparison at several sizes checks for.

    On failure PyTorch prints the whole graph, past Python's streams. Therefore the process's own stdout and stderr are
    redirected, too.
    """
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), silenced():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
