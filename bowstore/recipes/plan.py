"""A recipe in a workspace: each stage with its settings checked, what it reads and what it writes. Loads no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from bowstore import runs
from bowstore.config import Workspace, find_config, validate
from bowstore.errors import BowstoreError, UsageError
from bowstore.recipes.evaluations import SETTINGS, EvalSettings
from bowstore.recipes.file import Recipe, kind_of, stage_of
from bowstore.recipes.kinds import (
    DownloadSpec,
    EncodeSpec,
    EvalSpec,
    ImagesToShards,
    RenderConfig,
    RenderSpec,
    ShardsSpec,
    Spec,
    TrainSpec,
)
from bowstore.remote import is_remote
from bowstore.train.config import TrainConfig, load_train_config
from bowstore.words.config import EncodeConfig


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage, ready to run.

    Attributes:
        name: the stage's.
        kind: the stage's.
        reads: what it needs, as a user knows it.
        writes: where its results go; no two stages write to one place.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def known_whole(self) -> bool:
        """Whether all that it was made of is compared without torch, so that it is skipped once done."""
        return True


@dataclass(frozen=True, kw_only=True)
class ImagesStep(Step):
    """Images are rendered, or a data set is fetched into `folder`; `out` is what shards are made of."""

    out: Path
    folder: Path
    render: RenderConfig | None = None
    download: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardsStep(Step):
    """Images become shards: `out/SPLIT` of each split; `train` and `test` are what other stages read of them."""

    src: Path
    out: Path
    train: Path
    test: Path
    config: ImagesToShards

    @property
    def known_whole(self) -> bool:
        """Not so: the source has to be listed."""
        return False


@dataclass(frozen=True, kw_only=True)
class TrainStep(Step):
    """A run: its configuration as it will be resolved, and what makes it of the file."""

    run: Path
    config: TrainConfig
    file: Path
    flags: dict[str, Any]
    on: Path


@dataclass(frozen=True, kw_only=True)
class EncodeStep(Step):
    """Layers of a store."""

    config: EncodeConfig
    on: Path
    store: Path

    @property
    def known_whole(self) -> bool:
        """Where the teacher is a run: of another network the weights have to be loaded."""
        return runs.is_finished(Path(self.config.teacher))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network, by its run, under one protocol; `row` is what the table calls the network."""

    row: str
    run: Path
    random: bool
    protocol: str
    settings: EvalSettings


@dataclass(frozen=True, kw_only=True)
class EvalStep(Step):
    """Evaluations of networks."""

    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """A recipe in a workspace.

    Attributes:
        recipe: the recipe.
        workspace: says what the recipe does not; its runs are those of the recipe.
        steps: by the stages' names, each behind its inputs.
        folder: where relative places lie.
        result: file of the results.
        seed: of the whole recipe; None for those of the configurations.
    """

    recipe: Recipe
    workspace: Workspace
    steps: dict[str, Step]
    folder: Path
    result: Path
    seed: int | None


def make_plan(recipe: Recipe, workspace: Workspace, *, seed: int | None = None, folder: Path | None = None) -> Plan:
    """Resolve a recipe in a workspace; nothing is written, and no data is looked at.

    Args:
        recipe: checked.
        workspace: says where things lie that the recipe does not name.
        seed: of all training and encoding; None for the recipe's.
        folder: where relative places of the recipe lie; None for the recipe's.

    Raises:
        MissingError: a configuration that is not there.
        UsageError: settings that cannot be used, or two stages that write to one place.
    """
    file = recipe.file
    seed = file.seed if seed is None else seed
    places = _Places(folder or file.folder or Path(), 0 if seed is None else seed)
    workspace = workspace.model_copy(update={"runs": places.of(file.runs)} if file.runs else {})
    maker = _Maker(places, workspace, seed)
    for name, spec in recipe.stages.items():
        with in_stage(name, recipe):
            maker.add(name, spec)
    _check_places(maker.steps, recipe)
    result = places.of(file.result) if file.result else workspace.runs / f"{recipe.name}.recipe.json"
    return Plan(recipe, workspace, maker.steps, places.folder, result, seed)


