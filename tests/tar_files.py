"""Tars that tests damage, or make to be refused."""

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from shard_sets import encode_jpeg, textured_image

JPEG = encode_jpeg(textured_image(1, 20, 30))
BLOCK = 512


def write_members(
    path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]], tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    """Tar of (name or header, bytes), in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def places(path: Path) -> dict[str, tarfile.TarInfo]:
    """Headers of a tar by name."""
    with tarfile.open(path) as archive:
        return {info.name: info for info in archive}


def edit(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def edit_header(path: Path, start: int, field: slice, value: bytes) -> None:
    """Set a field of the tar header at byte `start`, and its checksum to match."""
    with open(path, "r+b") as file:
        file.seek(start)
        header = bytearray(file.read(BLOCK))
        header[field] = value.ljust(field.stop - field.start, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.seek(start)
        file.write(header)


def encode(pixels: np.ndarray, kind: str, *, mode: str = "RGB", **options: object) -> bytes:
    """Any format and mode of Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_frame(data: bytes) -> slice:
    """Where the frame header of a JPEG lies."""
    position = 2
    while data[position + 1] not in (0xC0, 0xC2):
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return slice(position, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big"))


def with_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    start = jpeg_frame(data).start
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def with_two_frames(data: bytes, height: int, width: int) -> bytes:
    """A JPEG with a second frame header, of another size, before its own."""
    frame = jpeg_frame(data)
    return data[: frame.start] + with_jpeg_size(data, height, width)[frame] + data[frame.start :]


def with_png_size(data: bytes, height: int, width: int) -> bytes:
    """A PNG whose IHDR claims another size, with a good checksum."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def with_webp_size(data: bytes, height: int, width: int) -> bytes:
    """A plain lossy WebP whose frame claims another size."""
    start = data.index(b"VP8 ") + 14
    return data[:start] + struct.pack("<HH", width, height) + data[start + 4 :]


def zip_bomb_png() -> bytes:
    """A PNG of 4 x 4 pixels whose data unpack to 20 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(bytes(20 << 20))) + chunk(b"IEND", b"")
