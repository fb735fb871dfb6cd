"""What a network begins with where a task names another run: that run's backbone. Heads are always new."""

from pathlib import Path
from typing import Any, NamedTuple

from bowstore.errors import MismatchError
from bowstore.models.backbone import Backbone
from bowstore.models.saved import load_backbone, load_weights
from bowstore.models.weights import finite_weights, weights_sha256
from bowstore.runs import read_lineage, run_of
from bowstore.train.config import TrainConfig


class Start(NamedTuple):
    """Another run's backbone.

    Attributes:
        sha256: of its weights.
        lineage: where they come from, as plain values.
    """

    sha256: str
    lineage: dict[str, Any]


def begin_with(path: Path, backbone: Backbone, config: TrainConfig) -> Start:
    """Give a backbone the weights of another run's.

    Args:
        path: run directory, checkpoint or exported network.
        backbone: as the configuration says; its weights are replaced.
        config: of the run that begins.

    Raises:
        MissingError: nothing there, or a run without a checkpoint yet.
        MismatchError: it is another network.
        DataError: weights that are not finite.
    """
    loaded = load_backbone(path)
    other, own = loaded.saved.model, config.model
    if loaded.backbone.arch != backbone.arch:
        raise MismatchError(
            f"task.start: {path} is of {loaded.backbone.arch}, and model.arch is {own.arch}; set model.arch to that, "
            f"or start from another run"
        )
    if other.strides != own.strides:
        raise MismatchError(
            f"task.start: {path} is of strides {list(other.strides)}, and model.strides are {list(own.strides)}; set "
            f"model.strides to those, or start from another run"
        )
    state = loaded.backbone.state_dict()
    finite_weights(state, str(path))
    load_weights(backbone, state, str(path))
    sha256, lineage = weights_sha256(state), read_lineage(run_of(path))
    origin = {"name": loaded.saved.name, "weights_file": path.name, "weights_sha256": sha256, "lineage": lineage}
    return Start(sha256, origin)
