"""Whole copies: they are there or not, whatever ends when, and nothing that is there already is written over."""

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash
from click.testing import CliRunner, Result
from servers import serve, serve_hub, serve_s3
from shard_sets import ShardMaker, write_store

import bowstore
from bowstore.cli import main
from bowstore.config import StorageConfig
from bowstore.errors import (
    BowstoreError,
    BusyError,
    CorruptError,
    MismatchError,
    MissingError,
    TransferError,
    UsageError,
)
from bowstore.files import exclusive_lock
from bowstore.remote import fetch_store, transfer, tries
from bowstore.remote.manifest import MANIFEST_FILE, PUSHING_FILE, Manifest
from bowstore.remote.pull import pull
from bowstore.remote.push import push
from bowstore.remote.transfer import Remote, Wanted

URL = Path("memory://bucket/copy")
FILES = {"a.txt": b"one", "b/c.bin": bytes(range(256)) * 40, "b/d/e": b"", "f%20 g.txt": "schön".encode()}


class Watched:
    """The memory file system; it notes what is written, and does on demand something before or after it."""

    def __init__(self) -> None:
        self.real = fsspec.filesystem("memory")
        self.sent: list[str] = []
        self.before: Callable[[str], None] = lambda name: None
        self.after: Callable[[str], None] = lambda name: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def _noted(self, url: str, write: Callable[[], None]) -> None:
        name = url.partition("/copy/")[2]
        self.before(name)
        write()
        self.sent.append(name)
        self.after(name)

    def pipe_file(self, url: str, data: bytes, **values: Any) -> None:
        self._noted(url, lambda: self.real.pipe_file(url, data, **values))

    def put_file(self, path: str, url: str, **values: Any) -> None:
        self._noted(url, lambda: self.real.put_file(path, url, **values))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(transfer, "PARALLEL", 1)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    watched.real.store.clear()
    watched.real.pseudo_dirs[:] = [""]
    monkeypatch.setattr(transfer, "_file_system", lambda *_: watched)
    return watched


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder to copy."""
    write(tmp_path / "here", FILES)
    return tmp_path / "here"


def write(place: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


def send(here: Path, *, url: Path = URL, licence: str = "CC0", kind: Any = "run") -> int:
    return push(here, url, kind=kind, licence=licence, storage=StorageConfig(retries=2))[1]


def fetch(path: Path, *, url: Path = URL) -> int:
    return pull(url, path, storage=StorageConfig(retries=2))[1]


def there(watched: Watched) -> dict[str, bytes]:
    prefix = "/bucket/copy/"
    return {name.removeprefix(prefix): file.getvalue() for name, file in watched.real.store.items() if prefix in name}


def files(place: Path) -> dict[str, bytes]:
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 1) -> str:
    """The line of a command that refuses."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def test_push_and_pull_copy_every_file(watched: Watched, here: Path, tmp_path: Path) -> None:
    write(here, {PUSHING_FILE: b"", ".lock": b"", "b/.c.bin.tmp-1": b"half", ".hidden/x": b"x"})
    assert send(here) == len(FILES)
    manifest = json.loads(there(watched)[MANIFEST_FILE])
    assert there(watched) == {**FILES, MANIFEST_FILE: there(watched)[MANIFEST_FILE]}
    assert manifest["files"]["a.txt"] == {"size_bytes": 3, "digest": xxhash.xxh3_128_hexdigest(b"one")}
    assert (manifest["kind"], manifest["licence"], manifest["bowstore_version"]) == ("run", "CC0", bowstore.__version__)
    assert fetch(tmp_path / "new" / "copy") == len(FILES)
    assert files(tmp_path / "new" / "copy") == there(watched)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".copy.lock", "copy"]
    watched.sent.clear()
    assert send(here) == send(tmp_path / "new" / "copy") == fetch(tmp_path / "new" / "copy") == 0
    assert watched.sent == []


def test_push_writes_the_manifest_last(watched: Watched, here: Path) -> None:
    states: list[set[str]] = []
    watched.before = lambda _name: states.append(set(there(watched)))
    send(here)
    assert watched.sent == [PUSHING_FILE, *sorted(FILES), MANIFEST_FILE]
    assert all(PUSHING_FILE in state and MANIFEST_FILE not in state for state in states[1:])
    assert PUSHING_FILE not in there(watched)


