"""TIFFs of every layout that Pillow opens: the values that come out are the ones that the tags mean.

The files are laid out here, tag by tag, because Pillow writes few of them.

Legend: H W pixels, S samples a pixel.
"""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bowstore.data.image_header import UnusableImage
from bowstore.data.images import prepare

HEIGHT, WIDTH = 8, 12
GREY = np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.int64).reshape(HEIGHT, WIDTH)
COLOUR = np.stack([GREY, 255 - GREY, GREY.T.reshape(HEIGHT, WIDTH)], -1)
BLACK_IS_ZERO, WHITE_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 1, 0, 2, 3, 5, 6
_LITTLE, _BIG = "<", ">"
_RAW, _DEFLATE = 1, 8
_SIGNED, _FLOAT = 2, 3


def tiff(
    values: NDArray[np.int64],
    bits: int,
    photometric: int,
    *,
    order: str = _LITTLE,
    planes: bool = False,
    compression: int = _RAW,
    data: bytes | None = None,
    tags: dict[int, Sequence[int]] | None = None,
) -> bytes:
    """A TIFF of one strip, or one a plane, from integers (H, W, S); `data` in place of their bytes."""
    height, width, samples = values.shape
    rows = [values[..., s] for s in range(samples)] if planes else [values.reshape(height, -1)]
    strips = [_packed(part, bits, order) for part in rows] if data is None else [data]
    strips = [zlib.compress(strip) for strip in strips] if compression == _DEFLATE else strips
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * samples), 259: ("H", [compression]),
        262: ("H", [photometric]), 273: ("I", [0] * len(strips)), 277: ("H", [samples]), 278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]), 284: ("H", [2 if planes else 1]),
        **{tag: ("H", value) for tag, value in (tags or {}).items()},
    }  # fmt: skip
    first = 8 + 2 + 12 * len(entries) + 4
    for _ in range(2):  # the second time, with the places of the strips
        table, tail = struct.pack(order + "H", len(entries)), b""
        for tag, (kind, numbers) in sorted(entries.items()):
            field = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
            if len(field) > 4:
                tail += b"\0" * (len(tail) % 2)
                place, tail = struct.pack(order + "I", first + len(tail)), tail + field
            else:
                place = field.ljust(4, b"\0")
            table += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + place
        places = [first + len(tail) + sum(map(len, strips[:n])) for n in range(len(strips))]
        entries[273] = ("I", places)
    mark = b"II*\0" if order == _LITTLE else b"MM\0*"
    return mark + struct.pack(order + "I", 8) + table + bytes(4) + tail + b"".join(strips)


