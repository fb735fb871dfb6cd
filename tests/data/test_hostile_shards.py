"""Tars and images that were made to do harm: each is refused with its own words, or left out, and nothing is run."""

import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
from shard_sets import textured_image
from tar_files import (
    BLOCK,
    JPEG,
    edit_header,
    encode,
    places,
    with_jpeg_size,
    with_png_size,
    with_two_frames,
    with_webp_size,
    write_members,
)

from bowstore.data.index import INDEX_FILE, build_index, open_index
from bowstore.data.table import COLUMNS, write_table
from bowstore.data.tar import BrokenTar, RefusedMember
from bowstore.data.verify import verify_folder
from bowstore.errors import CorruptError, DataError

PIXELS = textured_image(1, 48, 40)


def header(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.jpg", r"names of 1 members are not <key>\.<extension> .*\['\.\./a\.jpg'\]"),
        ("a/../../b.jpg", r"names of 1 members are not <key>\.<extension> .*\['a/\.\./\.\./b\.jpg'\]"),
        ("a b.jpg", r"names of 1 members are not <key>\.<extension> .*\['a b\.jpg'\]"),
        ("b\u00e4r.jpg", r"names of 1 members are not <key>\.<extension> .*\['bär\.jpg'\]"),
        ("a\nb.jpg", r"names of 1 members are not <key>\.<extension> .*\['a\\nb\.jpg'\]"),
        ("a.j\tpg", r"names of 1 members are not <key>\.<extension>"),
        ("noextension", r"names of 1 members are not <key>\.<extension>"),
        ("dir.with.dots/a.jpg", r"names of 1 members are not <key>\.<extension> in ASCII without .*other dots"),
    ],
)
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_names(tmp_path: Path, name: str, message: str, tar_format: int) -> None:
    write_members(tmp_path / "a.tar", [("first.jpg", JPEG), (name, JPEG)], tar_format)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "is a symbolic link, not a plain file"),
        (tarfile.LNKTYPE, "is a hard link, not a plain file"),
        (tarfile.CHRTYPE, "is a device, not a plain file"),
        (tarfile.BLKTYPE, "is a device, not a plain file"),
        (tarfile.FIFOTYPE, "is a FIFO, not a plain file"),
        (tarfile.GNUTYPE_SPARSE, "is a sparse file, not a plain file"),
        (b"Q", r"is of the unknown type b'Q', not a plain file"),
    ],
)
def test_hostile_kinds_of_members(tmp_path: Path, kind: bytes, message: str) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), (header("b.jpg", kind), b"")])
    with pytest.raises(
        RefusedMember, match=rf"a\.tar: member 'b\.jpg' at byte {places(tmp_path / 'a.tar')['b.jpg'].offset} {message}"
    ):
        build_index(tmp_path)


def test_hostile_names_behind_a_nul(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG)])
    edit_header(tmp_path / "a.tar", 0, slice(0, 100), b"a.jpg\0.pkl")
    with pytest.raises(RefusedMember, match="hides a part of its name behind a NUL"):
        build_index(tmp_path)
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"path": "a\0b.jpg"}
    write_members(tmp_path / "a.tar", [(info, JPEG)], tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=r"names of 1 members|has another name"):
        build_index(tmp_path)


