"""The image files that the names of a table mean."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from agiqa.errors import DataError
from agiqa.progress import say
from agiqa.store.disk.files import write_bytes_atomically
from agiqa.store.format.arrow_tables import embedded_images
from agiqa.store.format.layout import cache_root
from agiqa.store.format.names import NameIndex

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def written_images(table: Path) -> dict[str, Path]:
    """Write the images that `table` itself holds to the cache folder, each once; their files by name.

    Only parquet files and folders of `datasets` hold images. Raises DataError where two have one name, and as
    `embedded_images`.
    """
    if table.suffix.lower() != ".parquet" and not table.is_dir():
        return {}
    folder, files = cache_root() / "images", dict[str, Path]()
    for name, content in embedded_images(table):
        file = folder / hashlib.sha256(content).hexdigest()
        if files.setdefault(name, file) != file:
            message = f"{table}: two different images are called {name!r}; rename one of them."
            raise DataError(message)
        if not file.is_file():
            write_bytes_atomically(file, [content])
    if files:
        say(f"{table}: {len(files)} images written to {folder}")
    return files


def images_below(folder: Path) -> list[str]:
    """The paths below `folder` of all images in it, sorted. Folders that links lead to are left out."""
    found = (
        os.path.relpath(os.path.join(root, file), folder)  # noqa: PTH118  # many files: Path would be slow
        for root, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(_SUFFIXES) and not file.startswith(".")
    )
    return sorted(name.replace(os.sep, "/") for name in found)


class ImageFinder:
    """Finds images in some folders, under names that may differ in folder, case or extension."""

    def __init__(self, folders: Sequence[Path], *, embedded: Mapping[str, Path], reads: bool = True) -> None:
        """`folders` are looked through in this order, after the files of images that the table itself holds.

        Without `reads` no file is looked for: the names of a model that reads no images.
        """
        self._folders, self._reads = folders, reads
        self._elsewhere = dict(embedded)
        self._searched = False
        self._root: Path | None = None
        self._absolute = 0

    def expect(self, names: Iterable[str]) -> None:
        """Hear of all names before the first is asked for: absolute paths are named below the folder common to all."""
        paths = (Path(name) for name in names if name.startswith("/") and name.lower().endswith(_SUFFIXES))
        parents = [
            str(path.parent) for path in paths if self._below(path) is None and (path.is_file() or not self._reads)
        ]
        self._root = Path(os.path.commonpath(parents)) if parents else None

    def name_of(self, written: str) -> str:
        """The path, below a folder, of the image that `written` means; `written` if there is none.

        An absolute path to a file in none of the folders becomes the path below the folder that all such paths have in
        common. Raises DataError where several images may be meant, and for an absolute path to none.
        """
        if written in self._elsewhere:
            return written
        path = PurePosixPath(written)
        if path.is_absolute():
            return self._name_of_absolute(Path(written))
        name = path.as_posix()
        if not self._reads or any((folder / name).is_file() for folder in self._folders):
            return name
        if (found := self._found(written)) is None and name != name.strip():
            return self.name_of(name.strip())
        return found or name

    def _name_of_absolute(self, path: Path) -> str:
        below = self._below(path)
        if below is not None and (path.is_file() or not self._reads):
            return below
        is_image = path.suffix.lower() in _SUFFIXES and (path.is_file() or not self._reads)
        if is_image and self._root is not None and path.is_relative_to(self._root):
            name = path.relative_to(self._root).as_posix()
            self._elsewhere[name] = path
            self._absolute += 1
            return name
        found = self._found(str(path))
        if found is None:
            message = f"no such file, and no image of that name in {self._where()}"
            raise DataError(message)
        return found

    def _found(self, written: str) -> str | None:
        self._searched = True
        return self._index.find(written)

    def image_of(self, name: str) -> Path:
        """The file called `name` in the first folder that has it. Raises DataError when none has."""
        if name in self._elsewhere:
            return self._elsewhere[name]
        found = next((path for folder in self._folders if (path := folder / name).is_file()), None)
        if found is None:
            link = next((path for folder in self._folders if (path := folder / name).is_symlink()), None)
            if link is not None:
                message = f"{link} links to {link.readlink()}, which is gone; restore it, or import the set again"
                raise DataError(message)
            message = f"no image of that name in {self._where()}"
            raise DataError(message)
        return found

    def announce(self, table: Path) -> None:
        """Say once for each kind of difference how many names had it."""
        if self._absolute:
            say(f"{table}: {self._absolute} names are absolute paths; items are named by the path below {self._root}")
        if self._searched:
            self._index.announce(str(table))

    def _below(self, path: Path) -> str | None:
        """The path below the first folder that `path` lies in."""
        folders = (folder.absolute() for folder in self._folders)
        folder = next((folder for folder in folders if path.is_relative_to(folder)), None)
        return None if folder is None else path.relative_to(folder).as_posix()

    def _where(self) -> str:
        return " or ".join(str(folder) for folder in self._folders)

    @cached_property
    def _index(self) -> NameIndex:
        """Of all images in the folders, each once: the folders may lie in each other."""
        names: dict[str, str] = {}
        for folder in self._folders:
            for name in images_below(folder):
                names.setdefault(f"{folder}/{name}", name)
        return NameIndex(names.values(), other_extensions=True)
