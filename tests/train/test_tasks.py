"""Tasks: what their pattern promises, labels as targets, and the older form of a configuration."""

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shard_sets import ShardMaker

import bowstore
from bowstore.config import Workspace, dump, validate
from bowstore.data.index import Index, open_index
from bowstore.data.plan import plans
from bowstore.data.views import Batch
from bowstore.errors import DataError, MissingError, UsageError
from bowstore.evaluate.protocols import PROTOCOLS
from bowstore.models.heads import CosineHead, LinearHead
from bowstore.plugins import Named, called, use_plugins
from bowstore.runs import read_metrics
from bowstore.train import loop, watch
from bowstore.train.config import TrainConfig, learned, load_train_config
from bowstore.train.distributed import World
from bowstore.train.rundir import check_run
from bowstore.train.tasks import TASKS
from bowstore.train.tasks.settings import SUPERVISED, RotationSettings, SupervisedSettings, WordsSettings
from bowstore.train.tasks.task import Dead, Network, Task, build_task, last_map, pooled
from bowstore.workspace import newest_run

Make = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"))
PACKAGE = Path(bowstore.__file__).parent


def task_and_batch(config: TrainConfig, index: Index | None = None) -> tuple[Task, Batch]:
    assert config.shards is not None
    index = index or open_index(config.shards)
    plan = next(plans(loop.data_schedule(config, index, ALONE), index, config.view, start=0, stop=1))
    images_BCHW = torch.randn(len(plan.rows), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return build_task(config, index, ALONE), Batch(images_BCHW, plan)


# --- the pattern


def test_no_module_that_serves_all_tasks_names_one() -> None:
    modules = [PACKAGE / "train" / f"{name}.py" for name in (
        "loop", "step", "compiling", "schedule", "metrics", "health", "checkpoint", "rundir", "verify", "distributed",
    )]  # fmt: skip
    modules += [PACKAGE / "train/tasks/task.py", PACKAGE / "train/tasks/base.py", PACKAGE / "models/saved.py"]
    modules += [PACKAGE / "workspace.py", PACKAGE / "runs.py", PACKAGE / "benchmarks/train.py"]
    modules += [PACKAGE.parent / "tools" / f"gpu_{name}.py" for name in ("images", "made_up", "step")]
    for path in modules:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        protocols = set(PROTOCOLS.names()) if path.parent.name == "tools" else set()  # which they evaluate by
        assert texts.isdisjoint(set(TASKS.names()) - protocols), path.name


@pytest.mark.parametrize("name", TASKS.names())
def test_a_kind_says_what_its_settings_and_task_hold(make_config: Make, name: str) -> None:
    kind = TASKS.get(name)
    assert kind.settings.model_validate({"name": name}).name == name == kind.name
    task, batch = task_and_batch(make_config(name))
    assert isinstance(called(kind.build), Callable)  # type: ignore[arg-type]
    inputs, _ = task.prepare(batch)
    assert len(inputs) == task.views * len(batch.plan.rows)
    assert task.inputs.keys() >= {"shards"}
    assert task.dead is not None
    chance, told = task.dead.loss, task.dead.told({"loss": 1.5, task.dead.value: 1.5, "gamma": 2.0, **task.constants})
    assert chance == pytest.approx(next(iter(task.constants.values())))
    assert told.startswith("the loss 1.5000 is still that of ")
    assert f"({chance:.4f}): nothing is learned" in told


def test_a_network_gives_its_head_what_its_feature_function_takes(make_config: Make) -> None:
    task, batch = task_and_batch(make_config())
    backbone = task.network.backbone.eval()
    images_BCHW = batch.images_BCHW
    maps = backbone.feature_maps(images_BCHW, ("block2", "block3"))
    for features, expected in (
        (pooled, maps["block3"].mean((2, 3))),
        (last_map, maps["block3"]),
        (lambda trunk, images: trunk.feature_maps(images, ("block2",))["block2"], maps["block2"]),
    ):
        torch.testing.assert_close(Network(backbone, torch.nn.Identity(), features)(images_BCHW), expected)


def test_a_dead_runs_sentence_has_values_of_the_log_and_keeps_other_braces() -> None:
    dead = Dead(1.0, "loss {loss:.2f}, {gamma}, {accuracy:.3g}: {the docs}, {0}, {loss:z}, {}{")
    assert dead.told({"loss": 2.345, "accuracy": 0.5}) == "loss 2.35, {gamma}, 0.5: {the docs}, {0}, {loss:z}, {}{"


# --- tasks of plugins

PLUGIN = """
from bowstore.train.tasks.base import Kind, TaskSettings
class Needing(TaskSettings):
    need: int
KIND = Kind(name="needing", settings=Needing, build="nowhere:build", mixes=True)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """The file of a task with a setting that has no default, and a build function that is not there."""
    path = tmp_path / "needing.py"
    path.write_text(PLUGIN)
    use_plugins(Named((path.name,), str(tmp_path)))
    yield path
    use_plugins(Named((), ""))


def test_settings_without_defaults_can_be_left_out_for_another_task(
    plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    for settings in ("name: needing, need: 1", "name: gone, need: 1"):
        path.write_text(f"task: {{{settings}}}")
        assert load_train_config(path, ["task=words"]).task == WordsSettings()
        assert "are left out: the task is words" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"task: no task 'word'; did you mean 'words'\?"):
        load_train_config(path, ["task=word"])
    assert capsys.readouterr().err == ""


def test_a_run_of_a_plugin_that_is_gone_is_no_place_for_another(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\ntask: {name: gone}\n")
    (tmp_path / "backbone.safetensors").touch()
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"config\.yaml: task: no task 'gone'; .*; .* or take another --name$"):
            check_run(tmp_path, make_config(), resume=resume)


def test_code_of_a_plugin_that_is_not_there_is_one_line(plugin: Path, make_config: Make) -> None:
    with pytest.raises(UsageError, match=r"^nowhere:build cannot be imported: ModuleNotFoundError: .*'nowhere'"):
        task_and_batch(make_config("needing", {"need": 1}))


def test_the_newest_teacher_is_of_a_task_that_makes_them(tmp_path: Path) -> None:
    workspace = Workspace(runs=tmp_path)
    tasks = ("rotation", "{name: rotation}", "{name: supervised}", "words")
    for number, task in enumerate(tasks):
        run = tmp_path / str(number)
        run.mkdir()
        (run / "config.yaml").write_text(f"task: {task}")
        (run / "backbone.safetensors").touch()
        os.utime(run / "backbone.safetensors", (number, number))
    assert newest_run(workspace) == tmp_path / "3"
    for newest in ("1", "0"):
        assert newest_run(workspace, teacher=True) == tmp_path / newest
        (tmp_path / newest / "backbone.safetensors").unlink()
    with pytest.raises(MissingError, match=r"no finished run of a teacher \(task rotation or location\) in "):
        newest_run(workspace, teacher=True)


def test_what_a_run_learned_from_is_told_as_plain_values(make_config: Make) -> None:
    task, _ = task_and_batch(make_config())
    assert task.lineage.keys() == {"store", "layer", "num_words", "vocabulary_digest", "teacher"}
    assert (task.lineage["layer"], task.lineage["num_words"], task.lineage["teacher"]["name"]) == ("block3", 12, "t")


def test_places_do_not_decide_what_is_learned(make_config: Make) -> None:
    here, there = make_config(), make_config(settings={"store": "/elsewhere"}, shards="/there", runtime={"threads": 2})
    assert learned(here) == learned(there) != learned(make_config(settings={"form": "binary"}))


# --- labels as targets


@pytest.mark.parametrize("cutmix", [True, False])
def test_labels_are_learned_by_cross_entropy_and_mixed_by_the_area_that_is_kept(
    make_config: Make, cutmix: bool
) -> None:
    config = make_config("supervised", view={"cutmix": cutmix})
    task, batch = task_and_batch(config)
    plan, index = batch.plan, open_index(Path(str(config.shards)))
    inputs, bag = task.prepare(batch)
    assert inputs is batch.images_BCHW
    logits_BK = 3 * torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    label_B = torch.from_numpy(index.label[plan.rows].astype(np.int64))
    kept_B = torch.from_numpy(plan.kept)
    own_B = F.cross_entropy(logits_BK, label_B, reduction="none")
    others_B = F.cross_entropy(logits_BK, label_B[plan.partner], reduction="none")
    loss, means = task.loss(logits_BK, bag)
    torch.testing.assert_close(loss, (kept_B * own_B + (1 - kept_B) * others_B).mean())
    predicted_B = logits_BK.argmax(1)
    right_B = kept_B * (predicted_B == label_B) + (1 - kept_B) * (predicted_B == label_B[plan.partner])
    torch.testing.assert_close(means["accuracy"], right_B.mean())
    assert bool((kept_B < 1).any()) == cutmix
    assert task.constants["chance_loss"] == pytest.approx(np.log(4))


def test_heads_over_classes(make_config: Make) -> None:
    features_BC = torch.randn(5, 64)
    for head, kind in (("linear", LinearHead), ("cosine", CosineHead)):
        task, _ = task_and_batch(make_config("supervised", {"head": head}))
        found = task.network.head
        assert type(found) is kind
        logits_BK = found(features_BC).detach()
        assert logits_BK.shape == (5, 4)
        expected_BK = F.linear(features_BC, found.weight, getattr(found, "bias", None)).detach()
        if head == "cosine":
            assert found.gamma.item() == 10
            expected_BK = 10 * F.cosine_similarity(features_BC[:, None], found.weight.detach()[None], dim=2)
        torch.testing.assert_close(logits_BK, expected_BK)
    with pytest.raises(UsageError, match=r"task: gamma 3 is the scale of head cosine; leave it out with head linear"):
        make_config("supervised", {"gamma": 3.0})


def test_classes_are_learned(make_config: Make, tmp_path: Path) -> None:
    view = {"cutmix": False, "grey": 0, "hue": 0}
    loop.train(make_config("supervised", view=view, optim={"epochs": 10, "milestones": [8]}), tmp_path / "runs")
    lines = read_metrics(tmp_path / "runs" / "supervised-run")
    assert lines[-1]["loss"] < 0.5 * lines[-1]["chance_loss"] < lines[0]["loss"]
    assert lines[-1]["accuracy"] > 0.9


def test_images_without_labels_or_of_one_class_are_refused(make_config: Make, make_shard_set: ShardMaker) -> None:
    config = make_config("supervised")
    index = open_index(Path(str(config.shards)))
    label_N = np.array(index.label)
    label_N[[5, 9]] = -1
    with pytest.raises(
        DataError, match=rf"^task supervised: 2 of 72 images of .* have no label \(the first: {index.key(5)}\)"
    ):
        task_and_batch(config, replace(index, label=label_N))
    task_and_batch(make_config("supervised", images=16, optim={"batch": 4}), replace(index, label=np.roll(label_N, 40)))
    with pytest.raises(
        DataError, match=r"the 72 images of .* that are used are all of one class; use shards of several"
    ):
        task_and_batch(config, replace(index, label=np.zeros(72, np.int32)))
    label_N[[5, 9]] = 999_999_999
    with pytest.raises(DataError, match=r"label 999999999 of .* asks for 1000000000 classes, of at most"):
        task_and_batch(config, replace(index, label=label_N))


def test_other_labels_of_the_same_images_are_other_inputs(make_config: Make) -> None:
    config = make_config("supervised")
    index = open_index(Path(str(config.shards)))
    one = task_and_batch(config, index)[0].inputs
    other = task_and_batch(config, replace(index, label=(np.array(index.label) + 1) % 4))[0].inputs
    assert one["shards"] == other["shards"]
    assert one["labels"] != other["labels"]


# --- a run that learns nothing


def test_a_run_that_learns_nothing_is_told_once(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_JUDGED_STEP", 4)
    for name in ("supervised", "words", "rotation"):
        loop.train(make_config(name, optim={"lr": 1e-7}), tmp_path / "runs")
        said = [line for line in capsys.readouterr().err.splitlines() if "nothing is learned" in line]
        assert len(said) == 1, name
        assert re.match(r"warning: the loss \d\.\d{4} is still that of .* try a lower optim\.lr", said[0])


# --- how a task stands in a configuration

OLD = {
    "name": "old", "task": "words", "words": {"store": "w.zarr", "layer": "block3", "form": "binary"},
    "rotation": {"blocks": None},
}  # fmt: skip


def test_the_older_form_is_read_and_the_newer_written() -> None:
    config = validate(TrainConfig, OLD, "old")
    assert config.task == WordsSettings(store=Path("w.zarr"), layer="block3", form="binary")
    written = dump(config)
    assert written["task"] == {
        "name": "words", "store": "w.zarr", "layer": "block3", "layers": None, "form": "binary", "grids": [1, 2],
        "head": "cosine", "reencoded": False, "gamma": 1.0, "crop_aware": False,
    }  # fmt: skip
    assert written.keys().isdisjoint({"words", "rotation"})
    assert validate(TrainConfig, written, "new") == config
    view = {"cutmix": False}
    turned = validate(TrainConfig, {**OLD, "view": view, "task": "rotation", "rotation": {"blocks": 3}}, "old")
    assert turned.task == RotationSettings(blocks=3)
    assert validate(TrainConfig, {"name": "x", "task": "words"}, "short").task == WordsSettings()


@pytest.mark.parametrize("text", [
    "task: words\nwords: {form: binary, gamma: 2}", "task: {name: words, form: binary, gamma: 2}",
])  # fmt: skip
def test_both_spellings_set_a_tasks_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert load_train_config(path).task == WordsSettings(form="binary", gamma=2.0)
    for override in ("words.gamma=3", "task.gamma=3"):
        for named in ([], ["task=words"], ["task.name=words"]):
            assert load_train_config(path, [override, *named]).task == WordsSettings(form="binary", gamma=3.0)
    store = tmp_path / "s"
    assert load_train_config(path, (), {"task.store": store}).task == WordsSettings(store=store, form="binary", gamma=2)
    with pytest.raises(UsageError, match=r"--set 'words\.gamma=4' and --set 'task\.gamma=3' set the same key"):
        load_train_config(path, ["task.gamma=3", "words.gamma=4"])


def test_settings_of_another_task_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("task: rotation\nview: {cutmix: false}\nwords: {form: binary}\nrotation: {blocks: 2}")
    assert load_train_config(path).task == RotationSettings(blocks=2)
    told = f"warning: {path}: the settings of task words are left out: the task is rotation\n"
    assert capsys.readouterr().err == told
    assert load_train_config(path, ["task=words", "words.gamma=2"]).task == WordsSettings(form="binary", gamma=2.0)
    assert capsys.readouterr().err == told.replace("words", "x").replace("rotation", "words").replace("x", "rotation")
    path.write_text("task: {name: words, form: binary}\nview: {cutmix: false}")
    assert load_train_config(path, ["task=supervised", "task.head=cosine"]).task == SupervisedSettings(head="cosine")
    assert "the settings of task words are left out: the task is supervised" in capsys.readouterr().err
    path.write_text("task: rotation\nview: {cutmix: false}\nwords: {form: count, store: null}")
    load_train_config(path)
    assert capsys.readouterr().err == "", "as a run of that time wrote them: all at their defaults"


@pytest.mark.parametrize(("values", "message"), [
    ({}, r"task: write a group with the task's name, as in \{name: rotation\}"),
    ({"task": {"form": "count"}}, r"task: write a group with the task's name, as in \{name: rotation\}"),
    ({"task": 3}, r"task: write a group with the task's name.* \(got 3\)"),
    ({"task": [1]}, r"task: write a group with the task's name"),
    ({"task": "supervise"}, r"task: no task 'supervise'; did you mean 'supervised'\? there are rotation, location, "),
    ({"task": {"name": "words", "from": "count"}}, r"unknown configuration key 'task\.from'; did you mean 'form'\?"),
    ({"task": {"name": "words", "gamma": 0}}, r"task\.gamma: Input should be greater than 0 \(got 0\)"),
    ({"task": {"name": "words"}, "words": {"gamma": 1}}, r"words: settings of a task stand in its group now"),
    ({"task": "rotation"}, r"view\.cutmix must be false for task rotation: a mixed image has no target there"),
])  # fmt: skip
def test_what_is_no_task_is_one_line(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^x: {message}|^x: configuration: {message}") as error:
        validate(TrainConfig, {"name": "x", **values}, "x")
    assert "\n" not in str(error.value)
    (tmp_path / "x").write_text(json.dumps(values))
    for flags in ({}, {"seed": 1}):
        with pytest.raises(UsageError, match=message):
            load_train_config(tmp_path / "x", (), flags)


def test_a_flag_that_the_task_has_none_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("task: supervised")
    with pytest.raises(
        UsageError, match=rf"^--store: task supervised of {re.escape(str(path))} has none; leave it out$"
    ):
        load_train_config(path, (), {"task.store": tmp_path})


def test_only_what_a_task_asks_of_the_workspace_is_filled_in(make_config: Make) -> None:
    config = make_config(settings={"layer": None})
    assert config.task.store is not None
    workspace = Workspace(store=config.task.store)
    given = WordsSettings()
    resolved = called(TASKS.get("words").resolve)(given, workspace)
    assert (resolved.store, resolved.layer) == (config.task.store, "block3")
    assert SUPERVISED.resolve is None is TASKS.get("rotation").resolve


def test_who_comes_next_is_a_recipes_matter(tmp_path: Path) -> None:
    """Records of old runs name a student, and are read; in a configuration of today it is refused."""
    old = {**OLD, "student": "bownet.yaml"}
    assert validate(TrainConfig, old, "old") == validate(TrainConfig, OLD, "old")
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps(old))
    with pytest.raises(UsageError, match=r"old\.yaml: student: a configuration no longer says .*; leave this out"):
        load_train_config(path)
    path.write_text(json.dumps({**old, "student": None}))
    assert load_train_config(path).task.name == "words"
