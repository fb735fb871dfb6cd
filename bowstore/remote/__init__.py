"""Shards and word stores on other machines: fetched through fsspec into a local cache, whole and checked.

The modules `push` and `pull` copy whole folders to and from a URL.
"""

from bowstore.remote.cache import hold
from bowstore.remote.folder import RemoteFolder
from bowstore.remote.store import fetch_store
from bowstore.remote.transfer import Wanted
from bowstore.remote.urls import is_remote, local_only, url_of

__all__ = [
    "RemoteFolder",
    "Wanted",
    "fetch_store",
    "hold",
    "is_remote",
    "local_only",
    "url_of",
]
