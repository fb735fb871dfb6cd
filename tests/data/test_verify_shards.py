"""Whatever happens to shards on disk is found, and named by shard, member and byte."""

import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from shard_sets import encode_jpeg, textured_image
from tar_files import BLOCK, edit, encode, flip, places, with_webp_size, write_members

from bowstore.cli import main
from bowstore.data.config import ShardsConfig
from bowstore.data.index import INDEX_FILE, Index, build_index, open_index
from bowstore.data.reader import ShardReader
from bowstore.data.shard_check import Problem
from bowstore.data.shards import make_shards
from bowstore.data.table import COLUMNS, write_table
from bowstore.data.verify import verify_folder
from bowstore.errors import BusyError, DataError, MismatchError, MissingError
from bowstore.files import exclusive_lock, file_digest
from bowstore.verify import verify_path


def tiny(number: int) -> bytes:
    return encode_jpeg(textured_image(number, 12, 16))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of five images, each with a label and a member that nobody reads."""
    root = tmp_path_factory.mktemp("golden")
    for shard in range(2):
        members: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for number in range(5):
            key = f"k/{shard}{number}"
            members += [(f"{key}.jpg", tiny(number)), (f"{key}.cls", b"%d" % number), (f"{key}.info", b"other" * 30)]
        write_members(root / f"s-{shard}.tar", members)
    build_index(root)
    return root


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of the golden shards, to be damaged."""
    return shutil.copytree(golden, tmp_path / "shards")


def found(root: Path, **options: bool) -> list[Problem]:
    return verify_folder(root, **options).problems


def test_nothing_is_wrong_with_what_was_just_written(folder: Path) -> None:
    report = verify_folder(folder, deep=True)
    assert (report.images, report.shards, report.problems, report.own) == (10, 2, [], False)
    assert verify_folder(folder, deep=True, workers=2) == report


def test_every_cut_is_found_and_training_refuses_it(folder: Path, golden: Path) -> None:
    tar = folder / "s-1.tar"
    size_bytes = tar.stat().st_size
    offsets = [info.offset_data for name, info in places(tar).items() if name.endswith(".jpg")]
    for cut in range(0, size_bytes, BLOCK):
        shutil.copyfile(golden / tar.name, tar)
        os.truncate(tar, cut)
        problems = found(folder)
        assert {problem.shard for problem in problems} == {"s-1.tar"}, cut
        text = " ".join(problem.message for problem in problems)
        assert f"of {cut}" in text or f"has {cut} bytes" in text or f"is empty ({cut} bytes)" in text, text
        if cut > BLOCK:
            lost = sum(offset + len(tiny(number)) > cut for number, offset in enumerate(offsets))
            assert not lost or f"has lost {lost} images" in text or "none of its 5 images" in text, text
        with pytest.raises(MismatchError, match=rf"s-1\.tar has {cut} bytes, the index says {size_bytes}"):
            open_index(folder)


