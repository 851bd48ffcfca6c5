"""Files that appear complete or not at all."""

import errno
import filecmp
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Where a file grows until it is complete, from its name and a random word.
TEMPORARY_NAME = ".{}.{}.tmp"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` complete, when the block ends without an error.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed;
    an older file stays whole until then. Missing folders are created. Raises OSError with a path.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(TEMPORARY_NAME.format(path.name, secrets.token_hex(4)))
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file, complete or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a content as JSON for people to read, complete or not at all."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it; raises OSError, which names a file in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        in_the_way = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
        text = "is a file where a folder should be; name another folder"
        raise NotADirectoryError(errno.ENOTDIR, text, str(in_the_way)) from error


def link_or_copy(source: Path, target: Path, copy: bool) -> None:
    """Make ``target`` a link to a file, or a copy of it that appears complete.

    A file with the same content is kept; raises OSError if another one is there.
    """
    if target.exists():
        if not filecmp.cmp(source, target):
            raise FileExistsError(errno.EEXIST, f"is not {source}; name a new folder", str(target))
    elif copy:
        with open(source, "rb") as original, atomic_write(target) as file:
            shutil.copyfileobj(original, file)
    else:
        make_folder(target.parent)
        target.symlink_to(source.resolve())


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what a killed ``atomic_write`` to that path left; nobody may be writing there."""
    path = Path(path)
    for leftover in path.parent.glob(TEMPORARY_NAME.format(glob.escape(path.name), "*")):
        leftover.unlink()
