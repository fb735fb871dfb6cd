"""Runs side by side: their figures by protocol, the paper's below, and which differences exceed their 95 % intervals.

Each share p has an interval: the result's own, where it has one (`INTERVAL` in its details), else, for a share of N
test images, Wilson's. That of a difference is Newcombe's, made of both: for independent samples, so that it is a little
too wide where both were measured on the same images, and never too narrow. Loads no torch.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import hypot, sqrt
from typing import Any, NamedTuple

from bowstore.evaluate.results import (
    INTERVAL,
    Column,
    Result,
    aligned,
    by_column,
    headline,
    markdown_table,
    papers_beside,
)

_Z95 = 1.959963984540054  # of a normal distribution, both tails
_SHARES_OF_IMAGES = ("top1", "top5", "recall")  # beginnings of metrics that are shares of the test images
NO_INTERVAL = "none"
Grid = list[list[str]]


class Estimate(NamedTuple):
    """A share, or a difference of two, with its 95 % interval.

    Attributes:
        value: 0 to 1, or -1 to 1.
        low: lower end; None where there is no interval.
        high: upper end.
        interval: which one it is, for people.
    """

    value: float
    low: float | None = None
    high: float | None = None
    interval: str = NO_INTERVAL

    @property
    def exceeds(self) -> bool | None:
        """Whether a difference lies beyond its interval around 0: whether the interval leaves 0 out."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


def estimate(result: Result, metric: str) -> Estimate:
    """A metric of a result with its interval: the result's own, or that of a share of its test images."""
    share = result.metrics[metric]
    half = result.details.get(INTERVAL, {}).get(metric)
    if half is not None:
        return Estimate(share, share - half, share + half, "the result's own")
    images = result.settings.get("images", {}).get("test")
    if images and metric.startswith(_SHARES_OF_IMAGES):
        return Estimate(share, *_wilson(share, images), f"binomial, N = {images}")
    return Estimate(share)


def difference(one: Estimate, base: Estimate) -> Estimate:
    """One share minus another, with Newcombe's interval (1998, method 10) of independent samples."""
    value = one.value - base.value
    if one.low is None or one.high is None or base.low is None or base.high is None:
        return Estimate(value)
    low = value - hypot(one.value - one.low, base.high - base.value)
    high = value + hypot(one.high - one.value, base.value - base.low)
    kinds = dict.fromkeys((base.interval, one.interval))
    return Estimate(value, low, high, " and ".join(kinds))


def _wilson(share: float, images: int) -> tuple[float, float]:
    """Wilson's score interval of a share of so many images."""
    weight = _Z95**2 / images
    middle = (share + weight / 2) / (1 + weight)
    half = _Z95 * sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    return middle - half, middle + half


