"""Scores of images by pyiqa's metrics, and by two of pdd's own that compare with the LR inputs."""

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
from pdd_cli.iqa.pyiqa_adapter import check_names, load_metric, metric_config, quiet, sample_pair, scores_sets
from pdd_cli.runtime import available_memory, is_out_of_memory
from pdd_cli.weights.fetch import OnEvent

_log = logging.getLogger(__name__)

# The most memory that a formula needs for each pixel (measured: cw_ssim 670, ssim and niqe 150), and the formulas that
# need more. All images that are computed at the same time may use a fraction of the free memory; one always may.
_BYTES_PER_PIXEL = 700
_BYTES_PER_PIXEL_OF = {"mad": 4300, "entropy": 2000}
_MEMORY_FRACTION = 0.5
# Metrics whose values for smaller images are unreliable: niqe compares the spread over blocks of 96 pixels with that of
# natural images, and needs several blocks; pi crops 4 pixels first.
_SMALLEST = {"niqe": 192, "niqe_matlab": 192, "pi": 200}
_LARGEST_TRIED = 512  # pixels on each side, in the search for the smallest image that a metric accepts
# Metrics that compare luma only.
LUMA_METRICS = ("psnry", "ssim", "ms_ssim", "cw_ssim")


Luma = Literal["full", "matlab"]


@dataclass(frozen=True)
class MetricInfo:
    """A metric and its properties.

    `reference`: the image that it compares with (none, the HR ground truth, or the LR input). `value_range`: the range
    that pyiqa states, roughly. `unit`: that of its values, where it has one.
    """

    name: str
    reference: Literal["none", "full", "lr"]
    lower_better: bool
    value_range: str
    unit: str = ""
    smallest: int = 1  # pixels on each side; values of smaller images are unreliable
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
    """The scores of one image by metric; `problems` gives the reason for each missing score ("": for all metrics)."""

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
                of_sets=scores_sets(name),
            )
        )
    return infos


