"""The training loop of Pairwise Distance Distillation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pdd_cli.config import AdaptConfig
from pdd_cli.data.datasets import Domains
from pdd_cli.device import Runtime
from pdd_cli.distillation.checkpoint import TrainState
from pdd_cli.distillation.generalist import ema_update
from pdd_cli.distillation.losses import (
    ALL_LAYERS,
    DISCRIMINATOR_LAYERS,
    Features,
    adversarial_loss,
    inter_loss,
    intra_loss,
    perceptual_loss,
    pixel_loss,
)
from pdd_cli.errors import PddError
from pdd_cli.models.discriminator import FeatureDiscriminator, UNetDiscriminator
from pdd_cli.models.features import FeatureNetwork
from pdd_cli.models.loading import SRModel


@dataclass(frozen=True)
class StepReport:
    """What one step did. `losses` are unweighted; those that were off in this step are absent."""

    step: int  # counted from 1
    losses: dict[str, float]
    learning_rate: float
    seconds: float


def new_state(
    config: AdaptConfig,
    base: SRModel,
    generalist: SRModel,
    domains: Domains,
    features: FeatureNetwork,
    runtime: Runtime,
) -> TrainState:
    """The state before the first step: the specialist starts from `base`, the discriminator from scratch."""
    torch.manual_seed(config.seed)
    specialist = copy.deepcopy(base.module).train().requires_grad_(True)
    frozen = copy.deepcopy(generalist.module).eval().requires_grad_(False)
    discriminator: nn.Module = UNetDiscriminator()
    if config.discriminator == "features":
        hr = domains.batch(0, 8).hr_s.to(runtime.device)
        with torch.no_grad(), runtime.autocast():
            phi = features(hr, DISCRIMINATOR_LAYERS)
        rms = {layer: value.float().square().mean((0, 2, 3)).sqrt().clamp_min(1e-3) for layer, value in phi.items()}
        discriminator = FeatureDiscriminator(rms)
    for network in (specialist, frozen, discriminator):
        network.to(runtime.device).to(memory_format=torch.channels_last)
    betas, rates = config.optimizer.betas, config.optimizer
    return TrainState(
        specialist=specialist,
        generalist=frozen,
        discriminator=discriminator,
        optimizer=torch.optim.Adam(specialist.parameters(), rates.learning_rate, betas, fused=True),
        discriminator_optimizer=torch.optim.Adam(
            discriminator.parameters(), rates.discriminator_learning_rate, betas, fused=True
        ),
    )


def train(
    config: AdaptConfig,
    state: TrainState,
    base: SRModel,
    generalist: SRModel,
    domains: Domains,
    features: FeatureNetwork,
    runtime: Runtime,
    *,
    save: Callable[[], None],
    preview: Callable[[], None],
    should_stop: Callable[[], bool],
) -> Iterator[StepReport]:
    """Train `state` from the step that it is at to `config.steps`, yielding a report a step.

    `save` is called every `checkpoint_every` steps, at the end, and when `should_stop` says so after a step, which
    ends the iteration early. `base` and `generalist` give their networks' scale and size needs. Raises PddError when a
    loss is no longer finite; the last checkpoint is from before that.
    """
    specialist = replace(base, module=state.specialist)
    frozen = replace(generalist, module=state.generalist)
    D, weights = state.discriminator, config.losses
    ema = config.generalist if config.generalist.mode == "ema" else None

    while state.step < config.steps:
        started = time.perf_counter()
        learning_rate = _set_learning_rates(config, state)
        only_discriminator = state.step < config.discriminator_warmup_steps
        distilling = state.step >= config.discriminator_warmup_steps + config.generalist.warmup_steps
        losses: dict[str, Tensor] = {}

        # data
        batch = domains.batch(state.step, config.batch_size).to(runtime.device)
        n = config.batch_size

        # predictions
        with torch.set_grad_enabled(not only_discriminator), runtime.autocast():
            S = specialist.upscale(torch.cat((batch.lr_s, batch.lr_t)) if distilling else batch.lr_s).float()
        S_s = S[:n]

        # specialist: losses and step
        if not only_discriminator:
            D.requires_grad_(False)
            with torch.no_grad(), runtime.autocast():
                constants = [batch.hr_s]
                if distilling:
                    constants.append(frozen.upscale(torch.cat((batch.lr_s, batch.lr_t))).float())
                phi_constant = features(torch.cat(constants), ALL_LAYERS)
            with runtime.autocast():
                phi = features(S, ALL_LAYERS)
                judged = len(S) if distilling and weights.adversarial_on_target else n
                logits = _judge(D, S[:judged], _part(phi, 0, judged))
            phi_S_s, phi_hr = _part(phi, 0, n), _part(phi_constant, 0, n)
            losses["pixel"] = pixel_loss(S_s, batch.hr_s)
            losses["perceptual"] = perceptual_loss(phi_S_s, phi_hr)
            # S_s and, once it is on, S_t must each look real: the two means add up.
            losses["adversarial"] = adversarial_loss(logits, real=True) * (judged / n)
            if distilling:
                phi_S_t, phi_G_s, phi_G_t = (
                    _part(phi, n, 2 * n),
                    _part(phi_constant, n, 2 * n),
                    _part(phi_constant, 2 * n, 3 * n),
                )
                # static: the synthetic prediction is led by its ground truth alone.
                distilled = phi_S_s if ema else {layer: value.detach() for layer, value in phi_S_s.items()}
                losses["inter"] = inter_loss(distilled, phi_S_t, phi_G_s, phi_G_t)
                losses["intra"] = intra_loss(distilled, phi_S_t, phi_G_s, phi_G_t)
            total = sum(getattr(weights, name) * loss for name, loss in losses.items())
            assert isinstance(total, Tensor)
            _check_finite(total, state.step)
            state.optimizer.zero_grad(set_to_none=True)
            total.backward()
            state.optimizer.step()

        # discriminator: losses and step
        D.requires_grad_(True)
        with runtime.autocast():
            both = torch.cat((batch.hr_s, S_s.detach()))
            if only_discriminator:
                with torch.no_grad():
                    phi_both = features(both, ALL_LAYERS)
            else:
                phi_both = {layer: torch.cat((phi_hr[layer], phi_S_s[layer].detach())) for layer in ALL_LAYERS}
            logits = _judge(D, both, phi_both)
        losses["discriminator_real"] = adversarial_loss([one[:n] for one in logits], real=True)
        losses["discriminator_fake"] = adversarial_loss([one[n:] for one in logits], real=False)
        discriminator_total = losses["discriminator_real"] + losses["discriminator_fake"]
        _check_finite(discriminator_total, state.step)
        state.discriminator_optimizer.zero_grad(set_to_none=True)
        discriminator_total.backward()
        state.discriminator_optimizer.step()

        # EMA
        if ema and not only_discriminator:
            ema_update(state.generalist, state.specialist, ema.decay)
        state.step += 1

        # log
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        yield StepReport(state.step, values, learning_rate, time.perf_counter() - started)

        # checkpoint, preview
        stop = should_stop()
        if stop or state.step % config.checkpoint_every == 0 or state.step == config.steps:
            save()
        if state.step % config.preview_every == 0 or state.step == config.steps:
            preview()
        if stop:
            return


def _set_learning_rates(config: AdaptConfig, state: TrainState) -> float:
    """The rates of the coming step: halved at each fraction of the run that lies behind."""
    halvings = sum(state.step >= fraction * config.steps for fraction in config.optimizer.halve_at)
    for optimizer, rate in (
        (state.optimizer, config.optimizer.learning_rate),
        (state.discriminator_optimizer, config.optimizer.discriminator_learning_rate),
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5**halvings
    return float(config.optimizer.learning_rate * 0.5**halvings)


def _judge(discriminator: nn.Module, images: Tensor, features: Features) -> list[Tensor]:
    """Logits of realness for the images, or for their features, by what the discriminator looks at."""
    if isinstance(discriminator, FeatureDiscriminator):
        return discriminator(features)  # type: ignore[no-any-return]
    return [discriminator(images)]


def _part(features: Features, start: int, end: int) -> dict[str, Tensor]:
    """Elements `start` to `end` of the batch, at every layer."""
    return {layer: value[start:end] for layer, value in features.items()}


def _check_finite(loss: Tensor, step: int) -> None:
    if not math.isfinite(float(loss.detach())):
        raise PddError(
            f"the loss is not finite at step {step + 1}: training has diverged",
            "The last checkpoint is kept. Start anew with a lower rate: --set optimizer.learning_rate=5e-5",
        )
