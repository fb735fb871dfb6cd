"""Files for Hugging Face's hub, many in one commit: its own file system makes one of each, and the hub allows few."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT_FILES = 100


def commit(hub: Any, files: Mapping[str, Path]) -> None:
    """Put files into a repository, or a bucket, of the hub.

    Args:
        hub: its file system (`huggingface_hub.HfFileSystem`).
        files: by their URLs, all of one repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # half a second, for those alone that go to the hub

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    places = {path: hub.resolve_path(url) for url, path in files.items()}
    first = next(iter(places.values()))
    if hasattr(first, "bucket_id"):
        api.batch_bucket_files(first.bucket_id, add=[(path, place.path) for path, place in places.items()])
    else:
        api.create_commit(
            first.repo_id,
            [CommitOperationAdd(place.path_in_repo, path) for path, place in places.items()],
            commit_message=f"bowstore push: {len(files)} files",
            repo_type=first.repo_type,
            revision=first.revision,
        )
    hub.invalidate_cache()
