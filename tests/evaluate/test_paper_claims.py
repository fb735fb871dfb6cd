"""Intervals and paired differences against SciPy, verdicts by hand, and the claims against the paper's own figures."""

import numpy as np
import pytest
import scipy.stats

from bowstore.evaluate.claims import Claim, Spread, claims, differences, spread, together, verdict
from bowstore.evaluate.reproduction import _beside, _percent
from bowstore.evaluate.results import Column, paper_tables

COLUMN = Column("linear/bownet-cifar", 1, "aaaa")
LARGER = Claim(says="", tables=("table1",), rows=("A", "B"), on={"linear/*": ("top1",)}, above=0)


def figures(first: dict[int, float], second: dict[int, float]) -> dict[Column, dict[str, dict[str, dict[int, float]]]]:
    return {COLUMN: {"A": {"top1": first}, "B": {"top1": second}}}


@pytest.mark.parametrize("n", [2, 3, 10])
def test_intervals_are_those_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(70, 3, n).tolist()
    found = spread(values)
    low, high = scipy.stats.t.interval(0.95, n - 1, np.mean(values), scipy.stats.sem(values))
    assert found.half is not None
    np.testing.assert_allclose([found.mean - found.half, found.mean + found.half], [low, high], rtol=1e-12)
    assert spread(values[:1]) == Spread(values[0], None, 1)


@pytest.mark.parametrize("above", [0.0, 1.5, -2.0])
def test_verdicts_are_those_of_a_paired_test(above: float) -> None:
    draws = np.random.default_rng(3)
    seen = set()
    for shift in (-6, -1, 0, 1, 2, 8):
        second = draws.normal(60, 4, 4)
        first = second + shift + draws.normal(0, 1, 4)
        test = scipy.stats.ttest_rel(first, second + above)
        expected = "not decided" if test.pvalue > 0.05 else "yes" if test.statistic > 0 else "no"
        claim = LARGER.model_copy(update={"above": above})
        (found,) = differences(claim, figures(dict(enumerate(first)), dict(enumerate(second))), COLUMN)
        assert found["holds"] == expected
        seen.add(expected)
    assert seen == {"yes", "no", "not decided"}


def test_a_claim_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, s 1, t(2) 4.3027, half 4.3027 / sqrt(3) = 2.4841. Seed 7 has no partner.
    (found,) = differences(LARGER, figures({0: 11, 1: 22, 2: 33, 7: 1}, {0: 10, 1: 20, 2: 30}), COLUMN)
    assert (found["seeds"], found["n"], found["mean"]) == ([0, 1, 2], 3, 2.0)
    assert found["half"] == pytest.approx(2.4841, abs=1e-4)
    assert (found["holds"], found["leans"]) == ("not decided", "yes")
    (alone,) = differences(LARGER, figures({0: 90}, {0: 10}), COLUMN)
    assert (alone["holds"], alone["leans"], alone["half"]) == ("not decided", "yes", None)
    assert differences(LARGER, figures({0: 90}, {1: 10}), COLUMN) == []  # of other seeds
    assert differences(LARGER, {COLUMN: {"A": {"top1": {0: 1.0}}}}, COLUMN) == []
    assert differences(LARGER, {COLUMN._replace(protocol="knn/k200"): {}}, COLUMN._replace(protocol="knn/k200")) == []


def test_bounds() -> None:
    assert verdict(Spread(2.0, 1.0, 3), 0) == "yes"
    assert verdict(Spread(2.0, 1.0, 3), 3.5) == "no"
    assert verdict(Spread(2.0, 1.0, 3), 1.0) == "not decided"  # the lower end lies on the bound, not above it
    assert verdict(Spread(2.0, 0.0, 3), 2.0) == "not decided"
    assert verdict(Spread(-0.3, 0.1, 3), -0.5) == "yes"  # not worse by half a point
    tests = [{"holds": "yes"}, {"holds": "not decided"}]
    assert together(tests[:1]) == "yes"
    assert together(tests) == "not decided"
    assert together([*tests, {"holds": "no"}]) == "no"


def test_the_papers_own_figures_bear_its_claims_out() -> None:
    """What is written down wrongly would show here; what remains is the paper's own."""
    quoted = paper_tables()["table5"].figures[0].quoted
    assert (quoted["CMC"], quoted["MoCo"], quoted["PIRL"]) == ((None, 64.1), (None, 60.6), (63.6, None))
    against = set()
    for claim in claims():
        for name in claim.tables:
            table = paper_tables()[name]
            for pattern, metrics in claim.on.items():
                paper = _beside(table, pattern.replace("*", "")) or _beside(table, pattern.replace("*", "5shot/all"))
                paper = paper or _beside(table, pattern.replace("*", "fair"))
                if not paper:
                    assert name in ("table4", "table5"), claim.says  # where the linear classifier stands in
                for metric in metrics if paper else ():
                    first, second = (_percent(paper, row, metric) for row in claim.rows)
                    if first is not None and second is not None and round(first - second, 1) <= claim.above:
                        against.add((name, *claim.rows, metric, claim.above))
    x2, x3 = ("BoWNet x2", "BoWNet"), ("BoWNet x3", "BoWNet x2")
    assert against == {
        ("table1", *x3, "10-shot", 0),  # 90.4 and 90.4
        ("table2", *x2, "5-shot", 0),  # 67.6 and 67.9
        ("table2", *x2, "10-shot", 0),  # 73.6 and 74.0
        ("table2", *x2, "50-shot", 0),  # 79.9 and 79.9
        ("table2", "BoWNet", "RotNet", "1-shot", 10),  # 48.7 and 40.8
    }
