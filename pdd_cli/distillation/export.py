"""Adapted weights for other programs: BasicSR's checkpoint form, and ONNX."""

from __future__ import annotations

from pathlib import Path

import torch

from pdd_cli.errors import InputError, PddError
from pdd_cli.files import atomic_write
from pdd_cli.models.loading import SRModel

_WORST_DB = 60.0  # of the exported ONNX graph against PyTorch


def export_pth(path: Path, model: SRModel) -> None:
    """Write `params` and `params_ema` as Real-ESRGAN's scripts, chaiNNer and spandrel read them.

    Both are the chosen weights: programs take either the one or the other.
    """
    state = {key: value.detach().cpu().clone() for key, value in model.module.state_dict().items()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # torch tells a file's errors, not a path's
        torch.save({"params": state, "params_ema": state}, file)


def export_onnx(path: Path, model: SRModel) -> None:
    """Write an ONNX graph (1, C, h, w) to (1, C, h*scale, w*scale) of any h and w, and compare it with PyTorch.

    Raises InputError where the packages for it lack, PddError where the graph computes something else.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("--export onnx needs more packages", "Run: pip install 'pdd-cli[onnx]'") from error
    module = model.module.eval().cpu()
    side = max(32, model.size_minimum)
    side = -(-side // model.size_multiple) * model.size_multiple
    example = torch.rand(1, model.in_channels, side, side + model.size_multiple)
    axes = {2: "height", 3: "width"}
    with atomic_write(path) as temporary:
        torch.onnx.export(
            module,
            (example,),
            str(temporary),
            input_names=["lr"],
            output_names=["sr"],
            dynamic_axes={"lr": axes, "sr": axes},
            opset_version=17,
            dynamo=False,
            do_constant_folding=True,
        )
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        for lr in (example, torch.rand(1, model.in_channels, side + 2 * model.size_multiple, side)):
            with torch.inference_mode():
                expected = module(lr)
            (found,) = session.run(None, {"lr": lr.numpy()})
            deviation = float((torch.from_numpy(found) - expected).square().mean())
            if not deviation <= 10 ** (-_WORST_DB / 10):
                raise PddError(f"{path}: the ONNX graph doesn't compute what the model does; it was not written")
