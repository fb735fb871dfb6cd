"""The layout of a run directory, and what its files say as plain values.

runs/NAME/config.yaml           the resolved configuration
          environment.json      versions, device, the command, the identity of the inputs
          lineage.json          what it was made of: the images, the words and the network that made these
          metrics.jsonl         a line each logging step; tensorboard/ has the same
          checkpoints/          step-N.pt, the newest few
          backbone.safetensors  the network alone, once the run is finished
          eval/                 a JSON file each protocol; random/eval/ those of the network before training;
                                NAME.unfinished/ has checkpoints of one that trains
          96px/eval/            those of the network at another size of its images
networks/NAME/eval/             those of a network that is no run: an architecture, with a weights file or without

The one place that spells these names. Loads no torch, and reads runs of any version of bowstore.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from bowstore.errors import CorruptError, MissingError
from bowstore.files import file_digest, read_json, write_json
from bowstore.progress import say
from bowstore.yaml_file import read_yaml

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
LINEAGE_FILE = "lineage.json"
METRICS_FILE = "metrics.jsonl"
BOARD_FOLDER = "tensorboard"
CHECKPOINT_FOLDER = "checkpoints"
BACKBONE_FILE = "backbone.safetensors"
WRITTEN = (CONFIG_FILE, ENVIRONMENT_FILE, LINEAGE_FILE, METRICS_FILE)  # at the start of a run
EVAL_FOLDER = "eval"
RANDOM_FOLDER = "random"
_LONGEST_STEM = 100  # characters of a file's name that a folder's name takes over
_EXPORT_SUFFIX, _CHECKPOINT_SUFFIX = ".safetensors", ".pt"
_CHECKPOINT = re.compile(rf"step-(\d+){re.escape(_CHECKPOINT_SUFFIX)}")


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, complete or not."""
    return any((path / name).exists() for name in (CONFIG_FILE, CHECKPOINT_FOLDER, BACKBONE_FILE))


def is_finished(run: Path) -> bool:
    """Whether a run reached its end."""
    return (run / BACKBONE_FILE).exists()


def is_export(path: Path) -> bool:
    """Whether a file is an exported network, by its name."""
    return path.suffix == _EXPORT_SUFFIX


def is_network(path: Path) -> bool:
    """Whether a path is a checkpoint's or an exported network's file, by its name."""
    return path.is_file() and path.suffix in (_CHECKPOINT_SUFFIX, _EXPORT_SUFFIX)


def below(folder: Path) -> list[Path]:
    """Run directories in a folder of runs, by name."""
    return sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG_FILE}"))


