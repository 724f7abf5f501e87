"""What can this machine do fast? Threads, the allocator, and a probe for bf16 products."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

_ALLOCATOR_TUNED = False


def core_count() -> int:
    """Processor cores this process may use: the affinity mask, never more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def tune_allocator() -> bool:
    """Ask glibc to keep freed blocks instead of returning them to the system; True when it could.

    A training step frees and takes back the same large blocks; by default each is unmapped and faulted in again, zeroed
    page by page. Keeping them was worth a factor of about 1.3 in a step on a CPU.
    """
    global _ALLOCATOR_TUNED
    if _ALLOCATOR_TUNED or platform.system() != "Linux":
        return _ALLOCATOR_TUNED
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # the names of malloc.h
    _ALLOCATOR_TUNED = bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))
    return _ALLOCATOR_TUNED


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs here: a C++ compiler and Python's headers, and Triton for a GPU."""
    compiler = any(which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    return compiler and headers and (device.type == "cpu" or find_spec("triton") is not None)


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def processor_name() -> str:
    """The processor's or accelerator's name, for the record."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes of memory free for a run: the accelerator's, else the machine's; None when it cannot be read."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


def matmul_speed(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """Multiply-adds per second of one (m, k) x (k, n) product, the median of five."""
    m, k, n = shape
    a = torch.zeros(m, k, dtype=dtype, device=device)
    b = torch.zeros(n, k, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return m * k * n / statistics.median(times[1:])
