"""The Python archives of CIFAR: pixels, labels and names as published; hostile and damaged pickles refused."""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_sets import (
    cifar10_files,
    cifar100_files,
    cifar_pixels,
    classes_of,
    list_splits,
    python2_pickle,
    shards_of,
    write_cifar,
    write_file,
)

from bowstore.data.config import ShardsConfig
from bowstore.data.shards import make_shards
from bowstore.data.sources import Source, open_source
from bowstore.data.sources.plain_pickle import read_plain_pickle
from bowstore.errors import CorruptError, DataError, MissingError

FOLDER_10, FOLDER_100 = "cifar-10-batches-py", "cifar-100-python"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_cifar(tmp_path / "cifar-10-python.tar.gz", FOLDER_10, cifar10_files())


def _extracted(root: Path, folder: str, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        write_file(root / folder / name, data)
    return root / folder


def test_cifar10_archive_to_shards(archive: Path, tmp_path: Path) -> None:
    found = shards_of(archive, tmp_path / "out", per_shard=4)
    assert {split: len(samples) for split, samples in found.items()} == {"train": 15, "test": 3}
    assert classes_of(tmp_path / "out/train") == classes_of(tmp_path / "out/test") == ("plane", "car", "bird")
    for batch in range(6):
        for row, expected in enumerate(cifar_pixels(3, batch)):
            sample = found["train" if batch < 5 else "test"][f"thing_s_{batch:02d}{row:04d}"]
            assert sample.label == (batch + row) % 3
            with Image.open(io.BytesIO(sample.data)) as image:
                assert (image.format, image.mode) == ("PNG", "RGB")
                pixels_HWC = np.asarray(image)
            np.testing.assert_array_equal(pixels_HWC.transpose(2, 0, 1).ravel(), expected)


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    folder = _extracted(tmp_path, FOLDER_100, cifar100_files())
    found = shards_of(folder, tmp_path / "out")
    assert {key: sample.label for key, sample in found["train"].items()} == {
        "train_s_000000": 0,
        "train_s_000001": 1,
        "train_s_000002": 2,
        "train_s_000003": 0,
    }
    assert classes_of(tmp_path / "out/test") == ("apple", "bear", "clock")


def test_packed_and_extracted_are_the_same_source(archive: Path, tmp_path: Path) -> None:
    folder = _extracted(tmp_path / "x", FOLDER_10, cifar10_files())
    make_shards(archive, tmp_path / "out", ShardsConfig(workers=1))
    for source in (
        folder,
        folder.parent,
        write_file(tmp_path / "y" / archive.name, archive.read_bytes()).parent,
    ):
        assert [report.new for report in make_shards(source, tmp_path / "out", ShardsConfig(workers=1))] == [
            False,
            False,
        ]


def test_workers_write_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        make_shards(archive, tmp_path / f"out{workers}", ShardsConfig(per_shard=5, workers=workers))
    for path in (tmp_path / "out1").rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out2" / path.relative_to(tmp_path / "out1")).read_bytes()


def test_file_names_that_come_twice_have_keys_of_their_own(tmp_path: Path) -> None:
    files = cifar100_files()
    value = pickle.loads(files["train"], encoding="bytes")  # a pickle of the test's own
    value[b"filenames"] = ["same.png"] * 4
    folder = _extracted(tmp_path, FOLDER_100, files | {"train": pickle.dumps(value, protocol=2)})
    train, _ = list_splits(folder)
    assert len({image.key for image in train.images}) == 4
    assert all(image.key.startswith("same-") for image in train.images)


def test_arrays_in_column_order_are_read_as_they_are() -> None:
    pixels_ND = cifar_pixels(3, 0)
    pickled = pickle.dumps({"data": np.asfortranarray(pixels_ND)}, protocol=2)
    np.testing.assert_array_equal(read_plain_pickle(pickled, PurePath("batch"))["data"], pixels_ND)


def test_pixels_that_change_after_listing(tmp_path: Path) -> None:
    folder = _extracted(tmp_path, FOLDER_10, cifar10_files())
    train, _ = list_splits(folder)
    _extracted(tmp_path, FOLDER_10, cifar10_files(seed=9))
    with pytest.raises(
        DataError, match=r"data_batch_1/thing_s_000000\.png has other pixels .*: the source is changing"
    ):
        open_source(Source(folder, "cifar10"))(train.images[0])


class _Evil:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch pwned",), r"posix\.system"),
        (exec, ("open('pwned', 'w')",), r"builtins\.exec|__builtin__\.exec"),
        (getattr, ("", "join"), r"builtins\.getattr|__builtin__\.getattr"),
        (np.fromfile, ("pwned",), r"numpy\.fromfile|numpy\._core.*"),
    ],
)
def test_hostile_pickles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, arguments: tuple[object, ...], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(2, 6):
        evil = pickle.dumps({"data": _Evil(function, *arguments)}, protocol=protocol)
        archive = write_cifar(tmp_path / "cifar-10-python.tar.gz", FOLDER_10, cifar10_files() | {"data_batch_2": evil})
        with pytest.raises(
            DataError, match=rf"data_batch_2 is a pickle that asks for '({name})', which no CIFAR file"
        ) as e:
            make_shards(archive, tmp_path / "out")
        assert len(str(e.value).splitlines()) == 1
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps([1]), "it holds list, not a dictionary"),
        (b"", "EOFError"),
        (python2_pickle({"a": 1})[:-3], "EOFError|unpack requires .*"),
        (pickle.dumps({"data": np.zeros((2, 2), np.int64)}, protocol=4), "array of type .*, not plain uint8"),
        (pickle.dumps({"data": np.array([object()])[:0]}, protocol=2), "array of type 'O8', not plain uint8"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "text in 'rot13', not Latin-1"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01tb.", "not enough values to unpack.*"),
        (b"\x80\x02\x8a\xff.", ".+"),
        (b"\x80\x02}r\xff\xff\xff\x7f", "EOFError"),  # the C unpickler would take 32 GB for the place 2^31 - 1
    ],
)
def test_pickles_of_another_make_are_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptError, match=rf"^batch is no CIFAR batch: ({reason}); fetch the archive anew$"):
        read_plain_pickle(data, PurePath("batch"))


