"""What users have without pdd: the usual tile loop over a folder, in plain PyTorch or with OpenVINO driven directly.

    python -m benchmarks.timing._controls fp32|fp16|bf16|compile|openvino WEIGHTS IN OUT [--tile 0] [--ir FILE]

Nothing of pdd is used here: spandrel's network, Pillow, the tile loop that Real-ESRGAN's scripts have (tiles of N LR
pixels, each seen with 10 more around it, pasted without blending), PNG.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

KINDS = ("fp32", "fp16", "bf16", "compile", "openvino")
_PADDING = 10

Forward = Callable[[Tensor], Tensor]
"""(1, 3, h, w) fp32 on the CPU to (1, 3, 4h, 4w) fp32 on the CPU."""


def network(weights: Path) -> tuple[nn.Module, int]:
    """spandrel's network in fp32, and its scale."""
    from spandrel import ModelLoader

    loaded = ModelLoader().load_from_file(weights)
    return loaded.model.float().eval(), loaded.scale


def plain(module: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Forward:
    """The network in one dtype and memory layout, as scripts run it."""
    module = module.to(device, dtype).to(memory_format=layout)

    def forward(lr: Tensor) -> Tensor:
        with torch.inference_mode():
            sr: Tensor = module(lr.to(device, dtype).contiguous(memory_format=layout)).float().cpu()
            return sr

    return forward


def inductor(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Forward:
    """torch.compile with its defaults."""
    compiled = torch.compile(module.to(device, dtype).to(memory_format=torch.channels_last))

    def forward(lr: Tensor) -> Tensor:
        with torch.no_grad():
            sr: Tensor = compiled(lr.to(device, dtype).contiguous(memory_format=torch.channels_last)).float().cpu()
            return sr

    return forward


def openvino(module: nn.Module | Path, precision: str, size: tuple[int, int] | None = None) -> Forward:
    """OpenVINO as its guide has it: convert (or read what was saved), compile, infer; `size` makes the shape static."""
    import openvino as ov

    core = ov.Core()
    if isinstance(module, Path):
        model = core.read_model(module)
    else:
        model = ov.convert_model(module, example_input=torch.zeros(1, 3, 32, 32))
    model.reshape([1, 3, *(size or (-1, -1))])
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings)
    return lambda lr: torch.from_numpy(compiled(lr.numpy())[0])


def tile_loop(forward: Forward, lr: Tensor, scale: int, tile: int) -> Tensor:
    """The whole image in tiles of `tile` LR pixels, as Real-ESRGAN's `tile_process` has it; 0 is the image at once."""
    if not tile:
        return forward(lr)
    _, channels, height, width = lr.shape
    sr = torch.zeros(1, channels, height * scale, width * scale)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            from_top, from_left = max(top - _PADDING, 0), max(left - _PADDING, 0)
            seen = lr[..., from_top : bottom + _PADDING, from_left : right + _PADDING].contiguous()
            rows = slice((top - from_top) * scale, (bottom - from_top) * scale)
            columns = slice((left - from_left) * scale, (right - from_left) * scale)
            target = sr[..., top * scale : bottom * scale, left * scale : right * scale]
            target[:] = forward(seen)[..., rows, columns]
    return sr


def load(path: Path) -> Tensor:
    """(1, 3, h, w) in 0..1."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def save(sr: Tensor, path: Path) -> None:
    pixels = (sr[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.contiguous().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("weights", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tile", type=int, default=0)
    parser.add_argument("--ir", type=Path, help="OpenVINO's model, converted and saved before")
    parser.add_argument("--precision", default="bf16", help="of OpenVINO")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    module, scale = network(arguments.weights)
    device = arguments.device
    if arguments.kind == "openvino":
        forward = openvino(arguments.ir or module, {"fp32": "f32"}.get(arguments.precision, arguments.precision))
    elif arguments.kind == "compile":
        forward = inductor(module, device, torch.bfloat16)
    elif arguments.kind == "bf16":
        forward = plain(module, device, torch.bfloat16, torch.channels_last)
    else:
        dtype = torch.float32 if arguments.kind == "fp32" else torch.float16
        forward = plain(module, device, dtype, torch.contiguous_format)
    for path in sorted(arguments.input.iterdir()):
        save(tile_loop(forward, load(path), scale, arguments.tile), arguments.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