def load_metrics(
    infos: Sequence[MetricInfo], *, device: str, luma: Luma = "full", offline: bool, on_event: OnEvent
) -> tuple[dict[MetricInfo, Any], dict[MetricInfo, PddError]]:
    """The metrics that could be loaded, ready to be called, and the errors of the others.

    `luma`: the luma of `LUMA_METRICS`, of full range (0..255) or of MATLAB's rgb2ycbcr (16..235).
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
    """Score the items in turn. Errors of an image are listed in its `problems`.

    Images are compared as RGB in 0..1 (gray as three equal channels, alpha ignored), without `crop_border` pixels at
    each side; comparisons with the LR use the whole image. A metric skips an item that lacks the image to compare with.

    Threads decode the next images and compute the metrics that are formulas, one image in each thread, because pyiqa's
    formulas use one core. Networks use all cores, or the GPU, and run one after the other. stdout is suppressed until
    the iterator is exhausted, because metrics print.
    """
    metrics = {info: metric for info, metric in metrics.items() if not info.of_sets}
    formulas = {info: metric for info, metric in metrics.items() if _is_formula(metric)}
    networks = {info: metric for info, metric in metrics.items() if info not in formulas}
    threads = torch.get_num_threads()
    bytes_per_pixel = max(
        (_BYTES_PER_PIXEL_OF.get(info.name, _BYTES_PER_PIXEL) for info in formulas), default=_BYTES_PER_PIXEL
    )
    workers = _workers(items, threads, bytes_per_pixel)
    sizes = _SmallestSizes()
    enlarged = any(_is_enlarged(item) for item in items)

    def decode_and_score(item: Item) -> tuple[_DecodedItem, ImageScores]:
        decoded = _decode(item, crop_border, enlarged)
        return decoded, _score_item(decoded, formulas, sizes)

    waiting = iter(items)
    with quiet(), ThreadPoolExecutor(workers, initializer=_set_threads, initargs=(threads // workers,)) as pool:
        futures: deque[Future[tuple[_DecodedItem, ImageScores]]] = deque()
        try:
            futures.extend(pool.submit(decode_and_score, item) for item in islice(waiting, workers + 1))
            for item in items:
                on_start(item)
                decoded, scores = futures.popleft().result()
                futures.extend(pool.submit(decode_and_score, following) for following in islice(waiting, 1))
                rest = _score_item(decoded, networks, sizes)
                values = {info.name: (scores.values | rest.values).get(info.name) for info in metrics}
                yield ImageScores(
                    item,
                    {name: value for name, value in values.items() if value is not None},
                    scores.problems | rest.problems,
                )
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def score_set(items: Sequence[Item], info: MetricInfo, metric: Any, *, crop_border: int = 0) -> float:
    """The score of the whole set by a metric `of_sets`, without `crop_border` pixels at each side of the images.

    Raises PddError where it can't be computed.
    """
    if info.reference == "full":
        items = [item for item in items if item.reference]
    what = f"{info.name} of the {len(items)} images"
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "sr"), Path(name, "hr")
        for index, item in enumerate(items):
            for folder, path in zip(folders, (item.image, item.reference), strict=True):
                folder.mkdir(exist_ok=True)
                if path is not None:
                    # pyiqa's own reader does not handle alpha, 16 bits and orientation: 8-bit RGB is written for it.
                    inner = _without_border(read_image(path).to_rgb8(), crop_border, path)
                    write_image(folder / f"{index:08}.png", DecodedImage(inner))
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
class _DecodedItem:
    """The images of an item.

    `image`, `reference`: (1, 3, H, W) in 0..1, cropped, for pyiqa. `whole`, `lr`: (H, W, 3) in 0..1 for pdd's own
    metrics. `problems_by_input`: why an input is missing ("image", "full" or "lr").
    """

    item: Item
    image: Tensor | None = None
    reference: Tensor | None = None
    whole: Array | None = None
    lr: Array | None = None
    border: int = 0
    problems_by_input: dict[str, str] = field(default_factory=dict)

    @property
    def compared(self) -> list[tuple[Path, Tensor]]:
        """The image, and the ground truth where there is one, with their files."""
        pairs = ((self.item.image, self.image), (self.item.reference, self.reference))
        return [(path, tensor) for path, tensor in pairs if path is not None and tensor is not None]


def _decode(item: Item, border: int, enlarged: bool) -> _DecodedItem:
    try:
        return _read_item(item, border, enlarged)
    except Exception as error:  # of any kind: it concerns this image only
        _log.debug("reading %s", item, exc_info=True)
        return _DecodedItem(item, problems_by_input={"image": f"{item.image}: can't be read: {_reason(error)}"})


def _read_item(item: Item, border: int, enlarged: bool) -> _DecodedItem:
    problems_by_input: dict[str, str] = {}
    try:
        whole = _rgb(read_image(item.image))
        image = _cropped(whole, border, item.image)
    except PddError as error:
        return _DecodedItem(item, problems_by_input={"image": error.message})
    reference = lr = None
    try:
        reference = _cropped(_rgb(read_image(item.reference)), border, item.reference) if item.reference else None
    except PddError as error:
        problems_by_input["full"] = error.message
    if reference is not None and reference.shape != image.shape:
        sizes = ["{}x{}".format(*reversed(tensor.shape[-2:])) for tensor in (image, reference)]
        problems_by_input["full"] = f"{item.image} is {sizes[0]}, its ground truth {item.reference} is {sizes[1]}"
        reference = None
    try:
        lr = _rgb(read_image(item.lr)) if item.lr else None
    except PddError as error:
        problems_by_input["lr"] = error.message
    if lr is not None and lr.shape == whole.shape and enlarged:
        problems_by_input["lr"] = (
            f"{item.image} and its LR {item.lr} have the same size, while other images are enlarged"
        )
        lr = None
    return _DecodedItem(item, image, reference, whole, lr, border, problems_by_input)


def _rgb(picture: DecodedImage) -> Array:
    return np.broadcast_to(picture.to_float(), (picture.height, picture.width, 3))


def _cropped(pixels: Array, border: int, path: Path) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    inner = _without_border(pixels, border, path)
    return torch.from_numpy(np.ascontiguousarray(inner.transpose(2, 0, 1)))[None]


def _without_border(pixels: Array, border: int, path: Path) -> Array:
    height, width = pixels.shape[:2]
    if 2 * border >= min(height, width):
        raise InputError(f"{path}: nothing is left of it after --crop-border {border}")
    return np.ascontiguousarray(pixels[border : height - border, border : width - border])


class _SmallestSizes:
    """The smallest image that each metric accepts, found by bisection, once for each metric."""

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
    """Whether the image is larger than its LR, by the sizes in the files' headers."""
    try:
        return item.lr is not None and math.prod(image_size(item.image)) > math.prod(image_size(item.lr))
    except PddError:
        return False


