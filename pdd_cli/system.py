"""Everything that depends on the operating system: the CPU's instructions, cores, memory, and file locks."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path


def cpu_features() -> frozenset[str]:
    """The CPU's instruction sets by the operating system's names (Linux), or by LLVM's (other systems)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return frozenset(next(line for line in lines if line.startswith(("flags", "Features"))).split(":")[1].split())
    except (OSError, StopIteration):
        from llvmlite import binding

        return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def available_cpus() -> int:
    """The logical cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


def usable_cpus() -> int:
    """How many threads can run at once: on the available cores, fewer where a container is granted less time."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available_cpus(), math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # "max", or no such group
        return available_cpus()


def free_memory() -> int:
    """Bytes of memory that programs can still take without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    try:
        # Linux hands `ru_maxrss` on from the program that started this one; VmHWM is this one's.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_without_spinning() -> None:
    """Let idle threads of PyTorch sleep after a moment, instead of keeping a core busy until there is work again.

    For this process and those that it starts; OpenMP reads it as PyTorch is loaded. Threads that wait for each other
    for milliseconds take the cores from those they wait for, where other programs are busy, too: a step of training
    took up to forty times as long. Whoever has set the variables keeps them.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's: some 200 microseconds
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # Intel's and LLVM's: milliseconds


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of returning it to the system and asking for it anew.

    With glibc, which otherwise does so for what is larger than some MiB: every step of training would begin with the
    system zeroing hundreds of MiB.
    """
    try:
        configure = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # by the numbers of malloc.h
    configure(trim_threshold, 2**31 - 1)
    configure(mmap_threshold, 2**30)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or its process ends; False where another process has locked it.

    Windows needs no lock: it refuses to remove or replace a file that is open. False, too, on a file system without
    locks.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
