"""Shards made elsewhere: names, components and labels as others write them; hostile and damaged tars refused."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_sets import classes_of, list_splits, shards_of, tiny_image, write_file, write_members

from bowstore.data.config import ShardsConfig
from bowstore.data.shards import make_shards
from bowstore.data.sources import MAX_KEY_BYTES, NO_LABEL, Source, open_source
from bowstore.errors import CorruptError, DataError, MissingError

JPEG, PNG, WEBP, GIF = (tiny_image(number, kind) for number, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF")))


def _listed(source: Path, **options: str) -> dict[str, int]:
    (split,) = list_splits(source, "webdataset", **options)
    return {image.key: image.label for image in split.images}


def test_shards_of_the_webdataset_package(tmp_path: Path) -> None:
    from webdataset import ShardWriter

    (tmp_path / "source").mkdir()
    with ShardWriter(str(tmp_path / "source/animals-train-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"n{number % 2}/im{number}", "jpg": tiny_image(number), "cls": number % 2})
    found = shards_of(tmp_path / "source", tmp_path / "out", per_shard=3)
    assert list(found) == ["train"]
    assert {key: sample.label for key, sample in found["train"].items()} == {
        f"n{number % 2}/im{number}": number % 2 for number in range(10)
    }
    assert found["train"]["n1/im3"].data == tiny_image(3)


def test_img2dataset_layout(tmp_path: Path) -> None:
    """Captions in .txt are no labels; images that are none end in quarantine."""
    members = []
    for number in range(4):
        key = f"00000000{number}"
        members += [
            (f"{key}.jpg", tiny_image(number) if number else b"<html>"),
            (f"{key}.txt", f"a photo, number {number}".encode()),
            (f"{key}.json", json.dumps({"url": "x", "status": "success", "width": 12}).encode()),
        ]
    write_members(tmp_path / "source/00000.tar", members)
    write_file(tmp_path / "source/00000_stats.json", "{}")
    found = shards_of(tmp_path / "source", tmp_path / "out")
    assert {key: sample.label for key, sample in found["train"].items()} == dict.fromkeys(
        ("000000001", "000000002", "000000003"), NO_LABEL
    )
    assert json.loads((tmp_path / "out/train/quarantine.jsonl").read_text()) == {
        "path": "00000.tar/000000000.jpg",
        "reason": "not an image: a web page (of a login, an error, or about the file), not the file itself; "
        "take its download link",
    }


def test_gnu_tar_of_a_folder(tmp_path: Path) -> None:
    """A leading "./", folders as members, hidden files, names beyond ASCII."""
    path = tmp_path / "a.tar"
    write_members(path, [("./x/1.jpg", JPEG), ("./x/._1.jpg", b"mac"), ("./x/é 2.jpg", PNG), ("./x/2.cls", b"3")])
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("./x")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    found = shards_of(path, tmp_path / "out")["train"]
    odd = next(key for key in found if key.startswith("x/2-"))
    assert found == {"x/1": (JPEG, NO_LABEL), odd: (PNG, NO_LABEL)}


def test_several_images_in_a_sample(tmp_path: Path) -> None:
    members = [
        ("s/0.left.jpg", tiny_image(1)),
        ("s/0.right.JPEG", tiny_image(2)),
        ("s/0.cls", b"4"),
        ("s/1.jpg", tiny_image(3)),
        ("s/1.png", PNG),
        ("s/1.cls", b"5"),
        ("s/2.image.jpg", tiny_image(4)),
        ("s/2.cls", b"6"),
        ("dots.v1.jpg", tiny_image(5)),
        ("dots.v2.jpg", tiny_image(6)),
        ("dots.v1.cls", b"7"),
        ("dots.v2.cls", b"8"),
    ]
    found = shards_of(write_members(tmp_path / "a.tar", members), tmp_path / "out")["train"]
    assert {key: sample.label for key, sample in found.items()} == {
        "s/0/left": 4,
        "s/0/right": 4,
        "s/1/jpg": 5,
        "s/1/png": 5,
        "s/2": 6,
        "dots/v1": 7,
        "dots/v2": 8,
    }
    assert found["s/0/right"].data == tiny_image(2)
    assert found["dots/v2"].data == tiny_image(6)


def test_odd_extensions(tmp_path: Path) -> None:
    members = [
        ("a.JPG", JPEG),
        ("b.jpe", JPEG),
        ("c", JPEG),
        ("d.img", PNG),
        ("e.bin", WEBP),
        ("f.data.0", GIF),
        ("g.tiff", tiny_image(1, "TIFF")),
        ("h.npy", b"\x93NUMPY" + JPEG),
        ("README.md", b"# no image"),
    ]
    found = shards_of(write_members(tmp_path / "a.tar", members), tmp_path / "out")["train"]
    assert sorted(found) == ["a", "b", "c", "d", "e", "f", "g"]
    assert [found[key].data for key in "acde"] == [JPEG, JPEG, PNG, WEBP]


def test_members_that_do_not_lie_side_by_side(tmp_path: Path) -> None:
    members = [(f"{name}.jpg", JPEG) for name in "ab"] + [(f"{name}.cls", name.encode()) for name in "ba"]
    assert _listed(write_members(tmp_path / "a.tar", members)) == {"a": 0, "b": 1}


def test_the_same_keys_in_many_tars(tmp_path: Path) -> None:
    for name in ("n01", "n02", "n03"):
        write_members(tmp_path / f"s/{name}.tar", [("0.jpg", JPEG), (f"{name}_1.jpg", PNG)])
    found = shards_of(tmp_path / "s", tmp_path / "out")["train"]
    assert sorted(found) == ["n01/0", "n01_1", "n02/0", "n02_1", "n03/0", "n03_1"]


def test_splits_by_name_and_by_folder(tmp_path: Path) -> None:
    for name in ("imagenet1k-train-0000", "imagenet1k-validation-0000", "imagenet1k-train-0001"):
        write_members(tmp_path / f"names/{name}.tar", [(f"{name}.jpg", JPEG), (f"{name}.cls", b"ant")])
    write_members(tmp_path / "folders/train/0.tar", [("a.jpg", JPEG)])
    write_members(tmp_path / "folders/test/0.tar", [("a.jpg", JPEG)])
    for folder, expected in (("names", {"train": 2, "val": 1}), ("folders", {"train": 1, "test": 1})):
        splits = list_splits(tmp_path / folder)
        assert {split.name: len(split.images) for split in splits} == expected
    write_members(tmp_path / "names/more.tar", [("a.jpg", JPEG)])
    with pytest.raises(DataError, match=r"1 of 4 tars in .* do not tell one split by name as the others do: more\.tar"):
        list_splits(tmp_path / "names")


@pytest.mark.parametrize(
    ("members", "field", "labels"),
    [
        ({"cls": b" 7 \n"}, None, (7, ())),
        ({"cls": b"dog"}, None, (0, ("dog",))),
        ({"txt": b"12"}, None, (12, ())),
        ({"txt": b"a dog"}, None, (NO_LABEL, ())),
        ({"txt": b"a dog"}, "txt", (0, ("a dog",))),
        ({"json": b'{"class": "dog", "n": 3}'}, None, (0, ("dog",))),
        ({"json": b'{"class": "dog", "n": 3}'}, "n", (3, ())),
        ({"json": b'{"target": 4, "label": 5}'}, None, (5, ())),
        ({"json": b'{"label": [1, 2], "target": 4}'}, None, (4, ())),
        ({"json": b'{"label": true}'}, None, (NO_LABEL, ())),
        ({"json": b"[1]"}, None, (NO_LABEL, ())),
        ({"json": b'{"label": 5}', "cls": b"6", "txt": b"7"}, None, (6, ())),
        ({"json": b'{"label": 5}', "cls": b"6"}, "none", (NO_LABEL, ())),
        ({"json": b"not JSON"}, "none", (NO_LABEL, ())),
        ({"Breed": b"pug"}, "breed", (0, ("pug",))),
    ],
)
def test_labels(tmp_path: Path, members: dict[str, bytes], field: str | None, labels: tuple[int, object]) -> None:
    tar = write_members(tmp_path / "a.tar", [("k.jpg", JPEG), *((f"k.{name}", data) for name, data in members.items())])
    (split,) = list_splits(tar, label_field=field)
    assert (split.images[0].label, split.classes) == labels


def test_labels_to_shards(tmp_path: Path) -> None:
    names = ["cow", "ant", "bee", "ant"]
    members = [(f"{n}.jpg", tiny_image(n)) for n in range(4)]
    members += [(f"{n}.json", json.dumps({"species": name}).encode()) for n, name in enumerate(names)]
    found = shards_of(write_members(tmp_path / "a.tar", members), tmp_path / "out", label_field="species")["train"]
    assert [found[str(n)].label for n in range(4)] == [2, 0, 1, 0]
    assert classes_of(tmp_path / "out/train") == ("ant", "bee", "cow")


def test_what_the_user_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _listed(write_members(tmp_path / "a.tar", [("k.jpg", JPEG), ("stats.json", b"{}"), ("LICENCE", b"free")]))
    said = capsys.readouterr().err
    assert "note: 2 samples of " in said
    assert "hold no image and are passed over, for example a.tar/stats, a.tar/LICENCE" in said
    assert "the images of train in " in said
    assert "have no labels (looked for .cls, for label, cls, class, target in JSON, for numbers in .txt)" in said


@pytest.mark.parametrize(
    ("members", "field", "message"),
    [
        ({"json": b"{"}, None, r"'k\.json' is not JSON \(.*\); write it anew"),
        ({"json": b"[" * 100_000}, None, r"'k\.json' is not JSON \(.*\); write it anew"),
        ({"json": b'{"label": [1]}'}, "label", r"'label' of sample 'k' is '\[1\]', neither a name nor a whole number"),
        ({"json": b'{"a": 1}'}, "b", r"no sample of .*a\.tar has a label in 'b', neither as a member's extension"),
        ({"cls": b"\xff\xfe"}, None, r"byte 0 of 'k\.cls' is not UTF-8; write it anew, or name another field"),
        ({"json": b" " * (1 << 20) + b"{}"}, None, r"'k\.json' has 1048578 bytes, more than the 1048576 that a label"),
        ({"cls": b"-3"}, None, r"1 labels of .*a\.tar are numbers, but not whole ones from 0 to 999999999: -3; write"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path: Path, members: dict[str, bytes], field: str | None, message: str) -> None:
    tar = write_members(tmp_path / "a.tar", [("k.jpg", JPEG), *((f"k.{name}", data) for name, data in members.items())])
    with pytest.raises(DataError, match=message):
        list_splits(tar, label_field=field)


def test_some_samples_without_a_label(tmp_path: Path) -> None:
    tar = write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.cls", b"1"), ("b.jpg", JPEG), ("c.jpg", JPEG)])
    with pytest.raises(DataError, match=r"2 of 3 images .* no label, for example a\.tar/b\.jpg, a\.tar/c\.jpg; label"):
        list_splits(tar)
    assert _listed(tar, label_field="none") == {"a": NO_LABEL, "b": NO_LABEL, "c": NO_LABEL}


def test_pickled_members_are_never_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "pwned"),)

    evil = pickle.dumps(Evil())
    names = ("pyd", "pkl", "pickle", "pth", "npy", "cls", "json.pyd")
    members = [("k.jpg", JPEG), *((f"k.{name}", evil) for name in names)]
    tar = write_members(tmp_path / "a.tar", members)
    found = shards_of(tar, tmp_path / "out", label_field="none")["train"]
    assert found == {"k": (JPEG, NO_LABEL)}
    assert not (tmp_path / "pwned").exists()


def _with(path: Path, name: str, kind: bytes, **fields: object) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("ok.jpg")
        info.size = len(JPEG)
        archive.addfile(info, io.BytesIO(JPEG))
        info = tarfile.TarInfo(name)
        info.type = kind
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def test_hostile_members_are_refused(tmp_path: Path) -> None:
    kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device"}
    for kind, what in (kinds | {tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a FIFO"}).items():
        with pytest.raises(DataError, match=rf"a\.tar: member 'l\.jpg' at byte \d+ is {what}, not a plain file"):
            list_splits(_with(tmp_path / "a.tar", "l.jpg", kind, linkname="/etc/passwd"))
    for name in ("../up.jpg", "a/../../up.jpg", "/abs.jpg"):
        keys = [image.key for image in list_splits(_with(tmp_path / "a.tar", name, tarfile.REGTYPE, size=1))[0].images]
        assert not any(key.startswith("/") or "." in key for key in keys)
    for name in ("ok.jpg", "./ok.jpg", "ok.JPG"):
        with pytest.raises(DataError, match=r"a\.tar: '.*' is there twice \(at bytes 512 and \d+\); names in a tar"):
            list_splits(_with(tmp_path / "a.tar", name, tarfile.REGTYPE, size=1))


def test_sparse_members_and_wild_headers_are_refused(tmp_path: Path) -> None:
    sparse = _with(tmp_path / "a.tar", "l.jpg", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,9", "size": "9"})
    with pytest.raises(DataError, match=r"a\.tar: the member behind byte \d+ is a sparse file"):
        list_splits(sparse)
    data = bytearray(write_members(tmp_path / "b.tar", [("a.jpg", JPEG)]).read_bytes())
    data[124:136] = b"\xff" * 12  # a length of -1, as base 256
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    (tmp_path / "b.tar").write_bytes(data)
    with pytest.raises(CorruptError, match=r"b\.tar.*is not a whole tar: the header at byte 0 .* is damaged"):
        list_splits(tmp_path / "b.tar")


def test_a_cut_anywhere_is_found(tmp_path: Path) -> None:
    whole = write_members(tmp_path / "whole.tar", [("a.jpg", JPEG), ("a.cls", b"1"), ("b.jpg", JPEG), ("b.cls", b"2")])
    data = whole.read_bytes().rstrip(b"\0")
    end = -(-len(data) // 512) * 512  # of the last member
    data = whole.read_bytes()
    for cut in [*range(0, end + 1024, 512), 100, 700, end + 1000]:
        with pytest.raises(CorruptError, match=r"cut\.tar (is cut|is empty|is no tar|has a zeroed block)"):
            list_splits(write_file(tmp_path / "cut.tar", data[:cut]))
    assert len(list_splits(write_file(tmp_path / "cut.tar", data[: end + 1024]))) == 1
    for start in range(512, end, 512):
        if data[start + 257 : start + 262] == b"ustar":
            holed = data[:start] + bytes(512) + data[start + 512 :]
            with pytest.raises(CorruptError, match=rf"cut\.tar has a zeroed block at byte {start}: data follows"):
                list_splits(write_file(tmp_path / "cut.tar", holed))


def test_what_is_no_set_of_shards(tmp_path: Path) -> None:
    tar = write_members(tmp_path / "both.tar", [("./train/a/1.jpg", JPEG), ("./val/a/1.jpg", JPEG)])
    with pytest.raises(
        DataError, match=r"both\.tar is an archive of the folders train, val, not a shard; extract it \(tar -xf\)"
    ):
        list_splits(tar)
    with pytest.raises(DataError, match=r"no images in the 1 tars of split train in .*; name other tars"):
        list_splits(write_members(tmp_path / "bare.tar", [("a.txt", b"x")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"no \*\.tar in .*empty; name the folder that holds the shards, uncompr"):
        list_splits(tmp_path / "empty", "webdataset")


def test_a_tar_that_changes_after_listing(tmp_path: Path) -> None:
    tar = write_members(tmp_path / "s/a.tar", [("a.jpg", JPEG)])
    (split,) = list_splits(tar.parent)
    read = open_source(Source(tar.parent, "webdataset"))
    assert read(split.images[0]) == JPEG
    os.utime(tar, ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.tar changed after it was listed: the source is changing; run again"):
        read(split.images[0])
    tar.unlink()
    with pytest.raises(MissingError, match=r"a\.tar is not there; bring it there"):
        read(split.images[0])


def test_running_on_gives_the_same_bytes(tmp_path: Path) -> None:
    for shard in range(2):
        write_members(tmp_path / f"s/{shard}.tar", [(f"{shard}-{n}.jpg", tiny_image(n)) for n in range(5)])
    few = ShardsConfig(per_shard=3, workers=1)
    make_shards(tmp_path / "s", tmp_path / "out", few)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/train").glob("*.tar")}
    (tmp_path / "out/train/train-000001.tar").unlink()
    assert [report.new for report in make_shards(tmp_path / "s", tmp_path / "out", few)] == [True]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/train").glob("*.tar")} == before
    assert [report.new for report in make_shards(tmp_path / "s", tmp_path / "out", few)] == [False]


_PARTS = st.text(st.sampled_from("ab.A _-é%'~_"), min_size=1, max_size=5).filter(lambda part: set(part) - {"."})
_ENDINGS = st.sampled_from(["", ".jpg", ".x.png", ".JPE"])
_NAMES = st.tuples(st.lists(_PARTS, min_size=1, max_size=3).map("/".join), _ENDINGS).map("".join)


@settings(max_examples=60, deadline=None)
@given(tars=st.lists(st.lists(_NAMES, max_size=6), min_size=1, max_size=3))
def test_nasty_names_get_unique_keys(tars: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("nasty")
    shown = 0
    for number, names in enumerate(tars):
        leaves = {name.lower(): name for name in names if not name.rpartition("/")[2].startswith(".")}
        shown += len(leaves)
        write_members(root / f"s/{number}.tar", [(name, JPEG) for name in leaves.values()])
    if not shown:
        return
    keys = list(_listed(root / "s"))
    assert len(keys) == shown
    for key in keys:
        assert key.isascii()
        assert not set(key) & set(". \t\n")
        assert 0 < len(key) <= MAX_KEY_BYTES
