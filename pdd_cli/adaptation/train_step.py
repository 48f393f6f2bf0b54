"""One step of Pairwise Distance Distillation: predictions, losses, and the updates of all networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdd_cli.adaptation.checkpoint import TrainState
from pdd_cli.adaptation.generalist import ema_update
from pdd_cli.adaptation.losses import (
    ALL_LAYERS,
    STUDENT_LAYERS,
    Features,
    adversarial_loss,
    consistency_loss,
    feature_distance_loss,
    flip_or_transpose,
    inter_loss,
    intra_loss,
    lattice_loss,
    perceptual_loss,
    pixel_loss,
    self_ensemble_loss,
    undo_flip_or_transpose,
)
from pdd_cli.adaptation.trainable import chosen_for, frozen_blocks_shared
from pdd_cli.data.datasets import Batch
from pdd_cli.models.discriminator import FeatureDiscriminator
from pdd_cli.models.features import FeatureNetwork
from pdd_cli.models.loading import SRModel
from pdd_cli.ranks import Ranks
from pdd_cli.runtime import Runtime
from pdd_cli.settings.adapt import AdaptConfig, EmaGeneralist, LossWeights, StaticGeneralist

_FEATURE_MULTIPLE = 16  # pixels: four poolings of the feature network


@dataclass(frozen=True, eq=False)
class Models:
    """The fixed inputs of a step. The networks that it trains are in the TrainState."""

    base: SRModel  # frozen
    generalist: SRModel  # scale and size requirements of the generalist
    features: FeatureNetwork
    distillation: EmaGeneralist | StaticGeneralist
    runtime: Runtime
    ranks: Ranks


@dataclass(frozen=True)
class StepResult:
    """`losses` are unweighted means over the whole batch; losses that are off in this step are absent."""

    losses: dict[str, float]
    finite: bool  # False: the step was skipped, because a loss or gradient isn't finite


def train_step(state: TrainState, batch: Batch, models: Models, weights: LossWeights) -> StepResult:
    """Train the networks of `state` on `batch`, which is on their device, and increment `state.step`.

    The result depends only on the arguments. With several processes, each passes its part of the batch; losses and
    gradients are those of the whole batch and identical in all processes.
    """
    if batch.lr_t is not None and batch.sr_t is not None:
        step = _imitation_step if state.step < state.imitation_steps else _student_step
        return step(state, batch.lr_t, batch.sr_t, models, weights)
    runtime, ranks, features = models.runtime, models.ranks, models.features
    specialist = replace(models.base, module=state.specialist)
    generalist = replace(models.generalist, module=state.generalist)
    D, n = state.discriminator, len(batch.lr_s)
    ema = models.distillation if isinstance(models.distillation, EmaGeneralist) else None
    only_discriminator = state.step < state.warmup_steps
    lr_t = batch.lr_t if state.step >= state.warmup_steps + models.distillation.warmup_steps else None
    distilling = lr_t is not None
    losses: dict[str, Tensor] = {}
    finite = True

    # predictions
    lr = batch.lr_s if lr_t is None else torch.cat((batch.lr_s, lr_t))
    constants = [batch.hr_s]
    with frozen_blocks_shared(state.specialist, state.generalist, ema is not None), runtime.autocast():
        with torch.set_grad_enabled(not only_discriminator):
            S = specialist.upscale(lr).float()
        if distilling and not only_discriminator:
            with torch.no_grad():
                constants.append(generalist.upscale(lr).float())
    S_s = S[:n]

    # specialist: losses and step
    if not only_discriminator:
        D.requires_grad_(False)
        with torch.no_grad(), runtime.autocast():
            phi_constant = features(torch.cat(constants), ALL_LAYERS)
        with runtime.autocast():
            phi = features(S, ALL_LAYERS)
            judged = len(S) if distilling and weights.adversarial_on_target else n
            logits = _logits(D, S[:judged], _part(phi, 0, judged))
        phi_S_s, phi_hr = _part(phi, 0, n), _part(phi_constant, 0, n)
        losses["pixel"] = pixel_loss(S_s, batch.hr_s)
        losses["perceptual"] = perceptual_loss(phi_S_s, phi_hr)
        if weights.feature_distance:
            losses["feature_distance"] = feature_distance_loss(phi_S_s, phi_hr)
        # S_s and (with adversarial_on_target) S_t must look real: the sum of two means, or one mean over both.
        domains = judged // n if weights.adversarial_reduction == "sum" else 1
        losses["adversarial"] = adversarial_loss(logits, real=True) * domains
        if lr_t is not None:
            phi_S_t, phi_G_s, phi_G_t = (
                _part(phi, n, 2 * n),
                _part(phi_constant, n, 2 * n),
                _part(phi_constant, 2 * n, 3 * n),
            )
            # static: the synthetic prediction is trained by its ground truth only, not by distillation.
            distilled = phi_S_s if ema else {layer: value.detach() for layer, value in phi_S_s.items()}
            losses["inter"] = inter_loss(distilled, phi_S_t, phi_G_s, phi_G_t, ranks, weights.inter_group)
            losses["intra"] = intra_loss(distilled, phi_S_t, phi_G_s, phi_G_t)
            if weights.consistency:
                losses["consistency"] = consistency_loss(S[n:], lr_t, specialist.scale)
            if weights.self_ensemble:
                number = state.step % 8
                with torch.no_grad(), runtime.autocast():
                    turned = models.base.upscale(flip_or_transpose(lr_t, number))
                losses["self_ensemble"] = self_ensemble_loss(S[n:], undo_flip_or_transpose(turned, number))
        total = sum(getattr(weights, name) * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        finite = _update(state.optimizer, total, ranks)

    # discriminator: losses and step
    D.requires_grad_(True)
    with runtime.autocast():
        both = torch.cat((batch.hr_s, S_s.detach()))
        if only_discriminator:
            with torch.no_grad():
                phi_both = features(both, ALL_LAYERS)
        else:
            phi_both = {layer: torch.cat((phi_hr[layer], phi_S_s[layer].detach())) for layer in ALL_LAYERS}
        logits = _logits(D, both, phi_both)
    losses["discriminator_real"] = adversarial_loss([one[:n] for one in logits], real=True)
    losses["discriminator_fake"] = adversarial_loss([one[n:] for one in logits], real=False)
    if finite:
        total = losses["discriminator_real"] + losses["discriminator_fake"]
        finite = _update(state.discriminator_optimizer, total, ranks)

    # EMA
    if ema and finite and not only_discriminator:
        ema_update(state.generalist, state.specialist, ema.decay)
    state.step += 1

    return _result(losses, finite, ranks)


def _imitation_step(state: TrainState, lr_t: Tensor, sr_t: Tensor, models: Models, weights: LossWeights) -> StepResult:
    """One of a student's first steps, which train it on nothing but the pixels of the teacher's SR."""
    with models.runtime.autocast():
        S_t = replace(models.base, module=state.specialist).upscale(lr_t).float()
    loss = F.l1_loss(S_t, sr_t)
    finite = _update(state.optimizer, weights.teacher * loss, models.ranks)
    if finite and isinstance(models.distillation, EmaGeneralist):
        ema_update(state.generalist, state.specialist, models.distillation.decay)
    state.step += 1
    return _result({"teacher": loss}, finite, models.ranks)


def _student_step(state: TrainState, lr_t: Tensor, sr_t: Tensor, models: Models, weights: LossWeights) -> StepResult:
    """One step of a student: the teacher's SR of the real crops is its target, and real for the discriminator."""
    runtime, ranks, features, D, n = models.runtime, models.ranks, models.features, state.discriminator, len(lr_t)
    student = replace(models.base, module=state.specialist)
    adversarial = state.step >= state.warmup_steps
    losses: dict[str, Tensor] = {}

    # student
    D.requires_grad_(False)
    with runtime.autocast():
        S_t = student.upscale(lr_t).float()
        seen = _shifted_window(S_t.shape[-1], state.step, student.scale)
        phi = features(S_t[seen], STUDENT_LAYERS)
        with torch.no_grad():
            phi_target = features(sr_t[seen], STUDENT_LAYERS)
        logits = _logits(D, S_t[seen], phi) if adversarial else []
    losses["perceptual"] = perceptual_loss(phi, phi_target)
    losses["feature_distance"] = feature_distance_loss(phi, phi_target)
    losses["teacher"] = F.l1_loss(S_t, sr_t)
    losses["lattice"] = lattice_loss(S_t, sr_t, student.scale)
    losses["consistency"] = consistency_loss(S_t, lr_t, student.scale)
    if adversarial:
        losses["adversarial"] = adversarial_loss(logits, real=True)
    total = sum(getattr(weights, name) * loss for name, loss in losses.items())
    assert isinstance(total, Tensor)
    finite = _update(state.optimizer, total, ranks)

    # discriminator
    D.requires_grad_(True)
    with runtime.autocast():
        both = {layer: torch.cat((phi_target[layer], phi[layer].detach())) for layer in STUDENT_LAYERS}
        logits = _logits(D, torch.cat((sr_t[seen], S_t[seen].detach())), both)
    losses["discriminator_real"] = adversarial_loss([one[:n] for one in logits], real=True)
    losses["discriminator_fake"] = adversarial_loss([one[n:] for one in logits], real=False)
    if finite:
        total = losses["discriminator_real"] + losses["discriminator_fake"]
        finite = _update(state.discriminator_optimizer, total, ranks)

    # EMA
    if finite and isinstance(models.distillation, EmaGeneralist):
        ema_update(state.generalist, state.specialist, models.distillation.decay)
    state.step += 1
    return _result(losses, finite, ranks)


