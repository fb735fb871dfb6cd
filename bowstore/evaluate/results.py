"""Result files of evaluations, and the tables that show them. Loads no torch.

One owner for one rule: numbers of different protocols, versions or test images never share a column.
A protocol's version grows whenever the numbers it gives for the same weights and images can change.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from bowstore.config import Listed, Strict, dump, validate
from bowstore.errors import CorruptError, DataError, MissingError
from bowstore.files import make_folder, read_json, write_json
from bowstore.progress import say
from bowstore.runs import result_path, weights_sha256
from bowstore.yaml_file import read_yaml

INTERVAL = "interval95"  # in details: by metric, half the width of its 95 % interval, where there is one
PAPER_FOLDER = Path(__file__).parent / "paper"
Finite = Annotated[float, Field(allow_inf_nan=False)]
_OLD_HEADLINE = "map_best"  # of files from before they named their headline; of others among them it was the first


class Result(Strict):
    """One evaluation, as its file holds it."""

    protocol: str = Field(description="protocol id")
    protocol_version: int
    headline: str | None = Field(default=None, description="the metric that stands for all in a comparison")
    metrics: Annotated[dict[str, Finite], Field(min_length=1)] = Field(
        description="shares between 0 and 1; the headline metric is among them"
    )
    settings: dict[str, Any] = Field(description="everything that was set, as plain values")
    inputs: dict[str, str | None] = Field(
        description="fingerprints of train and test, weights_sha256, run, and dataset if it is a paper's"
    )
    details: dict[str, Any] = Field(default_factory=dict, description="curves, scores by class, chosen costs")
    versions: dict[str, str]
    device: str
    created: str = Field(description="UTC, ISO 8601")
    seconds: Finite = Field(description="wall clock of the evaluation")

    @model_validator(mode="after")
    def _has_headline(self) -> Self:
        if self.headline is not None and self.headline not in self.metrics:
            raise ValueError(f"no headline metric {self.headline!r} among {', '.join(self.metrics)}")
        return self


class PaperFigures(Strict):
    """Rows of the paper that compare with a protocol on one data set.

    Attributes:
        protocol: id, or a pattern of ids whose metrics of one name are the same thing.
        dataset: name, as in `DataSets.dataset`.
        source: table and network.
        metrics: names of the columns.
        percent: figures by system; null where the paper has none.
        quoted: the same of systems that do not compare, by their network or their way of testing.
        like: a pattern of ids, too: the same measure on other images, beside which `reproduce` shows the order of rows.
    """

    protocol: str
    dataset: str
    source: str
    metrics: Listed[str]
    percent: dict[str, Listed[float | None]]
    quoted: dict[str, Listed[float | None]] = Field({})
    like: str | None = None


class PaperTable(Strict):
    """A table of the paper: a file of `paper/`.

    Attributes:
        title: what it shows.
        rows: systems in the paper's order, those of other tables' figures too.
        quoted: systems that no recipe makes, and why.
        figures: in parts by protocol.
    """

    title: str
    rows: Listed[str]
    quoted: dict[str, str] = Field({})
    figures: Listed[PaperFigures]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """The tables by the name of their file: table1 to table6."""
    paths = sorted(PAPER_FOLDER.glob("table*.yaml"))
    return {path.stem: validate(PaperTable, read_yaml(path), str(path)) for path in paths}


def paper_figures() -> tuple[PaperFigures, ...]:
    """All figures of the paper, table by table."""
    return tuple(figures for table in paper_tables().values() for figures in table.figures)


def write_result(run: Path, result: Result) -> Path:
    """Write `result` into its place in a run directory, atomically; return the place.

    One of other test images or of another version, which it does not replace, is kept beside it with a line; one of
    the same that was kept so is replaced.
    """
    path = result_path(run, result.protocol)
    make_folder(path.parent)
    try:
        before = read_result(path)
    except (MissingError, CorruptError):
        before = result
    if column_of(before) != column_of(result):
        _, version, tested_on = column_of(before)
        kept = _kept_beside(path, before)
        path.replace(kept)
        say(f"{path.name} was of other test images or another version ({tested_on}, v{version}): kept as {kept.name}")
    write_json(path, dump(result))
    _kept_beside(path, result).unlink(missing_ok=True)
    return path


def _kept_beside(path: Path, result: Result) -> Path:
    _, version, tested_on = column_of(result)
    return path.with_name(f"{path.stem}-v{version}-{tested_on}.json")


class Column(NamedTuple):
    """Where a figure belongs in a table: protocol id, its version, and the test images."""

    protocol: str
    version: int
    tested_on: str


def column_of(result: Result) -> Column:
    """Where a result's figures belong."""
    tested_on = result.inputs.get("dataset") or (result.inputs.get("test") or "unknown")[:8]
    return Column(result.protocol, result.protocol_version, tested_on)


