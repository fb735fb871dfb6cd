"""What of a recipe is done: read off what lies on the disk, without torch and without changing anything."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache, singledispatch
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bowstore import runs
from bowstore.config import dump, validate
from bowstore.data.records import PARTS_FOLDER, PLAN_FILE, read_manifest
from bowstore.data.synthetic import MARKER
from bowstore.data.table import INDEX_FILE, read_header
from bowstore.errors import BowstoreError, MismatchError, MissingError
from bowstore.files import read_json
from bowstore.recipes.steps import (
    Cell,
    EncodeStep,
    EvalStep,
    ImagesStep,
    Plan,
    ShardsStep,
    Step,
    TrainStep,
    in_stage,
    remedy_of,
)
from bowstore.remote import is_remote
from bowstore.train.config import TrainConfig, differences
from bowstore.words.layer import VOCABULARY_SETTINGS, Layer
from bowstore.words.store import Store

_SPLITS = ("train", "val", "test")


class State(NamedTuple):
    """How far a stage is.

    Attributes:
        so_far: done, begun, or neither.
        problem: what lies there is of other settings or inputs: what differs; empty if nothing.
    """

    so_far: Literal["done", "begun", "to do"]
    problem: str = ""


TO_DO, BEGUN, DONE = State("to do"), State("begun"), State("done")


@singledispatch
def state_of(step: Step) -> State:
    """How far a stage is.

    Raises:
        BowstoreError: files that cannot be read.
    """
    raise NotImplementedError(step.kind)


@state_of.register
def _(step: ImagesStep) -> State:
    if step.render is None:
        return DONE if step.out.exists() else TO_DO
    try:
        marker = read_json(step.out / MARKER)
    except MissingError:
        return TO_DO
    for name, value in step.render:
        if marker.get(name) != value:
            problem = f"{step.out} holds images of {name} {marker.get(name)}, not {value}"
            return State("done", problem)
    return DONE if marker.get("complete") else BEGUN


@state_of.register
def _(step: ShardsStep) -> State:
    if is_remote(step.train):
        return DONE
    begun = False
    for folder in (step.out / split for split in _SPLITS):
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is None:
            begun |= (folder / PARTS_FOLDER / PLAN_FILE).exists()
            continue
        made = manifest.values["settings"]
        for name in ("seed", "per_shard"):
            if made[name] != (value := getattr(step.config, name)):
                return State("done", f"{folder} was made with {name} {made[name]}, not {value}")
    if begun:
        return BEGUN
    return DONE if (step.train / INDEX_FILE).exists() else TO_DO


@state_of.register
def _(step: TrainStep) -> State:
    return run_state(step.run, step.config)


def run_state(run: Path, config: TrainConfig) -> State:
    """How far a run is, and whether it is the one of a configuration and what it names."""
    if not (runs.is_finished(run) or runs.checkpoints(run)):
        return BEGUN if (run / runs.CONFIG_FILE).exists() else TO_DO
    state = DONE if runs.is_finished(run) else BEGUN
    if not (run / runs.CONFIG_FILE).exists():
        return state  # lost: `train` compares what checkpoints and export say
    there = validate(TrainConfig, runs.read_config(run), str(run / runs.CONFIG_FILE))
    if found := differences(there, _with_layer_of(there, config)):
        return state._replace(problem=f"run directory {run} holds another configuration ({found[0]})")
    lineage = runs.read_lineage(run)
    made_of = lineage["inputs"] if lineage else _recorded_inputs(run)
    here = fingerprint(config.shards) if config.shards else None
    if here and made_of.get("shards") not in (None, here):
        return state._replace(problem=f"{run} was trained on other images than {config.shards} holds")
    vocabulary = lineage["targets"].get("vocabulary_digest") if lineage else None
    store, layer = getattr(there.task, "store", None), getattr(there.task, "layer", None)
    if (
        vocabulary
        and store
        and layer_of(store, layer)
        and vocabulary != _layers(store)[layer].made_with()["vocabulary"]
    ):
        return state._replace(problem=f"{run} was trained on other words of {layer} than word store {store} holds")
    return state


def _with_layer_of(there: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The configuration, with the layer that the run found to be the store's only one."""
    if getattr(config.task, "layer", "") is None and getattr(there.task, "layer", None):
        return config.model_copy(update={"task": config.task.model_copy(update={"layer": there.task.layer})})  # type: ignore[attr-defined]
    return config


def _recorded_inputs(run: Path) -> dict[str, str]:
    try:
        return dict(read_json(run / runs.ENVIRONMENT_FILE)["inputs"])
    except (MissingError, KeyError, TypeError):
        return {}


@state_of.register
def _(step: EncodeStep) -> State:
    if is_remote(step.store) or not step.store.exists():
        return TO_DO
    layers = _layers(step.store)
    there = [layers[name] for name in step.config.layers if name in layers]
    done = len(there) == len(step.config.layers) and all(layer.complete for layer in there)
    for problem in _store_problems(step, layers):
        return State("done" if done else "begun", problem)
    return DONE if done else BEGUN if there else TO_DO


def _store_problems(step: EncodeStep, layers: dict[str | None, Layer]) -> Iterator[str]:
    here, there = fingerprint(step.on), Store(step.store).fingerprint
    if here and here != there:
        yield f"word store {step.store} was made of data set {there}, but {step.on} is {here}"
    config, weights = step.config, run_weights(Path(step.config.teacher))
    numbers = config.num_words * len(config.layers) if len(config.num_words) == 1 else config.num_words
    asked: dict[str, Any] = {"precision": config.precision, "border": config.border}
    asked |= {} if config.vocabulary else {key: getattr(config, key) for key in VOCABULARY_SETTINGS}
    asked |= {"teacher weights": weights} if weights else {}
    for name, number in zip_longest(config.layers, numbers):
        made = layers[name].made_with() if name in layers else {}
        for key, value in (asked | ({"K": number} if number else {})).items():
            if made and made[key] != value:
                yield f"layer {name!r} of word store {step.store} was made with {key} {made[key]}, not {value}"


