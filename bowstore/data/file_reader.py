"""Encoded bytes of images that lie as files.

Legend: B rows of one batch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bowstore.data.image_header import UnusableImage, check_before_decoding, image_size
from bowstore.errors import MissingError


class FileReader:
    """Images that lie as files, in the order given (evaluation sets)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        """The row's path."""
        return str(self._paths[row])

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes of `rows` (B,).

        Raises:
            MissingError, DataError: a file is gone; a header claims more pixels than its bytes can tell.
        """
        try:
            images = [np.fromfile(self._paths[row], dtype=np.uint8) for row in rows.tolist()]
        except FileNotFoundError as error:
            raise MissingError(f"no image {error.filename}; is the data set complete?") from error
        for row, image in zip(rows.tolist(), images, strict=True):
            check_before_decoding(image.data, self.name(row))
        return images

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many pixels each of the rows has, from its header; 0 where that does not say, as decoding tells."""
        return np.array([self._pixels(self._paths[row]) for row in rows.tolist()], np.int64)

    def _pixels(self, path: Path) -> int:
        try:
            size = image_size(path.read_bytes())
        except (UnusableImage, FileNotFoundError):
            return 0
        return size.height * size.width
