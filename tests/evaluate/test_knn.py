"""The protocol knn: its ids, more neighbours than images, and a whole evaluation."""

from pathlib import Path

import pytest
from shard_sets import ShardMaker

from bowstore.config import ViewConfig, Workspace, dump, validate
from bowstore.errors import UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocols import PROTOCOLS
from bowstore.evaluate.protocols.knn import KIND, KnnSettings, describe
from bowstore.evaluate.results import Result, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.train_test import SampleSettings
from bowstore.models.saved import network_of, save_backbone


@pytest.mark.parametrize(
    ("settings", "protocol_id"),
    [
        ({}, "knn/k200-t0.1"),
        ({"k": 20, "temperature": 0.07}, "knn/k20-t0.07"),
        ({"temperature": 1}, "knn/k200-t1.0"),
        ({"temperature": 0.1000001}, "knn/k200-t0.1000001"),
        ({"held_out": True}, "knn/k200-t0.1-held-out"),
        ({"images": 500}, "knn/k200-t0.1-500-images"),
        ({"held_out": True, "images": 500}, "knn/k200-t0.1-held-out-500-images"),
    ],
)
def test_the_id_says_neighbours_and_temperature(settings: dict[str, object], protocol_id: str) -> None:
    protocol = describe(validate(KnnSettings, settings, "eval knn"))
    assert (protocol.id, protocol.version, protocol.headline) == (protocol_id, 1, "top1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k: Input should be greater than or equal to 1"),
        ({"temperature": 0.0}, "temperature: Input should be greater than or equal to 0.000001"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"held_out": True, "test": "val"}, "held_out tests on train images, test on val; leave one of them out"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(KnnSettings, settings, "eval knn")


def knn(tmp_path: Path, **settings: object) -> Result:
    view = ViewConfig(size=16, resize=None)
    of_run = {"name": "r", "task": "words", "view": dump(view), "model": {"arch": "wrn-10-1"}}
    network, path = network_of(of_run, "test"), tmp_path / "run.safetensors"
    save_backbone(path, network.fresh(), network)
    kind = validate(KnnSettings, settings, "eval knn")
    return evaluate(KIND, kind, EvalConfig(run=str(path), batch=16), Workspace())


def test_from_shards_to_result_file(tmp_path: Path, make_shard_set: ShardMaker) -> None:
    train, test = make_shard_set(60, folder="train").root, make_shard_set(20, folder="test", first=60).root
    result = knn(tmp_path, train=train, test=test, k=60)
    assert read_result(tmp_path / "run" / "eval" / "knn-k60-t0.1.json") == result
    assert result.protocol == "knn/k60-t0.1"
    assert result.metrics.keys() == {"top1"}  # of four classes
    assert 0.4 < result.metrics["top1"] <= 1
    assert result.settings["images"] == {"train": 60, "test": 20}
    assert result.settings["classes"] == 4
    fewer = knn(tmp_path, train=train, test=test, k=30, images=40)
    assert (fewer.protocol, fewer.settings["images"]) == ("knn/k30-t0.1-40-images", {"train": 40, "test": 20})
    assert knn(tmp_path, train=train, test=test, k=60, images=60).protocol == "knn/k60-t0.1"  # which are all
    for images, protocol_id in ((56, "knn/k30-t0.1-held-out"), (55, "knn/k30-t0.1-held-out-55-images")):
        held_out = KIND.ask("resolve", KnnSettings, KnnSettings(train=train, held_out=True, images=images), Workspace())
        assert describe(held_out.model_copy(update={"k": 30})).id == protocol_id  # of 60 images, 4 are held out
    with pytest.raises(UsageError, match=r"^k 41 is more than the 40 train images of .*train; give --k 40 or fewer$"):
        knn(tmp_path, train=train, test=test, k=41, images=40)
    with pytest.raises(UsageError, match=r"^k 61 is more than the 60 train images of .*train; give --k 60 or fewer$"):
        knn(tmp_path, train=train, test=test, k=61)
    with pytest.raises(UsageError, match=r"^k 200 is more than the 56 train images of .*train; give --k 56 or fewer$"):
        knn(tmp_path, train=train, held_out=True)


def test_every_protocol_of_some_images_says_so_in_its_id() -> None:
    some = [kind for kind in PROTOCOLS.values() if issubclass(kind.settings, SampleSettings)]
    assert {kind.name for kind in some} >= {"knn", "linear", "logreg", "retrieval"}
    for kind in some:
        protocol = kind.describe(kind.settings.model_validate({"images": 77}))
        assert protocol.id == f"{kind.describe(kind.settings()).id}-77-images"
        assert protocol.description.endswith("; of at most 77 images of each split")
