"""A table of the paper beside the figures measured here: as plain values, and as text. Loads no torch."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from bowstore.errors import DataError
from bowstore.evaluate.claims import Figures, claims, differences, spread, together
from bowstore.evaluate.results import (
    Column,
    PaperFigures,
    PaperTable,
    Result,
    aligned,
    column_of,
    markdown_table,
    paper_figures,
    paper_tables,
)

Measured = Mapping[int, Mapping[str, Sequence[Result]]]  # results by seed and row
Grid = list[list[str]]


def figures_of(measured: Measured) -> Figures:
    """Points of percent by column, row, metric and seed: what differs in protocol, version or images is never mixed.

    Raises:
        DataError: a row has two results of one seed that belong into the same column.
    """
    figures: dict[Column, dict[str, dict[str, dict[int, float]]]] = {}
    for seed, rows in measured.items():
        for row, results in rows.items():
            for result in results:
                metrics = figures.setdefault(column_of(result), {}).setdefault(row, {})
                if any(seed in values for values in metrics.values()):
                    raise DataError(
                        f"row {row!r}, seed {seed}: two results of {result.protocol} on the same images; the recipe "
                        "evaluates two stages under one name: rename one"
                    )
                for metric, share in result.metrics.items():
                    metrics.setdefault(metric, {})[seed] = 100 * share
    return figures


def summary(name: str, measured: Measured, *, images: Mapping[str, str], absent: Mapping[str, str]) -> dict[str, Any]:
    """A table's figures, the paper's beside them, and whether its claims hold here, as plain values.

    Args:
        name: table1 to table6.
        measured: results by seed and row.
        images: what test images are, by the name that their column has.
        absent: why rows are not there, by row.
    """
    table, figures = paper_tables()[name], figures_of(measured)
    why = {**{row: f"quoted only: {reason}" for row, reason in table.quoted.items()}, **absent}
    beside = {column: _beside(table, column.protocol) for column in sorted(figures)}
    shown = [paper.percent for paper in beside.values() if paper]
    unseen = [paper for paper in table.figures if paper.percent not in shown]
    unseen = [paper for at, paper in enumerate(unseen) if paper.percent not in [it.percent for it in unseen[:at]]]
    parts = [_part(table, paper, column, figures, images, why) for column, paper in beside.items()]
    return {
        "table": name,
        "title": table.title,
        "seeds": sorted(measured),
        "parts": parts + [_part(table, paper, None, figures, images, why) for paper in unseen],
        "claims": list(_claims(name, table, figures, images, why)),
        "absent": why,
    }


def _patterns(paper: PaperFigures) -> list[str]:
    return [paper.protocol, *([paper.like] if paper.like else [])]


def _beside(table: PaperTable, protocol: str) -> PaperFigures | None:
    """The paper's figures of this measure; those of exactly this protocol before those of one like it."""
    fits = [(p, f) for f in table.figures for p in _patterns(f) if fnmatchcase(protocol, p)]
    return next((f for p, f in fits if p == f.protocol), fits[0][1] if fits else None)


def _percent(paper: PaperFigures, row: str, metric: str) -> float | None:
    """The paper's figure, of whichever of its tables has the row on the same data."""
    for other in (paper, *paper_figures()):
        if (other.protocol, other.dataset) == (paper.protocol, paper.dataset):
            values = {**other.percent, **other.quoted}.get(row)
            if values and metric in other.metrics:
                return values[other.metrics.index(metric)]
    return None


def _part(
    table: PaperTable,
    paper: PaperFigures | None,
    column: Column | None,
    figures: Figures,
    images: Mapping[str, str],
    why: Mapping[str, str],
) -> dict[str, Any]:
    """One protocol, version and set of images: each row's figures, and the paper's of the same measure."""
    rows = figures[column] if column else {}
    others = {row for it in figures if it != column and _beside(table, it.protocol) is paper for row in figures[it]}
    metrics = list(dict.fromkeys(m for row in rows.values() for m in row)) or list(paper.metrics if paper else ())
    known = [m for m in metrics if paper and m in paper.metrics]
    lines = []
    for row in dict.fromkeys([*(table.rows if paper else ()), *rows]):
        said = {m: p for m in known if paper and (p := _percent(paper, row, m)) is not None}
        ours = {
            m: {**spread(list(values.values()))._asdict(), "by_seed": {str(s): values[s] for s in sorted(values)}}
            for m, values in rows.get(row, {}).items()
        }
        if ours or (said and row not in others):
            lines.append({"row": row, "here": ours, "paper": said, "absent": "" if ours else why.get(row, "not run")})
    same = column and paper and column.tested_on == paper.dataset and fnmatchcase(column.protocol, paper.protocol)
    theirs = {key: getattr(paper, key) for key in ("protocol", "dataset", "source")} if known else {}
    return {
        "here": column and {**column._asdict(), "images": images.get(column.tested_on, column.tested_on)},
        "paper": {**theirs, "metrics": known, "comparable": bool(same)} if known else None,
        "metrics": metrics,
        "rows": lines,
    }


