"""A power cut after any call: what would be lost of files that count as written.

`watch` records fsync, rename, link and mkdir, as strace would. A name is safe once its folder is fsynced behind it, a
content once the file is; a file that gets a final name before its content is safe would come back empty.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from bowstore.files import temporary_stem

Inode = tuple[int, int]


class Disk:
    """What is safe so far.

    Attributes:
        calls: "fsync PATH", "rename PATH" (the new name), in order.
        early: files that got a name before their content was safe.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.early: list[str] = []
        self._safe: dict[Inode, str] = {}
        self._owed: dict[Inode, set[str]] = defaultdict(set)

    def lost(self, root: Path) -> list[str]:
        """Files below a folder whose content or name a power cut would take now."""
        found = [f"{path}: content" for path in sorted(root.rglob("*")) if path.is_file() and not self._is_safe(path)]
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        return found + [f"{path}/{name}: name" for path in folders for name in sorted(self._owed[inode(path)])
                        if (path / name).exists()]  # fmt: skip

    def names(self, call: str) -> list[str]:
        """File names of one kind of call, in order."""
        return [Path(line.split(" ", 1)[1]).name for line in self.calls if line.startswith(f"{call} ")]

    def _is_safe(self, path: Path) -> bool:
        return self._safe.get(inode(path)) == content(path)

    def fsynced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.calls.append(f"fsync {path}")
        if path.is_dir():
            self._owed[inode(path)].clear()
        else:
            self._safe[inode(path)] = content(path)

    def renamed(self, source: Path, target: Path) -> None:
        if temporary_stem(target):
            return  # one that counts as nothing yet
        files = [source, *source.rglob("*")] if source.is_dir() else [source]
        self.early += [f"{target}: {path.name}" for path in files if path.is_file() and not self._is_safe(path)]
        self.early += [f"{target}: {name}" for path in files if path.is_dir() for name in self._owed[inode(path)]]
        self.calls.append(f"rename {target}")

    def named(self, target: Path) -> None:
        self._owed[inode(target.parent)].add(target.name)


def inode(path: Path) -> Inode:
    found = path.stat()
    return found.st_dev, found.st_ino


def content(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


@contextmanager
def watch() -> Iterator[Disk]:
    """Record what becomes safe during the block."""
    disk = Disk()
    plain = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir", "link")}

    def fsync(file: Any) -> None:
        plain["fsync"](file)
        disk.fsynced(file if isinstance(file, int) else file.fileno())

    def moving(name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **rest: Any) -> None:
            disk.renamed(Path(source), Path(target))
            plain[name](source, target, **rest)
            disk.named(Path(target))

        return move

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        plain["mkdir"](path, *rest, **more)
        disk.named(Path(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", moving("replace"))
        patch.setattr(os, "rename", moving("rename"))
        patch.setattr(os, "mkdir", mkdir)
        yield disk
