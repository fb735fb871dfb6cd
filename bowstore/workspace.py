"""Which files a command means when its flags do not say: the rules of a workspace, in one place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bowstore import runs
from bowstore.config import CONFIGS, WORKSPACE_FILE, Workspace, dump
from bowstore.data.table import INDEX_FILE
from bowstore.errors import BowstoreError, MissingError, UsageError
from bowstore.files import atomic_file, make_folder
from bowstore.models.arch import is_arch
from bowstore.models.record import NetworkRecord, network_record
from bowstore.plugins import called
from bowstore.progress import say
from bowstore.remote import RemoteFolder, is_remote
from bowstore.train.config import TrainConfig, load_train_config
from bowstore.train.tasks import TASKS
from bowstore.train.tasks.base import StartedSettings, TaskSettings
from bowstore.yaml_file import write_yaml


def init_workspace(folder: Path, files: Mapping[Path, Path]) -> list[Path]:
    """Write `bowstore.yaml` into `folder`, and copy a recipe and its configurations; return what was written.

    Args:
        folder: the workspace; made if it is not there.
        files: what is copied, by its place in the folder, the recipe first; files that are there stay as they are.

    Raises:
        UsageError: a workspace is already there.
    """
    path = folder / WORKSPACE_FILE
    if path.exists():
        raise UsageError(f"{path} is already there; edit it, or name another folder")
    written = [path]
    make_folder(folder / CONFIGS)
    for name, source in files.items():
        target = folder / name
        if not target.exists():
            make_folder(target.parent)
            with atomic_file(target) as file:
                file.write(source.read_bytes())
            written.append(target)
    with atomic_file(path) as file:
        recipe = {"recipe": str(next(iter(files))) if files else None}
        file.write(_WORKSPACE_TEXT.format(recipe=write_yaml(recipe).decode().strip()).encode())
    return written


_WORKSPACE_TEXT = """\
# Paths and defaults of this bowstore workspace; flags and --set override them.
shards: data/shards/train        # written by: bowstore shards SRC data/shards; more images: a list, as of stores
val_shards: null                 # null: data/shards/val, or data/shards/test
store: data/words.zarr           # written by: bowstore encode; of more images: bowstore encode --vocabulary
runs: runs
networks: networks               # results of networks that are no runs: bowstore eval ... --arch NAME
teacher: null                    # run, checkpoint or configuration; null: the newest finished run of a teacher's task
config: null                     # what `bowstore train` trains; null: the recipe's next training stage
# What follows what: `bowstore run` runs it, `bowstore train` and `bowstore encode` take its next stage.
{recipe}
voc: data/VOCdevkit              # with a folder a year, as VOC2007; for: bowstore eval voc07
plugins: []                      # files or modules with sources, tasks and protocols of your own
"""


def find_run(workspace: Workspace, name: str | Path) -> Path:
    """A run directory or checkpoint by path, or by name below the workspace's runs.

    Raises:
        MissingError: neither exists; the message lists the runs there are.
    """
    for path in (Path(name), workspace.runs / name):
        if path.exists():
            return path
    there = [run.name for run in runs.below(workspace.runs)]
    raise MissingError(f"no run or file {str(name)!r}; runs in {workspace.runs}: {', '.join(there) or 'none'}")


def find_results(workspace: Workspace, names: Sequence[str]) -> dict[str, list[Path]]:
    """Result files by the name of the run or network that has them, in the order of the names.

    Args:
        workspace: says where runs and networks lie.
        names: of runs and networks, or paths of what was evaluated; none for all of the workspace.

    Raises:
        MissingError: there is no such run, network or file, or it was not evaluated.
        UsageError: the same one twice.
    """
    places = (workspace.runs, workspace.networks)
    folders = (it for place in places for it in sorted(p.parent for p in place.glob(f"[!.]*/**/{runs.EVAL_FOLDER}")))
    evaluated = [folder for folder in folders if runs.result_paths(folder)]
    found: dict[Path, list[Path]] = {}
    for name in names or evaluated:
        path = next((path for path in (Path(name), *(place / name for place in places)) if path.exists()), None)
        if path is None:
            there = ", ".join(_below(folder, places) for folder in evaluated) or "none"
            raise MissingError(f"no run, network or file {str(name)!r}; evaluated in this workspace: {there}")
        folder = runs.results_folder(path)
        if folder in found:
            raise UsageError(f"{name} is named twice; name each once")
        found[folder] = runs.result_paths(folder)
        if not found[folder]:
            inside = " or ".join(str(other) for other in evaluated if other.is_relative_to(folder))
            remedy = f"name {inside}" if inside else f"`bowstore eval PROTOCOL --run {path}` makes some"
            raise MissingError(f"{folder} holds no results; {remedy}")
    if not found:
        raise MissingError(f"nothing was evaluated in {' or '.join(map(str, places))}; `bowstore eval PROTOCOL` does")
    short = {folder: _below(folder, places) for folder in found}
    return {
        name if list(short.values()).count(name) == 1 else str(folder): found[folder] for folder, name in short.items()
    }


def _below(folder: Path, places: Sequence[Path]) -> str:
    """A folder's path below the place that holds it, else its name."""
    return next((str(folder.relative_to(place)) for place in places if folder.is_relative_to(place)), folder.name)


