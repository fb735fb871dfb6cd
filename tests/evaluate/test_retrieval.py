"""Retrieval: rankings by hand and by scikit-learn, its ids, and a whole evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shard_sets import ShardMaker
from sklearn.metrics import average_precision_score

from bowstore.config import ViewConfig, Workspace, dump, validate
from bowstore.errors import UsageError
from bowstore.evaluate import neighbours, retrieval
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocols.retrieval import KIND, describe
from bowstore.evaluate.results import Result, read_result
from bowstore.evaluate.retrieval import rankings
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.train_test import SampleSettings
from bowstore.models.saved import network_of, save_backbone

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]


def ranked(train: Labelled, test: Labelled) -> tuple[list[int], list[float]]:
    first_M, precision_M = rankings(*train, *test, device=torch.device("cpu"))
    return first_M.tolist(), precision_M.tolist()


def clustered(images: int, seed: int) -> Labelled:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 5
    centres = np.random.default_rng(9).standard_normal((5, 12))
    return (0.7 * centres[labels] + rng.standard_normal((images, 12))).astype(np.float32), labels


def test_a_ranking_by_hand() -> None:
    # Cosines with (1, 0): 0.6, 1, 0.8, -1, 0. Ranked: rows 1, 2, 0, 4, 3.
    train = np.array([[3, 4], [9, 0], [8, -6], [-1, 0], [0, 5]], np.float32), np.array([1, 0, 1, 0, 1])
    query = np.array([[2, 0], [2, 0]], np.float32), np.array([0, 1])
    first, precision = ranked(train, query)
    assert first == [0, 1]
    assert precision == pytest.approx([(1 / 1 + 2 / 5) / 2, (1 / 2 + 2 / 3 + 3 / 4) / 3])


def test_of_equal_cosines_the_lower_rows_come_first() -> None:
    train = np.ones((6, 2), np.float32), np.array([2, 0, 1, 0, 2, 1])
    query = np.ones((3, 2), np.float32), np.array([0, 1, 2])
    first, precision = ranked(train, query)
    assert first == [1, 2, 0]
    assert precision == pytest.approx([(1 / 2 + 2 / 4) / 2, (1 / 3 + 2 / 6) / 2, (1 / 1 + 2 / 5) / 2])


@pytest.mark.parametrize(("cells", "block"), [(1 << 24, 1 << 14), (1000, 37), (1, 1)])
def test_as_scikit_learn_gives_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, cells: int, block: int) -> None:
    monkeypatch.setattr(retrieval, "_CELLS", cells)
    monkeypatch.setattr(retrieval, "TRAIN_BLOCK", block)
    train, test = clustered(200, 0), clustered(30, 1)
    X, Y = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (train[0], test[0]))
    right = test[1][:, None] == train[1]
    expected = [average_precision_score(right[n], Y[n] @ X.T) for n in range(30)]
    first, precision = ranked(train, test)
    assert precision == pytest.approx(expected)
    assert 0.3 < np.mean(precision) < 0.9
    rows = neighbours.nearest(train[0], test[0], 5, torch.device("cpu"))[1]
    assert (np.array(first) < 5).tolist() == [bool(right[n, rows[n]].any()) for n in range(30)]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_id_says_whether_the_test_images_were_held_out(held_out: bool) -> None:
    protocol = describe(SampleSettings(held_out=held_out))
    assert protocol.id == "retrieval/cosine" + "-held-out" * held_out
    assert (protocol.version, protocol.headline) == (1, "map")


def retrieve(tmp_path: Path, **settings: object) -> Result:
    view = ViewConfig(size=16, resize=None)
    of_run = {"name": "r", "task": "words", "view": dump(view), "model": {"arch": "wrn-10-1"}}
    network, path = network_of(of_run, "test"), tmp_path / "run.safetensors"
    save_backbone(path, network.fresh(), network)
    asked = validate(SampleSettings, settings, "eval retrieval")
    return evaluate(KIND, asked, EvalConfig(run=str(path), batch=16), Workspace())


def test_from_shards_to_result_file(tmp_path: Path, make_shard_set: ShardMaker) -> None:
    train, test = make_shard_set(40, folder="train").root, make_shard_set(12, folder="test", first=40).root
    result = retrieve(tmp_path, train=train, test=test)
    assert read_result(tmp_path / "run" / "eval" / "retrieval-cosine.json") == result
    assert list(result.metrics) == ["recall@1", "recall@5", "recall@10", "map"]
    one, five, ten, precision = result.metrics.values()
    assert 0.25 < one <= five <= ten <= 1
    assert 0.25 < precision < 1
    few = make_shard_set(9, folder="few").root
    with pytest.raises(UsageError, match=r"^recall at 10 needs as many train images, and .*few gives 9; name shards"):
        retrieve(tmp_path, train=few, test=test)