def _claims(
    name: str, table: PaperTable, figures: Figures, images: Mapping[str, str], why: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Each claim of the table, once for each column group in which it can be tested, or once with why it cannot."""
    for claim in claims():
        if name not in claim.tables:
            continue
        found: dict[str, list[dict[str, Any]]] = {}
        for column in sorted(figures):
            paper = _beside(table, column.protocol)
            for test in differences(claim, figures, column):
                ends = [_percent(paper, row, test["metric"]) if paper else None for row in claim.rows]
                theirs = None if None in ends else round(ends[0] - ends[1], 1)  # type: ignore[operator]
                found.setdefault(images.get(column.tested_on, column.tested_on), []).append(
                    {**test, "protocol": column.protocol, "version": column.version, "paper": theirs}
                )
        said = {"says": claim.says, "rows": list(claim.rows), "above": claim.above, "bound": claim.bound}
        for tested_on, tests in found.items():
            yield {**said, "images": tested_on, "holds": together(tests), "tests": tests}
        if not found:
            reasons = [f"{row}: {why[row]}" for row in claim.rows if row in why]
            reasons = reasons or [f"no figures of both rows under {' or '.join(claim.on)} yet"]
            yield {**said, "images": None, "holds": "not tested", "why": "; ".join(reasons), "tests": []}


# --- shown


def text(value: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    lines = _title(value)
    for heading, grid in _sections(value):
        lines += ["", heading, "", aligned(grid, left=(0, *([1] if grid[0][1] == "claim" else []), len(grid[0]) - 1))]
    return "\n".join([*lines, "", *_remarks(value)])


def markdown(value: Mapping[str, Any]) -> str:
    """The table for docs/results."""
    lines = [f"# {_title(value)[0]}", "", _title(value)[1]]
    for heading, grid in _sections(value):
        lines += ["", heading, "", markdown_table(grid)]
    return "\n".join([*lines, "", *(f"- {line}" for line in _remarks(value))])


def as_csv(value: Mapping[str, Any]) -> str:
    """A line for each figure: of each row, metric and column, with the figure of each seed."""
    seeds = [str(seed) for seed in value["seeds"]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "table row protocol version test_images metric n mean half_interval95".split()
    writer.writerow([*head, *(f"seed_{s}" for s in seeds), "paper", "paper_dataset", "comparable", "absent"])
    for part in value["parts"]:
        here, paper = part["here"] or {}, part["paper"] or {}
        where = [here.get("protocol"), here.get("version"), here.get("tested_on")]
        for row in part["rows"]:
            for metric in part["metrics"]:
                found = row["here"].get(metric, {})
                ours = [found.get("n", 0), found.get("mean"), found.get("half")]
                each = [found.get("by_seed", {}).get(s) for s in seeds]
                said = [row["paper"].get(metric), paper.get("dataset"), paper.get("comparable"), row["absent"]]
                writer.writerow([value["table"], row["row"], *where, metric, *ours, *each, *said])
    return out.getvalue().rstrip("\n")


def _title(value: Mapping[str, Any]) -> list[str]:
    """The paper's title, and what is here."""
    seeds = ", ".join(map(str, value["seeds"])) or "none yet"
    here = f"{value['here'] or value['recipe']}; seeds {seeds}; mean ± half the 95 % interval, in percent"
    return [f"Table {value['table'].removeprefix('table')}: {value['title']}", f"Here: {here}"]


def _sections(value: Mapping[str, Any]) -> Iterator[tuple[str, Grid]]:
    for part in value["parts"]:
        yield _heading(part), _figures(part)
    if value["claims"]:
        counts = Counter(claim["holds"] for claim in value["claims"])
        found = ", ".join(f"{counts[holds]} {holds}" for holds in ("yes", "no", "not decided", "not tested"))
        heading = f"What the paper states, and whether it holds here ({found}): differences paired by seed, in points"
        yield heading, _claim_grid(value["claims"])


def _heading(part: Mapping[str, Any]) -> str:
    here, paper = part["here"], part["paper"]
    ours = f"{here['protocol']} v{here['version']} on {here['images']}" if here else f"{paper['protocol']}: not run"
    if not paper:
        return f"{ours}; the paper has no such figures"
    order = "" if paper["comparable"] or not here else ", other images: compare the order of rows, not the figures"
    return f"{ours}; paper: {paper['source']}, {paper['dataset']}{order}"


def _figures(part: Mapping[str, Any]) -> Grid:
    metrics, known = part["metrics"] if part["here"] else [], part["paper"]["metrics"] if part["paper"] else []
    grid = [["", *metrics, *(["n"] if metrics else []), *(f"paper {m}" for m in known), ""]]
    for row in part["rows"]:
        ours = [_shown(row["here"].get(m)) for m in metrics]
        n = max((found["n"] for found in row["here"].values()), default=0)
        theirs = [f"{row['paper'][m]:.1f}" if m in row["paper"] else "-" for m in known]
        grid.append(
            [row["row"], *ours, *([str(n or "-")] if metrics else []), *theirs, row["absent"].partition(":")[0]]
        )
    return grid


def _shown(found: Mapping[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "-"
    return f"{found['mean']:{sign}.2f}" + ("" if found["half"] is None else f" ± {found['half']:.2f}")


def _claim_grid(claimed: Sequence[Mapping[str, Any]]) -> Grid:
    grid = [["holds", "claim", "here", "n", "paper", "if above"]]
    several = len({claim["images"] for claim in claimed} - {None}) > 1
    for claim in claimed:
        where = f", on {claim['images']}" if several and claim["images"] else ""
        bound = f"{claim['above']:g}{f' ({it})' if (it := claim['bound']) else ''}"
        grid.append([claim["holds"], f"{claim['says']}{where}", "", "", "", bound])
        for test in claim["tests"]:
            lean = f", leans {test['leans']}" if test["holds"] == "not decided" else ""
            paper = "-" if test["paper"] is None else f"{test['paper']:+.1f}"
            ours = [_shown(test, "+"), str(test["n"]), paper]
            grid.append([f"  {test['holds']}{lean}", f"  {test['metric']}", *ours, ""])
    return grid


def _remarks(value: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know beside the figures."""
    if any(test["n"] < 3 for claim in value["claims"] for test in claim["tests"]):
        yield "Fewer than three seeds decide little, and one decides nothing: --seeds 0,1,2"
    for row, reason in value["absent"].items():
        yield f"{row}: {reason}"
    yield from value.get("remarks", ())