def side_by_side(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The results of several runs as plain values, a part for each protocol, version and set of test images.

    Differences are to the first run of each part. Figures are percent, differences points of percent.

    Args:
        results: of each run, by its name.

    Raises:
        DataError: a run has two results of one protocol, version and set of test images.
    """
    columns = by_column(results)
    parts = [_part(column, columns[column]) for column in sorted(columns)]
    alone = len(results) > 1 and all(len(rows) < 2 for rows in columns.values())
    remarks = ["no two of them have a protocol, version and set of test images in common"] if alone else []
    return {"runs": list(results), "parts": parts, "remarks": remarks}


def _part(column: Column, rows: Mapping[str, Result]) -> dict[str, Any]:
    first, *others = rows
    metrics = list(dict.fromkeys(metric for result in rows.values() for metric in result.metrics))
    found = {run: {m: estimate(result, m) for m in result.metrics} for run, result in rows.items()}
    trained = [run for run in others if rows[run].inputs.get("train") != rows[first].inputs.get("train")]
    remarks = [f"{', '.join(trained)}: trained on other images than {first}"] if trained else []
    return {
        **column._asdict(),
        "headline": headline(rows[first]),
        "metrics": metrics,
        "rows": {run: {m: _plain(one) for m, one in shares.items()} for run, shares in found.items()},
        "differences": [
            {"run": run, "minus": first, "metric": m, **_plain(apart), "exceeds": apart.exceeds}
            for run in others
            for m in metrics
            if m in found[run] and m in found[first]
            for apart in [difference(found[run][m], found[first][m])]
        ],
        "paper": [
            {"system": system, "percent": {m: p for m, p in percent.items() if m in metrics}, "source": source}
            for system, percent, source in papers_beside(rows[first])
        ],
        "remarks": remarks,
    }


def _plain(found: Estimate) -> dict[str, Any]:
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return {"percent": 100 * found.value, "low": low, "high": high, "interval": found.interval}


# --- shown


def text(value: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    return _shown(value, "", _aligned)


def _aligned(grid: Grid) -> str:
    return aligned(grid, left=(0, *([] if grid[0][-1] else [len(grid[0]) - 1])))


def markdown(value: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    return _shown(value, "## ", markdown_table)


def as_csv(value: Mapping[str, Any]) -> str:
    """A line for each figure, with its difference to the first run's; the paper's figures follow."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ["low", "high", "interval"]
    head = "protocol version test_images metric run percent".split()
    writer.writerow([*head, *ends, "minus", "difference", *(f"difference_{end}" for end in ends), "exceeds", "source"])
    for part in value["parts"]:
        where = [part["protocol"], part["version"], part["tested_on"]]
        apart = {(it["run"], it["metric"]): it for it in part["differences"]}
        for metric in part["metrics"]:
            for run, shares in part["rows"].items():
                if metric in shares:
                    ours, its = shares[metric], apart.get((run, metric), {})
                    line = [its.get(key) for key in ("minus", "percent", *ends, "exceeds")]
                    writer.writerow([*where, metric, run, ours["percent"], *(ours[end] for end in ends), *line, None])
            for paper in part["paper"]:
                if paper["percent"].get(metric) is not None:
                    row = [f"paper: {paper['system']}", paper["percent"][metric]]
                    writer.writerow([*where, metric, *row, *[None] * 9, paper["source"]])
    return out.getvalue().rstrip("\n")


def _shown(value: Mapping[str, Any], mark: str, table: Callable[[Grid], str]) -> str:
    lines = []
    for part in value["parts"]:
        heading = f"{mark}{part['protocol']} v{part['version']} on {part['tested_on']}"
        lines += [heading, "", table(_grid(part)), "", *(f"{line}\n" for line in _legend(part))]
    return "\n".join([*lines, *value["remarks"]]).rstrip("\n")


def _grid(part: Mapping[str, Any]) -> Grid:
    metrics, source = part["metrics"], [""] if part["paper"] else []
    grid = [["percent", *metrics, *source]]
    for run, shares in part["rows"].items():
        grid.append([run, *(_figure(shares.get(metric)) for metric in metrics), *source])
    apart = {(it["run"], it["minus"], it["metric"]): it for it in part["differences"]}
    for run, first in dict.fromkeys((one, other) for one, other, _ in apart):
        figures = [_figure(apart.get((run, first, metric)), "+") for metric in metrics]
        grid.append([f"{run} - {first}", *figures, *source])
    for paper in part["paper"]:
        said = [paper["percent"].get(metric) for metric in metrics]
        grid.append([f"paper: {paper['system']}", *("-" if p is None else f"{p:.1f}" for p in said), paper["source"]])
    return grid


def _figure(found: Mapping[str, Any] | None, sign: str = "") -> str:
    """A figure with half the width of its interval; a star where a difference exceeds it."""
    if found is None:
        return "-"
    half = "" if found["low"] is None else f" ± {(found['high'] - found['low']) / 2:.2f}"
    return f"{found['percent']:{sign}.2f}{half}" + (" *" if found.get("exceeds") else "")


def _legend(part: Mapping[str, Any]) -> Iterator[str]:
    """Which intervals there are, what the star means, and what else a reader has to know."""
    shares = [(metric, one["interval"]) for row in part["rows"].values() for metric, one in row.items()]
    kinds = dict.fromkeys(kind for _, kind in shares if kind != NO_INTERVAL)
    lines = [f"±: half the 95 % interval ({'; '.join(kinds)})."] if kinds else []
    if any(it["exceeds"] is not None for it in part["differences"]):
        lines.append("*: a difference that exceeds its interval; one without a star does not.")
    if without := dict.fromkeys(metric for metric, kind in shares if kind == NO_INTERVAL):
        lines.append(f"No interval is known of {', '.join(without)}.")
    yield " ".join(lines)
    yield from part["remarks"]
