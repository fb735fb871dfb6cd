"""Text lists and CSVs: what is read, labelled and named, and what is refused with counts and lines."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_sets import classes_of, list_splits, shards_of, tiny_image, write_file

from bowstore.data.sources import MAX_KEY_BYTES, NO_LABEL
from bowstore.errors import DataError, MissingError, UsageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in a flat folder, one of them in a folder below and without an extension."""
    root = tmp_path / "photos"
    for number in range(5):
        write_file(root / f"p{number}.jpg", tiny_image(number))
    write_file(root / "deep/p5", tiny_image(5))
    return root


def _listed(photos: Path, text: str, *, name: str = "list.txt", **options: str) -> dict[str, list[tuple[str, int]]]:
    path = write_file(photos.parent / name, text)
    splits = list_splits(photos, lists=[str(path)], **options)
    return {split.name: [(image.key, image.label) for image in split.images] for split in splits}


def test_caffe_list_to_shards(photos: Path, tmp_path: Path) -> None:
    text = "p3.jpg 7\np0.jpg 0\n\n ./deep/p5\t 2 \n"
    found = shards_of(photos, tmp_path / "out", lists=[str(write_file(tmp_path / "list.txt", text))])
    assert {key: sample.label for key, sample in found["train"].items()} == {"p3": 7, "p0": 0, "deep/p5": 2}
    assert found["train"]["deep/p5"].data == tiny_image(5)
    assert classes_of(tmp_path / "out/train") == ()


def test_csv_with_names_and_splits_to_shards(photos: Path, tmp_path: Path) -> None:
    text = (
        '\ufeffid,"File_Name",split,class_name\r\n1,p0.jpg,train,dog\r\n2,p1.jpg,train,"cat, wild"\r\n'
        "3,p2.jpg,validation,dog\r\n4,deep/p5,test,dog\r\n"
    )
    found = shards_of(photos, tmp_path / "out", lists=[str(write_file(tmp_path / "list.csv", text))])
    assert {split: {key: sample.label for key, sample in samples.items()} for split, samples in found.items()} == {
        "train": {"p0": 1, "p1": 0},
        "val": {"p2": 1},
        "test": {"deep/p5": 1},
    }
    for split in found:
        assert classes_of(tmp_path / "out" / split) == ("cat, wild", "dog")


def test_a_list_a_split(photos: Path, tmp_path: Path) -> None:
    train = write_file(tmp_path / "a.txt", "p0.jpg ant\np1.jpg bee\n")
    val = write_file(tmp_path / "b.csv", "image,label\np2.jpg,bee\n")
    test = write_file(tmp_path / "c.tsv", "path\ttarget\np3.jpg\tant\n")
    found = shards_of(photos, tmp_path / "out", lists=[f"train={train}", f"valid={val}", f"test={test}"])
    labels = {split: {key: sample.label for key, sample in samples.items()} for split, samples in found.items()}
    assert labels == {"train": {"p0": 0, "p1": 1}, "val": {"p2": 1}, "test": {"p3": 0}}


def test_paths_alone_have_no_labels(photos: Path) -> None:
    assert _listed(photos, "p1.jpg\np0.jpg\n") == {"train": [("p0", NO_LABEL), ("p1", NO_LABEL)]}
    assert _listed(photos, "filename\np1.jpg\n", name="list.csv") == {"train": [("p1", NO_LABEL)]}


def test_white_space_in_names(photos: Path) -> None:
    write_file(photos / "my cat.jpg", tiny_image(9))
    write_file(photos / "my dog.jpg", tiny_image(9))
    (bare,) = _listed(photos, "my cat.jpg\np0.jpg\n")["train"][:1]
    (labelled,) = _listed(photos, "my dog.jpg 3\n")["train"]
    assert (bare[0][:-17], bare[1]) == ("my_cat", NO_LABEL)
    assert (labelled[0][:-17], labelled[1]) == ("my_dog", 3)


def test_absolute_paths_inside_the_folder(photos: Path) -> None:
    assert _listed(photos, f"{photos.absolute()}/p1.jpg 4\n") == {"train": [("p1", 4)]}


