"""What `bowstore encode` reports when it is done.

Legend: N images, h w word grid, K words, c channels.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bowstore.words.store.arrays import stored_bytes
from bowstore.words.store.layer import Layer
from bowstore.words.store.statistics import health_warnings


@dataclass(frozen=True)
class LayerReport:
    """One layer of the store.

    Attributes:
        layer: its name.
        words: K.
        grid: (h, w).
        channels: c.
        chunks: words chunks.
        chunks_before: those committed before this run began.
        already_complete: nothing was left to do.
        bytes_per_image: of words and their digests on disk, for each image.
        vocabulary_bytes: of the vocabulary on disk.
        vocabulary: how the vocabulary was made, and its health.
        statistics: use of the words: unused_words, perplexity, image_perplexity, largest_share, largest_word.
        warnings: one line each.
    """

    layer: str
    words: int
    grid: tuple[int, int]
    channels: int
    chunks: int
    chunks_before: int
    already_complete: bool
    bytes_per_image: float
    vocabulary_bytes: int
    vocabulary: dict[str, Any]
    statistics: dict[str, Any]
    warnings: tuple[str, ...]

    def text(self) -> str:
        """Two lines for people, or one."""
        h, w = self.grid
        head = f"  {self.layer}: {self.words} words of {h}x{w} cells, {self.bytes_per_image:.0f} bytes an image"
        if self.already_complete:
            return f"{head}: already complete"
        used = self.statistics
        return (
            f"{head}\n    {used['unused_words']} words never used, the most frequent has "
            f"{100 * used['largest_share']:.1f} % of all cells; perplexity {used['perplexity']:.0f} over the set, "
            f"{used['image_perplexity']:.1f} an image"
        )


@dataclass(frozen=True)
class EncodeReport:
    """What was encoded.

    Attributes:
        store: the word store.
        images: N.
        images_encoded: by all ranks, in this run.
        layers: a report of each layer that was asked for.
        seconds: wall-clock time by stage: sample, k-means, assign, finish.
        stages: share of the pass's time by stage.
        binds: the stage that the others waited for.
        ranks: processes that shared the work.
    """

    store: Path
    images: int
    images_encoded: int
    layers: tuple[LayerReport, ...]
    seconds: dict[str, float]
    stages: dict[str, float]
    binds: str
    ranks: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all layers."""
        return tuple(line for layer in self.layers for line in layer.warnings)

    @property
    def images_per_second(self) -> float:
        """Of the pass, by all ranks."""
        return self.images_encoded / max(self.seconds.get("assign", 0.0), 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "store": str(self.store), "images_per_second": self.images_per_second}

    def text(self) -> str:
        """A few lines for people."""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        head = f"{self.store}: {self.images} images" + (f" ({stages})" if stages else "")
        rate = ""
        if self.images_encoded:
            by = f" by {self.ranks} processes" if self.ranks > 1 else ""
            rate = f"\n  {self.images_encoded} images encoded{by}, {self.images_per_second:.1f} images/s"
            rate += f", {self.binds} binds"
        return "\n".join([head + rate, *(layer.text() for layer in self.layers)])


def report_layer(layer: Layer, before: int) -> LayerReport:
    """The report of a complete layer, `before` chunks of which were committed earlier."""
    statistics, folder = layer.attributes["statistics"], layer.path / layer.name
    return LayerReport(
        layer=layer.name,
        words=layer.num_words,
        grid=layer.grid,
        channels=layer.channels,
        chunks=layer.chunks,
        chunks_before=before,
        already_complete=before == layer.chunks,
        bytes_per_image=sum(stored_bytes(folder / part) for part in ("words", "chunk_digest")) / layer.images,
        vocabulary_bytes=stored_bytes(folder / "vocabulary"),
        vocabulary=layer.attributes["vocabulary"],
        statistics=statistics,
        warnings=health_warnings(statistics, layer.num_words),
    )
