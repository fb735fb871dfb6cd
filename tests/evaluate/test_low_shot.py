"""Low-shot SVMs: the samples, their SVMs against scikit-learn, the choice of the cost, errors, a whole evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from voc_devkit import write_devkit

from bowstore.config import ViewConfig, Workspace, dump, validate
from bowstore.errors import DataError, UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.low_shot import _summary, check_shots, low_shot_precision, sampled
from bowstore.evaluate.protocols.voc07_lowshot import KIND, SHOTS, LowShotSettings, describe
from bowstore.evaluate.results import INTERVAL, Result, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.svm import ABSENT, IGNORED, PRESENT, average_precision, normalise_rows
from bowstore.models.saved import network_of, save_backbone

Problem = tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.float32], NDArray[np.int8]]


def problem(images: int = 60, dims: int = 6, classes: int = 3, seed: int = 0) -> Problem:
    """Classes along axes of their own, several an image."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 2, (2 * images, classes)).astype(np.int8)
    features = np.abs(labels @ np.eye(classes, dims) + 0.6 * draws.standard_normal((2 * images, dims)))
    features = features.astype(np.float32)
    return features[:images], labels[:images], features[images:], labels[images:]


def test_a_sample_is_k_positives_and_negatives_without_repetition() -> None:
    labels = np.array([PRESENT, ABSENT, IGNORED] * 20)
    rows = sampled(labels, 4, 8, (0, 1, 2, 3))
    assert len(rows) == len(set(rows.tolist())) == 12
    assert labels[rows].tolist() == [PRESENT] * 4 + [ABSENT] * 8


def test_samples_are_drawn_by_themselves() -> None:
    """Each is a function of seed, class, shots and its number, whatever else is drawn."""
    labels = np.array([PRESENT, ABSENT] * 200)
    place = (0, 1, 2, 3)
    assert sampled(labels, 8, 16, place).tolist() == sampled(labels, 8, 16, place).tolist()
    for changed in range(4):
        other = tuple(value + (n == changed) for n, value in enumerate(place))
        assert sampled(labels, 8, 16, other).tolist() != sampled(labels, 8, 16, place).tolist()
    assert sampled(labels, 2, 2, place).tolist() == [218, 208, 253, 47]  # NumPy's Philox: the same on every machine


def test_as_scikit_learn_gives() -> None:
    train, labels, test, test_labels = problem()
    costs = (0.01, 1.0, 30.0)
    found, short = low_shot_precision(train, labels, test, test_labels, shots=(2, 5), costs=costs, seed=7, jobs=1)
    assert short == 0
    X, Y = normalise_rows(train), normalise_rows(test)
    for shots, map_SC in found.items():
        assert map_SC.shape == (5, 3)
        for s in range(5):
            for c, cost in enumerate(costs):
                precisions = []
                for k in range(3):
                    rows = sampled(labels[:, k], shots, 2 * shots, (7, k, shots, s))
                    other = LinearSVC(C=cost, tol=1e-8, max_iter=10**6, class_weight={1: 2, 0: 1}, random_state=0)
                    other.fit(X[rows], labels[rows, k])
                    precisions.append(average_precision(other.decision_function(Y), test_labels[:, k]))
                assert map_SC[s, c] == pytest.approx(np.mean(precisions), abs=1e-12)