def _score_item(decoded: _DecodedItem, metrics: Mapping[MetricInfo, Any], sizes: _SmallestSizes) -> ImageScores:
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    if decoded.image is None:
        return ImageScores(decoded.item, problems={"": decoded.problems_by_input["image"]})
    height, width = decoded.image.shape[-2:]
    for info, metric in metrics.items():
        others = {"none": decoded.image, "full": decoded.reference, "lr": decoded.lr}
        if others[info.reference] is None:
            if info.reference in decoded.problems_by_input:
                problems[info.name] = decoded.problems_by_input[info.reference]
            continue
        if min(height, width) < info.smallest:
            problems[info.name] = _too_small(decoded, info, info.smallest)
            continue
        try:
            match info.reference:
                case "none":
                    values[info.name] = _value(metric, decoded.image)
                case "full":
                    values[info.name] = _value(metric, decoded.image, decoded.reference)
                case "lr":
                    values[info.name] = float(metric(decoded.whole, decoded.lr))
            if info.rules_out(values[info.name]):
                value = values.pop(info.name)
                raise PddError(f"the metric gives {value:g}, far outside its range {info.value_range}")
        except PddError as error:
            smallest = sizes.smallest(info, metric) if min(height, width) < _LARGEST_TRIED else 0
            reason = f"{decoded.item.image}: {info.name}: {error.message}"
            if min(height, width) < smallest:
                reason = _too_small(decoded, info, smallest)
            elif flat := next((path for path, tensor in decoded.compared if _is_flat(tensor)), None):
                reason = f"{flat}: all pixels are the same; {info.name} has no value for such an image"
            problems[info.name] = reason
        except ValueError as error:  # the LR does not fit
            problems[info.name] = f"{decoded.item.image}, {decoded.item.lr}: {error}"
        except Exception as error:
            _log.debug("%s of %s", info.name, decoded.item, exc_info=True)
            problems[info.name] = f"{decoded.item.image}: {info.name}: {_reason(error)}"
    return ImageScores(decoded.item, values, problems)


def _is_flat(image: Tensor) -> bool:
    return bool((image == image[..., :1, :1]).all())


def _too_small(decoded: _DecodedItem, info: MetricInfo, smallest: int) -> str:
    assert decoded.image is not None
    height, width = decoded.image.shape[-2:]
    cropped = " after --crop-border" if decoded.border else ""
    size = f"{width}x{height} pixels{cropped}"
    return f"{decoded.item.image}: {size} are too few for {info.name}, which needs at least {smallest} on each side"


def _value(metric: Any, *images: Tensor | None) -> float:
    """One score. Raises PddError where the metric fails or its value is not finite."""
    try:
        with FastFilters():
            result = _computed(metric, *images)
        value = float(result.reshape(-1)[0]) if isinstance(result, Tensor) else float(result)
    except Exception as error:  # of any kind: pyiqa's metrics share none
        raise PddError(f"the metric failed: {_reason(error)}") from error
    if not math.isfinite(value):
        raise PddError(f"the metric gives {value}")
    return value


def _computed(metric: Any, *images: Tensor | None) -> Any:
    """The metric's result; computed on the CPU where the GPU's memory is too small."""
    try:
        return metric(*images)
    except Exception as error:
        if not is_out_of_memory(error) or metric.dummy_param.device.type == "cpu":
            raise
    # Outside the handler, because the exception keeps tensors on the GPU alive.
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
    """The type and first line of a library's error; a plain sentence where memory ran out."""
    if is_out_of_memory(error):
        return "not enough memory for an image of this size"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _is_formula(metric: Any) -> bool:
    """Whether the metric runs on the CPU without learned layers, and so may be called from several threads."""
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
    memory = available_memory(torch.device("cpu")) * _MEMORY_FRACTION
    return max(1, min(threads, int(memory // (bytes_per_pixel * largest))))


def _set_threads(count: int) -> None:
    torch.set_num_threads(max(1, count))
