"""One image through every engine: time, PSNR to PyTorch in fp32 and peak memory.

python -m benchmarks.timing.engines WEIGHTS IMAGE [--crop WxH] [--tile N]
    [--engines torch:cpu:fp32,ncnn:vulkan:0:fp16,…]

Each engine runs in a process of its own, `--runs` times; the last run counts. Seconds are those of the processors, all
threads together, so that other programs disturb them little; divide them by the threads for the time on an idle
machine. The PSNR compares floating-point values.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pdd_cli.engines.select import choose_engine
from pdd_cli.imaging.image import DecodedImage, to_float
from pdd_cli.models.loading import load_sr_model
from pdd_cli.runtime import Precision, Runtime
from pdd_cli.settings.base import EngineChoice
from pdd_cli.system import limit_thread_spinning, peak_memory
from pdd_cli.upscaling.upscaler import Upscaler

ENGINES = "torch:cpu:fp32,openvino:cpu:fp32,winograd:cpu:fp32,onnx:cpu:fp32,ncnn:cpu:fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--crop", metavar="WxH", help="the top left part of the image")
    parser.add_argument("--tile", type=int, default=0, help="tiles of this side with an overlap of 16; 0: whole image")
    parser.add_argument("--engines", default=ENGINES, help="ENGINE:DEVICE:PRECISION,…; the first is the reference")
    parser.add_argument("--runs", type=int, default=2, help="the last one counts")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result is not None:
        measure(arguments)
        return
    limit_thread_spinning()  # of the child processes
    reference = None
    print("engine | seconds of processors | PSNR | peak memory\n---|---|---|---")
    with tempfile.TemporaryDirectory() as folder:
        for engine in arguments.engines.split(","):
            result = Path(folder, "sr.npz")
            command = [sys.executable, "-m", "benchmarks.timing.engines", *sys.argv[1:], "--engines", engine]
            subprocess.run([*command, "--result", result], check=True, stderr=subprocess.DEVNULL)
            with np.load(result) as stored:
                sr, seconds, memory = stored["sr"], float(stored["seconds"]), int(stored["memory"])
            reference = sr if reference is None else reference
            print(f"{engine} | {seconds:.1f} | {_psnr(sr, reference):.1f} dB | {memory / 2**20:.0f} MiB", flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """Upscale with one engine, and write the result with its seconds and memory."""
    choice: EngineChoice
    precision: Precision
    choice, *device, precision = arguments.engines.split(":")
    pixels = np.asarray(Image.open(arguments.image).convert("RGB"))
    if arguments.crop:
        width, height = map(int, arguments.crop.split("x"))
        pixels = pixels[:height, :width]
    engine = choose_engine(load_sr_model(arguments.weights), Runtime(":".join(device), precision), choice)
    assert engine.name == choice
    lr = np.ascontiguousarray(to_float(pixels).transpose(2, 0, 1)[None])
    upscaler = Upscaler(engine, tile=arguments.tile, overlap=16, notify=print)
    for _ in range(arguments.runs):
        started = time.process_time()
        if arguments.tile:  # 16 bits, because the interface of tiles takes images
            picture = DecodedImage(pixels.astype(np.uint16) * 257)
            sr = to_float(upscaler.upscale(picture).picture.pixels).transpose(2, 0, 1)[None]
        else:
            sr = engine.run(lr)
        seconds = time.process_time() - started
    np.savez(arguments.result, sr=sr, seconds=seconds, memory=peak_memory())


def _psnr(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return -10 * math.log10(error) if error else math.inf


if __name__ == "__main__":
    main()
