"""What this process may use, and what a number was measured with: device, cores, memory, library versions."""

import os
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import bowstore
from bowstore import gpu
from bowstore.errors import UsageError
from bowstore.nvjpeg import load_nvjpeg
from bowstore.progress import say
from bowstore.torchrun import ranks

# Names in result files and the distributions that may provide each.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "nvjpeg": ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"),
    "sklearn": ("scikit-learn",),
    "numpy": ("numpy",),
}


def choose_device(setting: str, local_rank: int = 0) -> torch.device:
    """The device of a setting (auto, cpu, cuda); one line on stderr on what a GPU lacks that is there.

    Raises:
        UsageError: cuda was asked for and cannot be used.
    """
    if setting == "cpu":
        return torch.device("cpu")
    if trouble := gpu.trouble(local_rank):
        if setting == "cuda":
            raise UsageError(f"device cuda was asked for, but {trouble.what}; {trouble.cure}, or ask for cpu")
        if not trouble.expected and local_rank == 0:
            _warn(f"no GPU is used: {trouble.what}; {trouble.cure}; continuing on the CPU")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {local_rank} of this machine needs GPU {local_rank}, and torch sees {torch.cuda.device_count()}; "
            f"lower --nproc-per-node"
        )
    load_nvjpeg()
    device = torch.device("cuda", local_rank)
    if note := gpu.memory_note(device):
        _warn(note)
    job = ranks()
    if job.size == job.local_size and job.first:  # those of several machines find out when they have joined
        warn_of_kinds([torch.cuda.get_device_name(rank) for rank in range(min(job.size, torch.cuda.device_count()))])
    return device


def warn_of_kinds(names: Sequence[str]) -> None:
    """Say in one line that the ranks' GPUs, named in the ranks' order, are of different kinds, if they are."""
    if note := gpu.kinds_note(names):
        _warn(note)


@cache
def _warn(note: str) -> None:
    """Say it once: commands ask for a device more than once."""
    say(f"warning: {note}")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cores_per_rank() -> int:
    """This process's share of the machine's cores, among the ranks that torchrun started on it."""
    return max(1, cores() // ranks().local_size)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that can still be taken without swapping: the machine's, or less where a cgroup bounds it.

    Args:
        proc: the process file system.
        cgroups: where cgroups are mounted; version 1 has its memory controller in the folder `memory` below.
    """
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) << 10, *_cgroup_rooms(proc, cgroups)])


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """Bytes left in each cgroup that bounds this process; pages of inactive files count as free."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, limit, usage, inactive = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, inactive = cgroups / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / place.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            try:
                bound = (folder / limit).read_text().strip()
                if bound == "max":
                    continue
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / usage).read_text()) - int(statistics.get(inactive, 0))
            except OSError:  # a container sees the host's name of its cgroup, but only its own files
                continue
            yield max(0, int(bound) - taken)


def device_name(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of a GPU's model, or "cpu" with the processor's and the vector instructions that PyTorch uses there.

    A run's figures go with them: kernels for other instructions round sums in another order.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for name, _, value in fields if name.strip() == "model name"), "")
    except OSError:
        model = ""
    return f"cpu ({model or platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def library_versions() -> dict[str, str]:
    """Versions of bowstore, Python and the libraries that numbers depend on."""
    versions = {"bowstore": bowstore.__version__, "python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        versions[name] = next((v for d in distributions if (v := _version(d))), "not installed")
    return versions


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
