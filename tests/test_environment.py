import platform
from pathlib import Path

import pytest
import torch

from bowstore.environment import available_memory, device_name

GB = 10**9


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    put(tmp_path / "proc", meminfo="MemTotal:  99000000 kB\nMemAvailable:  50000000 kB\nHugePages_Total:   0\n")
    return tmp_path / "proc"


def limited(folder: Path, bound: int | str, used: int, inactive: int) -> None:
    """A cgroup of version 2."""
    put(folder, memory__max=f"{bound}\n", memory__current=f"{used}\n",
        memory__stat=f"anon 5\ninactive_file {inactive}\n")  # fmt: skip


def test_without_cgroups_the_machine_counts(proc: Path, tmp_path: Path) -> None:
    assert available_memory(proc, tmp_path / "none") == 50_000_000 * 1024
    put(proc / "self", cgroup="0::/\n4:memory:/job\n")
    assert available_memory(proc, tmp_path / "none") == 50_000_000 * 1024
    assert 0 < available_memory() < 1 << 50


def test_a_cgroup_bounds_it_and_so_does_any_above_it(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    put(proc / "self", cgroup="0::/slurm/job7\n")
    limited(groups / "slurm/job7", "max", 3 * GB, 0)
    assert available_memory(proc, groups) == 50_000_000 * 1024
    limited(groups / "slurm", 12 * GB, 4 * GB, GB)
    assert available_memory(proc, groups) == 9 * GB  # what is cached of files can be dropped
    limited(groups / "slurm/job7", 6 * GB, 5 * GB, 0)
    assert available_memory(proc, groups) == 1 * GB
    limited(groups / "slurm/job7", 6 * GB, 7 * GB, 0)
    assert available_memory(proc, groups) == 0
    limited(tmp_path, 1, 0, 0)  # not below the mount: not a cgroup
    limited(groups / "slurm/job7", "max", 0, 0)
    assert available_memory(proc, groups) == 9 * GB


def test_a_container_that_sees_its_own_files_under_the_hosts_name(proc: Path, tmp_path: Path) -> None:
    put(proc / "self", cgroup="0::/kubepods/pod1/c2\n")
    limited(tmp_path / "cgroup", 8 * GB, 2 * GB, 0)
    assert available_memory(proc, tmp_path / "cgroup") == 6 * GB


def test_version_1(proc: Path, tmp_path: Path) -> None:
    put(proc / "self", cgroup="5:cpu,cpuacct:/docker/x\n4:hugetlb,memory:/docker/x\n0::/\n")
    put(tmp_path / "cgroup/memory/docker/x", memory__limit_in_bytes=f"{7 * GB}\n",
        memory__usage_in_bytes=f"{3 * GB}\n", memory__stat=f"inactive_file 1\ntotal_inactive_file {GB}\n")  # fmt: skip
    assert available_memory(proc, tmp_path / "cgroup") == 5 * GB


def test_a_cpu_is_told_by_its_model_and_by_what_rounds_its_sums(tmp_path: Path) -> None:
    """Accuracies go with both: the demo's differ by ten points between processors."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: Vendor Seven (2) @ 3.1GHz\n\nmodel name\t: Other\n")
    kernels = torch.backends.cpu.get_cpu_capability()
    assert device_name(torch.device("cpu"), info) == f"cpu (Vendor Seven (2) @ 3.1GHz, {kernels})"
    for unnamed in (tmp_path, tmp_path / "none"):
        assert device_name(torch.device("cpu"), unnamed) == f"cpu ({platform.machine()}, {kernels})"
