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
class EncodeReport:
    """What was encoded.

    Attributes:
        store: the word store.
        images: N.
        images_encoded: by all ranks, in this run.
        layers: of each layer that was asked for, see `report_layer`.
        seconds: wall-clock time by stage: sample, k-means, assign, finish.
        stages: share of the pass's time by stage.
        binds: the stage that the others waited for.
        ranks: processes that shared the work.
    """

    store: Path
    images: int
    images_encoded: int
    layers: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    stages: dict[str, float]
    binds: str
    ranks: int

    @property
    def warnings(self) -> list[str]:
        """Of all layers."""
        return [line for layer in self.layers for line in layer["warnings"]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "store": str(self.store), "images_per_second": self._rate}

    def text(self) -> str:
        """A few lines for people."""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        lines = [f"{self.store}: {self.images} images" + (f" ({stages})" if stages else "")]
        if self.images_encoded:
            by = f" by {self.ranks} processes" if self.ranks > 1 else ""
            lines.append(f"  {self.images_encoded} images encoded{by}, {self._rate:.1f} images/s, {self.binds} binds")
        return "\n".join([*lines, *map(_layer_text, self.layers)])

    @property
    def _rate(self) -> float:
        """Images/s of the pass, by all ranks."""
        return self.images_encoded / max(self.seconds.get("assign", 0.0), 1e-9)


def report_layer(layer: Layer, before: int) -> dict[str, Any]:
    """The report of a complete layer, `before` chunks of which were committed when this run began."""
    statistics, folder = layer.attributes["statistics"], layer.path / layer.name
    return {
        "layer": layer.name,
        "words": layer.num_words,
        "grid": layer.grid,
        "channels": layer.channels,
        "chunks": layer.chunks,
        "chunks_before": before,
        "already_complete": before == layer.chunks,
        # On the disk, with their digests.
        "bytes_per_image": sum(stored_bytes(folder / part) for part in ("words", "chunk_digest")) / layer.images,
        "vocabulary_bytes": stored_bytes(folder / "vocabulary"),
        "vocabulary": layer.attributes["vocabulary"],
        "statistics": statistics,
        "warnings": health_warnings(statistics, layer.num_words),
    }


def _layer_text(layer: dict[str, Any]) -> str:
    """Two lines for people, or one."""
    (h, w), used = layer["grid"], layer["statistics"]
    head = f"  {layer['layer']}: {layer['words']} words of {h}x{w} cells, {layer['bytes_per_image']:.0f} bytes an image"
    if layer["already_complete"]:
        return f"{head}: already complete"
    return (
        f"{head}\n    {used['unused_words']} words never used, the most frequent has "
        f"{100 * used['largest_share']:.1f} % of all cells; perplexity {used['perplexity']:.0f} over the set, "
        f"{used['image_perplexity']:.1f} an image"
    )
