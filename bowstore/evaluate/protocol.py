"""Protocol ids, result files, and the tables that show them.

One owner for one rule: numbers of different protocols, versions or test images never share a column.
A protocol's version grows whenever the numbers it gives for the same weights and images can change.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from bowstore.config import Strict, dump
from bowstore.environment import device_name, library_versions
from bowstore.errors import CorruptError, DataError, UsageError
from bowstore.files import make_folder, read_json, write_json
from bowstore.runs import result_path, result_paths

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a number means.

    Attributes:
        id: name with a slash, for example "voc07-svm/fair".
        version: grows when the same weights and images can give other numbers.
        description: one line.
        headline: the metric that stands for the protocol in a comparison.
        stated: what the source fixes, by topic.
        chosen: what the source leaves open, and what is done here.
    """

    id: str
    version: int
    description: str
    headline: str
    stated: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)


_LINEAR_STATED = {
    "features": "frozen, global average pool of the last block (paper 4.1.2)",
    "classifier": "linear layer, SGD, 60 epochs, lr 0.1, x0.3 every 10, weight decay 1e-3 (paper 4.1.2)",
}
_LINEAR_CHOSEN = {
    "momentum": "0.9, Nesterov",
    "batch": "128; the last batch of an epoch may be smaller",
    "images": "train and test images un-augmented, features computed once",
    "start": "weights and bias zero (the problem is convex); weight decay on both",
}
_STANDARDISED = {"features": "(x - mean) / deviation a dimension, of the train split"}
_SVM_STATED = {
    "images": "short side 256, the whole image squashed to 224 x 224",
    "features": "average-pooled to about 9k dimensions, x / (||x|| + 1e-5) in float64",
    "classifier": "LinearSVC a class: squared hinge, L2, dual, tol 1e-4, 2000 iterations, weights 2 to 1",
    "difficult": "images with only difficult objects are negatives in training and dropped at test",
    "cost": "a class's best mean average precision over 3 stratified folds; the first of equals",
    "metric": "mean over classes of the all-points envelope average precision (not 11-point)",
}
_SVM_CHOSEN = {
    "resize": "linear with antialias (FAIR: OpenCV without; VISSL: PIL with), RGB",
    "seed": "liblinear's seed is fixed; the sources leave it open",
}


def _held_out(protocol_id: str, chosen: Mapping[str, str]) -> Protocol:
    return Protocol(
        id=f"{protocol_id}-held-out",
        version=1,
        description=f"as {protocol_id}, tested on a tenth of each train class that is held out",
        headline="top1",
        stated=_LINEAR_STATED,
        chosen=dict(chosen) | {"test images": "a tenth of each class (at least one), those of the least key hashes"},
    )


