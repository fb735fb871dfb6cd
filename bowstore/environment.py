"""What a number was measured with: the device and the versions of what decides it."""

import os
import platform
from importlib import metadata

import torch

import bowstore
from bowstore.errors import UsageError

# Names in result files and the distributions that may provide each.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "sklearn": ("scikit-learn",),
    "numpy": ("numpy",),
}


def choose_device(setting: str, local_rank: int = 0) -> torch.device:
    """The device of a setting (auto, cpu, cuda).

    Raises:
        UsageError: cuda was asked for and there is none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no GPU; check the driver, or ask for cpu")
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {local_rank} of this machine needs GPU {local_rank}, and torch sees {torch.cuda.device_count()}; "
            f"lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cores_per_rank() -> int:
    """This process's share of the machine's cores, among the ranks that torchrun started on it."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def device_name(device: torch.device) -> str:
    """Name of a GPU's model, or "cpu" with the machine's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


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