def test_the_cost_with_the_best_mean_counts() -> None:
    # Means 0.5, 0.625, 0.625: of equals the first.
    map_SC = np.array([[0.9, 0.5, 0.375], [0.1, 0.75, 0.875]])
    found = _summary(map_SC, (1.0, 2.0, 3.0))
    expected = {"mean": 0.625, "min": 0.5, "max": 0.75, "std": 0.125, "cost": 2.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["samples"] == [0.5, 0.75]


@pytest.mark.parametrize(
    ("settings", "protocol_id"),
    [
        ({}, "voc07-lowshot/fair"),
        ({"costs": "vissl"}, "voc07-lowshot/vissl"),
        ({"resize": "opencv"}, "voc07-lowshot/fair-opencv"),
        ({"shots": [1, 4]}, "voc07-lowshot/fair/1-4shot"),
        ({"shots": [1], "layers": ["conv5", "conv4"]}, "voc07-lowshot/fair/1shot/conv4-conv5"),
        ({"seed": 3}, "voc07-lowshot/fair"),
    ],
)
def test_the_id_says_costs_resize_shots_and_layers(settings: dict[str, Any], protocol_id: str) -> None:
    protocol = describe(validate(LowShotSettings, settings, "eval voc07-lowshot"))
    assert (protocol.id, protocol.version) == (protocol_id, 1)
    assert protocol.headline == f"{settings.get('shots', SHOTS)[-1]}-shot"


class TestErrors:
    def test_shots_must_ascend(self) -> None:
        with pytest.raises(UsageError, match="shots 4, 2 must ascend; each once, smallest first"):
            validate(LowShotSettings, {"shots": [4, 2]}, "eval voc07-lowshot")

    def test_too_few_positives(self) -> None:
        labels = np.array([[1, 1], [1, 0], [0, 1], [0, 1], [-1, 0], [0, 0]], np.int8)
        check_shots(labels, ("a", "b"), 2)
        with pytest.raises(
            DataError,
            match="class a: 2 positive and 3 negative training images, and 3 shots need 3 and 3; take --shots up to 2",
        ):
            check_shots(labels, ("a", "b"), 3)

    def test_too_few_negatives(self) -> None:
        labels = np.array([[1, 1, 1]] * 9 + [[0, 0, 0]], np.int8)
        with pytest.raises(DataError, match=r"class a: 9 positive and 1 negative .* need 1 and 2; use the full devkit"):
            check_shots(labels, ("a", "b", "c"), 1)

    def test_one_class(self) -> None:
        with pytest.raises(DataError, match="1 class; a sample takes negatives for each other class"):
            check_shots(np.array([[1], [0]], np.int8), ("a",), 1)


class TestWhole:
    def evaluate(self, voc: Path, out: Path, **options: object) -> Result:
        of_run = {
            "name": "r", "task": "words", "view": dump(ViewConfig(size=24, resize=28)), "model": {"arch": "wrn-10-1"},
        }  # fmt: skip
        network, path = network_of(of_run, "test"), out.with_suffix(".safetensors")
        save_backbone(path, network.fresh(), network)
        settings = validate(LowShotSettings, {"jobs": 1, "layers": ["block3"]} | options, "eval voc07-lowshot")
        return evaluate(KIND, settings, EvalConfig(run=str(path), batch=8), Workspace(voc=voc))

    def test_from_devkit_to_result_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bowstore.evaluate.low_shot.COSTS", {"fair": (0.1, 1.0, 10.0)})
        monkeypatch.setattr("bowstore.evaluate.voc._VIEW", {"size": 24, "resize": 28, "squash": True})
        voc = write_devkit(tmp_path, classes=("blue", "red"))
        result = self.evaluate(voc, tmp_path / "run", shots=[1, 3])
        assert read_result(tmp_path / "run" / "eval" / "voc07-lowshot-fair-1-3shot-block3.json") == result
        assert list(result.metrics) == ["1-shot", "3-shot"]
        layer = result.details["block3"]
        for name, mean in result.metrics.items():
            one = layer[name]
            assert one["min"] <= one["mean"] == mean <= one["max"]
            assert one["cost"] in result.settings["costs"]
            assert one["std"] == pytest.approx(np.std(one["samples"]))
            # Student's t of four degrees of freedom: 2.776.
            half = 2.7764 * np.std(one["samples"], ddof=1) / 5**0.5
            assert result.details[INTERVAL][name] == pytest.approx(half, rel=1e-4)
        assert layer["unconverged_fits"] == 0
        assert layer["variation"].keys() == {"trainval", "test"}
        assert "antialias" not in result.settings["view"]
        with pytest.raises(
            DataError, match=r"class blue: \d+ positive and \d+ negative .* and 96 shots need 96 and 96"
        ):
            self.evaluate(voc, tmp_path)
        # Without antialias the same network sees other pixels, under another id.
        other = self.evaluate(voc, tmp_path / "run", shots=[1, 3], resize="opencv")
        assert other.protocol == "voc07-lowshot/fair-opencv/1-3shot/block3"
        assert other.settings["view"]["antialias"] is False
        assert other.details["block3"]["variation"] != layer["variation"]