def _damaged(name: str, **changes: Any) -> dict[str, bytes]:
    files = cifar10_files()
    value = {
        "labels": [0, 1, 2],
        "data": cifar_pixels(3, 0),
        "filenames": ["a.png", "b.png", "c.png"],
        **changes,
    }
    return files | {name: pickle.dumps({key: item for key, item in value.items() if item is not None}, protocol=2)}


_NOT_FIT = r"pixels \(data\) and labels are not those of 3 images of 3 classes"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": cifar_pixels(2, 0)}, _NOT_FIT),
        ({"data": None}, _NOT_FIT),
        ({"labels": [0, 1]}, _NOT_FIT),
        ({"labels": [0, 1, 3]}, _NOT_FIT),
        ({"labels": [0, True, -1]}, _NOT_FIT),
        ({"filenames": None}, "has no list of names"),
        ({"filenames": [1, 2, 3]}, "has no list of names"),
    ],
)
def test_batches_whose_parts_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = _extracted(tmp_path, FOLDER_10, _damaged("data_batch_3", **changes))
    with pytest.raises(CorruptError, match=rf"data_batch_3:? {message}; fetch the archive anew"):
        list_splits(folder)


def test_archives_that_are_not_whole(archive: Path, tmp_path: Path) -> None:
    files = cifar10_files()
    part = write_cifar(tmp_path / "part/cifar-10-python.tar.gz", FOLDER_10, dict(list(files.items())[:2]))
    with pytest.raises(
        MissingError, match=r"gz has no batches\.meta, data_batch_3, data_batch_4, data_batch_5, test_batch; fetch"
    ):
        list_splits(part)
    data = archive.read_bytes()
    cut = write_file(tmp_path / "cut/cifar-10-python.tar.gz", data[: len(data) // 2])
    with pytest.raises(CorruptError, match=r"cut/cifar-10-python\.tar\.gz is cut or damaged: .*; fetch it anew"):
        list_splits(cut)
    flipped = gzip.compress(b"no tar" * 999)
    with pytest.raises(CorruptError, match=r"flip/cifar-10-python\.tar\.gz is cut or damaged: .*; fetch it anew"):
        list_splits(write_file(tmp_path / "flip/cifar-10-python.tar.gz", flipped))
    with pytest.raises(
        MissingError, match=r"is not cifar-100-python\.tar\.gz and holds neither it nor cifar-100-python;"
    ):
        list_splits(tmp_path, "cifar100")


def test_links_in_the_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"{FOLDER_10}/batches.meta")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"member 'cifar-10-batches-py/batches\.meta' is no file of at most \d+ bytes"):
        list_splits(path)
