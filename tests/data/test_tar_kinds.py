"""What lies under the name of a tar: packed and joined ones, links and labels, pipes and folders, huge members."""

import bz2
import gzip
import io
import lzma
import os
import socket
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_sets import textured_image, write_words
from source_sets import shards_of
from tar_files import BLOCK, JPEG, encode, write_members

from bowstore.data import scan
from bowstore.data.config import ShardsConfig
from bowstore.data.index import build_index, open_index
from bowstore.data.shards import make_shards
from bowstore.data.table import INDEX_FILE
from bowstore.data.verify import verify_folder
from bowstore.errors import BowstoreError, CorruptError, DataError, MissingError
from bowstore.files import check_plain_file, read_json
from bowstore.words.store.verify import verify as verify_store

PIXELS = textured_image(1, 20, 30)
ZSTD = b"\x28\xb5\x2f\xfd\x04\x88" + bytes(600)


def _plain() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(JPEG)
        archive.addfile(info, io.BytesIO(JPEG))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(_plain(), mtime=0), r"compressed with gzip; unpack it first \(gunzip\)"),
        (bz2.compress(_plain()), r"compressed with bzip2; unpack it first \(bunzip2\)"),
        (lzma.compress(_plain()), r"compressed with xz; unpack it first \(unxz\)"),
        (ZSTD, r"compressed with zstd; unpack it first \(unzstd\)"),
        (gzip.compress(b"", mtime=0), r"compressed with gzip; unpack it first \(gunzip\)"),  # shorter than a header
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs .*run `git lfs pull`"),
        (b"<!DOCTYPE html><html>" + bytes(2000), "a web page .*take its download link"),
    ],
)
def test_what_is_no_tar_is_told_by_its_first_bytes(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "in/a.tar"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"a\.tar is no tar but {kind}"):
        build_index(tmp_path / "in")
    with pytest.raises(CorruptError, match=rf"a\.tar is no tar but {kind}"):
        make_shards(tmp_path / "in", tmp_path / "out", ShardsConfig(workers=1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.tar is empty \(0 bytes\): its download or copy did not happen"),
        (b"hello", r"a\.tar is no tar: it has 5 bytes, and a header has 512"),
        (b"x" * 2000, r"a\.tar is not a whole tar: the header at byte 0 of 2000 is none of a tar"),
        (bytes(BLOCK), r"a\.tar is cut: no end-of-archive mark at byte 0 of 512"),
    ],
)
def test_other_bytes(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(CorruptError, match=message):
        build_index(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.TAR.zst", "a.tar.bz2", "a.txz"])
def test_packed_tars_are_named_where_there_is_no_other(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingError, match=rf"no \*\.tar file in .*; unpack {name} and its like first"):
        build_index(tmp_path)


def test_files_that_are_almost_shards_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_members(tmp_path / "B.TAR", [("b.jpg", JPEG)])
    with pytest.raises(MissingError, match=r"no \*\.tar file in .*; rename B\.TAR to B\.tar, and its like"):
        build_index(tmp_path)
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG)])
    (tmp_path / "c.tar.zst").write_bytes(ZSTD)
    for other in ("._a.TAR", "a.tar.txt", "a.tar.json"):
        (tmp_path / other).write_bytes(b"")
    assert len(build_index(tmp_path)) == 1
    assert "2 files like B.TAR are no *.tar and are passed over; rename B.TAR to B.tar" in capsys.readouterr().err


@pytest.mark.parametrize("members", [[], [("a.jpg", b"<html>")]])
@pytest.mark.parametrize("deep", [False, True])
def test_verify_accepts_a_tar_without_a_row(tmp_path: Path, members: list[tuple[str, bytes]], deep: bool) -> None:
    """Empty, or with images that are all left out."""
    write_members(tmp_path / "a.tar", members)
    write_members(tmp_path / "b.tar", [("b.jpg", JPEG)])
    assert [entry.samples for entry in build_index(tmp_path).shards] == [0, 1]
    assert verify_folder(tmp_path, deep=deep).problems == []
    with open(tmp_path / "a.tar", "r+b") as file:
        file.seek(BLOCK if members else 3000)
        file.write(b"damage")
    (problem,) = verify_folder(tmp_path, deep=deep).problems
    assert problem.shard == "a.tar"
    assert problem.kind == "tar"


