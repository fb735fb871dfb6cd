"""One call of `bowstore encode`, resolved: what is encoded, with which settings, into which store.

Legend: N images, h w word grid, K words, c channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bowstore.data.gpu_decode import jpeg_decoder
from bowstore.data.index import Index
from bowstore.data.resize import resized_by
from bowstore.errors import MismatchError
from bowstore.words.encode.config import BATCH, EncodeConfig
from bowstore.words.encode.teacher import Teacher, TeacherLayer
from bowstore.words.store.layer import VOCABULARY_SETTINGS, Layer, map_text
from bowstore.words.store.store import Store


@dataclass(frozen=True)
class LayerPlan:
    """A layer that is encoded.

    Attributes:
        name: its name in the teacher.
        num_words: K.
        channels: c of the map.
        grid: (h, w), without the border.
    """

    name: str
    num_words: int
    channels: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Job:
    """What a rank does for a store.

    Attributes:
        config: the settings.
        index: of the shards.
        teacher: frozen, with the layers.
        store: the store that rank 0 writes; its rows are those of the index.
        layers: what is encoded, in one pass.
        device: where the teacher runs.
        source: the store whose vocabulary is used; None to make one, and on ranks other than 0.
        seconds: wall-clock time by stage.
    """

    config: EncodeConfig
    index: Index
    teacher: Teacher
    store: Path
    layers: tuple[LayerPlan, ...]
    device: torch.device
    source: Store | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Images a batch."""
        return self.config.batch or BATCH[self.device.type]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def arithmetic(self) -> dict[str, str]:
        """How the words are computed, as layers record it."""
        return {
            "trunk": self.teacher.trunk,
            "decoder": jpeg_decoder(self.device),
            "resize": resized_by(self.device),
        }

    def settings(self, plan: LayerPlan) -> dict[str, Any]:
        """Values that must be the same to continue a layer, by the names that messages use."""
        config, vocabulary = self.config, {}
        if self.source:
            vocabulary["vocabulary"] = self.source.vocabulary_layer(plan.name).attributes["vocabulary_digest"]
        else:
            vocabulary = {name: getattr(config, name) for name in VOCABULARY_SETTINGS}
            vocabulary["vocabulary taken from"] = None
        if self.source and config.pca is not None:
            vocabulary |= {"pca": config.pca, "whiten": config.whiten}
        return {
            "teacher architecture": self.teacher.backbone.arch,
            "teacher weights": self.teacher.sha256,
            "precision": config.precision,
            "clean view": view_values(self.teacher),
            "border": config.border,
            "map": map_text(plan.channels, plan.grid),
            "K": plan.num_words,
            **vocabulary,
        }

    def check_settings(self, layer: Layer) -> None:
        """Refuse to continue a layer with other settings.

        Raises:
            MismatchError: names the first setting that differs.
        """
        plan = next(plan for plan in self.layers if plan.name == layer.name)
        have = layer.made_with()
        remedy = "use the same value, or encode into a new store"
        if self.source and layer.path == self.source.path:
            remedy = "--vocabulary needs the teacher and the settings that the store was made with"
        for name, want in self.settings(plan).items():
            if have[name] != want:
                if name == "map" and layer.name == "conv1":
                    remedy = (
                        "in older stores conv1 of a residual network is the map behind its pooling: it is pool1 now"
                    )
                raise MismatchError(
                    f"layer {layer.name!r} of word store {layer.path} was made with {name} {have[name]}, now it is "
                    f"{want}; {remedy}"
                )


def view_values(teacher: Teacher) -> dict[str, Any]:
    """The clean view as JSON gives it back: tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in teacher.view.recorded().items()}


def plan_layers(
    config: EncodeConfig, layers: Sequence[TeacherLayer], known: Sequence[int | None]
) -> tuple[LayerPlan, ...]:
    """The layers with their words and grids.

    Args:
        config: K, one for all layers or one for each, and the border.
        layers: of the teacher.
        known: K of each layer that has a vocabulary already, else None.

    Raises:
        UsageError: K is missing, given for another number of layers, or not the vocabulary's; or a border that leaves
            nothing.
    """
    words = config.words_of_each([layer.name for layer in layers], known)
    return tuple(
        LayerPlan(layer.name, num_words, layer.channels, config.word_grid(layer.name, layer.grid))
        for layer, num_words in zip(layers, words, strict=True)
    )