def finished_below(folder: Path) -> list[Path]:
    """Finished runs in a folder of runs, the one that finished last first."""
    exports = sorted(folder.glob(f"[!.]*/{BACKBONE_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in exports]


def read_config(run: Path) -> dict[str, Any]:
    """The configuration that a run directory holds, as plain values: of any version of bowstore.

    Raises:
        MissingError: it is not a run directory.
        UsageError: the file is no YAML.
    """
    path = run / CONFIG_FILE
    if not path.exists():
        raise MissingError(f"{run} is not a run directory (it has no {CONFIG_FILE})")
    return read_yaml(path)


def task_name(config: Mapping[str, Any]) -> Any:
    """The name of the task in a run's configuration as plain values; None if there is none.

    Older runs say `task: NAME`, newer ones, whose tasks have settings of their own, `task: {name: NAME, ...}`.
    """
    task = config.get("task")
    return task.get("name") if isinstance(task, Mapping) else task


# --- the network

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "U8": "uint8", "BOOL": "bool"}  # fmt: skip


def weights_sha256(run: Path) -> str | None:
    """The digest of a finished run's network, that of `models.weights`, without torch; None where there is none."""
    path = run / BACKBONE_FILE
    return _digest_of(path, path.stat().st_mtime_ns) if path.is_file() else None


@cache
def _digest_of(path: Path, _written: int) -> str | None:
    digest = hashlib.sha256()
    try:
        for name, tensor in sorted(deserialize(path.read_bytes())):  # type: ignore[no-untyped-call]
            digest.update(f"{name}\ntorch.{_TYPES[tensor['dtype']]}\n{tuple(tensor['shape'])}\n".encode())
            digest.update(tensor["data"])
    except (OSError, SafetensorError, KeyError):
        return None  # who loads it says what is wrong
    return digest.hexdigest()


# --- checkpoints


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINT_FOLDER / f"step-{step:09d}{_CHECKPOINT_SUFFIX}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, newest first.

    Raises:
        OSError: their folder is there and cannot be listed.
    """
    return sorted(
        (path for path in _checkpoint_files(run) if _CHECKPOINT.fullmatch(path.name)),
        key=step_of,
        reverse=True,
    )


def set_aside(run: Path) -> list[Path]:
    """Checkpoints that were set aside, as damaged or diverged.

    Raises:
        OSError: their folder is there and cannot be listed.
    """
    return [path for path in _checkpoint_files(run) if _CHECKPOINT.match(path.name) and step_of(path) < 0]


def _checkpoint_files(run: Path) -> list[Path]:
    folder = run / CHECKPOINT_FOLDER
    try:
        return [folder / name for name in os.listdir(folder)]  # Path.glob finds nothing in a folder it may not read
    except FileNotFoundError:
        return []


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for another name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else -1


# --- metrics


def metric_lines(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a run's metrics that can be read, in order, and what is wrong with the file, in lines for people.

    The last line may be cut: a process that is killed while it writes leaves it so, and it is written again.
    """
    path = run / METRICS_FILE
    try:
        texts = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    lines, unread = [], []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        elif number < len(texts):  # what follows the last line feed is a cut line, or empty
            unread.append(number)
    some = ", ".join(map(str, unread[:3])) + (", ..." if len(unread) > 3 else "")
    told = f"{len(unread)} lines of {path} are no JSON objects with a step (line {some}) and are left out"
    return lines, [told] if unread else []


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics, in order; a line that cannot be read is left out with a warning."""
    lines, problems = metric_lines(run)
    for problem in problems:
        say(f"warning: {problem}")
    return lines


def lost_lines(run: Path, logged: int | None) -> list[str]:
    """Whether the metrics lack what was logged before a checkpoint, in lines for people.

    Args:
        run: the run directory.
        logged: the last step that was logged before the checkpoint; None if it does not say.
    """
    path = run / METRICS_FILE
    steps = [line["step"] for line in metric_lines(run)[0]]
    if not logged or logged in steps:
        return []
    have = f"holds no line before step {min(steps)}" if steps and min(steps) > logged else "lacks that line"
    have = have if steps else "holds no line" if path.exists() else "is not there"
    return [f"step {logged} was logged before the newest checkpoint, and {path} {have}; restore it from a copy"]


# --- results


def result_path(run: Path, protocol_id: str) -> Path:
    """Where a run directory keeps the result of a protocol."""
    return run / EVAL_FOLDER / f"{protocol_id.replace('/', '-')}.json"


def unfinished_folder(run: Path, protocol_id: str) -> Path:
    """Where a protocol that trains for hours keeps its checkpoints, until its result is written."""
    return result_path(run, protocol_id).with_suffix(".unfinished")


def result_paths(run: Path) -> list[Path]:
    """The result files of a run directory, by name; none where nothing was evaluated."""
    return sorted((run / EVAL_FOLDER).glob("[!.]*.json"))


def all_result_paths(path: Path) -> list[Path]:
    """The result files of a network in all forms that were evaluated: as it is, random, at other sizes."""
    folder = results_folder(path)
    return [result for inner in sorted(folder.rglob(EVAL_FOLDER)) for result in result_paths(inner.parent)]


def results_folder(path: Path, *, random_init: bool = False, size: int | None = None) -> Path:
    """The folder that takes the results of a network as a run directory does: the run's own, or one beside a file.

    Args:
        path: run directory, checkpoint or exported network; or a folder of `network_folder`.
        random_init: the results are those of the network before training.
        size: they are those at this size of the images, pixels, which is not the network's own.
    """
    folder = path if path.is_dir() or not path.exists() else path.with_suffix("")
    folder = folder / RANDOM_FOLDER if random_init else folder
    return folder / f"{size}px" if size else folder


def network_folder(networks: Path, name: str, *, weights: Path | None, seed: int) -> Path:
    """Where the results of a network lie that is no run: by its name and its weights.

    Args:
        networks: the workspace's folder of such.
        name: the architecture, or the configuration whose untrained network it is.
        weights: its weights file; files of one name and other bytes have folders of their own.
        seed: of random weights.
    """
    of = f"{weights.stem[:_LONGEST_STEM]}-{file_digest(weights)[:8]}" if weights else f"seed-{seed}"
    return networks / re.sub(r"[^\w.-]+", "-", f"{name}-{of}")


# --- lineage


def run_of(path: Path) -> Path:
    """The run directory that a network belongs to: the path itself, or that in which a file lies as a run's own."""
    if path.parent.name == CHECKPOINT_FOLDER:
        return path.parent.parent
    return path.parent if path.name == BACKBONE_FILE else path


def write_lineage(run: Path, *, name: str, task: str, inputs: Mapping[str, str], targets: Mapping[str, Any]) -> None:
    """Record what a run is made of, as `read_lineage` gives it back.

    Args:
        run: the run directory.
        name: the run's.
        task: name of its task.
        inputs: digests of the images and targets that it depends on.
        targets: where the targets come from; with `teacher`, a network as word stores record it, whose words they are;
            with `start`, the network that the run began with.
    """
    write_json(run / LINEAGE_FILE, {"name": name, "task": task, "inputs": dict(inputs), "targets": dict(targets)})


def read_lineage(run: Path) -> dict[str, Any] | None:
    """What a run was made of; None where that is not recorded: in older runs, and outside of a run.

    Raises:
        CorruptError: the file is no such record.
    """
    path = run / LINEAGE_FILE
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("targets"), dict):
        raise CorruptError(f"{path} does not say what the run was made of; restore it from a copy, or move it away")
    return value


def descent(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    """How a run came about, the first thing first: `rotation`, `rotnet`, `256 words of block3`, `bownet`."""
    targets = lineage.get("targets") or {}
    started = _descent_of_network(targets["start"]) if "start" in targets else ()
    before = descent_of_words(targets) if "teacher" in targets else (str(lineage.get("task")),)
    return *started, *before, str(lineage.get("name"))


def descent_of_words(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """The same of words, of what `bowstore.words.store.layer.Layer.lineage` says of them."""
    return *_descent_of_network(layer.get("teacher")), f"{layer.get('num_words')} words of {layer.get('layer')}"


def _descent_of_network(network: Any) -> tuple[str, ...]:
    if not isinstance(network, Mapping):  # a plugin's own, or lost
        network = {"name": network or "unknown"}
    if network.get("lineage"):
        return descent(network["lineage"])
    name, origin = network.get("name"), network.get("weights_file") or network.get("weights_layout")
    return (str(name) if origin in (None, name) else f"{name} ({origin})",)
