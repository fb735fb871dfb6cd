"""Where the words lie during training, behind one interface: on the device, in host memory, or on disk.

In every tier `ahead` does the host's part of a batch in the reading thread, some batches before it is needed,
and `words` the device's part in the training step; both take rows of the index, and all tiers give the same bits.

    resident   all words on the device; a batch is one gather there
    host       all words in the memory of each process; gathered ahead, sent through a pinned buffer
    streamed   words in a mapped file on a local disk; else as host, but memory does not grow with the store

Legend: N rows of the index, B batch, M slots (locations of the word map).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import StorageConfig
from bowstore.environment import available_memory
from bowstore.errors import UsageError
from bowstore.gpu import free_memory
from bowstore.progress import QUIET_BYTES, Progress
from bowstore.torchrun import ranks

if TYPE_CHECKING:  # Zarr is loaded where a store is opened: words that lie in memory train without it
    from bowstore.words.store.join import JoinedLayer
    from bowstore.words.store.layer import Layer
    from bowstore.words.targets.flat import FlatWords

Tier = Literal["resident", "host", "streamed"]
TIERS: tuple[Tier, ...] = ("resident", "host", "streamed")  # by the room that they need, most first
Add = Callable[[NDArray[np.uint16]], object]


class TierChoice(NamedTuple):
    """A tier, and why it was chosen.

    Attributes:
        tier: where the words lie.
        reason: half a sentence with the sizes that decided.
    """

    tier: Tier
    reason: str


def choose_tier(setting: Tier | Literal["auto"], size_bytes: int, device: torch.device) -> TierChoice:
    """The tier of a setting, by the words' size and the memory there is.

    `auto` takes resident where the words fill at most a quarter of the device's free memory (on a CPU: of this rank's
    share of the machine's), host where they fill at most half of that share, else streamed. A share is the available
    memory, cgroup bounds included, divided by the ranks of this machine: each keeps its own copy.

    Raises:
        UsageError: a tier that was asked for and cannot hold the words.
    """
    local = ranks().local_size
    share = available_memory() // local
    memory = f"this rank's {_size(share)} of memory" + (f" ({local} ranks share the machine)" if local > 1 else "")
    near, place = share, memory
    if device.type == "cuda":
        near = free_memory(device)
        place = f"the {_size(near)} free on {device}"
    if setting != "auto":
        bound, where = {"resident": (near, place), "host": (share, memory)}.get(setting, (size_bytes, ""))
        if size_bytes > bound:
            other = "host or streamed" if setting == "resident" and device.type == "cuda" else "streamed"
            raise UsageError(
                f"runtime.targets {setting}: the words take {_size(size_bytes)}, more than {where}; "
                f"set runtime.targets to {other}"
            )
        return TierChoice(setting, "as set")
    if 4 * size_bytes <= near:
        return TierChoice("resident", f"at most a quarter of {place}")
    if 2 * size_bytes <= share:
        return TierChoice("host", f"more than a quarter of {place}, at most half of {memory}")
    return TierChoice("streamed", f"more than half of {memory}")


def words_bytes(layer: "Layer | JoinedLayer", rows: int) -> int:
    """Size of the words of some rows, bytes."""
    return 2 * rows * layer.grid[0] * layer.grid[1]


def describe(choice: TierChoice, size_bytes: int) -> str:
    """One line for people: the tier, the words' size, the reason."""
    return f"targets: {choice.tier}, {_size(size_bytes)} of words ({choice.reason})"


