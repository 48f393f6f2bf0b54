"""How fast a step of `pdd adapt` is beside the same step as the paper's code does it, and whether both learn the same.

    python -m benchmarks.timing.adapt DATA --base realesrgan.safetensors [--batch-size 2] [--steps 50] [--avx2]

Three trainings from the same weights on the same crops, a step of one after a step of the others: pdd's loop, the same
with PyTorch's convolutions alone (where pdd has others), and a control of its own: fp32 NCHW, eager; spandrel's network
for the models, torchvision's layers for the features; every prediction, feature pass and judgement of the discriminator
by itself, two backward passes for the discriminator, Adam and the moving average parameter by parameter.
Prints seconds a step, and how far pdd's losses are from the control's. `--defaults`: instead pdd's default settings, of
which a part of the network is frozen, beside the same with the whole network trained. DATA holds `camera_b/train_lr`,
`hr_photos` and `features/vgg16_features_fp16.safetensors`. `--avx2`: as on an x86 CPU with neither AVX-512 nor bf16,
such as most laptops have.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite.binding import get_process_triple
from torch import Tensor, nn

from benchmarks.timing._controls import network
from benchmarks.timing._machine import describe, show, summary, wait
from pdd_cli.adaptation.checkpoint import TrainState
from pdd_cli.adaptation.loop import batch_source
from pdd_cli.adaptation.prepare import Run, WeightFiles, prepare_run
from pdd_cli.adaptation.train_step import set_learning_rates, train_step
from pdd_cli.data.datasets import Batch
from pdd_cli.engines.winograd import training as winograd
from pdd_cli.engines.winograd import winograd_pays
from pdd_cli.engines.winograd.kernel import AVX2, Kernel
from pdd_cli.engines.winograd.training_kernel import TrainingEmitter
from pdd_cli.runtime import choose_runtime, keep_freed_memory
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve
from pdd_cli.weights.states import read_state

# The paper's objective (METHOD: layers by VGG-19's names; VGG-16's third convolution is its stage's last).
INTER = {"conv2_1": 0.25, "conv3_1": 0.25, "conv4_1": 0.25, "conv5_1": 0.25}
INTRA = {"conv2_2": 0.1, "conv3_3": 0.3, "conv4_3": 1.0, "conv5_3": 1.0}
PERCEPTUAL = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_3": 1.0, "conv4_3": 1.0, "conv5_3": 1.0}
PIXEL_WEIGHT, ADVERSARIAL_WEIGHT, DECAY, RATE = 0.5, 0.01, 0.999, 1e-4
_PLAIN = "pdd without Winograd"
_WHOLE = "pdd, nothing frozen"
SETTINGS = [
    "discriminator=unet", "crop_candidates=1", "held_out=0", "synthetic.hr_scales=[1]",
    "losses.pixel=0.5", "losses.adversarial=0.01", "losses.consistency=0", "losses.feature_distance=0",
    "optimizer.halve_at=[]", "optimizer.discriminator_learning_rate=0.0001", "optimizer.freeze=0",
]  # fmt: skip


class Vgg16(nn.Module):
    """torchvision's VGG-16 up to conv5_3, giving what its convolutions give before the ReLU."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torchvision.models import vgg16

        self.layers = vgg16(weights=None).features[:29]
        state = {key.removeprefix("features."): value.float() for key, value in read_state(weights).items()}
        self.layers.load_state_dict(state, strict=False)
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        x = (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)
        found, stage, number = {}, 1, 0
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                stage, number = stage + 1, 0
            elif isinstance(layer, nn.Conv2d):
                number += 1
                found[f"conv{stage}_{number}"] = x
        return found


