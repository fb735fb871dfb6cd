"""What a page of words is to show. Loads neither torch nor NumPy."""

from typing import Annotated

from pydantic import Field

from bowstore.config import Listed, Seed, Strict, Text
from bowstore.limits import KEPT_IMAGES, MAX_WORDS

_Word = Annotated[int, Field(ge=0, lt=MAX_WORDS)]


class Wish(Strict):
    """What a page of words is to show."""

    layer: Text | None = Field(None, description="layer of the store; null: all that are complete")
    words: Listed[_Word] = Field((), description="only this word, larger; repeatable")
    per_gallery: int = Field(16, ge=1, le=100, description="words a gallery")
    examples: int | None = Field(None, ge=1, le=KEPT_IMAGES, description="images a word; null: 8, with --word 16")
    seed: Seed = Field(0, description="of the random words")
    reencoded: bool = Field(False, description="the shards hold other encodings of the store's images")

    @property
    def examples_shown(self) -> int:
        """Images a word."""
        return self.examples or (16 if self.words else 8)