class Targets(ABC):
    """Words of the rows of an index.

    Attributes:
        tier: where the words lie.
        device: where they are wanted.
        slots: M.
    """

    tier: ClassVar[Tier]

    def __init__(self, layer: "Layer | JoinedLayer", rows: int, device: torch.device) -> None:
        self.device = device
        self.slots = layer.grid[0] * layer.grid[1]
        self._rows, self._block_rows = rows, layer.chunk_rows

    def __len__(self) -> int:
        return self._rows

    @abstractmethod
    def ahead(self, rows_B: NDArray[np.int64]) -> Tensor | None:
        """The host's part of `words`, for rows (B,) of the index; called in the reading thread, in plan order."""

    @abstractmethod
    def words(self, rows_B: NDArray[np.int64], ahead: Tensor | None = None) -> Tensor:
        """Words (B, M) on the device: uint16 bit for bit as int16, which torch gathers on every device.

        Args:
            rows_B: int64 (B,), rows of the index.
            ahead: what `ahead` gave for these rows; None does its work now.
        """

    def blocks(self) -> Iterator[NDArray[np.uint16]]:
        """All words in the order of the index, uint16 (rows, M), in blocks of the same size in every tier."""
        for start in range(0, len(self), self._block_rows):
            yield self._block(start, min(start + self._block_rows, len(self)))

    @abstractmethod
    def _block(self, start: int, stop: int) -> NDArray[np.uint16]:
        """Words of consecutive rows (stop - start, M) on the host."""


class ResidentTargets(Targets):
    """The words of all rows in the memory of the device. ImageNet's conv4 words are 0.5 GB."""

    tier = "resident"

    def __init__(
        self, layer: "Layer | JoinedLayer", store_row_N: NDArray[np.int64], device: torch.device, *, shown: bool = True
    ) -> None:
        super().__init__(layer, len(store_row_N), device)
        # In the order of the index, not of the store: the join is paid once, and a batch is one gather.
        self._words_NM = _load(layer, store_row_N, device, shown=shown)

    def ahead(self, rows_B: NDArray[np.int64]) -> None:
        """Nothing: the gather is the device's."""

    def words(self, rows_B: NDArray[np.int64], ahead: Tensor | None = None) -> Tensor:
        """As in the base class."""
        return self._words_NM[torch.from_numpy(rows_B).to(self.device, non_blocking=True)]

    def _block(self, start: int, stop: int) -> NDArray[np.uint16]:
        return _unsigned(self._words_NM[start:stop].cpu())


class HostTargets(Targets):
    """The words of all rows in host memory, one copy a process."""

    tier: ClassVar[Tier] = "host"

    def __init__(
        self, layer: "Layer | JoinedLayer", store_row_N: NDArray[np.int64], device: torch.device, *, shown: bool = True
    ) -> None:
        super().__init__(layer, len(store_row_N), device)
        self._words_NM = _unsigned(_load(layer, store_row_N, torch.device("cpu"), shown=shown))

    def ahead(self, rows_B: NDArray[np.int64]) -> Tensor:
        """The rows' words, gathered into memory from which a GPU copies without anybody waiting."""
        gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if gpu else nullcontext():
            buffer = torch.empty((len(rows_B), self.slots), dtype=torch.int16, pin_memory=gpu)
        self._gather(rows_B, _unsigned(buffer))
        return buffer

    def words(self, rows_B: NDArray[np.int64], ahead: Tensor | None = None) -> Tensor:
        """As in the base class."""
        return (self.ahead(rows_B) if ahead is None else ahead).to(self.device, non_blocking=True)

    def _gather(self, rows_B: NDArray[np.int64], out_BM: NDArray[np.uint16]) -> None:
        # Any other mode than "raise" writes into `out` directly; the rows are those of a plan, none is clipped.
        np.take(self._words_NM, rows_B, axis=0, out=out_BM, mode="clip")

    def _block(self, start: int, stop: int) -> NDArray[np.uint16]:
        return self._words_NM[start:stop]


class StreamedTargets(HostTargets):
    """The words of all rows of a store in a mapped file: the kernel has in memory what there is room for."""

    tier = "streamed"

    def __init__(
        self, layer: "Layer | JoinedLayer", store_row_N: NDArray[np.int64], device: torch.device, flat: "FlatWords"
    ) -> None:
        Targets.__init__(self, layer, len(store_row_N), device)
        self.flat, self._words_NM = flat, flat.words_NM
        identity = len(store_row_N) == layer.images and bool((np.diff(store_row_N, prepend=-1) == 1).all())
        # The only thing here that grows with the index: usually 4 bytes a row, and nothing for the identity.
        self._store_row_N = None if identity else store_row_N.astype(np.min_scalar_type(layer.images))

    def _gather(self, rows_B: NDArray[np.int64], out_BM: NDArray[np.uint16]) -> None:
        store_rows_B = rows_B if self._store_row_N is None else self._store_row_N[rows_B].astype(np.int64)
        self.flat.announce(store_rows_B)
        super()._gather(store_rows_B, out_BM)

    def _block(self, start: int, stop: int) -> NDArray[np.uint16]:
        if self._store_row_N is None:
            return super()._block(start, stop).copy()  # torch warns of arrays that cannot be written
        block_BM = np.empty((stop - start, self.slots), np.uint16)
        self._gather(np.arange(start, stop), block_BM)
        return block_BM


