"""Two ways to the same bytes: memory maps and pread; neither hands out another sample's, nor dies of a cut tar."""

import dataclasses
import io
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.config import StorageConfig
from bowstore.data import reader
from bowstore.data.index import Index, build_index
from bowstore.data.reader import ShardReader, is_network, open_limit, read_mode, touch
from bowstore.data.workers import prefetched
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError

WAYS = pytest.mark.parametrize("way", ["mmap", "pread"])


def reading(index: Index, way: str, threads: int = 4) -> ShardReader:
    return ShardReader(dataclasses.replace(index, storage=StorageConfig(read=way, read_threads=threads)))


def images(index: Index) -> dict[str, bytes]:
    """All images by key, as Python's tarfile reads them."""
    found = {}
    for entry in index.shards:
        with tarfile.open(index.root / entry.name) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    found[member.name.removesuffix(".jpg")] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return found


def descriptors(folder: Path) -> list[str]:
    """Open tars of this process below a folder."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return [link for link in links if link.startswith(str(folder)) and link.endswith(".tar")]


@WAYS
def test_both_ways_give_the_bytes_of_the_tar(make_shard_set: ShardMaker, way: str) -> None:
    index = make_shard_set(90)
    expected = images(index)
    rows = np.random.default_rng(0).permutation(90)
    found = reading(index, way).read(rows)
    assert [data.tobytes() for data in found] == [expected[index.key(row)] for row in rows.tolist()]
    assert {data.dtype for data in found} == {np.dtype(np.uint8)}
    assert reading(index, way).read(rows[:0]) == []


@WAYS
def test_photographs_larger_than_a_page_are_whole(tmp_path: Path, way: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    write_tar(tmp_path / "a.tar", [(f"k{n}", encode_jpeg(noise[n:]), None) for n in range(9)])
    index = build_index(tmp_path)
    assert index.size.min() > 10 * 4096
    expected = images(index)
    for row, data in enumerate(reading(index, way).read(np.arange(9))):
        assert data.tobytes() == expected[index.key(row)]


@WAYS
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_compared_too(tmp_path: Path, way: str, form: int) -> None:
    keys = [f"{'folder/' * 16}{n:05d}" for n in range(3)] + ["x" * 96, "x" * 97 + "/yy", "short"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        for number, key in enumerate(keys):
            data = encode_jpeg(textured_image(number, 20, 20))
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size, info.mtime = len(data), 0
            archive.addfile(info, io.BytesIO(data))
    index = build_index(tmp_path)
    expected = images(index)
    assert [data.tobytes() for data in reading(index, way).read(np.arange(6))] == [expected[k] for k in index.keys()]


@WAYS
def test_a_tar_with_other_members_is_refused(make_shard_set: ShardMaker, way: str) -> None:
    index = make_shard_set(6, size=64)
    tar = index.root / index.shards[0].name
    data = bytearray(tar.read_bytes())
    header = int(index.offset[2]) - 512
    data[header : header + 100] = b"c9/99999.jpg".ljust(100, b"\0")
    tar.write_bytes(data)
    source = reading(index, way)
    assert len(source.read(np.array([0, 1, 3]))) == 3
    offset = int(index.offset[2])
    message = rf"train-000000\.tar holds 'c9/99999\.jpg' at byte {offset}, the index says 'c2/00002': the tar changed"
    with pytest.raises(MismatchError, match=message):
        source.read(np.arange(6))


@WAYS
def test_every_flipped_bit_of_an_image_is_refused_by_its_name(make_shard_set: ShardMaker, way: str) -> None:
    index = make_shard_set(6, size=64)
    tar = index.root / index.shards[0].name
    whole, start, size = tar.read_bytes(), int(index.offset[2]), int(index.size[2])
    for byte in [*range(0, size, 97), size - 1]:
        data = bytearray(whole)
        data[start + byte] ^= 1 << byte % 8
        tar.write_bytes(data)
        source = reading(index, way)
        assert len(source.read(np.array([0, 1, 3]))) == 3
        place = rf"image 'c2/00002' in shard .*train-000000\.tar \(bytes {start}-{start + size - 1}\)"
        with pytest.raises(CorruptError, match=rf"{place} differs from its digest .* `bowstore verify --repair .*`"):
            source.read(np.arange(6))


@WAYS
def test_a_key_that_only_begins_alike_is_refused(make_shard_set: ShardMaker, way: str) -> None:
    index = make_shard_set(3)
    tar = index.root / index.shards[0].name
    data, header = bytearray(tar.read_bytes()), int(index.offset[1]) - 512
    data[header : header + 13] = b"c1/000011.jpg"
    tar.write_bytes(data)
    with pytest.raises(MismatchError, match=r"holds 'c1/000011\.jpg' .* the index says 'c1/00001'"):
        reading(index, way).read(np.array([1]))
    data[header : header + 13] = b"c1/00001.jpg\0"
    data[header + 345 : header + 348] = b"far"  # a prefix: another folder
    tar.write_bytes(data)
    with pytest.raises(MismatchError, match=r"holds 'far/c1/00001\.jpg' .* the index says 'c1/00001'"):
        reading(index, way).read(np.array([1]))


@WAYS
def test_a_tar_that_is_cut_while_in_use_is_an_error(make_shard_set: ShardMaker, way: str) -> None:
    index = make_shard_set(40, size=96)
    source, tar = reading(index, way), index.root / index.shards[0].name
    source.read(np.arange(40))
    end = int(index.offset[20])
    os.truncate(tar, end)
    assert len(source.read(np.arange(19))) == 19
    with pytest.raises(MismatchError, match=rf"ends at byte {end}, within image '.*' \(to byte .*\): it was cut while"):
        source.read(np.array([3, 30]))
    with pytest.raises(MismatchError, match=rf"has {end} bytes, the index says .*: it changed after indexing; restore"):
        reading(index, way).read(np.array([3]))
    tar.unlink()
    with pytest.raises(MissingError, match=r"train-000000\.tar is gone; restore it"):
        reading(index, way).read(np.array([3]))


@WAYS
def test_open_tars_have_a_bound(
    make_shard_set: ShardMaker, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make_shard_set(60, per_shard=2)
    monkeypatch.setattr(reader, "_MAX_OPEN", 5)
    source, expected = reading(index, way), images(index)
    for seed in range(4):
        rows = np.random.default_rng(seed).permutation(60)[:16]
        found = source.read(rows)
        assert [data.tobytes() for data in found] == [expected[index.key(row)] for row in rows.tolist()]
        del found
        assert len(descriptors(tmp_path)) <= 5
    source.read(np.arange(60))
    del source
    assert not descriptors(tmp_path)


def test_open_tars_leave_room_for_other_files(make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 4096))
    assert open_limit(make_shard_set(3)) == 128


def test_pread_reads_many_at_once(make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_shard_set(40)
    expected, together, preadv = images(index), threading.Barrier(4), os.preadv
    monkeypatch.setattr(reader, "_read_cached", lambda *place: False)

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        together.wait(timeout=10)  # passes only if four threads are here
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    found = reading(index, "pread", threads=4).read(np.arange(40))
    assert [data.tobytes() for data in found] == [expected[key] for key in index.keys()]


def test_pread_goes_on_after_short_reads(make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_shard_set(10)
    expected, preadv = images(index), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *place: preadv(fd, [buffers[0][:300]], *place))
    found = reading(index, "pread").read(np.arange(10))
    assert [data.tobytes() for data in found] == [expected[key] for key in index.keys()]


def test_pread_failures_name_the_place(make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_shard_set(10)

    def fail(*place: object) -> int:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DataError, match=r"train-000000\.tar cannot be read at byte \d+ \(Stale file handle\); check"):
        reading(index, "pread").read(np.arange(10))


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /data rw - nfs4 server:/data rw
31 30 254:1 / /data/fast rw - xfs /dev/vdb rw
32 22 0:41 / /my\\040cloud rw - fuse.s3fs s3fs rw
33 22 254:2 / /usb rw - fuseblk /dev/sdb rw
34 22 0:42 / /twice rw - lustre a rw
35 22 254:3 / /twice rw - ext4 /dev/vdc rw
36 22 0:43 / /database rw shared:1 master:2 - 9p host rw
"""