def read_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        MissingError: no such file.
        CorruptError: not a result file; the message names the first key that is wrong.
    """
    value = read_json(path)
    try:
        return Result.model_validate(value)
    except ValidationError as error:
        raise CorruptError(f"{path} is not a result file ({_problem(error)}); remove it and evaluate again") from error


def results_of(paths: Sequence[Path]) -> list[Result]:
    """The results of one network, from `runs.result_paths`; a warning names those of other weights than it has now."""
    results = [read_result(path) for path in paths]
    run = paths[0].parents[1]
    now = weights_sha256(run)  # of a finished run
    for path, result in zip(paths, results, strict=True):
        if now and result.inputs.get("weights_sha256", now) != now:
            say(f"warning: {path} is of other weights than {run} has now; evaluate it again, or move the file away")
    return results


def made_result(**values: Any) -> Result:
    """A result of what a protocol gave; NumPy's values become plain ones, so that it equals its file.

    Raises:
        DataError: what no file can hold: metrics that are no finite numbers, no headline, details of other types.
    """
    try:
        return Result.model_validate(json.loads(json.dumps(values, default=_plain)))
    except ValidationError as error:
        problem = _problem(error)
    except (TypeError, ValueError) as error:  # a value or a key that JSON has not
        problem = str(error)
    raise DataError(
        f"{values['protocol']} gives no result ({problem}); look at the images of each class, or correct the protocol"
    )


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    given = "" if isinstance(first["input"], dict | list) else f" (got {first['input']})"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{given}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value")


def result_table(result: Result, name: str = "this run") -> str:
    """Metrics in percent, with the paper's rows below where there are comparable ones; plain aligned text.

    Args:
        result: the measurement.
        name: what its row is called.
    """
    metrics = list(result.metrics)
    halves = {metric: f" ± {_percent(half)}" for metric, half in result.details.get(INTERVAL, {}).items()}
    found = [_percent(share) + halves.get(metric, "") for metric, share in result.metrics.items()]
    rows = [["percent", *metrics, ""], [name, *found, result.device]]
    for system, known, source in papers_beside(result):
        figures = [_figure(known.get(metric), halves.get(metric, "")) for metric in metrics]
        rows.append([f"paper: {system}", *figures, source])
    return f"{result.protocol} v{result.protocol_version}\n{aligned(rows, left=(0, len(metrics) + 1))}"


def papers_beside(result: Result) -> Iterator[tuple[str, dict[str, float | None], str]]:
    """The paper's rows that compare with a result: system, percent by metric, and their source."""
    for paper in paper_figures():
        if paper.dataset == result.inputs.get("dataset") and fnmatchcase(result.protocol, paper.protocol):
            for system, percent in paper.percent.items():
                yield system, dict(zip(paper.metrics, percent, strict=True)), paper.source


def by_column(results: Mapping[str, Sequence[Result]]) -> dict[Column, dict[str, Result]]:
    """The results of several runs, by the run's name, in columns: each holds one result of a run.

    Raises:
        DataError: a run has two results that belong into the same cell.
    """
    columns: dict[Column, dict[str, Result]] = {}
    for run, measured in results.items():
        for result in measured:
            cells = columns.setdefault(column_of(result), {})
            if run in cells:
                protocol, version, tested_on = column_of(result)
                raise DataError(
                    f"run {run} has two results of {protocol} v{version} on {tested_on}; move one of the two files away"
                )
            cells[run] = result
    return columns


def comparison_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Headline metrics of several runs, one column for each protocol, version and set of test images.

    Args:
        results: the results of each run, by the run's name.

    Raises:
        DataError: as `by_column`.
    """
    columns = by_column(results)
    keys = sorted(columns)

    def cell(column: Column, run: str) -> str:
        result = columns[column].get(run)
        return _percent(result.metrics[headline(result)]) if result else "-"

    rows = [
        ["protocol", *(f"{protocol} v{version}" for protocol, version, _ in keys)],
        ["test images", *(tested_on for _, _, tested_on in keys)],
        *([run, *(cell(key, run) for key in keys)] for run in results),
    ]
    return aligned(rows)


def headline(result: Result) -> str:
    """The metric that stands for a result in a comparison."""
    named = result.headline or _OLD_HEADLINE
    return named if named in result.metrics else next(iter(result.metrics))


def _figure(percent: float | None, behind: str) -> str:
    """A figure of the paper, its point below that of a share with two digits and what stands behind it."""
    return "-" if percent is None else f"{percent:.1f} {' ' * len(behind)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Columns padded to their widest cell, to the right except for the columns of text in `left`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose first row is its head."""
    lines = [f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
