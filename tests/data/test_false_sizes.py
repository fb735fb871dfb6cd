"""Headers that claim more pixels than there are data for: refused before a decoder makes room for them."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_sets import textured_image
from tar_files import encode, with_jpeg_size, with_png_size, with_webp_size, write_members

from bowstore.data import scan
from bowstore.data.file_reader import FileReader
from bowstore.data.image_header import MAX_PIXELS, FalseSize, ImageSize, image_size
from bowstore.data.images import Prepared, UnusableImage, prepare
from bowstore.data.index import build_index, open_index
from bowstore.data.reader import ShardReader
from bowstore.data.verify import verify_folder
from bowstore.errors import DataError

PIXELS = textured_image(3, 32, 32)
LARGE = 12_000


def encoded(kind: str, **options: object) -> bytes:
    return encode(PIXELS, kind, **options)


JPEG, PROGRESSIVE, PNG, WEBP = encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("WEBP")
RESTARTS = encoded("JPEG", restart_marker_blocks=2)
HOLLOW = with_jpeg_size(JPEG, LARGE, LARGE)


def _with_gif_screen(data: bytes, side: int) -> bytes:
    return data[:6] + struct.pack("<HH", side, side) + data[10:]


def _with_size(data: bytes, form: str, side: int) -> bytes:
    old, new = struct.pack(form, 32, 32), struct.pack(form, side, side)
    assert old in data
    return data.replace(old, new)


def _with_tiff_size(data: bytes, side: int) -> bytes:
    """Width, length and rows a strip."""
    entries = bytearray(data)
    first = int.from_bytes(data[4:8], "little") + 2
    for at in range(first, first + 12 * int.from_bytes(data[first - 2 : first], "little"), 12):
        if int.from_bytes(data[at : at + 2], "little") in (256, 257, 278):
            entries[at + 8 : at + 12] = struct.pack("<I", side)
    return bytes(entries)


CLAIMS: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda side: with_jpeg_size(JPEG, side, side),
    "progressive jpeg": lambda side: with_jpeg_size(PROGRESSIVE, side, side),
    "jpeg with restarts": lambda side: with_jpeg_size(RESTARTS, side, side),
    "png": lambda side: with_png_size(PNG, side, side),
    "webp": lambda side: with_webp_size(WEBP, side, side),
    "gif": lambda side: _with_gif_screen(encoded("GIF"), side),
    "bmp": lambda side: _with_size(encoded("BMP"), "<ii", side),
    "ppm": lambda side: encoded("PPM").replace(b"32 32", b"%d %d" % (side, side), 1),
    "jpeg 2000": lambda side: _with_size(encoded("JPEG2000"), ">II", side),
    "avif": lambda side: _with_size(encoded("AVIF"), ">II", side),
    **{
        f"{name} tiff": lambda side, name=name: _with_tiff_size(encoded("TIFF", compression=name), side)  # type: ignore[misc]
        for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    },
    "fax tiff": lambda side: _with_tiff_size(encoded("TIFF", mode="1", compression="group4"), side),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_small_image_that_claims_144_megapixels(name: str) -> None:
    data = CLAIMS[name](LARGE)
    bound = 8 * LARGE if name == "fax tiff" else 32768
    reason = rf"^12000 x 12000 pixels in {len(data)} bytes, more than {bound} a byte: the header is wrong, or the image"
    with pytest.raises(UnusableImage, match=reason):
        prepare(data)
    if name in ("jpeg", "progressive jpeg", "jpeg with restarts", "png", "webp"):
        with pytest.raises(FalseSize, match=reason):
            image_size(data)


@pytest.mark.parametrize(
    ("data", "most"),
    [
        (with_jpeg_size(JPEG, 500, 500), 40_000),
        (with_jpeg_size(RESTARTS, 500, 500), 40_000),
        (with_jpeg_size(PROGRESSIVE, 500, 500), 40_000),
        (with_jpeg_size(JPEG, 500, 500) + bytes(100_000), 40_000),  # padding holds no pixels
        (with_png_size(PNG, 4000, 4000), 1032 * len(PNG)),
        (with_webp_size(WEBP, 2000, 2000), 1024 * len(WEBP)),
    ],
)
def test_what_the_bytes_can_hold_at_most(data: bytes, most: int) -> None:
    """The bounds of the formats, for claims that are no large image by themselves."""
    with pytest.raises(FalseSize, match=r"a header of \d+ x \d+ pixels before data for \d+ of them at most") as caught:
        image_size(data)
    assert int(str(caught.value).split(" for ")[1].split()[0]) <= most
    with pytest.raises(UnusableImage, match="it is wrong, or the data are cut"):
        prepare(data)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 200), (101, 100)])
@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_blocks": 3}, {"progressive": True}])
def test_whole_jpegs_pass(size: tuple[int, int], subsampling: object, options: dict[str, object]) -> None:
    """The fewest bits there are: images of one colour, of the lowest quality, with tables of their own."""
    for pixels in (textured_image(5, *size), np.zeros((*size, 3), np.uint8)):
        for quality in (1, 100):
            data = encode(pixels, "JPEG", quality=quality, subsampling=subsampling, **options)
            assert prepare(data) == Prepared(data, "jpg", *size, None)


def test_empty_images_of_every_format_pass() -> None:
    black = np.zeros((600, 900, 3), np.uint8)
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {})):
        assert prepare(encode(black, kind, **options))[2:4] == (600, 900), kind  # type: ignore[arg-type]
    assert prepare(encode(black, "WEBP", lossless=True))[2:4] == (600, 900)


@pytest.mark.parametrize("options", [{"lossless": True}, {"compression": "group4", "strip_size": 1 << 30}])
def test_blank_pages_pass(options: dict[str, object]) -> None:
    """The fewest bytes that encoders write for a large image; the packing of WebP and of faxes has no bound."""
    blank, data = np.full((4200, 4200), 255, np.uint8), io.BytesIO()
    Image.fromarray(blank).convert("1").save(data, "WEBP" if "lossless" in options else "TIFF", **options)
    assert len(data.getvalue()) < 2000
    prepared = prepare(data.getvalue())
    assert image_size(prepared.data) == prepared[2:4] == (4200, 4200)


@pytest.mark.parametrize("thumbnail", [b"", b"MM\0*" + JPEG])
def test_a_jpeg_without_an_end_mark_is_measured_by_its_own_bytes(thumbnail: bytes) -> None:
    """Not by the end mark of the thumbnail in its header."""
    data = encoded("JPEG", exif=b"Exif\0\0" + thumbnail)
    assert data.endswith(b"\xff\xd9")
    assert image_size(data[:-2]) == (32, 32)
    with pytest.raises(FalseSize, match=r"500 x 500 pixels before data for [1-9]"):
        image_size(with_jpeg_size(data[:-2], 500, 500))


@pytest.mark.parametrize("height", [40, 48, 64])
def test_a_jpeg_that_lacks_one_row_of_blocks_is_cut(height: int) -> None:
    """libjpeg would fill it with grey, without a word that Pillow hears."""
    plain = encoded("JPEG", subsampling=0)
    assert prepare(plain + b"junk").change is None
    with pytest.raises(UnusableImage, match=r"image file is truncated \(\d+ bytes not processed\)"):
        prepare(with_jpeg_size(plain, height, 32))


def test_index_leaves_them_out(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.jpg", HOLLOW), ("c.png", with_png_size(PNG, LARGE, LARGE))])
    assert list(build_index(tmp_path).keys()) == ["a"]
    lines = (tmp_path / "quarantine.jsonl").read_text()
    assert lines.count("12000 x 12000 pixels in ") == 2


@pytest.fixture
def indexed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards that were indexed when nobody looked at what a header claims."""
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.jpg", HOLLOW)])
    with monkeypatch.context() as patch:
        patch.setattr(
            scan, "image_size", lambda data: ImageSize(LARGE, LARGE) if bytes(data) == HOLLOW else ImageSize(32, 32)
        )
        assert list(build_index(tmp_path).keys()) == ["a", "b"]
    return tmp_path


