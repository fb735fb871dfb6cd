"""Runs that start from the backbone of another: how it is named, loaded, recorded and refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_batches import ALONE, opened

from bowstore import runs
from bowstore.config import Workspace, dump
from bowstore.errors import BowstoreError, DataError, MismatchError, MissingError, UsageError
from bowstore.models.saved import load_backbone, load_export, save_backbone
from bowstore.plugins import Named, use_plugins
from bowstore.recipes.file import load_recipe
from bowstore.recipes.next import next_training
from bowstore.recipes.plan import Plan, make_plan
from bowstore.recipes.train import TrainStage
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.train.tasks.task import build_task
from bowstore.verify import verify_path
from bowstore.workspace import resolve_train
from bowstore.yaml_file import write_yaml

Make = Callable[..., TrainConfig]
SHORT = {"epochs": 1, "milestones": []}
STARTED = """
from typing import Literal
from bowstore.train.tasks.base import Kind, StartedSettings
from bowstore.train.tasks.rotation import build
from bowstore.train.tasks.settings import RotationSettings

class Settings(StartedSettings):
    name: Literal["started"] = "started"

KIND = Kind(
    name="started", settings=Settings, build=lambda _, job: build(RotationSettings(), job), mixes=True, teacher=False
)
"""


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("started.py").write_text(STARTED)
    use_plugins(Named(("started.py",), str(tmp_path)))
    yield
    use_plugins(Named((), ""))


@pytest.fixture
def rotnet(make_config: Make) -> Path:
    loop.train(make_config("rotation", name="rotnet", optim=SHORT), Path("runs"))
    return Path("runs/rotnet")


def resolved(config: TrainConfig, **flags: Any) -> TrainConfig:
    Path("c.yaml").write_bytes(write_yaml(dump(config)))
    return resolve_train(Workspace(), Path("c.yaml"), flags=flags)


def test_the_backbone_is_the_other_runs_and_the_head_is_new(make_config: Make, rotnet: Path) -> None:
    wanted = load_backbone(rotnet).backbone.state_dict()
    plain = build_task(config := make_config("rotation", seed=1), opened(config), ALONE)
    assert "start" not in {**plain.inputs, **plain.lineage}
    for place in ("rotnet", "runs/rotnet", "runs/rotnet/backbone.safetensors", str(runs.checkpoints(rotnet)[0])):
        config = resolved(make_config("started", optim=SHORT, seed=1), **{"task.start": place})
        assert config.task.start == (rotnet if place == "rotnet" else Path(place))  # type: ignore[attr-defined]
        task = build_task(config, opened(config), ALONE)
        for name, value in task.network.backbone.state_dict().items():
            assert torch.equal(value, wanted[name]), name
        for name, value in task.network.head.state_dict().items():
            assert torch.equal(value, plain.network.head.state_dict()[name]), "the draws of a run that starts from none"
        assert task.inputs == {**plain.inputs, "start": runs.weights_sha256(rotnet)}


def test_a_run_records_what_it_started_from_and_goes_on_from_nothing_else(make_config: Make, rotnet: Path) -> None:
    config = resolved(make_config("started", name="next", optim=SHORT), **{"task.start": "rotnet"})
    loop.train(config, Path("runs"))
    lineage = runs.read_lineage(Path("runs/next"))
    assert lineage is not None
    assert lineage["targets"]["start"] == {
        "name": "rotnet", "weights_file": "rotnet", "weights_sha256": runs.weights_sha256(rotnet),
        "lineage": runs.read_lineage(rotnet),
    }  # fmt: skip
    assert runs.descent(lineage) == ("rotation", "rotnet", "started", "next")
    assert verify_path(Path("runs/next")).problems == []
    loaded = load_backbone(rotnet)
    with torch.no_grad():
        next(loaded.backbone.parameters()).mul_(2)
    save_backbone(rotnet / runs.BACKBONE_FILE, loaded.backbone, loaded.saved)
    with pytest.raises(MismatchError, match=r"^start changed since the checkpoint of runs/next was written; restore"):
        loop.train(config, Path("runs"))


def test_another_network_is_refused(make_config: Make, rotnet: Path) -> None:
    def built(**changes: Any) -> None:
        config = make_config("started", {"start": str(rotnet)}, **changes)
        build_task(config, opened(config), ALONE)

    with pytest.raises(
        MismatchError, match=r"runs/rotnet is of wrn-10-1, and model\.arch is wrn-10-2; set model\.arch"
    ):
        built(model={"arch": "wrn-10-2"})
    with pytest.raises(
        MismatchError, match=r"is of strides \[2, 2, 1\], and model\.strides are \[1, 2, 2\]; set model"
    ):
        built(model={"strides": [1, 2, 2]})
    with pytest.raises(
        MissingError, match=r"task\.start: no run or file 'rotnett'; runs in runs: rotnet; name the run"
    ):
        resolved(make_config("started"), **{"task.start": "rotnett"})
    tensors, saved = load_export(rotnet / runs.BACKBONE_FILE)
    loaded = load_backbone(rotnet).backbone
    next(value for value in tensors.values() if value.is_floating_point())[:] = torch.nan
    loaded.load_state_dict(tensors)
    save_backbone(rotnet / runs.BACKBONE_FILE, loaded, saved)
    with pytest.raises(DataError, match=r"the weights of runs/rotnet hold NaN or infinity in 1 of \d+ tensors"):
        built()


# --- in recipes

RECIPE = """
stages:
  rotnet: {train: rotnet.yaml}
  words: {encode: {layers: [block3], num_words: [8]}, teacher: rotnet}
  next: {train: started.yaml, start: rotnet}