def test_hostile_duplicates(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.jpg", JPEG)])
    with pytest.raises(DataError, match=r"member 'a\.jpg' at byte \d+ occurs twice"):
        build_index(tmp_path)
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("./a.jpg", JPEG)])
    with pytest.raises(DataError, match=r"samples hold several images|occurs twice"):
        build_index(tmp_path)
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.jpg", JPEG)])
    with pytest.raises(DataError, match=r"member 'a\.jpg' at byte \d+ has a key that occurs twice, 'a'"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"77777777777\0", r"is cut, or the size of member 'b\.jpg' is wrong: .* ends at byte 8589936640 of \d+"),
        (b"\x80" + b"\x7f" * 11, r"is cut, or the size of member 'b\.jpg' is wrong"),
        (b"\xff" * 12, r"the header at byte \d+ of \d+ is damaged \(its size is"),
        (b"-0000000010\0", r"is damaged \(its size is"),
        (b"0000000019\0", r"is damaged \(its size is"),
        (b"1_0", r"is damaged \(its size is"),
    ],
)
def test_hostile_sizes(tmp_path: Path, size: bytes, message: str) -> None:
    path = write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    edit_header(path, places(path)["b.jpg"].offset, slice(124, 136), size)
    with pytest.raises(BrokenTar, match=message):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"size": "1"}, r"has 989 bytes by its header, 1 by PAX"),
        ({"size": str(2**40)}, r"has 989 bytes by its header, 1099511627776 by PAX"),
        ({"size": "-5"}, r"is damaged \(its PAX records hold"),
        ({"size": "many"}, r"is damaged \(its PAX records hold"),
        ({"path": "../b.jpg"}, r"has another name, 'a\.jpg', in its plain header"),
        ({"path": "b.jpg"}, r"member 'b\.jpg' at byte \d+ has another name, 'a\.jpg', in its plain header"),
        ({"GNU.sparse.major": "1", "GNU.sparse.name": "x"}, r"the member behind byte 0 is a sparse file"),
    ],
)
def test_hostile_pax_headers(tmp_path: Path, records: dict[str, str], message: str) -> None:
    # Written by hand: tarfile would put the size that it knows.
    body = b"".join(_record(key, value) for key, value in records.items())
    extended = tarfile.TarInfo("PaxHeaders/a.jpg")
    extended.type, extended.size = tarfile.XHDTYPE, len(body)
    plain = tarfile.TarInfo("a.jpg")
    plain.size = len(JPEG)
    with open(tmp_path / "a.tar", "wb") as file:
        for info, data in ((extended, body), (plain, JPEG)):
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
        file.write(bytes(2 * BLOCK))
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


def _record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text) + len(str(len(text)))
    return str(len(text) + len(str(length))).encode() + text


def test_hostile_global_headers(tmp_path: Path) -> None:
    for records, message in (({"path": "x.jpg"}, "renames or resizes all members"), ({"size": "0"}, "renames or")):
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=records):
            pass
        with pytest.raises(RefusedMember, match=message):
            build_index(tmp_path)


def test_hostile_extended_headers_are_bounded(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [(header("x" * 80, tarfile.GNUTYPE_LONGNAME), b""), ("a.jpg", JPEG)])
    edit_header(path, 0, slice(124, 136), b"%011o" % (1 << 30))
    with pytest.raises(RefusedMember, match="is an extended header of 1073741824 bytes, more than 1048576"):
        build_index(tmp_path)
    path.write_bytes(b"")
    with open(path, "wb") as file:  # headers before headers, without end
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, 0
        file.write(info.tobuf(tarfile.USTAR_FORMAT) * 5000)
    with pytest.raises(BrokenTar, match="no end-of-archive mark"):
        build_index(tmp_path)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch sprung",)


def test_hostile_pickles_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "sprung"
    payload = pickle.dumps(_Trap())
    monkeypatch.chdir(tmp_path)
    members = [("a.jpg", JPEG), *((f"a.{kind}", payload) for kind in ("pyd", "pth", "pkl", "pt", "npy", "cls.pyd"))]
    write_members(tmp_path / "shards/a.tar", [*members, ("a.json", payload), ("a.txt", payload)])
    index = build_index(tmp_path / "shards")
    assert (len(index), index.label.tolist()) == (1, [-1])
    assert verify_folder(tmp_path / "shards", deep=True).problems == []
    assert not trap.exists()


