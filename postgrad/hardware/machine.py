"""Properties of this machine: cores, memory, the allocator, and measured matrix product speed."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

_ALLOCATOR_TUNED = False
_ROUNDS, _MAX_PROBE_SECONDS = 5, 3.0


def core_count() -> int:
    """Processor cores in this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def tune_allocator(*, returns_blocks: bool = False) -> bool:
    """Make glibc keep freed blocks instead of returning them to the system; True on success.

    A training step frees and allocates the same large blocks; by default each is unmapped and faulted in again, zeroed page by
    page. Keeping them speeds up a step on a CPU by a factor of about 1.3.

    `returns_blocks`: return all blocks of a MiB at once instead. A sharded model gathers blocks of many sizes between shards
    that stay, and kept blocks with holes between them took as much memory as the whole model.
    """
    global _ALLOCATOR_TUNED
    if _ALLOCATOR_TUNED or platform.system() != "Linux":
        return _ALLOCATOR_TUNED
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # the names of malloc.h
    if returns_blocks:
        _ALLOCATOR_TUNED = bool(mallopt(m_mmap_threshold, 2**20))
        return _ALLOCATOR_TUNED
    _ALLOCATOR_TUNED = bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))
    return _ALLOCATOR_TUNED


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: it needs a C++ compiler and Python's headers, and Triton for a GPU."""
    compiler = any(which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    return compiler and headers and (device.type == "cpu" or find_spec("triton") is not None)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def processor_name() -> str:
    """The processor's or accelerator's name, for the record."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return _read_proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Free bytes of the accelerator's memory, else of the machine's; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    free = _read_proc("meminfo", "MemAvailable")
    return None if free is None else int(free.split()[0]) * 1024  # in kB


def process_memory(device: torch.device) -> int | None:
    """Bytes that this process holds on the device; resets the peak. None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # a peak before this stays part of it
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held on the device since `process_memory`; None if unknown."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int | None:
    found = _read_proc("self/status", key)
    return None if found is None else int(found.split()[0]) * 1024  # in kB


def _read_proc(name: str, key: str) -> str | None:
    """The first value of a key in a file of /proc; None where there is none."""
    path = Path("/proc", name)
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return None


def environment_threads() -> int | None:
    """The threads that OMP_NUM_THREADS asks for; None without a valid number.

    `torchrun` sets it to 1 for each of several processes unless the user has: that is not a request.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not first.isdecimal() or not int(first):
        return None
    is_default = first == "1" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    return None if is_default else int(first)


def compare_speeds(fast: Callable[[], float], slow: Callable[[], float]) -> list[float]:
    """How many times as fast the first setting is as the second, in five interleaved rounds (fewer when they take long).

    Other processes come and go: each round compares neighbours in time, and the median of the rounds decides.
    """
    begin, gains = time.perf_counter(), list[float]()
    while len(gains) < _ROUNDS and (not gains or time.perf_counter() - begin < _MAX_PROBE_SECONDS):
        speed = slow()
        gains.append(fast() / speed)
    return gains


def matmul_speed(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """Multiply-adds per second of one (m, k) x (k, n) product, median of five after a warm-up; fewer when they take long."""
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
        if len(times) > 1 and sum(times) > _MAX_PROBE_SECONDS / _ROUNDS:
            break
    return m * k * n / statistics.median(times[1:])