def test_push_goes_on_after_any_end(watched: Watched, here: Path, tmp_path: Path) -> None:
    """It ends before or after each transfer; nobody pulls half a copy, and no file is sent twice."""

    def end(_name: str) -> None:
        raise KeyboardInterrupt

    ends = 0
    while True:
        watched.before, watched.after = (end, end) if ends == 0 else (lambda name: None, end)
        if ends == 1:
            watched.before = lambda name: end(name) if name == MANIFEST_FILE else None
        try:
            send(here)
            break
        except KeyboardInterrupt:
            ends += 1
            assert ends < 20
        if MANIFEST_FILE not in there(watched):
            with pytest.raises((MismatchError, MissingError)):
                fetch(tmp_path / "copy")
    assert ends == len(FILES) + 3  # before and after the first, after each file, and after the manifest
    assert sorted(watched.sent) == sorted([PUSHING_FILE, *FILES, MANIFEST_FILE])
    assert there(watched).keys() == {*FILES, MANIFEST_FILE}  # the last call found all of it, and tidied up
    assert fetch(tmp_path / "copy") == len(FILES)


def test_push_sends_again_what_arrived_in_part(watched: Watched, here: Path) -> None:
    def broken(name: str) -> None:
        if name == "b/c.bin":
            watched.real.pipe_file("/bucket/copy/b/c.bin", FILES["b/c.bin"][:100])
            raise KeyboardInterrupt

    watched.before = broken
    with pytest.raises(KeyboardInterrupt):
        send(here)
    watched.before = lambda name: None
    assert send(here) == len(FILES) - 1
    assert there(watched)["b/c.bin"] == FILES["b/c.bin"]


def test_push_leaves_other_content_alone(watched: Watched, here: Path, tmp_path: Path) -> None:
    send(here)
    before = there(watched)
    write(tmp_path / "other", {**FILES, "a.txt": b"two"})
    for change, message in (
        ({"here": tmp_path / "other"}, r"1 files differ, for example a\.txt"),
        ({"licence": "MIT"}, "its licence is 'CC0', not 'MIT'"),
        ({"kind": "shards"}, "its kind is 'run', not 'shards'"),
    ):
        with pytest.raises(
            MismatchError, match=rf"^memory://bucket/copy holds another copy \({message}\), which is left"
        ):
            send(**{"here": here, **change})
        assert there(watched) == before


def test_push_leaves_files_alone_that_others_put_there(watched: Watched, here: Path) -> None:
    watched.real.pipe_file("/bucket/copy/b/c.bin", b"mine")
    watched.real.pipe_file("/bucket/copy/README.md", b"welcome")
    with pytest.raises(
        MismatchError, match=r"^memory://bucket/copy/b/c\.bin is there already, and `bowstore push` did"
    ):
        send(here)
    assert there(watched) == {"b/c.bin": b"mine", "README.md": b"welcome"}
    watched.real.rm_file("/bucket/copy/b/c.bin")
    assert send(here) == len(FILES)  # what has other names stays beside it
    assert there(watched)["README.md"] == b"welcome"


def test_push_does_not_go_on_from_another_push(watched: Watched, here: Path) -> None:
    def end(name: str) -> None:
        if name == "a.txt":
            raise KeyboardInterrupt

    watched.after = end
    with pytest.raises(KeyboardInterrupt):
        send(here)
    (here / "a.txt").write_bytes(b"two")
    with pytest.raises(
        MismatchError, match=r"holds the beginning of another push \(1 files differ, for example a\.txt"
    ):
        send(here)
    assert there(watched)["a.txt"] == b"one"
    (here / "a.txt").write_bytes(b"one")
    watched.after = lambda name: None
    assert send(here) == len(FILES) - 1


@pytest.mark.parametrize("moment", [PUSHING_FILE, "b/c.bin", MANIFEST_FILE])
@pytest.mark.parametrize("whole", [True, False])
def test_push_of_two_at_the_same_time(watched: Watched, here: Path, tmp_path: Path, moment: str, whole: bool) -> None:
    """Another push begins, or begins and ends, just before ours writes: one of the two stays, whole."""
    write(tmp_path / "other", {**FILES, "b/c.bin": b"theirs"})

    def rival(name: str) -> None:
        if name != moment:
            return
        watched.before = lambda name: None
        if not whole:
            watched.after = lambda name: (_ for _ in ()).throw(KeyboardInterrupt)
        try:
            send(tmp_path / "other")
        except (KeyboardInterrupt, MismatchError):
            pass
        watched.after = lambda name: None

    watched.before = rival
    if moment == PUSHING_FILE:
        with pytest.raises(MismatchError, match="holds another copy" if whole else "the beginning of another push"):
            send(here)
        send(tmp_path / "other")
        assert there(watched)["b/c.bin"] == b"theirs"
    else:
        send(here)
        assert there(watched)["b/c.bin"] == FILES["b/c.bin"]
    fetch(tmp_path / "copy")


