"""Shards that others made, used as they are."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from shard_sets import encode_jpeg, textured_image
from source_sets import shards_of
from tar_files import JPEG, encode, write_members

from bowstore.cli import main
from bowstore.data.index import Index, build_index, open_index
from bowstore.data.scan import ScanSettings
from bowstore.data.table import COLUMNS, INDEX_FILE, read_header, write_table
from bowstore.data.tar import header_names
from bowstore.data.verify import verify_folder
from bowstore.errors import CorruptError, DataError

PIXELS = textured_image(1, 20, 30)


def image(number: int) -> bytes:
    return encode_jpeg(textured_image(number, 20 + number, 30))


def headers_name_keys(index: Index) -> bool:
    """Whether every row's tar header is one that readers take for its key's."""
    for row in range(len(index)):
        with open(index.tar_path(int(index.shard[row])), "rb") as file:
            file.seek(int(index.offset[row]) - 512)
            header = file.read(512)
        if not header_names(header, index.key(row).encode() + b"."):
            return False
    return True


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "pax"])
def test_what_gnu_tar_packs_from_a_folder(tmp_path: Path, tar_format: str) -> None:
    long = "f" * (60 if tar_format == "ustar" else 140)
    for name in ("a/0.JPEG", "a/1.jpg", f"{long}/2.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(JPEG)
    (tmp_path / "in/a/.hidden").write_bytes(b"a file of the desktop's")
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["tar", f"--format={tar_format}", "-cf", str(tmp_path / "out/x.tar"), "-C", str(tmp_path / "in"), "."],
        check=True,
    )
    index = build_index(tmp_path / "out")
    assert sorted(index.keys()) == ["a/0", "a/1", f"{long}/2"]
    assert headers_name_keys(index)
    assert verify_folder(tmp_path / "out", deep=True).problems == []


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    """Unequal shards, PAX headers, captions in .txt, JSON without a label, and images that were never fetched."""
    for shard, count in enumerate((3, 1)):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for number in range(count):
                key = f"{shard:05d}{number:04d}"
                value = {"caption": "a cat", "url": "http://x", "key": key, "status": "success", "width": 30}
                writer.write({"__key__": key, "jpg": image(number), "txt": "7 cats", "json": value})
    index = build_index(tmp_path)
    assert list(index.keys()) == ["000000000", "000000001", "000000002", "000010000"]
    assert [entry.samples for entry in index.shards] == [3, 1]
    assert index.label.tolist() == [-1] * 4
    assert index.height.tolist() == [20, 21, 22, 20]


@pytest.mark.parametrize("extension", ["JPEG", "JPG", "jpe", "jfif", "PNG", "WebP"])
def test_odd_extensions(tmp_path: Path, extension: str) -> None:
    kind = {"png": "PNG", "webp": "WEBP"}.get(extension.lower(), "JPEG")
    write_members(tmp_path / "a.tar", [(f"a/1.{extension}", encode(PIXELS, kind)), ("a/1.cls", b"3\n")])
    index = build_index(tmp_path)
    assert (list(index.keys()), index.label.tolist()) == (["a/1"], [3])


@pytest.mark.parametrize(
    ("members", "field", "label"),
    [
        ([("json", b'{"label": 4}')], None, 4),
        ([("json", b'{"cls": "5"}')], None, 5),
        ([("json", b'{"class": 6}'), ("txt", b"2")], None, 6),
        ([("json", b'{"target": 7}'), ("cls", b"1")], None, 1),
        ([("json", b'{"label": "cat"}')], None, -1),
        ([("json", b'{"label": true}')], None, -1),
        ([("json", b'{"label": -3}')], None, -1),
        ([("json", b"[1]")], None, -1),
        ([("json", b"{not json"), ("txt", b" 12\n")], None, 12),
        ([("txt", b"12 cats")], None, -1),
        ([("json", b'{"label": 4, "species": 9}'), ("cls", b"1")], "species", 9),
        ([], None, -1),
    ],
)
def test_labels(tmp_path: Path, members: list[tuple[str, bytes]], field: str | None, label: int) -> None:
    write_members(tmp_path / "a.tar", [("x.jpg", JPEG), *((f"x.{name}", data) for name, data in members)])
    index = build_index(tmp_path, settings=ScanSettings(label_field=field))
    assert index.label.tolist() == [label]
    assert open_index(tmp_path).settings.label_field == field
    assert verify_folder(tmp_path).problems == []


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ([["2012", "42"], ["7"]], [2012, 42, 7]),
        ([["2012", "42"], ["a red car"]], [-1, -1, -1]),
        ([["2012", None], ["7"]], [-1, -1, -1]),
        ([["2012", "42"], ["1.5"]], [-1, -1, -1]),
        ([["2012", "42"], ["\u0663"]], [-1, -1, -1]),  # a digit, but none of ASCII
        ([["2012", "42"], ["1234567890"]], [-1, -1, -1]),  # more than 32 bits hold
    ],
)
def test_txt_is_a_label_where_all_of_all_tars_are_numbers(
    tmp_path: Path, texts: list[list[str | None]], labels: list[int]
) -> None:
    """The rule is that of `shards`, which has the same images here."""
    for shard, found in enumerate(texts):
        members = []
        for number, text in enumerate(found):
            members.append((f"{shard}{number}.jpg", image(number)))
            members += [] if text is None else [(f"{shard}{number}.txt", text.encode())]
        write_members(tmp_path / f"in/train-{shard}.tar", members)
    built = build_index(tmp_path / "in")
    assert built.label.tolist() == labels
    assert verify_folder(tmp_path / "in").problems == []
    assert sorted(sample.label for sample in shards_of(tmp_path / "in", tmp_path / "out")["train"].values()) == sorted(
        labels
    )


def test_txt_beside_other_labels_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("a.jpg", JPEG), ("a.txt", b"2012"), ("a.cls", b"3"), ("b.jpg", image(1)), ("b.txt", b"7")]
    write_members(tmp_path / "a.tar", members)
    assert build_index(tmp_path).label.tolist() == [3, -1]
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", b"2012"), ("b.jpg", image(1)), ("b.txt", b"a cat")])
    assert build_index(tmp_path).label.tolist() == [-1, -1]
    assert "note: .txt is a whole number in 1 of 2 samples, so it holds captions and no labels" in (
        capsys.readouterr().err
    )


def test_an_index_that_took_a_caption_for_a_label_is_found(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", b"2012"), ("b.jpg", image(1)), ("b.txt", b"a cat")])
    index = build_index(tmp_path)
    columns = {name: np.asarray(getattr(index, name)).copy() for name in COLUMNS}
    columns["label"][0] = 2012
    write_table(
        tmp_path / INDEX_FILE,
        read_header(tmp_path / INDEX_FILE).meta,
        {name: len(column) for name, column in columns.items()},
        lambda name: iter([columns[name]]),
    )
    (problem,) = verify_folder(tmp_path, repair=True).problems
    assert problem.message.endswith("member 'a.jpg' at byte 512 has label -1, the index says 2012")
    assert open_index(tmp_path).label.tolist() == [-1, -1]


def test_names_and_numbers_in_json_are_no_labels_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As class names, which `shards` makes of them, "7" is one of several; as a number it would be the eighth."""
    members = [("a.jpg", JPEG), ("a.json", b'{"label": "7"}'), ("b.jpg", image(1)), ("b.json", b'{"label": "cat"}')]
    write_members(tmp_path / "a.tar", members)
    with pytest.raises(
        DataError,
        match=r"are whole numbers in 1 samples and names in 1, for example \['cat'\]; `bowstore shards .*`"
        r" numbers names, and --label-field none leaves labels out",
    ):
        build_index(tmp_path)
    assert build_index(tmp_path, settings=ScanSettings(label_field="none")).label.tolist() == [-1, -1]
    assert verify_folder(tmp_path).problems == []
    write_members(tmp_path / "a.tar", members[2:])
    assert build_index(tmp_path).label.tolist() == [-1]
    assert "labels in .json are names in 1 samples, for example ['cat'], and are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "field", "message"),
    [
        ("x.cls", b"cat", None, r"member 'x\.cls' at byte \d+ holds b'cat', not a whole number"),
        ("x.cls", b"-1", None, r"holds b'-1', not a whole number"),
        ("x.json", b'{"species": "cat"}', "species", r"member 'x\.json' at byte \d+ has 'cat' in field 'species'"),
        ("x.json", b"{}", "species", r"has None in field 'species', not a whole number"),
        ("x.json", b"{", "species", r"has None in field 'species'"),
    ],
)
def test_labels_that_are_none_are_refused(
    tmp_path: Path, name: str, data: bytes, field: str | None, message: str
) -> None:
    write_members(tmp_path / "a.tar", [("x.jpg", JPEG), (name, data)])
    with pytest.raises(DataError, match=message):
        build_index(tmp_path, settings=ScanSettings(label_field=field))


