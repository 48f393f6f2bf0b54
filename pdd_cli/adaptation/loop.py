"""The training loop of Pairwise Distance Distillation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pdd_cli.adaptation.checkpoint import TrainState
from pdd_cli.adaptation.generalist import ema_update
from pdd_cli.adaptation.losses import (
    ALL_LAYERS,
    DISCRIMINATOR_LAYERS,
    Features,
    adversarial_loss,
    consistency_loss,
    feature_distance_loss,
    inter_loss,
    intra_loss,
    perceptual_loss,
    pixel_loss,
)
from pdd_cli.config import AdaptConfig
from pdd_cli.data.datasets import Batch, CropSampler
from pdd_cli.distributed import ALONE, World
from pdd_cli.engines.winograd import winograd_pays
from pdd_cli.errors import PddError
from pdd_cli.models.discriminator import FeatureDiscriminator, UNetDiscriminator
from pdd_cli.models.features import FeatureNetwork
from pdd_cli.models.loading import SRModel
from pdd_cli.runtime import Runtime

_WINDOW = 8  # steps whose mean loss is watched
_SPIKE = 3.0  # … and how far it may rise above its best
_MOST_SKIPPED = 3  # in a row
_MOST_ROLLBACKS = 4
_SAVE_SECONDS = 180  # a checkpoint is written at least as often


@dataclass(frozen=True)
class StepReport:
    """What one step did. `losses` are unweighted; those that were off in this step are absent."""

    step: int  # counted from 1
    losses: dict[str, float]
    learning_rate: float
    seconds: float
    event: str = ""  # what went wrong in this step, and what was done about it


def new_state(
    config: AdaptConfig,
    base: SRModel,
    generalist: SRModel,
    domains: CropSampler,
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
        place(network, runtime)
    betas, rates = config.optimizer.betas, config.optimizer
    return TrainState(
        specialist=specialist,
        generalist=frozen,
        discriminator=discriminator,
        optimizer=torch.optim.Adam(specialist.parameters(), rates.learning_rate, betas, fused=True),
        discriminator_optimizer=torch.optim.Adam(
            discriminator.parameters(), rates.discriminator_learning_rate, betas, fused=True
        ),
        warmup_steps=config.discriminator_warmup_steps,
    )


def place(network: nn.Module, runtime: Runtime) -> None:
    """Put a network where it is trained, and let it compute in the fastest way there."""
    network.to(runtime.device).to(memory_format=torch.channels_last)
    if winograd_pays(runtime):
        from pdd_cli.engines.winograd.training import accelerate

        accelerate(network)


def train(
    config: AdaptConfig,
    state: TrainState,
    base: SRModel,
    generalist: SRModel,
    domains: CropSampler,
    features: FeatureNetwork,
    runtime: Runtime,
    *,
    save: Callable[[bool], bool],
    restore: Callable[[], None],
    preview: Callable[[], None],
    should_stop: Callable[[], bool],
    world: World = ALONE,
) -> Iterator[StepReport]:
    """Train `state` from the step that it is at to `config.steps`, yielding a report a step.

    `save(judge)` is called before the first step, every `checkpoint_every` steps and at the end (both with True), and
    with False every few minutes and when `should_stop` says so after a step, which ends the iteration early; so does
    True from `save`. `base` and `generalist` give their networks' scale and size needs.

    A step whose loss or gradient isn't finite is skipped. After several in a row, or when the supervised loss has
    risen far above its best, `restore` puts the last checkpoint back into `state`, and the rate is halved. Raises
    PddError when that doesn't help.

    The processes of `world` each take their share of every batch. Losses, gradients and decisions are those of the
    whole batch, and alike in all of them; only the first need save and preview.
    """
    specialist = replace(base, module=state.specialist)
    frozen = replace(generalist, module=state.generalist)
    D, weights = state.discriminator, config.losses
    ema = config.generalist if config.generalist.mode == "ema" else None

    n = world.share(config.batch_size)

    def draw(step: int) -> Batch:
        return domains.batch(step, n, world.rank * n)

    # Not on a CPU: its cores have enough to do, and a step takes a tenth longer.
    batches = draw if runtime.kind == "cpu" else Prefetcher(draw)
    if state.step == 0:
        save(False)
    if world.size > 1:
        restore()  # all begin where the first does
    saved = time.monotonic()
    while state.step < config.steps:
        started = time.perf_counter()
        learning_rate = _set_learning_rates(config, state)
        only_discriminator = state.step < state.warmup_steps
        distilling = state.step >= state.warmup_steps + config.generalist.warmup_steps
        losses: dict[str, Tensor] = {}
        healthy = True

        # data
        batch = batches(state.step).to(runtime.device)

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
            if weights.feature_distance:
                losses["feature_distance"] = feature_distance_loss(phi_S_s, phi_hr)
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
                losses["inter"] = inter_loss(distilled, phi_S_t, phi_G_s, phi_G_t, world)
                losses["intra"] = intra_loss(distilled, phi_S_t, phi_G_s, phi_G_t)
                if weights.consistency:
                    losses["consistency"] = consistency_loss(S[n:], batch.lr_t, base.scale)
            total = sum(getattr(weights, name) * loss for name, loss in losses.items())
            assert isinstance(total, Tensor)
            healthy = _update(state.optimizer, total, world)

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
        if healthy:
            total = losses["discriminator_real"] + losses["discriminator_fake"]
            healthy = _update(state.discriminator_optimizer, total, world)

        # EMA
        if ema and healthy and not only_discriminator:
            ema_update(state.generalist, state.specialist, ema.decay)
        state.step += 1

        # log
        means = torch.stack([loss.detach() for loss in losses.values()])
        world.average_([means])
        values = dict(zip(losses, means.tolist(), strict=True))
        done = state.step
        event = _watch(state, values, healthy, restore)
        yield StepReport(done, values, learning_rate, time.perf_counter() - started, event)
        if state.step < done:  # rolled back
            continue

        # checkpoint, preview
        stop, last = world.any(should_stop()), state.step == config.steps
        due = state.step % config.checkpoint_every == 0 and healthy  # what a rollback returns to must be sound
        if stop or due or last:
            stop = world.any(save(due or last) or should_stop()) or stop
            saved = time.monotonic()
        elif world.is_first and healthy and time.monotonic() - saved > _SAVE_SECONDS:
            save(False)
            saved = time.monotonic()
        if state.step % config.preview_every == 0 or last:
            preview()
        if stop:
            return


class Prefetcher:
    """What `make` gives for a step, made in a thread of its own while the step before is computed."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "data")
        self._coming: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        coming = self._coming
        if coming is None or coming[0] != step:  # the first one, or after a rollback
            coming = step, self._thread.submit(self._make, step)
        self._coming = step + 1, self._thread.submit(self._make, step + 1)
        return coming[1].result()