@contextmanager
def in_stage(name: str, recipe: Recipe) -> Iterator[None]:
    """Errors say the stage in which they came up."""
    try:
        yield
    except BowstoreError as error:
        raise type(error)(f"{recipe.path}: stage {name!r}: {error}") from error


@dataclass(frozen=True)
class _Places:
    """Where relative places lie, and the seed that {seed} in them stands for."""

    folder: Path
    seed: int

    def of(self, path: Path) -> Path:
        """A place of the recipe."""
        named = Path(str(path).replace("{seed}", str(self.seed)))
        return named if is_remote(named) else self.folder / named


@dataclass
class _Maker:
    """Makes the steps, one after the other; those of a stage's inputs are there already."""

    places: _Places
    workspace: Workspace
    seed: int | None
    steps: dict[str, Step] = field(default_factory=dict)

    def add(self, name: str, spec: Spec) -> None:
        """Make the step of a stage."""
        made = getattr(self, f"_{kind_of(spec)}")(spec, name)
        self.steps[name] = made

    def _render(self, spec: RenderSpec, name: str) -> Step:
        out = self.places.of(spec.out)
        return ImagesStep(
            name=name, kind="render", reads=(), writes=(str(out),), out=out, folder=out, render=spec.render
        )

    def _download(self, spec: DownloadSpec, name: str) -> Step:
        from bowstore.data.downloads import DOWNLOADS  # torchvision's downloaders, by name

        if spec.download not in DOWNLOADS:
            raise UsageError(f"no download {spec.download!r}; there are {', '.join(DOWNLOADS)}")
        results = DOWNLOADS[spec.download].results
        folder = self.places.of(spec.out)
        out = folder / results[0] if len(results) == 1 else folder
        return ImagesStep(
            name=name, kind="download", reads=(), writes=(str(out),), out=out, folder=folder, download=spec.download
        )

    def _shards(self, spec: ShardsSpec, name: str) -> Step:
        if spec.shards.src is not None:
            src = spec.shards.src
        else:
            src = cast(ImagesStep, self.steps[str(spec.images)]).out
        if spec.out is not None:
            out = self.places.of(spec.out)
            train, test = out / "train", _test_of(out)
        else:
            train = self.workspace.shards
            out = train.parent
            test = self.workspace.val_shards or _test_of(out)
        return ShardsStep(
            name=name, kind="shards", reads=(str(src),), writes=(str(out),), src=src, out=out, train=train, test=test,
            config=spec.shards,
        )  # fmt: skip

    def _train(self, spec: TrainSpec, name: str) -> Step:
        file = find_config(spec.train)
        on = self._split(spec.on, "train")
        flags = dict(_flat(spec.set))
        flags |= {"name": spec.name} if spec.name else {}
        flags |= {"shards": on} if spec.on else {}
        if self.seed is not None:
            flags.setdefault("seed", self.seed)
        reads = [str(on)]
        config = load_train_config(file, (), flags)
        task = config.task.model_dump()
        if spec.words:
            words = cast(EncodeStep, self.steps[spec.words])
            if "store" not in task:
                raise UsageError(
                    f"{file} is of task {config.task.name}, which learns no words; take `words: {spec.words}` out"
                )
            layer = task["layer"] or words.config.layers[0]
            if layer not in words.config.layers or (not task["layer"] and len(words.config.layers) > 1):
                raise UsageError(
                    f"stage {spec.words!r} makes layers {', '.join(words.config.layers)}; name one of them, as in "
                    f"`set: {{task.layer: {words.config.layers[0]}}}`"
                )
            flags |= {"task.store": words.store, "task.layer": layer}
            config = load_train_config(file, (), flags)
            reads.append(f"{words.store}/{layer}")
        elif task.get("store", "") is None:
            raise UsageError(f"{file} learns words; name the stage that makes them, as in `words: STAGE`")
        run = self.workspace.runs / config.name
        return TrainStep(
            name=name, kind="train", reads=tuple(reads), writes=(str(run),), run=run, config=config, file=file,
            flags=flags, on=config.shards or on,
        )  # fmt: skip

    def _encode(self, spec: EncodeSpec, name: str) -> Step:
        on, store = self._split(spec.on, "train"), self.places.of(spec.store) if spec.store else self.workspace.store
        values = dict(spec.encode)
        if self.seed is not None:
            values.setdefault("seed", self.seed)
        if spec.teacher:
            if "teacher" in values:
                raise UsageError("the teacher is named twice, as an input and below `encode`; take one out")
            values["teacher"] = cast(TrainStep, self.steps[spec.teacher]).run
        elif "teacher" not in values:
            raise UsageError("no teacher; name the stage that trains it, as in `teacher: STAGE`, or encode.teacher")
        config = validate(EncodeConfig, values, "encode")
        if not config.layers:
            raise UsageError("encode: no layer; write some, as in `layers: [conv4]`")
        return EncodeStep(
            name=name, kind="encode", reads=(str(config.teacher), str(on)),
            writes=tuple(f"{store}/{layer}" for layer in config.layers), config=config, on=on, store=store,
        )  # fmt: skip

    def _eval(self, spec: EvalSpec, name: str) -> Step:
        cells = []
        try:
            protocols = spec.protocols()
        except ValueError as error:
            raise UsageError(f"eval: {error}") from error
        for protocol, values in protocols:
            if protocol not in SETTINGS:
                raise UsageError(f"no protocol {protocol!r}; there are {', '.join(SETTINGS)}")
            model = SETTINGS[protocol]
            if "train" in model.model_fields:
                values = {"train": self._split(spec.train, "train"), "test": self._split(spec.test, "test"), **values}
            elif "voc" in model.model_fields:
                values = {"voc": self.workspace.voc, **values}
            settings = validate(model, values, f"eval {protocol}")
            networks = [("random network", spec.random)] if spec.random else []
            networks += [(stage, stage) for stage in spec.of]
            for row, stage in networks:
                run = cast(TrainStep, self.steps[stage]).run
                cells.append(Cell(row=row, run=run, random=row != stage, protocol=protocol, settings=settings))
        reads = dict.fromkeys(str(cell.run) for cell in cells)
        reads |= dict.fromkeys(str(place) for cell in cells for place in cell.settings.data().values())
        return EvalStep(
            name=name, kind="eval", reads=tuple(reads), writes=tuple(str(result_file(cell)) for cell in cells),
            cells=tuple(cells),
        )  # fmt: skip

    def _split(self, reference: str | None, role: str) -> Path:
        """The shards that an input means; None for the workspace's."""
        if reference is None:
            test = self.workspace.val_shards or _test_of(self.workspace.shards.parent)
            return test if role == "test" else self.workspace.shards
        step, split = cast(ShardsStep, self.steps[stage_of(reference)]), reference.partition("/")[2]
        if split:
            return step.out / split
        return step.test if role == "test" else step.train


def result_file(cell: Cell) -> Path:
    """Where the result of a cell lies."""
    return runs.result_path(cell.run / runs.RANDOM_FOLDER if cell.random else cell.run, cell.settings.id)


def _test_of(out: Path) -> Path:
    return (
        out / "test" if not is_remote(out) and (out / "test").is_dir() and not (out / "val").is_dir() else out / "val"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_places(steps: dict[str, Step], recipe: Recipe) -> None:
    writers: dict[str, str] = {}
    for step in steps.values():
        for place in step.writes:
            if (other := writers.setdefault(place, step.name)) != step.name:
                raise UsageError(
                    f"{recipe.path}: stages {other!r} and {step.name!r} both write {place}; give one of them another "
                    f"{_REMEDIES[step.kind]}"
                )


_REMEDIES = {
    "render": "`out:`",
    "download": "`out:`",
    "shards": "`out:`",
    "train": "`name:`",
    "encode": "`store:`",
    "eval": "protocol or network",
}
