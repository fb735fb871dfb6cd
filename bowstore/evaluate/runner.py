"""One evaluation, from what a command says to the result file: the network, the device, the time, the writing."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bowstore.config import Strict, Workspace, dump
from bowstore.data.views import CleanView, clean_view
from bowstore.environment import choose_device, device_name, library_versions
from bowstore.errors import UsageError
from bowstore.evaluate.config import OF_FEATURES, EvalConfig
from bowstore.evaluate.features import Extraction, usual_batch
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.protocol import DataSets, Features, Kind, Network, Protocol, Scores
from bowstore.evaluate.results import Result, made_result, write_result
from bowstore.models.arch import built_in
from bowstore.models.backbone import Backbone
from bowstore.models.opened import OpenedNetwork, open_network, resized
from bowstore.models.record import NetworkRecord
from bowstore.models.weights import weights_sha256
from bowstore.progress import say
from bowstore.runs import network_folder, results_folder, unfinished_folder
from bowstore.torchrun import ranks
from bowstore.train.distributed import World, joined
from bowstore.workspace import newest_run, resolve_network


def evaluate(
    kind: Kind, settings: Strict, config: EvalConfig, workspace: Workspace, *, kept: FeatureSets | None = None
) -> Result:
    """Evaluate a network; write `eval/<protocol>.json` into its run, beside its file, or into a folder of networks.

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
    named = _named(config, workspace)
    settings = kind.ask("resolve", kind.settings, settings, workspace)
    protocol, data = kind.ask("describe", Protocol, settings), kind.ask("data", DataSets, settings, workspace)
    opened, name, folder = _opened(named, kind, settings, config, data, workspace)
    unfinished = unfinished_folder(folder, protocol.id)
    network = Network(backbone=opened.backbone, view=opened.view, folder=unfinished)
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
            identity = repr((weights, opened.model, opened.seed))
            how = extraction(kind, settings, network.backbone, view, config, world.device, identity=identity)
            features, trunk = (kept or FeatureSets(workspace.storage)).take(how, data)
            scores = _scored(kind, features, settings)
            first = next(iter(features.splits.values()))
            taken = {name: {"of": str(tap), "dims": first.taps[name].shape[1]} for name, tap in how.taps.items()}
            ran = {
                "view": view.recorded(), "trunk": trunk, "batch": how.batch, "dtype": config.dtype, "taps": taken
            }  # fmt: skip
        result = made_result(
            protocol=protocol.id,
            protocol_version=protocol.version,
            headline=protocol.headline,
            metrics=scores.metrics,
            settings={
                "arch": opened.model.arch,
                **ran,
                "images": {name: len(split) for name, split in data.splits.items()},
                "options": dump(settings),
                **scores.settings,
            },
            inputs={
                **data.inputs,
                "weights_sha256": weights,
                "run": name,
                "arch": opened.model.arch,
                "weights_file": opened.origin.weights_file,
                "weights_layout": opened.origin.weights_layout,
                "dataset": data.dataset,
            },
            details=scores.details,
            versions=library_versions(),
            device=device_name(world.device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 3),
        )
        if world.first:
            written = write_result(folder, result)
            if opened.place is None:
                say(f"the result lies in {written}")
            shutil.rmtree(unfinished, ignore_errors=True)
    return result


def extraction(
    kind: Kind,
    settings: Strict,
    backbone: Backbone,
    view: CleanView,
    config: EvalConfig,
    device: torch.device,
    *,
    identity: str = "",
) -> Extraction:
    """How a protocol on features takes them of a network that sees images by a view; its own settings come first.

    Raises:
        UsageError: a layer that the network does not have.
    """
    taken = {name: getattr(settings, name, getattr(config, name)) for name in OF_FEATURES}
    taken["batch"] = taken["batch"] or usual_batch(view.size, device)
    return Extraction(
        backbone=backbone,
        identity=identity,
        view=view,
        taps=kind.ask("taps", Mapping, backbone, settings, view.size),  # type: ignore[type-abstract]
        device=device,
        **taken,
    )


def _named(config: EvalConfig, workspace: Workspace) -> str | Path | NetworkRecord:
    """The network that a command names, or the newest finished run."""
    if config.arch:
        built_in(config.arch)  # refuses a name that nobody knows
        return config.arch
    return resolve_network(workspace, config.run, seed=config.seed) if config.run else newest_run(workspace)


def _opened(
    named: str | Path | NetworkRecord,
    kind: Kind,
    settings: Strict,
    config: EvalConfig,
    data: DataSets,
    workspace: Workspace,
) -> tuple[OpenedNetwork, str, Path]:
    """The network, at the size that the command or the protocol says; what tables call it; the folder of its results.

    Raises:
        UsageError: a size beside the protocol's, or a seed where nothing is drawn.
        BowstoreError: as `open_network`.
    """
    fixed = data.view.get("size")
    if config.size and fixed and config.size != fixed:
        raise UsageError(f"eval {kind.name} has a size of its own, {fixed} pixels; leave --size {config.size} out")
    asked = None if fixed else config.size
    seed = config.seed if config.seed is not None else getattr(settings, "seed", 0)  # one --seed a command
    opened = open_network(named, weights=config.weights, size=fixed or asked, seed=seed, random=config.random)
    if config.seed is not None and (opened.place or config.weights):
        raise UsageError(
            f"--seed {config.seed} is of random weights of --arch, and {opened.origin.name} has others; leave it out"
        )
    view, origin = resized(opened.view, asked, what=f"eval {kind.name}"), opened.origin
    other = asked if view.size != opened.view.size else None
    if opened.place:
        name, folder = origin.name + (" (random)" if config.random else ""), opened.place
    else:
        name = f"{origin.name} ({origin.weights_file or origin.weights_layout})"
        label = named.name if isinstance(named, NetworkRecord) else str(named)
        folder = network_folder(workspace.networks, label, weights=config.weights, seed=opened.seed)
    name += f" at {other} px" if other else ""
    return replace(opened, view=view), name, results_folder(folder, random_init=config.random, size=other)


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
