"""What a training run is told: the task, the schedule, and how to run. Loads no torch."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from bowstore.config import (
    Computing,
    Count,
    Listed,
    ListedPlaces,
    ModelConfig,
    Positive,
    Seed,
    StorageConfig,
    Strict,
    Unit,
    ViewConfig,
    bundled_configs,
    dump,
    find_config,
    no_such_config,
    validate,
    value_differences,
)
from bowstore.data.config import HW_LOAD
from bowstore.errors import MissingError, UsageError
from bowstore.limits import MAX_BATCH, MAX_FLOAT, path_problem
from bowstore.overrides import apply_overrides
from bowstore.progress import say
from bowstore.runs import task_name
from bowstore.torchrun import ranks
from bowstore.train.tasks import TASKS
from bowstore.train.tasks.base import TaskSettings
from bowstore.yaml_file import read_yaml, shown

# Until tasks had settings of their own, `task: words` stood beside the groups `words:` and `rotation:`.
_OLD_GROUPS = ("rotation", "words")
_NO_STUDENT = (
    "a configuration no longer says what is trained next; leave this out, and write a recipe, as "
    "`bowstore init --recipe NAME` does"
)


class OptimConfig(Strict):
    """SGD with step decay. Epochs are of `steps_per_epoch` steps, or one pass over the images when null."""

    batch: int = Field(256, ge=4, le=MAX_BATCH, description="images a step, over all ranks")
    epochs: Count = 140
    steps_per_epoch: Count | None = None
    lr: Positive = 0.03
    milestones: Listed[Count] = Field((), description="epochs after which lr is multiplied by factor")
    factor: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(1e-4, ge=0, le=MAX_FLOAT)
    decay_norm_and_bias: bool = Field(True, description="weight decay on batch norm and biases; never on gamma")

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must increase")
        return self


class ProbeConfig(Strict):
    """What the network is measured by while it is trained: protocols on features, of labelled images."""

    eval: Any = Field("knn", description="as in a recipe: NAME, {NAME: settings}, or a list of these")
    every_epochs: Count = Field(5, description="in the last line of the log of every so many epochs, and of the run")


class RuntimeConfig(Computing):
    """How to run; none of it changes what is learned beyond rounding.

    The step is compiled on a GPU, and on a CPU where the run is long enough to pay for it, unless `compile` says else.
    """

    amp: bool = Field(True, description="bfloat16 autocast on a GPU")
    pad_stem: bool = Field(False, description="run the first convolution on four channels, for a GPU's tensor cores")
    hw_decoder_load: Unit = Field(HW_LOAD, description="share of the JPEGs that a GPU's hardware decoder takes")
    targets: Literal["auto", "resident", "host", "streamed"] = Field(
        "auto", description="where the words lie: on the device, in host memory, on disk; auto: by their size"
    )
    storage: StorageConfig | None = Field(None, description="null: the workspace's")
    probe: ProbeConfig | None = Field(None, description="null: the network is not measured while it is trained")
    log_every_steps: Count = 50
    checkpoint_every_steps: Count = 1000
    keep_checkpoints: Count = 2


def _settings(value: Any) -> TaskSettings:
    """Settings of a task by the model of its kind; `words` alone stands for `{name: words}`."""
    if isinstance(value, TaskSettings):
        return value
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ValueError(f"write a group with the task's name, as in {{name: {TASKS.names()[0]}}}")
    return TASKS.get(given["name"]).settings.model_validate(given)


class TrainConfig(Strict):
    """One training run: a task by name with its settings, and how it is trained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder below runs/")
    task: Annotated[SerializeAsAny[TaskSettings], BeforeValidator(_settings)]
    seed: Seed = Field(0, description="of weights, order and augmentation")
    shards: ListedPlaces | None = Field(
        None, description="shards with their index, of one folder or several; null: the workspace's"
    )
    images: Count | None = Field(None, description="use at most so many, the first rows")
    view: ViewConfig = ViewConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="before")
    @classmethod
    def _older(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {"task": None, **of_today(values)[0]}
        for group in _OLD_GROUPS:
            if group in values and isinstance(values["task"], dict):
                raise ValueError(f"{group}: settings of a task stand in its group now, as in task: {{name: {group}}}")
        return values

    @model_validator(mode="after")
    def _the_view_suits_the_task(self) -> Self:
        name = self.task.name
        if self.view.cutmix and not TASKS.get(name).mixes:
            raise ValueError(f"view.cutmix must be false for task {name}: a mixed image has no target there")
        self.task.check_view(self.view)
        return self


def of_today(values: dict[str, Any], named: str | None = None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Values of a configuration of any age as they are written today, and the settings in them of other tasks, by name.

    Args:
        values: of a file; `student`, which named the configuration to train next, is left out.
        named: the task to take instead of the file's.
    """
    values = {key: value for key, value in values.items() if key != "student"}
    given = values.get("task")
    if isinstance(given, dict):
        groups = {str(given.get("name")): {key: value for key, value in given.items() if key != "name"}}
    else:
        groups = {name: values.pop(name) for name in _OLD_GROUPS if isinstance(values.get(name), dict)}
    name = named or task_name(values)
    if not isinstance(name, str):  # which validation refuses
        return values, {}
    return {**values, "task": {"name": name, **groups.pop(name, {})}}, groups


def read_with_base(path: Path, behind: Sequence[Path] = (), group: str = "") -> tuple[dict[str, Any], list[Path]]:
    """What a file says, over what the configuration says that it is based on (`base: NAME`).

    The base is the file of that name beside this one, or what `find_config` finds. Its values hold where this file says
    nothing; groups are merged, but for that of another task.

    Args:
        path: a file, or the name of one (`find_config`).
        behind: files that are based on it.
        group: a folder in `configs/`, as of recipes.

    Returns:
        The values, and the files that they stand in, that of `path` first.

    Raises:
        MissingError: no such file; the message names the nearest that comes with bowstore.
        UsageError: it cannot be used, or is based on itself.
    """
    found = find_config(path, group)
    if found != path and ranks().first:
        origin = ", which comes with bowstore" if found.parent == bundled_configs() / group else ""
        say(f"configuration {path}: {found}{origin}")
    try:
        values = read_yaml(found)
    except MissingError as error:
        where = f"{behind[-1]}: base: " if behind else ""
        what = "recipe" if group else "configuration file"
        raise MissingError(f"{where}no {what} {path}; {no_such_config(path, group)}") from error
    if (base := values.pop("base", None)) is None:
        return values, [found]
    if not isinstance(base, str) or path_problem(base):
        raise UsageError(f"{found}: base: write the name of a configuration (got {shown(base)})")
    if found in behind:
        raise UsageError(f"{found}: base: {base} is based on this file itself; take one of the two out")
    beside = found.parent / base
    below, files = read_with_base(beside if beside.is_file() else Path(base), (*behind, found), group)
    return _merged({key: value for key, value in below.items() if key != "name"}, values), [found, *files]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = {**below, **above}
    for key, old in below.items():
        new = result[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) == old.get("name"):
            result[key] = _merged(old, new)
    return result


def load_train_config(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> TrainConfig:
    """Load and validate a training configuration; where its file is not `path` itself, a line says which it is.

    Args:
        path: a file, or the name of one (`find_config`).
        overrides: `a.b=value`, with values as in a file.
        flags: values by key, as `a.b`; taken as they are.

    Raises:
        MissingError: no such file; the message names the nearest that comes with bowstore.
        UsageError: a file, key or value that cannot be used.
    """
    values, _ = read_with_base(path)
    values.setdefault("name", path.stem)
    if values.get("student") is not None:
        raise UsageError(f"{path}: student: {_NO_STUDENT}")
    pairs = (override.partition("=") for override in overrides)
    named = next((text.strip(" '\"") for key, _, text in pairs if key.strip() in ("task", "task.name")), None)
    values, others = of_today(values, named)
    meant = partial(key_of_today, task=task_name(values))
    values = apply_overrides(values, overrides, flags, meant)
    _refuse_flags_of_others(flags or {}, task_name(values), path)
    config = validate(TrainConfig, values, str(path))
    for other, group in others.items():
        if _says_something(other, group) and ranks().first:
            say(f"warning: {path}: the settings of task {other} are left out: the task is {config.task.name}")
    return config


def key_of_today(key: str, task: str | None) -> str:
    """The key that one of any age means in the configuration of a task: `words.gamma` is `task.gamma` now.

    Raises:
        UsageError: it sets another task, or what no configuration has any more.
    """
    group, dot, rest = key.partition(".")
    if key == "student":
        raise UsageError(f"--set {key}: {_NO_STUDENT}")
    if not dot or group not in _OLD_GROUPS:
        return "task.name" if key == "task" else key
    if group != task:
        raise UsageError(f"{key}: the task is {task}, and this sets task {group}; leave it out")
    return f"task.{rest}"


def _refuse_flags_of_others(flags: Mapping[str, Any], task: Any, path: Path) -> None:
    """Refuse flags that set what the task has not."""
    for setting in (flag.removeprefix("task.") for flag in flags if flag.startswith("task.")):
        if task in TASKS.names() and setting not in TASKS.get(task).settings.model_fields:
            raise UsageError(f"--{setting}: task {task} of {path} has none; leave it out")


def _says_something(task: str, group: Mapping[str, Any]) -> bool:
    """Whether settings of a task differ from its defaults: older runs recorded those of all tasks."""
    known = TASKS.get(task).settings.model_fields if task in TASKS.names() else {}
    return any(key not in known or known[key].default != value for key, value in group.items())


def learned(config: TrainConfig) -> dict[str, Any]:
    """Values of what decides what is learned; not where things lie, which may differ from machine to machine."""
    return _without_places(config.model_dump(exclude={"runtime"}))


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if not _is_place(value)}
    return {key: _without_places(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _is_place(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, tuple) and any(isinstance(part, Path) for part in value))


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """In what two runs differ that decides what is learned, a phrase each; how they are run may change within one."""
    return value_differences(dump(old), dump(new), free=("runtime",))
