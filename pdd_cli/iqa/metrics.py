"""Scores of images by pyiqa's metrics, and by two of our own that need the LR inputs."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pdd_cli.errors import InputError, PddError
from pdd_cli.imaging.decode import image_size, read_image
from pdd_cli.imaging.encode import write_image
from pdd_cli.imaging.image import DecodedImage
from pdd_cli.iqa.consistency import Array, colour_drift, downscale_consistency
from pdd_cli.iqa.filtering import FastFilters
from pdd_cli.iqa.pyiqa_adapter import check_names, is_of_folders, load_metric, metric_config, quiet, sample_pair
from pdd_cli.runtime import available_memory, is_out_of_memory
from pdd_cli.weights.fetch import OnEvent

_log = logging.getLogger(__name__)

# What a formula takes for a pixel at most (measured: cw_ssim 670, ssim and niqe 150), and those that take more; and the
# share of the free memory that images computed at the same time may take. One image at a time is always computed.
_BYTES_PER_PIXEL = 700
_HUNGRY = {"mad": 4300, "entropy": 2000}
_MEMORY_SHARE = 0.5
# Metrics that compute something for smaller images, too, but nothing that could be relied on: niqe compares the spread
# over blocks of 96 pixels with that of natural images, and needs several; pi crops 4 pixels first.
_SMALLEST = {"niqe": 192, "niqe_matlab": 192, "pi": 200}
_LARGEST_TRIED = 512  # pixels a side, in search of the smallest image that a metric works for
# What compares luma alone.
LUMA_METRICS = ("psnry", "ssim", "ms_ssim", "cw_ssim")


Luma = Literal["full", "matlab"]


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is: `reference` is what it compares with (nothing, HR ground truth, or the LR input).

    `value_range` as pyiqa states it, roughly; `unit` where differences are read in one.
    """

    name: str
    reference: Literal["none", "full", "lr"]
    lower_better: bool
    value_range: str
    unit: str = ""
    smallest: int = 1  # pixels on each side below which its value means nothing
    of_sets: bool = False  # scores a set of images as a whole (fid), with the set of their HR images where it compares

    @property
    def better(self) -> str:
        """The better side: lower or higher."""
        return "lower" if self.lower_better else "higher"

    def rules_out(self, value: float) -> bool:
        """Whether `value` is impossible: beyond the stated range by more than its width. Ranges are stated roughly."""
        low, _, high = self.value_range.partition(", ")
        try:
            bottom, top = float(low), float(high)
        except ValueError:  # "~0, ~1": no bounds
            return False
        return not 2 * bottom - top <= value <= 2 * top - bottom

    @property
    def arrow(self) -> str:
        """↓ where lower is better, ↑ where higher is."""
        return "↓" if self.lower_better else "↑"

    @property
    def title(self) -> str:
        """Name and arrow, for the head of a column."""
        return f"{self.name} {self.arrow}"


CONSISTENCY = MetricInfo("downscale_consistency", "lr", False, "0, 100", "dB")
DRIFT = MetricInfo("colour_drift", "lr", True, "0, ~100", "ΔE")
_OWN: dict[str, tuple[MetricInfo, Callable[[Array, Array], float]]] = {
    CONSISTENCY.name: (CONSISTENCY, downscale_consistency),
    DRIFT.name: (DRIFT, colour_drift),
}


@dataclass(frozen=True)
class Item:
    """An image to score, with its ground truth and the LR image it was made from where they are known."""

    image: Path
    reference: Path | None = None
    lr: Path | None = None


@dataclass(frozen=True)
class ImageScores:
    """The scores of one image by metric; `problems` says by metric (or, under "", for all) why one lacks."""

    item: Item
    values: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def metric_infos(names: Sequence[str]) -> list[MetricInfo]:
    """The metrics `names`. Raises InputError for one that pyiqa doesn't have."""
    check_names([name for name in names if name not in _OWN])
    infos = []
    for name in dict.fromkeys(names):
        if name in _OWN:
            infos.append(_OWN[name][0])
            continue
        config = metric_config(name)
        compares = config["metric_mode"] == "FR" or "fid" in name
        infos.append(
            MetricInfo(
                name,
                reference="full" if compares else "none",
                lower_better=bool(config.get("lower_better", False)),
                value_range=str(config.get("score_range", "")),
                unit="dB" if name.startswith("psnr") else "",
                smallest=_SMALLEST.get(name, 1),
                of_sets=is_of_folders(name),
            )
        )
    return infos


