"""The tar reader against Python's own, where that one is right."""

import random
import tarfile
from pathlib import Path

import pytest
from tar_files import BLOCK, edit, edit_header, places, write_members

from bowstore.data import tar
from bowstore.data.tar import BrokenTar, Member, TarReader, header_names, keeps_contract, split_key
from bowstore.files import file_digest

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def members_of(path: Path) -> tuple[list[tuple[Member, bytes]], str]:
    reported: list[int] = []
    with open(path, "rb", buffering=0) as file:
        reader = TarReader(file, path, reported.append, digested=True)
        found = []
        while member := reader.next_member():
            found.append((member, reader.read(member)))
        digest = reader.digest()
    assert sum(reported) == path.stat().st_size
    return found, digest


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("read_bytes", [700, 5000, 1 << 22])
def test_members_are_those_of_tarfile(
    tmp_path: Path, tar_format: int, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "_READ_BYTES", read_bytes)
    generator = random.Random(tar_format)
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number in range(30):
        folder = "d" * generator.choice([1, 40, 90])
        leaf = "e" * generator.choice([1, 60] if tar_format == tarfile.USTAR_FORMAT else [1, 60, 120])
        data = generator.randbytes(generator.choice([0, 1, 511, 512, 513, 2000, 20_000]))
        members.append((f"{generator.choice(['', './'])}{folder}/{leaf}{number}.jpg", data))
        if number % 7 == 0:
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            members.append((info, b""))
    path = write_members(tmp_path / "a.tar", members, tar_format)
    found, digest = members_of(path)
    with tarfile.open(path) as archive:
        expected = [
            (Member(info.name, info.offset_data, info.size), archive.extractfile(info).read())  # type: ignore[union-attr]
            for info in archive
            if info.isreg()
        ]
    assert found == expected
    assert digest == file_digest(path)
    for member, _ in found:
        header = path.read_bytes()[member.offset - BLOCK : member.offset]
        assert header_names(header, split_key(member.name)[0].encode() + b".")
        assert not header_names(header, b"another.")


def test_fractions_of_a_second_and_binary_sizes_are_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.mtime = 1.5
    path = write_members(tmp_path / "pax.tar", [(info, b"123")], tarfile.PAX_FORMAT)
    assert members_of(path)[0] == [(Member("a.jpg", 3 * BLOCK, 3), b"123")]
    path = write_members(tmp_path / "gnu.tar", [("a.jpg", b"123")], tarfile.GNU_FORMAT)
    edit_header(path, 0, slice(124, 136), b"\x80" + (3).to_bytes(11, "big"))
    assert members_of(path)[0] == [(Member("a.jpg", BLOCK, 3), b"123")]


def test_many_folders_in_a_row_are_passed_over(tmp_path: Path) -> None:
    folders: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number in range(3000):
        info = tarfile.TarInfo(f"f{number}")
        info.type = tarfile.DIRTYPE
        folders.append((info, b""))
    path = write_members(tmp_path / "a.tar", [*folders, ("a.jpg", b"1")])
    assert [member.name for member, _ in members_of(path)[0]] == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a/b/0001.jpg", "a/b/0001", "jpg"),
        ("./a/0001.JPEG", "a/0001", "jpeg"),
        ("0001.0.jpg", "0001", "0.jpg"),
        ("a.b/1.jpg", "a.b/1", "jpg"),
        ("./1.seg.PNG", "1", "seg.png"),
        ("noextension", "noextension", ""),
    ],
)
def test_key_and_extension(name: str, key: str, extension: str) -> None:
    assert split_key(name) == (key, extension)


def test_the_key_contract() -> None:
    assert keeps_contract("a/b_1-x", "0.jpg")
    for key, extension in (("a b", "jpg"), ("bär", "jpg"), ("a.b", "jpg"), ("a", ""), ("a", "j\npg"), ("a\0", "jpg")):
        assert not keeps_contract(key, extension)


def test_an_end_without_zeros_behind_it_is_no_end(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    edit(path, places(path)["b.jpg"].offset, bytes(BLOCK))
    with pytest.raises(BrokenTar, match=r"zeroed block at byte 1024: data follows .*, first at byte 1536"):
        members_of(path)
    path.write_bytes(path.read_bytes()[: 2 * BLOCK])
    with pytest.raises(BrokenTar, match=r"is cut: no end-of-archive mark at byte 1024 of 1024"):
        members_of(path)