def change(path: Path) -> None:
    path.write_bytes(b"!" * path.stat().st_size)
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "content": ("b/c.bin", lambda here: change(here / "b" / "c.bin")),
    "sent before": ("a.txt", lambda here: change(here / "a.txt")),
    "gone": ("b/c.bin", lambda here: (here / "b" / "c.bin").unlink()),
    "new": ("b/new", lambda here: (here / "b" / "new").write_bytes(b"new")),
}


@pytest.mark.parametrize(("name", "act"), CHANGES.values(), ids=CHANGES.keys())
def test_push_of_a_folder_that_changes(watched: Watched, here: Path, name: str, act: Callable[[Path], object]) -> None:
    watched.before = lambda sent: act(here) if sent == "b/c.bin" else None
    with pytest.raises(
        MismatchError, match=rf"here/{name} changed while it was pushed; wait until nothing writes there"
    ):
        send(here)
    assert MANIFEST_FILE not in there(watched)


def test_push_of_what_cannot_be_copied(watched: Watched, here: Path, tmp_path: Path) -> None:
    (here / "b" / "link").symlink_to(tmp_path)
    with pytest.raises(
        UsageError, match=r"here/b/link is a link to a folder, which is not copied; put the folder itself"
    ):
        send(here)
    (here / "b" / "link").unlink()
    os.mkfifo(here / "b" / "pipe")
    with pytest.raises(BowstoreError, match=r"here/b/pipe is no plain file, and cannot be copied; move it away"):
        send(here)
    (here / "b" / "pipe").unlink()
    (tmp_path / "a.txt").write_bytes(b"one")
    (here / "a.txt").unlink()
    (here / "a.txt").symlink_to(tmp_path / "a.txt")
    (here / os.fsdecode(b"\xff")).write_bytes(b"")
    with pytest.raises(UsageError, match=r"the name .* is not UTF-8 text"):
        send(here)
    (here / os.fsdecode(b"\xff")).unlink()
    assert send(here) == len(FILES)  # a link to a file is that file
    assert there(watched)["a.txt"] == b"one"


def test_push_where_a_file_is_lost(watched: Watched, here: Path) -> None:
    watched.after = lambda name: watched.real.rm_file("/bucket/copy/a.txt") if name == "b/c.bin" else None
    with pytest.raises(TransferError, match=r"copy/a\.txt was sent and is not there; run the same command again"):
        send(here)
    assert send(here) == 1


def test_push_where_nothing_that_is_written_stays(watched: Watched, here: Path) -> None:
    watched.after = lambda name: watched.real.rm_file(f"/bucket/copy/{name}")
    with pytest.raises(TransferError, match=r"copy/bowstore\.json\.part was written and is not there; try again later"):
        send(here)


def test_pull_goes_on_after_any_end(
    watched: Watched, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(here)
    real, arrived = Remote.download, list[str]()

    def ends(self: Remote, name: str, path: Path, wanted: Wanted) -> None:
        if len(arrived) % 2:
            path.write_bytes(FILES[name][:2])  # what arrived of the next one
            arrived.append("")
            raise KeyboardInterrupt
        real(self, name, path, wanted)
        arrived.append(name)

    monkeypatch.setattr(Remote, "download", ends)
    for _ in range(len(FILES) - 1):
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
    assert fetch(tmp_path / "copy") == 1
    assert len([name for name in arrived if name]) == len(FILES)
    assert files(tmp_path / "copy") == there(watched)


def test_pull_of_what_was_not_pushed(watched: Watched, here: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingError, match=r"^memory://bucket/copy has no bowstore\.json, so `bowstore push` did not put"
    ):
        fetch(tmp_path / "copy")
    watched.after = lambda name: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        send(here)
    with pytest.raises(MismatchError, match=r"^memory://bucket/copy is not whole: a push is under way, or was cut off"):
        fetch(tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_pull_of_a_file_that_was_changed(watched: Watched, here: Path, tmp_path: Path) -> None:
    send(here)
    watched.real.pipe_file("/bucket/copy/a.txt", b"two")
    with pytest.raises(CorruptError, match=r"^memory://bucket/copy/a\.txt is not the file that was recorded"):
        fetch(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    watched.real.pipe_file("/bucket/copy/a.txt", b"one")
    fetch(tmp_path / "copy")


def hostile(**values: Any) -> bytes:
    entry = {"size_bytes": 1, "digest": "0" * 32}
    names = values.pop("names", ["a"])
    made = {"format": "bowstore copy", "format_version": 1, "bowstore_version": "9", "kind": "run", "licence": "CC0"}
    return json.dumps({**made, "files": dict.fromkeys(names, entry), **values}).encode()


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../../b", ".a", "a/.b", "a//b", "", "a/", "bowstore.json", "bowstore.json.part", "a\0b"]
)
def test_pull_of_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(
        CorruptError, match=r"^there is no manifest that bowstore .* can read \(files: .* is no name of a"
    ):
        Manifest.parse(hostile(names=[name]), "there")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"<html>", r"\(the whole: Invalid JSON"),
        (hostile(format_version=2), r"\(format_version: Input should be 1\)"),
        (hostile(kind="house"), r"\(kind: Input should be 'store', 'shards' or 'run'\)"),
        (hostile(files={"a": {"size_bytes": -1, "digest": "0" * 32}}), r"\(files\.a\.size_bytes: "),
        (hostile(files={"a": {"size_bytes": 1, "digest": "no"}}), r"\(files\.a\.digest: "),
    ],
)
def test_pull_of_manifests_that_cannot_be_read(watched: Watched, tmp_path: Path, text: bytes, message: str) -> None:
    watched.real.pipe_file("/bucket/copy/bowstore.json", text)
    with pytest.raises(CorruptError, match=rf"^memory://bucket/copy/bowstore\.json is no manifest .*{message}"):
        fetch(tmp_path / "copy")


