"""Every kind of image file: what is kept, what is encoded anew, what is refused, and that DALI reads the result."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bowstore.data.image_header import MAX_PIXELS, UnusableImage
from bowstore.data.images import Prepared, prepare

# Pillow warns in the tests' own decoding; `prepare` must keep quiet about it.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112


def _picture(height: int = 40, width: int = 56) -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [4 * x, 5 * y, 255 - 2 * x - 2 * y]
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def _noise() -> Image.Image:
    noise = np.random.Generator(np.random.Philox(7)).integers(-40, 41, (40, 56, 3))
    return Image.fromarray(np.clip(np.asarray(_picture()).astype(np.int64) + noise, 0, 255).astype(np.uint8))


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(rows: Sequence[bytes], size: tuple[int, int], *, depth: int, colour: int, interlaced: int = 0) -> bytes:
    """A PNG from raw rows, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _png_16_bit_rgb() -> bytes:
    wide = (np.asarray(_picture()).astype(np.uint16) * 256 + 17).astype(">u2")
    return _png([row.tobytes() for row in wide], (56, 40), depth=16, colour=2)


def _interlaced_png() -> bytes:
    grey = np.asarray(_picture().convert("L"))
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = [row.tobytes() for y, dy, x, dx in passes for row in grey[y::dy, x::dx]]
    return _png(rows, (56, 40), depth=8, colour=0, interlaced=1)


