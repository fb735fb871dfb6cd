"""Logistic regression: optima of scikit-learn, the choice of C by hand, its ids, and a whole evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shard_sets import ShardMaker
from sklearn.linear_model import LogisticRegression

from bowstore.config import ViewConfig, Workspace, dump, validate
from bowstore.errors import DataError
from bowstore.evaluate import logreg
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.logreg import logistic_regression
from bowstore.evaluate.protocols.logreg import COSTS, KIND, describe
from bowstore.evaluate.results import Result, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.splits import a_tenth, open_splits
from bowstore.evaluate.train_test import ProbeSettings
from bowstore.models.saved import network_of, save_backbone

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]
CPU = torch.device("cpu")


def blobs(images: int = 120, classes: int = 3, dims: int = 5, seed: int = 0) -> Labelled:
    """Overlapping classes whose features have means and sizes of their own."""
    draws = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    features = np.eye(classes, dims)[labels] + 0.7 * draws.standard_normal((images, dims))
    return (features * [1, 3, 0.2, 1, 5][:dims] + [2, 0, -7, 1, 30][:dims]).astype(np.float32), labels


def fitted(train: Labelled, cost: float, rows: NDArray[np.int64] | None = None) -> logreg.Fit:
    X, y = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    rows = np.arange(len(y)) if rows is None else rows
    return logreg._Problem(X, y, torch.from_numpy(rows), int(y.max()) + 1).fit(cost, None)


def run(train: Labelled, test: Labelled, held: NDArray[np.bool_] | None = None, **options: Any) -> Any:
    held = np.arange(len(train[1])) % 10 == 0 if held is None else held
    how = {"classes": int(train[1].max()) + 1, "standardise": False, "device": CPU} | options
    return logistic_regression(*train, held, *test, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", [1e-3, 1.0, 1e3])
def test_the_optimum_is_scikit_learns(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    monkeypatch.setattr(logreg, "TOLERANCE", 1e-9)
    monkeypatch.setattr(logreg, "_BLOCK", 32)
    train, rows = blobs(), np.arange(0, 120, 2)
    other = LogisticRegression(C=cost, tol=1e-10, max_iter=10_000).fit(train[0][rows].astype(float), train[1][rows])
    ours = fitted(train, cost, rows)
    assert ours.converged
    weights_Kd, intercept_K = ours.weights_Ke[:, :-1].numpy(), ours.weights_Ke[:, -1].numpy()
    np.testing.assert_allclose(weights_Kd, other.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(intercept_K - intercept_K.mean(), other.intercept_ - other.intercept_.mean(), rtol=1e-3)
    chosen = -np.log(other.predict_proba(train[0][rows].astype(float)))[np.arange(60), train[1][rows]]
    assert ours.loss == pytest.approx(chosen.mean(), rel=1e-5)


def test_two_images_by_hand() -> None:
    """Of x = 1 and -1, C to the sum: w_1 = -w_0 = w, and w = C * (1 - sigmoid(2 w)) * 2 / 2 from the gradient."""
    ours = fitted((np.array([[1], [-1]], np.float32), np.array([0, 1])), 1.0)
    weight = float(ours.weights_Ke[0, 0])
    # Gradient for w_0: w - C * sum of (y - p) x = w - 2 (1 - sigmoid(2 w)) = 0, with w = w_0 = -w_1.
    assert weight == pytest.approx(2 / (1 + np.exp(2 * weight)), rel=1e-3)
    assert float(ours.weights_Ke[1, 0]) == pytest.approx(-weight)


def test_units_of_features_make_no_difference_to_convergence() -> None:
    """The size of features goes with the square root of C, and tiny ones are not taken for converged."""
    (X, y), cost = blobs(), 10.0
    one, tiny = fitted((X, y), cost), fitted((X * np.float32(2**-20), y), cost * 4.0**20)
    assert one.iterations == tiny.iterations > 5
    np.testing.assert_allclose(tiny.weights_Ke[:, :-1] * 2**-20, one.weights_Ke[:, :-1], rtol=1e-9)


def test_the_sweep_the_choice_and_the_refit() -> None:
    train, test = blobs(seed=0), blobs(seed=1)
    result = run(train, test)
    sweep = result.details["sweep"]
    assert [step["cost"] for step in sweep] == list(COSTS)
    assert (len(COSTS), COSTS[0], COSTS[-1]) == (12, 1e-6, 1e5)
    held, rest = (np.flatnonzero((np.arange(120) % 10 == 0) == tenth) for tenth in (True, False))
    tried = []
    for cost in COSTS:
        other = LogisticRegression(C=cost, tol=1e-8, max_iter=10_000).fit(train[0][rest].astype(float), train[1][rest])
        tried.append(other.score(train[0][held].astype(float), train[1][held]))
    assert [step["top1"] for step in sweep] == pytest.approx(tried)
    assert max(tried) > min(tried)
    best = COSTS[int(np.argmax(tried))]
    assert result.details["cost"] == best
    other = LogisticRegression(C=best, tol=1e-8, max_iter=10_000).fit(train[0].astype(float), train[1])
    assert result.metrics == {"top1": pytest.approx(other.score(test[0].astype(float), test[1]))}
    assert result.details["converged"]
    assert all(step["converged"] for step in sweep)


def test_of_equally_good_costs_the_least_is_taken() -> None:
    features, labels = np.eye(3, dtype=np.float32)[np.arange(30) % 3], np.arange(30) % 3
    assert run((features, labels), (features, labels), np.arange(30) < 6).details["cost"] == COSTS[0]


def test_standardised_features_have_no_units() -> None:
    train, test = blobs(seed=0), blobs(seed=1)
    scale = np.array([1e-2, 1e3, 1, 10, 0.1], np.float32)
    scaled = [(X * scale, y) for X, y in (train, test)]
    one, other = run(train, test, standardise=True), run(*scaled, standardise=True)
    assert [step["top1"] for step in one.details["sweep"]] == [step["top1"] for step in other.details["sweep"]]
    assert one.details["train_loss"] == pytest.approx(other.details["train_loss"], rel=1e-3)


def test_fits_that_stop_early_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logreg, "MAX_ITERATIONS", 2)
    result = run(blobs(), blobs(seed=1))
    said = capsys.readouterr().err
    assert "of 13 fits stopped before they converged, after at most 2 iterations" in said
    assert "C 100000" in said
    assert not result.details["sweep"][-1]["converged"]
    assert result.details["sweep"][-1]["iterations"] == 2


@pytest.mark.parametrize(
    ("settings", "protocol_id"),
    [
        ({}, "logreg/c12"),
        ({"standardise": True}, "logreg/c12-standardised"),
        ({"held_out": True}, "logreg/c12-held-out"),
        ({"held_out": True, "standardise": True}, "logreg/c12-standardised-held-out"),
        ({"layers": ["block2", "block1"]}, "logreg/block1-block2/c12"),
    ],
)
def test_the_id_says_features_and_test_images(settings: dict[str, Any], protocol_id: str) -> None:
    protocol = describe(validate(ProbeSettings, settings, "eval logreg"))
    assert (protocol.id, protocol.version) == (protocol_id, 1)
    assert protocol.headline == ("top1_best" if "layers" in settings else "top1")


class TestWhole:
    def evaluate(self, tmp_path: Path, **settings: object) -> Result:
        view = ViewConfig(size=16, resize=None)
        of_run = {"name": "r", "task": "words", "view": dump(view), "model": {"arch": "wrn-10-1"}}
        network, path = network_of(of_run, "test"), tmp_path / "run.safetensors"
        save_backbone(path, network.fresh(), network)
        asked = validate(ProbeSettings, settings, "eval logreg")
        return evaluate(KIND, asked, EvalConfig(run=str(path), batch=16), Workspace())

    def test_from_shards_to_result_file(self, tmp_path: Path, make_shard_set: ShardMaker) -> None:
        train, test = make_shard_set(60, folder="train").root, make_shard_set(20, folder="test", first=60).root
        result = self.evaluate(tmp_path, train=train, test=test)
        assert read_result(tmp_path / "run" / "eval" / "logreg-c12.json") == result
        assert result.metrics.keys() == {"top1"}
        assert result.metrics["top1"] > 0.4
        assert len(result.details["sweep"]) == 12
        assert result.settings["costs"] == list(COSTS)
        layers = self.evaluate(tmp_path, train=train, test=test, layers=["block3"])
        assert layers.metrics["top1_best"] == layers.metrics["top1_block3"]
        assert layers.details["block3"]["sweep"][0]["cost"] == 1e-6
        # A sweep's shares are of the held-out tenth: 15 images a class, of which one.
        assert {step["top1"] * 4 % 1 for step in result.details["sweep"]} == {0}

    def test_the_tenth_is_that_of_the_held_out_split(self, make_shard_set: ShardMaker) -> None:
        index = make_shard_set(60, folder="train")
        held = open_splits(index.root, None)["test"].rows
        chosen = a_tenth(np.asarray(index.label), np.asarray(index.key_hash))
        assert np.flatnonzero(chosen).tolist() == held.tolist()

    def test_a_class_of_one_image(self, tmp_path: Path, make_shard_set: ShardMaker) -> None:
        train, test = make_shard_set(7, folder="train").root, make_shard_set(20, folder="test", first=60).root
        with pytest.raises(DataError, match=r"train: class 3 has 1 image, so that none of it can be held out \(1 such"):
            self.evaluate(tmp_path, train=train, test=test)
        with pytest.raises(DataError, match=r"train class, so give it more images by --train$"):
            self.evaluate(tmp_path, train=make_shard_set(8, folder="few").root, held_out=True)
        with pytest.raises(DataError, match=r"class 0 has 1 image.* so give it more images by --images$"):
            self.evaluate(tmp_path, train=test, test=make_shard_set(4, folder="four", first=80).root, images=4)
