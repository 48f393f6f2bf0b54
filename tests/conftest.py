"""Fixtures that several test files share."""

import collections
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.system import is_real_time
from tests.helpers.commands import Outcome, invoke
from tests.helpers.networks import efficientnet_state

hypothesis.settings.register_profile("pdd", deadline=None)  # on a busy machine any example may take long
hypothesis.settings.load_profile("pdd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with most slow tests come first: with several processes, none computes a long file alone at the end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests without a PDD_HOME of their own share one: nothing is kept in the user's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PDD_HOME", str(tmp_path_factory.mktemp("pdd-home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _renamed() -> Iterator[list[Path]]:
    """Where this process has renamed files to. Each must be closed by then, for Windows renames no open file."""
    renamed = []
    replace = os.replace

    def closed(source: str | Path, target: str | Path, **more: int) -> None:
        opened = Path("/proc/self/fd")
        for descriptor in opened.iterdir() if opened.exists() else ():
            try:
                is_open = descriptor.samefile(source)
            except OSError:  # a pipe, or closed meanwhile
                continue
            assert not is_open, f"{source} is open when it is renamed to {target}"
        renamed.append(Path(target))
        replace(source, target, **more)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "replace", closed)
        yield renamed


@pytest.fixture
def renames(_renamed: list[Path]) -> list[Path]:
    """Where this test has renamed files to."""
    _renamed.clear()
    return _renamed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PDD_HOME of this test's own."""
    folder = tmp_path / "pdd-home"
    monkeypatch.setenv("PDD_HOME", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of metrics' weights, and an empty PDD_HOME."""
    monkeypatch.setenv("PDD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "hub" / "pyiqa"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "pyiqa"


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """A folder with a tiny base model, feature weights, and images that aren't flat."""
    folder = tmp_path_factory.mktemp("ground")
    torch.manual_seed(0)
    network = RRDBNet(features=8, growth=32, blocks=1)
    save_file(network.state_dict(), folder / "base.safetensors")
    save_file(efficientnet_state()[1], folder / "features.safetensors")
    rng = np.random.default_rng(0)
    for name, count, size in (("realLR", 3, 40), ("hr", 2, 120)):
        (folder / name).mkdir()
        for number in range(count):
            coarse = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws doesn't depend on those before it, some of which only some CPUs can run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _normal_scheduling() -> Iterator[None]:
    """No test leaves this process real-time: it would starve all others. See `without_real_time_scheduling`."""
    yield
    assert not is_real_time(0)


@pytest.fixture
def pdd(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`pdd ARGUMENTS` in this process, in an empty folder, with an empty store."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return invoke
