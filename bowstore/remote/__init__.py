"""Shards and word stores on other machines: fetched through fsspec into a local cache, whole and checked.

`is_remote` and `url_of` know a URL in a path; `RemoteFolder` fetches files of a folder; `fetch_store` fetches a word
store; `Wanted` is what was recorded of a file; `local_only` refuses URLs; `hold` keeps a copy that
is open from being removed. The modules `push` and `pull` copy whole folders to and from a URL.
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
