"""Weights files of other codebases: which tensors of a file belong to a backbone, by rules, not by names of methods.

Every tensor of a file has a dotted path (`state_dict.module.encoder_q.conv1.weight`). A backbone's names, in each of
their spellings, are searched for behind every prefix, and the prefix and spelling that cover most of them are taken.
This finds the layouts of torchvision, timm, MoCo, SwAV, DINO, DINOv2, VISSL, lightly and bowstore alike.
Heads are dropped by name; every other tensor must have its place, and every tensor of the backbone must be there.
"""

import argparse
import pickle
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bowstore.errors import CorruptError, DataError, MismatchError, MissingError, UsageError, is_machine_error
from bowstore.models.backbone import Backbone
from bowstore.models.file_kinds import first_line, is_archive, other_kind, read_torch, reads_as_safetensors, why_unread
from bowstore.models.saved import PARTS, RECORDED, SavedNetwork, recorded_network
from bowstore.models.weights import put_weights

_MAX_DEPTH = 8
# A tensor whose first name holds one of these words belongs to a head, a queue or a decoder.
_HEAD_WORDS = {
    "fc", "head", "heads", "classifier", "linear", "logit", "logits", "mlp", "projector", "projection", "proj",
    "predictor", "prediction", "pred", "prototype", "prototypes", "queue", "decoder", "mask",
}  # fmt: skip
# Buffers that networks compute for themselves and old files hold; a counter that very old files lack.
_COMPUTED = {"relative_position_index", "relative_coords_table", "attn_mask"}
_COUNTER = "num_batches_tracked"
# Where a file holds two copies that fit as well: averaged teachers are taken (DINO, timm's EMA), moving averages of
# contrastive methods are not (MoCo, BYOL), as their authors evaluate them.
_PREFERRED = {"teacher", "ema"}
_SECOND = {"student", "momentum", "target", "k", "key"}
_POSITIONS = re.compile(r"pos_embed|pos_embedding|rel_pos|relative_position")
# Wrappers of training (torch.compile, FSDP, checkpointed activations) put their own name before a module's.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_CHUNKED = re.compile(r"\bblocks\.\d+\.(?=\d+\.(?:norm|attn|mlp|ls)\d?\.)")  # DINOv2 trained with block chunks


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that was read.

    Attributes:
        path: the file.
        tensors: by dotted path.
        containers: paths of the mappings that hold them, each with a dot at its end.
        network: what bowstore recorded of the network, strides and view, where it wrote the file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    containers: set[str]
    network: SavedNetwork | None


@dataclass(frozen=True)
class Understood:
    """How a weights file was read.

    Attributes:
        file: its name.
        names: whose names its tensors have: torchvision, timm, bowstore, or numbered children.
        container: dotted path of the mapping that holds them.
        prefix: of each name inside the container.
        dropped: heads that were left out.
        converted: timm's own conversion was needed (position embeddings of another grid, register tokens).
    """

    file: str
    names: str
    container: str
    prefix: str
    dropped: tuple[str, ...]
    converted: bool

    def text(self) -> str:
        """One line."""
        parts = [f"{self.names} names"]
        if self.container:
            parts.append(f"in {self.container}")
        if self.prefix:
            parts.append(f"behind {self.prefix!r}")
        if self.converted:
            parts.append("converted by timm")
        return " ".join(parts) + (f", without {', '.join(self.dropped)}" if self.dropped else "")


@dataclass(frozen=True)
class _Match:
    names: str
    prefix: str
    state: dict[str, Tensor]
    missing: list[str]
    wrong: list[str]
    unknown: list[str]
    dropped: tuple[str, ...]
    converted: bool = False

    def fits(self) -> bool:
        return not (self.missing or self.wrong or self.unknown)


