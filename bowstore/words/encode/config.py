"""What an encoding is told: the teacher, its layers, the vocabulary; and what does not go together. Loads no torch.

Legend: N images, h w word grid, K words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bowstore.config import Batch, Computing, Count, Listed, Place, Seed, ShortSide, Side, Text
from bowstore.errors import UsageError
from bowstore.limits import MAX_COUNT, MAX_WORDS
from bowstore.models.record import NetworkRecord
from bowstore.remote import local_only

BATCH = {"cpu": 16, "cuda": 256}  # on a CPU what a core's cache holds: 16 images run as fast as 8, and 32 slower
NumWords = Annotated[int, Field(ge=1, le=MAX_WORDS)]


class EncodeConfig(Computing):
    """How words are made: the teacher, its layers, the vocabulary (paper, Eq. 1 and 2)."""

    layers: Listed[Text] = Field((), description="layer of the teacher; several in one pass")
    num_words: Listed[NumWords] = Field((), description="words (K) of all layers, or of each")
    teacher: Path | str | NetworkRecord = Field(
        description="run, checkpoint or exported backbone; timm:NAME, torchvision:NAME; or FILE.yaml, a training "
        "configuration: the network that it starts from"
    )
    weights: Place | None = Field(None, description="weights file of an architecture; null: random, from the seed")
    size: Side | None = Field(None, description="side of the clean view, pixels; null: the teacher's")
    resize: ShortSide | None = Field(None, description="short side before the crop, pixels; null: the teacher's")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the teacher; words are always exact")
    border: int = Field(0, ge=0, le=MAX_COUNT, description="cells left out at each side of the map")
    pca: Count | None = Field(None, description="principal components before k-means; null: none")
    whiten: bool = Field(False, description="components of unit variance; goes with pca")
    vocabulary: Place | None = Field(None, description="word store whose vocabulary is used; null: one is made")
    seed: Seed = Field(
        0, description="of the sample, k-means and random weights; FILE.yaml's network has its own unless this is given"
    )
    sample_per_word: Count = Field(256, description="feature vectors sampled for each word")
    iterations: Count = Field(25, description="of k-means")
    batch: Batch | None = Field(None, description=f"images a batch; null: {BATCH['cpu']}, {BATCH['cuda']} on a GPU")

    @model_validator(mode="after")
    def _whitens_components(self) -> Self:
        if self.whiten and self.pca is None:
            raise ValueError("whiten goes with pca; set pca to the layer's number of channels to whiten all of them")
        return self

    def words_of_each(self, layers: Sequence[str]) -> dict[str, int]:
        """K of each of these layers.

        Raises:
            UsageError: K is missing, or given for another number of layers.
        """
        if not self.num_words:
            raise UsageError(f"the number of words of layer {layers[0]!r} is not known; give --K, for example --K 2048")
        given = self.num_words * len(layers) if len(self.num_words) == 1 else self.num_words
        if len(given) != len(layers):
            raise UsageError(
                f"{len(layers)} layers and {len(given)} values of --K; give one for all, or one for each layer"
            )
        return dict(zip(layers, given, strict=True))

    def check_components(self, layer: str, channels: int) -> None:
        """Refuse more principal components than a layer has channels."""
        if self.pca and self.pca > channels:
            raise UsageError(
                f"--pca {self.pca} is more than the {channels} channels of layer {layer!r}; choose at most {channels}"
            )


def check_place(store: Path) -> None:
    """Refuse to make words on another machine.

    Raises:
        UsageError: the store is a URL.
    """
    local_only(store, "encode into a --store on this machine and copy it there by `bowstore push STORE URL`")


def word_grid(border: int, layer: str, grid: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a layer's words: its map without the border.

    Raises:
        UsageError: the border leaves nothing.
    """
    left = (grid[0] - 2 * border, grid[1] - 2 * border)
    if min(left) < 1:
        raise UsageError(
            f"--border {border} leaves nothing of the {grid[0]} x {grid[1]} map of layer {layer!r}; choose at most "
            f"{(min(grid) - 1) // 2}"
        )
    return left


def check_sample(num_words: int, images: int, positions: int) -> None:
    """Refuse more words than feature vectors.

    Args:
        num_words: K.
        images: N.
        positions: words an image, h * w.
    """
    if num_words > images * positions:
        raise UsageError(
            f"K = {num_words} words need as many feature vectors, and {images} images give {images * positions} "
            f"({positions} each); choose --K at most {images * positions}, or encode more images"
        )
