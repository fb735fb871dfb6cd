"""How many images are decoded at once, bounded by their pixels.

What a batch holds decides how convolutions round, and so may decide a word; it must be the same on every machine. So
the bound is a constant and the sizes come from the index, never from the memory that happens to be free.

Legend: B rows of one batch.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from bowstore.data.reader import ImageSource
from bowstore.progress import say

# 0.6 GB as RGB, of which a pipeline holds a few. Sixteen photographs of a telephone have less.
MAX_BATCH_PIXELS = 200_000_000
_LARGE_TRAINING_PIXELS = 1_000_000_000  # five times that: its batches cannot be cut, as their images are mixed


def bounded(source: ImageSource, batches: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Batches of rows (B,), cut where their images would have more than `MAX_BATCH_PIXELS`; in the same order.

    An image that has more alone is a batch of its own, and told.
    """
    for rows_B in batches:
        pixels_B = source.pixels(rows_B)
        if pixels_B.sum() <= MAX_BATCH_PIXELS:
            yield rows_B
            continue
        start, total = 0, 0
        for place, pixels in enumerate(pixels_B.tolist()):
            if pixels > MAX_BATCH_PIXELS:
                say(
                    f"warning: image {source.name(int(rows_B[place]))!r} has {pixels / 1e6:.0f} megapixels and takes "
                    f"{3 * pixels / 1e9:.1f} GB or more to decode; make the shards of a smaller copy if memory runs out"
                )
            if total and total + pixels > MAX_BATCH_PIXELS:
                yield rows_B[start:place]
                start, total = place, 0
            total += pixels
        yield rows_B[start:]


class TrainingPixels:
    """Tells once that a batch of training decodes so much that memory may run out: it is one step, and is not cut."""

    def __init__(self) -> None:
        self._told = False

    def look(self, window_B4: NDArray[np.int32]) -> None:
        """Look at the windows of a batch: top, left, height and width, pixels."""
        if self._told:
            return
        pixels = int((window_B4[:, 2].astype(np.int64) * window_B4[:, 3]).sum())
        if pixels > _LARGE_TRAINING_PIXELS:
            self._told = True
            say(
                f"warning: the {len(window_B4)} images of a training batch have {pixels / 1e6:.0f} megapixels in their "
                f"windows, {3 * pixels / 1e9:.1f} GB when decoded, and up to three batches are held; lower "
                f"optim.batch, or make the shards of a smaller copy of the images"
            )
