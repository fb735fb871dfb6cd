"""The stage that trains: a configuration, the images, and perhaps the words that it learns."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from bowstore import runs
from bowstore.config import Place, Places, Text, dump, find_config, validate
from bowstore.data.plan import Schedule
from bowstore.errors import MissingError, UsageError
from bowstore.evaluate.config import probes_of
from bowstore.files import read_json
from bowstore.limits import MAX_SEED
from bowstore.models.arch import built_in
from bowstore.models.record import NetworkRecord, network_record
from bowstore.plugins import called
from bowstore.recipes.encode import EncodeStage, complete_layer
from bowstore.recipes.images import shards_of
from bowstore.recipes.stage import BEGUN, DONE, TO_DO, Stage, State, fingerprint, images_in
from bowstore.train.config import TrainConfig, differences, load_train_config
from bowstore.train.tasks.base import StartedSettings, TaskSettings
from bowstore.workspace import resolve_train, with_start

_SEEDS_APART = 1000  # of rounds, so that those of one seed are not those of the next


class TrainStage(Stage):
    """A training run."""

    kind = "train"
    takes = {"on": ("shards",), "words": ("encode",), "start": ("train",)}  # noqa: RUF012 - pydantic keeps it out of the fields
    own_place = "`name:`"
    distributed = True

    train: Place = Field(description="configuration, by its path or name")
    set: dict[str, Any] = Field({}, description="values over those of the configuration, as in {optim.lr: 0.1}")
    name: Text | None = Field(None, description="of the run; null: the configuration's")
    on: Text | None = Field(None, description="shards; null: the configuration's, or the workspace's")
    words: Text | None = Field(None, description="the words that it learns")
    start: Text | None = Field(None, description="the run that its network starts from; null: the configuration's")

    @property
    def configurations(self) -> tuple[Path, ...]:
        """Its own."""
        return (self.train,)

    @property
    def file(self) -> Path:
        """The configuration's file."""
        return find_config(self.train)

    @property
    def encoding(self) -> EncodeStage | None:
        """The stage whose words it learns."""
        return cast(EncodeStage, self._here.stages[self.words]) if self.words else None

    @cached_property
    def flags(self) -> dict[str, Any]:
        """What makes `config` of the file: values by key."""
        flags = dict(_flat(self.set))
        flags |= {"name": self.name} if self.name else {}
        flags |= {"shards": shards_of(self.on, "train", self._here)} if self.on else {}
        if "seed" not in flags and (self._here.seed is not None or self.earlier):
            seed = load_train_config(self.file, (), flags).seed if self._here.seed is None else self._here.seed
            flags["seed"] = (seed + _SEEDS_APART * self.earlier) % (MAX_SEED + 1)
        for role, key in (("words", "task.store"), ("start", "task.start")):
            if getattr(self, role) and key in flags:
                raise UsageError(f"{key} is given twice, by the input `{role}` and below `set`; take one out")
        task = load_train_config(self.file, (), flags).task
        if self.start and not isinstance(task, StartedSettings):
            raise UsageError(
                f"{self.file} is of task {task.name}, which starts from no run; take `start: {self.start}` out"
            )
        flags |= {"task.start": self._here.stages[self.start].writes[0]} if self.start else {}
        if self.encoding:
            if not hasattr(task, "store"):
                raise UsageError(
                    f"{self.file} is of task {task.name}, which learns no words; take `words: {self.words}` out"
                )
            flags |= {"task.store": self.encoding.place, **self._layers(task)}
        elif getattr(task, "store", "") is None:
            raise UsageError(f"{self.file} learns words; name the stage that makes them, as in `words: STAGE`")
        return flags

    def _layers(self, task: TaskSettings) -> dict[str, str]:
        """The layer to set where the configuration names none: the only one that the stage makes."""
        made, named = self.encoding.config.layers if self.encoding else (), _layers_of(task)
        if not set(named) <= set(made) or (not named and len(made) > 1):
            raise UsageError(
                f"stage {self.words!r} makes layers {', '.join(made)}; name one of them, as in "
                f"`set: {{task.layer: {made[0]}}}`"
            )
        return {} if named else {"task.layer": made[0]}

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose words it learns."""
        return _layers_of(self.config.task) if self.encoding else ()

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration as it will be resolved, with its shards."""
        config, workspace = load_train_config(self.file, (), self.flags), self._here.workspace
        task = config.task if self.start else with_start(config.task, workspace)  # a stage's need not be there yet
        return config.model_copy(update={"shards": config.shards or workspace.shards, "task": task})

    @property
    def earlier(self) -> int:
        """How many networks before it, each the teacher of the next, were drawn as it is: of as many other seeds.

        Those of earlier rounds, and one that was not trained; not a teacher that learned no words, as RotNet.
        """
        if not self.encoding:
            return 0
        if not self.encoding.teacher:
            return len(self.encoding.configurations)
        teacher = cast(TrainStage, self._here.stages[self.encoding.teacher])
        return teacher.earlier + bool(teacher.encoding)

    @property
    def network(self) -> NetworkRecord:
        """The network that it trains."""
        return network_record(dump(self.config), str(self.file))

    @property
    def shards(self) -> Places:
        """The images."""
        return cast(Places, self.config.shards)

    @property
    def begins(self) -> Path | None:
        """The run whose backbone its network starts from."""
        task = self.config.task
        return task.start if isinstance(task, StartedSettings) else None

    @property
    def run(self) -> Path:
        """The run directory."""
        return self._here.workspace.runs / self.config.name

    @property
    def reads(self) -> tuple[Path | str, ...]:
        """Shards, words, and the run that it starts from."""
        words = [self.encoding.place / layer for layer in self.layers] if self.encoding else []
        return *self.shards, *words, *([self.begins] if self.begins else [])

    @property
    def writes(self) -> tuple[Path, ...]:
        """The run."""
        return (self.run,)

    def check_settings(self) -> None:
        """A network that exists, words that the task can learn, and protocols that can measure it."""
        built_in(self.config.model.arch)
        probes_of(self.config.runtime.probe)
        for layer in self.layers:
            if self.encoding and (known := self.encoding.maps.get(layer)):
                self.config.task.check_map(layer, known.grid)

    def check(self) -> None:
        """As of every stage; and that there are images enough, where that is known."""
        super().check()
        config, there = self.config, images_in(self.shards)
        if there is not None and self.state() != DONE:
            used = min(there, config.images or there)
            Schedule(used, config.optim.batch, config.seed)
            config.task.check_images(used)

    def state(self) -> State:
        """By its checkpoints, and whether configuration, images and words are still what the run records."""
        finished, recorded = runs.is_finished(self.run), (self.run / runs.CONFIG_FILE).exists()
        if not (finished or runs.checkpoints(self.run)):
            return BEGUN if recorded else TO_DO
        # Where the record is lost, `train` compares what checkpoints and export say.
        return State("done" if finished else "begun", self._problem() if recorded else "")

    def _problem(self) -> str:
        run, config = self.run, self.config
        there = validate(TrainConfig, runs.read_config(run), str(run / runs.CONFIG_FILE))
        store, layer = getattr(there.task, "store", None), getattr(there.task, "layer", None)
        if layer and getattr(config.task, "layer", "") is None:  # the run found the store's only one
            config = config.model_copy(update={"task": config.task.model_copy(update={"layer": layer})})
        if found := differences(there, config):
            return f"run directory {run} holds another configuration ({found[0]})"
        lineage = runs.read_lineage(run)
        inputs = lineage["inputs"] if lineage else _recorded_inputs(run)
        images, here = inputs.get("shards"), fingerprint(self.shards)
        if images and here and images != here:
            return f"{run} was trained on other images than {self.shards} holds"
        began, starts = inputs.get("start"), self.begins and runs.weights_sha256(self.begins)
        if began and starts and began != starts:
            return f"{run} was started from other weights than {self.begins} holds"
        recorded = lineage["targets"].get("vocabulary_digest") if lineage else None
        for name in _layers_of(there.task):
            words = recorded.get(name) if isinstance(recorded, dict) else recorded
            for part in store or ():
                now = complete_layer(part, name)
                if words and now and words != now.attributes["vocabulary_digest"]:
                    return f"{run} was trained on other words of {name} than word store {part} holds"
        return ""

    def make(self) -> list[str]:
        """Train."""
        workspace = self._here.workspace
        config = resolve_train(workspace, self.file, flags=self.flags)
        probe = called("bowstore.evaluate.probe:probe_of")(config, workspace)
        return [called("bowstore.train.loop:train")(config, workspace.runs, probe=probe).text()]


def _layers_of(task: TaskSettings) -> tuple[str, ...]:
    """The layers that a configuration names; none where it leaves them to the store, or learns no words."""
    layer = getattr(task, "layer", None)
    return getattr(task, "layers", None) or ((layer,) if layer else ())


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _recorded_inputs(run: Path) -> dict[str, str]:
    """What runs recorded from before they had a lineage."""
    try:
        return dict(read_json(run / runs.ENVIRONMENT_FILE)["inputs"])
    except (MissingError, KeyError, TypeError):
        return {}