def _with_wrong_checksum(png: bytes) -> bytes:
    """The last byte of the last IDAT's checksum flipped: Pillow does not notice."""
    at = png.rindex(b"IEND") - 5
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def _without_segment(jpeg: bytes, marker: int) -> bytes:
    at = jpeg.index(bytes([0xFF, marker]))
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def _with_gap(jpeg: bytes) -> bytes:
    """Garbage before the frame header: libjpeg skips it, DALI's parser does not."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[:at] + b"\0\0\0" + jpeg[at:]


def _ycck(jpeg: bytes) -> bytes:
    at = jpeg.index(b"Adobe")
    return jpeg[: at + 11] + b"\2" + jpeg[at + 12 :]


def _sixteen_bit(kind: str) -> bytes:
    values = np.asarray(_picture().convert("L")).astype(np.uint16) * 256 + 99
    return _encode(Image.fromarray(values), kind)


def _animation(kind: str) -> bytes:
    return _encode(_picture(), kind, save_all=True, append_images=[_picture().rotate(180)])


_RGB, _GREY = _picture(), _picture().convert("L")
_CMYK = _encode(_RGB.convert("CMYK"), "JPEG", quality=95)
_JPEG = _encode(_RGB, "JPEG", quality=90)

KEPT: dict[str, tuple[bytes, str]] = {
    "jpeg": (_JPEG, "jpg"),
    "jpeg 4:4:4": (_encode(_RGB, "JPEG", subsampling=0), "jpg"),
    "jpeg 4:2:2": (_encode(_RGB, "JPEG", subsampling=1), "jpg"),
    "jpeg 4:1:1": (_encode(_RGB, "JPEG", subsampling="4:1:1"), "jpg"),
    "progressive": (_encode(_RGB, "JPEG", progressive=True), "jpg"),
    "restart markers": (_encode(_RGB, "JPEG", restart_marker_blocks=2), "jpg"),
    "grey jpeg": (_encode(_GREY, "JPEG"), "jpg"),
    "profile": (_encode(_RGB, "JPEG", icc_profile=bytes(3000)), "jpg"),
    "upright exif": (_encode(_RGB, "JPEG", exif=_exif(1)), "jpg"),
    "odd exif": (_encode(_RGB, "JPEG", exif=_exif(0)), "jpg"),
    "no exif": (_encode(_RGB, "JPEG", exif=b"Exif\0\0junk"), "jpg"),
    "cut exif": (_encode(_RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"), "jpg"),
    "exif that leads nowhere": (_encode(_RGB, "JPEG", exif=b"Exif\0\0II*\0\x99\x99\x99\x99junk"), "jpg"),
    "trailing bytes": (_JPEG + bytes(64) + b"junk", "jpg"),
    "one pixel": (_encode(_picture(1, 1), "JPEG"), "jpg"),
    "one row": (_encode(_picture(1, 300), "JPEG"), "jpg"),
    "one column": (_encode(_picture(4000, 1), "JPEG"), "jpg"),
    "png": (_encode(_RGB, "PNG"), "png"),
    "grey png": (_encode(_GREY, "PNG"), "png"),
    "one pixel png": (_encode(_picture(1, 1), "PNG"), "png"),
    "webp": (_encode(_RGB, "WEBP"), "webp"),
    "lossless webp": (_encode(_RGB, "WEBP", lossless=True), "webp"),
}

CHANGED: dict[str, tuple[bytes, str, str]] = {
    "cmyk": (_CMYK, "jpg", "cmyk"),
    "ycck": (_ycck(_CMYK), "jpg", "cmyk"),
    "rgb jpeg": (_encode(_RGB, "JPEG", keep_rgb=True), "jpg", "unusual-jpeg"),
    "gap in header": (_with_gap(_JPEG), "jpg", "unusual-jpeg"),
    "arithmetic": (_JPEG.replace(b"\xff\xc0", b"\xff\xc9", 1), "jpg", "unusual-jpeg"),
    "multi-picture": (_animation("MPO"), "jpg", "animated"),
    "palette": (_encode(_RGB.quantize(16), "PNG"), "png", "palette"),
    "alpha": (_encode(_RGB.convert("RGBA"), "PNG"), "png", "alpha"),
    "grey alpha": (_encode(_GREY.convert("LA"), "PNG"), "png", "alpha"),
    "transparent colour": (_encode(_RGB, "PNG", transparency=(0, 0, 0)), "png", "alpha"),
    "one bit": (_encode(_GREY.convert("1"), "PNG"), "png", "few-bits"),
    "16-bit grey": (_sixteen_bit("PNG"), "png", "16-bit"),
    "16-bit rgb": (_png_16_bit_rgb(), "png", "16-bit"),
    "interlaced": (_interlaced_png(), "png", "unusual-png"),
    "png without end": (_encode(_RGB, "PNG")[:-12], "png", "unusual-png"),
    "webp with alpha": (_encode(_RGB.convert("RGBA").rotate(30), "WEBP"), "png", "alpha"),
    "animated webp": (_animation("WEBP"), "png", "animated"),
    "animated png": (_animation("PNG"), "png", "animated"),
    "gif": (_encode(_RGB.quantize(64), "GIF"), "png", "gif"),
    "animated gif": (_animation("GIF"), "png", "gif"),
    "bmp": (_encode(_RGB, "BMP"), "png", "bmp"),
    "tiff": (_encode(_RGB, "TIFF"), "png", "tiff"),
    "16-bit tiff": (_sixteen_bit("TIFF"), "png", "tiff"),
    "turned tiff": (_encode(_RGB, "TIFF", exif=_exif(6)), "png", "tiff"),
    "16-bit pgm": (_sixteen_bit("PPM"), "png", "ppm"),
    "ppm": (_encode(_RGB, "PPM"), "png", "ppm"),
    "turned png": (_encode(_RGB, "PNG", exif=_exif(8)), "png", "rotated"),
    "turned webp": (_encode(_RGB, "WEBP", exif=_exif(3)), "png", "rotated"),
    **{f"turned {n}": (_encode(_RGB, "JPEG", exif=_exif(n)), "jpg", "rotated") for n in range(2, 9)},
}


def _decoded(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _dali_decoded(images: Sequence[bytes]) -> list[Pixels]:
    """One DALI pipeline over all images, as training decodes them on a CPU."""
    from nvidia.dali import fn, pipeline_def, types

    batch = [np.frombuffer(data, np.uint8) for data in images]

    @pipeline_def(batch_size=len(batch), num_threads=2, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def graph() -> object:
        encoded = fn.external_source(source=lambda: batch, batch=True)
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)

    pipeline = graph()
    pipeline.build()
    (decoded,) = pipeline.run()
    return [np.array(decoded.at(row)) for row in range(len(batch))]


@pytest.mark.parametrize("name", KEPT)
def test_plain_images_are_kept_byte_for_byte(name: str) -> None:
    data, extension = KEPT[name]
    prepared = prepare(data)
    assert prepared.data is data
    assert (prepared.extension, prepared.change) == (extension, None)
    assert _decoded(data).shape == (prepared.height, prepared.width, 3)


@pytest.mark.parametrize("name", CHANGED)
def test_other_images_become_rgb(name: str) -> None:
    data, extension, change = CHANGED[name]
    prepared = prepare(data)
    assert (prepared.extension, prepared.change) == (extension, change)
    with Image.open(io.BytesIO(prepared.data)) as image:
        assert (image.mode, image.size) == ("RGB", (prepared.width, prepared.height))
        assert image.format == {"jpg": "JPEG", "png": "PNG"}[extension]
        assert not image.getexif()
    again = prepare(prepared.data)
    assert again.change is None, "what was written must be plain"


@pytest.mark.parametrize("name", [name for name in CHANGED if "turned" in name])
def test_turned_images_stand_upright(name: str) -> None:
    data = CHANGED[name][0]
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(np.int64)
    prepared = prepare(data)
    assert upright.shape == (prepared.height, prepared.width, 3)
    assert np.abs(_decoded(prepared.data) - upright).mean() < 2


@pytest.mark.parametrize("name", ["16-bit grey", "16-bit tiff", "16-bit pgm"])
def test_sixteen_bits_keep_their_upper_half(name: str) -> None:
    pixels = _decoded(prepare(CHANGED[name][0]).data)
    expected = np.asarray(_GREY)
    assert np.array_equal(pixels, np.stack([expected] * 3, -1))


def test_sixteen_bit_rgb_keeps_its_upper_half() -> None:
    assert np.array_equal(_decoded(prepare(_png_16_bit_rgb()).data), np.asarray(_RGB))


def _bits(values: NDArray[np.int64], bits: int) -> list[bytes]:
    """Rows of a PNG, or of a PBM, with so many bits a value."""
    texts = ["".join(f"{value:0{bits}b}" for value in row.ravel().tolist()) for row in values]
    texts = [text + "0" * (-len(text) % 8) for text in texts]
    return [int(text, 2).to_bytes(len(text) // 8, "big") for text in texts]


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_values_of_grey_png(bits: int, transparent: bool) -> None:
    values = np.asarray(_GREY).astype(np.int64) * (2**bits - 1) // 255
    data = _png(_bits(values, bits), (56, 40), depth=bits, colour=0)
    if transparent:
        mark = _chunk(b"tRNS", struct.pack(">H", values[3, 3]))
        data = data.replace(data[33:37], mark + data[33:37], 1)
    expected = values >> 8 if bits == 16 else values * 255 // (2**bits - 1)
    assert np.array_equal(_decoded(prepare(data).data), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colours", [1, 3])
def test_values_of_png_with_alpha(bits: int, colours: int) -> None:
    colour = np.asarray(_RGB).astype(np.int64)[..., :colours]
    values = np.concatenate([colour << (bits - 8), np.full((40, 56, 1), 7)], -1)
    data = _png(_bits(values, bits), (56, 40), depth=bits, colour=4 if colours == 1 else 6)
    assert np.array_equal(_decoded(prepare(data).data), np.broadcast_to(colour, (40, 56, 3)))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("most", [1, 15, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("colours", [1, 3])
def test_values_of_pnm(colours: int, most: int, plain: bool) -> None:
    """A value is a share of the largest that the header names."""
    picture = np.asarray(_RGB).astype(np.int64)[..., :colours]
    values = picture * most // 255
    kind = {(1, True): 2, (1, False): 5, (3, True): 3, (3, False): 6}[colours, plain]
    body = values.astype(">u2" if most > 255 else "u1").tobytes()
    body = " ".join(map(str, values.ravel().tolist())).encode() if plain else body
    found = _decoded(prepare(b"P%d 56 40 %d\n" % (kind, most) + body).data)
    assert np.abs(found - values * 255 / most).max() < 1


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "TIFF"])
@pytest.mark.parametrize(
    "colours", [((0, 0, 0), (255, 255, 255)), ((255, 255, 255), (0, 0, 0)), ((9, 200, 30), (5, 6, 7))]
)
def test_values_of_two_colours(kind: str, colours: tuple[tuple[int, int, int], ...]) -> None:
    places = (np.asarray(_GREY) > 100).astype(np.uint8)
    image = Image.fromarray(places).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    assert np.array_equal(_decoded(prepare(_encode(image, kind)).data), np.array(colours)[places])


def test_values_of_bmp_palettes() -> None:
    """Places of 1, 4 and 8 bits, with palettes that look like plain grey."""
    places = (np.asarray(_GREY) > 100).astype(np.int64)
    for bits in (1, 4, 8):
        palette = bytes([0, 0, 0, 0, 255, 255, 255, 0])
        rows = b"".join(row + bytes(-len(row) % 4) for row in _bits(places[::-1], bits))
        header = struct.pack("<IiiHHIIiiII", 40, 56, 40, 1, bits, 0, len(rows), 0, 0, 2, 0)
        data = b"BM" + struct.pack("<IHHI", 62 + len(rows), 0, 0, 62) + header + palette + rows
        if bits == 4:
            with pytest.raises(UnusableImage, match="a BMP of 4 bits with a palette of greys, which Pillow does not"):
                prepare(data)
        else:
            assert np.array_equal(_decoded(prepare(data).data)[..., 0], places * 255), bits


def test_values_of_one_bit() -> None:
    white = np.asarray(_GREY) > 100
    expected = np.stack([white * 255] * 3, -1)
    pbm = b"P4 56 40\n" + b"".join(_bits(1 - white.astype(np.int64), 1))
    fax = _encode(Image.fromarray(white), "TIFF", compression="group4")
    for data in (pbm, fax, _encode(Image.fromarray(white), "PNG"), _encode(Image.fromarray(white), "BMP")):
        assert np.array_equal(_decoded(prepare(data).data), expected)


def test_values_of_jpegs_in_inks() -> None:
    """Adobe's files hold CMYK as its negative, and YCCK is YCbCr of that negative, with black as it is."""
    assert np.abs(_decoded(prepare(_CMYK).data).astype(int) - np.asarray(_RGB)).max() < 16
    assert prepare(_without_segment(_CMYK, 0xEE)).data == prepare(_CMYK).data  # without a mark it is read like Adobe's
    ycc = np.asarray(Image.fromarray(255 - np.asarray(_RGB)).convert("YCbCr"))
    stored = np.concatenate([ycc, np.full((40, 56, 1), 255, np.uint8)], -1)
    # Pillow stores the negative of what it is given.
    data = _ycck(_encode(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=95, subsampling=0))
    assert np.abs(_decoded(prepare(data).data).astype(int) - np.asarray(_RGB)).max() < 16


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_values_of_jpeg_2000(mode: str) -> None:
    picture = Image.fromarray(np.asarray(_GREY).astype(np.uint16) * 257) if mode == "I;16" else _RGB.convert(mode)
    expected = _GREY if mode == "I;16" else _RGB.convert(mode)
    found = _decoded(prepare(_encode(picture, "JPEG2000")).data)
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))


