import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.data.index import INDEX_FILE, build_index, check_digests, open_index
from bowstore.data.reader import ShardReader
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError

JPEG = encode_jpeg(textured_image(1, 20, 30))


def test_columns(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(50, per_shard=20)
    assert len(index) == 50
    assert [entry.samples for entry in index.shards] == [20, 20, 10]
    assert index.classes == ("c0", "c1", "c2", "c3")
    assert index.key(0) == "c0/00000"
    assert list(index.keys())[49] == "c1/00049"
    assert index.label.tolist() == [n % 4 for n in range(50)]
    assert index.height.tolist() == [32 + n % 5 for n in range(50)]
    assert index.width.tolist() == [32 + n % 3 for n in range(50)]
    assert not index.offset.flags.writeable
    for row in (0, 19, 20, 49):
        (data,) = ShardReader(index).read(np.array([row]))
        assert data.tobytes() == encode_jpeg(textured_image(row, 32 + row % 5, 32 + row % 3))


def test_the_fingerprint_depends_on_keys_order_and_bytes(make_shard_set: ShardMaker) -> None:
    first = make_shard_set(20, folder="a")
    assert first.fingerprint == make_shard_set(20, folder="b").fingerprint
    assert first.fingerprint != make_shard_set(19, folder="c").fingerprint
    assert first.fingerprint != make_shard_set(20, folder="d", size=33).fingerprint


def test_the_dali_index_is_what_dali_itself_writes(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(6, per_shard=3)
    tar = index.root / "train-000001.tar"
    with tarfile.open(tar) as archive:
        members = {info.name: (info.offset_data, info.size) for info in archive}
    lines = tar.with_suffix(".idx").read_text().splitlines()
    assert lines[0] == "v1.2 3"
    for line in lines[1:]:
        words = line.split()
        for extension, offset, size, name in zip(*[iter(words)] * 4, strict=True):
            assert members[name] == (int(offset), int(size))
            assert name.endswith("." + extension)


def test_dalis_own_reader_takes_shards_and_index(make_shard_set: ShardMaker) -> None:
    from nvidia.dali import Pipeline, fn, types

    index = make_shard_set(8, per_shard=8)
    pipe = Pipeline(batch_size=8, num_threads=1, device_id=None)
    with pipe:
        tar = str(index.root / "train-000000.tar")
        data, label = fn.readers.webdataset(
            paths=tar, index_paths=tar.replace(".tar", ".idx"), ext=["jpg", "cls"],
            missing_component_behavior="error", dtypes=[types.UINT8, types.UINT8],
        )  # fmt: skip
        pipe.set_outputs(data, label)
    data, label = pipe.run()
    for row in range(8):
        (expected,) = ShardReader(index).read(np.array([row]))
        assert np.array_equal(data.at(row), expected)
        assert bytes(label.at(row)) == str(row % 4).encode()


def test_shards_of_the_webdataset_package_are_taken_as_they_are(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x-000000.tar")) as writer:  # its default: PAX headers
        for number in range(5):
            writer.write({"__key__": f"{number:04d}", "jpg": JPEG, "cls": number, "json": {"a": "b"}})
    index = build_index(tmp_path)
    assert index.label.tolist() == [0, 1, 2, 3, 4]
    assert (index.height == 20).all()
    assert all(data.tobytes() == JPEG for data in ShardReader(index).read(np.arange(5)))


def test_opening_is_lazy_and_shared(make_shard_set: ShardMaker) -> None:
    index = open_index(make_shard_set(30).root)
    assert isinstance(index.offset.base, np.memmap) or isinstance(index.offset, np.memmap)


@pytest.mark.parametrize("cut", range(1, 20, 3))
def test_a_cut_tar_is_named_with_the_byte(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}", JPEG, n) for n in range(5)])
    os.truncate(tmp_path / "a.tar", 512 * cut)
    with pytest.raises(CorruptError, match=r"a\.tar (is cut|is not a whole tar).*of \d+"):
        build_index(tmp_path)


def test_a_zeroed_block_that_hides_the_rest_is_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}", JPEG, n) for n in range(5)])
    with tarfile.open(tmp_path / "a.tar") as archive:
        offset = archive.getmembers()[4].offset
    with open(tmp_path / "a.tar", "r+b") as file:
        file.seek(offset)
        file.write(bytes(1024))
    with pytest.raises(CorruptError, match=rf"zeroed block at byte {offset}"):
        build_index(tmp_path)


def hostile(tmp_path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.size = len(JPEG) if kind == tarfile.REGTYPE else 0
        info.linkname = "/etc/passwd"
        archive.addfile(info, io.BytesIO(JPEG))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.jpg", "climbs out"),
        ("/a.jpg", "climbs out"),
        ("a b.jpg", "without white space"),
        ("b\u00e4r.jpg", "without white space"),
        ("noextension", "is not <key>.<extension>"),
        ("dir.with.dots/a.jpg", "other dots"),
    ],
)
def test_names_that_break_the_key_contract_are_refused(tmp_path: Path, name: str, message: str) -> None:
    hostile(tmp_path, name)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    hostile(tmp_path, "a.jpg", kind)
    with pytest.raises(DataError, match="is a link or a device"):
        build_index(tmp_path)


def test_duplicate_keys_are_counted_with_examples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x/1", JPEG, 0), ("x/2", JPEG, 0)])
    write_tar(tmp_path / "b.tar", [("x/2", JPEG, 0)])
    with pytest.raises(DataError, match=r"1 keys occur more than once, for example \['x/2', 'x/2'\]"):
        build_index(tmp_path)
    write_tar(tmp_path / "b.tar", [("x/3", JPEG, 0), ("x/4", JPEG, 0), ("x/3", JPEG, 0)])
    with pytest.raises(DataError, match="key 'x/3' occurs twice"):
        build_index(tmp_path)


def test_samples_without_one_readable_image_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x", b"<html>", 0)])
    with pytest.raises(DataError, match=r"image 'x\.jpg' has no readable header"):
        build_index(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("x.txt")
        archive.addfile(info)
    with pytest.raises(DataError, match=r"sample 'x' has 0 images, not one \(members: x\.txt\)"):
        build_index(tmp_path)


def test_a_label_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("x.jpg", JPEG), ("x.cls", b"cat")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"label 'x\.cls' holds b'cat', not a whole number"):
        build_index(tmp_path)


def test_missing_folders_and_indexes_say_what_to_do(tmp_path: Path, make_shard_set: ShardMaker) -> None:
    with pytest.raises(MissingError, match=r"no folder .*nowhere"):
        build_index(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"no \*\.tar file in .*empty"):
        build_index(tmp_path / "empty")
    with pytest.raises(MissingError, match=r"no index in .*empty; run `bowstore index"):
        open_index(tmp_path / "empty")
    make_shard_set(4, folder="shards/train")
    with pytest.raises(MissingError, match=r"did you mean .*train\?"):
        open_index(tmp_path / "shards")


def test_shards_changed_after_indexing_are_refused(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(10, per_shard=5)
    tar = index.root / "train-000001.tar"
    with open(tar, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(MismatchError, match=r"train-000001\.tar has \d+ bytes, the index says \d+"):
        open_index(index.root)
    tar.unlink()
    with pytest.raises(MissingError, match=r"train-000001\.tar is in the index but not on disk"):
        open_index(index.root)


def test_a_flipped_bit_is_found_by_digest(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(10, per_shard=5)
    tar = index.root / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    assert check_digests(open_index(index.root)) == [f"shard {tar}: bytes changed after indexing (digest differs)"]


def test_a_permuted_tar_with_its_old_index_is_refused_at_the_first_read(tmp_path: Path) -> None:
    samples = [(f"k/{n}", JPEG, 0) for n in range(6)]
    write_tar(tmp_path / "a.tar", samples)
    build_index(tmp_path)
    write_tar(tmp_path / "a.tar", samples[::-1])
    with pytest.raises(MismatchError, match=r"holds 'k/5\.jpg' at byte 512, the index says 'k/0'"):
        ShardReader(open_index(tmp_path)).read(np.array([0]))


def test_a_damaged_index_is_refused(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(10)
    path = index.root / INDEX_FILE
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:200], whole[: len(whole) - 10], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"is damaged .*run `bowstore index"):
            open_index(index.root)


def test_another_index_format_is_refused(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(10)
    path = index.root / INDEX_FILE
    path.write_bytes(path.read_bytes().replace(json.dumps('{"version": 1')[1:-1].encode(), rb"{\"version\": 9"))
    with pytest.raises(MismatchError, match="has format 9, this bowstore reads 1"):
        open_index(index.root)


def test_keys_longer_than_a_tar_header_are_read(tmp_path: Path) -> None:
    keys = ["d" * 60 + "/" + "e" * 60 + str(n) for n in range(3)]
    write_tar(tmp_path / "a.tar", [(key, JPEG, None) for key in keys])
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("f" * 130 + ".jpg")
        info.size = len(JPEG)
        archive.addfile(info, io.BytesIO(JPEG))
    index = build_index(tmp_path)
    assert list(index.keys()) == [*keys, "f" * 130]
    assert len(ShardReader(index).read(np.arange(4))) == 4
    shutil.rmtree(tmp_path)
