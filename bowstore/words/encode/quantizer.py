"""From a layer's map to its words.

Legend: B batch, M cells of an image, h w word grid, K words, c channels, p dimensions of a word.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.projection import PreparedProjection, Projection, prepare_projection, project
from bowstore.exact import exact_float32
from bowstore.words.assign.assign import PreparedWords, assign, prepare_words
from bowstore.words.encode.lanes import to_host

Words = tuple[NDArray[np.uint16], NDArray[np.float32]]


@dataclass(frozen=True)
class Quantizer:
    """From the map of a layer to words.

    Attributes:
        border: cells left out at each side.
        projection: applied before the search; None for none.
        words: the vocabulary, laid out for `assign`.
        centroids_Kp: float32.
    """

    border: int
    projection: PreparedProjection | None
    words: PreparedWords
    centroids_Kp: Tensor

    def quantize(self, map_Bchw: Tensor) -> Words:
        """Words (B, h, w), and the distances of the vectors to them (B, M), float32."""
        map_Bchw = without_border(map_Bchw, self.border)
        batch, channels, h, w = map_Bchw.shape
        vectors = map_Bchw.permute(0, 2, 3, 1).reshape(-1, channels)
        with exact_float32():
            if self.projection:
                vectors = project(vectors, self.projection)
            ids = assign(vectors, self.words)
            distance = torch.linalg.vector_norm(vectors - self.centroids_Kp[ids.long()], dim=1)
        words_Bhw, distance_BM = to_host(ids.view(batch, h, w), distance.view(batch, -1))
        return words_Bhw, distance_BM


def quantizer(
    centroids_Kp: NDArray[np.float32], projection: Projection | None, border: int, device: torch.device
) -> Quantizer:
    """A vocabulary, on a device."""
    centroids = torch.from_numpy(centroids_Kp).to(device)
    prepared = prepare_projection(projection, device) if projection else None
    return Quantizer(border, prepared, prepare_words(centroids), centroids)


def without_border(map_Bchw: Tensor, border: int) -> Tensor:
    """A map without this many cells at each side."""
    return map_Bchw[:, :, border : map_Bchw.shape[2] - border, border : map_Bchw.shape[3] - border]
