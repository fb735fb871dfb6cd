"""What a file is that somebody gives as weights, by its bytes and not by its name.

Files that hold no weights for bowstore are named for what they are, with the remedy: "damaged" is said of damaged
files alone. PyTorch's advice to load a file as code is never passed on.
"""

import codecs
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bowstore.beginnings import foreign_kind

_ZIP = b"PK\x03\x04"
_START_BYTES = 4096
_TAR_MAGIC_AT = 257
_CONVERT = "convert it to a state dict of PyTorch or to safetensors first"
_UNPACK = "unpack it first"
_PICKLE = (
    "a pickle of Python objects, which is never loaded because it could run code; save its arrays as a state dict with "
    "torch.save, or as safetensors"
)
# Every file of torch.save that is no archive (PyTorch before 1.6) begins with this number, pickled.
_LEGACY_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", f"one array of NumPy, without names of tensors; {_CONVERT}"),
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes; {_CONVERT}"),
    (b"GGUF", f"a GGUF file of llama.cpp; {_CONVERT}"),
)
_TEXT_PICKLE = re.compile(rb"(?:\((?:dp|lp|i)|c[\w.]+\n[\w.]+\n)")
_PROTOCOL_BUFFER = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a]")  # a version, then another field


def other_kind(file: BinaryIO) -> str:
    """What a file is that can hold no weights for bowstore, with the remedy; empty for all others.

    A file that is merely damaged or cut off is none of these: who reads it has to find that.

    Args:
        file: open at any place, seekable; may be of any size.
    """
    file.seek(0)
    start = file.read(_START_BYTES)
    if is_archive(start):
        return _other_archive(file)
    if kind := foreign_kind(start):
        return kind
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if start[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if start[4:8] == b"TFL3":
        return f"a network of TensorFlow Lite; {_CONVERT}"
    if start[1:8] == b"\xa6params":
        return f"a msgpack file of Flax; {_CONVERT}"
    if _TEXT_PICKLE.match(start) or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and not is_torch(start)):
        return _PICKLE
    if not is_safetensors(start) and _PROTOCOL_BUFFER.match(start):
        return f"a network of ONNX or TensorFlow; {_CONVERT}"
    return _text(start)


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON text, then the text."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40


def reads_as_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file is read as safetensors: by its first bytes, and by its name where these are damaged."""
    return is_safetensors(start) or (path.suffix == ".safetensors" and not is_torch(start))


def is_torch(start: bytes) -> bool:
    """Whether a file begins as those of torch.save do."""
    return start.startswith(_ZIP) or _LEGACY_TORCH in start


def is_archive(start: bytes) -> bool:
    """Whether a file begins as zip archives do."""
    return start.startswith(_ZIP)


def read_torch(file: BinaryIO) -> Any:
    """What torch.save wrote, tensors and plain values alone; damaged bytes end in errors of any kind (`why_unread`)."""
    file.seek(0)
    if is_archive(file.read(len(_ZIP))):  # PyTorch does not compare its checksums, and unpickles whatever bytes say
        with zipfile.ZipFile(file) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} differs from its checksum")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def why_unread(error: Exception) -> str:
    """Why torch.load refused a file, on one line."""
    if isinstance(error, zipfile.BadZipFile):
        return "its end is missing or damaged"
    if isinstance(error, EOFError):
        return "it ends too early"
    text = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"Python objects that could run code: {named[1]}"
    if "Unsupported operand 149" in text:  # with which every pickle of protocol 4 and above begins
        return "a pickle protocol that PyTorch reads only as code; 2 is its default"
    return "nothing in it can be unpickled" if re.search("weights.only", text, re.IGNORECASE) else first_line(error)


def _other_archive(file: BinaryIO) -> str:
    """What a zip archive is besides one of torch.save, by the names of its members."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return ""  # cut off or damaged
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last or "bytecode.pkl" in last:
        return "a TorchScript program, which is never run; save the state dict of its module alone"
    if "archive_format" in last or "serialized_exported_program.json" in last:
        return "a program of torch.export, which is never run; save the state dict of its module alone"
    if "data.pkl" in last:
        return ""
    if last and all(name.endswith(".npy") for name in last):
        return f"an archive of NumPy arrays; {_CONVERT}"
    if "model.weights.h5" in last:
        return f"a network of Keras; {_CONVERT}"
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"a zip archive of other files ({some or 'none'}); {_UNPACK}"


def _text(start: bytes) -> str:
    """What a text is; empty for bytes that are none."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start[:512])  # which may end within a character
    except UnicodeDecodeError:
        return ""
    if not text or any(not (character.isprintable() or character.isspace()) for character in text):
        return ""
    if text.lstrip()[:1] in ("{", "["):
        if b'"weight_map"' in start:
            return "the list of a network's several files, which are not read together; join them into one file"
        return "JSON text, such as a configuration or a server's error, not the weights; name the weights file"
    return f"text ({' '.join(text.split())[:40]!r}), not weights; name the weights file"
