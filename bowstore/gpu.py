"""What GPU there is, and whether it can do the job: the driver's own answers, and one line for whatever is wrong.

torch says no more than that there is no GPU, or warns in several lines; DALI fails with an error of its own in the
first batch. So the driver is asked here, through its C library, and nothing of CUDA has to work for that.
"""

import csv
import ctypes
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bowstore.progress import say

Version = tuple[int, int]

# From here on Triton programs tensor cores: for 7.0 and 7.5 version 3.8 compiles the search's products to plain FMA.
TRITON_CAPABILITY = (8, 0)
_HELD_SHARE = 0.8  # of the free memory that one tensor may take
_TAKEN_SHARE = 0.15  # of a GPU's memory; a desktop and this process's own context take less
_GIB = 1 << 30
_DRIVERS = {12: "525", 13: "580"}  # the first driver for a major version of CUDA; any of them runs all its minor ones
_NO_DEVICE = "CUDA_ERROR_NO_DEVICE"
_CURES = {
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "restart the machine: the driver was replaced while it was in use",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "take the package cuda-compat out of the library path",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start nvidia-fabricmanager",
}


class Driver(NamedTuple):
    """What the driver's library answers.

    Attributes:
        cuda: the newest CUDA that it runs; None where there is no driver.
        error: CUDA's name of the reason why it cannot be used; empty if it can.
    """

    cuda: Version | None
    error: str = ""


class Trouble(NamedTuple):
    """Why no GPU can be used.

    Attributes:
        what: half a sentence.
        cure: what to do.
        expected: whether a machine without a GPU looks like this, too, so that nobody has to be told.
    """

    what: str
    cure: str
    expected: bool = False


class Holder(NamedTuple):
    """Another process that holds memory of a GPU."""

    pid: str
    name: str
    held_bytes: int


def ask_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver:
    """Ask the driver for its version, and whether it can be used.

    Args:
        load: opens a shared library by name.
    """
    try:
        library = load("libcuda.so.1")
    except OSError:
        return Driver(None)
    version, name = ctypes.c_int(), ctypes.c_char_p()
    library.cuDriverGetVersion(ctypes.byref(version))
    found = version.value // 1000, version.value % 1000 // 10
    if code := library.cuInit(0):
        library.cuGetErrorName(code, ctypes.byref(name))
        return Driver(found, name.value.decode() if name.value else f"CUDA error {code}")
    return Driver(found)


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The driver's version as the kernel's module tells it, or else the newest CUDA that it runs."""
    try:
        if found := re.search(r"\d+\.\d+(\.\d+)*", file.read_text()):
            return found[0]
    except OSError:
        pass
    cuda = ask_driver().cuda
    return f"for CUDA {_dotted(cuda)}" if cuda else "none"


@cache
def trouble(index: int = 0) -> Trouble | None:
    """Why the GPU of a number cannot be used; None if it can, or if it is not there and others are."""
    with warnings.catch_warnings():  # torch's own, of several lines
        warnings.simplefilter("ignore")
        available, built_for = torch.cuda.is_available(), torch.version.cuda
        if not available:
            return _no_gpu(ask_driver(), built_for)
        if built_for and (old := _old_driver(ask_driver(), *_newest_cuda(built_for))):
            return old
        return _old_gpu(index) if index < torch.cuda.device_count() else None


def _no_gpu(driver: Driver, built_for: str | None) -> Trouble:
    """Why torch sees none."""
    if built_for is None:
        return Trouble(
            f"this PyTorch ({torch.__version__}) is built without CUDA", "install one that is not", not has_gpu()
        )
    if driver.cuda is None:
        needed = f"{_dotted(_parsed(built_for))} or later{_first_driver(_parsed(built_for)[0])}"
        return Trouble(
            "there is no NVIDIA driver (libcuda.so.1)",
            f"install one for CUDA {needed}, start the container with its GPUs (docker: --gpus all)",
            not has_gpu(),
        )
    if old := _old_driver(driver, _parsed(built_for), f"PyTorch {torch.__version__}"):
        return old
    if driver.error == _NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return Trouble(f"CUDA_VISIBLE_DEVICES is {visible!r}, which shows no GPU", "change or unset it", True)
        return Trouble("the NVIDIA driver finds no GPU", "see whether nvidia-smi does", True)
    why = f"cannot be used ({driver.error})" if driver.error else "works, yet PyTorch cannot use it"
    return Trouble(f"the NVIDIA driver {why}", _CURES.get(driver.error, "see what nvidia-smi says"))


def _old_driver(driver: Driver, needed: Version, whose: str) -> Trouble | None:
    """Whether the driver is of an earlier major version than a library's CUDA; minor versions run each other's."""
    if driver.cuda is None or driver.cuda[0] >= needed[0]:
        return None
    return Trouble(
        f"the NVIDIA driver is for CUDA {_dotted(driver.cuda)}, too old for {whose}, which is built for "
        f"{_dotted(needed)}",
        f"update the driver{_first_driver(needed[0])}, install the build for CUDA {driver.cuda[0]}",
    )


def _newest_cuda(built_for: str) -> tuple[Version, str]:
    """The newest CUDA that torch or DALI is built for, and which of them it is."""
    ours = _parsed(built_for), f"PyTorch {torch.__version__}"
    try:
        theirs = (13, 0), f"DALI {metadata.version('nvidia-dali-cuda130')}"
    except metadata.PackageNotFoundError:
        return ours
    return max(ours, theirs)


def _old_gpu(index: int) -> Trouble | None:
    """Whether the GPU is older than everything that torch has kernels for."""
    capability = torch.cuda.get_device_capability(index)
    built = [_capability(name) for name in torch.cuda.get_arch_list()]
    if not built or capability >= min(built):
        return None
    return Trouble(
        f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability {_dotted(capability)}, and PyTorch "
        f"{torch.__version__} is built for {_dotted(min(built))} and later",
        "install a build for an earlier CUDA",
    )


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether words are searched on tensor cores there; says in one line that a GPU is too old for it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        say(
            f"warning: {torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}, below "
            f"{_dotted(TRITON_CAPABILITY)}: words are searched in float32 without Triton, which is slower"
        )
        return False
    return True


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process can take: free ones, and those that PyTorch keeps from earlier work."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def holds(device: torch.device, size_bytes: int) -> bool:
    """Whether a GPU holds so much in a good part of its free memory, so that it is worth moving there once."""
    return device.type == "cuda" and size_bytes < _HELD_SHARE * free_memory(device)


def resident(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a GPU that holds it, else where it is."""
    return tensor.to(device) if holds(device, tensor.nbytes) else tensor