@state_of.register
def _(step: EvalStep) -> State:
    missing = [cell for cell in step.cells if not cell_is_done(cell)]
    if not missing:
        return DONE
    return BEGUN if len(missing) < len(step.cells) else TO_DO


def cell_is_done(cell: Cell) -> bool:
    """Whether the result of these weights, images and settings is there."""
    try:
        result = read_json(cell.result)
        inputs, settings, version = result["inputs"], result["settings"], result["protocol_version"]
        recorded = {**settings.get("probe", {}), **settings.get("options", {})}  # options: not before 0.2
    except (MissingError, KeyError, TypeError, AttributeError):
        return False
    if version != cell.kind.describe(cell.settings).version:
        return False
    for name, value in dump(cell.settings).items():
        there, here = recorded.get(name, value), value
        if name in cell.data and (known := fingerprint(cell.data[name])):
            there, here = inputs.get(name), known  # the images, wherever they lie
        if there != here:
            return False
    if cell.config.random:  # of the run's own seed and network, unless its configuration was written since
        return cell.result.stat().st_mtime >= (cell.run / runs.CONFIG_FILE).stat().st_mtime
    return bool(inputs.get("weights_sha256") == run_weights(cell.run))


_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "U8": "uint8", "BOOL": "bool"}  # fmt: skip


def run_weights(run: Path) -> str | None:
    """`weights_sha256` of a finished run's network, read from its file; None where there is none."""
    path = run / runs.BACKBONE_FILE
    return _weights(path, path.stat().st_mtime_ns) if path.is_file() else None


@cache
def _weights(path: Path, _written: int) -> str | None:
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        digest, blob = hashlib.sha256(), memoryview(data)[8 + length :]
        for name in sorted(entries.keys() - {"__metadata__"}):
            entry = entries[name]
            digest.update(f"{name}\ntorch.{_TYPES[entry['dtype']]}\n{tuple(entry['shape'])}\n".encode())
            digest.update(blob[slice(*entry["data_offsets"])])
        return digest.hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None  # who loads it says what is wrong


def layer_of(store: Path, name: str | None) -> bool:
    """Whether a complete layer of that name is there."""
    return not is_remote(store) and store.exists() and name in Store(store).layers


def _layers(store: Path) -> dict[str | None, Layer]:
    return {layer.name: layer for layer in Store(store).every_layer()}


def fingerprint(shards: Path) -> str | None:
    """The fingerprint in an index; None where there is none here, or it cannot be read."""
    if is_remote(shards):
        return None
    try:
        return str(read_header(shards / INDEX_FILE).meta["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def is_wanted(step: Step, plan: Plan) -> bool:
    """Whether anybody still needs what a stage makes: images need not be there once they have become shards."""
    if not isinstance(step, ImagesStep):
        return True
    readers = [other for other in plan.steps.values() if isinstance(other, ShardsStep) and other.src == step.out]
    return not readers or any(state_of(reader).so_far != "done" for reader in readers)


def check_before(step: Step, plan: Plan) -> None:
    """Refuse what is known before anything runs: results of other settings, and inputs that nobody will make.

    Raises:
        MismatchError: what lies in the stage's place is of other settings or inputs.
        MissingError: something that it reads is not there, and no stage makes it.
    """
    state = state_of(step)
    if state.problem:
        raise MismatchError(f"{state.problem}; {remedy_of(step)}")
    if state != DONE and (lost := _lost(step, plan)):
        raise MissingError(f"{lost} is not there, and no stage makes it; name another, or put it there")


def _lost(step: Step, plan: Plan) -> Path | None:
    """Data that a stage reads, that is not there, and that no stage makes."""
    match step:
        case ShardsStep():
            read = [step.src]
        case TrainStep() | EncodeStep():
            read = [step.on]
        case EvalStep():
            read = [place for cell in step.cells for place in cell.data.values()]
        case _:
            read = []
    made = [Path(place) for other in plan.steps.values() for place in other.writes]
    for place in read:
        near = any(place.is_relative_to(other) or other.is_relative_to(place) for other in made)
        if not (is_remote(place) or place.exists() or near):
            return place
    return None


def overview(plan: Plan) -> list[dict[str, Any]]:
    """The stages in the order of running, as plain values: what each reads and writes, and how far it is."""
    shown = []
    for step in plan.steps.values():
        with in_stage(step.name, plan.recipe):
            state, wanted, problem = state_of(step), is_wanted(step, plan), ""
            try:
                check_before(step, plan)
            except BowstoreError as error:
                problem = str(error)
        shown.append(
            {
                "stage": step.name,
                "kind": step.kind,
                "state": state.so_far if wanted or state == DONE else "not needed",
                "problem": problem,
                "reads": list(step.reads),
                "writes": list(step.writes),
            }
        )
    return shown


def overview_text(plan: Plan) -> str:
    """The stages for people, a few lines each."""
    lines = [f"{plan.recipe.path}{'' if plan.seed is None else f', seed {plan.seed}'}"]
    for stage in overview(plan):
        lines += ["", f"{stage['stage']} ({stage['kind']}): {stage['state']}"]
        lines += [f"  refused: {stage['problem']}"] if stage["problem"] else []
        lines += [f"  {what:<6} {place}" for what in ("reads", "writes") for place in stage[what]]
    return "\n".join(lines)
