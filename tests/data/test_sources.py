"""Class folders, keys, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_sets import list_splits

from bowstore.data.sources import DANGLING, MAX_KEY_BYTES, NO_LABEL, make_keys
from bowstore.errors import DataError, MissingError, UsageError


def _fill(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def test_imagenet_layout(tmp_path: Path) -> None:
    _fill(tmp_path, "train/n02/a.JPEG", "train/n01/b.JPEG", "train/n01/a.JPEG", "val/n02/c.JPEG")
    train, val = list_splits(tmp_path)
    assert (train.name, val.name) == ("train", "val")
    assert train.classes == val.classes == ("n01", "n02")
    assert [(image.path, image.key, image.label) for image in train.images] == [
        ("train/n01/a.JPEG", "n01/a", 0),
        ("train/n01/b.JPEG", "n01/b", 0),
        ("train/n02/a.JPEG", "n02/a", 1),
    ]
    assert [(image.key, image.label) for image in val.images] == [("n02/c", 1)]
    assert train.size_bytes == sum(len(image.path) for image in train.images)


def test_cifar_layout(tmp_path: Path) -> None:
    _fill(tmp_path, "README.md", "train/bird/0001.jpg", "test/bird/0001.jpg")
    assert [split.name for split in list_splits(tmp_path)] == ["train", "test"]


def test_class_folders_alone_are_train(tmp_path: Path) -> None:
    _fill(tmp_path, "cat/1.png", "dog/deep/er/2.webp")
    (split,) = list_splits(tmp_path)
    assert (split.name, split.classes) == ("train", ("cat", "dog"))
    assert [image.key for image in split.images] == ["cat/1", "dog/deep/er/2"]


def test_flat_folders_have_no_labels(tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.jpg", "test/2.jpg", "test/3.jpg")
    train, test = list_splits(tmp_path)
    assert (train.classes, test.classes) == (("a",), ())
    assert [(image.key, image.label) for image in test.images] == [("2", NO_LABEL), ("3", NO_LABEL)]
    (alone,) = list_splits(tmp_path / "test")
    assert (alone.name, alone.classes) == ("train", ())


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    _fill(tmp_path, "a/1.JPG", "a/notes.txt", "a/.DS_Store", "a/Thumbs.db", "a/._1.jpg", ".git/2.jpg", "b/only.txt")
    (split,) = list_splits(tmp_path)
    assert [image.path for image in split.images] == ["a/1.JPG"]
    assert split.classes == ("a",)


def test_links_are_followed_and_dangling_ones_listed(tmp_path: Path) -> None:
    _fill(tmp_path, "far/1.jpg", "source/a/2.jpg")
    (tmp_path / "source/b").symlink_to(tmp_path / "far")
    (tmp_path / "source/a/3.jpg").symlink_to(tmp_path / "nowhere")
    (split,) = list_splits(tmp_path / "source")
    assert [(image.path, image.size_bytes == DANGLING) for image in split.images] == [
        ("a/2.jpg", False),
        ("a/3.jpg", True),
        ("b/1.jpg", False),
    ]


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path, "a/1.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a/up is a link to a folder that holds it; remove the link"):
        list_splits(tmp_path)


def test_listing_digest_sees_every_change(tmp_path: Path) -> None:
    _fill(tmp_path, "a/1.jpg", "a/2.jpg")
    digests = {list_splits(tmp_path)[0].listing_digest()}
    os.utime(tmp_path / "a/1.jpg", ns=(0, 1))
    digests.add(list_splits(tmp_path)[0].listing_digest())
    (tmp_path / "a/1.jpg").write_bytes(b"longer than it was")
    os.utime(tmp_path / "a/1.jpg", ns=(0, 1))
    digests.add(list_splits(tmp_path)[0].listing_digest())
    (tmp_path / "a/2.jpg").rename(tmp_path / "a/3.jpg")
    digests.add(list_splits(tmp_path)[0].listing_digest())
    assert len(digests) == 4


def test_errors_name_the_folder_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no folder .*nowhere; name the one that holds train/"):
        list_splits(tmp_path / "nowhere")
    _fill(
        tmp_path, "file.zip", "empty/notes.txt", "mixed/a/1.jpg", "mixed/2.jpg", "half/train/a/1.jpg", "half/val/x.txt"
    )
    with pytest.raises(UsageError, match=r"file\.zip is a file, not a folder of images; unpack it"):
        list_splits(tmp_path / "file.zip")
    with pytest.raises(DataError, match=r"no images in .*empty \(looked for .*\.jpg.*\); fill it"):
        list_splits(tmp_path / "empty", "folder")
    with pytest.raises(DataError, match=r"no images in .*half/val"):
        list_splits(tmp_path / "half")
    with pytest.raises(DataError, match=r"1 images lie beside the class folders of .*mixed, for example 2\.jpg"):
        list_splits(tmp_path / "mixed")


def test_classes_unknown_to_train_are_refused(tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.jpg", *(f"val/new{n}/1.jpg" for n in range(7)))
    with pytest.raises(
        DataError, match=r"val has 7 classes that train does not have: new0, new1, new2, new3, new4, \.\.\.; all splits"
    ):
        list_splits(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, "a/1.jpg")

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read .*: Permission denied; make it readable"):
        list_splits(tmp_path)


def test_plain_names_are_their_own_keys() -> None:
    paths = ["n01440764/n01440764_10026.JPEG", "Cat-1/a/b_c.png"]
    assert make_keys(paths) == ["n01440764/n01440764_10026", "Cat-1/a/b_c"]


def test_odd_names_become_plain_and_stay_apart() -> None:
    keys = make_keys(["a b/x.v1.jpg", "a b/x.v2.jpg", "ä/é.jpg", "c/__init__.png"])
    assert [key[:-17] for key in keys] == ["a_b/x_v1", "a_b/x_v2", "x/x", "c/init__"]
    assert len(set(keys)) == 4
    assert all(key[-17] == "-" for key in keys)


def test_a_key_never_passes_to_another_image() -> None:
    """Thinned-out copies are joined by key: what is left must keep its key, or have one that nobody had."""
    names = ["c/a.jpg", "c/a.png", "c/b c.jpg", "c/b_c.jpg", "猫.jpg", "犬.jpg", "d/x.jpg"]
    whole = dict(zip(names, make_keys(names), strict=True))
    assert len(set(whole.values())) == len(names)
    for left_out in names:
        rest = [name for name in names if name != left_out]
        for name, key in zip(rest, make_keys(rest), strict=True):
            assert key == whole[name] or key not in whole.values()


def test_long_names_are_cut() -> None:
    first, second = make_keys(["c/" + "x" * 200 + "1.jpg", "c/" + "x" * 200 + "2.jpg"])
    assert len(first) == len(second) == MAX_KEY_BYTES
    assert first != second
    assert first[:70] == second[:70]


_NAMES = st.text(st.sampled_from("ab ._-é/\t"), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(_NAMES, unique=True, max_size=30))
def test_keys_are_unique_plain_and_repeatable(names: list[str]) -> None:
    paths = [name + ".jpg" for name in names]
    keys = make_keys(paths)
    assert len(set(keys)) == len(keys)
    assert keys == make_keys(paths)
    for key in keys:
        assert key.isascii()
        assert not set(key) & set(". \t\n")
        assert 0 < len(key) <= MAX_KEY_BYTES


def test_the_module_is_light_and_so_are_the_commands_before_any_network() -> None:
    """torch takes two seconds to load, and `bowstore shards` and `bowstore index` need none of it."""
    code = (
        "import sys, bowstore.data.sources; print({'numpy', 'PIL', 'torch', 'webdataset'} & set(sys.modules));"
        "import bowstore.cli.data, bowstore.data.shards; print({'torch', 'zarr'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", "set()"]
