"""How many images are decoded at once, bounded by their pixels.

What a batch holds decides how convolutions round, and so may decide a word; it must be the same on every machine. So
the bound is a constant and the sizes come from the index, never from the memory that happens to be free.

Legend: B rows of one batch.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from bowstore.data.plan import Plan
from bowstore.data.reader import ImageSource
from bowstore.progress import say

# 0.6 GB as RGB; on a CPU three are held, one that is finished and two decoded ahead (`feed.PREFETCH`). Sixteen
# photographs of a telephone have less.
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
    """Tells once that a batch of training decodes so much that memory may run out: it is one step, and is not cut.

    Args:
        source: knows how large images are.
        whole: whether whole images are decoded, and not their windows alone.
    """

    def __init__(self, source: ImageSource, *, whole: bool = False) -> None:
        self._source, self._whole = source, whole
        self._told = False

    def look(self, plan: Plan) -> None:
        """Look at the images of a batch."""
        if self._told:
            return
        if self._whole:
            pixels = int(self._source.pixels(plan.rows).sum())
        else:
            pixels = int((plan.window[:, 2].astype(np.int64) * plan.window[:, 3]).sum())
        if pixels > _LARGE_TRAINING_PIXELS:
            self._told = True
            where = "" if self._whole else " in their windows"
            say(
                f"warning: the {len(plan.rows)} images of a training batch have {pixels / 1e6:.0f} megapixels{where}, "
                f"{3 * pixels / 1e9:.1f} GB when decoded, and up to three batches are held; lower optim.batch, or make "
                f"the shards of a smaller copy of the images"
            )
