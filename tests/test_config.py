import os
from pathlib import Path

import pytest

from bowstore.config import Workspace, bundled_configs, dump, find_config, load_workspace, validate
from bowstore.errors import MissingError, UsageError
from bowstore.overrides import apply_overrides
from bowstore.train.config import TrainConfig, load_train_config
from bowstore.yaml_file import read_value, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("view.flipp=true", r"unknown configuration key 'view\.flipp'; did you mean 'flip'\?"),
        ("optimm.lr=1", r"unknown configuration key 'optimm'; did you mean 'optim'\?"),
        ("optim.lr=-1", r"optim\.lr: Input should be greater than 0 \(got -1\)"),
        ("optim.lr=fast", r"optim\.lr: .*number.*\(got 'fast'\)"),
        ("view.area=[0.9,0.1]", r"area 0\.9\.\.0\.1 must satisfy 0 < low <= high <= 1"),
        ("task=jigsaw", r"no task 'jigsaw'; there are rotation, location, words, clusters, supervised"),
        ("name=a/b", r"name: .*pattern.*\(got 'a/b'\); use letters, digits and \. _ - .*; --name gives another name"),
        (
            "student=x",
            r"--set student: a configuration no longer says what is trained next; .*`bowstore init",
        ),
        ('name="a\\0"', r"name: .*pattern"),
        ("words.layer=a", r"words\.layer: the task is rotation, and this sets task words; leave it out"),
        ("task.block=2", r"unknown configuration key 'task\.block'; did you mean 'blocks'\?"),
        ("rotation.blocks=0", r"task\.blocks: Input should be greater than or equal to 1 \(got 0\)"),
        ("view.cutmix=true", r"view\.cutmix must be false for task rotation"),
        ("optim.milestones=[3,2]", r"milestones \(3, 2\) must increase"),
        ("seed", r"--set 'seed' is not of the form key=value"),
        ("optim.lr.x=1", r"--set 'optim\.lr\.x=1': 'lr' is a value, not a group"),
        ("seed=[", r"--set 'seed=\[': '\[' is not a YAML value: .*line 1, column 2"),
        ("seed=", r"--set 'seed=' has no value \(is a shell variable not set\?\); for null write seed=null"),
        ("optim={lr: 1}", r"set the keys of a group one by one, as in optim\.KEY=VALUE"),
        ("seed=4294967296", r"seed: Input should be less than or equal to 4294967295 \(got 4294967296\)"),
        ("seed=340282366920938463463374607431768211456", r"seed: .*\(got 340282366920938463463374607431768211456\)"),
        ("seed=-1", r"seed: Input should be greater than or equal to 0 \(got -1\)"),
        ("optim.epochs=2147483648", r"optim\.epochs: Input should be less than or equal to 2147483647"),
        ("optim.batch=2147483644", r"optim\.batch: Input should be less than or equal to 1048576"),
        ("runtime.threads=1000000", r"runtime\.threads: Input should be less than or equal to 1024"),
        ("model.strides=[1, 0, 1]", r"model\.strides\.1: Input should be greater than or equal to 1 \(got 0\)"),
        ("optim.milestones=[-1]", r"optim\.milestones\.0: Input should be greater than or equal to 1 \(got -1\)"),
        ("optim.epochs=true", r"optim\.epochs: .*integer \(got True\); write a whole number in decimal digits"),
        ("optim.epochs=5.0", r"optim\.epochs: .*integer \(got 5\.0\)"),
        ("optim.epochs=010", r"optim\.epochs: .*integer \(got '010'\); .*without a leading zero"),
        ("optim.epochs=0x10", r"optim\.epochs: .*integer \(got '0x10'\)"),
        ("optim.epochs=1:30", r"optim\.epochs: .*integer \(got '1:30'\)"),
        ("optim.epochs=1_000", r"optim\.epochs: .*integer \(got '1_000'\)"),
        ("optim.epochs='5'", r"optim\.epochs: .*integer \(got '5'\)"),
        ("view.grey=on", r"view\.grey: Input should be a valid number \(got 'on'\); write a number such as 0\.1"),
        ("view.grey=true", r"view\.grey: Input should be a valid number \(got True\)"),
        ("view.mean=[0.5, 0.5, true]", r"view\.mean\.2: Input should be a valid number \(got True\)"),
        ("optim.lr=.inf", r"optim\.lr: Input should be a valid number \(got '\.inf'\)"),
        ("optim.lr=.nan", r"optim\.lr: Input should be a valid number \(got '\.nan'\)"),
        ("optim.lr=1e39", r"optim\.lr: Input should be less than or equal to 30{38} \(got 1e\+39\)"),
        ("view.mean=[0, -1e39, 0]", r"view\.mean\.1: Input should be greater than or equal to -30{38} "),
        ("optim.lr=1e999", r"optim\.lr: Input should be a finite number \(got inf\)"),
        ("view.mean=[1e999, 0, 0]", r"view\.mean\.0: Input should be a finite number \(got inf\)"),
        ("view.flip=yes", r"view\.flip: Input should be a valid boolean \(got 'yes'\); write true or false"),
        ("view.flip=1", r"view\.flip: Input should be a valid boolean \(got 1\); write true or false"),
        (
            "name=2012",
            r"name: Input should be a valid string \(got 2012\); put text that looks like a number.* in quotes",
        ),
        ("name=null", r"name: Input should be a valid string \(got None\)"),
        ("shards=2012", r"shards: .*path.*\(got 2012\); put a path that looks like a number.* in quotes"),
        ('shards=""', r"shards: the path is empty \(is a shell variable not set\?\)"),
        ("shards=~/images", r"shards: the path begins with ~, which only a shell expands"),
        ('shards="a\\0b"', r"shards: the path holds a NUL character"),
        ("optim.milestones=3", r"optim\.milestones: .*tuple \(got 3\); write a list, as in \[1, 2\]"),
        ("view=3", r"view: .*\(got 3\); write a group of keys and values"),
    ],
)
def test_bad_values_are_one_line_with_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_train_config(find_config(Path("cifar10_rotnet_small.yaml")), [override])
    assert "\n" not in str(error.value)