def memory_note(device: torch.device) -> str | None:
    """One line on memory of a GPU that others hold, and who they are; None where it is little."""
    free, total = torch.cuda.mem_get_info(device)
    if total - free < _TAKEN_SHARE * total:
        return None
    who = ", ".join(f"{name} (process {pid}) {held / _GIB:.1f}" for pid, name, held in holders(device)[:3])
    who = who or "by processes that cannot be seen from here"
    return (
        f"of the {total / _GIB:.1f} GiB of {torch.cuda.get_device_name(device)} ({device}), "
        f"{(total - free) / _GIB:.1f} are taken: {who}; end them, choose another GPU with CUDA_VISIBLE_DEVICES, or "
        f"take a batch that {free / _GIB:.1f} GiB hold"
    )


def holders(device: torch.device, run: Callable[..., Any] = subprocess.run) -> list[Holder]:
    """Other processes that hold memory of a GPU, those with the most first; none where nvidia-smi does not tell."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader,nounits"]
    try:
        answer = run(
            [*command, "--query-compute-apps=pid,process_name,used_memory"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [row for row in csv.reader(answer.stdout.splitlines(), skipinitialspace=True) if len(row) == 3]
    found = [Holder(pid, Path(name).name, int(mib) << 20) for pid, name, mib in rows if mib.isdecimal()]
    return sorted((each for each in found if each.pid != str(os.getpid())), key=lambda each: -each.held_bytes)


def kinds_note(names: Sequence[str]) -> str | None:
    """One line on ranks whose GPUs are of different kinds, in the order of the ranks; None where all are alike."""
    if len(set(names)) < 2:
        return None
    which = "; ".join(
        f"{name}: rank{'s' if names.count(name) > 1 else ''} {_spans([r for r, n in enumerate(names) if n == name])}"
        for name in dict.fromkeys(names)
    )
    return (
        f"the ranks' GPUs are of different kinds ({which}): the slowest sets the pace, and results differ by rounding "
        f"from those of one kind; CUDA_VISIBLE_DEVICES chooses GPUs"
    )


@cache
def decoder_note(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """One line where the GPU's JPEG decoder cannot be reached, because the driver's video library is missing."""
    try:
        load("libnvcuvid.so.1")
    except OSError:
        return (
            "libnvcuvid.so.1 is not there, so that the GPU's JPEG decoder is not used, only its CUDA cores; in a "
            "container set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    return None


def has_gpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA GPU is in this machine, with or without a driver."""
    try:
        found = [((each / "vendor").read_text(), (each / "class").read_text()) for each in devices.iterdir()]
    except OSError:
        return False
    return any(vendor.startswith("0x10de") and kind.startswith("0x03") for vendor, kind in found)


def _parsed(version: str) -> Version:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _capability(name: str) -> Version:
    """(9, 0) of sm_90a or compute_90."""
    digits = "".join(filter(str.isdecimal, name))
    return int(digits[:-1]), int(digits[-1])


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _first_driver(major: int) -> str:
    return f" ({_DRIVERS[major]} or newer)" if major in _DRIVERS else ""


def _spans(numbers: Sequence[int]) -> str:
    """0-3, 6."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)
