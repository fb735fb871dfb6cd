"""Runs that bowstore 0.1.0 left load as they always did: their exports hold a whole configuration, `student` included.

`runs_of_0_1.tar.xz` holds two of commit 4ad8447, old-rotation and old-words, with all weights set to zero.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from teacher_sets import load_teacher

from bowstore import runs
from bowstore.config import dump, validate
from bowstore.errors import MismatchError
from bowstore.models.saved import load_backbone, load_checkpoint, load_export, newest_checkpoint, save_backbone
from bowstore.train.checkpoint import save_checkpoint
from bowstore.train.config import TrainConfig
from bowstore.train.rundir import check_run, check_start, read_run_config, write_config
from bowstore.verify import verify_path
from bowstore.yaml_file import read_yaml


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
    assert (teacher.origin.name, teacher.view.size, teacher.layers["block3"].grid) == ("old-rotation", 16, (4, 4))
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


@pytest.mark.parametrize("task", ["rotation", "words"])
def test_an_old_run_goes_on_under_its_configuration_of_today(old: Path, tmp_path: Path, task: str) -> None:
    """Its records hold the task's settings in a group beside `task`; those of today in one."""
    run = tmp_path / "run"
    shutil.copytree(old / f"old-{task}", run)
    assert read_yaml(run / "config.yaml")["task"] == task
    config = read_run_config(run)
    assert config.task.name == task
    check_run(run, config, resume=False)
    check_start(run, newest_checkpoint(run), config, 8, resume=False, shown=True)
    other = validate(TrainConfig, {**dump(config), "task": {**dump(config.task), **OTHER[task]}}, "other")
    with pytest.raises(MismatchError, match=r"another configuration \(task\.\w+ is \w+ there, \w+ here\)"):
        check_run(run, other, resume=False)
    shutil.rmtree(run / "checkpoints")
    (run / "backbone.safetensors").unlink()
    check_run(run, config, resume=False)  # as left by a run that ended before its first checkpoint
    write_config(run, config)
    assert read_yaml(run / "config.yaml")["task"] == dump(config.task)
    assert read_run_config(run) == config


OTHER = {"rotation": {"blocks": 3}, "words": {"form": "binary"}}


def test_a_training_option_that_is_gone_orphans_no_teacher(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old / "old-rotation", run)
    with (run / "config.yaml").open("a") as file:
        file.write("renamed_since: 3\n")
    state = load_checkpoint(runs.checkpoints(run)[0])
    for part in ("version", "digest"):
        state.pop(part, None)
    state["config"]["optim"] = {"renamed_since": 3}
    save_checkpoint(run, state)
    assert load_backbone(run).saved == load_backbone(runs.checkpoints(run)[0]).saved
    assert [problem.message.partition("renamed")[0] for problem in verify_path(run).problems] == [
        f"{run / 'config.yaml'}: unknown configuration key '"
    ]