class PaperStyle:
    """The control's networks and optimisers, and its step."""

    def __init__(self, base: Path, features: Path, discriminator: nn.Module, warm_up: int) -> None:
        self.device = next(discriminator.parameters()).device
        self.S = network(base)[0].train().requires_grad_(True).to(self.device)
        self.G = copy.deepcopy(self.S).eval().requires_grad_(False)
        self.D = copy.deepcopy(discriminator).to(memory_format=torch.contiguous_format)
        self.vgg = Vgg16(features).to(self.device)
        betas = (0.9, 0.99)
        self.optimizer_S = torch.optim.Adam(self.S.parameters(), RATE, betas, foreach=False, fused=False)
        self.optimizer_D = torch.optim.Adam(self.D.parameters(), RATE, betas, foreach=False, fused=False)
        self.warm_up = warm_up
        self.steps = 0

    def take_weights(self, state: TrainState) -> None:
        """spandrel's network has other names, and the same order."""
        pairs = ((self.S, state.specialist), (self.G, state.generalist), (self.D, state.discriminator))
        with torch.no_grad():
            for mine, theirs in pairs:
                for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
                    a.copy_(b)

    def step(self, batch: Batch) -> dict[str, float]:
        assert batch.lr_t is not None
        lr_s, hr_s, lr_t = (part.to(self.device) for part in (batch.lr_s, batch.hr_s, batch.lr_t))
        batch = Batch(lr_s, hr_s, lr_t)
        distilling = self.steps >= self.warm_up
        self.D.requires_grad_(False)
        self.optimizer_S.zero_grad()
        S_s = self.S(batch.lr_s)
        features_S_s, features_hr = self.vgg(S_s), self.vgg(batch.hr_s)
        losses: dict[str, Tensor] = {
            "pixel": haar_l1(S_s, batch.hr_s),
            "perceptual": total(w * F.l1_loss(features_S_s[k], features_hr[k]) for k, w in PERCEPTUAL.items()),
            "adversarial": bce(self.D(S_s), 1),
        }
        if distilling:
            S_t = self.S(lr_t)
            with torch.no_grad():
                G_s, G_t = self.G(batch.lr_s), self.G(lr_t)
                features_G_s, features_G_t = self.vgg(G_s), self.vgg(G_t)
            features_S_t = self.vgg(S_t)
            losses["adversarial"] = losses["adversarial"] + bce(self.D(S_t), 1)
            losses["inter"] = total(
                w
                * torch.sqrt(
                    (gram(features_S_t[k] - features_G_t[k]) - gram(features_S_s[k] - features_G_s[k])).square().sum()
                )
                for k, w in INTER.items()
            )
            losses["intra"] = total(
                w * cross_entropy(features_S_t[k] - features_S_s[k], features_G_t[k] - features_G_s[k])
                for k, w in INTRA.items()
            )
        weights = {"pixel": PIXEL_WEIGHT, "adversarial": ADVERSARIAL_WEIGHT}
        torch.stack([weights.get(name, 1) * loss for name, loss in losses.items()]).sum().backward()
        self.optimizer_S.step()

        self.D.requires_grad_(True)
        self.optimizer_D.zero_grad()
        losses["discriminator_real"] = bce(self.D(batch.hr_s), 1)
        losses["discriminator_real"].backward()
        losses["discriminator_fake"] = bce(self.D(S_s.detach()), 0)
        losses["discriminator_fake"].backward()
        self.optimizer_D.step()

        with torch.no_grad():
            for mine, theirs in zip(self.G.parameters(), self.S.parameters(), strict=True):
                mine.mul_(DECAY).add_(theirs, alpha=1 - DECAY)
        self.steps += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def haar_l1(sr: Tensor, hr: Tensor) -> Tensor:
    """1 · L1(LL) + 0.1 · L1(LH, HL) + 0.01 · L1(HH), by convolution with the four orthonormal Haar kernels."""
    kernels = sr.new_tensor(
        [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
    ).unsqueeze(1) / 2  # fmt: skip
    n, c, h, w = sr.shape
    ll, lh, hl, hh = F.conv2d((sr - hr).reshape(n * c, 1, h, w), kernels, stride=2).abs().unbind(1)
    return ll.mean() + 0.1 * (lh.mean() + hl.mean()) / 2 + 0.01 * hh.mean()


def gram(features: Tensor) -> Tensor:
    return torch.einsum("nchw,ndhw->ncd", features, features) / features[0].numel()


def cross_entropy(specialist: Tensor, generalist: Tensor) -> Tensor:
    prediction, target = specialist.abs().softmax(1), generalist.abs().softmax(1)
    return -(target * (prediction + 1e-6).log()).sum(1).mean()


def bce(logits: Tensor, label: int) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="weights file")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--crop", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50, help="over which the losses are compared")
    parser.add_argument(
        "--synchronise", action="store_true", help="give the control pdd's weights before each step: no drift"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--defaults", action="store_true", help="compare freezing with training all, no control")
    parser.add_argument("--avx2", action="store_true", help="without AVX-512, in fp32")
    arguments = parser.parse_args()
    if arguments.avx2:
        _limit_to_avx2()
    runtime = choose_runtime(arguments.device, "fp32" if arguments.avx2 else arguments.precision)
    machine = describe(runtime.device)
    keep_freed_memory()
    features = arguments.data / "features" / "vgg16_features_fp16.safetensors"
    with tempfile.TemporaryDirectory() as folder:

        def prepare(name: str, *overrides: str) -> Run:
            config = resolve(
                AdaptConfig,
                "adapt",
                options={
                    "real_dir": arguments.data / "camera_b" / "train_lr",
                    "hr_dir": arguments.data / "hr_photos",
                    "features.network": "vgg16",
                    "features.weights": features,
                    "batch_size": arguments.batch_size,
                    "crop": arguments.crop,
                    "steps": arguments.steps,
                    "runs_dir": folder,
                },
                overrides=["discriminator_warmup=0", *overrides],
            )
            files = WeightFiles(arguments.base, None, "vgg16", features)
            return prepare_run(config, files, runtime, name=name, resume=False, overwrite=True, warn=print)

        control = None
        run = prepare("step", *([] if arguments.defaults else SETTINGS))
        trainings = {"pdd": _our_steps(run)}
        if arguments.defaults:
            trainings[_WHOLE] = _our_steps(prepare("whole", "optimizer.freeze=0"))
        else:
            # Spectral normalisation begins with random vectors, and each pass brings them nearer to the singular ones.
            # The two trainings pass different numbers of times: let them begin where that makes no difference.
            with torch.no_grad():
                for _ in range(200):
                    run.state.discriminator(torch.zeros(1, 3, 16, 16, device=runtime.device))
            warm_up = run.config.generalist.warmup_steps
            control = PaperStyle(arguments.base, features, run.state.discriminator, warm_up)
            if winograd_pays(runtime):
                with patch("pdd_cli.adaptation.prepare.winograd_pays", lambda runtime: False):
                    trainings[_PLAIN] = _our_steps(prepare("plain", *SETTINGS))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
        if control:
            taken["paper's"] = []
        apart: dict[str, list[float]] = {}
        first: dict[str, float] = {}
        for step in range(run.config.steps):
            losses = {}
            if control and arguments.synchronise:
                control.take_weights(run.state)
            for name in taken:
                wait(runtime.device)
                started, cpu = time.perf_counter(), time.process_time()
                if name in trainings:
                    losses[name] = next(trainings[name])
                elif control:
                    losses[name] = control.step(run.sampler.batch(step, run.config.batch_size))
                wait(runtime.device)
                taken[name].append((time.perf_counter() - started, time.process_time() - cpu))
            for key, expected in losses.get("paper's", {}).items():
                difference = abs(losses["pdd"][key] - expected) / max(abs(expected), 1e-12)
                apart.setdefault(key, []).append(difference)
                first.setdefault(key, expected)
            print(f"step {step + 1}: " + ", ".join(f"{name} {taken[name][-1][0]:.2f} s" for name in taken), flush=True)
    _report(arguments, machine, str(runtime), run.config, taken, apart, first)


def _limit_to_avx2() -> None:
    """Let PyTorch's libraries and pdd's kernel use no instructions beyond AVX2; the former ask the environment once."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | limits)
    kernel = Kernel(AVX2, cpu="haswell", features="", triple=get_process_triple(), emitter=TrainingEmitter)
    machine = winograd._Machine(kernel)
    winograd._machine = lambda: machine  # type: ignore[assignment]


def _our_steps(run: Run) -> Iterator[dict[str, float]]:
    """pdd's own steps."""
    config, state = run.config, run.state
    with batch_source(run) as batches:
        while state.step < config.steps:
            set_learning_rates(config, state)
            batch = batches(state.step).to(run.models.runtime.device)
            yield train_step(state, batch, run.models, run.loss_weights).losses


def _report(
    arguments: argparse.Namespace,
    machine: dict[str, Any],
    runtime: str,
    config: AdaptConfig,
    taken: dict[str, list[tuple[float, float]]],
    apart: dict[str, list[float]],
    first: dict[str, float],
) -> None:
    # Steps that distil, and not the first of them.
    begun = config.generalist.warmup_steps + 1
    timings = {name: summary(values[begun:]) for name, values in taken.items()}
    rows: list[dict[str, Any]] = [
        {
            "step": f"{name}, fp32 NCHW" if name == "paper's" else f"{name}, {runtime}",
            "seconds": timing.median,
            "least": timing.least,
            "most": timing.most,
            "CPU s": timing.cpu,
            "faster": list(timings.values())[-1].median / timing.median,
        }
        for name, timing in timings.items()
    ]
    crops = f"{arguments.batch_size} + {arguments.batch_size} crops of {config.crop}"
    title = f"step of adapt, {crops}, {arguments.base.stem}, {config.steps} steps"
    show(title, machine, rows, losses={name: [first[name], *values] for name, values in apart.items()})
    if not apart:
        return
    print("\n| loss | at first | apart at first | median | last ten, median | most |\n|---|---|---|---|---|---|")
    for name, values in apart.items():
        found = (first[name], values[0], np.median(values), np.median(values[-10:]), max(values))
        print(f"| {name} | " + " | ".join(f"{value:.2g}" for value in found) + " |")


if __name__ == "__main__":
    main()