def test_label_field(photos: Path) -> None:
    text = "filename,label,breed\np0.jpg,1,pug\np1.jpg,1,asp\n"
    assert _listed(photos, text, label_field="Breed") == {"train": [("p0", 1), ("p1", 0)]}
    assert _listed(photos, text, label_field="none") == {"train": [("p0", NO_LABEL), ("p1", NO_LABEL)]}
    assert _listed(photos, "p0.jpg 1\np1.jpg\n", label_field="none")["train"][0] == ("p0", NO_LABEL)
    with pytest.raises(
        DataError, match=r"list\.txt has no column 'age' for the label; its columns: filename, label, breed"
    ):
        _listed(photos, text, label_field="age")
    with pytest.raises(UsageError, match=r"list\.txt has no header, so no column 'age'; leave --label-field out"):
        _listed(photos, "p0.jpg 1\n", label_field="age")


def test_files_that_are_not_there(photos: Path) -> None:
    lines = "".join(f"gone{number}.jpg 0\n" for number in range(5))
    with pytest.raises(
        DataError,
        match=r"list\.txt: 6 of 7 files are not in .*photos: 'gone0\.jpg' in line 2, 'gone1\.jpg' in line 3, "
        r"'gone2\.jpg' in line 4, \.\.\.; bring them there, or remove the lines",
    ):
        _listed(photos, "p0.jpg 0\n" + lines + "deep 0\n")


def test_paths_that_climb_out(photos: Path) -> None:
    write_file(photos.parent / "secret.jpg", tiny_image(1))
    with pytest.raises(
        DataError,
        match=r"3 paths climb out of .*photos: '\.\./secret\.jpg' in line 1, 'deep/\.\./\.\./secret\.jpg' in line 3, "
        r"'/.*/secret\.jpg' in line 4; name files inside it",
    ):
        _listed(photos, f"../secret.jpg\np0.jpg\ndeep/../../secret.jpg 1\n{photos.parent}/secret.jpg 1\n")


def test_duplicates(photos: Path) -> None:
    with pytest.raises(
        DataError, match=r"1 images are named twice: 'p0\.jpg' in lines 1 and 3; remove one line of each"
    ):
        _listed(photos, "p0.jpg 0\np1.jpg 0\n./p0.jpg 1\n")
    train, val = (write_file(photos.parent / name, "p0.jpg 0\n") for name in ("a.txt", "b.txt"))
    assert len(list_splits(photos, lists=[f"train={train}", f"val={val}"])) == 2


def test_lines_that_cannot_be_read(photos: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"list\.txt: 3 lines cannot be read: line 3 \(3 fields, the header has 2\), line 5 \(no path\), "
        r"line 6 \(.*quote.*|.*end of data.*\); mend or remove them",
    ):
        _listed(photos, 'image,label\np0.jpg,1\np1.jpg,1,2\n\n"",2\n"p2.jpg,1\n')
    with pytest.raises(DataError, match=r"1 lines cannot be read: line 2 \(split 'both' is none of train, val, test\)"):
        _listed(photos, "image,split\np0.jpg,both\n")
    with pytest.raises(DataError, match=r"1 lines cannot be read: line 1 \('p0\\x00\.jpg'\)"):
        _listed(photos, "p0\0.jpg\n")
    path = photos.parent / "latin.txt"
    path.write_bytes(b"p0.jpg\np\xe9.jpg\n")
    with pytest.raises(DataError, match=r"list .*latin\.txt: byte 8 is not UTF-8; save the list as UTF-8"):
        list_splits(photos, lists=[str(path)])


def test_headers(photos: Path) -> None:
    with pytest.raises(
        DataError, match=r"list\.csv has no column of image files: its header is 'name,label', and one of image, path, "
    ):
        _listed(photos, "name,label\np0.jpg,1\n", name="list.csv")
    for text in ("", "\n \n", "image,label\n"):
        with pytest.raises(DataError, match=r"list\.txt names no image; fill it, or name another list"):
            _listed(photos, text)


