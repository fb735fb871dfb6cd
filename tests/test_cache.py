"""The cache removes what it wrote, and nothing else: it may lie in a folder that people use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from left_behind import age, left_behind

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, DataError, UsageError
from bowstore.files import file_digest
from bowstore.remote import RemoteFolder, Wanted, cache

PRECIOUS = b"p" * 5000
COPY_BYTES = 10_000


@pytest.fixture
def there(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    for name in ("a.tar", "b.tar", "c.tar"):
        (folder / name).write_bytes(np.random.default_rng(ord(name[0])).bytes(COPY_BYTES))
    return folder


def settings(tmp_path: Path, *, copies: float = 1.5) -> StorageConfig:
    return StorageConfig(cache=tmp_path / "home", cache_gb=copies * COPY_BYTES / 1e9, retries=0)


def fetch(there: Path, name: str, storage: StorageConfig) -> Path:
    path = there / name
    return RemoteFolder(f"file://{there}", storage).fetch(name, Wanted(COPY_BYTES, file_digest(path)))


def test_files_that_the_cache_did_not_write_stay(there: Path, tmp_path: Path) -> None:
    storage, home = settings(tmp_path), tmp_path / "home"
    copy = fetch(there, "a.tar", storage)
    mine = [
        home / "words" / "thesis.docx",
        home / "words" / f"{32 * 'a'}.u16",
        home / "words" / ".draft.tmp-1234",
        home / "remote" / "photos" / "beach.jpg",
        home / "remote" / "photos" / "old.zarr" / "zarr.json",
        home / "remote" / "photos" / ".old.zarr.part" / "zarr.json",
        copy.with_name("notes.txt"),
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PRECIOUS)
    # Neither does a file beside it that has the name of a record make it the cache's.
    (home / "remote" / "photos" / ".beach.jpg.json").write_text('{"size_bytes": 5000, "camera": "x"}')
    (home / "remote" / "photos" / ".old.zarr.json").write_text('["no", "record"]')
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "dog.jpg").write_bytes(PRECIOUS)
    (home / "remote" / "album").symlink_to(tmp_path / "album")
    fetch(there, "b.tar", storage)
    assert not copy.exists()
    assert [path for path in mine if path.read_bytes() != PRECIOUS] == []
    assert (tmp_path / "album" / "dog.jpg").exists()


def test_a_copy_that_somebody_wrote_to_is_not_removed(there: Path, tmp_path: Path) -> None:
    storage = settings(tmp_path, copies=2.5)
    copy = fetch(there, "a.tar", storage)
    copy.write_bytes(PRECIOUS)
    fetch(there, "b.tar", storage)
    fetch(there, "c.tar", storage)
    cache.reserve(2 * COPY_BYTES, "x", storage)
    assert copy.read_bytes() == PRECIOUS
    assert sorted(path.name for path in copy.parent.glob("*.tar")) == ["a.tar"]


def test_a_link_in_the_place_of_a_copy_is_not_removed(there: Path, tmp_path: Path) -> None:
    storage = settings(tmp_path)
    copy = fetch(there, "a.tar", storage)
    moved = copy.rename(tmp_path / "a.tar")
    copy.symlink_to(moved)
    fetch(there, "b.tar", storage)
    assert copy.is_symlink()
    assert moved.exists()


def test_what_is_not_the_cache_s_does_not_count(there: Path, tmp_path: Path) -> None:
    storage = settings(tmp_path)
    big = tmp_path / "home" / "words" / "thesis.docx"
    big.parent.mkdir(parents=True)
    big.write_bytes(bytes(10 * COPY_BYTES))
    assert fetch(there, "a.tar", storage).exists()
    with pytest.raises(UsageError, match=r"has 0\.02 MB, and the cache .* may hold"):
        cache.reserve(2 * COPY_BYTES, "x", storage)


def test_a_file_where_a_copy_goes_is_not_replaced(there: Path, tmp_path: Path) -> None:
    storage = settings(tmp_path)
    place = RemoteFolder(f"file://{there}", storage).folder / "a.tar"
    place.parent.mkdir(parents=True)
    place.write_bytes(PRECIOUS)
    message = r"a\.tar lies where the copy of a remote file goes, and bowstore did not write it; move it away, or name"
    for known in (Wanted(COPY_BYTES, file_digest(there / "a.tar")), None):
        with pytest.raises(DataError, match=message):
            RemoteFolder(f"file://{there}", storage).fetch("a.tar", known)
    assert place.read_bytes() == PRECIOUS


def test_a_store_s_copy_that_holds_something_else_stays(tmp_path: Path) -> None:
    storage = settings(tmp_path)
    folder = tmp_path / "home" / "remote" / "x"
    for name in ("0123.zarr", "4567.zarr"):
        copy = folder / name
        (copy / "conv4").mkdir(parents=True)
        for file in ("zarr.json", "conv4/zarr.json"):
            (copy / file).write_bytes(bytes(COPY_BYTES // 2))
        cache.write_record(copy)
    (folder / "0123.zarr" / "conv4" / "notes.txt").write_bytes(PRECIOUS)
    cache.reserve(COPY_BYTES, "x", storage)
    assert (folder / "0123.zarr" / "conv4" / "notes.txt").read_bytes() == PRECIOUS
    assert not (folder / "4567.zarr").exists()
    assert not (folder / ".4567.zarr.json").exists()
    assert (folder / "0123.zarr" / "zarr.json").exists()


def test_a_link_in_the_place_of_a_store_s_copy_is_not_removed(tmp_path: Path) -> None:
    storage, folder = settings(tmp_path, copies=0.5), tmp_path / "home" / "remote" / "x"
    moved = tmp_path / "elsewhere"
    for place in (moved, folder):
        place.mkdir(parents=True)
    (moved / "zarr.json").write_bytes(bytes(COPY_BYTES))
    (folder / "0123.zarr").symlink_to(moved)
    cache.write_record(folder / "0123.zarr", of=moved)
    assert not list(cache._copies(tmp_path / "home"))
    cache.reserve(COPY_BYTES // 2, "x", storage)
    assert (folder / "0123.zarr").is_symlink()
    assert (moved / "zarr.json").exists()


def test_the_part_of_a_copy_is_removed_only_if_it_is_the_cache_s(tmp_path: Path) -> None:
    storage, folder = settings(tmp_path, copies=0.8), tmp_path / "home" / "remote" / "x"
    for name in ("0123.zarr", "4567.zarr"):
        part = folder / f".{name}.part"
        (part / "conv4").mkdir(parents=True)
        (part / "conv4" / "c").write_bytes(bytes(COPY_BYTES // 2))
    cache.lock_file(folder / "4567.zarr").touch()  # nobody else puts one there
    cache.reserve(COPY_BYTES // 2, "x", storage)
    assert (folder / ".0123.zarr.part" / "conv4" / "c").exists()
    assert not (folder / ".4567.zarr.part").exists()


def test_a_copy_has_its_record_from_the_first_moment(there: Path, tmp_path: Path) -> None:
    """A process that dies between the two must not leave a copy that nobody may remove."""
    code = """
