import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from bowstore.environment import library_versions
from bowstore.errors import CorruptError, DataError, MissingError, UsageError
from bowstore.evaluate.protocols import PROTOCOLS
from bowstore.evaluate.results import (
    Result,
    comparison_table,
    paper_figures,
    read_result,
    result_table,
    write_result,
)
from bowstore.models.weights import weights_sha256
from bowstore.runs import result_paths


def a_result(protocol_id: str = "linear/bownet-cifar", headline: str | None = "top1", **metrics: float) -> Result:
    return Result(
        protocol=protocol_id,
        protocol_version=2 if protocol_id.startswith("voc07") else 1,
        headline=headline,
        metrics=metrics or {"top1": 0.715, "top5": 0.9},
        settings={"seed": 0},
        inputs={
            "train": "aa" * 16,
            "test": "bb" * 16,
            "weights_sha256": "cc" * 32,
            "run": "demo",
            "dataset": "cifar100",
        },
        details={"losses": [2.0, 1.0]},
        versions=library_versions(),
        device="cpu",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=1.5,
    )


def columns(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_result_file_goes_there_and_back(tmp_path: Path) -> None:
    result = a_result()
    path = write_result(tmp_path, result)
    assert path == tmp_path / "eval" / "linear-bownet-cifar.json"
    assert read_result(path) == result
    assert [read_result(path) for path in result_paths(tmp_path)] == [result]
    assert set(json.loads(path.read_text())) >= {
        "protocol", "protocol_version", "metrics", "settings", "inputs", "versions", "device", "created", "seconds"
    }  # fmt: skip


def test_a_result_of_other_test_images_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = a_result().model_copy(update={"inputs": {"test": "a" * 32}})
    again = first.model_copy(update={"seconds": 2.5})
    other = first.model_copy(update={"inputs": {"test": "b" * 32}})
    newer = other.model_copy(update={"protocol_version": other.protocol_version + 1})
    for result in (first, again, other, newer):
        path = write_result(tmp_path, result)
    version = first.protocol_version
    assert {place.name: read_result(place) for place in result_paths(tmp_path)} == {
        path.name: newer,
        f"{path.stem}-v{version}-aaaaaaaa.json": again,
        f"{path.stem}-v{version}-bbbbbbbb.json": other,
    }
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("kept as ")[2] for line in said] == [
        f"{path.stem}-v{version}-aaaaaaaa.json",
        f"{path.stem}-v{version}-bbbbbbbb.json",
    ]


def test_a_result_that_was_kept_is_replaced_by_one_of_the_same_images(tmp_path: Path) -> None:
    one, other = (a_result().model_copy(update={"inputs": {"test": digit * 32}}) for digit in "ab")
    again = one.model_copy(update={"seconds": 2.5})
    for result in (one, other, again):
        write_result(tmp_path, result)
    found = [read_result(path) for path in result_paths(tmp_path)]
    assert sorted(result.inputs["test"] or "" for result in found) == ["a" * 32, "b" * 32]
    assert again in found
    assert comparison_table({"run": found})


def test_versions_name_every_library() -> None:
    versions = a_result().versions
    decoders = {"dali", "nvimgcodec", "nvjpeg"}
    assert set(versions) == {"bowstore", "python", "torch", "torchvision", "sklearn", "numpy"} | decoders
    assert versions["torch"] == torch.__version__ or torch.__version__.startswith(versions["torch"])
    assert "not installed" not in versions.values()


def test_no_results_before_the_first(tmp_path: Path) -> None:
    assert result_paths(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("{}", "not a result file .protocol: Field required"), ("[]", "whole")],
)
def test_damaged_result_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CorruptError, match=message):
        read_result(path)


def test_missing_result(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file"):
        read_result(tmp_path / "x.json")


def test_a_file_of_before_headlines_is_read(tmp_path: Path) -> None:
    old = a_result("voc07-svm/fair", "map_best", map_conv4=0.7, map_conv5=0.6, map_best=0.7).model_dump()
    del old["headline"]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "voc07-svm-fair.json").write_text(json.dumps(old))
    (result,) = map(read_result, result_paths(tmp_path))
    assert "70.00" in comparison_table({"one": [result]})
    assert "60.00" not in comparison_table({"one": [result]})


def test_unknown_protocol_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"no protocol 'liner'; did you mean 'linear'\? there are linear, .*voc07"):
        PROTOCOLS.get("liner")


def test_metrics_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        a_result(top1=float("nan"))


def test_result_table_stands_beside_the_paper() -> None:
    lines = result_table(a_result(top1=0.5)).splitlines()
    assert lines[0] == "linear/bownet-cifar v1"
    assert lines[2].split()[:3] == ["this", "run", "50.00"]
    row = next(line for line in lines if line.startswith("paper: BoWNet x2"))
    assert row.split()[-4:] == ["74.1", "Table", "1,", "WRN-28-10"]
    assert not any("AMDIM" in line for line in lines)


