"""What the paper states of its rows, tested by differences that are paired by seed. Loads no torch.

A claim is "row A minus row B lies above a bound", in points of percent. It holds where the lower end of the 95 %
interval of the mean difference (Student's t over seeds) lies above the bound, it does not where the upper end lies
below it, and else nothing is decided: one seed has no interval, and never decides.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from bowstore.config import Listed, Strict, validate
from bowstore.evaluate.results import PAPER_FOLDER, Column
from bowstore.yaml_file import read_yaml

# Points of percent by column, row, metric and seed.
Figures = Mapping[Column, Mapping[str, Mapping[str, Mapping[int, float]]]]
Verdict = Literal["yes", "no", "not decided"]


class Claim(Strict):
    """One ordering that the paper states."""

    says: str = Field(description="the paper's sentence in short")
    tables: Listed[str]
    rows: Annotated[tuple[str, str], Field(strict=False)] = Field(description="the difference: first minus second")
    on: dict[str, Listed[str]] = Field(description="metrics by pattern of protocol ids")
    above: float = Field(0.0, description="points that the difference is to exceed")
    bound: str | None = Field(None, description="whose bound that is, where it is not 0")


class _Claims(Strict):
    shared: dict[str, Any]
    claims: Listed[Claim]


class Spread(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of all seeds.
        half: half the width of its 95 % interval; None of one seed.
        n: how many seeds.
    """

    mean: float
    half: float | None
    n: int


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, in the order of the file."""
    path = PAPER_FOLDER / "claims.yaml"
    return validate(_Claims, read_yaml(path), str(path)).claims


def spread(values: Sequence[float]) -> Spread:
    """Mean and half the width of its 95 % interval, t s / sqrt(n), s the sample deviation and t Student's."""
    from scipy.special import stdtrit  # a second, for those alone that read a table

    n = len(values)
    if n < 2:
        return Spread(float(np.mean(values)), None, n)
    half = stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n)
    return Spread(float(np.mean(values)), float(half), n)


def verdict(difference: Spread, above: float) -> Verdict:
    """Whether a difference lies above a bound, as far as its seeds can tell."""
    if difference.half is None or abs(difference.mean - above) <= difference.half:
        return "not decided"
    return "yes" if difference.mean > above else "no"


def differences(claim: Claim, figures: Figures, column: Column) -> list[dict[str, Any]]:
    """A claim in one column, metric by metric, as plain values; nothing where a row is not there for any seed."""
    first, second = (figures[column].get(row, {}) for row in claim.rows)
    tests = []
    for metric in _metrics(claim, column):
        seeds = sorted(first.get(metric, {}).keys() & second.get(metric, {}).keys())
        if seeds:
            found = spread([first[metric][seed] - second[metric][seed] for seed in seeds])
            leans = "yes" if found.mean > claim.above else "no"
            holds = verdict(found, claim.above)
            tests.append({"metric": metric, "holds": holds, "leans": leans, "seeds": seeds, **found._asdict()})
    return tests


def _metrics(claim: Claim, column: Column) -> list[str]:
    return [m for pattern, metrics in claim.on.items() if fnmatchcase(column.protocol, pattern) for m in metrics]


def together(tests: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether a claim holds in all of its metrics; it does not if it fails in one."""
    found = {test["holds"] for test in tests}
    return "no" if "no" in found else "yes" if found == {"yes"} else "not decided"