def newest_run(workspace: Workspace, *, teacher: bool = False) -> Path:
    """The run that finished last; with `teacher`, of a task whose networks make words.

    Raises:
        MissingError: there is none.
    """
    for run in runs.finished_below(workspace.runs):
        try:
            if not teacher or TASKS.get(str(runs.task_name(runs.read_config(run)))).teacher:
                return run
        except BowstoreError as error:  # perhaps of another task; and nobody asked for this one
            say(f"warning: {error}; the run is passed over")
    tasks = " or ".join(name for name in TASKS.names() if TASKS.get(name).teacher)
    kind = f"finished run of a teacher (task {tasks})" if teacher else "finished run"
    raise MissingError(f"no {kind} in {workspace.runs}; `bowstore train --config ...` makes one, or name it by flag")


def resolve_teacher(
    workspace: Workspace, teacher: str | Path | None, *, seed: int | None = None
) -> str | Path | NetworkRecord:
    """The teacher a command means: the flag, the workspace's, or the newest finished run of a teacher's task.

    Args:
        workspace: says what the flag does not.
        teacher: as the flag says.
        seed: from which a configuration's network is drawn; None for the configuration's own.

    Raises:
        MissingError, UsageError: as `resolve_network`.
    """
    named = teacher or workspace.teacher
    return resolve_network(workspace, named, seed=seed) if named else newest_run(workspace, teacher=True)


def resolve_network(workspace: Workspace, name: str | Path, *, seed: int | None = None) -> str | Path | NetworkRecord:
    """The network that a command names: a run, a file, an architecture, or a configuration.

    A training configuration (`is_configuration`) means the network that its training starts from. A run or file wins
    over an architecture of the same name.

    Args:
        workspace: says where runs lie.
        name: as the command has it.
        seed: from which a configuration's network is drawn; None for the configuration's own.

    Raises:
        MissingError: neither a run, a file nor an architecture.
        UsageError: a configuration that cannot be used.
    """
    named = str(name)
    if is_configuration(named):
        return initial_network(Path(named), seed)
    there = any(path.exists() for path in (Path(named), workspace.runs / named))
    return named if not there and is_arch(named) else find_run(workspace, named)


def is_configuration(teacher: str) -> bool:
    """Whether a teacher's name is that of a training configuration, whose network was not trained."""
    return Path(teacher).suffix == ".yaml" and not Path(teacher).is_dir()


def initial_network(config: Path, seed: int | None = None) -> NetworkRecord:
    """The network that a training by a configuration starts from; `seed` None for the configuration's.

    Raises:
        MissingError: no such configuration.
        UsageError: a key or value in it that cannot be used, or a training that starts from another run.
    """
    loaded = load_train_config(config, (), {} if seed is None else {"seed": seed})
    if start := getattr(loaded.task, "start", None):
        raise UsageError(f"{config} is no random network: its training starts from {start}; name that as the teacher")
    return network_record(dump(loaded), str(config))


def with_start(task: TaskSettings, workspace: Workspace) -> TaskSettings:
    """Settings of a task with the path of the run that it starts from, if it names one.

    Raises:
        MissingError: there is no such run or file.
    """
    if not isinstance(task, StartedSettings) or task.start is None:
        return task
    try:
        return task.model_copy(update={"start": find_run(workspace, task.start)})
    except MissingError as error:
        raise MissingError(f"task.start: {error}; name the run to start from, or null for random weights") from error


def resolve_train(
    workspace: Workspace,
    config: Path,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """A training configuration with what the workspace says filled in: paths, storage, words; URLs stay URLs.

    Args:
        workspace: says what the others do not.
        config: file, or the name of one.
        overrides: `a.b=value`, from --set.
        flags: values of other flags by key, `task.store` for one; None counts as not given.

    Raises:
        MissingError: there is no such file.
        UsageError: a key or value that cannot be used.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    resolved = load_train_config(config, overrides, given)
    storage = resolved.runtime.storage or workspace.storage
    task = with_start(resolved.task, workspace)
    updates: dict[str, object] = {
        "task": task,
        "shards": resolved.shards or workspace.shards,
        "runtime": resolved.runtime.model_copy(update={"storage": storage}),
    }
    if resolve := TASKS.get(task.name).resolve:
        updates["task"] = called(resolve)(task, workspace.model_copy(update={"storage": storage}))
    return resolved.model_copy(update=updates)


def only_store(workspace: Workspace, remedy: str) -> Path:
    """The workspace's word store.

    Raises:
        UsageError: it names several; the message ends in `remedy`.
    """
    if len(workspace.store) > 1:
        raise UsageError(f"{WORKSPACE_FILE} names {len(workspace.store)} stores, {workspace.store}; {remedy}")
    return workspace.store[0]


def val_shards(workspace: Workspace) -> Path:
    """Shards to test on: the workspace's, or val or test beside the train shards, of several the first.

    Raises:
        MissingError: neither exists.
    """
    if found := [workspace.val_shards] if workspace.val_shards else shards_beside(workspace, "val", "test"):
        return found[0]
    beside = workspace.shards[0].parent
    raise MissingError(f"no test shards: neither {beside / 'val'} nor {beside / 'test'} exists; give --test")


def shards_beside(workspace: Workspace, *splits: str) -> list[Path]:
    """Those of the splits that lie beside the train shards, of several the first."""
    paths = [workspace.shards[0].parent / split for split in splits]
    return [
        path
        for path in paths
        if (RemoteFolder(path, workspace.storage).exists(INDEX_FILE) if is_remote(path) else path.is_dir())
    ]