def test_paper_rows_only_for_their_data_and_protocol() -> None:
    other = a_result(top1=0.5)
    other = other.model_copy(update={"inputs": other.inputs | {"dataset": None}})
    assert "paper" not in result_table(other)
    assert "paper" not in result_table(a_result("linear/standardised", top1=0.5))


def test_paper_rows_name_known_protocols_and_metrics() -> None:
    protocols = [kind.describe(kind.settings()) for kind in PROTOCOLS.values()]
    headlines = {protocol.id.split("/")[0]: protocol.headline for protocol in protocols}
    for paper in paper_figures():
        of_chosen_layers = paper.protocol == "voc07-svm/fair/*"
        assert (headlines[paper.protocol.split("/")[0]] in paper.metrics) != of_chosen_layers
        assert all(len(percent) == len(paper.metrics) for percent in paper.percent.values())


def test_the_best_of_layers_that_were_chosen_is_none_of_the_papers() -> None:
    result = a_result("voc07-svm/fair/conv3-conv4", "map_best", map_conv3=0.4, map_conv4=0.5, map_best=0.5)
    table = result_table(result.model_copy(update={"inputs": result.inputs | {"dataset": "voc07"}}))
    assert ["paper:", "BoWNet-conv4", "-", "73.6", "-"] in [line.split()[:5] for line in table.splitlines()]


def test_columns_align() -> None:
    lines = result_table(a_result()).splitlines()[1:]
    ends = {line.index(figure) + len(figure) for line, figure in zip(lines[:2], ("top1", "71.50"), strict=True)}
    assert len(ends) == 1


def test_other_protocols_never_share_a_column() -> None:
    fair, vissl = (
        a_result("voc07-svm/fair", "map_best", map_best=0.8),
        a_result("voc07-svm/vissl", "map_best", map_best=0.7),
    )
    table = columns(comparison_table({"one": [fair], "two": [vissl]}))
    assert table[0] == ["protocol", "voc07-svm/fair", "v2", "voc07-svm/vissl", "v2"]
    assert table[2] == ["one", "80.00", "-"]
    assert table[3] == ["two", "-", "70.00"]


def test_other_versions_never_share_a_column() -> None:
    old = a_result(top1=0.4)
    new = old.model_copy(update={"protocol_version": 2})
    table = columns(comparison_table({"one": [old], "two": [new]}))
    assert table[0] == ["protocol", "linear/bownet-cifar", "v1", "linear/bownet-cifar", "v2"]
    assert [row[1:] for row in table[2:]] == [["40.00", "-"], ["-", "40.00"]]


def test_other_test_images_never_share_a_column() -> None:
    one = a_result(top1=0.4)
    two = one.model_copy(update={"inputs": {"test": "dd" * 16}})
    table = columns(comparison_table({"one": [one], "two": [two]}))
    assert table[1] == ["test", "images", "cifar100", "dddddddd"]


def test_same_protocol_shares_a_column() -> None:
    table = columns(comparison_table({"one": [a_result(top1=0.4)], "two": [a_result(top1=0.5)], "three": []}))
    assert [row for row in table[2:]] == [["one", "40.00"], ["two", "50.00"], ["three", "-"]]


def test_two_results_in_one_cell() -> None:
    with pytest.raises(DataError, match="run one has two results of linear/bownet-cifar v1 on cifar100"):
        comparison_table({"one": [a_result(), a_result()]})


def test_a_result_says_which_metric_stands_for_it() -> None:
    result = a_result("plugin/own", headline="second", first=0.25, second=0.5)
    table = comparison_table({"one": [result]})
    assert "50.00" in table
    assert "25.00" not in table


WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "n": torch.tensor(3),
    "h": torch.ones(2, dtype=torch.bfloat16),
    "e": torch.empty(0),
}


class TestWeightsDigest:
    def test_ignores_order_and_memory_format(self) -> None:
        shuffled = {name: WEIGHTS[name] for name in ("n", "e", "h", "a")}
        shuffled["a"] = WEIGHTS["a"].t().contiguous().t()
        assert weights_sha256(shuffled) == weights_sha256(WEIGHTS)
        assert len(weights_sha256(shuffled)) == 64

    @pytest.mark.parametrize(
        "change",
        [
            {"a": torch.arange(6.0).reshape(3, 2)},
            {"a": torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))},
            {"a": torch.arange(6.0).reshape(2, 3).view(torch.int32)},
            {"n": torch.tensor(4)},
            {"more": torch.empty(0)},
        ],
    )
    def test_sees_every_change(self, change: dict[str, torch.Tensor]) -> None:
        assert weights_sha256(WEIGHTS | change) != weights_sha256(WEIGHTS)

    def test_is_pinned(self) -> None:
        expected = hashlib.sha256(b"w\ntorch.float32\n(2,)\n" + b"\x00\x00\x80?\x00\x00\x00@").hexdigest()
        assert weights_sha256({"w": torch.tensor([1.0, 2.0])}) == expected
