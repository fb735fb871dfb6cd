"""What a benchmark prints and writes: rates of interleaved rounds, their medians, what they were measured with."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bowstore.environment import library_versions


@dataclass(frozen=True)
class Timing:
    """One thing that was timed.

    Attributes:
        name: what, in a word or two.
        rates: items a second of each round.
        detail: a short remark for the table.
    """

    name: str
    rates: Sequence[float]
    detail: str = ""

    @property
    def median(self) -> float:
        """Median rate of the rounds."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class BenchResult:
    """One benchmark.

    Attributes:
        protocol: id of what was measured, for example "bench/loader".
        device: where it ran.
        inputs: identity of shards and words.
        settings: batch, threads and the like.
        unit: what is counted, for example "images".
        timings: in the order of the table.
        binds: name of the slowest stage, where stages follow each other.
        figures: further single numbers by name.
        notes: sentences below the table.
    """

    protocol: str
    device: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    unit: str
    timings: Sequence[Timing]
    binds: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    version: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        rates = {
            timing.name: {"median": timing.median, "rounds": list(timing.rates), "detail": timing.detail}
            for timing in self.timings
        }
        return {
            "protocol": self.protocol,
            "protocol_version": self.version,
            "device": self.device,
            "inputs": self.inputs,
            "versions": library_versions(),
            **self.settings,
            f"{self.unit}_per_second": rates,
            "binds": self.binds,
            **self.figures,
        }

    def text(self) -> str:
        """A table for people."""
        width = max(24, *(len(timing.name) + 2 for timing in self.timings))
        lines = [f"{self.unit + '/s':{width}}{'median':>10}{'min':>10}{'max':>10}"]
        for timing in self.timings:
            low, high = min(timing.rates), max(timing.rates)
            lines.append(f"{timing.name:{width}}{timing.median:10.0f}{low:10.0f}{high:10.0f}  {timing.detail}".rstrip())
        lines += [f"{name}: {value:.4g}" for name, value in self.figures.items()]
        lines += list(self.notes)
        if self.binds:
            lines.append(f"binds: {self.binds} ({self.device})")
        return "\n".join(lines)
