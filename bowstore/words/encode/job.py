"""One call of `bowstore encode`, resolved: what is encoded, with which settings, in which way, into which store.

A layer records how its words are computed, and an unfinished layer is continued in the same way, by every rank. Words
computed in two ways differ only where two centroids are almost equally near, so complete layers and vocabularies are
equally good whichever way they were made. But what a layer holds must not depend on who was interrupted when.

Legend: N images, h w word grid, K words.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bowstore.data.gpu_decode import jpeg_decoder
from bowstore.data.index import Index
from bowstore.data.resize import resized_by
from bowstore.errors import MismatchError, UsageError
from bowstore.models.compiled import FROZEN, CannotCompileError, tell_fallback
from bowstore.progress import say, timed
from bowstore.torchrun import ranks
from bowstore.words.encode.config import BATCH, EncodeConfig
from bowstore.words.encode.teacher import Teacher
from bowstore.words.store.layer import VOCABULARY_SETTINGS, Layer, LayerSpec, made_with
from bowstore.words.store.store import Store


@dataclass(frozen=True)
class Job:
    """What a rank does for a store.

    Attributes:
        config: the settings.
        index: of the shards.
        teacher: frozen, with the layers that are encoded, in one pass.
        num_words: K of each of them.
        store: the store that rank 0 writes; its rows are those of the index.
        device: where the teacher runs.
        source: the store whose vocabulary is used; None to make one, and on ranks other than 0.
        seconds: wall-clock time by stage.
    """

    config: EncodeConfig
    index: Index
    teacher: Teacher
    num_words: Mapping[str, int]
    store: Path
    device: torch.device
    source: Store | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Images a batch."""
        return self.config.batch or BATCH[self.device.type]

    @property
    def arithmetic(self) -> dict[str, str]:
        """How the words are computed, as layers record it."""
        return {
            "trunk": self.teacher.trunk,
            "decoder": jpeg_decoder(self.device),
            "resize": resized_by(self.device),
        }

    def spec(self, name: str, vocabulary: dict[str, Any]) -> LayerSpec:
        """What a layer's words are, under a vocabulary that was made so; all but the receptive field."""
        layer, pca = self.teacher.layers[name], vocabulary.get("pca")
        return LayerSpec(
            teacher=self.teacher.provenance(name),
            view=json.loads(json.dumps(self.teacher.view.recorded())),  # with lists for tuples, as it is read again
            vocabulary=vocabulary,
            num_words=self.num_words[name],
            grid=layer.grid,
            channels=layer.channels,
            border=self.teacher.border,
            projection={"kind": "pca", "dimensions": pca, "whiten": vocabulary["whiten"]} if pca else None,
            arithmetic=self.arithmetic,
        )

    def check_settings(self, layer: Layer) -> None:
        """Refuse to continue a layer with other settings, or to take its vocabulary for a map that is not its own.

        Raises:
            MismatchError: names the first setting that differs.
        """
        config, remedy = self.config, "use the same value, or encode into a new store"
        vocabulary = {name: getattr(config, name) for name in VOCABULARY_SETTINGS}
        its = self.source.vocabulary_layer(layer.name).attributes if self.source else {}
        if self.source:
            # Its seed, sample and iterations are its own; a projection may be asked for again, and must be the same.
            asked = {"pca": config.pca, "whiten": config.whiten} if config.pca else {}
            named = {"taken_from": layer.attributes["vocabulary"].get("taken_from")}  # a store may be renamed
            vocabulary = {**its["vocabulary"], **asked, **named}
            if layer.path == self.source.path:
                remedy = "--vocabulary needs the teacher and the settings that the store was made with"
        digest = its.get("vocabulary_digest", layer.attributes["vocabulary_digest"])
        now = {**layer.attributes, **self.spec(layer.name, vocabulary).attributes, "vocabulary_digest": digest}
        have, want = made_with(layer.attributes), made_with(now)
        if other := next((name for name in have if have[name] != want[name]), None):
            raise MismatchError(
                f"layer {layer.name!r} of word store {layer.path} was made with {other} {have[other]}, now it is "
                f"{want[other]}; {remedy}"
            )

    def in_one_way(self, begun: Sequence[Layer] = ()) -> "Job":
        """The same, its teacher run as these unfinished layers were begun; else as the settings and the work say.

        Compiles the teacher if that is called for. Call it in the main thread.

        Raises:
            MismatchError: an unfinished layer was begun in a way that is not asked for, or not possible here.
            UsageError: compiling was asked for, and is not possible.
        """
        setting, way = self.config.compile, None
        if setting == "auto" and begun:
            way = begun[0].arithmetic["trunk"]
        elif setting == "auto" and self.source:  # as images were encoded there: the two stores may be joined
            way = self.source.vocabulary_layer(next(iter(self.num_words))).arithmetic["trunk"]
        job = self.run_in(way or self.teacher.way_of(setting, len(self.index)))
        for layer in begun:
            then, now = layer.arithmetic, job.arithmetic
            if other := next((what for what in then if then[what] != now.get(what)), None):
                raise MismatchError(
                    f"layer {layer.name!r} of word store {layer.path} is not complete and was begun with {other} "
                    f"{then[other]!r}, now it would be {now.get(other)!r}; go on with it alone, without --compile and "
                    f"where it was begun, or encode into a new store: --vocabulary {layer.path} --store NEW keeps its "
                    "words"
                )
        return job

    def run_in(self, way: str) -> "Job":
        """The same, its teacher compiled if that is the way and it can be had; other ranks must do as rank 0 has done.

        Raises:
            MismatchError: this is another rank, and cannot compile.
            UsageError: compiling was asked for, and is not possible.
        """
        if way != FROZEN:
            return self
        rank = ranks()
        if rank.first:
            say("compiling the teacher (10 to 50 s)")
        try:
            with timed(self.seconds, "compile"):
                return replace(self, teacher=self.teacher.compiled_for(self.batch))
        except CannotCompileError as error:
            if not rank.first:
                raise MismatchError(
                    f"rank {rank.rank} cannot compile the teacher as rank 0 has ({error}); encode on machines that "
                    "can, or with --compile false"
                ) from error
            if self.config.compile is True:
                raise UsageError(f"{error}; leave --compile out to do without") from error
            tell_fallback(str(error))
            return self