def test_pull_leaves_what_is_there_alone(
    watched: Watched, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(here)
    for place, problem in ((here, "has no bowstore.json"), (here / "a.txt", "has no bowstore.json")):
        with pytest.raises(
            MismatchError, match=rf"is there already and is no copy of the URL \(it {problem}\); name anoth"
        ):
            fetch(place)
    (tmp_path / "empty").mkdir()
    assert fetch(tmp_path / "empty") == len(FILES)
    (tmp_path / "empty" / "a.txt").write_bytes(b"longer")
    with pytest.raises(MismatchError, match=r"empty is there already .* \(a\.txt is not as it was pulled\)"):
        fetch(tmp_path / "empty")
    with (
        exclusive_lock(tmp_path / ".copy.lock", "it"),
        pytest.raises(BusyError, match=r"copy is in use by process .*; wait for it to end, or take another name"),
    ):
        fetch(tmp_path / "copy")
    usage = namedtuple("usage", "total used free")(1, 1, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        BowstoreError, match=r"^memory://bucket/copy needs 0\.0 MB, and the disk of .* has 0\.0 MB free"
    ):
        fetch(tmp_path / "copy")


def test_pull_survives_a_full_disk(
    watched: Watched, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(here)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "fsync_path", full)
        with pytest.raises(OSError, match="No space left"):
            fetch(tmp_path / "copy")
    assert fetch(tmp_path / "copy") == len(FILES)


@pytest.fixture
def shards(make_shard_set: ShardMaker, tmp_path: Path) -> Path:
    """A folder of indexed shards, and beside it a store of their words."""
    write_store(tmp_path / "data" / "words.zarr", make_shard_set(60, folder="data/shards/train"))
    return tmp_path / "data" / "shards" / "train"


def test_push_and_pull_of_stores_and_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, licence = shards.parents[1] / "words.zarr", ["--licence", "CC BY 4.0"]
    before = invoke("verify", store, "--digest").stdout.splitlines()[-1]
    with serve_s3(monkeypatch):
        result = invoke("push", store, "s3://bucket/words.zarr", *licence)
        assert result.exit_code == 0, result.output
        count = len(files(store))
        assert result.stdout.startswith(f"s3://bucket/words.zarr: store, {count} files, ")
        assert result.stdout.endswith(f" MB, licence CC BY 4.0; {count} files copied now\n")
        assert invoke("push", store, "s3://bucket/words.zarr", *licence).stdout.endswith("; all there already\n")
        assert "holds another copy" in refused("push", shards, "s3://bucket/words.zarr", *licence)
        report = json.loads(invoke("pull", "s3://bucket/words.zarr", "copy.zarr", "--json").stdout)
        assert (report["place"], report["kind"], report["licence"]) == ("copy.zarr", "store", "CC BY 4.0")
        opened = fetch_store(Path("s3://bucket/words.zarr"), StorageConfig(cache=tmp_path / "cache"))
        assert files(opened) == files(store)  # it opens where it is, as before
        remote = Remote("s3://bucket", StorageConfig(retries=0))
        remote.upload("new", b"1")
        remote.upload("new", b"2")
        assert remote.read("new") == b"1"
        assert "no such bucket" in refused("push", store, "s3://nothing/words.zarr", *licence)
        result = invoke("push", shards.parent, "s3://bucket/shards", *licence)
        assert ": shards, " in result.stdout, result.output
        assert invoke("pull", "s3://bucket/shards", "shards").exit_code == 0
    assert invoke("verify", "copy.zarr", "--digest").stdout.splitlines()[-1] == before
    result = invoke("verify", "shards")
    assert "no problem found" in result.stdout, result.output
    assert files(Path("shards/train")) == files(shards)
    with serve(tmp_path) as server:
        assert invoke("pull", f"{server.url}/shards", "again").exit_code == 0
        assert files(Path("again")) == files(Path("shards"))
        assert "has no bowstore.json" in refused("pull", f"{server.url}/data/shards/train", "other")
        line = refused("push", shards, f"{server.url}/new", *licence, code=2)
        assert line == f"{server.url}/new cannot be written; push to an s3://, gs:// or hf:// URL"


def test_push_and_pull_to_a_disk(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is mounted by all is a URL, too; one folder of shards, and a run."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "teacher", {"config.yaml": b"x", "checkpoints/step-000000001.pt": b"y", ".lock": b""})
    for place, what in ((shards, "shards"), (Path("runs/teacher"), "run")):
        url = f"file://{tmp_path}/there/{what}"
        result = invoke("push", place, url, "--licence", "MIT")
        assert f": {what}, " in result.stdout, result.output
        assert invoke("pull", url, f"copies/{what}").exit_code == 0
        copied = files(Path("copies") / what)
        assert copied.pop(MANIFEST_FILE)
        assert copied == {name: data for name, data in files(place).items() if not name.startswith(".")}
    result = invoke("verify", "copies/shards")
    assert "no problem found" in result.stdout, result.output


def test_push_of_what_is_not_whole(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, rest = shards.parents[1] / "words.zarr", ["memory://bucket/x", "--licence", "CC0"]
    path = store / "block3" / "zarr.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    assert refused("push", store, *rest) == (
        f"layer 'block3' of word store {store} is not complete; run its `bowstore encode` again first"
    )
    (shards / "index.safetensors").unlink()
    for place in (shards, shards.parent):
        assert refused("push", place, *rest) == (
            f"{shards} has no index.safetensors; run `bowstore index {shards}` first"
        )
    assert "gone is neither a word store nor a folder of shards, nor a run" in refused("push", "gone", *rest)
    assert refused("push", store, "bucket/x", "--licence", "CC0", code=1).startswith("layer 'block3'")
    assert "Missing option '--licence'" in refused("push", store, "memory://bucket/x", code=2)
    assert refused("pull", "memory://bucket/x", "s3://bucket/y", code=2) == (
        "s3://bucket/y is on another machine; name a folder on this machine to pull into"
    )
    assert "bucket/x is no URL; name that which" in refused("pull", "bucket/x", "y", code=2)
    assert "has no name of its own; name the folder to make" in refused("pull", "memory://bucket/x", "/", code=2)


def test_push_and_pull_with_the_hub(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files in one commit, beside what the repository holds already."""
    url = Path("hf://datasets/name/data/words")
    with serve_hub(monkeypatch) as hub:
        hub.files[".gitattributes"] = b"*.bin filter=lfs\n"
        assert send(here, url=url) == len(FILES)
        assert hub.commits == [1, len(FILES), 1, 1]  # the manifest of the push, all files, the manifest, tidied up
        assert {name.removeprefix("words/") for name in hub.files} == {".gitattributes", MANIFEST_FILE, *FILES}
        assert hub.files["words/b/c.bin"] == FILES["b/c.bin"]
        assert send(here, url=url) == 0
        assert fetch(tmp_path / "copy", url=url) == len(FILES)
        assert files(tmp_path / "copy").items() >= FILES.items()
        hub.refuse = 503
        monkeypatch.setattr(transfer, "COMMIT_FILES", 3)
        assert send(here, url=Path("hf://datasets/name/data/again")) == len(FILES)
        assert hub.commits[4:] == [1, 3, 1, 1, 1]
        with pytest.raises(MissingError, match=r"^hf://datasets/name/data/nothing has no bowstore\.json"):
            fetch(tmp_path / "x", url=Path("hf://datasets/name/data/nothing"))
        with pytest.raises(TransferError, match=r"^hf://datasets/name/none/.* may not be read \(401, 1 try\); check"):
            send(here, url=Path("hf://datasets/name/none/words"))


def test_push_without_the_hubs_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_url: str, **_options: object) -> None:
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UsageError, match=r"^hf needs huggingface_hub; pip install 'bowstore\[remote\]'$"):
        send(here, url=Path("hf://datasets/name/data/words"))
