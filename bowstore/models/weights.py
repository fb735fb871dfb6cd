"""A network's weights: how they get into it, and their identity, with that of whatever else is saved with them."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from bowstore.errors import DataError


def put_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors by name, all of which the module has, and in their shapes."""
    own = module.state_dict()  # with the versions of its modules, which some refuse to load without (MNASNet)
    own.update(state)
    module.load_state_dict(own)


def finite_weights(state: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that no network can be run with.

    Raises:
        DataError: some are NaN or infinite; the message gives the network's name and the first tensors.
    """
    bad = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise DataError(
            f"the weights of {name} hold NaN or infinity in {len(bad)} of {len(state)} tensors "
            f"({', '.join(bad[:3])}); take another checkpoint"
        )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of a state dict, as 64 hex digits.

    Tensors on any device, of any memory layout; equal values give equal digests wherever they lie.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def content_digest(value: Any) -> str:
    """xxh3-128 over tensors (dtypes, shapes, bytes) and plain values, nested at will, as 32 hex digits.

    Equal content gives equal digests on any device, in any memory
    layout, and in any order of a mapping's keys. Against corruption, not against an adversary.

    Raises:
        TypeError: something else than tensors, mappings, sequences, text, numbers, booleans and None.
    """
    digest = xxhash.xxh3_128()
    _add(value, digest.update)
    return digest.hexdigest()


def _add(value: Any, update: Callable[[Any], None]) -> None:
    # Each item says its kind and length first, so that no two values are spelt alike.
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        update(_bytes(value).data)
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _add(key, update)
            _add(value[key], update)
    elif isinstance(value, (list, tuple)):
        update(f"{type(value).__name__} {len(value)} ".encode())
        for item in value:
            _add(item, update)
    elif isinstance(value, str):
        text = value.encode(errors="surrogatepass")
        update(b"text %d " % len(text))
        update(text)
    elif value is None or isinstance(value, (bool, int, float)):
        update(f"{type(value).__name__} {value!r} ".encode())
    else:
        raise TypeError(f"a {type(value).__name__} has no digest")


def _bytes(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