def load_metrics(
    infos: Sequence[MetricInfo], *, device: str, luma: Luma = "full", offline: bool, on_event: OnEvent
) -> tuple[dict[MetricInfo, Any], dict[MetricInfo, PddError]]:
    """The metrics, ready to be called, whose weights can be had; and why the others can't.

    `luma`: that of `LUMA_METRICS`, of full range (0..255) or as MATLAB's rgb2ycbcr has it (16..235).
    """
    loaded: dict[MetricInfo, Any] = {}
    failures: dict[MetricInfo, PddError] = {}
    for info in infos:
        try:
            if info.name in _OWN:
                loaded[info] = _OWN[info.name][1]
            else:
                options = {"color_space": "ycbcr"} if luma == "matlab" and info.name in LUMA_METRICS else {}
                loaded[info] = load_metric(
                    info.name, device=device, offline=offline, on_event=on_event, options=options
                )
        except PddError as error:
            failures[info] = error
    return loaded, failures


def score(
    items: Sequence[Item],
    metrics: Mapping[MetricInfo, Any],
    *,
    crop_border: int = 0,
    on_start: Callable[[Item], None] = lambda item: None,
) -> Generator[ImageScores, None, None]:
    """Score the items in turn. What can't be read, compared or computed is named in that image's `problems`.

    Images are compared as RGB in 0..1 (gray as three equal channels, alpha left out), without `crop_border` pixels at
    each side (what is compared with the LR keeps them). A metric passes over an item without what it compares with.

    Threads decode the next images and compute those metrics that are formulas, an image a thread: pyiqa's use
    one core each. Networks take all cores, or the GPU, and run one after the other. stdout is silent until the
    iterator is exhausted, for metrics print.
    """
    metrics = {info: metric for info, metric in metrics.items() if not info.of_sets}
    formulas = {info: metric for info, metric in metrics.items() if _is_formula(metric)}
    networks = {info: metric for info, metric in metrics.items() if info not in formulas}
    threads = torch.get_num_threads()
    hunger = max((_HUNGRY.get(info.name, _BYTES_PER_PIXEL) for info in formulas), default=_BYTES_PER_PIXEL)
    workers = _workers(items, threads, hunger)
    sizes = _Sizes()
    enlarged = any(_is_enlarged(item) for item in items)

    def begin(item: Item) -> tuple[_Opened, ImageScores]:
        opened = _open(item, crop_border, enlarged)
        return opened, _scored(opened, formulas, sizes)

    waiting = iter(items)
    with quiet(), ThreadPoolExecutor(workers, initializer=_take_threads, initargs=(threads // workers,)) as pool:
        ahead: deque[Future[tuple[_Opened, ImageScores]]] = deque()
        try:
            ahead.extend(pool.submit(begin, item) for item in islice(waiting, workers + 1))
            for item in items:
                on_start(item)
                opened, scores = ahead.popleft().result()
                ahead.extend(pool.submit(begin, following) for following in islice(waiting, 1))
                rest = _scored(opened, networks, sizes)
                values = {info.name: (scores.values | rest.values).get(info.name) for info in metrics}
                yield ImageScores(
                    item,
                    {name: value for name, value in values.items() if value is not None},
                    scores.problems | rest.problems,
                )
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def score_set(items: Sequence[Item], info: MetricInfo, metric: Any) -> float:
    """The score of all items together by a metric `of_sets`. Raises PddError where it can't be computed."""
    if info.reference == "full":
        items = [item for item in items if item.reference]
    what = f"{info.name} of the {len(items)} images"
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "sr"), Path(name, "hr")
        for index, item in enumerate(items):
            for folder, path in zip(folders, (item.image, item.reference), strict=True):
                folder.mkdir(exist_ok=True)
                if path is not None:
                    # pyiqa reads what its own reader knows: alpha, 16 bits and orientation are settled before.
                    pixels = (_rgb(read_image(path)) * 255).round().astype(np.uint8)
                    write_image(folder / f"{index:08}.png", DecodedImage(pixels))
        places = [str(folder) for folder in (folders if info.reference == "full" else folders[:1])]
        try:
            with quiet():
                result = metric(*places, num_workers=0, verbose=False)
        except Exception as error:
            raise PddError(f"{what}: the metric failed: {_reason(error)}") from error
    value = float(result["inception_score_mean"] if isinstance(result, dict) else result)
    if not math.isfinite(value):
        raise PddError(f"{what}: the metric gives {value}")
    return value


@dataclass(frozen=True)
class _Opened:
    """The decoded item: (1, 3, H, W) cropped for pyiqa, (H, W, 3) whole for ours; `troubles` by what lacks."""

    item: Item
    image: Tensor | None = None
    reference: Tensor | None = None
    whole: Array | None = None
    lr: Array | None = None
    border: int = 0
    troubles: dict[str, str] = field(default_factory=dict)

    @property
    def compared(self) -> list[tuple[Path, Tensor]]:
        """The image, and the ground truth where there is one, with their files."""
        pairs = ((self.item.image, self.image), (self.item.reference, self.reference))
        return [(path, tensor) for path, tensor in pairs if path is not None and tensor is not None]


def _open(item: Item, border: int, enlarged: bool) -> _Opened:
    try:
        return _decoded(item, border, enlarged)
    except Exception as error:  # of any kind: it is this image's, and the others are scored
        _log.debug("reading %s", item, exc_info=True)
        return _Opened(item, troubles={"image": f"{item.image}: can't be read: {_reason(error)}"})


def _decoded(item: Item, border: int, enlarged: bool) -> _Opened:
    troubles: dict[str, str] = {}
    try:
        whole = _rgb(read_image(item.image))
        image = _cropped(whole, border, item.image)
    except PddError as error:
        return _Opened(item, troubles={"image": error.message})
    reference = lr = None
    try:
        reference = _cropped(_rgb(read_image(item.reference)), border, item.reference) if item.reference else None
    except PddError as error:
        troubles["full"] = error.message
    if reference is not None and reference.shape != image.shape:
        sizes = ["{}x{}".format(*reversed(tensor.shape[-2:])) for tensor in (image, reference)]
        troubles["full"] = f"{item.image} is {sizes[0]}, its ground truth {item.reference} is {sizes[1]}"
        reference = None
    try:
        lr = _rgb(read_image(item.lr)) if item.lr else None
    except PddError as error:
        troubles["lr"] = error.message
    if lr is not None and lr.shape == whole.shape and enlarged:
        troubles["lr"] = f"{item.image} and its LR {item.lr} have the same size, while other images are enlarged"
        lr = None
    return _Opened(item, image, reference, whole, lr, border, troubles)


def _rgb(picture: DecodedImage) -> Array:
    return np.broadcast_to(picture.to_float(), (picture.height, picture.width, 3))


def _cropped(pixels: Array, border: int, path: Path) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    height, width = pixels.shape[:2]
    if 2 * border >= min(height, width):
        raise InputError(f"{path}: nothing is left of it after --crop-border {border}")
    inner = pixels[border : height - border, border : width - border]
    return torch.from_numpy(np.ascontiguousarray(inner.transpose(2, 0, 1)))[None]


class _Sizes:
    """The smallest images that metrics work for, found by trying, once each."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def smallest(self, info: MetricInfo, metric: Any) -> int:
        """Pixels on each side; 0 where the metric fails for large images, too."""
        if info.name not in self._found:
            low, high = 0, _LARGEST_TRIED
            while high - low > 1:
                side = (low + high) // 2
                low, high = (low, side) if _works(info, metric, side) else (side, high)
            self._found[info.name] = high if _works(info, metric, high) else 0
        return self._found[info.name]


def _works(info: MetricInfo, metric: Any, side: int) -> bool:
    image, other = sample_pair(side)
    try:
        _value(metric, *((other, image) if info.reference == "full" else (other,)))
    except PddError:
        return False
    return True


def _is_enlarged(item: Item) -> bool:
    """Whether the image is larger than its LR, as far as the files' beginnings tell."""
    try:
        return item.lr is not None and math.prod(image_size(item.image)) > math.prod(image_size(item.lr))
    except PddError:
        return False


def _scored(opened: _Opened, metrics: Mapping[MetricInfo, Any], sizes: _Sizes) -> ImageScores:
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    if opened.image is None:
        return ImageScores(opened.item, problems={"": opened.troubles["image"]})
    height, width = opened.image.shape[-2:]
    for info, metric in metrics.items():
        others = {"none": opened.image, "full": opened.reference, "lr": opened.lr}
        if others[info.reference] is None:
            if info.reference in opened.troubles:
                problems[info.name] = opened.troubles[info.reference]
            continue
        if min(height, width) < info.smallest:
            problems[info.name] = _too_small(opened, info, info.smallest)
            continue
        try:
            match info.reference:
                case "none":
                    values[info.name] = _value(metric, opened.image)
                case "full":
                    values[info.name] = _value(metric, opened.image, opened.reference)
                case "lr":
                    values[info.name] = float(metric(opened.whole, opened.lr))
            if info.rules_out(values[info.name]):
                value = values.pop(info.name)
                raise PddError(f"the metric gives {value:g}, far outside its range {info.value_range}")
        except PddError as error:
            smallest = sizes.smallest(info, metric) if min(height, width) < _LARGEST_TRIED else 0
            reason = f"{opened.item.image}: {info.name}: {error.message}"
            if min(height, width) < smallest:
                reason = _too_small(opened, info, smallest)
            elif flat := next((path for path, tensor in opened.compared if _is_flat(tensor)), None):
                reason = f"{flat}: all pixels are the same; {info.name} has no value for such an image"
            problems[info.name] = reason
        except ValueError as error:  # an LR that can't be the one
            problems[info.name] = f"{opened.item.image}, {opened.item.lr}: {error}"
        except Exception as error:
            _log.debug("%s of %s", info.name, opened.item, exc_info=True)
            problems[info.name] = f"{opened.item.image}: {info.name}: {_reason(error)}"
    return ImageScores(opened.item, values, problems)


def _is_flat(image: Tensor) -> bool:
    return bool((image == image[..., :1, :1]).all())


def _too_small(opened: _Opened, info: MetricInfo, smallest: int) -> str:
    assert opened.image is not None
    height, width = opened.image.shape[-2:]
    cropped = " after --crop-border" if opened.border else ""
    size = f"{width}x{height} pixels{cropped}"
    return f"{opened.item.image}: {size} are too few for {info.name}, which needs at least {smallest} on each side"


def _value(metric: Any, *images: Tensor | None) -> float:
    """One score. Raises PddError for whatever a metric fails of on this image."""
    try:
        with FastFilters():
            result = _computed(metric, *images)
        value = float(result.reshape(-1)[0]) if isinstance(result, Tensor) else float(result)
    except Exception as error:  # of any kind: metrics are many
        raise PddError(f"the metric failed: {_reason(error)}") from error
    if not math.isfinite(value):
        raise PddError(f"the metric gives {value}")
    return value


def _computed(metric: Any, *images: Tensor | None) -> Any:
    """What the metric says of the images; where a GPU's memory doesn't hold them, computed on the CPU."""
    try:
        return metric(*images)
    except Exception as error:
        if not is_out_of_memory(error) or metric.dummy_param.device.type == "cpu":
            raise
    # Outside of the handler: the error would keep alive what lies on the GPU.
    return _on_cpu(metric, *images)


def _on_cpu(network: Any, *images: Tensor | None) -> Any:
    """The score computed on the CPU; the network goes back to its device afterwards."""
    device = network.dummy_param.device
    try:
        network.net.to("cpu")
        torch.cuda.empty_cache()
        with torch.inference_mode():
            return network.net(*images)
    finally:
        network.net.to(device)


def _reason(error: Exception) -> str:
    """The kind and first line of a library's failure; of memory in plain words."""
    if is_out_of_memory(error):
        return "not enough memory for an image of this size"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _is_formula(metric: Any) -> bool:
    """Whether it is computed on the CPU without learned layers: safe to call from several threads at once."""
    if not isinstance(metric, torch.nn.Module):
        return True
    on_cpu = torch.device(getattr(metric, "device", "cpu")).type == "cpu"
    return on_cpu and not any(parameter.numel() for parameter in metric.parameters())


def _workers(items: Sequence[Item], threads: int, bytes_per_pixel: int) -> int:
    largest = 1
    for item in items:
        try:
            width, height = image_size(item.image)
        except PddError:
            continue  # reported when its turn comes
        largest = max(largest, width * height)
    memory = available_memory(torch.device("cpu")) * _MEMORY_SHARE
    return max(1, min(threads, int(memory // (bytes_per_pixel * largest))))


def _take_threads(count: int) -> None:
    torch.set_num_threads(max(1, count))
