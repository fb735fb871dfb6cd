"""Reading the pickles of the CIFAR archives without running what a pickle may ask for.

A pickle names functions and has them called. Here the only names that it can reach are stand-ins for NumPy's
array and for Latin-1 text; they keep what they are given and do nothing else. Everything else is plain data.
"""

import io
import pickle
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowstore.errors import CorruptError, DataError, is_machine_error


class _Dtype:
    """Stands for `numpy.dtype`; keeps the code, for example "u1"."""

    __slots__ = ("code",)

    def __init__(self, code: object, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, _state: object) -> None:
        """Byte order and alignment say nothing about bytes."""


class _Array:
    """Stands for `numpy.ndarray`; keeps shape, type and bytes."""

    __slots__ = ("array",)

    def __init__(self, *_arguments: object) -> None:
        self.array: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, column_order, data = state
        code = dtype.code if isinstance(dtype, _Dtype) else dtype
        if code not in ("u1", b"u1", "|u1", b"|u1") or not isinstance(data, bytes):
            raise ValueError(f"array of type {code!r}, not plain uint8")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_order else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes: as text, with a call of `codecs.encode`."""
    if encoding not in ("latin1", b"latin1"):
        raise ValueError(f"text in {encoding!r}, not Latin-1")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], object] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array}
_NAMES |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}
_NAMES["_codecs", "encode"] = _latin1


class _PlainUnpickler(pickle._Unpickler):  # the one in Python: a number in a pickle makes the C one fill the memory
    def __init__(self, data: bytes, path: PurePath) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise DataError(
                f"{self._path} is a pickle that asks for {f'{module}.{name}'[:80]!r}, which no CIFAR file needs: it "
                "may be hostile and was not loaded; fetch the archive anew from its publisher"
            ) from None


def read_plain_pickle(data: bytes, path: PurePath) -> dict[str, Any]:
    """The dictionary in a pickle; text of Python 2 becomes str in keys and stays bytes in values.

    Returns:
        Values by key; a value that was an array is uint8, read-only.

    Raises:
        DataError: the pickle asks for anything but arrays of bytes and plain containers.
        CorruptError: it cannot be read, or holds no dictionary.
    """
    try:
        value = _PlainUnpickler(data, path).load()
        if not isinstance(value, dict):
            raise TypeError(f"it holds {type(value).__name__}, not a dictionary")
        return {_text(key): item.array if isinstance(item, _Array) else item for key, item in value.items()}
    except DataError:
        raise
    except Exception as error:
        # A damaged pickle ends in any exception: UnpicklingError, EOFError, IndexError, KeyError...
        if is_machine_error(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptError(f"{path} is no CIFAR batch: {reason}; fetch the archive anew") from error


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