def test_every_zeroed_block_is_found_with_its_byte(folder: Path, golden: Path) -> None:
    tar = folder / "s-0.tar"
    whole = (golden / tar.name).read_bytes()
    members = list(places(tar).values())
    for start in range(0, len(whole), BLOCK):
        if not whole[start : start + BLOCK].strip(b"\0"):
            continue
        tar.write_bytes(whole)
        edit(tar, start, bytes(BLOCK))
        owner = next(info for info in members if start < info.offset_data + -(-info.size // BLOCK) * BLOCK)
        problems = [problem for problem in found(folder) if problem.shard == tar.name]
        text = " ".join(problem.message for problem in problems)
        if start == owner.offset:
            assert f"zeroed block at byte {start}" in text, text
            assert problems[0].first_byte == start
        elif owner.name.endswith(".jpg"):
            last = min(start + BLOCK, owner.offset_data + owner.size) - 1
            assert f"member {owner.name!r}: bytes {owner.offset_data} to " in text, text
            assert f"zeroed from byte {start} to {last}" in text, text
            assert (problems[0].member, problems[0].first_byte) == (owner.name, owner.offset_data)
        elif owner.name.endswith(".cls"):
            assert f"member {owner.name!r} at byte {owner.offset_data} holds b'\\x00'" in text, text
        else:
            assert "members other than images and labels" in text, text


def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, golden: Path) -> None:
    tar = folder / "s-0.tar"
    whole = (golden / tar.name).read_bytes()
    for count, info in enumerate(places(tar).values()):
        # Name, mode, size, time, checksum, type, magic, unused; data; padding.
        header = [0, 101, 130, 140, 148, 154, 155, 156, 258, 400, 511]
        end = info.offset_data + info.size
        for offset in [*(info.offset + field for field in header), info.offset_data, end - 1, end]:
            tar.write_bytes(whole)
            flip(tar, offset, bit=(offset + count) % 8)
            problems = found(folder)
            text = " ".join(problem.message for problem in problems)
            assert {problem.shard for problem in problems} == {tar.name}, (info.name, offset)
            if offset < info.offset_data:
                assert f"header at byte {info.offset} " in text or "bytes between members" in text, text
            elif offset == end or info.name.endswith(".info"):
                assert "members other than images and labels" in text, text
            else:
                key = info.name.partition(".")[0]
                assert any(key in str(problem.member) for problem in problems), (info.name, offset, text)
                assert any(problem.first_byte == info.offset_data for problem in problems) or "label" in text


def test_members_that_changed_places_are_named(folder: Path) -> None:
    members = [(f"k/0{number}.jpg", tiny(3)) for number in range(4)]
    write_members(folder / "s-0.tar", members)
    build_index(folder)
    size_bytes = (folder / "s-0.tar").stat().st_size
    write_members(folder / "s-0.tar", members[::-1])
    assert (folder / "s-0.tar").stat().st_size == size_bytes
    problems = found(folder)
    assert [problem.member for problem in problems] == ["k/00", "k/01", "k/02", "k/03"]
    assert "holds 'k/03.jpg' at byte 512, the index says 'k/00'" in problems[0].message
    with pytest.raises(MismatchError, match=r"holds 'k/03\.jpg' at byte 512, the index says 'k/00'"):
        ShardReader(open_index(folder)).read(np.array([0]))


def test_what_is_gone_is_named(folder: Path) -> None:
    (folder / "s-1.tar").unlink()
    assert [problem.message for problem in found(folder)] == [f"shard {folder / 's-1.tar'} is missing"]
    with pytest.raises(MissingError, match=r"s-1\.tar is in the index but not on disk"):
        open_index(folder)
    (folder / INDEX_FILE).unlink()
    assert "no index in" in found(folder)[0].message


def test_a_shard_that_is_no_tar_any_more_is_said_once(folder: Path) -> None:
    tar = folder / "s-0.tar"
    for content in (b"", b"\xff" * 3000, bytes(tar.stat().st_size), np.random.default_rng(0).bytes(tar.stat().st_size)):
        tar.write_bytes(content)
        (problem,) = found(folder)
        assert re.search(rf"{tar} is (empty|none|not a|no tar|unreadable: none)", problem.message), problem
    tar.unlink()
    tar.mkdir()
    (problem,) = found(folder)
    assert f"{tar} is a folder and not a file; move it away" in problem.message


def test_a_shard_that_nobody_recorded_is_named(folder: Path) -> None:
    shutil.copyfile(folder / "s-0.tar", folder / "s-2.tar")
    assert [problem.message.split(";")[0] for problem in found(folder)] == [
        f"shard {folder / 's-2.tar'} is in no record"
    ]


def changed_index(root: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Write the index again, well formed, with other values."""
    index = open_index(root)
    columns = {name: np.array(getattr(index, name)) for name in COLUMNS}
    change(columns)
    meta = {
        "version": 2,
        "fingerprint": index.fingerprint,
        "classes": [],
        "image_ext": [],
        "label_field": None,
        "shards": [list(entry) for entry in index.shards],
    }
    lengths = {name: len(column) for name, column in columns.items()}
    write_table(root / INDEX_FILE, meta, lengths, lambda name: iter([columns[name]]))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("offset", r"holds no image 'k/03' at bytes \d+ to \d+ \(no header names it\)|bytes .* are not those"),
        ("size", r"member 'k/03\.jpg': bytes \d+ to \d+ are not those that were indexed"),
        ("height", r"member 'k/03\.jpg' at byte \d+ has height 12, the index says 13"),
        ("width", r"member 'k/03\.jpg' at byte \d+ has width 16, the index says 17"),
        ("label", r"member 'k/03\.jpg' at byte \d+ has label 3, the index says 4"),
        ("key_hash", r"member 'k/03\.jpg' at byte \d+ has key_hash \d+, the index says"),
        ("digest", r"member 'k/03\.jpg': bytes \d+ to \d+ are not those that were indexed"),
    ],
)
def test_an_index_that_says_other_things_than_the_tar_is_found(folder: Path, column: str, message: str) -> None:
    def change(columns: dict[str, np.ndarray]) -> None:
        columns[column][3] += 1

    changed_index(folder, change)
    problems = found(folder)
    assert any(re.search(message, problem.message) for problem in problems), problems
    assert verify_folder(folder, repair=True).left == []
    assert found(folder) == []


def test_an_index_of_another_tar_is_found(folder: Path) -> None:
    def change(columns: dict[str, np.ndarray]) -> None:
        columns["offset"] += 1

    changed_index(folder, change)
    assert [problem.message for problem in found(folder)] == [
        f"shard {folder / name} is not the one of the index: none of its 5 images is found"
        for name in ("s-0.tar", "s-1.tar")
    ]
    assert verify_folder(folder, repair=True).left == []


def test_a_link_to_nothing_is_a_missing_shard(folder: Path) -> None:
    (folder / "s-1.tar").unlink()
    (folder / "s-1.tar").symlink_to(folder / "nowhere")
    assert [problem.message for problem in found(folder)] == [f"shard {folder / 's-1.tar'} is missing"]


@pytest.mark.parametrize("damage", ["gone", "flipped column", "flipped header"])
def test_what_is_derived_is_built_anew(folder: Path, damage: str) -> None:
    index = folder / INDEX_FILE
    before = {path.name: file_digest(path) for path in folder.iterdir()}
    if damage == "gone":
        index.unlink()
    elif damage == "flipped column":
        flip(index, index.stat().st_size - 40)
    else:
        flip(index, 60)
    problems = found(folder)
    assert len(problems) == 1, problems
    assert problems[0].kind == "index"
    report = verify_folder(folder, repair=True)
    assert report.left == []
    assert {path.name: file_digest(path) for path in folder.iterdir()} == before
    assert found(folder) == []


def test_foreign_shards_that_changed_are_not_taken_for_good(folder: Path) -> None:
    flip(folder / "s-0.tar", 1000)
    report = verify_folder(folder, repair=True)
    assert len(report.left) == 1
    assert "nothing was repaired: 1 shards (s-0.tar) are not the recorded ones" in report.repairs[0]


# Shards that bowstore wrote


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The train split of eight images, as `bowstore shards` writes it."""
    for number in range(8):
        path = tmp_path / "source/train" / f"c{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny(number))
    make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=3, workers=1))
    return tmp_path / "out/train"