def test_first_frame_of_an_animation() -> None:
    for name in ("animated webp", "animated png"):
        assert np.abs(_decoded(prepare(CHANGED[name][0]).data).astype(int) - np.asarray(_RGB)).mean() < 6, name


def test_dali_reads_what_pillow_reads() -> None:
    prepared = {name: prepare(entry[0]) for name, entry in (KEPT | CHANGED).items()}
    decoded = _dali_decoded([image.data for image in prepared.values()])
    for (name, image), pixels in zip(prepared.items(), decoded, strict=True):
        assert pixels.shape == (image.height, image.width, 3), name
        assert np.abs(pixels.astype(int) - _decoded(image.data)).mean() < 1.0, name


def test_dali_reads_whatever_passes_of_damaged_files() -> None:
    """Damage that Pillow forgives must not reach a decoder that does not."""
    rng = np.random.Generator(np.random.Philox(3))
    kinds = [_encode(_noise(), "JPEG"), _encode(_noise(), "JPEG", progressive=True), _encode(_noise(), "PNG")]
    kinds += [_encode(_noise(), "WEBP"), _encode(_noise(), "JPEG", restart_marker_blocks=3)]
    passed = [image for data in kinds for _ in range(60) if (image := _passes(_damaged(data, rng)))]
    assert len(passed) > 50
    for image, pixels in zip(passed, _dali_decoded([image.data for image in passed]), strict=True):
        assert pixels.shape == (image.height, image.width, 3)


