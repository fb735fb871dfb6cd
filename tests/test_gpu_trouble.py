"""One line on whatever is wrong with a GPU; driver, torch and nvidia-smi are fakes where bowstore asks them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from shard_sets import ShardMaker

from bowstore import environment, gpu
from bowstore.cli import main
from bowstore.environment import choose_device
from bowstore.errors import UsageError
from bowstore.gpu import Driver, Holder, ask_driver, decoder_note, has_gpu, holders, kinds_note
from bowstore.torchrun import Ranks
from bowstore.train import distributed

GPU = torch.device("cuda", 0)
GIB = 1 << 30


class FakeDriver:
    """libcuda, as ctypes shows it."""

    def __init__(self, version: int, code: int = 0, name: bytes | None = None) -> None:
        self._version, self._code, self._name = version, code, name

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0

    def cuInit(self, flags: int) -> int:
        return self._code

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = self._name
        return 0


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for cached in (gpu.trouble, gpu.runs_triton, gpu.decoder_note, environment._warn):
        cached.cache_clear()
    yield
    for cached in (gpu.trouble, gpu.runs_triton, gpu.decoder_note, environment._warn):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these GPUs, as torch and the driver tell of it."""

    def make(
        driver: Driver,
        *names: str,
        capability: tuple[int, int] = (9, 0),
        free_gib: float = 79.0,
        built_for: str | None = "13.0",
        in_the_machine: bool = True,
    ) -> None:
        monkeypatch.setattr(gpu, "ask_driver", lambda: driver)
        monkeypatch.setattr(gpu, "has_gpu", lambda: in_the_machine)
        monkeypatch.setattr(torch, "__version__", "2.14.1")
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(gpu.metadata, "version", lambda name: "2.4.0")
        for name, value in {
            "is_available": lambda: bool(names),
            "device_count": lambda: len(names),
            "get_device_name": lambda device=0: names[getattr(device, "index", device)],
            "get_device_capability": lambda device=0: capability,
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90", "compute_120"],
            "mem_get_info": lambda device: (int(free_gib * GIB), 80 * GIB),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return make


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (FakeDriver(13000), Driver((13, 0))),
        (FakeDriver(12040), Driver((12, 4))),
        (FakeDriver(13010, 100, b"CUDA_ERROR_NO_DEVICE"), Driver((13, 1), "CUDA_ERROR_NO_DEVICE")),
        (FakeDriver(13010, 4711), Driver((13, 1), "CUDA error 4711")),
    ],
)
def test_what_the_driver_answers(library: FakeDriver, expected: Driver) -> None:
    assert ask_driver(lambda name: library) == expected


def test_without_a_driver() -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    assert ask_driver(load) == Driver(None)


