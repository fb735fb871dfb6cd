"""Protocols that measure a network while it is trained: when, with what figures, and that training does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.config import Workspace, load_workspace, validate
from bowstore.data.index import build_index
from bowstore.errors import BowstoreError, DataError
from bowstore.evaluate import neighbours
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.probe import probe_of
from bowstore.evaluate.protocols import PROTOCOLS
from bowstore.evaluate.runner import evaluate
from bowstore.files import read_json
from bowstore.models.saved import newest_checkpoint
from bowstore.runs import checkpoint_path, checkpoints, read_metrics
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.train.probe import Probe, Probed

Make = Callable[..., TrainConfig]
KNN = "knn/k9-t0.1/top1"
LINEAR = "linear/bownet-cifar-40-images/top1"


def asked(test: Path) -> dict[str, Any]:
    return {"every_epochs": 1, "eval": [
        {"knn": {"k": 9, "test": str(test)}},
        {"linear": {"images": 40, "test": str(test)}},
    ]}  # fmt: skip


def train(config: TrainConfig, runs: Path) -> list[dict[str, Any]]:
    loop.train(config, runs, probe=probe_of(config, Workspace()))
    return read_metrics(runs / config.name)


def without_figures(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if "/" not in name
            and name not in ("images_per_second", "probe_seconds")}  # fmt: skip


def test_training_does_not_notice_and_the_figures_are_those_of_eval(
    make_config: Make, make_shard_set: ShardMaker, tmp_path: Path
) -> None:
    """Of a network so wide that in training it lies in memory otherwise than frozen."""
    test = make_shard_set(24, folder="test", first=72).root
    how: dict[str, Any] = {"model": {"arch": "wrn-10-4"}, "optim": {"epochs": 2, "milestones": []}}
    runtime = {"checkpoint_every_steps": 4}
    plain = make_config("supervised", runtime=runtime, **how)
    probed = make_config("supervised", runtime={**runtime, "probe": asked(test)}, **how)
    bare, lines = train(plain, tmp_path / "plain"), train(probed, tmp_path / "probed")

    assert [without_figures(line) for line in lines] == [without_figures(line) for line in bare]
    one, two = (newest_checkpoint(tmp_path / name / plain.name) for name in ("plain", "probed"))
    assert one is not None
    assert two is not None
    for part in ("backbone", "head"):
        assert all(torch.equal(two[part][name], value) for name, value in one[part].items())
    momenta = [state["optimizer"]["state"] for state in (one, two)]
    for name, kept in momenta[0].items():
        assert torch.equal(momenta[1][name]["momentum_buffer"], kept["momentum_buffer"])

    found = {line["step"]: line for line in lines if KNN in line}
    assert found.keys() == {4, 8}
    run = tmp_path / "probed" / probed.name
    for step, line in found.items():
        assert line["probe_seconds"] > 0
        for item, name in zip(asked(test)["eval"], (KNN, LINEAR), strict=True):
            ((kind, settings),) = item.items()
            result = evaluate(
                PROTOCOLS.get(kind),
                validate(PROTOCOLS.get(kind).settings, {**settings, "train": str(probed.shards)}, "test"),
                EvalConfig(run=str(checkpoint_path(run, step)), compile=False),
                Workspace(),
            )
            assert f"{result.protocol}/top1" == name
            assert result.metrics["top1"] == line[name]
    recorded = read_json(run / "environment.json")["probe"]
    assert recorded[KNN.removesuffix("/top1")]["inputs"].keys() == {"train", "test"}
    assert "probe" not in read_json(tmp_path / "plain" / plain.name / "environment.json")


class Counted:
    """A probe that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, device: torch.device) -> Probe:
        return Probe(self.measure, {})

    def measure(self, weights: Any) -> Probed:
        self.count += 1
        return Probed({"sum/top1": float(sum(value.double().sum() for value in weights.values()))}, f"no. {self.count}")