def _damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One of: a flipped bit, 20 zeroed bytes, some bytes gone, a zeroed end, a random end."""
    kind, at = int(rng.integers(5)), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes(20) + data[at + 20 :]
    if kind == 2:
        return data[:at] + data[at + int(rng.integers(1, 100)) :]
    return data[:at] + (bytes(len(data) - at) if kind == 3 else rng.bytes(len(data) - at))


def _passes(data: bytes) -> Prepared | None:
    try:
        return prepare(data)
    except UnusableImage:
        return None


@pytest.mark.parametrize("percent", [10, 50, 99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_images_are_refused(kind: str, percent: int) -> None:
    data = _encode(_noise(), kind)
    with pytest.raises(UnusableImage, match=r"cannot be decoded: |a damaged or cut header"):
        prepare(data[: len(data) * percent // 100])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (
            b"<!DOCTYPE html><html></html>",
            r"not an image: a web page \(of a login, an error, or about the file\), not the",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            r"not an image: a pointer of git-lfs and not the file itself",
        ),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC or HEIF, which Pillow does not read; convert it to JPEG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, which Pillow does not read; convert it to JPEG or PNG"),
        (bytes(range(200, 256)), r"not an image: it starts with b'\\xc8\\xc9"),
        (b"\xff\xd8\xff\xe0\x00", "damaged or cut header"),
        (_JPEG[:-2], r"cannot be decoded: image file is truncated \(\d+ bytes not processed\)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image: it starts with b'%!PS"),
        (_encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "mode F have no known range"),
        (
            _encode(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"),
            "signed pixels .SampleFormat 2. have no known range",
        ),
        (_JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "a layout that Pillow does not read"),
        (_with_wrong_checksum(_encode(_RGB, "PNG")), "damaged: the checksum of a PNG chunk with pixels is wrong"),
        (_png([], (20_000, 20_000), depth=8, colour=0), f"more than {MAX_PIXELS}"),
        (_png([], (100_000, 1790), depth=8, colour=0), f"more than {MAX_PIXELS}"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableImage, match=reason):
        prepare(data)


def test_the_bound_holds_without_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnusableImage, match=f"more than {MAX_PIXELS}"):
        prepare(_png([], (20_000, 20_000), depth=8, colour=0))


def test_large_images_below_the_bound_pass_without_a_warning() -> None:
    rows = [bytes(9500)] * 9500  # Pillow warns from 89 million pixels on
    prepared = prepare(_png(rows, (9500, 9500), depth=8, colour=0))
    assert (prepared.height, prepared.width, prepared.change) == (9500, 9500, None)