@pytest.mark.parametrize("deep", [False, True])
def test_verify_finds_them(indexed_before: Path, deep: bool) -> None:
    report = verify_folder(indexed_before, deep=deep, repair=True)
    (problem,) = report.problems
    assert problem.kind == "image"
    assert "holds no image 'b' at bytes " in problem.message
    assert "(12000 x 12000 pixels in " in problem.message
    assert report.left == []
    assert list(open_index(indexed_before).keys()) == ["a"]


def test_readers_stop_before_they_are_decoded(indexed_before: Path, tmp_path: Path) -> None:
    reader = ShardReader(open_index(indexed_before))
    assert len(reader.read(np.array([0]))) == 1
    with pytest.raises(DataError, match=r"image 'b' of .* cannot be decoded \(12000 x 12000 pixels in \d+ bytes, more"):
        reader.read(np.array([0, 1]))
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "c"]
    for path, data in zip(paths, (JPEG, HOLLOW, b"no image"), strict=True):
        path.write_bytes(data)
    files = FileReader(paths)
    assert [bytes(data) for data in files.read(np.array([0, 2]))] == [JPEG, b"no image"]
    with pytest.raises(DataError, match=r"image .*b\.jpg cannot be decoded \(12000 x 12000 pixels in "):
        files.read(np.array([1]))


def test_the_largest_image_is_bounded_whatever_its_bytes() -> None:
    with pytest.raises(FalseSize, match=f"20000 x 20000 pixels, more than {MAX_PIXELS}"):
        image_size(with_jpeg_size(JPEG, 20_000, 20_000) + bytes(10**6))