def open_targets(
    tier: Tier,
    layer: "Layer | JoinedLayer",
    store_row_N: NDArray[np.int64],
    device: torch.device,
    *,
    storage: StorageConfig,
    shown: bool = True,
) -> Targets:
    """Load or unpack the words of an index's rows.

    Args:
        tier: where they shall lie.
        layer: a complete layer of a store, or of several.
        store_row_N: int64 (N,), the store's row of each row of the index (`join_rows`).
        device: where they are wanted.
        storage: the cache of the streamed tier.
        shown: False silences progress (ranks other than 0).

    Raises:
        CorruptError: a damaged chunk of the store.
        BowstoreError: streamed, and no room on the disk.
    """
    if tier == "streamed":
        from bowstore.words.targets.flat import open_flat  # Zarr

        return StreamedTargets(layer, store_row_N, device, open_flat(layer, storage, shown=shown))
    kind = ResidentTargets if tier == "resident" else HostTargets
    return kind(layer, store_row_N, device, shown=shown)


def words_digest(targets: Targets, add: Add | None = None, *, used: int | None = None, shown: bool = True) -> str:
    """Identity of the words in the order of the index, 32 hex digits; hands those in use to `add` on the way.

    The same in every tier: xxh3-128 of the uint16 words (N, h, w) as they lie in memory.

    Args:
        targets: of all rows.
        add: takes the words of the rows in use, uint16 (rows, M), block after block.
        used: how many rows are in use, from the first; None for all.
        shown: False silences progress.
    """
    digest, left = xxhash.xxh3_128(), len(targets) if used is None else used
    shown = shown and 2 * len(targets) * targets.slots > QUIET_BYTES
    with Progress("check words", len(targets), shown=shown) as progress:
        for words_BM in targets.blocks():
            digest.update(words_BM.data)
            if add and left > 0:
                add(words_BM[:left])
                left -= len(words_BM)
            progress.advance(len(words_BM))
    return digest.hexdigest()


def _load(layer: "Layer | JoinedLayer", store_row_N: NDArray[np.int64], device: torch.device, *, shown: bool) -> Tensor:
    """Words of an index's rows, int16 (N, M), read chunk by chunk into their places."""
    slots = layer.grid[0] * layer.grid[1]
    words_NM = torch.empty((len(store_row_N), slots), dtype=torch.int16, device=device)
    order_N = np.argsort(store_row_N, kind="stable")
    sorted_N = store_row_N[order_N]
    digests = layer.chunk_digests().tolist()
    shown = shown and words_bytes(layer, len(store_row_N)) > QUIET_BYTES
    with Progress("load words", len(store_row_N), shown=shown) as progress:
        for chunk, digest in enumerate(digests):
            rows = layer.rows(chunk)
            first, last = np.searchsorted(sorted_N, (rows.start, rows.stop)).tolist()
            if first < last:  # chunks of which no row is wanted are not even read
                words = layer.read_chunk(chunk, digest).reshape(-1, slots)[sorted_N[first:last] - rows.start]
                places = torch.from_numpy(order_N[first:last]).to(device)
                words_NM[places] = torch.from_numpy(words.view(np.int16)).to(device)
            progress.advance(last - first)
    return words_NM


def _unsigned(words_BM: Tensor) -> NDArray[np.uint16]:
    """An int16 tensor on the host as the uint16 array it holds."""
    array: NDArray[np.uint16] = words_BM.numpy().view(np.uint16)
    return array


def _size(size_bytes: int) -> str:
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size_bytes >= s / 100 or s == 1e3)
    return f"{size_bytes / scale:.2f} {unit}"
