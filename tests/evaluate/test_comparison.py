"""Runs side by side: columns that are never mixed, and intervals whose values are known."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bowstore.cli import main
from bowstore.evaluate import results
from bowstore.evaluate.comparison import NO_INTERVAL, as_csv, difference, estimate, markdown, side_by_side, text
from bowstore.models.saved import network_of, save_backbone
from bowstore.models.weights import weights_sha256


def measured(protocol: str = "knn/k200", headline: str = "top1", version: int = 1, **changed: Any) -> results.Result:
    values: dict[str, Any] = {
        "protocol": protocol,
        "protocol_version": version,
        "headline": headline,
        "metrics": {"top1": 0.5},
        "settings": {"images": {"train": 900, "test": 100}},
        "inputs": {"train": "a" * 32, "test": "b" * 32, "run": "x"},
        "versions": {},
        "device": "cpu",
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
    }
    return results.Result.model_validate(values | changed)


def shares(hits: int, images: int) -> results.Result:
    return measured(metrics={"top1": hits / images}, settings={"images": {"test": images}})


def test_a_share_of_images_has_wilsons_interval() -> None:
    found = estimate(shares(50, 100), "top1")
    assert (found.low, found.high) == (pytest.approx(0.4038315, abs=1e-6), pytest.approx(0.5961685, abs=1e-6))
    assert found.interval == "binomial, N = 100"
    all_right = estimate(shares(10, 10), "top1")  # Wald's would be a point
    assert (all_right.low, all_right.high) == (pytest.approx(0.7224672, abs=1e-6), pytest.approx(1))


def test_a_difference_of_shares_has_newcombes_interval() -> None:
    """His examples (Statistics in Medicine 17, 1998, table II, method 10): 56/70 - 48/80 and 9/10 - 3/10."""
    for one, base, ends in (
        (shares(56, 70), shares(48, 80), (0.0524, 0.3339)),
        (shares(9, 10), shares(3, 10), (0.1705, 0.8090)),
    ):
        found = difference(estimate(one, "top1"), estimate(base, "top1"))
        assert (found.low, found.high) == (pytest.approx(ends[0], abs=5e-5), pytest.approx(ends[1], abs=5e-5))
        assert found.exceeds is True
    none = difference(estimate(shares(52, 100), "top1"), estimate(shares(50, 100), "top1"))
    assert (none.exceeds, none.interval) == (False, "binomial, N = 100")


def test_the_results_own_interval_goes_first_and_a_metric_without_one_decides_nothing() -> None:
    metrics = {"5-shot": 0.5, "map": 0.4}
    one = measured(metrics=metrics, headline="map", details={"interval95": {"5-shot": 0.03}})
    base = measured(metrics={"5-shot": 0.45, "map": 0.3}, headline="map", details={"interval95": {"5-shot": 0.04}})
    found = difference(estimate(one, "5-shot"), estimate(base, "5-shot"))
    assert (found.low, found.high) == (pytest.approx(0.0), pytest.approx(0.1))  # a triangle of 3, 4 and 5
    assert found.interval == "the result's own"
    apart = difference(estimate(one, "map"), estimate(base, "map"))
    assert (apart.exceeds, apart.interval) == (None, NO_INTERVAL)
    assert "No interval is known of map." in text(side_by_side({"a": [base], "b": [one]}))


def test_only_figures_of_one_protocol_version_and_test_images_are_compared() -> None:
    other_images = measured(inputs={"train": "a" * 32, "test": "c" * 32})
    value = side_by_side({
        "a": [measured(), measured("knn/k20"), measured("linear/x", version=1)],
        "b": [other_images, measured("knn/k20"), measured("linear/x", version=2)],
    })  # fmt: skip
    assert [(p["protocol"], p["version"], p["tested_on"], list(p["rows"])) for p in value["parts"]] == [
        ("knn/k20", 1, "b" * 8, ["a", "b"]),
        ("knn/k200", 1, "b" * 8, ["a"]),
        ("knn/k200", 1, "c" * 8, ["b"]),
        ("linear/x", 1, "b" * 8, ["a"]),
        ("linear/x", 2, "b" * 8, ["b"]),
    ]
    assert [len(part["differences"]) for part in value["parts"]] == [1, 0, 0, 0, 0]
    alone = side_by_side({"a": [measured()], "b": [other_images]})
    assert alone["remarks"] == ["no two of them have a protocol, version and set of test images in common"]


def test_differences_are_to_the_first_and_other_train_images_are_told() -> None:
    worse = measured(metrics={"top1": 0.2, "top5": 0.9}, inputs={"train": "d" * 32, "test": "b" * 32})
    value = side_by_side({"a": [measured()], "b": [worse], "c": [measured(metrics={"top1": 0.55})]})
    (part,) = value["parts"]
    assert [(it["run"], it["minus"], it["metric"], it["exceeds"]) for it in part["differences"]] == [
        ("b", "a", "top1", True), ("c", "a", "top1", False)
    ]  # fmt: skip
    assert part["remarks"] == ["b: trained on other images than a"]
    lines = text(value).splitlines()
    assert lines[0] == "knn/k200 v1 on bbbbbbbb"
    assert [line.split() for line in lines[2:8]] == [
        ["percent", "top1", "top5"],
        ["a", "50.00", "±", "9.62", "-"],
        ["b", "20.00", "±", "7.77", "90.00", "±", "5.96"],
        ["c", "55.00", "±", "9.57", "-"],
        ["b", "-", "a", "-30.00", "±", "12.40", "*", "-"],
        ["c", "-", "a", "+5.00", "±", "13.57", "-"],
    ]
    assert "| b - a | -30.00 ± 12.40 * | - |" in markdown(value).splitlines()
    rows = list(csv.DictReader(io.StringIO(as_csv(value))))
    assert [(row["run"], row["metric"], row["exceeds"]) for row in rows] == [
        ("a", "top1", ""), ("b", "top1", "True"), ("c", "top1", "False"), ("b", "top5", "")
    ]  # fmt: skip
    assert float(rows[1]["difference"]) == pytest.approx(-30)


def test_the_papers_rows_stand_below_where_they_compare() -> None:
    inputs = {"train": "a" * 32, "test": "b" * 32, "dataset": "cifar100"}
    value = side_by_side({"a": [measured("linear/bownet-cifar", inputs=inputs)], "b": [measured()]})
    (paper,) = [part["paper"] for part in value["parts"] if part["tested_on"] == "cifar100"]
    assert {"system": "BoWNet x2", "percent": {"top1": 74.1}, "source": "Table 1, WRN-28-10"} in paper
    assert [row for row in markdown(value).splitlines() if row.startswith("| paper: BoWNet x2 ")] == [
        "| paper: BoWNet x2 | 74.1 | Table 1, WRN-28-10 |"
    ]
    assert "paper: BoWNet x2,74.1," in as_csv(value)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder, share in {"runs/a": 0.5, "runs/a/random": 0.25, "runs/b": 0.75, "networks/timm-x-seed-0": 0.6}.items():
        results.write_result(tmp_path / folder, measured(metrics={"top1": share}))
    (tmp_path / "runs/empty/eval").mkdir(parents=True)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", *arguments])


def rows(*arguments: str) -> dict[str, float]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    (part,) = json.loads(done.stdout)["parts"]
    return {run: shares["top1"]["percent"] for run, shares in part["rows"].items()}


def test_runs_and_networks_go_by_name_and_path_and_all_by_none(workspace: Path) -> None:
    assert rows("runs/b", "a") == {"b": 75, "a": 50}
    assert rows("a/random", str(workspace / "runs/a"), "timm-x-seed-0") == {
        "a/random": 25, "a": 50, "timm-x-seed-0": 60
    }  # fmt: skip
    assert rows() == {"a": 50, "a/random": 25, "b": 75, "timm-x-seed-0": 60}
    results.write_result(workspace / "elsewhere/a", measured())
    results.write_result(workspace / "other/a", measured())
    assert list(rows("elsewhere/a", "other/a")) == ["elsewhere/a", "other/a"]
    assert call("a", "b", "--markdown").stdout.startswith(
        "## knn/k200 v1 on bbbbbbbb\n\n| percent | top1 |\n|---|---|\n"
    )
    assert call("a", "b", "--csv").stdout.startswith("protocol,version,test_images,metric,run,percent,")


def test_results_of_other_weights_than_the_run_has_now_are_named(workspace: Path) -> None:
    saved = network_of({"name": "b", "task": "words", "model": {"arch": "wrn-10-1"}}, "test")
    save_backbone(workspace / "runs/b/backbone.safetensors", network := saved.fresh(), saved)
    inputs = {"test": "b" * 32, "weights_sha256": weights_sha256(network.state_dict())}
    results.write_result(workspace / "runs/b", measured("linear/x", inputs=inputs))
    results.write_result(workspace / "runs/b", measured(inputs=inputs | {"weights_sha256": "of step 1000"}))
    assert call("a", "b").stderr == (
        "warning: runs/b/eval/knn-k200.json is of other weights than runs/b has now; evaluate it again, or move the "
        "file away\n"
    )


def test_what_cannot_be_compared_is_one_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, message in (
        (["nobody"], 1, "no run, network or file 'nobody'; evaluated in this workspace: a, a/random, b, timm-x-seed-0"),
        (["a", "runs/empty"], 1, "runs/empty holds no results; `bowstore eval PROTOCOL --run runs/empty` makes some"),
        (["a", "runs/a"], 2, "runs/a is named twice; name each once"),
    ):
        done = call(*arguments)
        assert (done.exit_code, done.stderr) == (code, f"Error: {message}\n")
    results.write_result(workspace / "networks/y/96px", measured())
    assert call("networks/y").stderr == "Error: networks/y holds no results; name networks/y/96px\n"
    (workspace / "runs/a/eval/copy.json").write_bytes((workspace / "runs/a/eval/knn-k200.json").read_bytes())
    assert "Error: run a has two results of knn/k200 v1 on bbbbbbbb; move one of the two files away" in call("a").stderr
    (workspace / "new").mkdir()
    monkeypatch.chdir(workspace / "new")
    assert call().stderr == "Error: nothing was evaluated in runs or networks; `bowstore eval PROTOCOL` does\n"
