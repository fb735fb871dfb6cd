"""The configurations and recipes that come with bowstore: each is read, built and planned; the small ones are run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_sets import encode_jpeg, fill_layer, textured_image, write_store, write_tar

from bowstore.config import Workspace, bundled_configs, dump, validate
from bowstore.data.index import Index, build_index
from bowstore.evaluate.results import paper_tables
from bowstore.models.backbone import Backbone
from bowstore.models.saved import load_backbone
from bowstore.recipes.encode import EncodeStage
from bowstore.recipes.evaluate import EvalStage
from bowstore.recipes.file import bundled_recipes, load_recipe
from bowstore.recipes.plan import Plan, make_plan
from bowstore.recipes.reproduce import row_of
from bowstore.recipes.train import TrainStage
from bowstore.train import loop
from bowstore.train.config import TrainConfig, load_train_config
from bowstore.train.distributed import World
from bowstore.train.schedule import learning_rate, total_steps
from bowstore.train.tasks.task import build_task
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.writer import StoreWriter
from bowstore.yaml_file import read_yaml, write_yaml

CONFIGS = sorted(bundled_configs().glob("*.yaml"))
RECIPES = bundled_recipes()
SMALL = [path for path in CONFIGS if path.stem.endswith("_small") or path.stem.startswith("demo_")]
LINES = ("# Paper's row:", "# Command:", "# Hardware:", "# Expected:")
ALONE = World(0, 1, torch.device("cpu"))
MILLIONS = {  # weights of the backbones, without a classifier
    "wrn-10-1": 0.0773, "wrn-16-2": 0.690, "wrn-28-4": 5.84, "wrn-28-10": 36.48, "resnet18": 11.18, "resnet50": 23.51,
}  # fmt: skip
OVER = ["optim.epochs=2", "optim.steps_per_epoch=1", "optim.milestones=[]", "optim.warmup_epochs=0", "optim.batch=4"]


def name_of(path: Path) -> str:
    return path.stem


def header_of(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES.values()], ids=name_of)
def test_each_says_what_it_is(path: Path) -> None:
    header = header_of(path)
    assert not header[0].startswith(LINES)
    assert [line.partition(":")[0] + ":" for line in header if line.startswith(LINES)] == list(LINES)
    assert all(line.partition(":")[2].strip() for line in header if line.startswith(LINES))
    assert all(len(line) <= 120 for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_each_configuration_is_valid(path: Path, tmp_path: Path) -> None:
    config = load_train_config(path)
    assert config.name == path.stem
    again = tmp_path / "again.yaml"
    again.write_bytes(write_yaml(dump(config)))
    assert validate(TrainConfig, read_yaml(again), "again") == config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Path]:
    """Ten images of two classes, and words of every layer that a configuration learns."""
    root = tmp_path_factory.mktemp("configs")
    images = [(f"c{n % 2}/{n}", encode_jpeg(textured_image(n, 40, 36)), n % 2) for n in range(10)]
    write_tar(root / "shards" / "train-000000.tar", images)
    index = build_index(root / "shards", classes=("c0", "c1"))
    store = write_store(root / "words.zarr", index)  # block3
    teacher = {"arch": "resnet18", "weights_sha256": "0", "name": "t"}
    maps = np.random.default_rng(0).integers(0, 5, (len(index), 4, 4)).astype(np.uint16)
    for layer in ("conv4", "conv5"):
        spec = LayerSpec({**teacher, "layer": layer}, {}, {}, num_words=5, grid=(4, 4), channels=2)
        fill_layer(StoreWriter(store), layer, spec, maps)
    return index, store


@pytest.fixture
def ready(data: tuple[Index, Path]) -> Callable[..., TrainConfig]:
    """A configuration, told where images and words lie."""

    def load(path: Path, overrides: list[str]) -> TrainConfig:
        index, store = data
        task: Any = load_train_config(path).task
        flags: dict[str, Any] = {"shards": index.root}
        if hasattr(task, "store"):
            layer = "conv4" if path.stem.startswith("imagen") and "84" not in path.stem else "block3"
            flags |= {"task.store": store, "task.layer": task.layer or layer}
        if task.name == "clusters":
            flags["task.clusters"] = 4  # of ten images
        return load_train_config(path, overrides, flags)

    return load


def check_size(backbone: Backbone) -> None:
    weights = sum(weight.numel() for weight in backbone.parameters())
    assert weights == pytest.approx(MILLIONS[backbone.arch] * 1e6, rel=0.01)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in SMALL], ids=name_of)
def test_network_and_task_of_each_large_one_can_be_built(
    path: Path, ready: Callable[..., TrainConfig], data: tuple[Index, Path]
) -> None:
    config = ready(path, ["optim.batch=4"])
    with torch.device("meta"):
        check_size(build_task(config, data[0], ALONE).network.backbone)


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_two_steps_of_each_small_one(path: Path, ready: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = ready(path, OVER)
    assert loop.train(config, tmp_path).steps == 2
    check_size(load_backbone(tmp_path / config.name).backbone)


def rates(name: str, steps_per_pass: int, *steps: int) -> tuple[int, list[float]]:
    """Length of a run, and the learning rates of some of its steps, counted from 0."""
    optim = load_train_config(bundled_configs() / f"{name}.yaml").optim
    return total_steps(optim, steps_per_pass), [learning_rate(step, optim, steps_per_pass) for step in steps]


@pytest.mark.parametrize("system", ["cifar100_rotnet", "cifar100_bownet", "cifar100_sp_bownet", "miniimagenet_bownet"])
def test_the_papers_schedule_on_small_images(system: str) -> None:
    total, found = rates(system, 390, 0, 23_999, 24_000, 47_999, 48_000, 59_999)
    assert total == 60_000
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("system", ["cifar100_clusters", "miniimagenet_clusters"])
def test_deeper_clustering_keeps_its_rate(system: str) -> None:
    total, found = rates(system, 390, 0, 24_000, 48_000, 59_999)
    assert total == 60_000
    assert found == [0.1] * 4
    config = load_train_config(bundled_configs() / f"{system}.yaml")
    clusters, every_epochs = config.task.clusters, config.task.every_epochs  # type: ignore[attr-defined]
    assert (clusters, every_epochs, config.optim.batch, config.view.cutmix) == (512, 3, 128, True)


@pytest.mark.parametrize("layer", ["conv4", "conv5"])
def test_the_papers_schedule_on_imagenet(layer: str) -> None:
    steps = 1_281_167 // 256
    total, found = rates(
        f"imagenet_{layer}", steps, *(n * steps + d for n in (0, 60, 100, 130) for d in (0, steps - 1))
    )
    assert total == 140 * steps
    assert found == pytest.approx([0.03, 0.03, 3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])
    _, (before, after) = rates(f"imagenet_{layer}", steps, 60 * steps - 1, 60 * steps)
    assert before == pytest.approx(10 * after)


def test_the_papers_settings() -> None:
    """Paper, 4.1.1 and 4.2."""
    for name in ("cifar100_bownet", "miniimagenet_bownet"):
        config = load_train_config(bundled_configs() / f"{name}.yaml")
        optim = config.optim
        assert (optim.batch, optim.weight_decay, optim.momentum, optim.nesterov) == (128, 5e-4, 0.9, True)
        assert (config.task.form, config.view.cutmix) == ("count", True)  # type: ignore[attr-defined]
    assert load_train_config(bundled_configs() / "cifar100_bownet.yaml").model.strides == (1, 2, 2)
    assert load_train_config(bundled_configs() / "miniimagenet_bownet.yaml").model.strides == (2, 2, 2)
    for layer in ("conv4", "conv5"):
        config = load_train_config(bundled_configs() / f"imagenet_{layer}.yaml")
        assert (config.model.arch, config.optim.batch, config.optim.weight_decay) == ("resnet50", 256, 1e-4)
        assert (config.task.form, config.task.layer) == ("binary", layer)  # type: ignore[attr-defined]
        assert config.view.cutmix


def test_each_system_has_a_sister_for_two_cores() -> None:
    paper = {path.stem.removeprefix("cifar100_") for path in CONFIGS if path.stem.startswith("cifar100_")}
    small = {path.stem.removeprefix("cifar10_").removesuffix("_small") for path in SMALL}
    assert paper - small == set()


def planned(name: str) -> Plan:
    return make_plan(load_recipe(RECIPES[name]), Workspace(), seed=0)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_can_be_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a clone in which the demo ran has its results
    plan = planned(name)
    assert {stage.kind for stage in plan.stages.values()} >= {"shards", "train", "encode", "eval"}
    assert all(line["state"] == "to do" for line in plan.overview())


@pytest.mark.parametrize("small", ["", "_small"])
@pytest.mark.parametrize("table", paper_tables())
def test_every_row_of_a_table_is_evaluated(table: str, small: str) -> None:
    paper, stages = paper_tables()[table], planned(table + small).stages.values()
    rows = {row_of(cell.row) for stage in stages if isinstance(stage, EvalStage) for cell in stage.cells}
    assert rows >= set(paper.rows) - paper.quoted.keys()


WORDS = {"table1": 2048, "table2": 2048, "table3": 2048, "table4": 20_000, "table5": 20_000, "table6": 20_000}


@pytest.mark.parametrize("table", WORDS)
def test_a_tables_recipe_has_the_papers_words(table: str) -> None:
    encodings = [stage for stage in planned(table).stages.values() if isinstance(stage, EncodeStage)]
    assert {stage.config.num_words for stage in encodings} == {(WORDS[table],)}


def test_tables_share_what_they_have_in_common() -> None:
    """What lies in one place is made in the same way in each recipe that makes it."""
    makers: dict[Path, Any] = {}
    for name in (f"{table}{small}" for table in WORDS for small in ("", "_small")):
        for stage in planned(name).stages.values():
            made: Any = type(stage), stage.reads
            if isinstance(stage, TrainStage):
                made = *made, stage.config
            if isinstance(stage, EncodeStage):
                made = *made, stage.given
            for place in () if isinstance(stage, EvalStage) else stage.writes:
                assert makers.setdefault(place, made) == made, (name, place)
    assert len(makers) > 40