def test_numbers_in_any_decimal_form_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: words\noptim: {lr: 1e-3, weight_decay: 5E-4, factor: 1}\nview: {grey: 1, hue: .1, mean: [0, 1, 2]}"
    )
    config = load_train_config(path, ["optim.momentum=0", "words.gamma=1e1"])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.factor) == (0.001, 0.0005, 1.0)
    assert (config.view.grey, config.view.hue, config.view.mean) == (1.0, 0.1, (0.0, 1.0, 2.0))
    assert (config.optim.momentum, config.task.gamma) == (0.0, 10.0)
    assert config.name == "run"
    assert all(type(value) is float for value in (config.view.grey, *config.view.mean, config.optim.momentum))


def test_values_of_the_command_line_have_the_types_of_a_file() -> None:
    values = apply_overrides({"a": {"b": 1}}, ["a.b=2.5", "a.c=[1, 2]", "d=null", "e=text", 'f="3"'])
    assert values == {"a": {"b": 2.5, "c": [1, 2]}, "d": None, "e": "text", "f": "3"}
    assert apply_overrides({"a": None}, ["a.b=1"]) == {"a": {"b": 1}}, "null is a group of no keys yet"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("+3", 3), ("0", 0), ("~", None), ("FALSE", False),
        ("007", "007"), ("0x10", "0x10"), ("0o7", "0o7"), ("1:30", "1:30"), ("2020-01-31", "2020-01-31"), ("on", "on"),
        ("No", "No"), ("y", "y"), ("1_000", "1_000"), (".inf", ".inf"), (".", "."), ("-", "-"), ("1e", "1e"),
        ("a #b", "a #b"), ("a: b", "a: b"), ("*a", "*a"), ("&a b", "&a b"), ("!x", "!x"), ("<<", "<<"), ("@x", "@x"),
        ("%x", "%x"), ("|", "|"), ("- x", "- x"), ("'it''s'", "it's"), ('"\\ud83d\\ude00"', "\U0001f600"),
        ("[1, on, 1e2]", [1, "on", 100.0]), ("1" * 81, float("1" * 81)),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: object, tmp_path: Path) -> None:
    got = read_value(text)
    assert (got, type(got)) == (value, type(value))
    (tmp_path / "x.yaml").write_bytes(write_yaml({"key": value}))
    again = read_yaml(tmp_path / "x.yaml")["key"]
    assert (again, type(again)) == (value, type(value)), "what is written is read again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"key 'a' stands twice, first in line 1; remove one \(line 3, column 1\)"),
        ("x: {a: 1, 'a': 2}", r"key 'a' stands twice, first in line 1"),
        ("a: 1\n---\na: 2", r"but found another document \(line 2, column 1\)"),
        ("a: &a [1, *a]", r"an alias \(\*name\) stands for a value that it is part of \(line 1, column 4\)"),
        ("a: &a\n  b: {<<: *a}", r"an alias \(\*name\) stands for a value that it is part of"),
        ("a: " + "[" * 5000, r"values are nested more than 32 deep"),
        ("a: {<<: 3}", r"<< merges mappings, not 3"),
        ("a: !!python/object/apply:os.system ['touch ran']", r"tag .*os\.system is not read; leave it out"),
        ("a: !!bool on", r"tag .*bool is not read; leave it out, or put text in quotes"),
        ("a: !!binary aGk=", r"tag .*binary is not read"),
        ("[1, 2]: 3", r"a key is a list or a mapping; keys are names"),
        ('a: "\\ud83d"', r"'\\ud83d' holds half of a surrogate pair"),
        ("a:\t- b", r"'\\t' that cannot start any token|sequence entries are not allowed here"),
        ("- 1", r"holds \[1\], not a mapping of keys to values"),
        ("1e5", r"holds 100000\.0, not a mapping"),
    ],
)  # fmt: skip
def test_files_that_do_not_say_one_thing_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "x.yaml"))


