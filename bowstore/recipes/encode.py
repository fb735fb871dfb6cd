"""The stage that makes words: a teacher's, of all images."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from bowstore import runs
from bowstore.config import ModelConfig, Place, Places, Text, find_config, validate
from bowstore.errors import UsageError
from bowstore.models.arch import StageShape, is_arch, own_layer, stage_shapes
from bowstore.models.record import NetworkRecord, network_record
from bowstore.plugins import called
from bowstore.recipes.images import shards_of
from bowstore.recipes.stage import BEGUN, DONE, TO_DO, Stage, State, fingerprint, images_in
from bowstore.remote import is_remote
from bowstore.words.encode.config import EncodeConfig, check_place, check_sample, word_grid
from bowstore.words.store.layer import VOCABULARY_SETTINGS, Layer, made_with
from bowstore.words.store.store import Store
from bowstore.workspace import initial_network, is_configuration, only_store, resolve_teacher


class EncodeStage(Stage):
    """A teacher's words of all images."""

    kind = "encode"
    takes = {"on": ("shards",), "teacher": ("train",)}  # noqa: RUF012 - pydantic keeps it out of the fields
    own_place = "`store:`"
    distributed = True

    encode: dict[str, Any] = Field(description="as `bowstore encode` has them")
    on: Text | None = Field(None, description="shards; null: the workspace's")
    teacher: Text | None = Field(None, description="the run; or encode.teacher, for others")
    store: Place | None = Field(None, description="null: the workspace's")

    @property
    def configurations(self) -> tuple[Path, ...]:
        """That of a teacher that was not trained."""
        named = str(self.encode.get("teacher"))
        return (Path(named),) if is_configuration(named) else ()

    @cached_property
    def given(self) -> dict[str, Any]:
        """What flags of `bowstore encode` would say: values by their fields."""
        seed = {} if self._here.seed is None else {"seed": self._here.seed}
        values = {**seed, **self.encode}
        if self.teacher and "teacher" in values:
            raise UsageError("the teacher is named twice, as an input and below `encode`; take one out")
        if self.teacher:
            values["teacher"] = self._here.stages[self.teacher].writes[0]
        elif self.configurations:
            values["teacher"] = str(find_config(self.configurations[0]))
        elif "teacher" not in values:
            raise UsageError(
                "no teacher; name the stage that trains it, as in `teacher: STAGE`, or encode.teacher, which may be a "
                "configuration, for a network that was not trained"
            )
        return values

    @cached_property
    def config(self) -> EncodeConfig:
        """What `bowstore encode` is told; the teacher as it is named, which need not be there yet."""
        config = validate(EncodeConfig, self.given, "encode")
        if not config.layers:
            raise UsageError("encode: no layer; write some, as in `layers: [conv4]`")
        return config

    @property
    def shards(self) -> Places:
        """The images."""
        return shards_of(self.on, "train", self._here)

    @property
    def place(self) -> Path:
        """The word store."""
        if self.store:
            return self._here.place(self.store)
        return only_store(self._here.workspace, "name the one that this stage makes, as in `store: data/words.zarr`")

    @property
    def reads(self) -> tuple[Path | str, ...]:
        """The teacher, its weights where they lie in a file of their own, and the images."""
        if self.teacher:
            return self._trained, *self.shards
        weights = self.config.weights
        return str(self.given["teacher"]), *([str(weights)] if weights else []), *self.shards

    @property
    def _trained(self) -> Path:
        """The teacher's run; of a network that was not trained, its configuration, which is none."""
        return Path(self.given["teacher"])

    @property
    def writes(self) -> tuple[Path, ...]:
        """The layers."""
        return tuple(self.place / layer for layer in self.config.layers)

    @property
    def known_whole(self) -> bool:
        """Where the teacher is a run: of another network the weights have to be loaded."""
        return runs.is_finished(self._trained)

    def state(self) -> State:
        """By the layers and how they were made."""
        if is_remote(self.place) or not self.place.exists():
            return TO_DO
        layers = Store(self.place).every_layer
        there = [layers[name] for name in self.config.layers if name in layers]
        whole = len(there) == len(self.config.layers) and all(layer.complete for layer in there)
        if problem := next(self._problems(layers), ""):
            return State("done" if whole else "begun", problem)
        return DONE if whole else BEGUN if there else TO_DO

    @cached_property
    def _network(self) -> NetworkRecord | None:
        """The teacher's, as far as it is known before it is there; None for one that has to be loaded."""
        if self.teacher:
            return self._here.stages[self.teacher].network
        named = str(self.given["teacher"])
        if self.configurations:
            return initial_network(Path(named), self.given.get("seed"))
        for run in (Path(named), self._here.workspace.runs / named):
            if (run / runs.CONFIG_FILE).exists():
                return network_record(runs.read_config(run), str(run / runs.CONFIG_FILE))
        return NetworkRecord(model=ModelConfig(arch=named), name=named, task="none") if is_arch(named) else None

    @cached_property
    def _words(self) -> dict[str, int]:
        """K by layer; nothing where another store's vocabulary says it.

        Raises:
            UsageError: not one for all layers, and not one for each.
        """
        layers, config = self.config.layers, self.config
        if config.vocabulary and not config.num_words:
            return {}
        return config.words_of_each(layers)

    @cached_property
    def maps(self) -> dict[str, StageShape]:
        """Those of its layers whose maps are known before the teacher is there: channels, and the grid of the words.

        Raises:
            UsageError: the teacher has no such layer, or settings do not fit its map.
        """
        config, network, known = self.config, self._network, {}
        shapes = stage_shapes(network.model, config.size or network.view.size) if network else None
        if not network or not shapes:
            return {}
        for layer in config.layers:
            stage = own_layer(layer).partition(".")[0]
            if stage not in shapes:
                raise UsageError(
                    f"teacher {network.name} has no layer {layer!r}: the layers of {network.model.arch} are "
                    f"{', '.join(shapes)}"
                )
            if own_layer(layer) == stage:  # what lies within a stage is known once it is built
                config.check_components(layer, shapes[stage].channels)
                known[layer] = replace(shapes[stage], grid=word_grid(config.border, layer, shapes[stage].grid))
        return known

    def check_settings(self) -> None:
        """Numbers of words, and layers that the teacher has."""
        _ = self._words, self.maps

    def check(self) -> None:
        """As of every stage; and that the teacher is there, and vectors enough, where that is known."""
        super().check()
        check_place(self.place)
        if self.state() == DONE:
            return
        if not self.teacher:
            resolve_teacher(self._here.workspace, self.given["teacher"])
            if (weights := self.config.weights) and not weights.exists():
                raise called("bowstore.models.library:missing_weights")(str(self.given["teacher"]), weights)
        images = images_in(self.shards)
        if images is None or self.config.vocabulary:
            return
        for layer, known in self.maps.items():
            check_sample(self._words[layer], images, known.grid[0] * known.grid[1])

    def _problems(self, layers: dict[str, Layer]) -> Iterator[str]:
        """In what the store is not the one of these images, teacher and settings."""
        here, there = fingerprint(self.shards), Store(self.place).fingerprint
        if here and here != there:
            yield f"word store {self.place} was made of data set {there}, but {self.shards} is {here}"
        config, weights = self.config, runs.weights_sha256(self._trained)
        asked: dict[str, Any] = {"precision": config.precision, "border": config.border}
        asked |= {} if config.vocabulary else {key: getattr(config, key) for key in VOCABULARY_SETTINGS}
        asked |= {"teacher weights": weights} if weights else {}
        for name in config.layers:
            made = made_with(layers[name].attributes) if name in layers else {}
            for key, value in (asked | ({"K": self._words[name]} if self._words else {})).items():
                if made and made[key] != value:
                    yield f"layer {name!r} of word store {self.place} was made with {key} {made[key]}, not {value}"

    def make(self) -> list[str]:
        """Encode."""
        encode, workspace = called("bowstore.words.encode.encode:encode"), self._here.workspace
        teacher = resolve_teacher(workspace, self.given["teacher"], seed=self.given.get("seed"))
        config = self.config.model_copy(update={"teacher": teacher})
        with called("bowstore.train.distributed:beside_others")():
            report = encode(config, shards=self.shards, store=self.place, storage=workspace.storage)
        return [report.text()] if report else []


def complete_layer(store: Path | None, name: str | None) -> Layer | None:
    """A layer that is here and complete."""
    if not name or store is None or is_remote(store) or not store.exists():
        return None
    layer = Store(store).every_layer.get(name)
    return layer if layer and layer.complete else None
