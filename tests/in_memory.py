"""Encoded images in memory, as the graphs read them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Memory:
    """What the graphs ask of a source of images."""

    def __init__(self, images: Sequence[bytes | NDArray[np.uint8]]) -> None:
        self.images = [np.frombuffer(image, np.uint8) for image in images]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return str(row)

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros(len(rows), np.int64)

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self.images[row] for row in rows]
