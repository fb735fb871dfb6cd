"""One evaluation, from what a command says to the result file: the network, the device, the time, and the table."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from bowstore.config import Strict, Workspace, dump
from bowstore.data.views import clean_view
from bowstore.environment import choose_device, device_name, library_versions
from bowstore.errors import UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.kept import Extraction, FeatureSets
from bowstore.evaluate.protocol import DataSets, Features, Kind, Network, Scores, function
from bowstore.evaluate.results import Result, result_table, write_result
from bowstore.models.saved import LoadedBackbone, load_backbone
from bowstore.models.weights import weights_sha256
from bowstore.runs import results_folder
from bowstore.torchrun import ranks
from bowstore.train.distributed import World, joined
from bowstore.workspace import find_run, newest_run


@dataclass(frozen=True)
class Evaluated:
    """One evaluation and the name it goes by."""

    name: str
    result: Result

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json: the result file's content."""
        return dump(self.result)

    def text(self) -> str:
        """The table, beside the paper's figures where there are some."""
        return result_table(self.result, self.name)


@dataclass(frozen=True)
class _Subject:
    """What is evaluated: a network, its name, and the folder that takes its results."""

    loaded: LoadedBackbone
    name: str
    out: Path

    @cached_property
    def weights(self) -> str:
        """Digest of the weights as they were loaded."""
        return weights_sha256(self.loaded.backbone.state_dict())


def evaluate(
    kind: Kind,
    settings: Strict,
    config: EvalConfig,
    workspace: Workspace,
    *,
    kept: FeatureSets | None = None,
) -> Evaluated:
    """Evaluate a run, checkpoint or exported network; write `eval/<protocol>.json` beside it.

    Args:
        kind: the protocol, of `PROTOCOLS`.
        settings: its own, as a user gives them; what they leave out is the workspace's.
        config: which network, and how it runs.
        workspace: says what the others do not, and how shards are read.
        kept: feature sets of this command; those that another protocol took are not taken again.

    Raises:
        MissingError: no such run, or no data.
        MismatchError, DataError: data or features that the protocol cannot use.
        UsageError: settings that do not go together.
    """
    path = find_run(workspace, config.run) if config.run else newest_run(workspace)
    settings = function(kind.resolve)(settings, workspace)
    data = function(kind.data)(settings, workspace)
    subject = _load(path, config.random)
    inputs = {"weights_sha256": subject.weights, "run": subject.name}  # before anything is trained
    start = time.monotonic()
    with joined(config.device) if kind.run else nullcontext(_alone(kind, config)) as world:
        if kind.run:
            scores, used = _run(kind, settings, subject, data, world)
        else:
            scores, used = _score(kind, settings, config, subject, data, world, kept or FeatureSets(workspace.storage))
        protocol = kind.describe(settings)
        result = Result(
            protocol=protocol.id,
            protocol_version=protocol.version,
            headline=protocol.headline,
            metrics=dict(scores.metrics),
            settings=_plain({**used, "options": dump(settings), **scores.settings}),
            inputs={**data.inputs, **inputs, "dataset": data.dataset},
            details=_plain(scores.details),
            versions=library_versions(),
            device=device_name(world.device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 3),
        )
        if world.first:
            write_result(subject.out, result)
    return Evaluated(subject.name, result)


def _load(path: Path, random: bool) -> _Subject:
    """The network of a path, or with its weights as the run's own seed draws them."""
    loaded, out = load_backbone(path), results_folder(path, random_init=random)
    if not random:
        return _Subject(loaded, loaded.saved.name, out)
    return _Subject(replace(loaded, backbone=loaded.saved.fresh().eval()), f"{loaded.saved.name} (random)", out)


def _alone(kind: Kind, config: EvalConfig) -> World:
    """The one process that scores features.

    Raises:
        UsageError: torchrun started several.
    """
    if (size := ranks().size) > 1:
        raise UsageError(f"eval {kind.name} is for one process, and torchrun started {size}; start it without torchrun")
    return World(0, 1, choose_device(config.device))


def _run(
    kind: Kind, settings: Strict, subject: _Subject, data: DataSets, world: World
) -> tuple[Scores, dict[str, Any]]:
    """The second form, and what the result file says of how it ran."""
    assert kind.run is not None
    saved, backbone = subject.loaded.saved, subject.loaded.backbone.to(world.device)
    scores = function(kind.run)(Network(backbone=backbone, view=saved.view), data, settings, world)
    return scores, {
        "arch": saved.model.arch,
        "view": dump(saved.view),
        "ranks": world.size,
        "images": _images(data),
    }


def _score(
    kind: Kind,
    settings: Strict,
    config: EvalConfig,
    subject: _Subject,
    data: DataSets,
    world: World,
    kept: FeatureSets,
) -> tuple[Scores, dict[str, Any]]:
    """The first form, and what the result file says of how its features were taken."""
    assert kind.score is not None
    backbone = subject.loaded.backbone.to(world.device)
    view = replace(clean_view(subject.loaded.saved.view), **data.view)
    how = Extraction(
        backbone=backbone,
        weights=subject.weights,
        view=view,
        taps=function(kind.taps)(backbone, settings, view.size),
        batch=config.batch,
        device=world.device,
        threads=config.threads,
        compile=config.compile,
    )
    features, trunk = kept.take(how, data)
    scores = function(kind.score)(features, settings)
    first = next(iter(features.splits.values()))
    return replace(scores, details=_with_variation(scores.details, features)), {
        "arch": backbone.arch,
        "trunk": trunk,
        "batch": config.batch,
        "view": asdict(view),
        "taps": {name: {"of": str(tap), "dims": first[name].shape[1]} for name, tap in how.taps.items()},
        "images": _images(data),
    }


def _images(data: DataSets) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


def _with_variation(details: Mapping[str, Any], features: Features) -> dict[str, Any]:
    """The details, and by split how much the features vary: beside what else there is of their tap, if there is."""
    known = dict(details)
    taps = list(next(iter(features.splits.values())).taps)
    for tap in taps:
        shares = {name: split.variation[tap] for name, split in features.splits.items()}
        if tap in known:
            known[tap] = known[tap] | {"variation": shares}
        elif len(taps) == 1:
            known["variation"] = shares
        else:
            known["variation"] = known.get("variation", {}) | {tap: shares}
    return known


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a JSON file gives them back, so that a result equals its file."""
    return dict(json.loads(json.dumps(values)))
