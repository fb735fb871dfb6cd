"""bowstore: learn image representations by predicting bags of visual words, without a teacher in the loop."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bowstore.words.store.store import Store

# Before torch loads its OpenMP runtime: a waiting thread spins briefly, then sleeps. The default spins for
# milliseconds, on cores that DALI's decoding threads and other processes need (docs/results/threads.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"


def open_store(path: str | Path, layer: str | None = None) -> "Store":
    """Open a word store: words and bag of a key, vocabulary, iteration (`bowstore.words.store.store.Store`).

    Args:
        path: a folder, or a URL (`s3://`, `gs://`, `https://`...), of which a copy is fetched into the cache.
        layer: a layer that has to be there and complete; None asks for any one complete layer.

    Raises:
        MissingError: no store there, or no such layer (lists those there are).
        MismatchError: not a word store, another format version, or not complete.
        CorruptError: metadata that cannot be read.
    """
    from bowstore.config import load_workspace  # `import bowstore` alone loads nothing
    from bowstore.remote import fetch_store
    from bowstore.words.store.store import open_store as open_local

    return open_local(fetch_store(Path(path), load_workspace().storage), layer)