def test_aliases_and_merges_are_read_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\nd: {<<: [{x: 5}, *a]}\non: 1")
    assert read_yaml(path) == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}, "d": {"x": 5, "y": 2}, "on": 1,
    }  # fmt: skip
    lines = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(["k0: &k0 [lol]", *lines]))
    with pytest.raises(UsageError, match="more than 10000 values"):
        read_yaml(path)


def test_encodings_of_files(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for content in (
        "name: caf\u00e9\r\n".encode(),
        b"\xef\xbb\xbfname: caf\xc3\xa9",
        "name: caf\u00e9".encode("utf-16"),
    ):
        path.write_bytes(content)
        assert read_yaml(path) == {"name": "caf\u00e9"}
    for content, problem in ((b"name: caf\xe9", "0xe9 at position 9 is not UTF-8"), (b"a: \0b", "0x00 .* control")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"is not a YAML file: character {problem}"):
            read_yaml(path)
    path.write_bytes(b"# nothing")
    assert read_yaml(path) == {}


def test_what_is_no_file_of_a_configurations_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, not a configuration"):
        read_yaml(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a pipe or a device, not a configuration"):
        read_yaml(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 18) + b"\n")
    with pytest.raises(UsageError, match="has 262145 bytes, and a configuration at most 262144"):
        read_yaml(tmp_path / "large.yaml")
    (tmp_path / "bowstore.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"no file .*bowstore\.yaml"):
        load_workspace(tmp_path)


def test_a_bundled_configuration_is_taken_by_its_bare_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = "cifar10_rotnet_small"
    bundled = bundled_configs() / f"{own}.yaml"
    for name in (f"{own}.yaml", own, f"configs/{own}.yaml", f"configs/{own}"):
        assert load_train_config(Path(name)).name == own
        assert capsys.readouterr().err == f"configuration {name}: {bundled}, which comes with bowstore\n"
    for name, near in (
        *((name, own) for name in (f"/nowhere/{own}.yaml", f"nowhere/{own}", f"../configs/{own}.yaml")),
        ("cifar10_bownet", "cifar10_bownet_small"),
        ("imagenet_kone4.yaml", "imagenet_conv4"),
    ):
        with pytest.raises(MissingError, match=rf"no configuration file {name}; did you mean {near}, which comes with"):
            load_train_config(Path(name))
    with pytest.raises(MissingError, match=r"no configuration file x; those that come with bowstore go by .*, cifar10"):
        load_train_config(Path("x"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"{own}.yaml").write_text("task: words")
    assert load_train_config(Path(own)).task.name == "words", "the workspace's own goes first"
    assert capsys.readouterr().err == f"configuration {own}: configs/{own}.yaml\n"
    assert load_train_config(Path(f"configs/{own}.yaml")).task.name == "words"
    assert capsys.readouterr().err == ""
    (tmp_path / own).symlink_to("nowhere")
    with pytest.raises(MissingError, match=f"no configuration file {own};"):
        load_train_config(Path(own))


def test_a_configuration_is_based_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("name: b\ntask: {name: words, form: binary, gamma: 2}\noptim: {lr: 0.5, batch: 8}")
    Path("x.yaml").write_text("base: base.yaml\ntask: {gamma: 3}\noptim: {lr: 0.25}\nseed: 7")
    config = load_train_config(Path("x.yaml"), ["optim.momentum=0.5"])
    assert (config.name, config.seed) == ("x", 7), "a name is its file's"
    assert (config.task.form, config.task.gamma) == ("binary", 3.0)
    assert (config.optim.lr, config.optim.batch, config.optim.momentum) == (0.25, 8, 0.5)
    Path("y.yaml").write_text("base: x.yaml\ntask: {name: supervised}\nview: {cutmix: false}")
    config = load_train_config(Path("y.yaml"))
    assert config.task.model_dump() == {"name": "supervised", "head": "linear", "gamma": 10.0}, "of another task"
    assert (config.optim.lr, config.optim.batch, config.view.cutmix) == (0.25, 8, False), "over two files"
    Path("z.yaml").write_text("base: cifar10_bownet_small\noptim: {epochs: 1}")
    bundled = load_train_config(find_config(Path("cifar10_bownet_small")))
    changed = {"name": "z", "optim": bundled.optim.model_copy(update={"epochs": 1})}
    assert load_train_config(Path("z.yaml")) == bundled.model_copy(update=changed), "one that comes with bowstore"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 3", r"x\.yaml: base: write the name of a configuration \(got 3\)"),
        ("base: ~/a.yaml", r"x\.yaml: base: write the name of a configuration \(got '~/a\.yaml'\)"),
        ("base: nobody.yaml", r"x\.yaml: base: no configuration file nobody\.yaml; those that come with bowstore"),
        (
            "base: cifar10_bownet",
            r"x\.yaml: base: no configuration file cifar10_bownet; did you mean cifar10_bownet_sm",
        ),
        ("base: x.yaml", r"x\.yaml: base: x\.yaml is based on this file itself; take one of the two out"),
        ("base: y.yaml", r"x\.yaml: base: y\.yaml is based on this file itself; take one of the two out"),
        ("base: z.yaml\ntask: words", r"x\.yaml: unknown configuration key 'optimm'; did you mean 'optim'\?"),
    ],
)
def test_a_base_that_cannot_be_used(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("y.yaml").write_text("base: x.yaml")
    Path("z.yaml").write_text("optimm: {lr: 1}")
    Path("x.yaml").write_text(text)
    with pytest.raises((UsageError, MissingError), match=message) as error:
        load_train_config(Path("x.yaml"))
    assert "\n" not in str(error.value)


def test_flags_are_values_and_each_key_is_set_once(tmp_path: Path) -> None:
    path = find_config(Path("cifar10_bownet_small.yaml"))
    odd = tmp_path / "\U0001f600 #x: [null, 'a"
    config = load_train_config(path, ["seed=1"], {"name": "1e5", "shards": odd, "words.store": odd})
    assert (config.name, config.shards, config.task.store, config.seed) == ("1e5", (odd,), (odd,), 1)
    (tmp_path / "again.yaml").write_bytes(write_yaml(dump(config)))
    assert validate(TrainConfig, read_yaml(tmp_path / "again.yaml"), "again") == config
    for overrides, flags, message in (
        (["seed=1", "seed=2"], {}, r"--set 'seed=2' and --set 'seed=1' set the same key; give one of them"),
        (["seed=1"], {"seed": 2}, r"--seed 2 and --set 'seed=1' set the same key"),
        (["words.store=a"], {"words.store": odd}, r"--store .* and --set 'words\.store=a' set the same key"),
        (["optim=null", "optim.lr=1"], {}, r"--set 'optim\.lr=1' and --set 'optim=null' set the same key"),
    ):
        with pytest.raises(UsageError, match=message):
            load_train_config(path, overrides, flags)


def test_workspace_of_text_alone(tmp_path: Path) -> None:
    (tmp_path / "bowstore.yaml").write_text("shard: x")
    with pytest.raises(UsageError, match=r"unknown configuration key 'shard'; did you mean 'shards'\?"):
        load_workspace(tmp_path)
    (tmp_path / "bowstore.yaml").write_text("runs: 2020-01-01\nstore: 010\nshards: 'null'")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bowstore.yaml").write_text("teacher: ''")
    with pytest.raises(UsageError, match=r"teacher: the text is empty"):
        load_workspace(tmp_path / "other")
    expected = Workspace(runs=Path("2020-01-01"), store=Path("010"), shards=Path("null"))
    assert load_workspace(tmp_path) == expected