import os, sys
from pathlib import Path
from bowstore.config import StorageConfig
from bowstore.remote import RemoteFolder, Wanted, folder
folder.fsync_path = lambda path: os._exit(9)  # just after the copy has got its name
there, home, digest = sys.argv[1:]
RemoteFolder(f"file://{there}", StorageConfig(cache=Path(home))).fetch("a.tar", Wanted(10_000, digest))
"""
    digest = file_digest(there / "a.tar")
    process = subprocess.run([sys.executable, "-c", code, there, tmp_path / "home", digest], check=False)
    assert process.returncode == 9
    (copy,) = (tmp_path / "home" / "remote").glob("*/a.tar")
    assert cache.is_as_recorded(copy)
    assert json.loads(cache.record_file(copy).read_text())["digest"] == digest
    fetch(there, "b.tar", settings(tmp_path))
    assert not copy.exists()


def test_what_another_machine_brings_is_left_to_it(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = settings(tmp_path)
    folder = RemoteFolder(f"file://{there}", storage).folder
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("bowstore.files._machine", lambda: "0123abcd")
        theirs, silent = left_behind(folder / "a.tar", b"theirs"), left_behind(folder / "b.tar", bytes(COPY_BYTES))
    age(silent, 8 * 24 * 3600)
    fetch(there, "a.tar", storage)
    assert theirs.read_bytes() == b"theirs"
    assert not silent.exists()


def test_a_link_under_the_name_of_a_part_is_not_written_through(there: Path, tmp_path: Path) -> None:
    storage, thesis = settings(tmp_path), tmp_path / "thesis.docx"
    thesis.write_bytes(PRECIOUS)
    folder = RemoteFolder(f"file://{there}", storage).folder
    folder.mkdir(parents=True)
    cache.part_of(folder / "a.tar").symlink_to(thesis)
    with pytest.raises(BowstoreError, match=r"is a link, and bowstore writes there"):
        fetch(there, "a.tar", storage)
    os.link(thesis, cache.part_of(folder / "b.tar"))
    with pytest.raises(BowstoreError, match=r"is a file with 2 names, and bowstore writes there"):
        fetch(there, "b.tar", storage)
    assert thesis.read_bytes() == PRECIOUS


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BOWSTORE_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(UsageError, match=r"no home directory; name a folder in storage\.cache or BOWSTORE_CACHE, or"):
        cache.cache_root(StorageConfig())