TROUBLES = {
    "no driver": (
        Driver(None),
        "there is no NVIDIA driver (libcuda.so.1); install one for CUDA 13.0 or later (580 or newer), start the "
        "container with its GPUs (docker: --gpus all)",
    ),
    "an old driver": (
        Driver((12, 4)),
        "the NVIDIA driver is for CUDA 12.4, too old for PyTorch 2.14.1, which is built for 13.0; update the driver "
        "(580 or newer), install the build for CUDA 12",
    ),
    "a driver that was replaced": (
        Driver((13, 0), "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        "the NVIDIA driver cannot be used (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH); restart the machine: the driver was "
        "replaced while it was in use",
    ),
    "another error": (
        Driver((13, 0), "CUDA_ERROR_UNKNOWN"),
        "the NVIDIA driver cannot be used (CUDA_ERROR_UNKNOWN); see what nvidia-smi says",
    ),
    "no error": (
        Driver((13, 0)),
        "the NVIDIA driver works, yet PyTorch cannot use it; see what nvidia-smi says",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TROUBLES)
def test_a_gpu_without_a_usable_driver(
    machine: Callable[..., None], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, text = TROUBLES[case]
    machine(driver)
    with pytest.raises(UsageError) as raised:
        choose_device("cuda")
    assert str(raised.value) == f"device cuda was asked for, but {text}, or ask for cpu"
    assert choose_device("cpu").type == "cpu"
    assert capsys.readouterr().err == ""
    assert [choose_device("auto").type, choose_device("auto").type] == ["cpu", "cpu"]
    assert capsys.readouterr().err == f"warning: no GPU is used: {text}; continuing on the CPU\n"


def test_a_process_that_takes_a_gpu_has_the_wheels_nvjpeg_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is loaded later under that name is the same library: a process has one of each name."""
    text = """import ctypes
from unittest.mock import patch
from bowstore import environment, gpu
with patch.object(gpu, "trouble", lambda rank: None), patch.object(gpu, "memory_note", lambda device: ""), \\
     patch("torch.cuda.device_count", lambda: 1), patch("torch.cuda.get_device_name", lambda rank: "one"):
    environment.choose_device("cuda")
from bowstore.nvjpeg import nvjpeg_file
name = nvjpeg_file().rpartition("/")[2]
print(ctypes.CDLL(name)._handle == ctypes.CDLL(nvjpeg_file())._handle)
"""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_machine_without_a_gpu_is_told_nothing(
    machine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(Driver(None), in_the_machine=False)
    assert choose_device("auto").type == "cpu"
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="there is no NVIDIA driver"):
        choose_device("cuda")


def test_gpus_that_are_hidden(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(Driver((13, 0), "CUDA_ERROR_NO_DEVICE"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UsageError, match="but CUDA_VISIBLE_DEVICES is '7', which shows no GPU; change or unset it, or"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
    assert capsys.readouterr().err == ""
    gpu.trouble.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UsageError, match="but the NVIDIA driver finds no GPU; see whether nvidia-smi does, or ask"):
        choose_device("cuda")


def test_a_pytorch_without_cuda(machine: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    machine(Driver((13, 0)), built_for=None)
    with pytest.raises(UsageError, match=r"but this PyTorch \(2.14.1\) is built without CUDA; install one that is not"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
    assert capsys.readouterr().err.startswith("warning: no GPU is used: this PyTorch (2.14.1) is built without CUDA")


def test_a_driver_that_is_too_old_for_dali_alone(machine: Callable[..., None]) -> None:
    machine(Driver((12, 8)), "H100", built_for="12.8")
    with pytest.raises(UsageError) as raised:
        choose_device("cuda")
    assert "the NVIDIA driver is for CUDA 12.8, too old for DALI 2.4.0, which is built for 13.0; " in str(raised.value)


def test_minor_versions_of_cuda_run_each_others(machine: Callable[..., None]) -> None:
    machine(Driver((13, 0)), "H100", built_for="13.2")
    assert choose_device("cuda") == GPU


def test_a_gpu_older_than_pytorchs_kernels(machine: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    machine(Driver((13, 0)), "Tesla V100", capability=(7, 0))
    text = (
        "GPU 0 (Tesla V100) has compute capability 7.0, and PyTorch 2.14.1 is built for 7.5 and later; install a build "
        "for an earlier CUDA"
    )
    with pytest.raises(UsageError) as raised:
        choose_device("cuda")
    assert str(raised.value) == f"device cuda was asked for, but {text}, or ask for cpu"
    assert choose_device("auto").type == "cpu"
    assert capsys.readouterr().err == f"warning: no GPU is used: {text}; continuing on the CPU\n"


def test_a_gpu_too_old_for_the_search_on_tensor_cores(
    machine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(Driver((13, 0)), "Tesla T4", capability=(7, 5))
    assert choose_device("cuda") == GPU
    assert [gpu.runs_triton(GPU), gpu.runs_triton(GPU)] == [False, False]
    assert capsys.readouterr().err == (
        "warning: Tesla T4 has compute capability 7.5, below 8.0: words are searched in float32 without Triton, which "
        "is slower\n"
    )
    machine(Driver((13, 0)), "A100", capability=(8, 0))
    gpu.runs_triton.cache_clear()
    assert gpu.runs_triton(GPU)
    assert not gpu.runs_triton(torch.device("cpu"))


def test_memory_that_others_hold(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(Driver((13, 0)), "H100", free_gib=18.5)
    monkeypatch.setattr(gpu, "holders", lambda device: [Holder("4711", "python", 60 * GIB), Holder("9", "x", GIB)])
    assert [choose_device("auto"), choose_device("cuda")] == [GPU, GPU]
    assert capsys.readouterr().err == (
        "warning: of the 80.0 GiB of H100 (cuda:0), 61.5 are taken: python (process 4711) 60.0, x (process 9) 1.0; end "
        "them, choose another GPU with CUDA_VISIBLE_DEVICES, or take a batch that 18.5 GiB hold\n"
    )
    machine(Driver((13, 0)), "H100", free_gib=70)
    choose_device("auto")
    assert capsys.readouterr().err == ""


def test_who_holds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-12"))
    asked = []

    def run(command: list[str], **how: Any) -> SimpleNamespace:
        asked.append(command)
        lines = ["9, /usr/bin/x, 512", f"{os.getpid()}, python, 9000", "4711, python3, 61440", "12, [N/A], [N/A]", ""]
        return SimpleNamespace(stdout="\n".join(lines))

    assert holders(GPU, run) == [Holder("4711", "python3", 60 * GIB), Holder("9", "x", GIB // 2)]
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-ab-12"]

    def absent(command: list[str], **how: Any) -> None:
        raise FileNotFoundError(command[0])

    def failing(command: list[str], **how: Any) -> None:
        raise subprocess.CalledProcessError(9, command)

    assert holders(GPU, absent) == holders(GPU, failing) == []


def test_gpus_of_different_kinds(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(Driver((13, 0)), "A100", "A100", "L4", "A100")
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert choose_device("auto", 0) == GPU
    assert capsys.readouterr().err == (
        "warning: the ranks' GPUs are of different kinds (A100: ranks 0-1, 3; L4: rank 2): the slowest sets the pace, "
        "and results differ by rounding from those of one kind; CUDA_VISIBLE_DEVICES chooses GPUs\n"
    )
    with pytest.raises(UsageError, match=r"^rank 4 of this machine needs GPU 4, and torch sees 4; lower"):
        choose_device("cuda", 4)
    assert kinds_note(["A100"] * 4) is None


def test_a_machine_without_the_drivers_video_library() -> None:
    def load(name: str) -> None:
        raise OSError(name)

    assert decoder_note(load) == (
        "libnvcuvid.so.1 is not there, so that the GPU's JPEG decoder is not used, only its CUDA cores; in a container "
        "set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
    )
    assert decoder_note(lambda name: object()) is None


def test_a_gpu_among_the_devices_of_the_machine(tmp_path: Path) -> None:
    assert not has_gpu(tmp_path / "none")
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not has_gpu(tmp_path)
    (tmp_path / "1/class").write_text("0x030200\n")
    assert has_gpu(tmp_path)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shard_set: ShardMaker) -> Path:
    make_shard_set(8, folder="data/shards/train")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NETWORK = ("--teacher", "wrn-10-1", "--size", "16", "--resize", "16", "--layer", "block3", "--K", "8")
COMMANDS = {
    "train": ("train", "--config", "demo_rotnet.yaml", "--set", "optim.batch=4"),
    "encode": ("encode", *NETWORK),
    "bench encode": ("bench", "encode", *NETWORK, "--images", "8", "--rounds", "1", "--batch", "4"),
    "bench assign": ("bench", "assign", "--images", "1", "--positions", "2", "--dimensions", "3", "--K", "4"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_it_in_one_line(machine: Callable[..., None], workspace: Path, name: str) -> None:
    machine(Driver((12, 4)))
    asked = ("--set", "runtime.device=cuda") if name == "train" else ("--device", "cuda")
    result = CliRunner().invoke(main, [*COMMANDS[name], *asked])
    assert result.exit_code == 2
    text = f"Error: device cuda was asked for, but {TROUBLES['an old driver'][1]}, or ask for cpu"
    assert [line for line in result.output.splitlines() if not line.startswith("configuration ")] == [text]


def test_a_command_that_may_choose_goes_on_without(machine: Callable[..., None], workspace: Path) -> None:
    machine(Driver((12, 4)))
    result = CliRunner().invoke(main, [*COMMANDS["bench assign"], "--rounds", "1"])
    assert result.exit_code == 0
    warning = f"warning: no GPU is used: {TROUBLES['an old driver'][1]}; continuing on the CPU"
    assert result.stderr.splitlines().count(warning) == 1


def test_gpus_of_different_kinds_on_several_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank leaves its GPU's name in the job's store, where rank 0 reads them."""
    store = torch.distributed.HashStore()
    store.set("gpu 1", "L4")

    @contextmanager
    def lifeline(place: object) -> Iterator[Any]:
        yield store, None

    monkeypatch.setattr(distributed, "_lifeline", lifeline)
    monkeypatch.setattr(distributed, "ranks", lambda: Ranks(0, 2, 0, 1))
    monkeypatch.setattr(distributed, "choose_device", lambda setting, local_rank: GPU)
    monkeypatch.setattr(distributed, "device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *arguments, **how: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed.World, "wrapping_sum", lambda self, value: value)
    with distributed.joined("cuda") as world:
        assert (world.size, world.device) == (2, GPU)
    assert capsys.readouterr().err.startswith(
        "warning: the ranks' GPUs are of different kinds (A100: rank 0; L4: rank 1): the slowest sets the pace"
    )
