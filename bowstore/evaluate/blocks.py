"""Features a block at a time, as they may be larger than memory."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bowstore.gpu import holds

_HOST_BYTES = 1 << 30


def slices(count: int, step: int) -> Iterator[slice]:
    """`count` places in order, `step` at a time."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def blocks(
    make: Callable[[slice], Tensor], count: int, step: int, *, size_bytes: int, device: torch.device
) -> Callable[[], Iterable[Tensor]]:
    """Gives all blocks, as often as it is called: kept where memory holds them, else made anew each time.

    Args:
        make: gives the block of some places.
        count: places in all.
        step: of a block.
        size_bytes: of all blocks.
        device: where they lie; a GPU holds what its free memory does, the host a gigabyte.
    """

    def made() -> Iterator[Tensor]:
        return map(make, slices(count, step))

    if not (holds(device, size_bytes) if device.type == "cuda" else size_bytes <= _HOST_BYTES):
        return made
    kept = list(made())
    return lambda: kept
