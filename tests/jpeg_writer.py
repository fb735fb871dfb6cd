"""A baseline JPEG of any chroma subsampling, for tests: Pillow writes 4:4:4, 4:2:2 and 4:2:0 only."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

_K = np.arange(8)
_DCT = np.where(_K[:, None] == 0, np.sqrt(1 / 8), 0.5) * np.cos((2 * _K[None] + 1) * _K[:, None] * np.pi / 16)
_ZIGZAG = sorted(range(64), key=lambda n: (n // 8 + n % 8, n // 8 if (n // 8 + n % 8) % 2 else n % 8))


def write_jpeg(pixels: np.ndarray, horizontal: int, vertical: int) -> bytes:
    """Encode uint8 (H, W, 3) with chroma that is so many times narrower and lower than luma.

    Tables of quantisation and of Huffman codes are those of Pillow's own file, whose header is patched.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=0)
    header = bytearray(buffer.getvalue())
    frame, scan = header.index(b"\xff\xc0"), header.index(b"\xff\xda")
    header[frame + 11] = horizontal << 4 | vertical
    header = header[: scan + 2 + int.from_bytes(header[scan + 2 : scan + 4], "big")]
    quantised, codes = _tables(bytes(header))
    planes = np.asarray(Image.fromarray(pixels).convert("YCbCr"), np.float64) - 128
    rows, columns = 8 * vertical, 8 * horizontal
    high, wide = -len(pixels) % rows, -pixels.shape[1] % columns
    planes = np.pad(planes, ((0, high), (0, wide), (0, 0)), mode="edge")
    small = planes.reshape(len(planes) // vertical, vertical, -1, horizontal, 3).mean((1, 3))
    bits, last = [], [0, 0, 0]
    for top in range(0, len(planes), rows):
        for left in range(0, planes.shape[1], columns):
            for component in range(3):
                for block in _blocks(planes, small, top, left, component, horizontal, vertical):
                    table = min(component, 1)
                    values = np.rint((_DCT @ block @ _DCT.T).ravel()[_ZIGZAG] / quantised[table]).astype(int).tolist()
                    bits += _coded(values, last[component], codes[0, table], codes[1, table])
                    last[component] = values[0]
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    packed = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    return bytes(header) + packed + b"\xff\xd9"


def _blocks(
    planes: np.ndarray, small: np.ndarray, top: int, left: int, component: int, horizontal: int, vertical: int
) -> Iterator[np.ndarray]:
    """The 8 x 8 blocks of one component in one unit of the scan."""
    if component:
        yield small[top // vertical :, left // horizontal :, component][:8, :8]
        return
    for v in range(vertical):
        for h in range(horizontal):
            yield planes[top + 8 * v :, left + 8 * h :, 0][:8, :8]


def _coded(values: list[int], before: int, direct: dict[int, str], alternating: dict[int, str]) -> Iterator[str]:
    """Bits of a block's values in zigzag order."""
    difference = values[0] - before
    yield direct[difference.bit_length()] + _amplitude(difference)
    run = 0
    for value in values[1 : max((n for n in range(64) if values[n]), default=0) + 1]:
        if not value:
            run += 1
            continue
        yield alternating[0xF0] * (run // 16) + alternating[run % 16 << 4 | value.bit_length()] + _amplitude(value)
        run = 0
    if not values[63]:
        yield alternating[0]


def _amplitude(value: int) -> str:
    size = value.bit_length()
    return f"{value if value > 0 else value + (1 << size) - 1:0{size}b}" if size else ""


def _tables(header: bytes) -> tuple[list[np.ndarray], dict[tuple[int, int], dict[int, str]]]:
    """Quantisation in zigzag order by number, and Huffman codes by class and number."""
    quantised, codes, place = [], {}, 2
    while place < len(header):
        kind, size = header[place + 1], int.from_bytes(header[place + 2 : place + 4], "big")
        body = header[place + 4 : place + 2 + size]
        if kind == 0xDB:
            quantised += [np.frombuffer(body[n + 1 : n + 65], np.uint8) for n in range(0, len(body), 65)]
        while kind == 0xC4 and body:
            counts, symbols = body[1:17], iter(body[17:])
            code, table = 0, {}
            for bits, count in enumerate(counts, 1):
                for _ in range(count):
                    table[next(symbols)] = f"{code:0{bits}b}"
                    code += 1
                code <<= 1
            codes[body[0] >> 4, body[0] & 15] = table
            body = body[17 + sum(counts) :]
        place += 2 + size
    return quantised, codes
