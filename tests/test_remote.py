"""Copies of remote files: whole, checked, fetched once, and never more of them than the cache may hold."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from left_behind import left_behind
from servers import Fault, FolderServer, serve

from bowstore.config import StorageConfig
from bowstore.errors import (
    BowstoreError,
    CorruptError,
    DataError,
    MismatchError,
    MissingError,
    TransferError,
    UsageError,
)
from bowstore.files import exclusive_lock, file_digest
from bowstore.remote import RemoteFolder, Wanted, cache, hold, is_remote, transfer, tries, url_of
from bowstore.remote.transfer import Remote

BLOCK = 4096
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.001)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    (tmp_path / "there").mkdir()
    with serve(tmp_path / "there") as server:
        yield server


def storage(tmp_path: Path, **values: object) -> StorageConfig:
    return StorageConfig(cache=tmp_path / "cache", timeout_s=0.3, **{"retries": 3, **values})


def put(server: FolderServer, name: str, size_bytes: int = 5 * BLOCK + 100) -> bytes:
    data = RANDOM.integers(0, 256, size_bytes, dtype=np.uint8).tobytes()
    (server.root / name).write_bytes(data)
    return data


def digest(server: FolderServer, name: str) -> str:
    return file_digest(server.root / name)


def fetch(folder: RemoteFolder, server: FolderServer, name: str) -> Path:
    path = server.root / name
    return folder.fetch(name, Wanted(path.stat().st_size, file_digest(path)))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/train", "s3://bucket/train"),
        ("http://host:8080/a/b/", "http://host:8080/a/b"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("file:///tmp/x", "file:///tmp/x"),
        ("memory://x", "memory://x"),
    ],
)
def test_remote_url_survives_a_path(text: str, url: str) -> None:
    assert is_remote(text)
    assert is_remote(Path(text))
    assert url_of(Path(text)) == url_of(text) == url


@pytest.mark.parametrize("text", ["data/shards", "/data/shards", "./a:b/c", "c:/x", "a:b"])
def test_remote_local_paths_are_local(text: str) -> None:
    assert not is_remote(Path(text))


def test_remote_file_is_fetched_once_and_whole(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar")
    folder = RemoteFolder(server.url, storage(tmp_path))
    path = fetch(folder, server, "a.tar")
    assert path.read_bytes() == data
    assert path.name == "a.tar"
    assert path.is_relative_to(tmp_path / "cache")
    requests = len(server.gets)
    assert requests == 1
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar") == path
    assert len(server.gets) == requests


FAULTS = {
    "dropped": Fault(drop_at=1000),
    "dropped at once": Fault(drop_at=0),
    "503": Fault(status=503),
    "429": Fault(status=429),
    "length too large": Fault(claim=50),
    "stalled": Fault(stall_at=10, stall_s=0.6),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("ranges", [True, False])
def test_remote_transfer_survives(server: FolderServer, tmp_path: Path, fault: Fault, ranges: bool) -> None:
    data, server.ranges = put(server, "a.tar"), ranges
    server.faults["a.tar"] = [fault, Fault(), fault, fault]
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar").read_bytes() == data


@pytest.mark.parametrize(("ranges", "sized"), [(True, True), (False, True), (False, False), (True, False)])
def test_remote_no_more_than_a_block_is_held_in_memory(
    server: FolderServer, tmp_path: Path, ranges: bool, sized: bool
) -> None:
    server.ranges, server.sized = ranges, sized
    data = put(server, "index", 300 * BLOCK + 1)
    remote, blocks = Remote(server.url, storage(tmp_path)), list[bytes]()
    with closing(remote._open(f"{server.url}/index", BLOCK + 1)) as source:
        while block := source.read(transfer.BLOCK_BYTES):
            blocks.append(block)
    assert b"".join(blocks) == data[BLOCK + 1 :]
    assert max(map(len, blocks)) <= BLOCK
    assert server.count("index") == 1


def test_remote_file_without_a_length_arrives_whole(server: FolderServer, tmp_path: Path) -> None:
    server.sized = False
    for name, size_bytes in (("whole", 3 * BLOCK), ("rest", 3 * BLOCK + 5), ("empty", 0)):
        data = put(server, name, size_bytes)
        assert RemoteFolder(server.url, storage(tmp_path)).fetch(name).read_bytes() == data


def test_remote_server_without_ranges_goes_on_behind_what_is_here(server: FolderServer, tmp_path: Path) -> None:
    data, server.ranges = put(server, "a.tar", 2 << 20), False
    server.faults["a.tar"] = [Fault(drop_at=1 << 20)]
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar").read_bytes() == data
    assert server.gets[0][1] is None
    assert server.gets[1][1] is not None


@pytest.mark.parametrize("sized", [True, False])
def test_remote_file_longer_than_recorded_is_refused(server: FolderServer, tmp_path: Path, sized: bool) -> None:
    put(server, "a.tar", 3 * BLOCK)
    server.ranges, server.sized = False, sized
    with pytest.raises(MismatchError, match=rf"a\.tar has {3 * BLOCK} bytes, {2 * BLOCK} were recorded"):
        RemoteFolder(server.url, storage(tmp_path)).fetch("a.tar", Wanted(2 * BLOCK, "0" * 32))


@pytest.mark.parametrize("url", ["ftp://host/shards", "sftp://host/x", "github://a/b", "zip://x"])
def test_remote_protocols_that_want_more_than_a_url_are_told(tmp_path: Path, url: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^{url.partition(':')[0]}(:// cannot be used \(.*\); copy the folder| needs)"
    ):
        RemoteFolder(url, storage(tmp_path))


def test_remote_transfer_may_fail_often_as_long_as_it_gets_on(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar", 6 << 20)
    server.faults["a.tar"] = [
        Fault(status=503),
        Fault(drop_at=1 << 20),
    ] * 5  # more than three in all
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar").read_bytes() == data


def test_remote_server_that_forgets_about_ranges(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar")
    server.faults["a.tar"] = [Fault(drop_at=1000), Fault(drop_at=1000), Fault(whole=True)]
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar").read_bytes() == data
    assert server.count("a.tar") == 3


def test_remote_transfer_goes_on_where_it_broke_off(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar", 4 << 20)
    server.faults["a.tar"] = [Fault(drop_at=1 << 20), Fault(drop_at=0), Fault(drop_at=1 << 20)]
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar").read_bytes() == data
    first, *starts = [int((wanted or "bytes=0-")[6:-1]) for _, wanted in server.gets]
    assert first == 0
    assert 0 < starts[0] == starts[1] <= 1 << 20  # aiohttp forgets what it has not handed over, which is little
    assert starts[1] < starts[2] <= starts[1] + (1 << 20)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault(status=503), TransferError, r"a\.tar: the server answers 503 \(4 tries\); try again later"),
        (Fault(status=403), TransferError, r"a\.tar may not be read \(403, 1 try\); check the credentials"),
        (Fault(status=404), MissingError, r"a\.tar is not there \(404\); check the URL"),
        (Fault(drop_at=0), TransferError, r"a\.tar: the transfer broke off \(.*; 4 tries\); run the command again"),
        (
            Fault(stall_at=0, stall_s=0.5),
            TransferError,
            r"a\.tar: no byte for 0\.3 s \(4 tries\); .*timeout_s",
        ),
        (Fault(cut=0), MismatchError, r"a\.tar has 0 bytes, 20580 were recorded: it changed, or was not copied whole"),
        (Fault(flip=3), CorruptError, r"a\.tar is not the file that was recorded: other bytes, twice; copy it there"),
    ],
)
def test_remote_failures_have_their_own_messages(
    server: FolderServer, tmp_path: Path, fault: Fault, error: type[BowstoreError], message: str
) -> None:
    put(server, "a.tar")
    server.always["a.tar"] = fault
    folder = RemoteFolder(server.url, storage(tmp_path))
    with pytest.raises(error, match=message) as caught:
        fetch(folder, server, "a.tar")
    assert str(caught.value).startswith(f"{server.url}/a.tar")
    assert "\n" not in str(caught.value)
    assert not (folder.folder / "a.tar").exists()


def test_remote_file_of_another_length_is_refused(server: FolderServer, tmp_path: Path) -> None:
    put(server, "a.tar", 5000)
    for size_bytes in (5001, 4 * BLOCK):
        with pytest.raises(MismatchError, match=rf"a\.tar has 5000 bytes, {size_bytes} were recorded: it changed"):
            RemoteFolder(server.url, storage(tmp_path)).fetch("a.tar", Wanted(size_bytes, "0" * 32))


def test_remote_file_shorter_than_what_is_here_is_refused(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar", 2 * BLOCK)
    folder = RemoteFolder(server.url, storage(tmp_path))
    folder.folder.mkdir(parents=True)
    cache.part_of(folder.folder / "a.tar").write_bytes(bytes(3 * BLOCK))
    with pytest.raises(MismatchError, match=rf"a\.tar has {2 * BLOCK} bytes, {4 * BLOCK} were recorded"):
        folder.fetch("a.tar", Wanted(4 * BLOCK, "0" * 32))
    assert fetch(folder, server, "a.tar").read_bytes() == data


def test_remote_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"no connection \(.*; 4 tries\); check the address and the network"):
        RemoteFolder("http://127.0.0.1:9/x", storage(tmp_path)).fetch("a.tar", Wanted(1, "0" * 32))
    with pytest.raises(TransferError, match=r"no connection"):
        RemoteFolder("http://127.0.0.1:9/x", storage(tmp_path)).fetch("index.safetensors")


def test_remote_damage_on_the_way_is_read_again(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar")
    server.faults["a.tar"] = [Fault(flip=100)]
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar").read_bytes() == data
    assert server.count("a.tar") == 2


def test_remote_waits_grow_and_have_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.5)
    waits: list[float] = []
    remote = Remote("memory://x", storage(tmp_path, retries=9))
    monkeypatch.setattr(remote._stop, "wait", lambda seconds: waits.append(seconds))
    monkeypatch.setattr(remote._fs, "cat_file", lambda url: (_ for _ in ()).throw(ConnectionResetError("gone")))
    with pytest.raises(TransferError, match="10 tries"):
        remote.read("a")
    assert len(waits) == 9
    assert all(
        0.5 * bound <= wait <= bound for wait, bound in zip(waits, [0.5, 1, 2, 4, 8, 16, 30, 30, 30], strict=True)
    )


def test_remote_copy_that_changed_is_fetched_again(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar")
    folder = RemoteFolder(server.url, storage(tmp_path))
    path = fetch(folder, server, "a.tar")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fetch(folder, server, "a.tar").read_bytes() == data
    path.write_bytes(data[:-1])
    assert fetch(folder, server, "a.tar").read_bytes() == data


def test_remote_shard_of_the_same_name_and_size_is_not_mixed_up(server: FolderServer, tmp_path: Path) -> None:
    put(server, "a.tar")
    folder = RemoteFolder(server.url, storage(tmp_path))
    fetch(folder, server, "a.tar")
    data = put(server, "a.tar")
    assert fetch(folder, server, "a.tar").read_bytes() == data


@pytest.mark.parametrize("dated", [True, False])
def test_remote_index_is_asked_for_again(server: FolderServer, tmp_path: Path, dated: bool) -> None:
    server.dated = dated
    first = put(server, "index")
    folder = RemoteFolder(server.url, storage(tmp_path))
    assert folder.fetch("index").read_bytes() == first
    assert folder.fetch("index").read_bytes() == first
    assert server.count("index") == (1 if dated else 2)  # without a date nobody can know
    second = put(server, "index")
    os.utime(server.root / "index", ns=(1, 1))
    assert folder.fetch("index").read_bytes() == second


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "/etc/passwd"])
def test_remote_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no plain file name"):
        RemoteFolder("memory://x", storage(tmp_path)).fetch(name, Wanted(1, "0" * 32))


def test_remote_names_are_quoted(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a#b %41?.tar")
    assert fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a#b %41?.tar").read_bytes() == data


def test_remote_messages_keep_secrets(tmp_path: Path) -> None:
    url = "http://user:password@127.0.0.1:9/x?signature=secret"
    with pytest.raises(TransferError, match=r"^http://127\.0\.0\.1:9/x/index: no connection") as caught:
        RemoteFolder(url, storage(tmp_path, retries=0)).fetch("index")
    assert "password" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_remote_signature_stays_behind_the_name(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "index")
    assert RemoteFolder(f"{server.url}?signature=s", storage(tmp_path)).fetch("index").read_bytes() == data


def test_remote_protocol_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"^gs needs gcsfs; pip install 'bowstore\[remote\]'$"):
        RemoteFolder("gs://bucket/x", storage(tmp_path))
    with pytest.raises(UsageError, match=r"^teapot:// cannot be used \(Protocol not known: teapot\); copy"):
        RemoteFolder("teapot://bucket/x", storage(tmp_path))


CHILD = """
import sys
from pathlib import Path
from bowstore.config import StorageConfig
from bowstore.remote import RemoteFolder, Wanted, transfer
transfer.BLOCK_BYTES = 4096
url, cache, size, digest = sys.argv[1:]
print(RemoteFolder(url, StorageConfig(cache=Path(cache))).fetch("a.tar", Wanted(int(size), digest)))
"""


def child(server: FolderServer, tmp_path: Path) -> "subprocess.Popen[str]":
    path = server.root / "a.tar"
    arguments = [server.url, str(tmp_path / "cache"), str(path.stat().st_size), file_digest(path)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def test_remote_file_is_fetched_by_one_process_of_two(server: FolderServer, tmp_path: Path) -> None:
    put(server, "a.tar")
    server.faults["a.tar"] = [Fault(stall_at=10, stall_s=1.0)]  # the other comes meanwhile
    children = [child(server, tmp_path) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0] for process in children}
    assert [process.returncode for process in children] == [0, 0]
    assert len(paths) == 1
    assert server.count("a.tar") == 1


def test_remote_transfer_goes_on_after_kill(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar", 20 * BLOCK)
    server.faults["a.tar"] = [Fault(stall_at=10 * BLOCK, stall_s=20)]
    process = child(server, tmp_path)
    part = RemoteFolder(server.url, storage(tmp_path)).folder / ".a.tar.part"
    while not part.exists() or part.stat().st_size < 10 * BLOCK:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    path = fetch(RemoteFolder(server.url, storage(tmp_path)), server, "a.tar")
    assert path.read_bytes() == data
    assert server.gets[1] == ("a.tar", f"bytes={10 * BLOCK}-")
    assert sorted(p.name for p in path.parent.iterdir()) == [".a.tar.json", ".a.tar.lock", "a.tar"]


def test_remote_leftover_of_another_file_is_no_harm(server: FolderServer, tmp_path: Path) -> None:
    data = put(server, "a.tar")
    folder = RemoteFolder(server.url, storage(tmp_path))
    folder.folder.mkdir(parents=True)
    for size_bytes in (BLOCK, 9 * BLOCK):
        (folder.folder / ".a.tar.part").write_bytes(bytes(size_bytes))
        assert fetch(folder, server, "a.tar").read_bytes() == data
        assert not (folder.folder / ".a.tar.part").exists()
        (folder.folder / "a.tar").unlink()


def test_remote_cache_keeps_its_bound(server: FolderServer, tmp_path: Path) -> None:
    names = [f"{letter}.tar" for letter in "abcd"]
    for name in names:
        put(server, name, 10_000)
    folder = RemoteFolder(server.url, storage(tmp_path, cache_gb=31_000 / 1e9))  # three, and what is written of them

    def there() -> set[str]:
        return {path.name for path in folder.folder.glob("*.tar")}

    for name in names[:3]:
        fetch(folder, server, name)
    fetch(folder, server, "a.tar")  # used again: b has waited longest now
    fetch(folder, server, "d.tar")
    assert there() == {"a.tar", "c.tar", "d.tar"}
    with open(folder.folder / "c.tar", "rb") as file:
        hold(file.fileno())
        fetch(folder, server, "b.tar")
        assert there() == {"b.tar", "c.tar", "d.tar"}
    fetch(folder, server, "a.tar")
    assert there() == {"a.tar", "b.tar", "d.tar"}


def test_remote_cache_in_use_is_refused(server: FolderServer, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        put(server, name, 10_000)
    folder = RemoteFolder(server.url, storage(tmp_path, cache_gb=15_000 / 1e9))
    with open(fetch(folder, server, "a.tar"), "rb") as file:
        hold(file.fileno())
        with pytest.raises(
            BowstoreError, match=r"b\.tar needs 0\.01 MB, and 0\.01 MB of the .* GB .* are in use; wait"
        ):
            fetch(folder, server, "b.tar")


def test_remote_file_larger_than_the_cache_is_refused(server: FolderServer, tmp_path: Path) -> None:
    put(server, "a.tar", 2_000_000)
    folder = RemoteFolder(server.url, storage(tmp_path, cache_gb=0.001))
    with pytest.raises(UsageError, match=r"a\.tar has 2\.00 MB, and the cache .* may hold 0\.001 GB; raise storage"):
        fetch(folder, server, "a.tar")
    assert not server.gets


def test_remote_file_larger_than_the_disk_is_refused(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tar", "b.tar"):
        put(server, name, 10_000)
    folder = RemoteFolder(server.url, storage(tmp_path))
    fetch(folder, server, "a.tar")
    full = iter([1000, 1000, 1000, 11_000])  # what is free before and after making room, twice
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=next(full)))
    with open(folder.folder / "a.tar", "rb") as file:
        hold(file.fileno())
        with pytest.raises(BowstoreError, match=r"b\.tar needs 0\.01 MB, and the disk of .* has 0\.00 MB free"):
            fetch(folder, server, "b.tar")
    fetch(folder, server, "b.tar")  # a makes room
    assert not (folder.folder / "a.tar").exists()


def test_remote_sweeps_what_dead_writers_left_when_room_is_needed(server: FolderServer, tmp_path: Path) -> None:
    put(server, "a.tar", 10_000)
    folder = RemoteFolder(server.url, storage(tmp_path, cache_gb=15_000 / 1e9))
    folder.folder.mkdir(parents=True)
    dead = left_behind(folder.folder / "old.tar", bytes(4_000))
    alive = left_behind(folder.folder / "new.tar", bytes(4_000), process=os.getppid())
    parts = [cache.part_of(folder.folder / name) for name in ("dead.tar", "alive.tar")]
    for part, size_bytes in zip(parts, (3_000, 100), strict=True):
        part.write_bytes(bytes(size_bytes))
        cache.lock_file(folder.folder / part.name[1:].removesuffix(".part")).touch()
    with exclusive_lock(cache.lock_file(folder.folder / "alive.tar"), "it"):
        fetch(folder, server, "a.tar")
    assert [path.exists() for path in (dead, alive, *parts)] == [False, True, False, True]


def recorded(server: FolderServer, *names: str) -> dict[str, Wanted]:
    """Files as an index records them."""
    paths = [server.root / name for name in names]
    return {path.name: Wanted(path.stat().st_size, file_digest(path)) for path in paths}


def test_remote_files_are_fetched_side_by_side(
    server: FolderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{number}.tar" for number in range(12)]
    data = {name: put(server, name) for name in names}
    for name in names:
        server.faults[name] = [Fault(stall_at=10, stall_s=0.1)]
    folder = RemoteFolder(server.url, storage(tmp_path, cache_gb=3e-4))
    begun = time.monotonic()
    known = recorded(server, *names)
    folder.fetch_all(known, "these shards")
    assert time.monotonic() - begun < 1.0  # one by one: 1.2 s of stalls alone
    assert {name: (folder.folder / name).read_bytes() for name in names} == data
    assert "fetch: 12/12 files" in capsys.readouterr().err
    begun_ns = time.time_ns()
    folder.fetch_all(known, "these shards")
    assert capsys.readouterr().err == ""
    assert min((folder.folder / name).stat().st_atime_ns for name in names) >= begun_ns
    with pytest.raises(UsageError, match=r"^these shards has 0\.25 MB"):
        RemoteFolder(server.url, storage(tmp_path, cache_gb=1e-4)).fetch_all(known, "these shards")


def test_remote_first_failure_ends_the_other_transfers(server: FolderServer, tmp_path: Path) -> None:
    put(server, "a.tar", BLOCK)
    put(server, "b.tar", 8000 * BLOCK)  # more than lies in the buffers of a connection
    known = recorded(server, "a.tar", "b.tar")
    server.always["a.tar"] = Fault(status=404)
    with pytest.raises(MissingError, match=r"a\.tar is not there"):
        RemoteFolder(server.url, storage(tmp_path)).fetch_all(known, "these shards")
    assert server.sent["b.tar"] < 8000 * BLOCK


def test_remote_protocols_of_fsspec_come_along(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index").write_bytes(b"some")
    fsspec.filesystem("memory").pipe_file("/folder/index", b"some")
    for url in (f"file://{tmp_path}/there", "memory://folder"):
        folder = RemoteFolder(Path(url), storage(tmp_path))
        assert folder.fetch("index").read_bytes() == b"some"
        assert folder.exists("index")
        assert not folder.exists("nothing")