def test_one_of_several_images_is_chosen(tmp_path: Path) -> None:
    members = []
    for number in range(4):
        members += [(f"{number}.0.jpg", image(0)), (f"{number}.1.JPG", image(1)), (f"{number}.seg.png", b"a mask")]
    members.append(("4.1.jpg", image(1)))
    write_members(tmp_path / "a.tar", members)
    with pytest.raises(
        DataError,
        match=r"samples hold several images; choose one with --image-ext: 0\.jpg \(4\), 1\.jpg \(4\), seg\.png",
    ):
        build_index(tmp_path)
    index = build_index(tmp_path, settings=ScanSettings(image_ext=("0.jpg", "1.jpg")))
    assert (len(index), index.height.tolist()) == (5, [20, 20, 20, 20, 21])
    index = build_index(tmp_path, settings=ScanSettings(image_ext=("0.jpg",)))
    assert len(index) == 4
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": "a.tar/4.1.jpg", "reason": "no image 0.jpg beside 1.jpg"}
    assert verify_folder(tmp_path).problems == [], "verify chooses as the index does"
    with pytest.raises(DataError, match=r"no image can be used; the first, a\.tar/0\.0\.jpg: no image 2\.jpg beside"):
        build_index(tmp_path, settings=ScanSettings(image_ext=("2.jpg",)))


