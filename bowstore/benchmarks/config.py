"""What each benchmark is told, for the options of `bowstore bench`. Loads no torch."""

from typing import Annotated, Literal

from pydantic import Field

from bowstore.config import Batch, Count, Listed, OnDevice, Side, Strict, Text, Threads, Unit
from bowstore.limits import MAX_BATCH, MAX_COUNT
from bowstore.words.encode.config import EncodeConfig, NumWords

_StepBatch = Annotated[int, Field(ge=4, le=MAX_BATCH)]


class StoreBench(Strict):
    """A word store, in whole and by its keys."""

    rounds: Count = Field(5, description="interleaved rounds")


class ReaderBench(StoreBench):
    """Encoded bytes of random rows."""

    batch: _StepBatch = Field(64, description="images a batch")
    batches: Count = Field(200, description="timed batches a round")


class LoaderBench(ReaderBench, OnDevice):
    """The train view, stage by stage."""

    size: Side = Field(224, description="side of the view, pixels")
    batches: Count = Field(12, description="timed batches a round")
    threads: Threads | None = Field(None, description="decoding threads; null: one a core")
    hw_loads: Listed[Unit] = Field((), description="shares of the JPEGs for a GPU's hardware decoder, to sweep")
    ways: Listed[Literal["slice", "image"]] = Field((), description="decode windows alone, or whole images; to sweep")


class TargetsBench(ReaderBench, OnDevice):
    """Bags of random rows."""

    batch: Batch = Field(256, description="rows a batch")


class TrainBench(StoreBench):
    """Training with the loader over the step alone."""

    steps: int = Field(30, ge=5, le=MAX_COUNT, description="timed steps a round")


class AssignBench(StoreBench, OnDevice):
    """The nearest word of each vector."""

    images: Count = Field(32, description="images a round")
    positions: Count = Field(196, description="vectors an image")
    dimensions: Count = Field(1024, description="of a vector")
    num_words: NumWords = Field(20000, description="words (K)")


class EncodeBench(StoreBench, EncodeConfig):
    """The pass of `bowstore encode`."""

    layers: Listed[Text] = Field(("conv4",), description="layer of the teacher; several in one pass")
    num_words: Listed[NumWords] = Field((2000,), description="words (K) of all layers, or of each")
    images: Count = Field(256, description="images a round")


class KmeansBench(StoreBench, OnDevice):
    """An iteration of k-means."""

    vectors: Count = Field(51200, description="of the sample")
    dimensions: Count = Field(1024, description="of a vector")
    num_words: NumWords = Field(200, description="words (K)")
    iterations: Count = Field(25, description="of a vocabulary")
    rounds: Count = Field(5, description="timed iterations")
    backends: Listed[Literal["faiss", "super", "torch"]] = Field(
        (), description="only these; null: all on a CPU, on a GPU what encode takes"
    )
