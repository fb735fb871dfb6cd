"""Where the words lie during training, behind one interface: on the device, in host memory, or on disk.

In every tier `ahead` does the host's part of a batch in the reading thread, some batches before it is needed,
and `words` the device's part in the training step; both take rows of the index, and all tiers give the same bits.

    resident   all words on the device; a batch is one gather there
    host       all words in the memory of each process; gathered ahead, sent through a pinned buffer
    streamed   words in a mapped file on a local disk; else as host, but memory does not grow with the store

Legend: N rows of the index, B batch, M slots (locations of the word map).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

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


def choose_tier(setting: Tier | Literal["auto"], size_bytes: int, device: torch.device) -> tuple[Tier, str]:
    """The tier of a setting, by the words' size and the memory there is; and half a sentence on why.

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
        return setting, "as set"
    if 4 * size_bytes <= near:
        return "resident", f"at most a quarter of {place}"
    if 2 * size_bytes <= share:
        return "host", f"more than a quarter of {place}, at most half of {memory}"
    return "streamed", f"more than half of {memory}"


def describe(tier: Tier, reason: str, size_bytes: int) -> str:
    """One line for people."""
    return f"targets: {tier}, {_size(size_bytes)} of words ({reason})"


class Targets:
    """Words of the rows of an index; to open them is to load them, or to unpack them into the cache.

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

    def __init__(
        self,
        tier: Tier,
        layer: "Layer | JoinedLayer",
        store_row_N: NDArray[np.int64],
        device: torch.device,
        *,
        storage: StorageConfig,
        shown: bool = True,
    ) -> None:
        self.tier, self.device, self.slots = tier, device, layer.grid[0] * layer.grid[1]
        self._rows, self._block_rows = len(store_row_N), layer.chunk_rows
        self._flat: FlatWords | None = None
        self._store_row_N = None
        # What is loaded lies in the order of the index, not of the store: the join is paid once.
        if tier == "resident":
            self._words_NM = _load(layer, store_row_N, device, shown=shown)
        elif tier == "host":
            self._host_NM = _load(layer, store_row_N, torch.device("cpu"), shown=shown).numpy()
        else:
            from bowstore.words.targets.flat import open_flat  # Zarr

            self._flat = open_flat(layer, storage, shown=shown)
            self._host_NM = self._flat.words_NM.view(np.int16)
            if len(store_row_N) != layer.images or (np.diff(store_row_N, prepend=-1) != 1).any():
                # The only thing here that grows with the index: usually 4 bytes a row, and nothing for the identity.
                self._store_row_N = store_row_N.astype(np.min_scalar_type(layer.images))

    def __len__(self) -> int:
        return self._rows

    def ahead(self, rows_B: NDArray[np.int64]) -> Tensor | None:
        """The host's part of `words`, for rows (B,) of the index; called in the reading thread, in plan order."""
        return None if self.tier == "resident" else self._gathered(rows_B)

    def words(self, rows_B: NDArray[np.int64], ahead: Tensor | None = None) -> Tensor:
        """Words (B, M) on the device: uint16 bit for bit as int16, which torch gathers on every device.

        Args:
            rows_B: int64 (B,), rows of the index.
            ahead: what `ahead` gave for these rows; None does its work now.
        """
        if self.tier == "resident":
            return self._words_NM[torch.from_numpy(rows_B).to(self.device, non_blocking=True)]
        return (self._gathered(rows_B) if ahead is None else ahead).to(self.device, non_blocking=True)

    def digest(
        self, add: Callable[[NDArray[np.uint16]], object] | None = None, *, used: int | None = None, shown: bool = True
    ) -> str:
        """Identity of the words in the order of the index, 32 hex digits; hands those in use to `add` on the way.

        The same in every tier: xxh3-128 of the uint16 words (N, h, w) as they lie in memory.

        Args:
            add: takes the words of the rows in use, uint16 (rows, M), in blocks of the same size in every tier.
            used: how many rows are in use, from the first; None for all.
            shown: False silences progress.
        """
        digest, used = xxhash.xxh3_128(), len(self) if used is None else used
        shown = shown and 2 * len(self) * self.slots > QUIET_BYTES
        with Progress("check words", len(self), shown=shown) as progress:
            for start in range(0, len(self), self._block_rows):
                rows_B = np.arange(start, min(start + self._block_rows, len(self)))
                ahead = self.ahead(rows_B)
                words_BM = (self.words(rows_B).cpu() if ahead is None else ahead).numpy().view(np.uint16)
                digest.update(words_BM.data)
                if add and start < used:
                    add(words_BM[: used - start])
                progress.advance(len(rows_B))
        return digest.hexdigest()

    def _gathered(self, rows_B: NDArray[np.int64]) -> Tensor:
        """The rows' words, gathered into memory from which a GPU copies without anybody waiting."""
        gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device if gpu else -1):  # pinning initialises the current GPU
            buffer_BM = torch.empty((len(rows_B), self.slots), dtype=torch.int16, pin_memory=gpu)
        if self._store_row_N is not None:
            rows_B = self._store_row_N[rows_B].astype(np.int64)
        if self._flat:
            self._flat.announce(rows_B)
        # Any other mode than "raise" writes into `out` directly; the rows are those of a plan, none is clipped.
        np.take(self._host_NM, rows_B, axis=0, out=buffer_BM.numpy(), mode="clip")
        return buffer_BM


def _load(layer: "Layer | JoinedLayer", store_row_N: NDArray[np.int64], device: torch.device, *, shown: bool) -> Tensor:
    """Words of an index's rows, int16 (N, M), read chunk by chunk into their places."""
    slots = layer.grid[0] * layer.grid[1]
    words_NM = torch.empty((len(store_row_N), slots), dtype=torch.int16, device=device)
    order_N = np.argsort(store_row_N, kind="stable")
    sorted_N = store_row_N[order_N]
    shown = shown and words_NM.nbytes > QUIET_BYTES
    with Progress("load words", len(store_row_N), shown=shown) as progress:
        for chunk, digest in enumerate(layer.chunk_digests().tolist()):
            rows = layer.rows(chunk)
            first, last = np.searchsorted(sorted_N, (rows.start, rows.stop)).tolist()
            if first < last:  # chunks of which no row is wanted are not even read
                words = layer.read_chunk(chunk, digest).reshape(-1, slots)[sorted_N[first:last] - rows.start]
                places = torch.from_numpy(order_N[first:last]).to(device)
                words_NM[places] = torch.from_numpy(words.view(np.int16)).to(device)
            progress.advance(last - first)
    return words_NM


def _size(size_bytes: int) -> str:
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size_bytes >= s / 100 or s == 1e3)
    return f"{size_bytes / scale:.2f} {unit}"