def _packed(rows: NDArray[np.int64], bits: int, order: str) -> bytes:
    if bits in (8, 16, 32):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    texts = ["".join(f"{value:0{bits}b}" for value in row.tolist()) for row in rows]
    texts = [text + "0" * (-len(text) % 8) for text in texts]
    return b"".join(int(text, 2).to_bytes(len(text) // 8, "big") for text in texts)


def _widened(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """8-bit values on a scale of more or fewer bits; of more, with lower bits that must not matter."""
    return values * (2**bits - 1) // 255 if bits < 8 else (values << (bits - 8)) + (values % (1 << (bits - 8)))


def _narrowed(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    return values * 255 // (2**bits - 1) if bits < 8 else values >> (bits - 8)


def decoded(data: bytes) -> NDArray[np.int64]:
    """What a shard would hold, (H, W, 3)."""
    with Image.open(io.BytesIO(prepare(data).data)) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "big endian": {"order": _BIG},
    "planes": {"planes": True},
    "deflate": {"compression": _DEFLATE},
    "deflated planes": {"compression": _DEFLATE, "planes": True},
}
_ONLY_LITTLE = [(12, BLACK_IS_ZERO), (16, WHITE_IS_ZERO)]  # Pillow knows these in one byte order


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, WHITE_IS_ZERO])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey(bits: int, photometric: int, way: str) -> None:
    values = _widened(GREY, bits)
    written = 2**bits - 1 - values if photometric == WHITE_IS_ZERO else values
    data = tiff(written[..., None], bits, photometric, **WAYS[way])
    if (bits, photometric) == (12, WHITE_IS_ZERO) or ((bits, photometric) in _ONLY_LITTLE and way == "big endian"):
        with pytest.raises(UnusableImage, match="a layout that Pillow does not read"):
            prepare(data)
        return
    assert np.array_equal(decoded(data), np.stack([_narrowed(values, bits)] * 3, -1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [8, 16])
def test_colour(bits: int, way: str) -> None:
    full = np.full((HEIGHT, WIDTH, 1), 2**bits - 1)
    colour, options = _widened(COLOUR, bits), WAYS[way]
    assert np.array_equal(decoded(tiff(colour, bits, RGB, **options)), COLOUR)
    with_alpha = np.concatenate([colour, full // 3], -1)
    assert np.array_equal(decoded(tiff(with_alpha, bits, RGB, tags={338: [2]}, **options)), COLOUR)
    multiplied = np.concatenate([colour // 2, full // 2], -1)
    found = decoded(tiff(multiplied, bits, RGB, tags={338: [1]}, **options))
    assert np.abs(found - COLOUR).max() <= 2
    inks = np.concatenate([_widened(255 - COLOUR, bits), full * 0], -1)
    assert np.array_equal(decoded(tiff(inks, bits, CMYK, **options)), COLOUR)
    with pytest.raises(UnusableImage, match=r"inks that are not CMYK \(InkSet 2\)"):
        prepare(tiff(inks, bits, CMYK, tags={332: [2]}, **options))


@pytest.mark.parametrize("way", WAYS)
def test_grey_with_alpha(way: str) -> None:
    half = np.stack([GREY // 2, np.full_like(GREY, 127)], -1)
    expected = np.stack([GREY] * 3, -1)
    multiplied = tiff(half, 8, BLACK_IS_ZERO, tags={338: [1]}, **WAYS[way])
    if "planes" in way:
        with pytest.raises(UnusableImage, match="grey multiplied with alpha in planes"):
            prepare(multiplied)
    else:
        assert np.abs(decoded(multiplied) - expected).max() <= 2
    plain = np.stack([GREY, np.full_like(GREY, 9)], -1)
    assert np.array_equal(decoded(tiff(plain, 8, BLACK_IS_ZERO, tags={338: [2]}, **WAYS[way])), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("map_scale", [257, 256, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette(bits: int, map_scale: int, way: str) -> None:
    """Colour maps have 16 bits; those of many writers have 8."""
    ramp = np.arange(2**bits) * 255 // (2**bits - 1)
    colours = np.stack([ramp, 255 - ramp, ramp[::-1] // 2], -1)
    places = GREY * (2**bits - 1) // 255
    data = tiff(places[..., None], bits, PALETTE, tags={320: (colours.T.ravel() * map_scale).tolist()}, **WAYS[way])
    assert np.array_equal(decoded(data), colours[places])


@pytest.mark.parametrize("compression", [_RAW, _DEFLATE])
def test_ycbcr(compression: int) -> None:
    flat = np.full((HEIGHT, WIDTH, 3), [200, 60, 30])
    ycc = np.asarray(Image.fromarray(flat.astype(np.uint8)).convert("YCbCr")).astype(np.int64)
    whole = tiff(ycc, 8, YCBCR, compression=compression, tags={530: [1, 1]})
    block = bytes([ycc[0, 0, 0]] * 4 + ycc[0, 0, 1:].tolist())  # two by two pixels share their chroma
    halved = tiff(ycc, 8, YCBCR, compression=compression, data=block * (HEIGHT * WIDTH // 4), tags={530: [2, 2]})
    for data in (whole, halved):
        assert np.abs(decoded(data) - flat).max() <= 3


@pytest.mark.parametrize(
    ("values", "bits", "tags", "reason"),
    [
        ((GREY - 128) % 256, 8, {339: [_SIGNED]}, r"signed pixels \(SampleFormat 2\) have no known range"),
        ((GREY * 256 - 32768) % 65536, 16, {339: [_SIGNED]}, r"signed pixels \(SampleFormat 2\) have no known range"),
        ((GREY / 255).astype(np.float32).view(np.uint32), 32, {339: [_FLOAT]}, "mode F have no known range"),
        (GREY << 24, 32, {}, "mode I have no known range"),
        (GREY << 2, 10, {}, "a layout that Pillow does not read"),
        (GREY << 6, 14, {}, "a layout that Pillow does not read"),
        (GREY, 8, {339: [4]}, "a layout that Pillow does not read"),
    ],
)
def test_what_has_no_known_range_is_refused(
    values: NDArray[Any], bits: int, tags: dict[int, list[int]], reason: str
) -> None:
    with pytest.raises(UnusableImage, match=reason):
        prepare(tiff(values.astype(np.int64)[..., None], bits, BLACK_IS_ZERO, tags=tags))


def test_libtiff_says_nothing_on_the_terminal(tmp_path: object) -> None:
    """It prints from C, past Python's own stderr."""
    data = tiff(GREY[..., None], 8, BLACK_IS_ZERO, compression=_DEFLATE).replace(b"x\x9c", b"xx")
    code = (
        "import sys; from bowstore.data.images import prepare\n"
        "try: prepare(sys.stdin.buffer.read())\n"
        "except ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert (result.stdout, result.stderr) == (b"cannot be decoded: decoder error -2\n", b"")