def test_names_that_break_the_contract_are_counted_over_all_shards(tmp_path: Path) -> None:
    for shard in range(2):
        members = [(f"{shard}.with.dots/a.jpg", JPEG), (f"a space{shard}.jpg", JPEG), (f"fine{shard}.jpg", JPEG)]
        write_members(tmp_path / f"{shard}.tar", [*members, (f"b\u00e4r{shard}.jpg", JPEG)], tarfile.PAX_FORMAT)
    with pytest.raises(
        DataError,
        match=r"names of 6 members are not .*\['0\.with\.dots/a\.jpg', 'a space0\.jpg', 'bär0\.jpg', .*bowstore shards",
    ):
        build_index(tmp_path)


def test_images_without_a_header_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("a.jpg", b"<html>"), ("b.jpg", JPEG), ("c.png", b""), ("d.json", b"{}"), ("e.jpg", JPEG[:100])]
    write_members(tmp_path / "a.tar", members)
    result = CliRunner().invoke(main, ["index", str(tmp_path)])
    assert "1 images in 1 shards, 0 with a label" in result.stdout
    assert "4 images were left out, see " in result.stderr
    assert [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()] == [
        {"path": "a.tar/a.jpg", "reason": "no JPEG, PNG or WebP image: it starts with b'<html>'"},
        {"path": "a.tar/c.png", "reason": "empty file"},
        {"path": "a.tar/d.json", "reason": "no image beside json"},
        {"path": "a.tar/e.jpg", "reason": "a JPEG header that is cut"},
    ]
    write_members(tmp_path / "a.tar", [("b.jpg", JPEG)])
    build_index(tmp_path)
    assert (tmp_path / "quarantine.jsonl").read_text() == ""


def test_a_set_without_one_good_image_is_refused(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", b"<html>")])
    with pytest.raises(DataError, match=r"no image can be used; the first, a\.tar/a\.jpg: no JPEG, PNG or WebP"):
        build_index(tmp_path)
    write_members(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="the shards hold no image"):
        build_index(tmp_path)


def test_components_that_lie_apart_are_refused(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.cls", b"1"), ("b.cls", b"2")]
    write_members(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"member 'a\.cls' at byte \d+ lies apart from the image of its key"):
        build_index(tmp_path)


def test_a_quarantine_list_that_cannot_be_read_is_no_silence(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG)])
    (tmp_path / "quarantine.jsonl").write_text("{\n")
    with pytest.raises(CorruptError, match=r"quarantine\.jsonl is no list of bowstore.s, or a damaged one .*move it"):
        build_index(tmp_path)


def test_the_command_takes_the_choice(tmp_path: Path) -> None:
    members = [("a.0.jpg", image(0)), ("a.1.jpg", image(1)), ("a.json", b'{"species": 2}')]
    write_members(tmp_path / "a.tar", members)
    result = CliRunner().invoke(main, ["index", str(tmp_path), "--image-ext", ".1.JPG", "--label-field", "species"])
    assert "1 images in 1 shards, 1 with a label, fingerprint" in result.stdout
    index = open_index(tmp_path)
    assert (index.height.tolist(), index.label.tolist()) == ([21], [2])
    assert np.array_equal(index.settings.image_ext, ("1.jpg",))
