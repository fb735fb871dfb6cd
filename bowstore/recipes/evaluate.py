"""The stage that evaluates: each protocol of each network, in one table."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from bowstore import runs
from bowstore.config import Listed, Places, Strict, Text, dump, places, validate
from bowstore.errors import BowstoreError, MissingError, UsageError
from bowstore.evaluate.config import OF_NETWORK, EvalConfig
from bowstore.evaluate.protocol import DataSets, Kind
from bowstore.evaluate.protocols import asked
from bowstore.files import read_json
from bowstore.plugins import called
from bowstore.recipes.images import shards_of
from bowstore.recipes.stage import BEGUN, DONE, TO_DO, Stage, State, fingerprint

_HOW = EvalConfig.model_fields.keys() - OF_NETWORK  # what settings may say of how an evaluation runs
_HOW_IT_RUNS = ("jobs", "workers", "checkpoint_every")  # a protocol's own settings of that kind

RANDOM = "random network"  # the row of the network before training


@dataclass(frozen=True)
class Cell:
    """One network under one protocol.

    Attributes:
        row: what the table calls the network.
        kind: the protocol.
        settings: of the protocol, as far as they can be resolved.
        config: which run, and how it runs.
    """

    row: str
    kind: Kind
    settings: Strict
    config: EvalConfig

    @property
    def run(self) -> Path:
        """The network's run."""
        return Path(str(self.config.run))

    @property
    def result(self) -> Path:
        """Where its result lies."""
        folder = runs.results_folder(self.run, random_init=self.config.random)
        return runs.result_path(folder, self.kind.describe(self.settings).id)

    @property
    def data(self) -> dict[str, Places]:
        """Folders of images, by the settings that name them."""
        return {name: places(value) for name, value in self.settings if isinstance(value, Path | Places)}

    def is_done(self) -> bool:
        """Whether the result of these weights, images and settings is there."""
        try:
            result = read_json(self.result)
            inputs, settings, version = result["inputs"], result["settings"], result["protocol_version"]
            recorded = {**settings.get("probe", {}), **settings.get("options", {})}  # options: not before 0.2
        except (MissingError, KeyError, TypeError, AttributeError):
            return False
        if version != self.kind.describe(self.settings).version:
            return False
        if settings.get("dtype", self.config.dtype) != self.config.dtype:  # of frozen features, since 0.2
            return False
        for name, value in dump(self.settings).items():
            there, here = recorded.get(name, value), value
            if name in self.data and (known := fingerprint(self.data[name])):
                there, here = inputs.get(name), known  # the images, wherever they lie
            if there != here and name not in _HOW_IT_RUNS:
                return False
        if self.config.random:  # of the run's own seed and network, unless its configuration was written since
            return self.result.stat().st_mtime >= (self.run / runs.CONFIG_FILE).stat().st_mtime
        return bool(inputs.get("weights_sha256") == runs.weights_sha256(self.run))


class EvalStage(Stage):
    """Evaluations of some networks: each protocol of each of them, in one table."""

    kind = "eval"
    takes = {"of": ("train",), "random": ("train",), "train": ("shards",), "test": ("shards",)}  # noqa: RUF012
    own_place = "protocol or network"

    eval: Any = Field(description="NAME, {NAME: settings}, or a list of these")
    of: Listed[Text] = Field((), description="the runs")
    random: Text | None = Field(None, description="a run whose network is evaluated as it was initialised, too")
    train: Text | None = Field(None, description="labelled shards; null: the workspace's")
    test: Text | None = Field(None, description="labelled shards; null: the workspace's")

    @model_validator(mode="after")
    def _some_network(self) -> Self:
        if not self.of and not self.random:
            raise ValueError("name the networks: `of: [STAGE, ...]`")
        return self

    @property
    def protocols(self) -> list[Any]:
        """What stands below `eval`, one by one."""
        return self.eval if isinstance(self.eval, list) else [self.eval]

    @cached_property
    def cells(self) -> list[Cell]:
        """Each protocol of each network."""
        try:
            protocols = [self._protocol(item) for item in self.protocols]
        except ValueError as error:  # UsageError, too
            raise UsageError(f"eval: {error}") from error
        for role in ("train", "test"):
            if getattr(self, role) and not any(role in kind.settings.model_fields for kind, _, _ in protocols):
                raise UsageError(
                    f"{' and '.join(kind.name for kind, _, _ in protocols)} take no `{role}`; leave it out"
                )
        networks = [(RANDOM, self.random)] if self.random else []
        networks += [(stage, stage) for stage in self.of]
        runs_of = {stage: self._here.stages[stage].writes[0] for _, stage in networks}
        return [
            Cell(row, kind, settings, how.model_copy(update={"run": str(runs_of[stage]), "random": row != stage}))
            for kind, settings, how in protocols
            for row, stage in networks
        ]

    def _protocol(self, item: Any) -> tuple[Kind, Strict, EvalConfig]:
        """A protocol, its settings with what the workspace says, and how it runs."""
        kind, values = asked(item)
        fields = kind.settings.model_fields
        how = {key: value for key, value in values.items() if key in _HOW and key not in fields}
        data: dict[str, Any] = {}
        if self.train and "train" in fields:
            data["train"] = shards_of(self.train, "train", self._here)
        if self.test and "test" in fields:
            (data["test"],) = shards_of(self.test, "test", self._here)
        own = {key: value for key, value in values.items() if key not in how}
        settings = validate(kind.settings, data | own, kind.name)
        try:
            settings = called(kind.resolve)(settings, self._here.workspace)
        except BowstoreError:  # what it looks at is not there yet
            pass
        return kind, settings, validate(EvalConfig, how, kind.name)

    @property
    def reads(self) -> tuple[Path | str, ...]:
        """Runs, then images."""
        data = (place for cell in self.cells for folders in cell.data.values() for place in folders)
        return tuple(dict.fromkeys([*(cell.run for cell in self.cells), *data]))

    @property
    def writes(self) -> tuple[Path, ...]:
        """The result files."""
        return tuple(cell.result for cell in self.cells)

    def state(self) -> State:
        """By the result files."""
        done = sum(cell.is_done() for cell in self.cells)
        return DONE if done == len(self.cells) else BEGUN if done else TO_DO

    def check(self) -> None:
        """As of every stage; and devkits, which no stage makes, are read: before the networks are trained, not after.

        Raises:
            BowstoreError: as the protocol, of what is wrong with its images.
        """
        super().check()
        reading = {cell.kind.name: cell for cell in self.cells if "voc" in cell.data}
        for cell in reading.values() if self.state() != DONE else ():
            cell.kind.ask("data", DataSets, cell.settings, self._here.workspace)

    def make(self) -> list[str]:
        """Evaluate what was not; each feature set is taken once."""
        workspace, evaluate = self._here.workspace, called("bowstore.evaluate.runner:evaluate")
        kept = called("bowstore.evaluate.kept:FeatureSets")(workspace.storage)
        for cell in self.cells:
            if not cell.is_done():
                evaluate(cell.kind, cell.settings, cell.config, workspace, kept=kept)
        return []