def test_an_interrupted_run_measures_what_its_log_lacks(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epochs of 4 steps: lines 4, 8 and 12; the run dies in step 11, behind its checkpoint of step 10."""
    config = make_config(runtime={"probe": {"every_epochs": 1}, "checkpoint_every_steps": 5, "log_every_steps": 4})
    whole, first, second = Counted(), Counted(), Counted()
    loop.train(config, tmp_path / "whole", probe=whole)
    assert ", no. 3" in capsys.readouterr().err  # in the line of progress
    original, steps = loop.train_step, iter(range(1, 100))

    def step(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 11:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with patch.object(loop, "train_step", step), pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "cut", probe=first)
    loop.train(config, tmp_path / "cut", probe=second)
    assert (whole.count, first.count, second.count) == (3, 2, 1)
    one, two = (
        [(line["step"], line.get("sum/top1")) for line in read_metrics(tmp_path / name / config.name)]
        for name in ("whole", "cut")
    )
    assert one == two
    assert [step for step, value in one if value is not None] == [4, 8, 12]
    assert loop.train(config, tmp_path / "cut", probe=second).last == {}  # finished
    assert second.count == 1


def test_every_so_many_epochs_and_at_the_end(make_config: Make, tmp_path: Path) -> None:
    config = make_config("supervised", runtime={"probe": {"every_epochs": 2}, "log_every_steps": 1})
    loop.train(config, tmp_path, probe=Counted())
    assert [line["step"] for line in read_metrics(tmp_path / config.name) if "sum/top1" in line] == [8, 12]


def test_a_run_may_be_gone_on_with_under_another_probe(make_config: Make, tmp_path: Path) -> None:
    def config(epochs: int, **probe: Any) -> TrainConfig:
        return make_config("supervised", optim={"epochs": epochs, "milestones": []}, runtime=probe)

    loop.train(config(1), tmp_path)
    other = Counted()
    loop.train(config(2, probe={"every_epochs": 1}), tmp_path, resume=True, probe=other)  # for its epochs alone
    assert other.count == 1


def test_a_figure_that_cannot_be_had_costs_the_run_nothing_else(
    make_config: Make, make_shard_set: ShardMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("supervised", runtime={"probe": asked(make_shard_set(24, folder="test", first=72).root)},
                         optim={"epochs": 1, "milestones": []})  # fmt: skip
    with patch.object(neighbours, "knn_accuracy", side_effect=DataError("a broken image")):
        lines = train(config, tmp_path / "runs")
    assert KNN not in lines[-1]
    assert LINEAR in lines[-1]
    said = "warning: runtime.probe.eval: no figure of knn/k9-t0.1 this time: a broken image"
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("knm", r"runtime.probe.eval: no protocol 'knm'; did you mean 'knn'\? there are linear, "),
        (3, r"runtime.probe.eval: 3 is no protocol; write its name, or \{NAME: \{SETTING: VALUE\}\}$"),
        ([], "runtime.probe.eval names no protocol; write one, as in knn, or leave runtime.probe out$"),
        ({"knn": {"kay": 3}}, "runtime.probe.eval, knn: unknown configuration key 'kay'"),
        ("finetune", "runtime.probe.eval: protocol finetune trains; take one that looks at features, as knn and li"),
        ({"knn": {"test": "test"}}, r"runtime.probe: k 200 is more than the 72 train images of .*; give --k 72 or "
         r"fewer \(options of `bowstore eval knn` are written as runtime.probe.eval: \{knn: \{OPTION: VALUE\}\}\)$"),
        ({"knn": {"test": "test", "images": 3}}, "runtime.probe: images 3 are fewer than the 4 classes; "),
        ({"knn": {"k": 9, "test": "bare"}}, "runtime.probe: test: 8 of 8 images have no label"),
        ({"knn": {"k": 9}}, "runtime.probe: no test shards: neither .*val nor .*test exists; give --test"),
        ({"knn": {"k": 9, "test": "nowhere"}}, "runtime.probe: .*nowhere"),
        ({"linear": {"test": "test", "layers": ["block9"]}}, "runtime.probe: .* has no layer 'block9'"),
        ([{"knn": {"k": 9, "test": "test"}}, {"knn": {"k": 9, "test": "test"}}],
         "runtime.probe.eval: knn/k9-t0.1 is asked for twice; leave one of them out$"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_anything_is_trained(
    make_config: Make, make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: Any,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_shard_set(24, folder="test" if "test" in str(probe) else "elsewhere", first=72)
    if "bare" in str(probe):
        samples = [(f"x{n}", encode_jpeg(textured_image(n, 16, 16)), None) for n in range(8)]
        write_tar(tmp_path / "bare" / "train-000000.tar", samples)
        build_index(tmp_path / "bare")
    config = make_config("supervised", runtime={"probe": {"eval": probe}})
    plugin = Path(__file__).parents[1] / "extending" / "finetune.py"
    (tmp_path / "bowstore.yaml").write_text(f"plugins: ['{plugin}']\n")
    workspace = load_workspace()
    with pytest.raises(BowstoreError, match=f"^{message}"):
        loop.train(config, tmp_path / "runs", probe=probe_of(config, workspace))
    assert not checkpoints(tmp_path / "runs" / config.name)
    assert not (tmp_path / "runs" / config.name / "config.yaml").exists()