@pytest.mark.parametrize(
    ("folder", "network"),
    [
        ("/home/me/shards", False),
        ("/data", True),
        ("/data/shards", True),
        ("/data/fast/shards", False),
        ("/datas", False),
        ("/my cloud/shards", True),
        ("/usb/shards", False),
        ("/twice/shards", False),
        ("/database", True),
    ],
)
def test_network_file_systems_are_known(tmp_path: Path, folder: str, network: bool) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert is_network(Path(folder), tmp_path / "mountinfo") is network


def test_where_there_is_no_table_of_mounts_disks_are_local(tmp_path: Path) -> None:
    assert not is_network(tmp_path, tmp_path / "none")


def test_auto_goes_by_the_file_system(make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_shard_set(3)
    assert index.storage.read == "auto"
    for network, way in ((False, "mmap"), (True, "pread")):
        monkeypatch.setattr(reader, "is_network", lambda folder, network=network: network)
        assert read_mode(index) == way
    assert read_mode(dataclasses.replace(index, storage=StorageConfig(read="mmap"))) == "mmap"


def test_touching_reaches_the_last_page_and_bears_empty_images() -> None:
    touch([np.empty(0, np.uint8), np.zeros(1, np.uint8), np.zeros(2 * 4096 + 1, np.uint8)])


def test_jobs_run_ahead_in_order() -> None:
    done: list[int] = []

    def job(number: int) -> int:
        done.append(number)
        return number

    results = prefetched(((lambda n=n: job(n)) for n in range(9)), 3)
    assert next(results) == 0
    assert list(results) == list(range(1, 9))
    assert done == list(range(9))


def test_names_with_a_leading_dot_are_read_under_their_keys(tmp_path: Path) -> None:
    """GNU tar writes ./a/1.jpg where it packs the folder itself; the key is a/1."""
    data = encode_jpeg(textured_image(1, 20, 20))
    write_tar(tmp_path / "s-0.tar", [("./a/1", data, 3), ("./a/2", data, 4)])
    index = build_index(tmp_path)
    assert list(index.keys()) == ["a/1", "a/2"]
    assert [block.tobytes() for block in ShardReader(index).read(np.arange(2))] == [data, data]