def _svm_protocol(name: str, costs: str, **stated: str) -> Protocol:
    return Protocol(
        id=f"voc07-svm/{name}",
        version=2,  # 1: conv1 of a residual network was the map behind its max-pool
        description=f"VOC07 classification, one linear SVM a class, {costs}",
        headline="map_best",
        stated=_SVM_STATED | stated,
        chosen=_SVM_CHOSEN,
    )


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.id: protocol
    for protocol in (
        Protocol(
            id="linear/bownet-cifar",
            version=1,
            description="linear classifier on pooled features, the paper's for CIFAR-100 and MiniImageNet",
            headline="top1",
            stated=_LINEAR_STATED,
            chosen=_LINEAR_CHOSEN,
        ),
        Protocol(
            id="linear/standardised",
            version=1,
            description="as linear/bownet-cifar, on features standardised by the train split",
            headline="top1",
            stated=_LINEAR_STATED,
            chosen=_LINEAR_CHOSEN | _STANDARDISED,
        ),
        _held_out("linear/bownet-cifar", _LINEAR_CHOSEN),
        _held_out("linear/standardised", _LINEAR_CHOSEN | _STANDARDISED),
        _svm_protocol("fair", "26 costs (FAIR self-supervision benchmark; the paper's)"),
        _svm_protocol("vissl", "11 costs (VISSL)"),
        _svm_protocol("obow", "23 costs (obow)", features="global average pool, x / (||x|| + 1e-5) in float64"),
    )
}


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper: figures in percent by metric name, and where they stand."""

    system: str
    percent: Mapping[str, float]
    source: str


def _linear_rows(source: str, figures: Mapping[str, float]) -> tuple[PaperRow, ...]:
    return tuple(PaperRow(system, {"top1": value}, source) for system, value in figures.items())


def _voc_rows(figures: Mapping[str, tuple[float, float]]) -> tuple[PaperRow, ...]:
    return tuple(
        PaperRow(
            system,
            {"map_conv4": conv4, "map_conv5": conv5, "map_best": max(conv4, conv5)},
            "Table 4, ResNet-50",
        )
        for system, (conv4, conv5) in figures.items()
    )


# Rows of another network than the paper's own (AMDIM) are left out: their figures do not compare.
PAPER_ROWS: Mapping[tuple[str, str], tuple[PaperRow, ...]] = {
    ("linear/bownet-cifar", "cifar100"): _linear_rows(
        "Table 1, WRN-28-10",
        {
            "supervised": 79.5,
            "RotNet": 60.3,
            "Deeper Clustering": 65.4,
            "BoWNet": 71.5,
            "BoWNet x2": 74.1,
            "BoWNet x3": 74.5,
            "BoWNet without CutMix": 69.7,
            "Sp-BoWNet": 71.3,
        },
    ),
    ("linear/bownet-cifar", "miniimagenet"): _linear_rows(
        "Table 2, WRN-28-4",
        {
            "supervised cosine classifier": 73.7,
            "RotNet": 52.3,
            "RelLoc": 50.4,
            "Deeper Clustering": 60.3,
            "BoWNet": 65.0,
            "BoWNet x2": 65.6,
            "BoWNet x3": 66.0,
        },
    )
    + _linear_rows("Table 3, WRN-28-4", {"RelLoc to BoWNet": 65.2, "Random to BoWNet": 61.5}),
    ("voc07-svm/fair", "voc07"): _voc_rows(
        {
            "supervised (ImageNet)": (80.4, 88.0),
            "RotNet": (64.6, 62.8),
            "Jigsaw": (64.5, 57.2),
            "Colorization": (55.6, 52.3),
            "BoWNet-conv4": (73.6, 79.3),
            "BoWNet-conv5": (74.3, 78.4),
        }
    ),
}


class Result(Strict):
    """One evaluation, as its file holds it."""

    protocol: str = Field(description="protocol id")
    protocol_version: int
    metrics: dict[str, Finite] = Field(description="shares between 0 and 1; the headline metric is among them")
    settings: dict[str, Any] = Field(description="everything that was set, as plain values")
    inputs: dict[str, str | None] = Field(
        description="fingerprints of train and test, weights_sha256, run, and dataset if it is a paper's"
    )
    details: dict[str, Any] = Field(default_factory=dict, description="curves, scores by class, chosen costs")
    versions: dict[str, str]
    device: str
    created: str = Field(description="UTC, ISO 8601")
    seconds: Finite = Field(description="wall clock of the evaluation")


def get_protocol(protocol_id: str) -> Protocol:
    """The protocol of that id.

    Raises:
        UsageError: there is none; the message lists those that exist.
    """
    try:
        return PROTOCOLS[protocol_id]
    except KeyError as error:
        raise UsageError(f"no protocol {protocol_id!r}; known: {', '.join(PROTOCOLS)}") from error


def new_result(
    protocol_id: str,
    *,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    details: Mapping[str, Any],
    device: torch.device,
    seconds: float,
) -> Result:
    """A result with versions, device name and time filled in."""
    protocol = get_protocol(protocol_id)
    return Result(
        protocol=protocol.id,
        protocol_version=protocol.version,
        metrics=dict(metrics),
        settings=_plain(settings),
        inputs=dict(inputs),
        details=_plain(details),
        versions=library_versions(),
        device=device_name(device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a JSON file gives them back, so that a result equals its file."""
    return dict(json.loads(json.dumps(values)))


def write_result(run: Path, result: Result) -> Path:
    """Write `result` into its place in a run directory, atomically; return the place."""
    path = result_path(run, result.protocol)
    make_folder(path.parent)
    write_json(path, dump(result))
    return path


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
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CorruptError(
            f"{path} is not a result file ({where}: {first['msg']}); remove it and evaluate again"
        ) from error


def read_results(run: Path) -> list[Result]:
    """All results of a run directory, by file name; empty where nothing was evaluated."""
    return [read_result(path) for path in result_paths(run)]


def result_table(result: Result, name: str = "this run") -> str:
    """Metrics in percent, with the paper's rows below where there are comparable ones; plain aligned text.

    Args:
        result: the measurement.
        name: what its row is called.
    """
    metrics = list(result.metrics)
    rows = [["percent", *metrics, ""], [name, *(_percent(result.metrics[m]) for m in metrics), result.device]]
    for row in PAPER_ROWS.get((result.protocol, result.inputs.get("dataset") or ""), ()):
        figures = [f"{row.percent[m]:.1f} " if m in row.percent else "-" for m in metrics]
        rows.append([f"paper: {row.system}", *figures, row.source])
    return f"{result.protocol} v{result.protocol_version}\n{_aligned(rows, left=(0, len(metrics) + 1))}"


def comparison_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Headline metrics of several runs, one column for each protocol, version and set of test images.

    Args:
        results: the results of each run, by the run's name.

    Raises:
        DataError: a run has two results that belong into the same cell.
    """
    columns: dict[tuple[str, int, str], dict[str, str]] = {}
    for run, measured in results.items():
        for result in measured:
            tested_on = result.inputs.get("dataset") or (result.inputs.get("test") or "unknown")[:8]
            cells = columns.setdefault((result.protocol, result.protocol_version, tested_on), {})
            if run in cells:
                raise DataError(
                    f"run {run} has two results of {result.protocol} v{result.protocol_version} "
                    f"on {tested_on}; give one"
                )
            cells[run] = _percent(result.metrics[_headline(result)])
    keys = sorted(columns)
    rows = [
        ["protocol", *(f"{protocol} v{version}" for protocol, version, _ in keys)],
        ["test images", *(tested_on for _, _, tested_on in keys)],
        *([run, *(columns[key].get(run, "-") for key in keys)] for run in results),
    ]
    return _aligned(rows)


def _headline(result: Result) -> str:
    protocol = PROTOCOLS.get(result.protocol)
    if protocol is not None and protocol.headline in result.metrics:
        return protocol.headline
    return next(iter(result.metrics))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Columns padded to their widest cell, to the right except for the columns of text in `left`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
