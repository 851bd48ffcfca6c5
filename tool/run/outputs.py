"""The folders that inference writes into: what is complete there, and which settings made it.

Files appear whole or not at all, so what exists is complete and need not be made again. But it must
have been made with the settings of the present command: a hidden record in each folder says with
which, and a folder only ever holds outputs of the settings in its record.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tool.files import TEMPORARY_NAME, atomic_write
from tool.maps import MAP_FORMATS
from tool.run.checkpoint import differences, digest
from tool.run.errors import UsageError

# A folder may hold files of both kinds, each with a record of its own.
KINDS = {"maps": tuple(MAP_FORMATS.values()), "pictures": (".png", ".gif")}
# No file takes this long to write: if it is still unfinished, its writer was killed.
LEFTOVER_SECONDS = 3600


@dataclass(frozen=True)
class OutputFolder:
    """A folder that gets files ``<id><suffix>``, and the settings that decide what is in them."""

    origin: str  # what writes there, e.g. "infer_cls.py --out_cam"
    path: Path
    suffixes: tuple[str, ...]
    settings: Mapping[str, str]  # by flag, without dashes
    ids: frozenset[str] | None = None  # the images that get files there, if not all do

    @property
    def kind(self) -> str:
        return next(kind for kind, suffixes in KINDS.items() if self.suffixes[0] in suffixes)

    @property
    def record(self) -> Path:
        return record_path(self.path, self.kind)

    def names(self) -> set[str]:
        """The names of all files of this kind in the folder, also those of other images."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {
            name for name in names if name.endswith(KINDS[self.kind]) and not name.startswith(".")
        }

    def names_of(self, image_id: str) -> set[str]:
        """The names of files that one image may have there."""
        return {image_id + suffix for suffix in KINDS[self.kind]}

    def is_complete(self, image_id: str, names: set[str]) -> bool:
        """Whether an image's files are among those names, and none in another form."""
        if self.ids is not None and image_id not in self.ids:
            return True
        wanted = {image_id + suffix for suffix in self.suffixes}
        return self.names_of(image_id) & names == wanted


def record_path(folder: str | os.PathLike, kind: str) -> Path:
    """The record of a folder's files of that kind."""
    return Path(folder, f".settings_of_{kind}.json")


def plain(value: Any) -> str:
    """A flag's value as a record has it: the same for 4 and 4.0, a list and a tuple."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}"
    return str(value)


def maps_identity(folder: str | os.PathLike) -> str:
    """What tells a folder of maps from others: its record's content, or else where it lies."""
    record = record_path(folder, "maps")
    return digest(record.read_bytes()) if record.is_file() else str(Path(folder).resolve())


def check(folders: Iterable[OutputFolder], ids: Sequence[str], overwrite: bool) -> None:
    """Raise UsageError if a folder holds outputs that are not known to be of these settings.

    With ``overwrite``, only if they are neither known to be of others nor of these images.
    """
    for folder in folders:
        written, present = _read_record(folder), folder.names()
        if written == _content(folder) or not present:
            continue
        way_out = "name another folder, or remove them and make new ones by --overwrite."
        if written is None:
            problem = "outputs, but no record of the settings that made them"
            foreign = present - _names_of(folder, ids)
            if overwrite and not foreign:
                continue
            if overwrite:
                problem += f", and of other images than these, too ({min(foreign)})"
                way_out = "name another folder."
        elif overwrite:
            continue
        elif written["origin"] != folder.origin:
            problem = f"the outputs of {written['origin']}"
        else:
            found = ", ".join(differences(written["settings"], folder.settings))
            problem = f"outputs of other settings: {found}"
        raise UsageError(f"{folder.origin.split()[-1]} {folder.path}: holds {problem}; {way_out}")


def unfinished(folders: Sequence[OutputFolder], ids: Iterable[str]) -> list[str]:
    """The images that lack a file in one of the folders, in their order."""
    present = [(folder, folder.names()) for folder in folders]
    return [
        image_id
        for image_id in ids
        if not all(folder.is_complete(image_id, names) for folder, names in present)
    ]


def begin(folders: Iterable[OutputFolder], ids: Sequence[str], overwrite: bool) -> None:
    """Write the records; after ``check``, and before any output.

    With ``overwrite``, remove these images' outputs, and all that are of other settings.
    """
    for folder in folders:
        written, present = _read_record(folder), folder.names()
        if overwrite:
            same = written in (None, _content(folder))
            for name in present & _names_of(folder, ids) if same else present:
                (folder.path / name).unlink(missing_ok=True)
        _remove_leftovers(folder.path)
        if written != _content(folder):
            with atomic_write(folder.record) as file:
                file.write((json.dumps(_content(folder), indent=2) + "\n").encode())


def _names_of(folder: OutputFolder, ids: Iterable[str]) -> set[str]:
    return set().union(*map(folder.names_of, ids))


def _content(folder: OutputFolder) -> dict[str, Any]:
    return {"origin": folder.origin, "settings": dict(sorted(folder.settings.items()))}


def _read_record(folder: OutputFolder) -> dict[str, Any] | None:
    """The record's content; None if there is none that can be read."""
    try:
        content = json.loads(folder.record.read_text(encoding="utf-8"))
        origin, settings = content["origin"], content["settings"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    texts = isinstance(settings, dict) and all(isinstance(v, str) for v in settings.values())
    return content if isinstance(origin, str) and texts else None


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of writers that were killed long ago."""
    for path in folder.glob(TEMPORARY_NAME.format("*", "*")):
        if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)
