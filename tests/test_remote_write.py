"""Word stores that are written to a URL: sent once, in an order that misleads nobody, gone on with after any end."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import faiss
import numpy as np
import pytest
import torch
from servers import serve_s3
from shard_sets import fill_layer, write_words
from teacher_sets import write_shards, write_teacher

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError, MismatchError, MissingError, TransferError, UsageError
from bowstore.remote import cache, fetch_store, folder, reserve_room, transfer, writable_store, writing
from bowstore.remote.record import Record
from bowstore.remote.transfer import Remote
from bowstore.words import layer as store_layer
from bowstore.words.config import EncodeConfig
from bowstore.words.encode import encode
from bowstore.words.encode_report import EncodeReport
from bowstore.words.layer import LayerSpec
from bowstore.words.nearest import NearestSearch
from bowstore.words.statistics import word_statistics
from bowstore.words.store import open_store
from bowstore.words.store_writer import StoreWriter
from bowstore.words.verify import digest, verify

ROWS = 16  # of a chunk
SPEC = LayerSpec(teacher={}, view={}, vocabulary={}, num_words=5, grid=(4, 4), channels=3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_FIRST_WAIT_S", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    """Many chunks in small stores, and no threads that spin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_layer, "MIN_CHUNK_BYTES", 1)
        patch.setattr(store_layer, "CHUNK_STEP_ROWS", ROWS)
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        yield
        faiss.omp_set_num_threads(before)


class Watched:
    """A file system that notes what is written, and does on demand something before or after it."""

    def __init__(self) -> None:
        self.real = transfer._file_system("file", 1.0, os.getpid())
        self.sent: list[str] = []
        self.before: Callable[[str], None] = lambda name: None
        self.after: Callable[[str], None] = lambda name: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def pipe_file(self, url: str, data: bytes, **values: Any) -> None:
        name = url.partition("words.zarr/")[2]
        if name != transfer._PROBE:
            self.before(name)
        self.real.pipe_file(url, data, **values)
        if name != transfer._PROBE:
            self.sent.append(name)
            self.after(name)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """What the URL of `file_url` stands for."""
    return tmp_path / "there" / "words.zarr"


@pytest.fixture
def url(there: Path) -> Path:
    return Path(f"file://{there}")


