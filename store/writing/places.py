"""Where a store can be made: paths, links, mount points, rights and locks, looked at before any work is done."""

import glob
import os
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from agiqa.errors import ConfigError, SettingsConflict
from agiqa.store.disk.files import exclusive_lock, new_lock, telling_disk_errors
from agiqa.store.format.layout import PULL_LOCK, PULL_RECORD, StoreLayout
from agiqa.store.reading.store import is_planned
from agiqa.store.writing.upkeep import is_held

PLAN_LOCK = "plan"
"""Held while a plan is written."""
_LONGEST_NAME, _TOKEN_BYTES = 255, 4
"""Bytes of a file name on nearly all file systems, and of what tells plans of one store apart (in hex)."""


def require_place(path: Path) -> Path:
    """Where the store at `path` is or can be made: `path`, or what it is a link to.

    Raises ConfigError where no store can have this path, whatever is in it.
    """
    try:
        str(path).encode()
        place = path.resolve()
    except UnicodeEncodeError as error:
        message = f"The path {os.fsencode(path)!r} is not UTF-8, as the names of a store must be. Choose another name."
        raise ConfigError(message) from error
    except RuntimeError as error:
        message = f"{path} is a link that leads to itself. Remove it, or give another path."
        raise ConfigError(message) from error
    with suppress(OSError):  # a name that is too long for the file system
        if is_taken(place):
            return place
    spare = len(_plan_prefix(Path())) + 2 * _TOKEN_BYTES
    if len(os.fsencode(place.name)) > _LONGEST_NAME - spare:
        message = (
            f"The name {place.name!r} has {len(os.fsencode(place.name))} bytes, and that of a store may have "
            f"{_LONGEST_NAME - spare} at most. Choose a shorter one."
        )
        raise ConfigError(message)
    if place.is_mount():
        message = f"{path} is a mount point, which a new store cannot replace. Give a path in it: {path}/features.agiqa"
        raise ConfigError(message)
    if place == Path.cwd():
        message = (
            f"{path} is the folder that this command runs in, which a new store would replace. Give a path in it: "
            "features.agiqa"
        )
        raise ConfigError(message)
    return place


def is_taken(place: Path) -> bool:
    """Whether there is anything but an empty folder at `place`."""
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


def require_planned(path: Path) -> None:
    """Raise SettingsConflict unless what is at `path` is a store, finished or not, and not one that is being pulled."""
    if (path / PULL_RECORD).exists() or is_held(StoreLayout(path).locks / PULL_LOCK):
        message = (
            f"A pull into {path} is at work or was cut off. Finish it with `agiqa store pull`, or give another path."
        )
        raise SettingsConflict(message)
    if not is_planned(path):
        message = f"{path} exists and is not a feature store. Choose another path, or move it away."
        raise SettingsConflict(message)


def check_writable(path: Path) -> None:
    """Check, before any work, that a store can be made or resumed at `path`; leaves nothing behind.

    Raises ConfigError as `require_place`, and where locks do not work there; SettingsConflict as `require_planned`;
    OSError, telling what to do, where this user cannot write there.
    """
    place = require_place(path)
    if is_taken(place):
        require_planned(path)
    with telling_disk_errors(f"looking whether a store can be written at {path}", "nothing was changed"):
        if not is_taken(place):
            folder = next(above for above in place.parents if above.is_dir())
            probe = plan_folder(folder / place.name)
            try:
                probe.mkdir()
                with new_lock(StoreLayout(probe).locks / PLAN_LOCK):
                    pass
            finally:
                shutil.rmtree(probe, ignore_errors=True)
        elif not StoreLayout(place).manifest.exists():
            with exclusive_lock(StoreLayout(place).locks / PLAN_LOCK):
                pass


def plan_folder(path: Path) -> Path:
    """A new name for the folder in which the store at `path` is planned, beside it."""
    return path.with_name(_plan_prefix(path) + secrets.token_hex(_TOKEN_BYTES))


def _plan_prefix(path: Path) -> str:
    return f".{path.name}.plan-"


def plans_beside(path: Path) -> list[Path]:
    """The folders in which plans of the store at `path` are being written, or were when their runs were killed."""
    found = path.parent.glob(f"{glob.escape(_plan_prefix(path))}*/")
    return sorted(folder for folder in found if not folder.is_symlink())


def give_rights_of(folder: Path, other: Path) -> None:
    """Give the folder `other` the group and the mode of `folder`, as those of a team are set up."""
    status = folder.stat()
    with suppress(PermissionError):  # this user is not in that group
        os.chown(other, -1, status.st_gid)
    other.chmod(stat.S_IMODE(status.st_mode))
