"""Growing a store by new images under its own vocabularies (`bowstore encode --append`).

The grown store is prepared beside the old one: chunks that stay as they are become links to the same files, so that it
costs no room, and the old store stays as it is, usable, until the new one is whole and takes its name. An append that
is interrupted goes on like any other encode. Chunks that `bowstore verify --repair` took back from a grown store are
encoded again first.

Legend: N images of the store, M images that are added.
"""

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray

from bowstore.errors import BowstoreError, MismatchError, UsageError
from bowstore.files import STAGING_DIGITS, TEMPORARY_MARK, fsync_path, stagings
from bowstore.progress import Progress, say
from bowstore.torchrun import ranks
from bowstore.words.arithmetic import in_words, tell_difference
from bowstore.words.arrays import create, open_group, subgroup
from bowstore.words.claims import Board
from bowstore.words.job import Job, Rows
from bowstore.words.layer import NOT_WRITTEN, Layer, bytes_per_image, chunk_rows
from bowstore.words.same_images import check_same_images
from bowstore.words.store import Store, rows_of
from bowstore.words.store_writer import check_room, create_store

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_KEPT_ARRAYS = ("vocabulary", "projection", "projection_offset", "nearest", "nearest_distance")
_RENEWED = ("statistics", "document_frequency_digest", "content_digest")


def refill(job: Job) -> Job | None:
    """The job of encoding again the chunks that were taken back from a grown store; None if there are none.

    Raises:
        UsageError: not all layers of the store were named.
        MismatchError: another teacher or other settings.
    """
    base, index = job.base, job.index
    if base is None or len(base.parts) == 1 or len(base.layers) == len(base.every_layer()):
        return None
    _check_layers(job, base)
    ends = tuple(accumulate(int(part["images"]) for part in base.parts))
    place_N = rows_of(base.key_hash(), index.key_hash)
    check_same_images(job, base.every_layer(), place_N)
    return replace(job, rows=Rows(0, place_N, ends))


def check_held(job: Job, rows_left: Iterable[NDArray[np.int64]]) -> None:
    """Refuse to encode rows of which the shards do not have the images.

    Raises:
        MismatchError: says how many, and some of them.
    """
    lacking = [rows_B[job.rows.in_index(rows_B) < 0] for rows_B in rows_left]
    rows = np.concatenate([np.empty(0, np.int64), *lacking])
    if len(rows):
        raise MismatchError(
            f"{job.index.root} lacks {len(rows)} images of damaged chunks of word store {job.store}, for example those "
            f"of rows {', '.join(map(str, rows[:5].tolist()))}; give --shards that have them all (links to the tars of "
            "several sets in one folder, under names that differ, then `bowstore index`)"
        )


def begin_append(job: Job, board: Board) -> Job:
    """The job of adding the images that the store lacks; prepares the grown store, unless that is there already.

    Raises:
        UsageError: not all layers of the store were named.
        MismatchError: another teacher or other settings, a layer that is not complete, or an append of other images
            that was begun and is not finished.
    """
    index = job.index
    with board.lead("prepares the grown store"):
        base = Store(job.store)  # once more: another process may have ended the same append
        job = replace(job, base=base)
        _check_layers(job, base)
        for name in job.names:
            base.layer(name)  # complete
        place_N = rows_of(base.key_hash(), index.key_hash)
        fresh_M = np.delete(np.arange(len(index)), place_N[place_N >= 0])
        held = len(index) - len(fresh_M)
        say(f"{held} of {len(index)} images are in word store {base.path} already, by their keys")
        if not len(fresh_M):
            check_same_images(job, base.every_layer(), place_N)
            return replace(job, rows=Rows(len(base), fresh_M))
        fingerprint = _grown_fingerprint(base, index.fingerprint, len(fresh_M))
        staging = _staging(job.store, fingerprint)
        for other in stagings(job.store):
            if other != staging:
                raise MismatchError(
                    f"{other} is an unfinished --append of other images, or to another store; finish it with the same "
                    "--shards, or remove it"
                )
        begun = staging.exists()
        if not begun:
            added = sum(bytes_per_image(layer.grid) for layer in base.every_layer()) * len(fresh_M)
            check_room(job.store, added + 8 * (len(base) + len(fresh_M)))
        if not begun or ranks().first:
            _check_whole(base)
        if not begun:
            check_same_images(job, base.every_layer(), place_N)
            _make_grown(job, base, fresh_M, staging, fingerprint)
        elif (then := Store(staging).parts[-1].get("arithmetic")) not in (None, dict(job.arithmetic)):
            raise MismatchError(
                f"{staging} is an unfinished --append with {in_words(then)}, now it would be "
                f"{in_words(job.arithmetic)}; remove it, and the append begins anew"
            )
    return replace(job, store=staging, rows=Rows(len(base), fresh_M))


def _check_layers(job: Job, base: Store) -> None:
    for layer in base.every_layer():
        if layer.name not in job.names:
            raise UsageError(
                f"--append adds images to all layers of word store {base.path}: "
                f"{', '.join(each.name for each in base.every_layer())}; leave --layer out"
            )
        job.check_settings(layer)
        tell_difference(layer, job.arithmetic)


