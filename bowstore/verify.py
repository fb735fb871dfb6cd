"""`bowstore verify`: does what lies on disk match what was recorded when it was written?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bowstore.errors import BowstoreError, MissingError, UsageError


@dataclass(frozen=True)
class PathReport:
    """What was checked and what is wrong.

    Attributes:
        path: the store or folder of shards.
        kind: "store" or "shards".
        checked: what was looked at, for people.
        problems: one line each; empty means all is well.
        digest: a store's digest over vocabulary and words, where asked for.
    """

    path: Path
    kind: str
    checked: str
    problems: list[str] = field(default_factory=list)
    digest: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "checked": self.checked,
            "problems": self.problems,
            "digest": self.digest,
        }

    def text(self) -> str:
        """Lines for people: the problems, or that there are none; a digest last."""
        lines = [f"{self.path}: {self.checked}"]
        lines += self.problems or ["no problem found"]
        if self.digest:
            lines.append(self.digest)
        return "\n".join(lines)


def verify_path(path: Path, *, shards: Path | None = None, digest: bool = False, repair: bool = False) -> PathReport:
    """Check a store or a folder of shards (or a folder of such folders).

    Args:
        path: what to check.
        shards: with a store: also join its keys with these shards.
        digest: with a store: report its digest.
        repair: with a store: take damaged chunks back, so that encoding writes them anew.

    Raises:
        MissingError: nothing there, or neither a store nor shards.
    """
    if (path / "zarr.json").exists():
        return _verify_store(path, shards, digest=digest, repair=repair)
    if shards or digest or repair:
        raise UsageError(f"--shards, --digest and --repair go with a word store, and {path} is none")
    from bowstore.data.index import INDEX_FILE

    folders = [path] if (path / INDEX_FILE).exists() else sorted(p.parent for p in path.glob(f"*/{INDEX_FILE}"))
    if not folders:
        raise MissingError(f"{path} is neither a word store nor a folder of indexed shards; run `bowstore index` first")
    return _verify_shards(path, folders)


def _verify_store(path: Path, shards: Path | None, *, digest: bool, repair: bool) -> PathReport:
    from bowstore.words import verify

    report = verify.verify(path, shards)
    checked = f"{report.images} images, {report.chunks} chunks, layers {', '.join(report.layers) or 'none'}"
    if repair and report.damaged:
        count = verify.discard_damaged(path, report)
        report.problems.append(
            f"{count} damaged chunks were taken back; run `bowstore encode` again to write just these"
        )
    words_digest = verify.digest(path) if digest and report.sound else None
    return PathReport(path, "store", checked, report.problems, words_digest)


def _verify_shards(path: Path, folders: list[Path]) -> PathReport:
    from bowstore.data.index import check_digests, open_index

    problems: list[str] = []
    images = shards = 0
    for folder in folders:
        try:
            index = open_index(folder)
        except BowstoreError as error:
            problems.append(str(error))
            continue
        images, shards = images + len(index), shards + len(index.shards)
        problems += check_digests(index)
    return PathReport(path, "shards", f"{images} images in {shards} shards", problems)