def test_a_volume_label_and_folder_listings_are_passed_over(tmp_path: Path) -> None:
    label, listing = tarfile.TarInfo("my backup"), tarfile.TarInfo("folder")
    label.type, listing.type, listing.size = b"V", b"D", 600
    write_members(tmp_path / "in/a.tar", [(label, b""), ("a.jpg", JPEG), (listing, bytes(600)), ("b.jpg", JPEG)])
    assert list(build_index(tmp_path / "in").keys()) == ["a", "b"]
    assert verify_folder(tmp_path / "in", deep=True).problems == []
    assert sorted(shards_of(tmp_path / "in", tmp_path / "out")["train"]) == ["a", "b"]


@pytest.mark.parametrize("padding", [0, 7 * BLOCK])
def test_joined_archives_are_told(tmp_path: Path, padding: int) -> None:
    first, second = _plain(), _plain().replace(b"a.jpg", b"b.jpg", 1)
    write_members(tmp_path / "b.tar", [("b.jpg", JPEG)])
    second = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(first + bytes(padding) + second)
    with pytest.raises(
        CorruptError,
        match=rf"has zeros from byte 1536 on, and a member behind them at byte {len(first) + padding}: archives that "
        r"were joined, .*`tar --concatenate` joins them",
    ):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, r"'b\.jpg' at byte \d+ is a hard link, not a plain file; .* `tar --hard-dereference`"),
        (tarfile.SYMTYPE, r"'b\.jpg' at byte \d+ is a symbolic link, not a plain file; .* `tar --dereference`"),
        (b"M", r"'b\.jpg' at byte \d+ is the rest of a file that begins in another volume; .* without --multi-volume"),
    ],
)
def test_links_are_refused_with_the_remedy(tmp_path: Path, kind: bytes, message: str) -> None:
    link = tarfile.TarInfo("b.jpg")
    link.type, link.linkname = kind, "a.jpg"
    write_members(tmp_path / "in/a.tar", [("a.jpg", JPEG), (link, b"")])
    with pytest.raises(DataError, match=message):
        build_index(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        make_shards(tmp_path / "in", tmp_path / "out", ShardsConfig(workers=1))


@pytest.mark.parametrize("digits", [20, 4301, 6000])
@pytest.mark.parametrize("field", ["size", "length"])
def test_pax_numbers_of_many_digits_are_damage(tmp_path: Path, field: str, digits: int) -> None:
    """Python itself refuses to read so many."""
    number = b"9" * digits
    record = b" size=" + number + b"\n"
    record = (
        str(len(record) + len(str(len(record) + 4))).encode() + record if field == "size" else number + b" size=1\n"
    )
    extended, plain = tarfile.TarInfo("PaxHeaders/a.jpg"), tarfile.TarInfo("a.jpg")
    extended.type, extended.size, plain.size = tarfile.XHDTYPE, len(record), len(JPEG)
    with open(tmp_path / "a.tar", "wb") as file:
        for info, data in ((extended, record), (plain, JPEG)):
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
        file.write(bytes(2 * BLOCK))
    with pytest.raises(CorruptError, match=r"the header at byte 0 of \d+ is damaged \(its PAX records hold") as caught:
        build_index(tmp_path)
    assert len(str(caught.value)) < 300


@pytest.fixture
def sparse_tar(tmp_path: Path) -> Path:
    """One of a few kilobytes on disk with a member that nobody reads, of 200 MiB, and an image of 100 MiB."""
    path = tmp_path / "in/a.tar"
    path.parent.mkdir()
    with open(path, "wb") as file:
        for name, size, data in (("a.jpg", len(JPEG), JPEG), ("a.npy", 200 << 20, b""), ("b.jpg", 100 << 20, b"")):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT) + data)
            file.seek(size - len(data) + -size % BLOCK, os.SEEK_CUR)
        file.write(bytes(2 * BLOCK))
    return path


