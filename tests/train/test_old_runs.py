"""Runs that bowstore 0.1.0 left load as they always did: their exports hold a whole configuration, `student` included.

`runs_of_0_1.tar.xz` holds two of commit 4ad8447, old-rotation and old-words, with all weights set to zero.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from bowstore.models.saved import load_backbone, load_export, save_backbone
from bowstore.verify import verify_path
from bowstore.words.teacher import load_teacher


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).with_name("runs_of_0_1.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("task", ["rotation", "words"])
@pytest.mark.parametrize("part", ["", "backbone.safetensors", "checkpoints/step-000000005.pt"])
def test_old_networks_load(old: Path, task: str, part: str) -> None:
    loaded = load_backbone(old / f"old-{task}" / part)
    assert (loaded.saved.name, loaded.saved.task, loaded.saved.seed) == (f"old-{task}", task, 3)
    assert (loaded.saved.model.arch, loaded.saved.model.strides) == ("wrn-10-1", (2, 2, 1))
    assert (loaded.saved.view.size, loaded.saved.view.resize, loaded.saved.view.cutmix) == (16, None, task == "words")
    assert not any(bool(tensor.any()) for tensor in loaded.backbone.state_dict().values())


def test_an_old_run_is_a_teacher_and_sound(old: Path) -> None:
    teacher = load_teacher(old / "old-rotation", ("block3",), torch.device("cpu"))
    assert (teacher.origin.name, teacher.view.size, teacher.layers[0].grid) == ("old-rotation", 16, (4, 4))
    assert verify_path(old).text() == f"{old}: 4 checkpoints and 2 exported networks of 2 runs\nno problem found"


def test_an_old_export_that_is_saved_anew_records_what_rebuilds_it_and_no_more(old: Path, tmp_path: Path) -> None:
    loaded = load_backbone(old / "old-rotation")
    save_backbone(tmp_path / "new.safetensors", loaded.backbone, loaded.saved)
    data = (tmp_path / "new.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    recorded = json.loads(header["__metadata__"]["bowstore"])
    assert recorded.keys() == {"model", "view", "name", "task", "seed"}
    assert (
        load_export(tmp_path / "new.safetensors")[1]
        == loaded.saved
        == load_export(old / "old-rotation" / "backbone.safetensors")[1]
    )