BOMBS = {
    "jpeg.jpg": with_jpeg_size(encode(PIXELS, "JPEG"), 60_000, 60_000),
    "png.png": with_png_size(encode(PIXELS, "PNG"), 60_000, 60_000),
    "webp.webp": encode(PIXELS, "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),  # with a canvas
}
_CANVAS = BOMBS["webp.webp"].index(b"VP8X") + 12
BOMBS["webp.webp"] = (
    BOMBS["webp.webp"][:_CANVAS] + (16_383).to_bytes(3, "little") * 2 + BOMBS["webp.webp"][_CANVAS + 6 :]
)
LIARS = {
    "frames.jpg": (with_two_frames(encode(PIXELS, "JPEG"), 8, 8), "a JPEG header with a second frame"),
    "progressive.jpg": (
        with_two_frames(encode(PIXELS, "JPEG", progressive=True), 480, 400),
        "a JPEG header with a second frame",
    ),
    "empty.jpg": (with_jpeg_size(encode(PIXELS, "JPEG"), 0, 40), "an image of 0 x 40 pixels"),
    "gap.jpg": (JPEG[:20] + b"abc" + JPEG[20:], "a JPEG header with stray bytes at byte 20"),
    "check.png": (
        encode(PIXELS, "PNG")[:20] + bytes(4) + encode(PIXELS, "PNG")[24:],
        "a PNG header that is damaged",
    ),
    "none.png": (with_png_size(encode(PIXELS, "PNG"), 0, 0), "an image of 0 x 0 pixels"),
    "cut.webp": (encode(PIXELS, "WEBP")[:-40], "a WebP image that is cut"),
    "kind.webp": (b"RIFF\x20\0\0\0WEBPVP9 " + bytes(40), "a WebP header of an unknown kind"),
    "gif.jpg": (encode(PIXELS, "GIF"), "no JPEG, PNG or WebP image: it starts with b'GIF87a"),
}


def test_hostile_images_are_left_out_by_their_headers(tmp_path: Path) -> None:
    """Bombs by their number of pixels, and what decoders could read in two ways."""
    images = BOMBS | {name: data for name, (data, _) in LIARS.items()}
    write_members(tmp_path / "a.tar", [("good.jpg", JPEG), *images.items()])
    index = build_index(tmp_path)
    assert list(index.keys()) == ["good"]
    reasons = (tmp_path / "quarantine.jsonl").read_text()
    for name in BOMBS:
        assert name in reasons
    assert reasons.count("60000 x 60000 pixels, more than 178956970") == 2
    assert "16384 x 16384 pixels, more than 178956970" in reasons
    for name, (_, reason) in LIARS.items():
        (line,) = [line for line in reasons.splitlines() if f"/{name}" in line]
        assert reason in line, name


def test_hostile_images_are_found_by_decoding(tmp_path: Path) -> None:
    images = {
        "1.png": with_png_size(encode(PIXELS, "PNG"), 480, 400),
        "2.png": with_png_size(encode(PIXELS, "PNG"), 8, 8),
        "3.webp": with_webp_size(encode(PIXELS, "WEBP"), 480, 400),
        "4.jpg": encode(PIXELS, "JPEG")[:-2] + with_jpeg_size(encode(PIXELS, "JPEG"), 480, 400)[2:],
    }
    write_members(tmp_path / "a.tar", [("good.jpg", JPEG), *images.items()])
    build_index(tmp_path)
    problems = verify_folder(tmp_path, deep=True).problems
    assert [problem.member for problem in problems] == list(images)
    assert len(open_index(tmp_path)) == 5


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "x/a.tar", "..", "a\0.tar"])
def test_hostile_shard_names_in_an_index(tmp_path: Path, name: str) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG)])
    index = build_index(tmp_path)
    meta = {
        "version": 2,
        "fingerprint": index.fingerprint,
        "classes": [],
        "image_ext": [],
        "label_field": None,
        "shards": [[name, 1, 10240, index.shards[0].digest]],
    }
    lengths = {column: len(getattr(index, column)) for column in COLUMNS}
    columns = {column: getattr(index, column).copy() for column in COLUMNS}
    write_table(tmp_path / INDEX_FILE, meta, lengths, lambda column: iter([columns[column]]))
    message = r"is damaged \(shards\.0\.0: shard name '.*' is not that of a \*\.tar in the folder\)"
    with pytest.raises(CorruptError, match=message):
        open_index(tmp_path)


def test_hostile_garbage_never_ends_in_another_error(tmp_path: Path) -> None:
    """Random damage to a small tar: either it is indexed, or it is refused in one line."""
    path = write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.json", b'{"label": 1}')], tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = []
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 3, 20])):
            data[generator.randrange(2500)] = generator.randrange(256)
        path.write_bytes(data[: generator.choice([len(data), len(data), generator.randrange(len(data))])])
        try:
            build_index(tmp_path)
        except DataError as error:
            refused.append(str(error))
        verify_folder(tmp_path)
    assert len(refused) > 50
    assert not any("\n" in message for message in refused)
