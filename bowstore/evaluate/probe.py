"""Protocols on features that measure a network while it is trained: the callable that training takes.

The figures are those of `bowstore eval` for the checkpoint of the same step, to the last digit on the same machine.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bowstore.config import Strict, Workspace, dump
from bowstore.data.views import clean_view
from bowstore.errors import BowstoreError, DataError, UsageError
from bowstore.evaluate.config import PROBE, Asked, EvalConfig, probes_of
from bowstore.evaluate.features import Extraction
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.protocol import DataSets, Kind, Protocol, Scores
from bowstore.evaluate.runner import extraction
from bowstore.models.saved import network_of
from bowstore.models.weights import put_weights
from bowstore.progress import say, without_progress
from bowstore.train.config import TrainConfig
from bowstore.train.probe import OpenProbe, Probe, Probed


def probe_of(config: TrainConfig, workspace: Workspace) -> OpenProbe | None:
    """What measures a run as its configuration asks (`runtime.probe`); None where it does not.

    Labelled shards that no setting names are those of the workspace, as for `bowstore eval`; of a run on other images,
    the run's own and those beside them.

    Raises:
        UsageError: as `probes_of`.
    """
    protocols = probes_of(config.runtime.probe)
    if not protocols:
        return None
    updates: dict[str, object] = {"storage": config.runtime.storage or workspace.storage}
    if config.shards and config.shards != workspace.shards:
        updates |= {"shards": config.shards, "val_shards": None}
    return partial(_open, config, protocols, workspace.model_copy(update=updates))


@dataclass(frozen=True)
class _Protocol:
    """One protocol, all that it needs found usable."""

    kind: Kind
    settings: Strict
    protocol: Protocol
    data: DataSets
    how: Extraction

    def metrics(self, kept: FeatureSets) -> Mapping[str, float]:
        """Finite numbers by name."""
        features, _ = kept.take(self.how, self.data)
        found = self.kind.ask("score", Scores, features, self.settings).metrics
        for name, value in found.items():
            if not math.isfinite(value):
                raise DataError(f"{name} is {value}")
        return {name: float(value) for name, value in found.items()}


def _open(config: TrainConfig, asked: list[Asked], workspace: Workspace, device: torch.device) -> Probe:
    """Find the images of all protocols usable.

    Raises:
        BowstoreError: what `bowstore eval` would refuse before it reads an image.
    """
    network = network_of(dump(config), config.name)
    backbone, view = network.fresh().eval(), clean_view(network.view)
    # Not compiled: weights that are constants would be compiled anew each time.
    how = EvalConfig(threads=config.runtime.threads, compile=False)
    opened: dict[str, _Protocol] = {}
    for kind, given in asked:
        with _explained(kind):
            settings = kind.ask("resolve", kind.settings, given, workspace)
            protocol, data = kind.ask("describe", Protocol, settings), kind.ask("data", DataSets, settings, workspace)
            taken = extraction(kind, settings, backbone, replace(view, **data.view), how, device)
        if protocol.id in opened:
            raise UsageError(f"{PROBE}: {protocol.id} is asked for twice; leave one of them out")
        opened[protocol.id] = _Protocol(kind, settings, protocol, data, taken)
    epochs = config.runtime.probe.every_epochs if config.runtime.probe else 0
    every = "every epoch" if epochs == 1 else f"every {epochs} epochs"
    for name, one in opened.items():
        images = " and ".join(f"{len(split)} {role}" for role, split in one.data.splits.items())
        say(f"the network is measured by {name}, of {images} images, {every}")
    record = {
        name: {"version": one.protocol.version, "options": dump(one.settings), "inputs": one.data.inputs}
        for name, one in opened.items()
    }

    def measure(weights: Mapping[str, Tensor]) -> Probed:
        put_weights(backbone, weights)
        return _measured(opened, FeatureSets(workspace.storage, files=False))

    return Probe(measure, record)


def _measured(opened: Mapping[str, _Protocol], kept: FeatureSets) -> Probed:
    """All metrics, `ID/METRIC`, and the seconds that they took; what fails costs the run no more than its figure."""
    values: dict[str, float] = {}
    notes, begun = [], time.monotonic()
    for name, one in opened.items():
        try:
            with without_progress():
                metrics = one.metrics(kept)
        except BowstoreError as error:
            say(f"warning: {PROBE}: no figure of {name} this time: {error}")
            continue
        values |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        headline = one.protocol.headline
        notes.append(f"{one.kind.name} {headline} {100 * metrics[headline]:.1f} %")
    values["probe_seconds"] = round(time.monotonic() - begun, 3)
    return Probed(values, ", ".join(notes))


@contextmanager
def _explained(kind: Kind) -> Iterator[None]:
    """Errors say where their remedies, options of `bowstore eval`, are to be written."""
    try:
        yield
    except BowstoreError as error:
        where = f"options of `bowstore eval {kind.name}` are written as {PROBE}: {{{kind.name}: {{OPTION: VALUE}}}}"
        raise type(error)(f"runtime.probe: {error} ({where})") from error
