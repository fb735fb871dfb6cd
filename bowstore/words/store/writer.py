"""Making and filling word stores: every write is durable, and counts only once it is recorded.

One process writes a store at a time, under `store_lock`.

Legend: N images, h w word grid, K words, c channels, p dimensions of a word, n images kept for each word.
"""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

import bowstore
from bowstore.errors import UsageError
from bowstore.files import exclusive_lock, fsync_path, leftovers, temporary_path
from bowstore.words.store.arrays import (
    Arrays,
    SafeStore,
    array_digest,
    foreign_file,
    hex_digest,
    member,
    remove,
)
from bowstore.words.store.layer import Layer, LayerSpec, chunk_rows
from bowstore.words.store.nearest import NearestImages
from bowstore.words.store.schema import FORMAT, FORMAT_VERSION, STORE_ARRAYS, layer_arrays, layer_sizes, store_sizes
from bowstore.words.store.statistics import WordStatistics
from bowstore.words.store.store import Root


class StoreWriter(Root):
    """A store opened for writing."""

    _writable = True

    def layer(self, name: str) -> Layer:
        """A layer, complete or not."""
        return Layer(self.path, self.root, name, self.images)

    def add_layer(
        self,
        name: str,
        spec: LayerSpec,
        vocabulary_Kp: NDArray[np.float32],
        projection: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> Layer:
        """Create a layer with its vocabulary and no words.

        It counts once its name is in the list, whole.

        Args:
            name: the layer.
            spec: its attributes.
            vocabulary_Kp: float32 (K, p).
            projection: y = A x + b before the words: float32 (p, c) and (p,); None if there is none.

        Raises:
            UsageError: something that is no layer lies in its place.
        """
        if foreign := foreign_file(self.path / name):
            raise UsageError(f"{foreign} lies where layer {name!r} goes, and bowstore did not write it; move it away")
        shutil.rmtree(self.path / name, ignore_errors=True)  # what a killed writer left, not yet listed
        group = self.root.create_group(name)
        values = {"vocabulary": vocabulary_Kp}
        if projection is not None:
            values |= {"projection": projection[0], "projection_offset": projection[1]}
        rows = chunk_rows(self.images, spec.grid)
        sizes = layer_sizes(self.images, spec.grid, vocabulary_Kp.shape, spec.channels, rows)
        arrays = layer_arrays(projected=projection is not None)
        Arrays(self.path, self.root, f"{name}/", {}, arrays, sizes).create(values)
        digests = {f"{part}_digest": hex_digest(array) for part, array in values.items()}
        version = {"bowstore_version": bowstore.__version__}
        group.update_attributes({"complete": False, **spec.attributes, **digests, **version})
        self.names = (*self.names, name)
        self.root.update_attributes({"layers": list(self.names)})
        return self.layer(name)

    def write_chunk(self, layer: str, chunk: int, words: NDArray[np.uint16]) -> None:
        """Write all words of a chunk, uint16 (rows, h, w), durably; then commit it by recording its digest.

        Raises:
            UsageError: another shape, or ids that are not below K.
        """
        what = self.layer(layer)
        rows = what.rows(chunk)
        shape = (rows.stop - rows.start, *what.grid)
        if words.shape != shape or words.dtype != np.uint16:
            raise UsageError(f"chunk {what.place(chunk)} takes uint16 {shape}, not {words.dtype} {words.shape}")
        if int(words.max()) >= what.num_words:
            raise UsageError(f"chunk {what.place(chunk)}: word {int(words.max())} is not below K = {what.num_words}")
        what.array("words")[rows] = words
        what.array("chunk_digest")[chunk] = np.uint64(array_digest(words))

    def mark_complete(self, layer: str, statistics: WordStatistics, nearest: NearestImages) -> None:
        """Record what was found over all words and make the layer usable: the last step.

        What was recorded before is gone from the first moment on: keep what was found until this is through.

        Raises:
            UsageError: a chunk is not committed yet.
        """
        what = self.layer(layer)
        done = np.count_nonzero(what.chunk_digests())
        if done < what.chunks:
            raise UsageError(f"layer {layer!r} has {done} of {what.chunks} chunks; write the others first")
        group = member(self.root, layer, zarr.Group)
        found: dict[str, NDArray[Any]] = {
            "document_frequency": statistics.document_frequency_K,
            "nearest": np.stack([nearest.row_Kn, nearest.cell_Kn], axis=-1),
            "nearest_distance": nearest.distance_Kn,
        }
        # First it is said that they change: a death on the way must not look like damage.
        group.update_attributes({"complete": False, **dict.fromkeys(f"{name}_digest" for name in found)})
        for name, values in found.items():
            what.array(name)[:] = values
        recorded: dict[str, Any] = {f"{name}_digest": hex_digest(values) for name, values in found.items()}
        recorded["statistics"] = statistics.summary()
        content = what.content_digest(**recorded)
        group.update_attributes({**recorded, "content_digest": content, "complete": True})

    def discard_chunks(self, layer: str, chunks: Sequence[int]) -> None:
        """Take chunks back, by their numbers: the layer is incomplete again, and encoding writes just these anew.

        Without chunks only what is counted over all of them is made anew. With all of them all images are seen again,
        and what was seen of the nearest ones is forgotten.
        """
        all_again = len(chunks) == self.layer(layer).chunks
        lost = dict.fromkeys(("nearest_digest", "nearest_distance_digest")) if all_again else {}
        member(self.root, layer, zarr.Group).update_attributes({"complete": False, **lost})
        digests = self.layer(layer).array("chunk_digest")
        for chunk in chunks:
            remove(self.path / layer / "chunk_digest" / "c" / str(chunk))
            digests[chunk] = np.uint64(0)
            remove(self.path / layer / "words" / "c" / str(chunk))


def create_store(
    path: Path,
    *,
    fingerprint: str,
    key_hash_N: NDArray[np.uint64],
    image_digest_N: NDArray[np.uint64],
) -> StoreWriter:
    """Make a store without layers, whole or not at all.

    Args:
        path: where it will be.
        fingerprint: of the data set.
        key_hash_N: uint64 (N,), hashes of its keys.
        image_digest_N: uint64 (N,), digests of its images' bytes.

    Raises:
        UsageError: something of that name is there already.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; remove it, or take another name")
    for old in leftovers(path):
        shutil.rmtree(old, ignore_errors=True)
    temporary = temporary_path(path)
    try:
        group = zarr.create_group(SafeStore(temporary), zarr_format=3, attributes={
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bowstore_version": bowstore.__version__,
            "dataset": {"fingerprint": fingerprint, "images": len(key_hash_N)},
            "key_hash_digest": hex_digest(key_hash_N),
            "image_digest_digest": hex_digest(image_digest_N),
            "layers": [],
        })  # fmt: skip
        arrays = Arrays(temporary, group, "", {}, STORE_ARRAYS, store_sizes(len(key_hash_N)))
        arrays.create({"key_hash": key_hash_N, "image_digest": image_digest_N})
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)
    return StoreWriter(path)


def store_lock(path: Path) -> AbstractContextManager[None]:
    """Be the one process that writes a store, which need not be there, for the length of a block.

    Raises:
        BusyError: another process writes it.
    """
    return exclusive_lock(path.with_name(f".{path.name}.lock"), f"word store {path}")
