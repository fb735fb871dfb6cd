"""The part of `bowstore.data.shards` that writes tars: one job a shard, in this process or in workers.

A shard is written whole under a temporary name, then gets its name, then its record. Only a shard with a
record counts as finished.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from bowstore.data.images import Prepared, UnusableImage, prepare
from bowstore.data.index_build import PARTS_FOLDER
from bowstore.data.sources import DANGLING, NO_LABEL, ImageFile, Reader, Source, open_source
from bowstore.errors import BowstoreError, CorruptError
from bowstore.files import atomic_file, read_json, write_json

_REPORT_EVERY_IMAGES = 50
_POLL_SECONDS = 0.5
_USUAL_SUFFIXES = {"jpg": ("jpg", "jpeg", "jpe", "jfif"), "png": ("png", "apng"), "webp": ("webp",)}


class ShardJob(NamedTuple):
    """One shard to write.

    Attributes:
        folder: where the tar goes.
        plan: fingerprint of all that decides the bytes.
        name: the tar's file name.
        images: in the order of writing.
    """

    folder: Path
    plan: str
    name: str
    images: list[ImageFile]

    @property
    def record_path(self) -> Path:
        """Where the record of the finished shard lies."""
        return self.folder / PARTS_FOLDER / f"{Path(self.name).stem}.json"


@dataclass(frozen=True)
class Record:
    """A finished shard.

    Attributes:
        plan: fingerprint of the job it was written for.
        name: the tar's file name; there is no such file where `samples` is 0.
        samples: images in it.
        size_bytes: length of the tar.
        digest: xxh3-128 of the tar, hex.
        changed: images encoded anew or renamed, by kind.
        quarantined: `path` and `reason` of each image left out.
    """

    plan: str
    name: str
    samples: int
    size_bytes: int
    digest: str
    changed: dict[str, int] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)


def read_record(job: ShardJob) -> Record | None:
    """The record of a finished shard, if it is this job's and the tar still has its length."""
    try:
        record = Record(**read_json(job.record_path))
        size_bytes = (job.folder / job.name).stat().st_size if record.samples else 0
    except (FileNotFoundError, CorruptError, TypeError):
        return None
    return record if record.plan == job.plan and size_bytes == record.size_bytes else None


def write_shards(
    source: Source, jobs: Sequence[ShardJob], workers: int, advance: Callable[[int], None]
) -> Iterator[Record]:
    """Write shards, each with its record; yield the records as shards finish, in any order.

    Args:
        source: where the images lie.
        jobs: what to write.
        workers: processes; with 1, or with a single job, all is done in this process.
        advance: hears the number of further images dealt with.

    Raises:
        DataError: a file that cannot be read, or that changed after listing.
        BowstoreError: a worker died.
        OSError: the disk is full, or the folder cannot be written.
    """
    if min(workers, len(jobs)) > 1:
        yield from _write_in_processes(source, jobs, workers, advance)
        return
    read = open_source(source)  # one for all shards: it may hold a whole archive
    for job in jobs:
        yield _write_shard(job, read, advance)


class _DigestingFile:
    """Passes bytes on to a file, counting and digesting them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)


def _write_shard(job: ShardJob, read: Reader, report: Callable[[int], None]) -> Record:
    """Write one tar and its record; `report` hears of every few images and may raise to stop."""
    # It brings torch along: two seconds that a run with nothing to do need not wait.
    from webdataset import TarWriter

    path = job.folder / job.name
    changed: Counter[str] = Counter()
    quarantined: list[dict[str, str]] = []
    with atomic_file(path) as file:
        target = _DigestingFile(file)
        with TarWriter(target, encoder=False, mtime=0) as tar:
            for number, image in enumerate(job.images, start=1):
                try:
                    prepared = prepare(_read(read, image))
                except UnusableImage as error:
                    quarantined.append({"path": image.path, "reason": str(error)})
                else:
                    _write_sample(tar, image, prepared)
                    changed.update(_changes(image, prepared))
                if number % _REPORT_EVERY_IMAGES == 0:
                    report(_REPORT_EVERY_IMAGES)
    report(len(job.images) % _REPORT_EVERY_IMAGES)
    samples = len(job.images) - len(quarantined)
    size_bytes = target.size_bytes if samples else 0
    if not samples:
        path.unlink()  # readers stumble over a tar without members
    digest, kinds = target.digest.hexdigest(), dict(sorted(changed.items()))
    record = Record(job.plan, job.name, samples, size_bytes, digest, kinds, quarantined)
    write_json(job.record_path, asdict(record))
    return record


def _read(read: Reader, image: ImageFile) -> bytes:
    if image.size_bytes == DANGLING:
        raise UnusableImage("link to a file that does not exist")
    return read(image)


def _write_sample(tar: Any, image: ImageFile, prepared: Prepared) -> None:
    # One call for each member: in one call TarWriter sorts, and the label would come before the image.
    tar.write({"__key__": image.key, prepared.extension: prepared.data})
    if image.label != NO_LABEL:
        tar.write({"__key__": image.key, "cls": str(image.label).encode()})


def _changes(image: ImageFile, prepared: Prepared) -> list[str]:
    if prepared.change:
        return [prepared.change]
    suffix = image.path.rpartition(".")[2].lower()
    return [] if suffix in _USUAL_SUFFIXES[prepared.extension] else ["renamed"]


def _write_in_processes(
    source: Source, jobs: Sequence[ShardJob], workers: int, advance: Callable[[int], None]
) -> Iterator[Record]:
    """Yield records as shards finish. Workers stop within some images when this process leaves, or dies."""
    context = multiprocessing.get_context("spawn")  # forking a process that has threads may hang
    count, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(source, count, stop)
    )
    seen = 0
    try:
        running: set[Future[Record]] = {pool.submit(_write_shard_in_worker, job) for job in jobs}
        while running:
            finished, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
            now = count.value
            advance(now - seen)
            seen = now
    except BrokenProcessPool as error:
        raise BowstoreError(
            "a worker process died (out of memory, perhaps); finished shards are kept: "
            f"run the same command again, with fewer workers than {workers}"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The main process wants no more shards."""


_in_worker: tuple[Reader, "Synchronized[int]", Event] | None = None


def _start_worker(source: Source, count: "Synchronized[int]", stop: Event) -> None:
    global _in_worker
    _in_worker = open_source(source), count, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A worker whose parent was killed would wait for its next shard for ever.
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _write_shard_in_worker(job: ShardJob) -> Record:
    assert _in_worker, "the pool's initializer has run"
    read, count, stop = _in_worker

    def report(images: int) -> None:
        if stop.is_set():
            raise _Stopped
        with count.get_lock():
            count.value += images

    return _write_shard(job, read, report)