def load_foreign(backbone: Backbone, file: WeightsFile) -> Understood:
    """Load weights of any known layout into a backbone, as float32.

    Raises:
        DataError: values that are not finite.
        MismatchError: they do not fit; the message counts and names the first tensors.
    """
    path, tensors = file.path, file.tensors
    if not any(_CHUNKED.search(name) for name in backbone.state_dict()):
        tensors = {_CHUNKED.sub("blocks.", name): tensor for name, tensor in tensors.items()}
    match = _match(backbone, tensors, path)
    if not match.fits():
        match = _converted(backbone, tensors, match) or match
    if not match.fits():
        raise MismatchError(_misfit(backbone, match, path))
    bad = [name for name, tensor in match.state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise DataError(
            f"{path} holds NaN or infinity in {len(bad)} of {len(match.state)} tensors of the backbone "
            f"({_some(bad)}); take another checkpoint"
        )
    put_weights(backbone, match.state)
    container = max((c for c in file.containers if match.prefix.startswith(c)), key=len, default="")
    prefix = match.prefix[len(container) :]
    return Understood(path.name, match.names, container.rstrip("."), prefix, match.dropped, match.converted)


def read_weights(path: Path) -> WeightsFile:
    """Read a weights file of any known layout.

    Args:
        path: a `.safetensors` file, or a file of torch.save; of the latter only tensors and plain values are read.

    Raises:
        MissingError: no such file.
        UsageError: a folder, or no regular file.
        CorruptError: not a whole file.
        DataError: a file of another kind (`file_kinds`), or it holds code, or no tensors.
    """
    _check_kind(path)
    with path.open("rb") as file:
        if kind := other_kind(file):
            raise DataError(f"{path} is no weights file: it is {kind}")
        file.seek(0)
        start = file.read(64)
    if reads_as_safetensors(path, start):
        tensors, metadata = _read_safetensors(path)
        return WeightsFile(path, tensors, {""}, recorded_network(metadata, path))
    tree = _read_torch(path, archive=is_archive(start))
    found = {_WRAPPERS.sub("", name): tensor for name, tensor in _flat(tree, "", _MAX_DEPTH)}
    if not found:
        raise DataError(f"{path} holds a {type(tree).__name__} without tensors by name; give a state dict")
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    is_checkpoint = isinstance(tree, dict) and tree.keys() >= PARTS.keys()
    metadata = {RECORDED: tree["config"]} if is_checkpoint else getattr(tree, "_metadata", {})
    containers = {container for _, container in found.values()}
    return WeightsFile(path, tensors, containers, recorded_network(metadata, path))


def _check_kind(path: Path) -> None:
    """Refuse what is no file at all, or an empty one."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise MissingError(f"no weights file {path}") from error
    if stat.S_ISDIR(status.st_mode):
        inside = sorted(child.name for child in path.iterdir() if child.suffix in _SUFFIXES)
        hint = f"name a file in it: {_some(inside)}" if inside else "name a file"
        raise UsageError(f"weights {path} is a folder; {hint}")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"weights {path} is a pipe, socket or device; name a file")
    if status.st_size == 0:
        raise DataError(f"{path} is empty (0 bytes): its download or copy did not happen; fetch it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise CorruptError(
            f"{path} is not a whole weights file: damaged or cut off ({first_line(error)}); fetch it again"
        ) from error


def _read_torch(path: Path, *, archive: bool) -> Any:
    """What torch.save wrote."""
    try:
        # Many training scripts keep their arguments beside the weights: plain values in a class without code.
        plain_classes = torch.serialization.safe_globals([argparse.Namespace])
        with path.open("rb") as file, plain_classes, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the version of pickle
            return read_torch(file)
    except Exception as error:  # damaged bytes end in errors of any kind
        if is_machine_error(error):
            raise
        if isinstance(error, pickle.UnpicklingError) and (archive or "GLOBAL" in str(error)):  # checksums were right
            raise DataError(
                f"{path} holds more than tensors and plain values ({why_unread(error)}), which is never loaded; save "
                "its state dict alone (torch.save(network.state_dict(), ...))"
            ) from error
        raise CorruptError(
            f"{path} is not a whole weights file: damaged, cut off, or no file of torch.save ({why_unread(error)}); "
            "fetch it again"
        ) from error


def _flat(tree: Any, path: str, depth: int) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    if isinstance(tree, Mapping) and depth:
        for key, value in tree.items():
            if isinstance(value, Tensor):
                yield f"{path}{key}", (value, path)
            elif isinstance(key, str):
                yield from _flat(value, f"{path}{key}.", depth - 1)


def _match(backbone: Backbone, tensors: Mapping[str, Tensor], path: Path) -> _Match:
    """The spelling and prefix that cover most of the backbone; ties go to shapes, then to the preferred copy."""
    own = backbone.state_dict()
    spellings = backbone.spellings()
    counts: Counter[tuple[str, str]] = Counter()
    for name in tensors:
        cuts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        for kind, names in spellings.items():
            counts.update((kind, name[:cut]) for cut in cuts if name[cut:] in names)
    if not counts:
        raise MismatchError(
            f"{path} holds no tensor of {backbone.arch}: it has {_some(list(tensors))}, the network has "
            f"{_some(list(own))}; is it of another architecture?"
        )
    most = max(counts.values())

    def rank(kind: str, prefix: str) -> tuple[int, int]:
        names = spellings[kind]
        shapes = sum(
            tensors[prefix + spelt].shape == own[name].shape
            for spelt, name in names.items()
            if prefix + spelt in tensors
        )
        words = set(re.split(r"[._]", prefix))
        return shapes, bool(words & _PREFERRED) - bool(words & _SECOND)

    kind, prefix = max((found for found, count in counts.items() if count == most), key=lambda found: rank(*found))
    under = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return _compared(kind, prefix, spellings[kind], under, own)


def _compared(
    kind: str, prefix: str, names: Mapping[str, str], under: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> _Match:
    """Hold the tensors behind a prefix against the backbone's."""
    state = {name: under[spelt] for spelt, name in names.items() if spelt in under}
    state |= {name: own[name] for name in own if name not in state and name.endswith(_COUNTER)}
    inside = {spelt.partition(".")[0] for spelt in names}
    rest = [spelt for spelt in under if spelt not in names and spelt.rpartition(".")[2] not in _COMPUTED]
    heads = [
        spelt
        for spelt in rest
        if (top := spelt.partition(".")[0]) not in inside and _HEAD_WORDS & set(re.split(r"[_\d]+", top.lower()))
    ]
    return _Match(
        names=kind,
        prefix=prefix,
        state=state,
        missing=[spelt for spelt, name in names.items() if name not in state],
        wrong=[
            f"{spelt} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            for spelt, name in names.items()
            if name in state and state[name].shape != own[name].shape
        ],
        unknown=sorted(set(rest) - set(heads)),
        dropped=tuple(sorted({head.partition(".")[0] for head in heads})),
    )


def _converted(backbone: Backbone, tensors: Mapping[str, Tensor], match: _Match) -> _Match | None:
    """The match after timm's own conversion for this network, where it has one and only positions are off."""
    convert = None
    if match.names == "timm":
        module = sys.modules[type(backbone.root()).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not all(_POSITIONS.search(wrong) for wrong in match.wrong):
        return None  # timm would resample patch embeddings too: a network of another patch size
    under = {name[len(match.prefix) :]: t for name, t in tensors.items() if name.startswith(match.prefix)}
    try:
        under = convert(dict(under), backbone.root())
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        if is_machine_error(error):
            raise
        return None
    again = _compared("timm", match.prefix, backbone.spellings()["timm"], under, backbone.state_dict())
    dropped = tuple(sorted({*match.dropped, *again.dropped}))
    return _Match(again.names, again.prefix, again.state, again.missing, again.wrong, again.unknown, dropped, True)


def _misfit(backbone: Backbone, match: _Match, path: Path) -> str:
    tensors = len(backbone.state_dict())
    where = f"behind {match.prefix!r}" if match.prefix else "at the top level"
    parts = (
        (match.missing, f"{len(match.missing)} of {tensors} tensors missing"),
        (match.wrong, f"{len(match.wrong)} of another shape"),
        (match.unknown, f"{len(match.unknown)} that the network does not have"),
    )
    told = ", ".join(f"{what} ({_some(names)})" for names, what in parts if names)
    return (
        f"{path} does not fit {backbone.arch}: {told}; best match: {match.names} names {where}; "
        "is it of another architecture?"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
