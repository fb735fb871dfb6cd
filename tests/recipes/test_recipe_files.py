"""Recipe files: what is refused, in one line, before anything runs; order, places and what is done."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.config import Workspace, find_config, load_workspace
from bowstore.errors import MissingError, UsageError
from bowstore.recipes.encode import EncodeStage
from bowstore.recipes.evaluate import EvalStage
from bowstore.recipes.file import bundled_recipes, find_recipe, load_recipe
from bowstore.recipes.images import ShardsStage
from bowstore.recipes.plan import Plan, make_plan
from bowstore.recipes.train import TrainStage

SMALL = """
stages:
  images: {render: {train: 120, val: 60}}
  data:   {shards: {}, images: images}
  rotnet: {train: cifar10_rotnet_small.yaml, on: data}
  words:  {encode: {layers: [block3], num_words: [16]}, teacher: rotnet, on: data}
  bownet: {train: cifar10_bownet_small.yaml, words: words, on: data}
  linear: {eval: linear, of: [rotnet, bownet], random: bownet, train: data, test: data}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan_of(text: str, **how: Any) -> Plan:
    Path("r.yaml").write_text(text)
    return make_plan(load_recipe(Path("r.yaml")), Workspace(), **how)


# What of SMALL is replaced, by what, and what is said of it.
MISTAKES = [
    (
        "rotnet: {train",
        "rotnet: {trian",
        r"stage 'rotnet' with \['on', 'trian'\] is of no known kind; did you mean 'train'",
    ),
    (
        "rotnet: {train",
        "rotnet: {what",
        r"is of no known kind; the kinds are render, download, shards, train, encode, eval",
    ),
    ("rotnet: {", "rotnet: {encode: {}, ", r"stage 'rotnet' is of kinds train and encode; the kinds are"),
    (
        "shards: {}",
        "shards: {per_shards: 9}",
        r"unknown configuration key 'shards\.per_shards'; did you mean 'per_shard'\?",
    ),
    ("{}, images: images", "{}", r"stage 'data': .*name the images once: by `images: STAGE`, or by `src`"),
    ("val: 60", "val: 9", r"stage 'images': .*val: Input should be greater than or equal to 10 \(got 9\)"),
    (
        "val: 60",
        "val: 60, size: 1025",
        r"images.: .*size: Input should be less than or equal to 1024 \(got 1025\)",
    ),
    ("num_words", "num_word", r"'words': encode: unknown configuration key 'num_word'; did you mean 'num_words'\?"),
    ("bownet_small.yaml", "bownet_small.yaml, set: {optim.epoch: 2}", r"key 'optim\.epoch'; did you mean 'epochs'\?"),
    ("cifar10_bownet_small.yaml", "nobody.yaml", r"stage 'bownet': no configuration file nobody\.yaml"),
    ("eval: linear", "eval: liner", r"stage 'linear': eval: no protocol 'liner'; did you mean 'linear'"),
    (
        "eval: linear",
        "eval: {linear: {seeds: 1}}",
        r"eval: linear: unknown configuration key 'seeds'; did you mean 'seed'",
    ),
    ("eval: linear", "eval: [3]", r"eval: 3 is no protocol; write its name"),
    ("teacher: rotnet, ", "", r"stage 'words': no teacher; name the stage that trains it"),
    ("words: words, ", "", r"stage 'bownet': .*learns words; name the stage that makes them"),
    (
        "rotnet_small.yaml",
        "rotnet_small.yaml, words: words",
        r"stages wait for each other in a circle: rotnet -> words -> rotnet; take",
    ),
    ("of: [rotnet, bownet], random: bownet, ", "", r"stage 'linear': .*name the networks: `of: \[STAGE"),
    ("teacher: rotnet", "teacher: rotnett", r"`teacher: rotnett`: no stage 'rotnett'; did you mean 'rotnet'\?"),
    ("teacher: rotnet", "teacher: data", r"`teacher: data` is a stage of kind shards, and must be one of kind train"),
    ("teacher: rotnet", "teacher: rotnet/val", r"only shards have splits; write 'rotnet'"),
    (
        "bownet_small.yaml",
        "bownet_small.yaml, name: cifar10_rotnet_small",
        r"'rotnet' and 'bownet' both write runs/cifar10_rotnet_small; give .*name",
    ),
    (
        "[block3]",
        "[block2, block3]",
        r"stage 'words' makes layers block2, block3; name one of them, as in `set: \{task\.",
    ),
    (
        "[block3]",
        "[conv4]",
        r"'words': teacher cifar10_rotnet_small has no layer 'conv4': the layers of wrn-10-1",
    ),
    (
        "[block3]",
        "[layer3.0]",
        r"'words': teacher .* has no layer 'layer3\.0': .* are conv1, block1, block2, block3",
    ),
    (
        "[16]",
        "[16], pca: 65, whiten: true",
        r"'words': --pca 65 is more than the 64 channels of layer 'block3'; choose at most 64",
    ),
    ("[16]", "[16], whiten: true", r"stage 'words': encode: .*whiten goes with pca; set pca to the layer's number"),
    (
        "[16]",
        "[16], border: 4",
        r"'words': --border 4 leaves nothing of the 8 x 8 map of layer 'block3'; choose at most",
    ),
    ("[16]", "[16, 9]", r"stage 'words': 1 layers and 2 values of --K; give one for all"),
    (", num_words: [16]", "", r"stage 'words': the number of words of layer 'block3' is not known; give --K"),
    ("[16]}, teacher: rotnet", "[16], teacher: nobody.yaml}", r"'words': no configuration file nobody\.yaml; "),
    (
        "[block3], num_words: [16]}, teacher: rotnet",
        "[block4], num_words: [16], teacher: cifar10_rotnet_small.yaml}",
        r"'words': teacher cifar10_rotnet_small has no layer 'block4'",
    ),
    (
        "rotnet_small.yaml",
        "rotnet_small.yaml, set: {model.arch: wrn-11-1}",
        r"model\.arch 'wrn-11-1': depth 11 must",
    ),
    (
        "bownet_small.yaml",
        "bownet_small.yaml, set: {task.form: pyramid, task.grids: [1, 3]}",
        r"'bownet': task\.grids \[1, 3\]: 3 x 3 cells do not divide the 8 x 8 words of an image in block3; take",
    ),
    ("  linear:", "  a/b:", r"stage 'a/b': a stage's name is text without a slash"),
    (
        "  linear:",
        "  again: {encode: {layers: [block3], num_words: [9]}, teacher: bownet}\n  linear:",
        r"stages 'words' and 'again' both write data/words\.zarr/block3; give one of them another `store:`",
    ),
    (
        "  linear:",
        "  again: {render: {}, out: data/shards/../images}\n  linear:",
        r"stages 'images' and 'again' both write data/shards/\.\./images; give one of them another `out:`",
    ),
    (
        "eval: linear",
        "eval: [linear, {linear: {seed: 1}}]",
        r"'linear' writes runs/.*bownet-cifar\.json twice",
    ),
    (SMALL, "stages: {}", r"r\.yaml has no stages; write some below `stages:`"),
    (SMALL, "stage: {}", r"r\.yaml: unknown configuration key 'stage'; did you mean 'stages'\?"),
    (SMALL, "stages: {", r"r\.yaml is not a YAML file: .*line 1"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_bad_recipes_are_one_line_that_names_the_stage(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises((UsageError, MissingError), match=message) as error:
        plan_of(SMALL.replace(old, new))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("r.yaml")


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(MissingError, match=r"no recipe nothing; those that come with bowstore .*: .*demo"):
        load_recipe(Path("nothing"))
    result = CliRunner().invoke(main, ["run"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "no recipe was named; `bowstore run RECIPE`, or `recipe: RECIPE` in bowstore.yaml" in result.stderr


def test_a_name_means_the_workspaces_recipe_before_bowstores() -> None:
    assert find_recipe(Path("demo")) == bundled_recipes()["demo"]
    own = Path("configs/recipes/demo.yaml")
    assert find_recipe(own) == bundled_recipes()["demo"], "as docs and headers of configurations write it"
    assert find_recipe(own.with_suffix("")) == bundled_recipes()["demo"]
    own.parent.mkdir(parents=True)
    own.write_text(SMALL)
    assert find_recipe(Path("demo")) == find_recipe(Path("demo.yaml")) == find_recipe(own) == own


def test_stages_come_behind_their_inputs_in_whatever_order_they_are_written() -> None:
    head, *stages = SMALL.strip().splitlines()
    for lines in (stages, stages[::-1], stages[3:] + stages[:3]):
        names = list(plan_of("\n".join((head, *lines))).stages)
        assert names == ["images", "data", "rotnet", "words", "bownet", "linear"]


def test_several_layers_of_one_stage_are_learned_together() -> None:
    text = SMALL.replace("[block3]", "[block2, block3]")
    bownet = "bownet_small.yaml, set: {task.layer: null, task.layers: [%s]}"
    stage = plan_of(text.replace("bownet_small.yaml", bownet % "block3, block2")).stages["bownet"]
    assert isinstance(stage, TrainStage)
    assert stage.layers == ("block2", "block3")  # in one order, however they are written
    assert stage.reads == (Path("data/shards/train"), Path("data/words.zarr/block2"), Path("data/words.zarr/block3"))
    with pytest.raises(UsageError, match=r"stage 'words' makes layers block2, block3; name one of them"):
        plan_of(text.replace("bownet_small.yaml", bownet % "block1, block3"))


def test_places_are_the_workspaces_unless_named() -> None:
    steps = plan_of(SMALL, seed=3).stages
    data, rotnet, words, bownet, linear = (steps[name] for name in ("data", "rotnet", "words", "bownet", "linear"))
    assert isinstance(data, ShardsStage)
    assert (data.source, *data.writes, *data.splits.values()) == tuple(
        map(Path, ("data/images", "data/shards", "data/shards/train", "data/shards/val"))
    )
    assert isinstance(rotnet, TrainStage)
    assert (rotnet.run, rotnet.config.seed, rotnet.config.shards) == (
        Path("runs/cifar10_rotnet_small"),
        3,
        (data.splits["train"],),
    )
    assert isinstance(words, EncodeStage)
    assert (words.place, words.config.teacher, words.config.seed) == (Path("data/words.zarr"), rotnet.run, 3)
    assert isinstance(bownet, TrainStage)
    assert bownet.reads == (data.splits["train"], words.place / "block3")
    assert isinstance(linear, EvalStage)
    assert [(cell.row, cell.run.name, cell.config.random) for cell in linear.cells] == [
        ("random network", "cifar10_bownet_small", True),
        ("rotnet", "cifar10_rotnet_small", False),
        ("bownet", "cifar10_bownet_small", False),
    ]


def test_the_demo_lies_as_it_always_did() -> None:
    plan = make_plan(load_recipe(bundled_recipes()["demo"]), Workspace(), seed=2, folder=Path("out"))
    assert str(plan.result) == "out/seed-2/demo.json"
    assert [str(place) for stage in plan.stages.values() for place in stage.writes][:5] == [
        "out/images", "out/shards", "out/seed-2/runs/demo_rotnet", "out/seed-2/words.zarr/block3",
        "out/seed-2/runs/demo_bownet",
    ]  # fmt: skip
    assert [line["state"] for line in plan.overview()] == ["to do"] * 6


def test_init_writes_a_recipe_with_its_configurations() -> None:
    result = CliRunner().invoke(main, ["init", "--recipe", "imagenet"])
    assert result.stdout.split() == [
        "bowstore.yaml", "configs/recipes/imagenet.yaml", "configs/imagenet_rotnet.yaml", "configs/imagenet_conv4.yaml",
        "configs/imagenet_conv5.yaml",
    ]  # fmt: skip
    workspace = load_workspace()
    assert workspace.recipe == Path("configs/recipes/imagenet.yaml")
    assert list(make_plan(load_recipe(workspace.recipe), workspace).stages)[-1] == "voc07"
    assert "is already there" in CliRunner().invoke(main, ["init", "--recipe", "imagenet"]).stderr
    assert (
        "no recipe mnist; those that come with" in CliRunner().invoke(main, ["init", "x", "--recipe", "mnist"]).stderr
    )


def test_init_copies_the_configurations_that_a_recipe_of_ones_own_means() -> None:
    own = Path("mine/rotnet.yaml")
    own.parent.mkdir()
    own.write_text("base: beside.yaml\nseed: 77\n")
    own.with_name("beside.yaml").write_text("base: cifar10_rotnet_small.yaml\n")
    Path("a: b.yaml").write_text(SMALL.replace("cifar10_rotnet_small.yaml", str(own)))
    assert CliRunner().invoke(main, ["init", "new", "--recipe", "a: b.yaml"]).exit_code == 0
    os.chdir("new")
    assert own.with_name("beside.yaml").is_file()
    assert Path("configs/cifar10_rotnet_small.yaml").is_file()
    workspace = load_workspace()
    assert workspace.recipe == Path("configs/recipes/a: b.yaml")
    rotnet = make_plan(load_recipe(workspace.recipe), workspace).stages["rotnet"]
    assert isinstance(rotnet, TrainStage)
    assert rotnet.config.seed == 77
    Path("c.yaml").write_text("stages: {t: {train: nobody.yaml}}")
    result = CliRunner().invoke(main, ["init", "none", "--recipe", "c.yaml"])
    assert "Error: c.yaml names the configuration nobody.yaml, which is not there" in result.stderr
    assert not Path("none").exists()


def test_a_recipe_may_be_based_on_another() -> None:
    Path("mine.yaml").write_text(
        "base: cifar10_rounds_small.yaml\nresult: mine.json\nstages:\n"
        "  BoWNet: {set: {optim.lr: 0.2}}\n  table: {eval: knn, of: [BoWNet]}\n"
    )
    ours, base = load_recipe(Path("mine.yaml")), load_recipe(Path("cifar10_rounds_small"))
    assert list(ours.stages) == list(base.stages)
    assert ours.stages["BoWNet"] == base.stages["BoWNet"].model_copy(update={"set": {"optim.lr": 0.2}})
    assert ours.stages["table"] == base.stages["table"].model_copy(update={"eval": "knn", "of": ("BoWNet",)})
    assert ours.file.result == Path("mine.json")
    assert ours.file.runs == base.file.runs
    # A copy in a workspace finds what it is based on there.
    for name, copied in (("table5", "table4"), ("mine.yaml", "cifar10_rounds_small")):
        assert CliRunner().invoke(main, ["init", copied, "--recipe", name]).exit_code == 0
        assert Path(copied, "configs/recipes", f"{copied}.yaml").is_file()
        assert load_recipe(Path(copied, "configs/recipes", Path(name).stem + ".yaml")).stages
    Path("mine.yaml").write_text("base: mine.yaml")
    with pytest.raises(UsageError, match=r"mine.yaml: base: mine.yaml is based on this file itself; take one of"):
        load_recipe(Path("mine.yaml"))
    Path("mine.yaml").write_text("base: table9.yaml")
    with pytest.raises(MissingError, match=r"mine.yaml: base: no recipe table9.yaml; those that come|did you mean"):
        load_recipe(Path("mine.yaml"))


def test_a_dry_run_loads_no_torch_and_writes_nothing() -> None:
    code = (
        "import sys, json; from click.testing import CliRunner; from bowstore.cli import main;"
        "result = CliRunner().invoke(main, ['run', 'demo', '--dry-run', '--json']);"
        "assert result.exit_code == 0, result.output;"
        "print([m for m in ('torch', 'nvidia.dali', 'faiss', 'sklearn') if m in sys.modules]);"
        "print(json.dumps([line['stage'] for line in json.loads(result.stdout)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy, stages = done.stdout.splitlines()
    assert heavy == "[]"
    assert json.loads(stages) == ["images", "shards", "RotNet", "words", "BoWNet", "linear"]
    assert list(Path().iterdir()) == []


ROUNDS = """
stages:
  data:   {shards: {src: IMAGES}}
  rotnet: {train: cifar10_rotnet_small.yaml, on: data}
  words:  {encode: {layers: [block3], num_words: [16]}, teacher: rotnet, on: data}
  x1:     {train: cifar10_bownet_small.yaml, name: x1, words: words, on: data}
  words2: {encode: {layers: [block3], num_words: [16]}, teacher: x1, on: data, store: words2.zarr}
  x2:     {train: cifar10_bownet_small.yaml, name: x2, words: words2, on: data}
  words3: {encode: {layers: [block3], num_words: [16]}, teacher: x2, on: data, store: words3.zarr}
  x3:     {train: cifar10_bownet_small.yaml, name: x3, words: words3, on: data}
  wordsR: {encode: {layers: [block1], num_words: [16], teacher: cifar10_bownet_small.yaml}, on: data, store: R.zarr}
  r1:     {train: cifar10_bownet_small.yaml, name: r1, words: wordsR, on: data}
"""


@pytest.mark.parametrize(("seed", "first"), [(None, 0), (2, 2)])
def test_each_round_of_students_is_drawn_anew(seed: int | None, first: int) -> None:
    """No student begins as its teacher did; RotNet and the first round keep the recipe's seed."""
    stages = plan_of(ROUNDS, seed=seed).stages
    seeds = {name: stage.config.seed for name, stage in stages.items() if isinstance(stage, TrainStage)}
    assert seeds == {"rotnet": first, "x1": first, "x2": first + 1000, "x3": first + 2000, "r1": first + 1000}
    random = stages["wordsR"]
    assert isinstance(random, EncodeStage)
    assert random.reads[0] == str(find_config(Path("cifar10_bownet_small.yaml")))
    assert random.configurations == (Path("cifar10_bownet_small.yaml"),)
    own = plan_of(ROUNDS.replace("name: x2", "name: x2, set: {seed: 7}"), seed=seed).stages["x2"]
    assert isinstance(own, TrainStage)
    assert own.config.seed == 7


def test_too_few_images_are_refused_before_any_work(make_shard_set: ShardMaker) -> None:
    """Shards that are there already say how many images there are."""
    index = make_shard_set(40, folder="data/shards/train")
    text = SMALL.replace("{render: {train: 120, val: 60}}", "{render: {}}").replace("[16]", "[{K}]")
    for words, batch, message in (
        (2561, 16, "words: K = 2561 words need as many feature vectors, and 40 images give 2560 (64 each)"),
        (2560, 44, "bownet: 40 images are fewer than one batch of 44; lower optim.batch"),
    ):
        stage, _, line = message.partition(": ")
        own = text.replace("{K}", str(words)).replace("words: words", f"words: words, set: {{optim.batch: {batch}}}")
        with pytest.raises(UsageError, match=re.escape(line)):
            plan_of(own).stages[stage].check()
        shown = json.loads(CliRunner().invoke(main, ["run", "r.yaml", "--dry-run", "--json"]).stdout)
        assert [one["stage"] for one in shown if one["problem"].startswith(line)] == [stage]
    few = "stages: {c: {train: cifar10_clusters_small.yaml, set: {optim.batch: 16, task.clusters: 41}}}"
    with pytest.raises(UsageError, match=r"^task\.clusters 41 needs as many images, and 40 are used; lower task"):
        plan_of(few).stages["c"].check()
    assert len(index) == 40
    assert not Path("runs").exists()


def test_images_that_no_shards_are_made_of_are_not_needed() -> None:
    """As in a recipe that is based on another, and has shards of other images."""
    own, other = "data:   {shards: {}, images: images}", "data:   {shards: {src: IMAGES}}"
    for text, state in ((own, "to do"), (other, "not needed")):
        assert plan_of(SMALL.replace(own, text)).overview()[0]["state"] == state


def test_words_are_made_on_this_machine() -> None:
    recipe = load_recipe(Path("any_teacher"), ["stages.words.store=s3://bucket/words.zarr"])
    (words,) = make_plan(recipe, Workspace()).overview("words")
    assert words["problem"] == (
        "s3://bucket/words.zarr is on another machine; encode into a --store on this machine and copy it there by "
        "`bowstore push STORE URL`"
    )


def test_a_teachers_weights_that_are_not_there_are_told_where_to_be_had() -> None:
    """By the library's own record; nothing is fetched."""
    plan = make_plan(load_recipe(Path("any_teacher")), Workspace(), seed=0)
    (words,) = plan.overview("words")
    assert words["problem"] == (
        "no weights file data/tf_efficientnet_lite0.safetensors for timm:tf_efficientnet_lite0 (published: "
        "model.safetensors of https://huggingface.co/timm/tf_efficientnet_lite0.in1k); put it there, or name another "
        "file"
    )
    assert words["reads"] == [
        "timm:tf_efficientnet_lite0", "data/tf_efficientnet_lite0.safetensors", "any_teacher/data/imagenette/train"
    ]  # fmt: skip
    Path("mine.safetensors").write_bytes(b"weights")
    named = ["stages.words.encode.weights=mine.safetensors"]
    (words,) = make_plan(load_recipe(Path("any_teacher"), named), Workspace()).overview("words")
    assert words["problem"] == ""
    Path("r.yaml").write_text("base: any_teacher.yaml\nstages: {words: {encode: {teacher: 'torchvision:resnet50'}}}")
    (words,) = make_plan(load_recipe(Path("r.yaml")), Workspace()).overview("words")
    assert "for torchvision:resnet50 (published: https://download.pytorch.org/models/resnet50-" in words["problem"]