def state(root: Path) -> dict[str, tuple[str, int]]:
    return {path.name: (file_digest(path), path.stat().st_mtime_ns) for path in root.glob("*.tar")}


def test_a_damaged_shard_is_set_aside_and_written_again(own: Path, tmp_path: Path) -> None:
    assert verify_folder(own, deep=True).problems == []
    before = state(own)
    files = {path.name: file_digest(path) for path in own.iterdir() if path.is_file()}
    flip(own / "train-000001.tar", 1000)
    damaged = (own / "train-000001.tar").read_bytes()
    report = verify_folder(own, repair=True)
    assert report.damaged == ["train-000001.tar"]
    assert report.left == report.problems != []
    assert (
        "1 files were set aside as NAME.damaged (train-000001.tar); run the same `bowstore shards`" in report.repairs[0]
    )
    assert (own / "train-000001.tar.damaged").read_bytes() == damaged
    assert not (own / ".parts/train-000001.json").exists()
    make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=3, workers=1))
    after = state(own)
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    assert [name for name in before if before[name] != after[name]] == ["train-000001.tar"]
    (own / "train-000001.tar.damaged").unlink()
    assert {path.name: file_digest(path) for path in own.iterdir() if path.is_file()} == files
    assert verify_folder(own, deep=True).problems == []


