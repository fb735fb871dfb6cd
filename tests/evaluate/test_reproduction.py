"""A table of the paper, summed up and shown: what shares a column, and what stands beside it."""

import csv

import pytest
from test_results import a_result

from bowstore.errors import DataError
from bowstore.evaluate import reproduction
from bowstore.evaluate.reproduction import summary
from bowstore.evaluate.results import Result


def of(top1: float, *, images: str = "b" * 32, version: int = 1, dataset: str | None = None) -> Result:
    result = a_result(top1=top1)
    inputs = result.inputs | {"test": images, "dataset": dataset}
    return result.model_copy(update={"inputs": inputs, "protocol_version": version})


def test_what_differs_in_version_or_images_is_never_averaged() -> None:
    measured = {
        0: {"RotNet": [of(0.50)], "BoWNet": [of(0.61)]},
        1: {"RotNet": [of(0.54)], "BoWNet": [of(0.60)]},
        2: {"RotNet": [of(0.90, version=2)], "BoWNet": [of(0.90, images="c" * 32)]},
    }
    value = summary("table1", measured, images={"b" * 8: "cifar10"}, absent={})
    found = {
        (part["here"]["version"], part["here"]["images"], row["row"]): row["here"]["top1"]
        for part in value["parts"]
        for row in part["rows"]
        if row["here"]
    }
    assert {key: (round(it["mean"], 6), it["n"]) for key, it in found.items()} == {
        (1, "cifar10", "RotNet"): (52, 2),
        (1, "cifar10", "BoWNet"): (60.5, 2),
        (2, "cifar10", "RotNet"): (90, 1),
        (1, "c" * 8, "BoWNet"): (90, 1),
    }
    (test,) = next(claim for claim in value["claims"] if claim["says"] == "BoWNet is better than RotNet")["tests"]
    assert (test["seeds"], round(test["mean"], 6)) == ([0, 1], 8.5)  # of seed 2 they are of other images and versions
    assert (test["holds"], test["leans"], test["paper"]) == ("not decided", "yes", 11.2)


def test_a_row_of_other_images_is_not_missing_where_it_was_not_made() -> None:
    on_photographs = {"RelLoc": [of(0.4, images="c" * 32)], "BoWNet": [of(0.5, images="c" * 32)]}
    rows = {"RotNet": [of(0.5)], "BoWNet": [of(0.6), *on_photographs["BoWNet"]], "RelLoc": on_photographs["RelLoc"]}
    value = summary("table3", {0: rows}, images={}, absent={"Random to BoWNet": "no images"})
    shown = {part["here"]["images"]: [row["row"] for row in part["rows"]] for part in value["parts"] if part["here"]}
    assert shown["b" * 8] == ["RotNet", "BoWNet", "RelLoc to BoWNet", "Random to BoWNet"]
    assert shown["c" * 8] == ["RelLoc", "BoWNet", "RelLoc to BoWNet", "Random to BoWNet"]
    with pytest.raises(DataError, match=r"row 'BoWNet', seed 0: two results of linear/bownet-cifar on the same images"):
        summary("table3", {0: {"BoWNet": [of(0.5), of(0.6)]}}, images={}, absent={})


def test_the_papers_figures_compare_on_its_own_images_alone() -> None:
    for dataset, said in (
        ("cifar100", "paper: Table 1, WRN-28-10, cifar100"),
        (None, "other images: compare the order"),
    ):
        value = summary("table1", {0: {"BoWNet": [of(0.7, dataset=dataset)]}}, images={}, absent={})
        part = next(part for part in value["parts"] if part["here"])
        assert part["paper"]["comparable"] == (dataset is not None)
        text = reproduction.text({**value, "here": None, "recipe": "table1"})
        heading = next(line for line in text.splitlines() if line.startswith("linear/bownet-cifar v1 on"))
        assert said in heading
        assert ("other images" in heading) == (dataset is None)


def test_forms() -> None:
    measured = {seed: {"BoWNet": [of(0.6 + seed / 100)], "RotNet": [of(0.5)]} for seed in (0, 1, 2)}
    value = {**summary("table1", measured, images={}, absent={}), "here": "a title", "recipe": "table1_small"}
    text = reproduction.text(value).splitlines()
    assert text[0].startswith("Table 1: CIFAR-100, linear classifier")
    assert text[1] == "Here: a title; seeds 0, 1, 2; mean ± half the 95 % interval, in percent"
    assert ["BoWNet", "61.00", "±", "2.48", "3", "71.5"] in [line.split() for line in text]  # t(2) 4.303, s 1
    assert ["AMDIM", "-", "-", "70.2", "quoted", "only"] in [line.split() for line in text]
    assert ["yes", "top1", "+11.00", "±", "2.48", "3", "+11.2"] in [line.split() for line in text]
    assert "(1 yes, 0 no, 1 not decided, 11 not tested)" in "\n".join(text)
    assert "| BoWNet | 61.00 ± 2.48 | 3 | 71.5 |  |" in reproduction.markdown(value).splitlines()
    lines = list(csv.DictReader(reproduction.as_csv(value).splitlines()))
    line = next(line for line in lines if line["row"] == "BoWNet" and line["protocol"])
    assert [round(float(line[key]), 6) for key in ("mean", "seed_0", "seed_1", "seed_2")] == [61, 60, 61, 62]
    assert (line["n"], line["paper"], line["paper_dataset"], line["comparable"]) == ("3", "71.5", "cifar100", "False")
