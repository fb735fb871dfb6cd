"""What lies where in a run directory, without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bowstore import runs
from bowstore.errors import CorruptError, MissingError, UsageError
from bowstore.models.weights import weights_sha256


def make_run(folder: Path, name: str, *, task: str = "task: words", finished_at: int | None = None) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"name: {name}\n{task}\n")
    if finished_at is not None:
        (run / "backbone.safetensors").touch()
        os.utime(run / "backbone.safetensors", (finished_at, finished_at))
    return run


def test_a_folder_of_runs(tmp_path: Path) -> None:
    assert (runs.below(tmp_path / "none"), runs.finished_below(tmp_path / "none")) == ([], [])
    late, begun, early = (make_run(tmp_path, n, finished_at=t) for n, t in (("a", 9), ("b", None), ("c", 5)))
    make_run(tmp_path, ".hidden", finished_at=7)
    (tmp_path / "notes").mkdir()
    assert runs.below(tmp_path) == [late, begun, early]
    assert runs.finished_below(tmp_path) == [late, early]
    assert [runs.is_run(path) for path in (late, begun, tmp_path / "notes", tmp_path)] == [True, True, False, False]
    assert (runs.is_finished(late), runs.is_finished(begun)) == (True, False)


def test_the_task_of_a_configuration_of_any_version(tmp_path: Path) -> None:
    for number, (task, name) in enumerate(
        (("task: words", "words"), ("task: {name: rotation, blocks: 2}", "rotation"), ("task: {form: count}", None),
         ("seed: 1", None))
    ):  # fmt: skip
        assert runs.task_name(runs.read_config(make_run(tmp_path, str(number), task=task))) == name
    with pytest.raises(MissingError, match=r"none is not a run directory \(it has no config\.yaml\)"):
        runs.read_config(tmp_path / "none")
    with pytest.raises(UsageError, match=r"config\.yaml is not a YAML file"):
        runs.read_config(make_run(tmp_path, "bad", task="task: ["))


def test_checkpoints_and_what_was_set_aside(tmp_path: Path) -> None:
    assert runs.checkpoints(tmp_path) == runs.set_aside(tmp_path) == []
    assert runs.checkpoint_path(tmp_path, 12) == tmp_path / "checkpoints/step-000000012.pt"
    (tmp_path / "checkpoints").mkdir()
    names = ("step-5.pt", "step-000000012.pt", "step-000000007.pt.damaged", "step-000000007.pt.damaged-2", "notes.pt")
    for name in names:
        (tmp_path / "checkpoints" / name).touch()
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000000012.pt", "step-5.pt"]
    assert {path.name for path in runs.set_aside(tmp_path)} == set(names[2:4])


def test_the_network_has_one_digest_with_and_without_torch(tmp_path: Path) -> None:
    weights = {
        "b.weight": torch.randn(3, 2), "a": torch.tensor(1.5, dtype=torch.bfloat16), "n": torch.arange(4),
        "empty": torch.zeros(0, 2, dtype=torch.float16), "mask": torch.tensor([True, False]),
    }  # fmt: skip
    path = tmp_path / "backbone.safetensors"
    assert runs.weights_sha256(tmp_path) is None
    save_file(weights, path, {"name": "x"})
    assert runs.weights_sha256(tmp_path) == weights_sha256(weights)
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(1, 1))
    assert runs.weights_sha256(tmp_path) is None, "who loads it says what is wrong"


def test_where_results_go(tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    file.touch()
    assert runs.results_folder(tmp_path) == tmp_path
    assert runs.results_folder(file, random_init=True) == tmp_path / "teacher" / "random"
    assert runs.results_folder(file, random_init=True, size=96) == tmp_path / "teacher" / "random" / "96px"
    assert runs.results_folder(tmp_path / "timm-x.tag-seed-0") == tmp_path / "timm-x.tag-seed-0", "it is none yet"
    assert runs.result_path(tmp_path, "voc07-svm/fair") == tmp_path / "eval" / "voc07-svm-fair.json"
    assert runs.result_paths(tmp_path) == []
    (tmp_path / "eval").mkdir()
    for name in ("b.json", "a.json", ".a.json", "a.txt"):
        (tmp_path / "eval" / name).touch()
    assert [path.name for path in runs.result_paths(tmp_path)] == ["a.json", "b.json"]


def test_how_a_run_came_about(tmp_path: Path) -> None:
    """The words of a second round are told down to the pretext task that all began with."""

    def lineage(name: str, teacher: dict[str, Any] | None, task: str = "words") -> dict[str, Any]:
        targets = {"store": "w.zarr", "layer": "block3", "num_words": 256, "teacher": teacher} if teacher else {}
        runs.write_lineage(tmp_path, name=name, task=task, inputs={"shards": "0"}, targets=targets)
        found = runs.read_lineage(tmp_path)
        assert found == {"name": name, "task": task, "inputs": {"shards": "0"}, "targets": targets}
        return found

    rotnet = lineage("rotnet", None, "rotation")
    x1 = lineage("bownet", {"name": "rotnet", "weights_file": "rotnet", "lineage": rotnet})
    x2 = lineage("x2", {"name": "bownet", "weights_file": "bownet", "lineage": x1})
    words = "256 words of block3"
    assert runs.descent(x2) == ("rotation", "rotnet", words, "bownet", words, "x2")
    for teacher, told in (
        ({"name": "rotnet", "weights_file": "rotnet", "student": None}, "rotnet"),  # as old stores say
        ({"name": "timm:a", "weights_file": None, "weights_layout": "random, seed 0"}, "timm:a (random, seed 0)"),
        ({"name": "resnet50", "weights_file": "moco.pth", "lineage": None}, "resnet50 (moco.pth)"),
        ({"name": "t"}, "t"),
        ("a plugin's", "a plugin's"),
        (None, "unknown"),
    ):
        layer = {"layer": "block3", "num_words": 256, "teacher": teacher}
        assert runs.descent_of_words(layer) == (told, words)
        assert runs.descent({"name": "run", "task": "words", "targets": layer}) == (told, words, "run")
    assert runs.descent({"name": "run", "task": "mine"}) == ("mine", "run")


def test_lineage_that_is_not_there_or_not_readable(tmp_path: Path) -> None:
    assert runs.read_lineage(tmp_path) is None
    for text in ("{", "[]", '{"targets": 3}'):
        (tmp_path / "lineage.json").write_text(text)
        with pytest.raises(CorruptError, match=r"lineage\.json (is not valid JSON|does not say what the run was made)"):
            runs.read_lineage(tmp_path)


def test_the_run_that_a_network_belongs_to(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    for path in (run, run / "backbone.safetensors", run / "checkpoints" / "step-000000005.pt"):
        assert runs.run_of(path) == run
    assert runs.run_of(tmp_path / "teacher.safetensors") == tmp_path / "teacher.safetensors"


def test_no_other_module_spells_the_layout() -> None:
    names = {getattr(runs, name) for name in dir(runs) if name.endswith(("_FILE", "_FOLDER"))}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "backbone.safetensors"} <= names
    joined = re.compile(rf"""(?:/ f?|glob\(f?)"[^"]*\b(?:{"|".join(map(re.escape, names))})["/]""")
    root = Path(runs.__file__).parents[1]
    for path in [*(root / "bowstore").rglob("*.py"), *(root / "tools").glob("*.py")]:
        found = joined.search(path.read_text())
        assert not found or path.name == "runs.py", f"{path} spells {found[0]}"


def test_it_loads_nothing_heavy() -> None:
    code = "import sys, bowstore.runs; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
