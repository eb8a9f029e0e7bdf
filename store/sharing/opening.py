"""Open a store wherever it is: a folder on this machine, or a URL that is read in place."""

from pathlib import Path

from agiqa.store.reading.store import Store, open_local_store
from agiqa.store.sharing.remotes import is_url


def open_store(location: str | Path, *, allow_partial: bool = False) -> Store:
    """Open the feature store at `location`, a path or a URL (`s3://`, `gs://`, `hf://`, `https://`, `file://`).

    A store at a URL is read in place: what is read is fetched, checked and kept (cached.py). Raises
    SchemaError where there is no store or one of an unknown version, IncompleteStore for a store that was never sealed
    unless `allow_partial` is set, and for a URL as `open_remote` does.
    """
    if is_url(location):
        from agiqa.store.sharing.cached import open_remote  # fsspec and its drivers are wanted for URLs only

        return open_remote(location)
    return open_local_store(location, allow_partial=allow_partial)
