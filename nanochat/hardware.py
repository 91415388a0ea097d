"""Facts about the machine: cores, memory, peak speed."""

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Facts about the machine that a plan depends on."""

    device_type: str
    """Type of the device: cpu, cuda or mps."""
    dtype: torch.dtype
    """Activation dtype."""
    world_size: int = 1
    """Number of ranks."""
    memory_limit: int | None = None
    """Bytes that a rank may use; None if no limit is known."""


def cpus(root: Path = Path("/")) -> int:
    """Number of processors that this process may use, hyper-threads included.

    On Linux its affinity limits them, and the time that a container grants (rounded up).
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _granted_cpus(root))))


def physical_cores() -> int:
    """Number of cores this process may use; on Linux, two hyper-threads count as one core."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return min(_allowed_cores(), cpus())


def _allowed_cores() -> int:
    """Number of cores that this process's affinity names."""
    allowed = os.sched_getaffinity(0)
    seen = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                seen.add(file.read().strip())
        except OSError:
            return len(allowed)
    return len(seen) or 1


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory this process may use: the machine's, or less if a container has a limit.

    The result is None if it is not known (Windows). Limits are read from the process's control
    group and all groups around it, in versions 1 and 2. `root` is the root of the file system.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None
    for folder, version in _control_groups(root, "memory"):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        with contextlib.suppress(OSError, ValueError):  # no such file, or its content is "max"
            memory = min(memory, int((folder / name).read_text()))
    return memory


def _granted_cpus(root: Path) -> float:
    """Number of processors that the control groups grant the process; infinite without a limit."""
    granted = math.inf
    for folder, version in _control_groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or its content is "max"
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0 and period > 0:  # -1: no limit
                granted = min(granted, quota / period)
    return granted


def _control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield folder and version (1 or 2) of the process's control group and of all around it."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:  # 4:memory:/group in version 1, 0::/group in version 2
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / group.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(top):
                break
            yield place, 1 if controllers else 2


ONEDNN_KERNELS = 128
"""Number of kernels that oneDNN caches. Each is for one shape of one operation, about 0.6 MiB."""


def tune_cpu(local_processes: int = 1) -> None:
    """Use all physical cores, keep freed memory mapped between steps, and cache few kernels.

    By default glibc returns large activations to the system at once, and every step has to map them
    again. Raising its thresholds made training 20-50 % faster in a measurement.

    By default oneDNN caches 1,024 kernels, and torch as many. Prompts of many different lengths
    then fill a GiB even with the smallest model. Both read their limit when they are first used.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(ONEDNN_KERNELS))
    if "OMP_NUM_THREADS" not in os.environ or local_processes > 1:
        torch.set_num_threads(max(1, physical_cores() // local_processes))
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


@dataclass(frozen=True)
class Gpu:
    """Data of one kind of GPU, from the vendors' data sheets."""

    teraflops: float
    """Dense bf16 matmul peak in TFLOP/s; that of fp16 if the card has no bf16 (T4, V100)."""
    gigabytes: float
    """Memory, in 10^9 bytes."""
    price: float
    """Rough price of one card for an hour in a cloud, in US dollars; `plan --price-per-hour`
    replaces it."""

    @property
    def peak(self) -> float:
        """Peak in FLOP/s."""
        return self.teraflops * 1e12


GPUS = {
    "H100": Gpu(989, 80, 3.0),
    "H100 PCIe": Gpu(756, 80, 2.5),
    "H100 NVL": Gpu(835, 94, 2.8),
    "H200": Gpu(989, 141, 3.5),
    "H200 NVL": Gpu(835, 141, 3.3),
    "GH200": Gpu(989, 96, 2.0),
    "H800": Gpu(989, 80, 2.5),
    "H800 PCIe": Gpu(756, 80, 2.0),
    "B200": Gpu(2250, 180, 5.5),
    "GB200": Gpu(2500, 186, 6.5),
    "MI300X": Gpu(1307, 192, 2.5),
    "A100": Gpu(312, 80, 1.8),
    "A800": Gpu(312, 80, 1.5),
    "L40S": Gpu(362, 48, 1.0),
    "L40": Gpu(181, 48, 0.9),
    "L4": Gpu(121, 24, 0.7),
    "A10": Gpu(125, 24, 0.8),
    "A10G": Gpu(70, 24, 1.0),
    "5090": Gpu(209, 32, 0.7),
    "4090": Gpu(165, 24, 0.5),
    "3090": Gpu(71, 24, 0.25),
    "T4": Gpu(65, 16, 0.35),
    "V100": Gpu(125, 32, 0.6),
}
"""GPUs by a name that is part of the driver's name of the device. The A100 and the V100 also exist
with half the memory; `plan --gpu-memory` tells the planner, and a run asks the card."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Peak, in FLOP/s, of the longest name in GPUS that is part of `name`; None if none is."""
    if "Laptop" in name:
        return None  # a laptop's GPU is slower than the card of the same name
    found = [key for key in GPUS if re.search(rf"\b{re.escape(key)}\b", name)]
    return GPUS[max(found, key=len)].peak if found else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: that of the allocator on CUDA, else of the process (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # not known: the resource module exists on Unix only
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_processor() -> str:
    """Describe what the last bits of a result depend on: processor, threads, version of torch."""
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} threads, torch {torch.__version__}"


def processor() -> str:
    """Model name of the CPU, as the system reports it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
