"""`bowstore verify`: does what lies on disk match what was recorded when it was written?"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bowstore.config import SomePaths, StorageConfig
from bowstore.data.shard_check import Problem
from bowstore.data.sources.names import is_system
from bowstore.data.verify import FolderReport, is_shards_folder, verify_folder, verify_remote
from bowstore.errors import BowstoreError, MissingError, UsageError
from bowstore.evaluate.results import read_result
from bowstore.remote import RemoteFolder, fetch_store, is_remote, url_of
from bowstore.runs import all_result_paths, is_network, is_run

_SHOWN_PER_SHARD = 20
_RUN_COUNTS = ("checkpoints", "exported", "aside")


@dataclass(frozen=True)
class PathReport:
    """What was checked and what is wrong.

    Attributes:
        path: the store, folder of shards, or run.
        kind: "store", "shards" or "run".
        checked: what was looked at, for people.
        problems: all that was found; empty means all is well.
        repairs: what was done about it and what to run next, in lines.
        sound: whether nothing is wrong (any more).
        odd: images of a deep check that every decoder reads, but not as plain RGB: how many of each kind.
        digest: a store's digest over vocabulary and words, where asked for.
        arithmetic: by which the words of a store's layers are made, by layer.
        descent: how each run, or the words of each layer, came about, by name (`bowstore.runs.descent`).
    """

    path: Path
    kind: str
    checked: str
    problems: list[Problem] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    sound: bool = True
    odd: dict[str, int] = field(default_factory=dict)
    digest: str | None = None
    arithmetic: dict[str, dict[str, str]] = field(default_factory=dict)
    descent: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """Lines for people: the problems, or that there are none; what was done about them; a digest last."""
        lines = [f"{self.path}: {self.checked}"]
        lines += [f"lineage: {' -> '.join(steps)}" for steps in self.descent.values()]
        lines += _shown(self.problems)
        if self.odd:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.odd.items()))
            lines.append(f"not plain RGB, though every decoder reads them: {kinds}")
        lines += self.repairs if self.problems else ["no problem found"]
        if self.digest:
            lines.append(self.digest)
        return "\n".join(lines)


def _shown(problems: list[Problem]) -> Iterator[str]:
    """The first lines of each shard, with the number of the others."""
    count: Counter[str | None] = Counter()
    for problem in problems:
        count[problem.shard] += 1
        if problem.shard is None or count[problem.shard] <= _SHOWN_PER_SHARD:
            yield problem.message
    for shard, number in count.items():
        if shard is not None and number > _SHOWN_PER_SHARD:
            yield f"shard {shard}: {number - _SHOWN_PER_SHARD} problems more; --json lists all"


def verify_path(
    path: Path,
    *,
    shards: SomePaths | None = None,
    reencoded: bool = False,
    digest: bool = False,
    deep: bool = False,
    repair: bool = False,
    workers: int | None = None,
    storage: StorageConfig | None = None,
) -> PathReport:
    """Check a store, a folder of shards or a run (or a folder of shards' or runs' folders).

    Of remote stores and shards, copies of all their files are checked.

    Args:
        path: what to check.
        shards: with a store: also join its keys with the shards of this folder, or of several, and compare the images.
        reencoded: with shards: they hold other encodings of the store's images, which are not compared.
        digest: with a store: report its digest.
        deep: with shards: decode every image. A store is always read as a whole.
        repair: with a store: take damaged chunks back, so that encoding writes them anew; with shards see
            `bowstore.data.verify.verify_folder`.
        workers: processes for local shards; None for up to one a core.
        storage: where copies of remote shards and stores lie.

    Raises:
        MissingError: nothing there, or neither a store, shards nor a run.
        UsageError: an option that goes with a store only, or not with a run.
    """
    storage = storage or StorageConfig()
    store = path if not is_remote(path) else _remote_store(path, storage, repair=repair)
    if store and (store / "zarr.json").exists():
        return _verify_store(store, shards, storage, reencoded=reencoded, digest=digest, repair=repair)
    if shards or digest:
        raise UsageError(f"--shards and --digest go with a word store, and {path} is none")
    if is_remote(path):
        return _verify_shards(path, [verify_remote(path, storage, deep=deep, repair=repair)], deep=deep)
    below = sorted(folder for folder in path.glob("*") if folder.is_dir() and not is_system(folder.name))
    folders = [folder for folder in (path, *below) if folder.is_dir() and is_shards_folder(folder)]
    if not folders:
        return _verify_runs(path, below, repair=repair)
    reports = [verify_folder(folder, deep=deep, repair=repair, workers=workers) for folder in folders]
    return _verify_shards(path, reports, deep=deep)


def _remote_store(path: Path, storage: StorageConfig, *, repair: bool) -> Path | None:
    """The copy of a remote word store; None where none is there."""
    if not RemoteFolder(path, storage).exists("zarr.json"):
        return None
    if repair:
        raise UsageError(f"{url_of(path)} is on another machine; run `bowstore verify --repair` where it lies")
    return fetch_store(path, storage)


def _verify_store(
    path: Path, shards: SomePaths | None, storage: StorageConfig, *, reencoded: bool, digest: bool, repair: bool
) -> PathReport:
    from bowstore.words.store import verify  # Zarr, for a store alone
    from bowstore.words.store.layer import in_words
    from bowstore.words.store.store import REMEDY

    report = verify.verify(path, shards, storage, reencoded=reencoded)
    layers = [f"{name} ({in_words(way)})" for name, way in report.arithmetic.items()]
    checked = f"{report.images} images, {report.chunks} chunks, layers {', '.join(layers) or 'none'}"
    problems = [Problem(message, "store") for message in report.problems]
    repairs = []
    if repair and report.damaged:
        try:
            count = verify.discard_damaged(path, report)
        except OSError as error:
            if isinstance(error, BowstoreError):
                raise
            problems.append(Problem(f"nothing was taken back: {path} cannot be written ({error.strerror})", "store"))
        else:
            what = f"{count} damaged chunks were" if count else "what is counted over all words was"
            repairs.append(f"{what} taken back; {REMEDY}, to write just that")
    words_digest = verify.digest(path) if digest and report.sound else None
    return PathReport(
        path,
        "store",
        checked,
        problems,
        repairs,
        not problems,
        digest=words_digest,
        arithmetic=report.arithmetic,
        descent=report.descent,
    )


def _verify_runs(path: Path, below: list[Path], *, repair: bool) -> PathReport:
    from bowstore.train.verify import verify_run  # PyTorch, for a run alone

    runs = [path] if is_network(path) else [folder for folder in (path, *below) if is_run(folder)]
    if not runs:
        raise MissingError(
            f"{path} is neither a word store nor a folder of indexed shards, nor a run; if it holds shards, run "
            f"`bowstore index` first"
        )
    if repair:
        raise UsageError(
            f"--repair goes with a word store or shards, not with run {path}: `bowstore train` passes over a damaged "
            f"checkpoint by itself, and writes a damaged export anew once you have moved it away"
        )
    found = [verify_run(run) for run in runs]
    for run in found:
        for result in all_result_paths(run.path):
            with run.noting():
                read_result(result)
    checkpoints, exported, aside = (sum(getattr(run, name) for run in found) for name in _RUN_COUNTS)
    checked = f"{checkpoints} checkpoints and {exported} exported networks" + (
        f" of {len(runs)} runs" if len(runs) > 1 else ""
    )
    return PathReport(
        path,
        "run",
        checked + (f"; {aside} checkpoints set aside earlier" if aside else ""),
        problems=[Problem(message, "run") for run in found for message in run.problems],
        sound=not any(run.problems for run in found),
        descent={run.path.name: run.descent for run in found if run.descent},
    )


def _verify_shards(path: Path, reports: list[FolderReport], *, deep: bool) -> PathReport:
    images, shards = (sum(getattr(report, name) for report in reports) for name in ("images", "shards"))
    odd: Counter[str] = sum((report.odd for report in reports), Counter())
    return PathReport(
        path,
        "shards",
        f"{images} images in {shards} shards" + (", every image decoded" if deep else ""),
        problems=[problem for report in reports for problem in report.problems],
        repairs=[line for report in reports for line in report.repairs],
        sound=not any(report.left for report in reports),
        odd=dict(odd),
    )