def test_members_of_any_size_cost_no_memory(sparse_tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_IMAGE_BYTES", 1 << 24)
    tracemalloc.start()
    index = build_index(sparse_tar.parent, workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(index.keys()) == ["a"]
    assert peak < 32 << 20
    lines = (sparse_tar.parent / "quarantine.jsonl").read_text()
    assert f"{100 << 20} bytes, more than {1 << 24}" in lines


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a named pipe": _pipe,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture(params=NO_FILES)
def no_file(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Callable[[Path], object]]]:
    monkeypatch.chdir(Path.cwd())  # and back
    return request.param, NO_FILES[request.param]


def test_what_is_no_file_is_never_opened(tmp_path: Path, no_file: tuple[str, Callable[[Path], object]]) -> None:
    kind, make = no_file
    message = rf"a\.tar is {kind} and not a file; move it away"
    write_members(tmp_path / "in/b.tar", [("b.jpg", JPEG)])
    build_index(tmp_path / "in")
    make(tmp_path / "in/a.tar")
    with pytest.raises(CorruptError, match=message):
        build_index(tmp_path / "in")
    (problem,) = verify_folder(tmp_path / "in", deep=True).problems
    assert f"a.tar is {kind} and not a file" in problem.message
    for name in (INDEX_FILE, "quarantine.jsonl", "manifest.json"):
        path = tmp_path / f"{name} in" / "b.tar"
        write_members(path, [("b.jpg", JPEG)])
        build_index(path.parent)
        (path.parent / name).unlink(missing_ok=True)
        make(path.parent / name)
        if name == INDEX_FILE:
            with pytest.raises(CorruptError, match=rf"{INDEX_FILE} is {kind} and not a file"):
                open_index(path.parent)
        else:
            with pytest.raises(BowstoreError, match=rf"{kind} and not a file"):
                build_index(path.parent)


def test_a_source_with_pipes_is_never_waited_for(tmp_path: Path) -> None:
    write_members(tmp_path / "tars/train-0.tar", [("b.jpg", JPEG)])
    os.mkfifo(tmp_path / "tars/train-1.tar")
    with pytest.raises(DataError, match=r"train-1\.tar is a named pipe and not a file"):
        make_shards(tmp_path / "tars", tmp_path / "out", ShardsConfig(source="webdataset", workers=1))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.jpg").write_bytes(JPEG)
    os.mkfifo(tmp_path / "files/b.jpg")
    (report,) = make_shards(tmp_path / "files", tmp_path / "out", ShardsConfig(workers=1))
    assert report.written == 1


@pytest.mark.parametrize("name", ["zarr.json", "block3/zarr.json", "block3/words/c/0/0/0", "key_hash/c/0"])
def test_a_store_with_pipes_is_never_waited_for(tmp_path: Path, name: str) -> None:
    store = write_words(tmp_path / "words.zarr", np.zeros((6, 4, 4), np.uint16))
    (store / name).unlink()
    os.mkfifo(store / name)
    problems = " ".join(verify_store(store).problems)
    assert f"{store / name} is a named pipe and not a file" in problems


def test_check_plain_file(tmp_path: Path) -> None:
    check_plain_file(tmp_path / "nothing")
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    with pytest.raises(CorruptError, match="to pipe is a named pipe and not a file"):
        read_json(tmp_path / "to pipe")


def test_a_tar_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(MissingError, match=r"a\.tar is a link to a file that does not exist; restore the file"):
        build_index(tmp_path)


def test_index_says_how_many_images_are_not_turned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>8</tiff:Orientation></x:xmpmeta>'
    members = [
        ("a.jpg", encode(PIXELS, "JPEG", exif=turned)),
        ("b.png", encode(PIXELS, "PNG", exif=turned)),
        ("c.webp", encode(PIXELS, "WEBP", exif=turned)),
        ("d.jpg", encode(PIXELS, "JPEG", xmp=xmp)),
        ("e.jpg", encode(PIXELS, "JPEG", exif=upright)),
        ("f.jpg", JPEG),
        ("g.jpg", encode(PIXELS, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")),  # cut
    ]
    write_members(tmp_path / "a.tar", members)
    assert build_index(tmp_path).height.tolist()[:5] == [20] * 5, "as they lie in the file"
    said = capsys.readouterr().err
    assert (
        "note: 4 images carry an EXIF rotation, which nothing applies, for example a.tar/a.jpg: they are used as"
        in said
    )
    write_members(tmp_path / "a.tar", members[4:])
    build_index(tmp_path)
    assert "rotation" not in capsys.readouterr().err