def scheduled_rate(config: AdaptConfig, step: int) -> float:
    """The part of the learning rate at `step`: halved at each fraction of the run that lies behind."""
    halvings = sum(step >= fraction * config.steps for fraction in config.optimizer.halve_at)
    return float(0.5**halvings)


def _set_learning_rates(config: AdaptConfig, state: TrainState) -> float:
    """Set and return the rates of the coming step."""
    factor = state.guard.rate_factor * scheduled_rate(config, state.step)
    for optimizer, rate in (
        (state.optimizer, config.optimizer.learning_rate),
        (state.discriminator_optimizer, config.optimizer.discriminator_learning_rate),
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
    return float(config.optimizer.learning_rate * factor)


def _judge(discriminator: nn.Module, images: Tensor, features: Features) -> list[Tensor]:
    """Logits of realness for the images, or for their features, by what the discriminator looks at."""
    if isinstance(discriminator, FeatureDiscriminator):
        return discriminator(features)  # type: ignore[no-any-return]
    return [discriminator(images)]


def _part(features: Features, start: int, end: int) -> dict[str, Tensor]:
    """Elements `start` to `end` of the batch, at every layer."""
    return {layer: value[start:end] for layer, value in features.items()}


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, world: World) -> bool:
    """One step of `optimizer` on the mean of `loss` over the processes.

    False, and nothing is changed, where loss or gradient isn't finite: in all processes, where it isn't in one.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    means = [loss.detach(), *gradients]
    world.average_(means)
    if not torch.isfinite(torch.stack(torch._foreach_norm(means)).sum()):
        return False
    optimizer.step()
    return True


def _watch(state: TrainState, losses: Mapping[str, float], healthy: bool, restore: Callable[[], None]) -> str:
    """Keep the guard's record of this step; roll back where it asks for that. What was done, in words."""
    guard = state.guard
    guard.skipped = 0 if healthy else guard.skipped + 1
    if healthy and "pixel" in losses:
        guard.recent = [*guard.recent[1 - _WINDOW :], losses["pixel"] + losses["perceptual"]]
    mean = sum(guard.recent) / _WINDOW if len(guard.recent) == _WINDOW else None
    spiked = mean is not None and mean > _SPIKE * guard.best
    if mean is not None:
        guard.best = min(guard.best, mean)
    if not spiked and guard.skipped < _MOST_SKIPPED:
        return "" if healthy else f"step {state.step}: the loss is not finite; the step was skipped"
    why = f"the losses are {_SPIKE:g} times their best" if spiked else f"{guard.skipped} losses in a row are not finite"
    failed_at, factor, rollbacks = state.step, guard.rate_factor / 2, guard.rollbacks + 1
    if rollbacks > _MOST_ROLLBACKS:
        raise PddError(
            f"step {failed_at}: {why}, though the rate has been halved {_MOST_ROLLBACKS} times: training diverges",
            "The last good state is kept. Start anew with a lower rate: --overwrite --set optimizer.learning_rate=1e-5",
        )
    restore()
    state.guard.rate_factor, state.guard.rollbacks = factor, rollbacks
    return f"step {failed_at}: {why}; back to step {state.step} at {factor:g} of the learning rate"
