"""Several folders of shards as one index."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.config import StorageConfig, places
from bowstore.data.index import Index, build_index, joined, open_index
from bowstore.data.reader import ShardReader, fetched, open_limit, read_mode
from bowstore.errors import CorruptError, MismatchError, MissingError, UsageError


@pytest.fixture
def parts(make_shard_set: ShardMaker) -> list[Index]:
    """25 images in three tars, and 15 others in two."""
    return [make_shard_set(25, per_shard=10, folder="a"), make_shard_set(15, per_shard=10, folder="b", first=25)]


def test_growth_rows_of_one_folder_follow_those_of_another(parts: list[Index]) -> None:
    index = open_index([part.root for part in parts])
    assert list(index.keys()) == [key for part in parts for key in part.keys()]
    assert index.label.tolist() == [n % 4 for n in range(40)]
    assert [entry.name for entry in index.shards] == [
        *(f"train-{n:06d}.tar" for n in range(3)),
        *(f"train-{n:06d}.tar" for n in range(2)),
    ]
    assert [index.tar_path(shard) for shard in (2, 3)] == [
        parts[0].root / "train-000002.tar",
        parts[1].root / "train-000000.tar",
    ]
    assert index.classes == parts[0].classes
    assert index.place == f"{parts[0].root}, {parts[1].root}"
    whole = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    for name, dtype in (("shard", np.int32), ("label", np.int32), ("key_start", np.int64), ("key_hash", np.uint64)):
        assert type(whole[name]) is np.ndarray
        assert whole[name].dtype == dtype


@pytest.mark.parametrize("way", ["mmap", "pread"])
def test_growth_reads_each_image_from_its_own_tar(parts: list[Index], way: str) -> None:
    index = open_index([part.root for part in parts], StorageConfig(read=way))
    rows = np.random.default_rng(0).permutation(40)
    for row, image in zip(rows.tolist(), ShardReader(index).read(rows), strict=True):
        assert image.tobytes() == encode_jpeg(textured_image(row, 32 + row % 5, 32 + row % 3))


def test_growth_has_a_fingerprint_of_the_parts_in_order(parts: list[Index]) -> None:
    a, b = (part.root for part in parts)
    prints = {open_index(folders).fingerprint for folders in ([a], [b], [a, b], [b, a])}
    assert len(prints) == 4
    assert open_index([a]).fingerprint == open_index(a).fingerprint == parts[0].fingerprint
    assert open_index([a, b]).columns_digest != open_index([b, a]).columns_digest


def test_growth_by_the_same_keys_is_refused(parts: list[Index], make_shard_set: ShardMaker) -> None:
    a, twin = parts[0].root, make_shard_set(7, folder="twin", first=20).root
    with pytest.raises(MismatchError) as caught:
        open_index([a, twin])
    assert str(caught.value) == (
        f"5 of 32 keys are in more than one of {a}, {twin}, for example c0/00020, c1/00021, c2/00022, c3/00023, "
        "c0/00024; keys are paths in shards: name each folder once, and of sets that use the same paths make one anew, "
        "from the folder above it"
    )
    with pytest.raises(MismatchError, match="25 of 50 keys are in more than one of"):
        open_index([a, a])


def labelled(folder: Path, classes: tuple[str, ...], labels: list[int], prefix: str) -> Index:
    image = encode_jpeg(textured_image(1, 32, 32))
    write_tar(folder / "train-000000.tar", [(f"{prefix}{n}", image, label) for n, label in enumerate(labels)])
    return build_index(folder, classes=classes)


def test_growth_by_other_classes_tells_them_by_their_names(tmp_path: Path) -> None:
    a = labelled(tmp_path / "a", ("ant", "cow"), [0, 1, 1], "a")
    b = labelled(tmp_path / "b", ("bee", "cow"), [1, 0, 0], "b")
    index = joined([a, b])
    assert index.classes == ("ant", "bee", "cow")
    assert [index.classes[label] for label in index.label] == ["ant", "cow", "cow", "cow", "bee", "bee"]
    assert index.label.dtype == np.int32
    odd = labelled(tmp_path / "odd", ("cow", "ant"), [0, 1], "c")  # in no order, and the same everywhere
    assert joined([odd, labelled(tmp_path / "d", ("cow", "ant"), [1, 1], "d")]).classes == ("cow", "ant")


def test_growth_by_labels_without_names_is_refused_where_others_have_some(tmp_path: Path) -> None:
    a, b = labelled(tmp_path / "a", ("ant", "cow"), [0, 1], "a"), labelled(tmp_path / "b", (), [1, 0], "b")
    with pytest.raises(MismatchError) as caught:
        joined([a, b])
    assert str(caught.value) == (
        f"the labels of {b.root} cannot be told from others of {a.root}, {b.root}: their classes have no names of "
        "their own; write both with `bowstore shards`, or leave one out"
    )
    assert joined([b, labelled(tmp_path / "c", (), [3, 0], "c")]).label.tolist() == [1, 0, 3, 0]
    unlabelled = dataclasses.replace(b, label=np.full(2, -1, np.int32))
    assert joined([a, unlabelled]).label.tolist() == [0, 1, -1, -1]


def test_growth_checks_every_folder(parts: list[Index]) -> None:
    a, b = (part.root for part in parts)
    with pytest.raises(
        MissingError, match=rf"no index in {b.parent}/none; run `bowstore index|no folder {b.parent}/none"
    ):
        open_index([a, b.parent / "none"])
    index = open_index([a, b])
    tar = b / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"image 'c3/00035' in shard {tar} .* verify --repair {b}`"):
        ShardReader(index).read(np.array([0, 35]))
    tar.unlink()
    with pytest.raises(MissingError, match=rf"shard {tar} is in the index but not on disk; .* `bowstore index {b}`"):
        open_index([a, b])


def test_growth_of_folders_elsewhere(parts: list[Index], tmp_path: Path) -> None:
    """One folder here, one on another machine."""
    folders = [parts[0].root, Path(f"file://{parts[1].root}")]
    storage = StorageConfig(cache=tmp_path / "cache")
    index = open_index(folders, storage)
    assert index.fingerprint == open_index([part.root for part in parts]).fingerprint
    assert read_mode(index) == "mmap"
    copies = index.folders[1].root
    assert not list(copies.glob("*.tar"))
    fetched(index, images=25)
    assert not list(copies.glob("*.tar"))
    fetched(index, images=26)
    assert [tar.name for tar in copies.glob("*.tar")] == ["train-000000.tar"]
    fetched(index, whole=True)
    assert len(list(copies.glob("*.tar"))) == 2
    (image,) = ShardReader(index).read(np.array([39]))
    assert image.tobytes() == encode_jpeg(textured_image(39, 32 + 39 % 5, 32 + 39 % 3))
    small = dataclasses.replace(index, storage=storage.model_copy(update={"cache_gb": 1e-6}))
    assert read_mode(small) == "pread"
    with pytest.raises(UsageError, match=r"data set file://.*/b has 0"):
        fetched(small, whole=True)
    with pytest.raises(UsageError, match="holds fewer than three of them; raise it"):
        open_limit(small)


def test_places_read_as_text() -> None:
    assert str(places(["a", "b"])) == "a, b"
    assert places("a") == places(Path("a")) == (Path("a"),)
