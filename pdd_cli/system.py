"""Code that depends on the operating system: CPU features, cores, memory, process-wide settings and file locks."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cpu_features() -> frozenset[str]:
    """The CPU's instruction sets: by the names that Linux uses, on other systems by LLVM's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return frozenset(next(line for line in lines if line.startswith(("flags", "Features"))).split(":")[1].split())
    except (OSError, StopIteration):
        from llvmlite import binding

        return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def cpu_name() -> str:
    """The model of the CPU."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def available_cpus() -> int:
    """The number of logical cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


def usable_cpus() -> int:
    """The number of threads that can run at once: the available cores, or fewer if a container has a CPU limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available_cpus(), math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no limit ("max"), or no cgroup
        return available_cpus()


def free_memory() -> int:
    """Bytes of memory that programs can still use without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident_memory() -> int:
    """Bytes of memory that this process uses now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes of memory that this process has used so far."""
    try:
        # Linux inherits `ru_maxrss` from the parent process; VmHWM belongs to this process.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_thread_spinning() -> None:
    """Make idle OpenMP threads sleep after a short time instead of keeping a core busy.

    Call it before PyTorch is imported, because OpenMP reads the variables then; child processes inherit them. On a
    machine that is busy with other programs, spinning threads take the cores from the threads that they wait for: a
    training step took up to forty times as long. Variables that are already set are kept.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU: about 200 microseconds
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # Intel and LLVM: milliseconds


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse instead of returning it to the system.

    By default glibc returns every block above a few MiB, and the system would zero hundreds of MiB in each training
    step. With other C libraries this does nothing.
    """
    try:
        configure = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    configure(trim_threshold, 2**31 - 1)
    configure(mmap_threshold, 2**30)


@contextmanager
def without_real_time_scheduling() -> Iterator[None]:
    """Return the threads of this process to normal scheduling at the end, if code inside made them real-time (Linux).

    Open encoders of FFmpeg inside this context: SVT-AV1, run as root, gives the calling thread and about 40 others
    real-time scheduling (SCHED_FIFO), so that they starve all other programs. A process that is real-time already is
    left as it is.
    """
    if sys.platform != "linux":
        yield
        return
    was_real_time = is_real_time(0)
    try:
        yield
    finally:
        if not was_real_time:
            for task in Path("/proc/self/task").iterdir():
                with suppress(ProcessLookupError):  # the thread has ended
                    if is_real_time(int(task.name)):
                        os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


def is_real_time(thread: int) -> bool:
    """Whether a thread (0: the calling one) has real-time scheduling. Linux only."""
    if sys.platform != "linux":
        return False
    return os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK in (os.SCHED_FIFO, os.SCHED_RR)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or the process ends. Returns whether it was locked.

    False if another process holds the lock, or the file system has no locks. Windows needs no lock, because it refuses
    to remove or replace an open file.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def silenced() -> Iterator[None]:
    """Discard what compiled code prints to the standard streams of the process, past Python's `sys.stdout`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = []
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        for number in (1, 2):
            with suppress(OSError):  # a process without standard streams
                saved.append((number, os.dup(number)))
                os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