@pytest.fixture
def watched(url: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(transfer, "_file_system", lambda *_: watched)
    return watched


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve_s3(monkeypatch) as endpoint:
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
        yield endpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, shards, shards of images that came later; and two stores: of the first, and of both."""
    path = tmp_path_factory.mktemp("work")
    write_teacher(path / "teacher.safetensors")
    write_shards(path / "shards", 40)
    write_shards(path / "more", 30, seed=1, prefix="new")
    torch.set_num_threads(1)
    run_encode(path, path / "first.zarr")
    shutil.copytree(path / "first.zarr", path / "grown.zarr")
    run_encode(path, path / "grown.zarr", shards="more", append=True, layers=(), num_words=())
    return path


def run_encode(
    work: Path,
    store: Path,
    *,
    shards: str = "shards",
    append: bool = False,
    tmp_path: Path | None = None,
    **values: Any,
) -> EncodeReport:
    config = {
        "layers": ("block3",),
        "num_words": (12,),
        "iterations": 2,
        "batch": 8,
        "threads": 1,
        "device": "cpu",
        **values,
    }
    return encode(
        EncodeConfig(teacher=work / "teacher.safetensors", **config),
        shards=work / shards,
        store=store,
        append=append,
        storage=storage(tmp_path) if tmp_path else None,
    )


def storage(tmp_path: Path, **values: Any) -> StorageConfig:
    return StorageConfig(cache=tmp_path / "cache", **{"retries": 2, "timeout_s": 5, **values})


def random_maps(images: int = 60, words: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, words, (images, 4, 4)).astype(np.uint16)


def made(path: Path, *, seed: int = 0) -> Path:
    """A small store, made on this machine."""
    return write_words(path, random_maps(words=12, seed=seed))


def put(store: Path, url: Path, tmp_path: Path, **values: Any) -> None:
    """Write a store to the URL as encoding does it: whatever was there is gone on with."""
    with writable_store(url, storage(tmp_path, **values)) as place:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(store, place)


def write(url: Path, settings: StorageConfig, fill: Callable[[Path], object] = lambda place: None) -> None:
    with writable_store(url, settings) as place:
        fill(place)


def never(_place: Path) -> None:
    raise AssertionError


def add_layer(place: Path, name: str = "block2", *, chunks: int | None = None) -> None:
    maps = random_maps(len(open_store(place)))
    if chunks is None:
        fill_layer(StoreWriter(place), name, SPEC, maps)
        return
    layer = StoreWriter(place).add_layer(name, SPEC, np.zeros((5, 3), np.float32))
    for chunk in range(chunks):
        StoreWriter(place).write_chunk(name, chunk, maps[layer.rows(chunk)])


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache of stores that are not uploaded."""
    return sorted(p.name for p in (tmp_path / "cache" / "writing").iterdir() if not p.name.startswith("."))


def objects(endpoint: str) -> dict[str, bytes]:
    client = boto3.client("s3", endpoint_url=endpoint)
    found = client.list_objects_v2(Bucket="bucket").get("Contents", [])
    return {o["Key"]: client.get_object(Bucket="bucket", Key=o["Key"])["Body"].read() for o in found}


def test_remote_write_of_a_local_store_is_that_store(tmp_path: Path) -> None:
    with writable_store(tmp_path / "words.zarr") as place:
        assert place == tmp_path / "words.zarr"
        reserve_room(place, 10**18)  # is nothing that the cache knows of
    assert list(tmp_path.iterdir()) == []


def test_remote_write_appends_and_adds_layers_from_any_machine(
    s3: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, here, elsewhere = Path("s3://bucket/words.zarr"), tmp_path / "here", tmp_path / "elsewhere"
    report = run_encode(work, url, tmp_path=here)
    assert report.store == "s3://bucket/words.zarr"
    assert report.text().startswith("s3://bucket/words.zarr: 40 images")
    assert "is written in" in capsys.readouterr().err
    expected = {f"words.zarr/{name}": data for name, data in files(work / "first.zarr").items()}
    assert objects(s3) == expected
    assert left(here) == []
    assert run_encode(work, url, tmp_path=here).layers[0].already_complete
    grown = run_encode(work, url, shards="more", append=True, layers=(), num_words=(), tmp_path=elsewhere)
    assert (grown.images, grown.images_added) == (70, 30)
    second = run_encode(work, work / "unused.zarr", layers=("block2",), num_words=(7,), seed=3)
    with pytest.raises(MismatchError, match=r"word store s3://bucket/words\.zarr was made of data set"):
        run_encode(work, url, layers=("block2",), num_words=(7,), seed=3, tmp_path=here)
    assert second.images == 40
    copy = fetch_store(url, storage(tmp_path / "reader"))
    assert digest(copy) == digest(work / "grown.zarr")
    assert verify(copy).sound
    assert left(here) == left(elsewhere) == []


def test_remote_write_of_a_second_layer_sends_that_layer_alone(
    watched: Watched, there: Path, url: Path, work: Path, tmp_path: Path
) -> None:
    run_encode(work, url, tmp_path=tmp_path)
    watched.sent.clear()
    run_encode(work, url, layers=("block2",), num_words=(7,), tmp_path=tmp_path / "elsewhere")
    assert {name.split("/")[0] for name in watched.sent} == {"block2", "zarr.json"}
    assert watched.sent[-1] == "zarr.json"
    assert set(watched.sent) == {n for n in files(there) if n.startswith("block2/")} | {"zarr.json"}
    assert open_store(there).layers == ("block3", "block2")
    assert verify(there).sound


def test_remote_write_sends_what_speaks_of_files_after_them(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    store = made(tmp_path / "made.zarr")
    put(store, url, tmp_path)
    assert files(there) == files(store)
    assert sorted(watched.sent) == sorted(files(store))
    kinds = [name.count("/") if name.endswith("zarr.json") else -1 for name in watched.sent]
    metadata = [kind for kind in kinds if kind >= 0]
    assert kinds == [-1] * (len(kinds) - len(metadata)) + metadata  # chunks first
    assert watched.sent[-2:] == ["block3/zarr.json", "zarr.json"]


def test_remote_write_leaves_the_caches_copy(watched: Watched, there: Path, url: Path, tmp_path: Path) -> None:
    store = made(tmp_path / "made.zarr")
    put(store, url, tmp_path)
    assert left(tmp_path) == []
    chunk = there / "block3" / "words" / "c" / "0" / "0" / "0"
    chunk.rename(tmp_path / "away")  # nothing but metadata is fetched now
    assert files(fetch_store(url, storage(tmp_path))) == files(store)


def check_reader(there: Path, tmp_path: Path, allowed: tuple[str, ...]) -> str:
    """What a reader finds: "none", "half", or the digest of sound words, which has to be an allowed one."""
    try:
        copy = fetch_store(Path(f"file://{there}"), storage(tmp_path), display=False)
        open_store(copy)
    except (MissingError, MismatchError) as error:
        found = {"no word store at": "none", "is half uploaded by machine": "half"}
        return next(state for part, state in found.items() if part in str(error))
    assert verify(copy).sound
    assert digest(copy) in allowed
    return "sound"


def ordered(states: list[str]) -> list[str]:
    return [state for number, state in enumerate(states) if number == 0 or states[number - 1] != state]


CASES = {
    "new": (None, "first.zarr", ["none", "sound"]),
    "append": ("first.zarr", "grown.zarr", ["sound", "half", "sound"]),
    "layer": ("first.zarr", "layers.zarr", ["sound"]),
}


@pytest.fixture(scope="module")
def layers(work: Path) -> None:
    """A third store: the first with one more layer."""
    shutil.copytree(work / "first.zarr", work / "layers.zarr")
    add_layer(work / "layers.zarr")


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(("old", "new", "states"), CASES.values(), ids=CASES.keys())
def test_remote_write_misleads_no_reader_at_any_moment(
    watched: Watched,
    there: Path,
    url: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str | None,
    new: str,
    states: list[str],
) -> None:
    monkeypatch.setattr(folder, "PARALLEL", 1)
    if old:
        put(work / old, url, tmp_path)
    allowed = tuple(digest(work / name) for name in (old, new) if name)
    snapshots = tmp_path / "snapshots"
    count = len(watched.sent)
    watched.after = lambda _name: shutil.copytree(there, snapshots / f"{len(watched.sent):04d}" / "words.zarr")
    put(work / new, url, tmp_path)
    assert files(there).items() >= files(work / new).items()
    seen = [
        check_reader(path / "words.zarr", tmp_path / f"reader-{path.name}", allowed)
        for path in sorted(snapshots.iterdir())
    ]
    assert len(seen) == len(watched.sent) - count
    assert ordered(seen) == states
    shutil.rmtree(snapshots)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(("old", "new"), [case[:2] for case in CASES.values()], ids=CASES.keys())
def test_remote_write_goes_on_after_any_end(
    watched: Watched,
    there: Path,
    url: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str | None,
    new: str,
) -> None:
    """The process ends after each transfer, before it is noted; a plain call then sends all that is left, once."""
    monkeypatch.setattr(folder, "PARALLEL", 1)
    if old:
        put(work / old, url, tmp_path)
    start, ends = len(watched.sent), 0

    def end(_name: str) -> None:
        raise KeyboardInterrupt

    watched.after = end
    while True:
        try:
            with writable_store(url, storage(tmp_path)) as place:
                if not ends:
                    shutil.rmtree(place, ignore_errors=True)
                    shutil.copytree(work / new, place)
            break
        except KeyboardInterrupt:
            ends += 1
            assert ends < 300
            if ends % 2:  # every other time one more arrives and is noted
                continue
            done = len(watched.sent)
            watched.after = lambda _name, done=done: None if len(watched.sent) == done + 1 else end("")
    assert ends > 5
    assert left(tmp_path) == []
    expected = files(work / new)
    assert {name: files(there)[name] for name in expected} == expected
    assert verify(there).sound
    # A transfer that was not noted is made again: never more than one for each end, and the mark of the old store.
    assert len(watched.sent) - start <= len(expected) + 2 * ends + 2


def test_remote_write_killed_while_it_uploads(there: Path, url: Path, tmp_path: Path) -> None:
    store = made(tmp_path / "made.zarr")
    code = f"""
        import os, shutil, signal, sys
        from pathlib import Path
        from bowstore.config import StorageConfig
        from bowstore.remote import folder, transfer, writable_store
        folder.PARALLEL = 1
        plain, calls = transfer.Remote.upload, []
        def upload(self, url, data):
            plain(self, url, data)
            calls.append(url)
            if len(calls) == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
        transfer.Remote.upload = upload
        with writable_store(Path({str(url)!r}), StorageConfig(cache={str(tmp_path / "cache")!r})) as place:
            if not place.exists():
                shutil.copytree({str(store)!r}, place)
        print(len(calls) - 1)  # the first is the probe
    """
    results = [in_process(code, n) for n in ("9", "9", "0")]
    assert [result.returncode for result in results] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    total = len(files(store))
    assert int(results[-1].stdout) == total - 2 * 7  # of eight transfers each the last was not noted
    assert files(there) == files(store)
    assert left(tmp_path) == []


def in_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_remote_write_by_two_processes_uploads_once(there: Path, url: Path, work: Path, tmp_path: Path) -> None:
    code = f"""
        import os, sys, torch
        from pathlib import Path
        from bowstore.config import StorageConfig
        from bowstore.words.config import EncodeConfig
        from bowstore.remote import transfer
        from bowstore.words import layer
        from bowstore.words.encode import encode
        layer.MIN_CHUNK_BYTES, layer.CHUNK_STEP_ROWS = 1, {ROWS}
        plain = transfer.Remote.upload
        def upload(self, url, data):
            plain(self, url, data)
            with open({str(tmp_path / "sent")!r}, "a") as file:
                file.write(url.partition("words.zarr/")[2] + chr(10))
        transfer.Remote.upload = upload
        torch.set_num_threads(1)
        work = Path({str(work)!r})
        config = EncodeConfig(
            teacher=work / "teacher.safetensors", layers=("block3",), num_words=(12,), iterations=2, batch=8, threads=1,
            device="cpu",
        )
        report = encode(
            config, shards=work / "shards", store=Path({str(url)!r}),
            storage=StorageConfig(cache={str(tmp_path / "cache")!r}),
        )
        print(report.store)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    running = []
    for rank in ("0", "1"):
        environment = {**os.environ, **torchrun, "RANK": rank, "LOCAL_RANK": rank}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.strip() == f"file://{there}"
    sent = [name for name in (tmp_path / "sent").read_text().split() if name != transfer._PROBE]
    assert sorted(sent) == sorted(files(work / "first.zarr"))
    assert files(there) == files(work / "first.zarr")
    assert left(tmp_path) == []


def test_remote_write_tries_again(watched: Watched, there: Path, url: Path, tmp_path: Path) -> None:
    store, tries = made(tmp_path / "made.zarr"), dict.fromkeys(("zarr.json", "block3/words/c/1/0/0"), 2)

    def fail(name: str) -> None:
        if tries.get(name):
            tries[name] -= 1
            raise ConnectionResetError("cut")

    watched.before = fail
    put(store, url, tmp_path)
    assert set(tries.values()) == {0}
    assert files(there) == files(store)


FAULTS = {
    "cut": (ConnectionResetError("cut"), TransferError, r"the transfer broke off \(cut; 3 tries\); run the command"),
    "silent": (TimeoutError(), TransferError, r"no answer for 5 s \(3 tries\); try again later, or raise storage"),
    "denied": (PermissionError("no"), TransferError, r"may not be written \(403, 1 try\); check the credentials"),
    "no bucket": (
        FileNotFoundError("bucket"),
        MissingError,
        r"cannot be written: there is no such bucket \(404\); make it, or check the URL",
    ),
}


@pytest.mark.parametrize(("fault", "error", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_remote_write_that_fails_is_one_line_and_goes_on(
    watched: Watched,
    there: Path,
    url: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Exception,
    error: type[BowstoreError],
    message: str,
) -> None:
    store = made(tmp_path / "made.zarr")

    def fail(name: str) -> None:
        if name == "block3/vocabulary/zarr.json":
            raise fault

    watched.before = fail
    with pytest.raises(error, match=message) as caught:
        put(store, url, tmp_path)
    assert "\n" not in str(caught.value)
    assert "are complete, in " in capsys.readouterr().err
    assert len(left(tmp_path)) == 1
    chunks = set(watched.sent)
    watched.before = lambda name: None
    watched.sent.clear()
    with writable_store(url, storage(tmp_path)) as place:
        assert files(place) == files(store)
    assert chunks.isdisjoint(n for n in watched.sent if not n.endswith("zarr.json"))
    assert files(there) == files(store)


def test_remote_write_is_refused_before_any_work_without_access(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("https://host/words.zarr", "http://host/words.zarr"):
        with pytest.raises(UsageError, match=rf"^{address} cannot be written; give --store an s3://"):
            write(Path(address), storage(tmp_path), never)
    with pytest.raises(MissingError, match=r"^s3://nobucket/.*: there is no such bucket \(404\); make it"):
        write(Path("s3://nobucket/words.zarr"), storage(tmp_path), never)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    transfer._file_system.cache_clear()
    with pytest.raises(
        TransferError, match=r"^s3://bucket/.* may not be written \(401, 1 try\); check the credentials"
    ):
        write(Path("s3://bucket/words.zarr"), storage(tmp_path), never)
    assert left(tmp_path) == []


def test_remote_write_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "fake")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    transfer._file_system.cache_clear()
    with pytest.raises(TransferError, match=r"^s3://bucket/.*: no connection \(.*; 3 tries\); check the address"):
        write(Path("s3://bucket/words.zarr"), storage(tmp_path), never)


def test_remote_write_of_large_files_in_parts(s3: str, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * transfer._PART_BYTES + 12345)
    remote = Remote("s3://bucket/x", storage(tmp_path, timeout_s=30))
    remote.upload("s3://bucket/x/large", data)
    remote.upload("s3://bucket/x/a/small", b"1")
    assert objects(s3) == {"x/large": data, "x/a/small": b"1"}
    assert remote.sizes("s3://bucket/x") == {"large": len(data), "a/small": 1}
    assert remote.sizes("s3://bucket/y") == {}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("RequestTimeout", r"the server answers 408 \(3 tries\); try again later"),
        ("ExpiredToken", r"may not be written \(401, 1 try\); check the credentials"),
        ("InvalidDigest", r"the server answers 400 \(1 try\)"),
    ],
)
def test_remote_write_knows_what_s3_means_by_400(
    watched: Watched, url: Path, tmp_path: Path, code: str, message: str
) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}

    def fail(_name: str) -> None:
        raise botocore.exceptions.ClientError(answer, "PutObject")

    watched.before = fail
    with pytest.raises(TransferError, match=message):
        put(made(tmp_path / "made.zarr"), url, tmp_path)


def test_remote_write_by_a_protocol_that_only_reads(watched: Watched, url: Path, tmp_path: Path) -> None:
    def fail(_name: str) -> None:
        raise NotImplementedError

    watched.before = fail
    with pytest.raises(UsageError, match=r"^file:// cannot be written; s3:// and gs:// can$"):
        put(made(tmp_path / "made.zarr"), url, tmp_path)


def test_remote_write_keeps_what_somebody_else_changed(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    ours, theirs = made(tmp_path / "made.zarr"), made(tmp_path / "theirs.zarr", seed=1)
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"

    def meanwhile(place: Path) -> None:
        shutil.copytree(ours, place)
        put(theirs, url, elsewhere)

    with pytest.raises(
        MismatchError, match=r"changed by somebody else \(.*zarr\.json\) and is left as it is; to go on"
    ):
        write(url, storage(here), meanwhile)
    assert files(there) == files(theirs)
    with pytest.raises(MismatchError, match=r"words\.zarr was changed by somebody else"):
        write(url, storage(here), never)  # at once, the next time
    (folder_left,) = left(here)
    assert files(here / "cache" / "writing" / folder_left / "words.zarr") == files(ours)  # nothing is lost
    shutil.rmtree(here / "cache" / "writing" / folder_left)  # as the message says
    with writable_store(url, storage(here)) as place:
        assert files(place) == files(theirs)
        add_layer(place)
    assert open_store(there).layers == ("block3", "block2")


def test_remote_write_notices_a_change_while_it_uploads(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    ours, theirs = made(tmp_path / "made.zarr"), made(tmp_path / "theirs.zarr", seed=1)
    put(ours, url, tmp_path)
    grown = tmp_path / "grown.zarr"
    shutil.copytree(ours, grown)
    add_layer(grown)

    def change(name: str) -> None:
        assert name.startswith("block2/")  # nothing that a reader needs
        (there / "zarr.json").write_text((theirs / "zarr.json").read_text() + " ")

    watched.before = change
    with pytest.raises(MismatchError, match=r"changed by somebody else \(zarr\.json\)"):
        put(grown, url, tmp_path)
    assert (there / "zarr.json").read_text().endswith(" ")


def test_remote_write_of_a_store_that_was_removed_starts_again(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    store = made(tmp_path / "made.zarr")
    put(store, url, tmp_path)
    with writable_store(url, storage(tmp_path)) as place:
        shutil.rmtree(there)
        add_layer(place)
        expected = files(place)
    assert files(there) == expected
    shutil.rmtree(there)

    def nothing(place: Path) -> None:
        assert not place.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(url, storage(tmp_path), nothing)
    assert left(tmp_path) == []


def test_remote_write_of_what_is_there_already_sends_nothing(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    store = made(tmp_path / "made.zarr")
    with writable_store(url, storage(tmp_path / "here")) as place:
        shutil.copytree(store, place)
        put(store, url, tmp_path / "elsewhere")  # another machine was quicker, with the same words
        watched.sent.clear()
    assert watched.sent == []
    assert left(tmp_path / "here") == []


def test_remote_write_leaves_out_layers_that_are_not_complete(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    with writable_store(url, storage(tmp_path)) as place:
        made(place)
        add_layer(place, "block1", chunks=2)
    assert open_store(there).layers == ("block3",)
    assert {name.split("/")[0] for name in files(there)} == {"block3", "image_digest", "key_hash", "zarr.json"}
    assert verify(there).sound
    assert len(left(tmp_path)) == 1  # to be gone on with
    with writable_store(url, storage(tmp_path)) as place:
        assert StoreWriter(place).committed_chunks("block1").tolist() == [True, True, False, False]
        layer, maps = StoreWriter(place).layer("block1"), random_maps()
        for chunk in (2, 3):
            StoreWriter(place).write_chunk("block1", chunk, maps[layer.rows(chunk)])
        StoreWriter(place).mark_complete("block1", word_statistics([maps], 5), NearestSearch(5).result())
    assert open_store(there).layers == ("block3", "block1")
    assert verify(there).sound
    assert left(tmp_path) == []


def test_remote_write_does_not_take_layers_from_readers(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    put(made(tmp_path / "made.zarr"), url, tmp_path)
    watched.sent.clear()
    with pytest.raises(MismatchError, match=r"^block3/zarr.json of file.* is a layer that .* has no more as a whole"):
        write(url, storage(tmp_path), lambda place: StoreWriter(place).discard_chunks("block3", [1]))
    assert watched.sent == []
    assert verify(there).sound


def test_remote_write_goes_on_only_from_stores_that_are_whole(
    watched: Watched, there: Path, url: Path, tmp_path: Path
) -> None:
    made(there)
    StoreWriter(there).discard_chunks("block3", [1])
    with pytest.raises(MismatchError, match=r"^layer 'block3' of word store file.* is not complete; finish it where"):
        write(url, storage(tmp_path), never)
    path = there / "zarr.json"
    value = json.loads(path.read_text())
    value["attributes"]["uploading"] = "node7"
    path.write_text(json.dumps(value))
    with pytest.raises(MismatchError, match=r"is half uploaded by machine node7; wait for .* or give the same"):
        write(url, storage(tmp_path), never)
    (there / "zarr.json").write_text("{}")
    with pytest.raises(MismatchError, match="is a Zarr group but not a bowstore word store; name another URL"):
        write(url, storage(tmp_path), never)
    assert left(tmp_path) == []


def test_remote_write_of_a_damaged_working_copy(
    watched: Watched, there: Path, url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path / "made.zarr")

    def damage(place: Path, name: str) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(store, place)
        (place / name).unlink()

    for name in ("block3/words/c/2/0/0", "block3/words/zarr.json"):
        with pytest.raises(CorruptError, match=rf"lacks .*{name}; run `bowstore verify --repair` on it"):
            write(url, storage(tmp_path), partial(damage, name=name))
    chunk = "block3/words/c/2/0/0"
    place = next((tmp_path / "cache" / "writing").glob("*/words.zarr"))

    def change(_name: str) -> None:
        (place / chunk).write_bytes(b"other")

    monkeypatch.setattr(folder, "PARALLEL", 1)
    watched.before = change
    with pytest.raises(MismatchError, match=r"c/2/0/0 changed while it was uploaded; run the same command again"):
        put(store, url, tmp_path)
    watched.before = lambda name: None
    put(store, url, tmp_path)
    assert files(there) == files(store)


def test_remote_write_is_never_evicted(watched: Watched, there: Path, url: Path, tmp_path: Path) -> None:
    store = made(tmp_path / "made.zarr")
    size_bytes = sum(map(len, files(store).values()))
    settings = storage(tmp_path, cache_gb=2.5 * size_bytes / 1e9)

    def fill(place: Path) -> None:
        shutil.copytree(store, place)
        with pytest.raises(
            UsageError, match=r"^word store file.* has .* MB, and the cache .* may hold .*; raise storage"
        ):
            reserve_room(place, 3 * size_bytes)
        with pytest.raises(
            BowstoreError, match=r"^word store file.* needs .* in use \(.* MB by stores in .*writing that are not"
        ):
            reserve_room(place, 2 * size_bytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(url, settings, fill)
    with pytest.raises(BowstoreError, match="are not uploaded yet"):
        cache.make_room(2 * size_bytes, "x", settings)
    put(store, url, tmp_path)
    assert left(tmp_path) == []
    cache.make_room(2 * size_bytes, "x", settings)  # once it is uploaded it is a copy as others
    assert not list((tmp_path / "cache").rglob("words"))


def test_remote_write_shares_files_with_the_caches_copy(
    watched: Watched, there: Path, url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(made(tmp_path / "made.zarr"), url, tmp_path)
    (copy,) = (tmp_path / "cache" / "remote").glob("*/*.zarr")
    before, size_bytes = files(copy), cache._taken(tmp_path / "cache")
    with writable_store(url, storage(tmp_path)) as place:
        assert cache._taken(tmp_path / "cache") < 1.1 * size_bytes + 5000
        add_layer(place)
    assert files(copy) == before  # whoever has it open goes on with it

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with writable_store(url, storage(tmp_path)) as place:
        assert files(place) == files(there)
    assert left(tmp_path) == []


def test_remote_write_on_a_full_disk(
    watched: Watched, there: Path, url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path / "made.zarr")
    put(store, url, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"^no space left on the disk of .*writing.*; free some and run the same command again: nothing is lost$"
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(BowstoreError, match=message):
            write(url, storage(tmp_path), never)
    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", full)
        with pytest.raises(BowstoreError, match=message):
            write(url, storage(tmp_path), add_layer)
    (place,) = (tmp_path / "cache" / "writing").glob("*/words.zarr")
    expected = files(place)
    with writable_store(url, storage(tmp_path)) as place:
        assert files(place) == expected
    assert files(there) == expected


def test_remote_write_names_the_url_in_errors(watched: Watched, url: Path, work: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"file://.*there/words\.zarr"):
        run_encode(work, url, append=True, layers=(), num_words=(), tmp_path=tmp_path)
    assert left(tmp_path) == []
    assert writing._OPEN == {}


def test_remote_record_survives_a_torn_line(tmp_path: Path) -> None:
    path, one, two = tmp_path / "record", "1" * 32, "2" * 32
    record = Record(path)
    record.add("a/b c", one)
    record.begin([("zarr.json", two), ("zarr.json", one)])
    record.add("zarr.json", one)
    with open(path, "a") as file:
        file.write(f"{two[:7]}")
    again = Record(path)
    assert again.files == {"a/b c": one, "zarr.json": one}
    assert again.begun == {"zarr.json": {one, two}}
    assert again.may_be("zarr.json", two)
    assert not again.may_be("a/b c", two)
    again.replace({"x": two})
    assert (Record(path).files, Record(path).begun) == ({"x": two}, {})