"""


@pytest.fixture
def plan(make_config: Make) -> Callable[[str], Plan]:
    def plan_of(text: str = RECIPE) -> Plan:
        Path("r.yaml").write_text(text)
        return make_plan(load_recipe(Path("r.yaml")), Workspace())

    for name, task in (("rotnet", "rotation"), ("started", "started")):
        Path(f"{name}.yaml").write_bytes(write_yaml(dump(make_config(task, name=name, optim=SHORT))))
    return plan_of


def test_a_stage_starts_from_another(plan: Callable[[str], Plan]) -> None:
    stage = plan(RECIPE).stages["next"]
    assert isinstance(stage, TrainStage)
    assert stage.reads[-1] == stage.begins == Path("runs/rotnet")
    assert next_training(plan(RECIPE)).run == Path("runs/rotnet")
    plan(RECIPE).stages["rotnet"].make()
    assert next_training(plan(RECIPE)).run == stage.run
    stage.make()
    stage.check()
    assert stage.state() == ("done", "")
    loaded = load_backbone(Path("runs/rotnet"))
    with torch.no_grad():
        next(loaded.backbone.parameters()).mul_(2)
    save_backbone(Path("runs/rotnet") / runs.BACKBONE_FILE, loaded.backbone, loaded.saved)
    assert stage.state().problem == "runs/started was started from other weights than runs/rotnet holds"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("start: rotnet}", "start: words}", r"`start: words` is a stage of kind encode, and must be one of kind train"),
        (
            "start: rotnet}",
            "set: {task.start: nobody}}",
            r"stage 'next': task\.start: no run or file 'nobody'; runs in runs: none; name the run",
        ),
        (
            "started.yaml",
            "rotnet.yaml, name: b",
            r"is of task rotation, which starts from no run; take `start: rotnet`",
        ),
        (
            "start: rotnet}",
            "start: rotnet, set: {task.start: a}}",
            r"task\.start is given twice, by the input `start` and below `set`; take one out",
        ),
    ],
)
def test_a_start_that_cannot_be_is_one_line(plan: Callable[[str], Plan], old: str, new: str, message: str) -> None:
    with pytest.raises(BowstoreError, match=message) as error:
        plan(RECIPE.replace(old, new))
    assert isinstance(error.value, UsageError | MissingError)
    assert "\n" not in str(error.value)
