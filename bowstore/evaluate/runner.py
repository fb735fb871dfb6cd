"""One evaluation, from what a command says to the result file: the network, the device, the time, the writing."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from bowstore.config import Strict, Workspace, dump
from bowstore.data.views import CleanView, clean_view
from bowstore.environment import choose_device, device_name, library_versions
from bowstore.errors import UsageError
from bowstore.evaluate.config import OF_FEATURES, EvalConfig
from bowstore.evaluate.features import Extraction
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.protocol import DataSets, Features, Kind, Network, Protocol, Scores
from bowstore.evaluate.results import Result, made_result, write_result
from bowstore.models.backbone import Backbone
from bowstore.models.saved import load_backbone
from bowstore.models.weights import weights_sha256
from bowstore.runs import results_folder, unfinished_folder
from bowstore.torchrun import ranks
from bowstore.train.distributed import World, joined
from bowstore.workspace import find_run, newest_run


def evaluate(
    kind: Kind, settings: Strict, config: EvalConfig, workspace: Workspace, *, kept: FeatureSets | None = None
) -> Result:
    """Evaluate a run, checkpoint or exported network; write `eval/<protocol>.json` beside it.

    Args:
        kind: the protocol, of `PROTOCOLS`.
        settings: its own, as a user gives them; what they leave out is the workspace's.
        config: which network, and how it runs.
        workspace: says what the others do not, and how shards are read.
        kept: feature sets of this command; those that another protocol took are not taken again.

    Raises:
        MissingError: no such run, or no data.
        MismatchError, DataError: data or features that the protocol cannot use; a metric that is no number.
        UsageError: settings that do not go together.
    """
    path = find_run(workspace, config.run) if config.run else newest_run(workspace)
    settings = kind.ask("resolve", kind.settings, settings, workspace)
    protocol, data = kind.ask("describe", Protocol, settings), kind.ask("data", DataSets, settings, workspace)
    loaded = load_backbone(path)
    saved = loaded.saved
    folder = results_folder(path, random_init=config.random)
    unfinished = unfinished_folder(folder, protocol.id)
    network = Network(
        backbone=saved.fresh().eval() if config.random else loaded.backbone,
        view=saved.view,
        folder=unfinished,
    )
    weights = weights_sha256(network.backbone.state_dict())  # before anything is trained
    start = time.monotonic()
    with _world(kind, config) as world:
        network.backbone.to(world.device)
        if kind.run:
            scores = kind.ask("run", Scores, network, data, settings, world)
            ran: dict[str, Any] = {"view": dump(network.view), "ranks": world.size}
        else:
            view = replace(clean_view(network.view), **data.view)
            # Strides, and what is drawn, are in no weights.
            identity = repr((weights, saved.model, saved.seed))
            how = extraction(kind, settings, network.backbone, view, data, config, world.device, identity=identity)
            features, trunk = (kept or FeatureSets(workspace.storage)).take(how, data)
            scores = _scored(kind, features, settings)
            first = next(iter(features.splits.values()))
            taken = {name: {"of": str(tap), "dims": first[name].shape[1]} for name, tap in how.taps.items()}
            ran = {"view": view.recorded(), "trunk": trunk, "batch": how.batch, "taps": taken}
        result = made_result(
            protocol=protocol.id,
            protocol_version=protocol.version,
            headline=protocol.headline,
            metrics=scores.metrics,
            settings={
                "arch": saved.model.arch,
                **ran,
                "images": {name: len(split) for name, split in data.splits.items()},
                "options": dump(settings),
                **scores.settings,
            },
            inputs={
                **data.inputs,
                "weights_sha256": weights,
                "run": f"{saved.name} (random)" if config.random else saved.name,
                "dataset": data.dataset,
            },
            details=scores.details,
            versions=library_versions(),
            device=device_name(world.device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 3),
        )
        if world.first:
            write_result(folder, result)
            shutil.rmtree(unfinished, ignore_errors=True)
    return result


def extraction(
    kind: Kind,
    settings: Strict,
    backbone: Backbone,
    view: CleanView,
    data: DataSets,
    config: EvalConfig,
    device: torch.device,
    *,
    identity: str = "",
) -> Extraction:
    """How a protocol on features takes them of a network that sees images by a view.

    Raises:
        UsageError: a layer that the network does not have.
    """
    return Extraction(
        backbone=backbone,
        identity=identity,
        view=view,
        taps=kind.ask("taps", Mapping, backbone, settings, view.size),  # type: ignore[type-abstract]
        device=device,
        **{name: getattr(config, name) for name in OF_FEATURES} | _batch(data, config),
    )


@contextmanager
def _world(kind: Kind, config: EvalConfig) -> Iterator[World]:
    """The job's ranks where something is trained; features are scored by one process.

    Raises:
        UsageError: torchrun started several for it.
    """
    if kind.run:
        with joined(config.device) as world:
            yield world
    elif (size := ranks().size) > 1:
        raise UsageError(f"eval {kind.name} is for one process, and torchrun started {size}; start it without torchrun")
    else:
        yield World(0, 1, choose_device(config.device))


def _batch(data: DataSets, config: EvalConfig) -> dict[str, int]:
    """The protocol's batch, if it has one and the user has said none."""
    return {"batch": data.batch} if data.batch and "batch" not in config.model_fields_set else {}


def _scored(kind: Kind, features: Features, settings: Strict) -> Scores:
    """The scores; in their details also by split how much the features vary, beside what else there is of the tap."""
    scores = kind.ask("score", Scores, features, settings)
    details = dict(scores.details)
    taps = list(next(iter(features.splits.values())).taps)
    for tap in taps:
        shares = {name: split.variation[tap] for name, split in features.splits.items()}
        if isinstance(details.get(tap), Mapping):
            details[tap] = {**details[tap], "variation": shares}
        elif len(taps) == 1:
            details["variation"] = shares
        else:
            details["variation"] = {**details.get("variation", {}), tap: shares}
    return replace(scores, details=details)
