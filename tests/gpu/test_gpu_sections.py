"""Every section of tools/gpu_check.py on a GPU, in short, and what decodes there: each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_plan import SECTIONS
from shard_sets import SHARED_DATA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
_DECODING = Path(__file__).with_name("decoding_on_gpu.py")
_SECONDS = 300


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and compiled kernels that the sections share."""
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("name", [section.name for section in SECTIONS if not section.on_data])
def test_a_section_passes_and_reaches_its_bounds(
    name: str, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = next(each for each in SECTIONS if each.name == name)
    arguments = ["--sections", name, "--out", str(tmp_path), "--scratch", str(scratch)]
    arguments += ["--minutes", str((section.short + 10) / 60)]
    photographs = SHARED_DATA / "imagenet-sample-250.tar"
    arguments += ["--photographs", str(photographs)] if photographs.exists() else []
    code = gpu_check.main(arguments)
    said = capsys.readouterr().out
    if "skipped: " in said:
        pytest.skip(said.rpartition("skipped: ")[2].splitlines()[0])
    assert code == 0, said


@pytest.mark.parametrize("tests", [
    "training_on_a_gpu and False-rotation", "training_on_a_gpu and False-words",
    "training_on_a_gpu and True-rotation", "training_on_a_gpu and True-words",
    "words_of_a_gpu_are_those_of_the_cpu", "image", "slice", "held or memory",
])  # fmt: skip
def test_decoding_on_a_gpu(tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_DECODING), "-k", tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-8000:]}{done.stderr[-2000:]}"
