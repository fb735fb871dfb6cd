from pathlib import Path

import pytest
import yaml

from bowstore.config import (
    TrainConfig,
    apply_overrides,
    bundled_configs,
    dump,
    find_config,
    load_train_config,
    load_workspace,
    load_yaml,
    validate,
)
from bowstore.errors import MissingError, UsageError
from bowstore.models.registry import build_backbone

BUNDLED = sorted(bundled_configs().glob("*.yaml"))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_every_bundled_configuration_is_valid_and_says_what_it_is(path: Path) -> None:
    config = load_train_config(path)
    assert config.name == path.stem
    if config.student:
        assert (path.parent / config.student).is_file()
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Command:" in header
    assert "Expected:" in header
    assert validate(TrainConfig, yaml.safe_load(yaml.safe_dump(dump(config))), "again") == config
    if config.model.arch.startswith("wrn-10"):
        build_backbone(config.model)


def test_there_is_a_configuration_for_each_data_set() -> None:
    names = {path.stem for path in BUNDLED}
    assert names >= {
        "demo_rotnet", "demo_bownet", "cifar10_rotnet", "cifar10_bownet", "imagenette_rotnet", "imagenette_bownet",
        "imagenet_rotnet", "imagenet_conv4", "imagenet_conv5",
    }  # fmt: skip


def test_imagenet_is_the_papers_recipe() -> None:
    config = load_train_config(find_config(Path("imagenet_conv4")))
    assert (config.model.arch, config.words.form, config.optim.batch) == ("resnet50", "binary", 256)
    assert (config.optim.epochs, config.optim.milestones, config.optim.lr) == (140, (60, 100, 130), 0.03)
    assert config.optim.weight_decay == 1e-4
    assert config.view.cutmix


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("view.flipp=true", r"unknown configuration key 'view\.flipp'; did you mean 'flip'\?"),
        ("optimm.lr=1", r"unknown configuration key 'optimm'; did you mean 'optim'\?"),
        ("optim.lr=-1", r"optim\.lr: Input should be greater than 0 \(got -1\)"),
        ("optim.lr=fast", r"optim\.lr: .*number.*\(got 'fast'\)"),
        ("view.area=[0.9,0.1]", r"area 0\.9\.\.0\.1 must satisfy 0 < low <= high <= 1"),
        ("task=jigsaw", r"task: Input should be 'rotation' or 'words' \(got 'jigsaw'\)"),
        ("name=a/b", r"name: .*pattern.*\(got 'a/b'\)"),
        ("view.cutmix=true", r"view\.cutmix must be false for task rotation"),
        ("optim.milestones=[3,2]", r"milestones \(3, 2\) must increase"),
        ("seed", r"--set 'seed' is not of the form key=value"),
        ("optim.lr.x=1", r"--set 'optim\.lr\.x=1': 'lr' is a value, not a group"),
        ("seed=[", r"--set 'seed=\[': '\[' is not a YAML value"),
    ],
)
def test_bad_values_are_one_line_with_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_train_config(find_config(Path("cifar10_rotnet.yaml")), [override])
    assert "\n" not in str(error.value)


def test_overrides_are_read_as_yaml() -> None:
    values = apply_overrides({"a": {"b": 1}}, ["a.b=2.5", "a.c=[1, 2]", "d=null", "e=text"])
    assert values == {"a": {"b": 2.5, "c": [1, 2]}, "d": None, "e": "text"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no configuration file .*those that come with bowstore: cifar10_bownet"):
        load_train_config(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UsageError, match="holds a list, not a mapping"):
        load_yaml(tmp_path / "list.yaml")
    (tmp_path / "evil.yaml").write_text("a: !!python/object/apply:os.system ['touch ran']")
    with pytest.raises(UsageError, match="is not a YAML file"):
        load_yaml(tmp_path / "evil.yaml")
    (tmp_path / "bowstore.yaml").write_text("shard: x")
    with pytest.raises(UsageError, match=r"unknown configuration key 'shard'; did you mean 'shards'\?"):
        load_workspace(tmp_path)
