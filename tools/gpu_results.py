"""What a GPU check found: a line of JSON a figure, written at once, and the table that is made of them."""

import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = "results.jsonl"
TABLE = "table.txt"
_BAD = ("failed", "crashed", "hung")


class Bound(NamedTuple):
    """What a figure has to reach (design, section 3).

    Attributes:
        sign: ">=" or "<=".
        value: to reach.
        goal: to reach later.
        h100: it is one of an H100 with 16 cores, no ratio, and is not asked of other GPUs.
    """

    sign: str
    value: float
    goal: float | None = None
    h100: bool = False

    def met(self, median: float) -> bool:
        """Whether a median reaches it."""
        return median >= self.value if self.sign == ">=" else median <= self.value

    def text(self) -> str:
        """Short, for the table."""
        return f"{self.sign} {self.value:g}" + (f", then {self.goal:g}" if self.goal is not None else "")


BOUNDS = {
    "assign images/s": Bound(">=", 50_000, h100=True),
    "words unlike float32's": Bound("<=", 1e-3),
    "words unlike FAISS's": Bound("<=", 1e-3),
    "k-means s, 25 iterations": Bound("<=", 60, 15, h100=True),
    "training images/s": Bound(">=", 3500, 5000, h100=True),
    "targets, share of the step": Bound("<=", 0.005),
    "over the teacher in the loop": Bound(">=", 1.25),
    "loader images/s": Bound(">=", 7000, h100=True),
    "with the loader over resident": Bound(">=", 0.97),
    "encode over decoding, bfloat16": Bound(">=", 0.9),
}


@dataclass
class Results:
    """The file that all processes of a check append to.

    Attributes:
        folder: of the check.
        run: when it began; lines of one run belong together.
        toy: figures of toy sizes on a CPU, which mean nothing.
        about: device, versions and the like, that go with every figure.
    """

    folder: Path
    run: str
    toy: bool
    about: dict[str, Any] = field(default_factory=dict)

    def figure(self, section: str, name: str, values: Sequence[float], unit: str = "", note: str = "") -> None:
        """Add rates, ratios or seconds of the rounds; the median counts."""
        bound, median = BOUNDS.get(name), statistics.median(values)
        met = None
        if bound and not self.toy and not (bound.h100 and not self._is_h100()):
            met = bound.met(median)
        self._line(
            kind="figure", section=section, figure=name, unit=unit, values=[float(value) for value in values],
            n=len(values), median=median, low=min(values), high=max(values),
            bound=bound.text() if bound else "", met=met, note=note,
        )  # fmt: skip

    def claim(self, section: str, name: str, holds: bool | None, note: str = "") -> None:
        """Add a statement that holds or does not; None for one that no bound is set on, told by the note."""
        self._line(kind="claim", section=section, figure=name, met=holds, note=note)

    def section(self, name: str, status: str, why: str = "", **more: Any) -> None:
        """Add how a section ended: passed, failed, crashed, hung, cut short (the time was over), skipped or dropped."""
        self._line(kind="section", section=name, status=status, why=why, **more)

    def _is_h100(self) -> bool:
        return any(name in str(self.about.get("device")) for name in ("H100", "H200"))

    def _line(self, **values: Any) -> None:
        line = {"run": self.run, "time": time.time(), "toy": self.toy, **values, **self.about}
        data = (json.dumps(line) + "\n").encode()
        descriptor = os.open(self.folder / RESULTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, data)  # one call: lines of several processes do not mix
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines of a results file; one that a killed process cut off is left out."""
    found = []
    for text in (folder / RESULTS).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def latest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every section what its last run gave, of every figure the last line; no toys where anything else is there."""
    kept = list(lines)
    if any(not line["toy"] for line in kept):
        kept = [line for line in kept if not line["toy"]]
    ran = {line["section"]: line["run"] for line in kept if line.get("status") not in ("skipped", "dropped")}
    told = {line["section"]: line["run"] for line in kept}
    kept = [line for line in kept if line["run"] == ran.get(line["section"], told[line["section"]])]
    last = {(line["section"], line.get("figure")): line for line in kept}
    return [line for line in kept if line is last[line["section"], line.get("figure")]]


def failures(lines: Iterable[dict[str, Any]]) -> list[str]:
    """What went wrong: sections that failed, claims that do not hold, figures that miss their bound."""
    found = []
    for line in lines:
        if line["kind"] == "section" and line["status"] in _BAD:
            found.append(f"{line['section']} {line['status']} ({line['why']})")
        elif line.get("met") is False:
            what = f"{line['median']:.4g}, bound {line['bound']}" if line["kind"] == "figure" else line["note"]
            found.append(f"{line['section']}: {line['figure']} ({what})")
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The table for people: heads, a line a figure in its section's place, and what went wrong."""
    if not lines:
        return "nothing has run\n"
    out = _heads(lines)
    columns = f"{'section':11}{'figure':34}{'median':>10} {'unit':9}{'bound':18}{'met':5}{'n':>3}{'spread':>8}"
    out += ["", columns, "-" * len(columns)]
    for name in dict.fromkeys(line["section"] for line in lines):
        own = [line for line in lines if line["section"] == name]
        out += [_row(line) for line in own if line["kind"] != "section"]
        out += [_end(line) for line in own if line["kind"] == "section"]
    wrong = failures(lines)
    out += ["", f"{len(wrong)} failures" if wrong else "no failures", *(f"  {what}" for what in wrong)]
    return "\n".join(out) + "\n"


def _heads(lines: Sequence[dict[str, Any]]) -> list[str]:
    heads = []
    for run in dict.fromkeys(line["run"] for line in lines):
        last = [line for line in lines if line["run"] == run][-1]
        versions = ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
        heads += [f"{run}: {last.get('device')}", f"  {versions}", f"  {last.get('command')}"]
    if lines[0]["toy"]:
        heads.insert(0, "dry run on the CPU at toy size: figures mean nothing, but that every section runs")
    return heads


def _row(line: dict[str, Any]) -> str:
    met = {True: "yes", False: "NO", None: ""}[line["met"]]
    if line["kind"] == "claim":
        return f"{line['section']:11}{line['figure']:34}{met:>10}  {line['note']}".rstrip()
    spread = (line["high"] - line["low"]) / abs(line["median"]) if line["median"] else 0.0
    return (
        f"{line['section']:11}{line['figure']:34}{line['median']:10.4g} {line['unit']:9}{line['bound']:18}{met:5}"
        f"{line['n']:3}{100 * spread:7.1f}%  {line['note']}"
    ).rstrip()


def _end(line: dict[str, Any]) -> str:
    status = line["status"].upper() if line["status"] in _BAD else line["status"]
    seconds = f" in {line['seconds']:.0f} s" if "seconds" in line else ""
    return f"{line['section']:11}{status}{seconds}{': ' + line['why'] if line['why'] else ''}"
