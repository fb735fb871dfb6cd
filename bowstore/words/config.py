"""What an encoding is told: the teacher, its layers, the vocabulary. Loads no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from bowstore.config import Compile, Count, Listed, Place, Seed, ShortSide, Strict, Text, Threads
from bowstore.limits import MAX_BATCH, MAX_COUNT


class EncodeConfig(Strict):
    """How words are made: the teacher, its layers, the vocabulary (paper, Eq. 1 and 2)."""

    teacher: Path | str = Field(description="run, checkpoint or exported backbone; or timm:NAME, torchvision:NAME...")
    weights: Place | None = Field(None, description="weights file of an architecture; null: random, from seed")
    size: int | None = Field(None, ge=8, le=2048, description="side of the clean view, pixels; null: the teacher's")
    resize: ShortSide | None = Field(None, description="short side before the crop, pixels; null: the teacher's")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the teacher; words are always exact")
    layers: Listed[Text] = Field((), description="layers that are encoded in one pass")
    k: Listed[Count] = Field((), description="words of each layer; one number for all of them")
    border: int = Field(0, ge=0, le=MAX_COUNT, description="cells left out at each side of the map")
    pca: Count | None = Field(None, description="principal components before k-means; null: none")
    whiten: bool = Field(False, description="components of unit variance; goes with pca")
    vocabulary: Place | None = Field(None, description="word store whose vocabulary is used; null: one is made")
    seed: Seed = Field(0, description="of the sample and of k-means")
    sample_per_word: Count = Field(256, description="feature vectors sampled for each word")
    iterations: Count = Field(25, description="of k-means")
    batch: int | None = Field(None, ge=1, le=MAX_BATCH, description="images a batch; null: 16, 256 on a GPU")
    threads: Threads | None = Field(None, description="decoding threads; null: cores a process")
    compile: Compile = Field("auto", description="the teacher by torch's inductor; auto: on a CPU, if it pays")
