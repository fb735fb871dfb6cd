"""A recipe in a workspace: each stage with its settings checked, what it reads and what it writes. Loads no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from bowstore.config import Strict, Workspace, find_config, validate
from bowstore.data.downloads import DOWNLOADS
from bowstore.errors import BowstoreError, UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocol import Kind, function
from bowstore.evaluate.protocols import PROTOCOLS
from bowstore.recipes.file import Recipe, kind_of, stage_of
from bowstore.recipes.kinds import (
    DownloadSpec,
    EncodeSpec,
    EvalSpec,
    RenderSpec,
    ShardsSpec,
    Spec,
    TrainSpec,
)
from bowstore.recipes.steps import (
    OWN_PLACE,
    Cell,
    EncodeStep,
    EvalStep,
    ImagesStep,
    Plan,
    ShardsStep,
    Step,
    TrainStep,
    in_stage,
)
from bowstore.remote import is_remote
from bowstore.train.config import load_train_config
from bowstore.words.config import EncodeConfig


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


def again(plan: Plan) -> Plan:
    """The same plan as it is now: what a protocol is asked may follow from images that were not there before."""
    return make_plan(plan.recipe, plan.workspace, seed=plan.seed, folder=plan.folder)


_HOW = EvalConfig.model_fields.keys() - {"run", "random"}  # what an evaluation's settings may say of how it runs


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
        self.steps[name] = replace(made, after=tuple(stage_of(reference) for _, reference in spec.inputs()))

    def _render(self, spec: RenderSpec, name: str) -> Step:
        out = self.places.of(spec.out)
        return ImagesStep(
            name=name, kind="render", reads=(), writes=(str(out),), out=out, folder=out, render=spec.render
        )

    def _download(self, spec: DownloadSpec, name: str) -> Step:
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
        config = config.model_copy(update={"shards": config.shards or on})
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
        try:
            protocols = [self._protocol(spec, *item) for item in spec.protocols()]
        except ValueError as error:  # UsageError, too
            raise UsageError(f"eval: {error}") from error
        for role in ("train", "test"):
            if getattr(spec, role) and not any(role in kind.settings.model_fields for kind, _, _ in protocols):
                raise UsageError(
                    f"{' and '.join(kind.name for kind, _, _ in protocols)} take no `{role}`; leave it out"
                )
        networks = [("random network", spec.random)] if spec.random else []
        networks += [(stage, stage) for stage in spec.of]
        cells = tuple(
            Cell(
                row=row, run=(run := cast(TrainStep, self.steps[stage]).run), kind=kind, settings=settings,
                config=config.model_copy(update={"run": str(run), "random": row != stage}),
            )
            for kind, settings, config in protocols
            for row, stage in networks
        )  # fmt: skip
        reads = dict.fromkeys(str(cell.run) for cell in cells)
        reads |= dict.fromkeys(str(place) for cell in cells for place in cell.data.values())
        return EvalStep(
            name=name, kind="eval", reads=tuple(reads), writes=tuple(str(cell.result) for cell in cells), cells=cells
        )

    def _protocol(self, spec: EvalSpec, name: str, values: dict[str, Any]) -> tuple[Kind, Strict, EvalConfig]:
        """A protocol, its settings with what the workspace says, and how it runs."""
        kind = PROTOCOLS.get(name)
        fields = kind.settings.model_fields
        data = {role: self._split(getattr(spec, role), role) for role in ("train", "test") if getattr(spec, role)}
        how = {key: value for key, value in values.items() if key in _HOW and key not in fields}
        own = {key: value for key, value in values.items() if key not in how}
        own = {**{role: place for role, place in data.items() if role in fields}, **own}
        settings = validate(kind.settings, own, name)
        try:
            settings = function(kind.resolve)(settings, self.workspace)
        except BowstoreError:  # what it looks at is not there yet
            pass
        return kind, settings, validate(EvalConfig, how, name)

    def _split(self, reference: str | None, role: str) -> Path:
        """The shards that an input means; None for the workspace's."""
        if reference is None:
            test = self.workspace.val_shards or _test_of(self.workspace.shards.parent)
            return test if role == "test" else self.workspace.shards
        step, split = cast(ShardsStep, self.steps[stage_of(reference)]), reference.partition("/")[2]
        if split:
            return step.out / split
        return step.test if role == "test" else step.train


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
    for name, place in ((step.name, place) for step in steps.values() for place in step.writes):
        if place in writers:
            who = f"stages {writers[place]!r} and {name!r} both write {place}"
            who = who if writers[place] != name else f"stage {name!r} writes {place} twice"
            raise UsageError(f"{recipe.path}: {who}; give one of them another {OWN_PLACE[steps[name].kind]}")
        writers[place] = name
