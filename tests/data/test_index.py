import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from safetensors.numpy import load_file
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar
from tar_files import JPEG, flip

from bowstore.data.index import INDEX_FILE, build_index, open_index
from bowstore.data.reader import ShardReader
from bowstore.data.table import COLUMNS, write_table
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError


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


def test_dalis_own_reader_takes_shards(make_shard_set: ShardMaker) -> None:
    from nvidia.dali import Pipeline, fn, types

    index = make_shard_set(8, per_shard=8)
    pipe = Pipeline(batch_size=8, num_threads=1, device_id=None)
    with pipe:
        tar = str(index.root / "train-000000.tar")
        data, label = fn.readers.webdataset(
            paths=tar, ext=["jpg", "cls"],
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


def test_duplicate_keys_are_counted_with_examples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x/1", JPEG, 0), ("x/2", JPEG, 0)])
    write_tar(tmp_path / "b.tar", [("x/2", JPEG, 0)])
    with pytest.raises(DataError, match=r"1 keys occur more than once, for example \['x/2', 'x/2'\]"):
        build_index(tmp_path)
    write_tar(tmp_path / "b.tar", [("x/3", JPEG, 0), ("x/4", JPEG, 0), ("x/3", JPEG, 0)])
    with pytest.raises(DataError, match=r"b\.tar: member 'x/3\.jpg' at byte \d+ has a key that occurs twice, 'x/3'"):
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


def test_the_columns_have_a_digest(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(10)
    open_index(index.root)
    path = index.root / INDEX_FILE
    whole = path.read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    for offset in range(8 + header_bytes, len(whole), 61):
        flip(path, offset, offset % 8)
        with pytest.raises(CorruptError, match="its columns differ from their digest"):
            open_index(index.root)
        path.write_bytes(whole)


def test_a_flipped_bit_in_the_header_of_an_index_is_found(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(10)
    path = index.root / INDEX_FILE
    whole = path.read_bytes()
    for offset in range(0, 8 + int.from_bytes(whole[:8], "little"), 5):
        flip(path, offset, offset % 8)
        with pytest.raises(DataError, match=r"is damaged|has format"):
            open_index(index.root)
        path.write_bytes(whole)


def test_the_file_is_plain_safetensors(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(50, per_shard=20)
    columns = load_file(index.root / INDEX_FILE)
    for name in COLUMNS:
        assert np.array_equal(columns[name], getattr(index, name)), name
    assert index.digest.tolist() == [
        xxhash.xxh3_64_intdigest(data.tobytes()) for data in ShardReader(index).read(np.arange(50))
    ]


def test_processes_find_what_one_finds(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(50, per_shard=10)
    alone = (index.root / INDEX_FILE).read_bytes()
    again = build_index(index.root, classes=index.classes, workers=2)
    assert (index.root / INDEX_FILE).read_bytes() == alone
    assert again.fingerprint == index.fingerprint
    os.truncate(index.root / "train-000003.tar", 5000)
    with pytest.raises(CorruptError, match=r"train-000003\.tar is cut.*of 5000"):
        build_index(index.root, workers=2)


def test_a_script_without_a_guard_is_not_run_again(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    index = make_shard_set(20, per_shard=10)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; from bowstore.data.index import build_index\n"
        "print('run'); print(build_index(Path(sys.argv[1]), workers=2).fingerprint)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), str(index.root)], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == ["run", index.fingerprint]


def test_a_large_index_opens_at_once_and_in_shared_memory(tmp_path: Path) -> None:
    """ImageNet: 1.28 million rows in 313 shards, which are there with the right sizes (and nothing in them)."""
    rows, shards, size_bytes = 1_281_167, 313, 480_000_000
    write_large_index(tmp_path, rows, shards, size_bytes)
    for number in range(shards):
        (tmp_path / f"train-{number:06d}.tar").touch()
        os.truncate(tmp_path / f"train-{number:06d}.tar", size_bytes)
    result = subprocess.run(
        [sys.executable, "-c", OPEN_AND_TOUCH, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    opening, checking, private, count = map(float, result.stdout.split())
    assert count == rows
    assert opening < 0.5, f"opened in {opening:.3f} s"
    assert checking < 2, f"digest of the columns in {checking:.3f} s"
    assert private < 50e6, f"{private / 1e6:.0f} MB of private memory for opening and reading all columns"


# What the process owns alone: the columns are pages of the file, which all ranks share.
OPEN_AND_TOUCH = """
import re, sys, time
from pathlib import Path
from bowstore.data.index import check_columns, open_index

def private():
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(number) for number in re.findall(r"Private_Dirty: +(\\d+)", text))

before, start = private(), time.perf_counter()
index = open_index(Path(sys.argv[1]))
opened = time.perf_counter()
check_columns(index)
print(opened - start, time.perf_counter() - opened, private() - before, len(index))
"""


def write_large_index(root: Path, rows: int, shards: int, size_bytes: int) -> None:
    """An index of rows with made-up places, as building writes it."""
    pieces = {
        "key_start": np.arange(rows + 1) * 19,
        "shard": (np.arange(rows) * shards // rows).astype(np.int32),
        "key_bytes": np.zeros(19 * rows, np.uint8),
    }
    columns = {name: pieces.get(name, np.arange(512, rows + 512).astype(dtype)) for name, dtype in COLUMNS.items()}
    meta = {
        "version": 2,
        "fingerprint": "f" * 32,
        "classes": [],
        "image_ext": [],
        "label_field": None,
        "shards": [[f"train-{n:06d}.tar", rows // shards, size_bytes, "d" * 32] for n in range(shards)],
    }
    lengths = {name: len(column) for name, column in columns.items()}
    write_table(root / INDEX_FILE, meta, lengths, lambda name: iter([columns[name]]))


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
    path.write_bytes(path.read_bytes().replace(json.dumps('{"version": 2')[1:-1].encode(), rb"{\"version\": 9"))
    with pytest.raises(MismatchError, match="has format 9, this bowstore reads 2"):
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
