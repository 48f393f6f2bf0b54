"""Export of adapted weights for other programs: as a checkpoint of BasicSR, and as ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import atomic_write
from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import rrdbnet_from_state

_MIN_PSNR = 60.0  # dB, of the output of the ONNX graph against that of PyTorch
_LR_SIDES = ((32, 33), (33, 32), (17, 70), (70, 17), (64, 48))  # height, width of the test images


def check_export(forms: Sequence[str]) -> None:
    """Raise InputError if a package that one of `forms` needs isn't installed."""
    if "onnx" not in forms:
        return
    missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise InputError(
            f"--export onnx needs a package that isn't installed: {', '.join(missing)}",
            "Run: pip install 'pdd-cli[onnx]'",
        )


def export(path: Path, model: SRModel) -> None:
    """Write `model` in the format of the suffix of `path`, `.pth` or `.onnx`.

    `model` must be freshly loaded from a file, because the faster layers that training inserts can't be traced.
    Raises PddError if the graph can't be made or doesn't compute the same as the model.
    """
    (_export_pth if path.suffix == ".pth" else _export_onnx)(path, model)


def _export_pth(path: Path, model: SRModel) -> None:
    """Write `params` and `params_ema`, which Real-ESRGAN's scripts, chaiNNer and spandrel read.

    Both hold the same weights, because some programs read one and some the other. An RRDBNet gets BasicSR's keys.
    """
    state = {key: value.detach().cpu().clone() for key, value in model.module.state_dict().items()}
    network = rrdbnet_from_state(state)
    if network is not None:
        state = network.state_dict()
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
    ):  # a file, because torch hides the OSError of a path
        torch.save({"params": state, "params_ema": state}, file)


def _export_onnx(path: Path, model: SRModel) -> None:
    """Write a graph (1, C, h, w) to (1, C, h*scale, w*scale) for any h and w, and compare it with PyTorch."""
    import onnxruntime

    module = model.module.eval().cpu()
    multiple = model.size_multiple
    sizes = [tuple(max(side, model.size_minimum) // multiple * multiple + multiple for side in s) for s in _LR_SIDES]
    generator = torch.Generator().manual_seed(0)
    examples = [torch.rand(1, model.in_channels, *size, generator=generator) for size in sizes]
    axes = {2: "height", 3: "width"}
    with atomic_write(path) as temporary:
        with _export_errors(path, model.architecture), _quiet():
            torch.onnx.export(
                module,
                (examples[0],),
                str(temporary),
                input_names=["lr"],
                output_names=["sr"],
                dynamic_axes={"lr": axes, "sr": axes},
                opset_version=17,
                dynamo=False,
                do_constant_folding=True,
            )
        for lr in examples:
            with torch.inference_mode():
                expected = module(lr)
            with _export_errors(path, model.architecture):
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4  # fatal only: errors are also raised as exceptions
                session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
                (found,) = session.run(None, {"lr": lr.numpy()})
            deviation = (
                float((torch.from_numpy(found) - expected).square().mean()) if found.shape == expected.shape else 1
            )
            if not deviation <= 10 ** (-_MIN_PSNR / 10):
                raise PddError(
                    f"{path}: the ONNX graph of {model.architecture} and the model give different results for an "
                    f"image of {lr.shape[3]}x{lr.shape[2]} pixels; the graph was not written",
                    "Export it as pth: --export pth.",
                )


@contextlib.contextmanager
def _export_errors(path: Path, architecture: str) -> Iterator[None]:
    """Convert all errors of the exporter and of onnxruntime to PddError, except those that `atomic_write` converts."""
    try:
        yield
    except (PddError, OSError, MemoryError):
        raise
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise PddError(
            f"{path}: {architecture} can't be exported as ONNX ({type(error).__name__}: {why})",
            "Export it as pth: --export pth.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tracer's warnings about constant sizes; the comparison at several sizes checks for that."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