def test_all_kinds_of_damage_to_own_shards_end_well(own: Path, tmp_path: Path) -> None:
    files = {path.name: file_digest(path) for path in own.iterdir() if path.is_file()}
    tars = sorted(own.glob("*.tar"))
    (own / "manifest.json").write_text("{")
    (own / INDEX_FILE).unlink()
    tars[0].unlink()
    os.truncate(tars[1], 2048)
    assert {problem.kind for problem in found(own)} == {"manifest", "index", "tar"}
    report = verify_folder(own, repair=True)
    assert report.left
    make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=3, workers=1))
    assert verify_folder(own).problems == []
    assert {name: file_digest(own / name) for name in files} == files


def test_a_manifest_that_is_gone_is_written_again(own: Path, tmp_path: Path) -> None:
    (own / "manifest.json").unlink()
    (problem,) = found(own)
    assert "manifest.json is missing: the shards are not complete" in problem.message
    assert "run the same `bowstore shards` command again" in verify_folder(own, repair=True).repairs[0]
    before = state(own)
    make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=3, workers=1))
    assert state(own) == before
    assert found(own) == []


def test_an_index_of_other_tars_is_told_by_the_manifest(own: Path) -> None:
    index = own / INDEX_FILE
    other = index.read_bytes()
    shutil.copytree(own, own.parent / "other", ignore=shutil.ignore_patterns("manifest.json", ".parts", "*-000002*"))
    build_index(own.parent / "other")
    shutil.copyfile(own.parent / "other" / INDEX_FILE, index)
    messages = [problem.message for problem in found(own)]
    assert "has 6 images of 0 classes, the manifest 8 of 2" in messages[0]
    assert "train-000002.tar: index and manifest differ" in messages[1]
    report = verify_folder(own, repair=True)
    assert report.left == []
    assert index.read_bytes() == other


def test_damage_to_own_shards_is_never_indexed(own: Path) -> None:
    flip(own / "train-000001.tar", 1000)
    with pytest.raises(MismatchError, match=r"1 shards of .* are not those of its manifest, .*train-000001\.tar"):
        build_index(own)
    (own / "manifest.json").unlink()
    members = places(own / "train-000001.tar")
    edit(own / "train-000001.tar", next(iter(members.values())).offset_data, b"<html>")
    with pytest.raises(DataError, match=r"train-000001\.tar: image '.*' has no readable header .*verify .* --repair"):
        build_index(own)


def test_repair_waits_for_nobody(own: Path) -> None:
    (own / INDEX_FILE).unlink()
    with exclusive_lock(own.parent / ".lock", "shards"), pytest.raises(BusyError, match="is in use"):
        verify_folder(own, repair=True)