def _shifted_window(side: int, step: int, scale: int) -> tuple[EllipsisType, slice, slice]:
    """The part of square crops with this side that the features see: it starts at another pixel in each step.

    Otherwise the poolings of the features would always meet the pixels of an LR pixel at the same places, and not see a
    pattern that repeats with every LR pixel.
    """
    length = max((side - scale + 1) // _FEATURE_MULTIPLE * _FEATURE_MULTIPLE, min(side, _FEATURE_MULTIPLE))
    y, x = (min(offset, side - length) for offset in (step % scale, step // scale % scale))
    return ..., slice(y, y + length), slice(x, x + length)


def _result(losses: dict[str, Tensor], finite: bool, ranks: Ranks) -> StepResult:
    means = torch.stack([loss.detach() for loss in losses.values()])
    ranks.average_([means])
    return StepResult(dict(zip(losses, means.tolist(), strict=True)), finite)


def scheduled_rate(config: AdaptConfig, step: int) -> float:
    """The factor of the learning rate at `step`: halved at each fraction of the run in `halve_at`."""
    halvings = sum(step >= fraction * config.steps for fraction in config.optimizer.halve_at)
    return float(0.5**halvings)


def set_learning_rates(config: AdaptConfig, state: TrainState) -> float:
    """Set the learning rates of both optimizers for the next step; returns the specialist's."""
    factor = state.monitor.rate_factor * scheduled_rate(config, state.step)
    _, specialist_rate = chosen_for(state.specialist, config.optimizer)
    for optimizer, rate in (
        (state.optimizer, specialist_rate),
        (state.discriminator_optimizer, config.optimizer.discriminator_learning_rate),
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
    return float(specialist_rate * factor)


def _logits(discriminator: nn.Module, images: Tensor, features: Features) -> list[Tensor]:
    """The discriminator's logits for the images, or for their features if that is its input."""
    if isinstance(discriminator, FeatureDiscriminator):
        return discriminator(features)  # type: ignore[no-any-return]
    return [discriminator(images)]


def _part(features: Features, start: int, end: int) -> dict[str, Tensor]:
    """Elements `start` to `end` of the batch in every layer."""
    return {layer: value[start:end] for layer, value in features.items()}


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, ranks: Ranks) -> bool:
    """One step of `optimizer` on the mean of `loss` over the processes.

    Returns False and changes nothing if the loss or gradient of any process isn't finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    means = [loss.detach(), *gradients]
    ranks.average_(means)
    if not torch.isfinite(torch.stack(torch._foreach_norm(means)).sum()):
        return False
    optimizer.step()
    return True