def _check_whole(base: Store) -> None:
    """Refuse damage before it is carried on: what the grown store shares with the old one is read once."""
    with Progress("check", len(base) * len(base.every_layer())) as progress:
        for layer in base.every_layer():
            for name in ("vocabulary", "nearest", "nearest_distance"):
                layer.read_array(name)
            layer.read_projection()
            for chunk, value in enumerate(layer.chunk_digests().tolist()):
                progress.advance(len(layer.read_chunk(chunk, value)))


def drop_append(store: Path) -> None:
    """Forget an unfinished append, which shares files with the store; the next one begins anew."""
    for staging in stagings(store):
        shutil.rmtree(staging, ignore_errors=True)


def _grown_fingerprint(base: Store, added: str, images: int) -> str:
    """Identity of a store with more images: of its data sets, and of the layers whose words they get."""
    layers = ",".join(f"{each.name}={each.attributes['vocabulary_digest']}" for each in base.every_layer())
    return xxhash.xxh3_128_hexdigest(f"{base.fingerprint} {added} {images} {layers}".encode())


def end_append(job: Job, store: Path, board: Board) -> None:
    """Give the grown store the name of the old one, unless another process has."""
    with board.lead("takes the grown store into use"):
        if job.store == store or not job.store.exists():
            return
        board.check_lead()
        old = _old(store)
        shutil.rmtree(old, ignore_errors=True)
        store.rename(old)
        job.store.rename(store)
        fsync_path(store.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover_append(store: Path) -> None:
    """End what a process was killed in the middle of: the old store has given its name away, the new one lacks it."""
    old = _old(store)
    if not old.exists():
        return
    if not store.exists():
        whole = (staging for staging in stagings(store) if _is_whole(staging))
        next(whole, old).rename(store)
    shutil.rmtree(old, ignore_errors=True)


def _is_whole(store: Path) -> bool:
    found = Store(store)
    return len(found.layers) == len(found.every_layer())


def _staging(store: Path, fingerprint: str) -> Path:
    """A name of its own for each append: a process that slept through the end of one must not meet the next."""
    return store.with_name(f".{store.name}.append-{fingerprint[:STAGING_DIGITS]}")


def _old(store: Path) -> Path:
    return store.with_name(f".{store.name}.old")


def _make_grown(job: Job, base: Store, fresh_M: NDArray[np.int64], staging: Path, fingerprint: str) -> None:
    """A store of N + M images with all that stays as it is; whole or not at all."""
    index, arithmetic = job.index, dict(job.arithmetic)
    making = base.path.with_name(f".{base.path.name}{TEMPORARY_MARK}grown")
    shutil.rmtree(making, ignore_errors=True)
    parts = [*base.parts, {"fingerprint": index.fingerprint, "images": len(fresh_M), "arithmetic": arithmetic}]
    held = base.image_digest()
    if held is None:
        raise MismatchError(
            f"word store {base.path} has format 2, which does not know its images; --append needs format 3: encode all "
            f"into a new store with --vocabulary {base.path}"
        )
    try:
        hashes = np.concatenate([base.key_hash(), index.key_hash[fresh_M]])
        digests = np.concatenate([held, index.digest[fresh_M]])
        create_store(making, fingerprint=fingerprint, key_hash_N=hashes, image_digest_N=digests, parts=parts)
        group = open_group(making, writable=True)
        for layer in base.every_layer():
            _grow_layer(base.path, layer, group, making, len(hashes))
        group.update_attributes({"layers": [layer.name for layer in base.every_layer()]})
        making.rename(staging)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    fsync_path(staging.parent)


def _grow_layer(base: Path, layer: Layer, group: zarr.Group, grown: Path, images: int) -> None:
    own = group.create_group(layer.name)
    kept = {name: value for name, value in layer.attributes.items() if name not in _RENEWED}
    # The one chunk of a small store may grow to the size of others.
    rows = chunk_rows(images, layer.grid) if layer.chunks == 1 else layer.chunk_rows
    create(own, "words", (images, *layer.grid), np.uint16, fill=NOT_WRITTEN, chunks=(rows, *layer.grid))
    create(own, "chunk_digest", (-(-images // rows),), np.uint64, fill=0, chunks=(1,))
    create(own, "document_frequency", (layer.num_words,), np.int64, fill=-1)
    for chunk in range(layer.images // rows):  # the last one stays only if it is full
        for name in (f"words/c/{chunk}/0/0", f"chunk_digest/c/{chunk}"):
            _link(base / layer.name / name, grown / layer.name / name)
    for name in _KEPT_ARRAYS:
        for file in sorted((base / layer.name / name).rglob("*")):
            if file.is_file():
                _link(file, grown / file.relative_to(base))
    subgroup(group, layer.name).update_attributes({**kept, "complete": False})


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if isinstance(error, BowstoreError) or error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)
