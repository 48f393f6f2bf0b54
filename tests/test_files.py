"""Whole files or none, on every system; what the system says of itself against the kernel's own files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdd_cli import files, system
from pdd_cli.errors import InputError
from pdd_cli.files import atomic_write, remove_leftovers, write_text


def test_a_file_is_closed_when_it_is_renamed(tmp_path: Path, renames: list[Path]) -> None:
    write_text(tmp_path / "a.txt", "first")
    write_text(tmp_path / "a.txt", "second")
    assert renames == [tmp_path / "a.txt"] * 2  # each checked by the fixture
    assert (tmp_path / "a.txt").read_text() == "second"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~files._umask()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_an_open_file_would_be_noticed(tmp_path: Path, renames: list[Path]) -> None:
    path = tmp_path / "a"
    with path.open("w"), pytest.raises(AssertionError, match="open"):
        path.replace(tmp_path / "b")


def test_a_block_that_raises_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(InputError), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.with_name("absent").rename(temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_running_one_kept(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from pdd_cli.files import atomic_write\n"
        f"with atomic_write(Path({str(tmp_path / 'a.bin')!r})) as path:\n"
        "    path.write_bytes(b'x'); print(path, flush=True); input()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    left = Path(process.stdout.readline().decode().strip())
    remove_leftovers([tmp_path])
    assert left.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=500)
    remove_leftovers([tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_file_about_to_be_renamed_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its writer has given the lock up, and renames it while the remover waits.
    closed = tmp_path / f"{files._TEMPORARY}x.txt"
    closed.write_text("whole")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: closed.replace(tmp_path / "a.txt"))
    remove_leftovers([tmp_path])
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="compares with Linux's /proc")
def test_memory_is_that_of_the_kernel() -> None:
    def kilobytes(file: str, name: str) -> int:
        return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name))

    assert system.free_memory() == pytest.approx(1024 * kilobytes("/proc/meminfo", "MemAvailable:"), rel=0.2)
    assert system.resident_memory() == pytest.approx(1024 * kilobytes("/proc/self/status", "VmRSS:"), rel=0.2)
    assert system.resident_memory() <= system.peak_memory() <= 1024 * kilobytes("/proc/self/status", "VmPeak:")


@pytest.mark.slow
def test_no_module_needs_what_only_unix_has() -> None:
    # The libraries come first: those of this system may use what they find on it.
    program = (
        "import importlib, os, pkgutil, sys\n"
        "import torch, torchvision, spandrel, psutil, filelock, llvmlite.binding, pydantic, av, cv2\n"
        "import rich, typer, yaml, huggingface_hub, requests, scipy.io, tifffile, platformdirs, safetensors.torch\n"
        "for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp', 'pty', 'posix'): sys.modules[name] = None\n"
        "del os.sched_getaffinity\n"
        "import pdd_cli\n"
        "for module in pkgutil.walk_packages(pdd_cli.__path__, 'pdd_cli.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "from pdd_cli import runtime\n"
        "assert runtime.available_cpus() == os.cpu_count() and runtime.choose_runtime('cpu').device_type == 'cpu'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_kernels_list_the_instructions_are_llvms(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path) -> str:
        raise FileNotFoundError(self)

    known = system.cpu_features()
    monkeypatch.setattr(Path, "read_text", absent)
    by_llvm = system.cpu_features()
    if {"sse2", "avx2"} & known:  # an x86
        assert [name in by_llvm for name in ("sse2", "avx2", "fma")] == [
            name in known for name in ("sse2", "avx2", "fma")
        ]
    assert by_llvm


@pytest.mark.parametrize("own", [None, "7"])
def test_idle_threads_do_not_spin_for_long(own: str | None) -> None:
    """OpenMP reads how long as PyTorch is loaded: it is set before, and not where the user has set it."""
    script = (
        "import os, sys\nfrom pdd_cli import cli\n"
        "cli.app = lambda standalone_mode: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\ncli.main()"
    )
    variables = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    variables |= {} if own is None else {"GOMP_SPINCOUNT": own}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [own or "10000", "False"]
