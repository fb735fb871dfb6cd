"""What an encoding is told: the teacher, its layers, the vocabulary. Loads no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bowstore.config import Batch, Computing, Count, Listed, Place, Seed, ShortSide, Side, Text
from bowstore.limits import MAX_COUNT, MAX_WORDS
from bowstore.models.record import NetworkRecord

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
