"""Scores of images by pyiqa's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_cli.errors import DownloadError, InputError, PddError
from pdd_cli.images import Picture, read_image
from pdd_cli.weights.fetch import OnEvent
from pdd_cli.weights.metrics import check_names, is_of_folders, load_metric, metric_config, quiet


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is: `full_reference` compares with ground truth; `value_range` as pyiqa states it, roughly."""

    name: str
    full_reference: bool
    lower_better: bool
    value_range: str

    @property
    def arrow(self) -> str:
        """↓ where lower is better, ↑ where higher is."""
        return "↓" if self.lower_better else "↑"


@dataclass(frozen=True)
class Item:
    """An image to score, and its ground truth where it has one."""

    image: Path
    reference: Path | None = None


@dataclass(frozen=True)
class ImageScores:
    """The scores of one image by metric; `problems` says by metric (or, under "", for all) why one lacks."""

    item: Item
    values: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def metric_infos(names: Sequence[str]) -> list[MetricInfo]:
    """The metrics `names`. Raises InputError for one that pyiqa doesn't have, or that scores sets of images only."""
    check_names(names)
    infos = []
    for name in dict.fromkeys(names):
        if is_of_folders(name):
            raise InputError(f"--metrics: {name} scores a set of images as a whole, which pdd doesn't do yet")
        config = metric_config(name)
        infos.append(
            MetricInfo(
                name,
                full_reference=config["metric_mode"] == "FR",
                lower_better=bool(config.get("lower_better", False)),
                value_range=str(config.get("score_range", "")),
            )
        )
    return infos


def load_metrics(
    infos: Sequence[MetricInfo], *, device: str, offline: bool, on_event: OnEvent
) -> tuple[dict[MetricInfo, Any], list[DownloadError]]:
    """pyiqa's networks of those metrics whose weights can be had, and why the others can't."""
    loaded, failures = {}, []
    for info in infos:
        try:
            loaded[info] = load_metric(info.name, device=device, offline=offline, on_event=on_event)
        except DownloadError as error:
            failures.append(error)
    return loaded, failures


def score(
    items: Sequence[Item],
    metrics: dict[MetricInfo, Any],
    *,
    crop_border: int = 0,
    on_start: Callable[[Item], None] = lambda item: None,
) -> Iterator[ImageScores]:
    """Score the items in turn. What can't be read, compared or computed is told in that image's `problems`.

    Images are compared as RGB in 0..1 (gray as three equal channels, alpha left out), without `crop_border` pixels at
    each side. A metric that needs ground truth passes over an item without one.
    """
    for item in items:
        on_start(item)
        values: dict[str, float] = {}
        problems: dict[str, str] = {}
        try:
            image = _cropped(read_image(item.image), crop_border, item.image)
        except PddError as error:
            yield ImageScores(item, problems={"": error.message})
            continue
        reference, trouble = _reference(item, image, crop_border)
        for info, network in metrics.items():
            if info.full_reference and reference is None:
                if trouble:
                    problems[info.name] = trouble
                continue
            try:
                values[info.name] = _value(network, image, reference if info.full_reference else None)
            except PddError as error:
                problems[info.name] = error.message
        yield ImageScores(item, values, problems)


def _reference(item: Item, image: Tensor, crop_border: int) -> tuple[Tensor | None, str]:
    """The ground truth, or why there is none that fits."""
    if item.reference is None:
        return None, ""
    try:
        reference = _cropped(read_image(item.reference), crop_border, item.reference)
    except PddError as error:
        return None, error.message
    if reference.shape != image.shape:
        sizes = ["{}x{}".format(*reversed(tensor.shape[-2:])) for tensor in (image, reference)]
        return None, f"{item.image} is {sizes[0]}, its ground truth {item.reference} is {sizes[1]}"
    return reference, ""


def _cropped(picture: Picture, border: int, path: Path) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    if 2 * border >= min(picture.height, picture.width):
        raise InputError(f"{path}: nothing is left of it after --crop-border {border}")
    pixels = torch.from_numpy(picture.to_float()).permute(2, 0, 1)
    if border:
        pixels = pixels[:, border:-border, border:-border]
    return pixels.expand(3, -1, -1)[None].contiguous()


def _value(network: Any, image: Tensor, reference: Tensor | None) -> float:
    """One score. Raises PddError for whatever a metric fails of on this image."""
    try:
        with quiet():
            result = network(image) if reference is None else network(image, reference)
            value = float(result.reshape(-1)[0]) if isinstance(result, Tensor) else float(result)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, ZeroDivisionError, MemoryError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PddError(f"the metric failed: {text}") from error
    if not math.isfinite(value):
        raise PddError(f"the metric gives {value}")
    return value
