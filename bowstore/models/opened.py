"""The network that a command names, whatever it is: a run, a file, an architecture with or without weights, a record.

One way in for all that look at a frozen network, so that a name means the same network everywhere.
"""

from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any

import torch

from bowstore.config import ModelConfig, ViewConfig, validate
from bowstore.errors import MismatchError, UsageError
from bowstore.models.arch import V1, is_arch
from bowstore.models.backbone import Backbone
from bowstore.models.layouts import load_foreign, read_weights
from bowstore.models.library import library_view, missing_weights
from bowstore.models.record import NetworkRecord
from bowstore.models.registry import build_backbone
from bowstore.models.saved import SavedNetwork, load_backbone
from bowstore.progress import say
from bowstore.runs import read_lineage, run_of
from bowstore.torchrun import ranks


@dataclass(frozen=True)
class Origin:
    """Where a network comes from, as word stores and results record it.

    Attributes:
        name: the run it comes from, the architecture, or the configuration that it was not trained by.
        weights_file: name of the file that holds the weights; None for random ones.
        weights_layout: how that file was read, or how random weights were drawn.
        lineage: what its run was made of (`bowstore.runs.read_lineage`); None without a run, or where that is unknown.
    """

    name: str
    weights_file: str | None
    weights_layout: str
    lineage: dict[str, Any] | None = None


@dataclass(frozen=True)
class OpenedNetwork:
    """A network and what is known of it.

    Attributes:
        backbone: on the CPU, in eval mode.
        model: how it is built.
        view: the images that it takes.
        seed: of what is drawn when it is built.
        origin: where it comes from.
        place: the run or file of bowstore's that it is; None for what has no place of its own.
    """

    backbone: Backbone
    model: ModelConfig
    view: ViewConfig
    seed: int
    origin: Origin
    place: Path | None = None


def open_network(
    spec: str | Path | NetworkRecord,
    *,
    weights: Path | None = None,
    size: int | None = None,
    seed: int = 0,
    random: bool = False,
) -> OpenedNetwork:
    """Load the network that a command names. Nothing is ever downloaded.

    Args:
        spec: a run directory, checkpoint or exported `.safetensors` of bowstore; or an architecture:
            `torchvision:NAME`, `timm:NAME`, `resnet50`, `wrn-28-10`...; or the record of a network, for the one that
            its training starts from.
        weights: an architecture's weights, a file of any layout that `bowstore.models.layouts` understands; None
            for random ones. A line says what was understood.
        size: side of the square input, pixels, for architectures that are built for one; None for their own.
        seed: of an architecture's random weights.
        random: a run's network at its random initialisation.

    Raises:
        MissingError: no such run or file.
        UsageError: an unknown architecture, a size that it does not take, or `weights` or `random` of what has none.
        MismatchError: weights of another network; names the first tensors.
        DataError: weights that are not finite, or a file that holds code.
    """
    record = spec if isinstance(spec, NetworkRecord) else None
    is_path = isinstance(spec, Path) and spec.exists()  # a text was looked for among files before (workspace.py)
    arch = None if record or is_path or not is_arch(str(spec)) else str(spec)
    what = f"configuration {record.name}" if record else str(spec)
    if random and (record or arch):
        raise UsageError(f"--random is the initialisation of a run's network, and {what} is no run; leave it out")
    if arch:
        return _open_arch(arch, weights, size, seed)
    if weights:
        raise UsageError(f"weights {weights} go with an architecture (timm:NAME, torchvision:NAME), not with {what}")
    return _initial(record) if record else _open_run(Path(str(spec)), random=random)


def resized(view: ViewConfig, size: int | None, resize: int | None = None, *, what: str = "the view") -> ViewConfig:
    """A view at another size, where one is given: the short side before the crop grows or shrinks with the size.

    Args:
        view: the network's own.
        size: side of the square input, pixels; None for the view's.
        resize: short side before the crop, pixels; None for what follows from the size.
        what: what messages call it.

    Raises:
        UsageError: a short side below the size.
    """
    values = view.model_dump()
    if size and view.resize:
        values["resize"] = floor(size * view.resize / view.size)
    values |= {name: value for name, value in (("size", size), ("resize", resize)) if value}
    return validate(ViewConfig, values, what)


def _initial(network: NetworkRecord) -> OpenedNetwork:
    backbone = SavedNetwork(**dict(network)).fresh().eval()
    origin = Origin(network.name, None, _drawn(network.seed))
    return OpenedNetwork(backbone, network.model, network.view, network.seed, origin)


def _open_run(path: Path, *, random: bool) -> OpenedNetwork:
    loaded = load_backbone(path)
    if random:
        return replace(_initial(loaded.saved), place=path)
    origin = Origin(loaded.saved.name, path.name, "bowstore run", read_lineage(run_of(path)))
    return OpenedNetwork(loaded.backbone, loaded.saved.model, loaded.saved.view, loaded.saved.seed, origin, path)


def _drawn(seed: int) -> str:
    """How random weights were drawn, as word stores and results record it."""
    return f"random, seed {seed}"


def _open_arch(arch: str, weights: Path | None, size: int | None, seed: int) -> OpenedNetwork:
    model, view = ModelConfig(arch=arch), library_view(arch) if ":" in arch else ViewConfig()
    if weights and not weights.exists():
        raise missing_weights(arch, weights)
    file = read_weights(weights) if weights else None
    if file and file.network:  # what no tensor says: strides, and the images that it takes
        _check_strides(arch, file.network.model.arch, file.path)
        model, view = model.model_copy(update={"strides": file.network.model.strides}), file.network.view
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(model, size)
    if file:
        understood = load_foreign(backbone, file)
        origin, told = Origin(backbone.arch, understood.file, understood.text()), f"{file.path}: {understood.text()}"
    else:
        origin = Origin(backbone.arch, None, _drawn(seed))
        told = f"{arch}: no weights file was named; its weights are random, of seed {seed}"
    if ranks().first:
        say(told)
    return OpenedNetwork(backbone.eval(), model, view, seed, origin)


def _check_strides(arch: str, theirs: str, path: Path) -> None:
    """Refuse weights of a network that has the same tensors and its strides elsewhere."""
    ours, its = (name.rpartition(":")[2] for name in (arch, theirs))
    if ours != its and ours.removesuffix(V1) == its.removesuffix(V1):
        raise MismatchError(
            f"{path} is of {theirs}, which has its strides elsewhere than {arch}; name {theirs} with these weights"
        )
