"""Damage to the files of a store, the bytes of its files, and the store filled again."""

from agiqa.store import open_store, seal
from tests.store.conftest import fill


def contents(store, *, but=()):
    """Every file of a store but the commit records, which say who computed a unit and how fast."""
    files = (path for path in sorted(store.path.rglob("*")) if path.is_file() and path.parent != store.layout.commits)
    return {path.relative_to(store.path).as_posix(): path.read_bytes() for path in files if path.name not in but}


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def harm(path, how):
    raw = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(raw[:-1])
    else:
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)


def object_of(store, array):
    return next(path for path in sorted((store.layout.zarr / array / "c").rglob("*")) if path.is_file())


def refill(store, content):
    store = open_store(store.path, allow_partial=True)
    fill(store, content)
    return seal(store)