def test_labels_that_do_not_fit(photos: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"1 of 2 images in split train of .*list\.txt have no label, for example p1\.jpg; label all images",
    ):
        _listed(photos, "p0.jpg 1\np1.jpg\n")
    with pytest.raises(
        DataError,
        match=r"3 labels of .*list\.txt are numbers, but not whole ones from 0 to 999999999: -1, 1\.0, 1e3",
    ):
        _listed(photos, "p0.jpg -1\np1.jpg 1.0\np2.jpg 1e3\np3.jpg 2\n")
    train = write_file(photos.parent / "a.txt", "p0.jpg ant\n")
    val = write_file(photos.parent / "b.txt", "p1.jpg asp\np2.jpg 3\n")
    with pytest.raises(
        DataError, match=r"split val of .*a\.txt and .*b\.txt has 2 classes that train does not have: 3, asp; all"
    ):
        list_splits(photos, lists=[f"train={train}", f"val={val}"])


def test_which_list_for_which_split(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (str(write_file(tmp_path / name, "p0.jpg\n")) for name in ("a.txt", "b.txt"))
    for lists, names in (([one, two], r"\(none named\), \(none named\)"), ([f"val={one}", f"val={two}"], "val, val")):
        with pytest.raises(
            UsageError, match=rf"2 lists for the splits {names}; give each its own: --list train=FILE --list val=FILE"
        ):
            list_splits(photos, lists=lists)
    split = str(write_file(tmp_path / "c.csv", "image,split\np0.jpg,val\n"))
    with pytest.raises(UsageError, match=r"c\.csv has a column of splits; give it alone, as --list .*c\.csv"):
        list_splits(photos, lists=[f"train={split}"])
    with pytest.raises(UsageError, match="source list needs a list of images; give it with --list FILE"):
        list_splits(photos, "list")
    with pytest.raises(MissingError, match=r"gone\.txt is not there; bring it there, or name another"):
        list_splits(photos, lists=[str(tmp_path / "gone.txt")])
    with pytest.raises(
        UsageError, match=r"^--list trian=.*a\.txt: 'trian' is no split, and there is no file trian=.*; write"
    ):
        list_splits(photos, lists=[f"trian={one}"])
    odd = str(write_file(tmp_path / "a=b.txt", "p0.jpg\n"))
    assert [split.name for split in list_splits(photos, lists=[odd])] == ["train"]
    write_file(photos / "inside.txt", "p0.jpg\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MissingError, match=r"no list inside\.txt in the current directory; did you mean .*photos/inside\.txt"
    ):
        list_splits(photos, lists=["inside.txt"])
    with pytest.raises(UsageError, match=r"p0\.jpg is a file; name the folder that the list's paths are relative to"):
        list_splits(photos / "p0.jpg", lists=[one])
    with pytest.raises(DataError, match=r"cannot read .*photos: Is a directory"):
        list_splits(photos, lists=[str(photos)])


def test_label_changes_are_seen(photos: Path) -> None:
    """The files are the same, and so is the listing; the labels are not."""
    digests = set()
    for text in ("p0.jpg 1\np1.jpg 2\n", "p0.jpg 2\np1.jpg 1\n"):
        path = write_file(photos.parent / "list.txt", text)
        (split,) = list_splits(photos, lists=[str(path)])
        digests.add((split.listing_digest(), split.label_digest()))
    assert len({listing for listing, _ in digests}) == 1
    assert len(digests) == 2


_LEAVES = st.text(st.sampled_from("ab.A _-é%#猫'~\u200b"), min_size=1, max_size=5)
_PATHS = st.lists(_LEAVES, min_size=1, max_size=3).map("/".join)


@settings(max_examples=60, deadline=None)
@given(paths=st.sets(_PATHS, min_size=1, max_size=12))
def test_nasty_names_get_unique_keys(paths: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("nasty")
    (root / "images").mkdir()
    files = []
    for path in sorted(paths):
        try:
            write_file(root / "images" / path, b"x")
        except OSError:
            continue  # "." and "..", and a name that is a folder of another one
        files.append(path)
    normal = {str(Path(path)) for path in files if ".." not in path.split("/")}
    named = {path for path in normal if path.strip() == path}  # a list cannot say white space at the ends
    if not named:
        return
    cells = "".join('"' + path.replace('"', '""') + '"\n' for path in sorted(named))
    listed = write_file(root / "list.csv", "path\n" + cells)
    (split,) = list_splits(root / "images", lists=[str(listed)])
    keys = [image.key for image in split.images]
    assert len(keys) == len(set(keys)) == len(named)
    for key in keys:
        assert key.isascii()
        assert not set(key) & set(". \t\n")
        assert 0 < len(key) <= MAX_KEY_BYTES
