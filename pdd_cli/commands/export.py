"""`pdd export`."""

from __future__ import annotations

from pdd_cli.options import Call, command
from pdd_cli.settings.export import ExportConfig, ExportFlags


def _export(call: Call[ExportConfig, ExportFlags]) -> None:
    """Write weights for other programs: Upscayl, chaiNNer, ONNX Runtime and more.

    pth: Real-ESRGAN's scripts, chaiNNer. safetensors: the same, with the card.
    onnx: images of any size. ncnn: Upscayl, realesrgan-ncnn-vulkan, phones.
    hub: a repository of the Hugging Face Hub, with a model card.

    Examples:
      pdd export realesrgan --to pth,safetensors,onnx,ncnn models/
      pdd export 4x_model.pth 4x_model.onnx
      pdd export realLR --to hub --repo USER/NAME
    """
    console, settings = call.console, call.settings()

    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.exporting.run import run

    result = run(settings, overwrite=call.flags.overwrite, observer=ConsoleObserver(console))
    console.result(result.as_document())
    for failure in result.failures[1:]:
        console.fail(failure)
    result.raise_for_failures()


export = command(ExportConfig, "export", ExportFlags, _export)