# Deep


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Shards that others made, with images that no header tells of being bad."""
    pixels = textured_image(2, 48, 40)
    jpeg, png, webp = (encode(pixels, kind) for kind in ("JPEG", "PNG", "WEBP"))
    images = {
        "bad/cut.jpg": jpeg[:-200],
        "bad/noend.png": png[:-12],
        "bad/flipped.png": png[:200] + bytes([png[200] ^ 4]) + png[201:],
        "bad/large.webp": with_webp_size(webp, 480, 400),
        "good/plain.jpg": jpeg,
        "good/cmyk.jpg": encode(pixels, "JPEG", mode="CMYK"),
        "good/few.png": encode(pixels, "PNG", mode="P"),
        "good/still.webp": webp,
    }
    return write_members(tmp_path / "zoo/a.tar", list(images.items())).parent


def test_images_that_cannot_be_decoded_are_left_out(zoo: Path) -> None:
    index = build_index(zoo)
    assert found(zoo) == []
    report = verify_folder(zoo, deep=True)
    assert [problem.member for problem in report.problems] == [
        "bad/cut.jpg", "bad/noend.png", "bad/flipped.png", "bad/large.webp",
    ]  # fmt: skip
    place = places(zoo / "a.tar")["bad/cut.jpg"]
    first, last = place.offset_data, place.offset_data + place.size - 1
    assert f"member 'bad/cut.jpg', bytes {first} to {last}: cannot be decoded" in report.problems[0].message
    assert "unusual-png: Pillow decodes it, other decoders may not" in report.problems[1].message
    assert report.odd == {"cmyk": 1, "palette": 1}

    report = verify_folder(zoo, deep=True, repair=True)
    assert report.left == []
    after = open_index(zoo)
    assert list(after.keys()) == ["good/plain", "good/cmyk", "good/few", "good/still"]
    assert after.fingerprint != index.fingerprint
    assert after.fingerprint in report.repairs[0]
    assert "4 images were left out of the index and listed in quarantine.jsonl" in report.repairs[0]
    lines = [json.loads(line) for line in (zoo / "quarantine.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"a.tar/{problem.member}" for problem in report.problems]
    assert lines[1]["reason"] == "unusual-png: Pillow decodes it, other decoders may not"
    assert verify_folder(zoo, deep=True).problems == []
    assert build_index(zoo).fingerprint == after.fingerprint, "building again takes them back"
    check_dali_decodes(after)

    write_members(zoo / "a.tar", [("bad/cut.jpg", tiny(1)), ("good/plain.jpg", tiny(2))])
    assert len(build_index(zoo)) == 2, "another image of that name is another image"


def check_dali_decodes(index: Index) -> None:
    from bowstore.data.pipeline import clean_batches
    from bowstore.data.views import CleanView

    view = CleanView(size=32, resize=None, squash=False, mean=(0, 0, 0), std=(1, 1, 1))
    rows = np.arange(len(index))
    ((_, images_BCHW),) = clean_batches(ShardReader(index), view, rows, batch=len(rows), device=torch.device("cpu"))
    assert (images_BCHW[1:] - images_BCHW[:1]).abs().mean() < 0.1, "the same picture in four formats"


def test_deep_never_leaves_out_what_changed_on_disk(zoo: Path) -> None:
    build_index(zoo)
    place = places(zoo / "a.tar")["good/plain.jpg"]
    edit(zoo / "a.tar", place.offset_data + place.size - 100, bytes(100))
    report = verify_folder(zoo, deep=True, repair=True)
    assert "nothing was repaired" in report.repairs[0]
    assert any("member 'good/plain.jpg': bytes" in problem.message for problem in report.left)
    assert not (zoo / "quarantine.jsonl").exists()


# The command


def test_the_report_for_people_and_for_programs(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    write_members(root / "a.tar", [(f"{number:03d}.jpg", tiny(number)) for number in range(30)])
    build_index(root)
    for info in places(root / "a.tar").values():
        flip(root / "a.tar", info.offset_data + 200)
    report = verify_path(tmp_path)
    assert report.text().count("are not those that were indexed") == 20
    assert "shard a.tar: 10 problems more; --json lists all" in report.text()
    result = CliRunner().invoke(main, ["verify", str(root), "--deep", "--json"])
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert (value["sound"], len(value["problems"])) == (False, 30)
    first = value["problems"][0]
    assert (first["shard"], first["member"], first["first_byte"]) == ("a.tar", "000.jpg", 512)
    assert first["last_byte"] == 511 + len(tiny(0))


def test_the_command_repairs_and_says_so(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert (result.exit_code, "no index in" in result.stdout) == (1, True)
    result = CliRunner().invoke(main, ["verify", str(folder), "--repair"])
    assert (result.exit_code, "the index was built anew" in result.stdout) == (0, True)
    result = CliRunner().invoke(main, ["verify", str(folder), "--deep"])
    assert (result.exit_code, "every image decoded\nno problem found" in result.stdout) == (0, True)
