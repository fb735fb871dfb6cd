"""The process of one section of a GPU check (gpu_check.py starts it), and what a section is given."""

import faulthandler
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_plan import Scale
from gpu_results import Results

if TYPE_CHECKING:
    import torch

    from bowstore.benchmarks.result import BenchResult

T = TypeVar("T")
MISSING = 77  # exit code of a section that found a library missing which its plan does not name


@dataclass(frozen=True)
class Check:
    """What a section is given.

    Attributes:
        section: its name.
        scale: full, short, or toy for a dry run on the CPU.
        kind: of the device, cpu or cuda.
        results: where its figures go.
        scratch: a folder that all sections share, for shards and stores.
        photographs: a folder or tar of JPEGs, if there is one.
        data: a folder or tar of labelled images, if there is one.
    """

    section: str
    scale: Scale
    kind: str
    results: Results
    scratch: Path
    photographs: Path | None = None
    data: Path | None = None

    @property
    def device(self) -> "torch.device":
        """Where it runs."""
        import torch

        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device(self.kind)

    @property
    def toy(self) -> bool:
        """Whether this is a dry run."""
        return self.scale == "toy"

    def size(self, full: T, short: T, toy: T) -> T:
        """One of three, by the scale."""
        return {"full": full, "short": short, "toy": toy}[self.scale]

    def figure(self, name: str, *values: float, unit: str = "", note: str = "") -> None:
        """Record a figure of one or several rounds, at once."""
        print(f"{name}: {', '.join(f'{value:.4g}' for value in values)} {unit} {note}".rstrip())
        self.results.figure(self.section, name, values, unit, note)

    def claim(self, name: str, holds: bool | None, note: str = "") -> None:
        """Record something that holds or does not; None for what is only told."""
        print(f"{name}: {holds} {note}".rstrip())
        self.results.claim(self.section, name, holds, note)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Record every timing of interleaved rounds in the block at once, in seconds, until the rates replace them."""
        from bowstore.benchmarks.rounds import heard_by

        with heard_by(lambda name, seconds: self.results.figure(self.section, name, seconds, "s")):
            yield

    def bench(self, result: "BenchResult", prefix: str = "") -> None:
        """Record all rates of a benchmark, and print its table into the log."""
        print(result.text())
        for timing in result.timings:
            self.results.figure(
                self.section, prefix + timing.name, list(timing.rates), f"{result.unit}/s", timing.detail
            )


def probe(setting: str) -> dict[str, Any]:
    """Device and versions.

    Raises:
        BowstoreError: the device cannot be used.
    """
    from bowstore.environment import choose_device, cores, device_name, library_versions

    device = choose_device(setting)
    return {"device": f"{device_name(device)}, {cores()} cores", "versions": library_versions()}


def run(order: dict[str, Any]) -> None:
    """Do what gpu_check.py orders."""
    toy = order["scale"] == "toy"
    check = Check(
        order["section"],
        order["scale"],
        "cpu" if toy else "cuda",
        Results(Path(order["out"]), order["run"], toy, order["about"]),
        Path(order["scratch"]),
        Path(order["photographs"]) if order["photographs"] else None,
        Path(order["data"]) if order["data"] else None,
    )
    getattr(import_module(order["room"]), check.section)(check)


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        from bowstore.errors import BowstoreError

        try:
            print(json.dumps(probe(sys.argv[2])))
        except BowstoreError as error:
            raise SystemExit(str(error).replace(", or ask for cpu", ", or leave it out with --dry-run")) from error
    else:
        given = json.loads(sys.argv[1])
        faulthandler.enable()
        faulthandler.dump_traceback_later(max(1.0, given["limit"] - 3))
        try:
            run(given)
        except ModuleNotFoundError as error:
            traceback.print_exc()
            if (error.name or "").startswith(("bowstore", "gpu_")):
                raise SystemExit(1) from error
            print(f"no {error.name}")
            raise SystemExit(MISSING) from error
