"""What decides a run's numbers: its settings by flag, digests of contents, records of folders.

A checkpoint is continued, and a folder of outputs is added to, only by a run with equal settings.
Files appear whole or not at all, so what exists in a folder is complete; a hidden record in each
folder holds the settings that made its files.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tool.files import TEMPORARY_NAME, write_json
from tool.maps import MAP_FORMATS
from tool.run.errors import UsageError
from tool.weights import FRESH

CONTENT = "content "  # what a digest begins with
DIGEST_DIGITS = 16
BLOCK_BYTES = 2**20
# The record that a file's kind has in its folder, by the file's ending.
MAPS_RECORD, PICTURES_RECORD = ".settings_of_maps.json", ".settings_of_pictures.json"
RECORDS = {
    **dict.fromkeys(MAP_FORMATS.values(), MAPS_RECORD),
    **dict.fromkeys((".png", ".gif"), PICTURES_RECORD),
}
# No file takes this long to write: if it is still unfinished, its writer was killed.
LEFTOVER_SECONDS = 3600


# Settings


def settings_of(args: argparse.Namespace, names: Iterable[str]) -> dict[str, str]:
    """The values of flags as text: the same for 4 and 4.0, for a list and a tuple."""
    return {name: _plain(getattr(args, name)) for name in names}


def _plain(value: Any) -> str:
    if isinstance(value, ModuleType):  # a network
        return value.__name__
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}"
    return str(value)


def weights_settings(weights: str, seed: int) -> dict[str, str]:
    """What ``--weights`` of inference contributes: a file's content, or the seed without one."""
    if weights == FRESH:
        return {"weights": FRESH, "seed": str(seed)}
    return {"weights": digest_file(weights)}


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """The settings that differ, each with both values: "--lr (0.1 there, 0.2 here), ..."."""
    return ", ".join(
        f"--{name} ({_difference(there.get(name, 'none'), here.get(name, 'none'))})"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    )


def _difference(there: str, here: str) -> str:
    if there.startswith(CONTENT) or here.startswith(CONTENT):
        return "other content"
    return f"{there} there, {here} here"


# Digests


def digest(*parts: str | bytes) -> str:
    """A short name of a content: equal for equal parts, different for all others."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return CONTENT + total.hexdigest()[:DIGEST_DIGITS]


def digest_file(path: str | os.PathLike) -> str:
    """A digest of a file's bytes, as they stream by."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            total.update(block)
    return CONTENT + total.hexdigest()[:DIGEST_DIGITS]


def digest_photographs(paths: Sequence[Path]) -> str:
    """A digest of the files' names and sizes; reading thousands of files would take too long."""
    return digest(*(f"{path.name} {path.stat().st_size}" for path in paths))


def digest_maps(folder: str | os.PathLike) -> str:
    """What a folder of maps holds: its record's content, or else where it lies."""
    record = Path(folder, MAPS_RECORD)
    return digest_file(record) if record.is_file() else str(Path(folder).resolve())


# Folders of outputs


@dataclass(frozen=True)
class OutputFolder:
    """A folder that gets files ``<id><suffix>``, and the settings that decide what is in them."""

    origin: str  # what writes there, e.g. "infer_cls.py --out_cam"
    path: Path
    suffixes: tuple[str, ...]
    settings: Mapping[str, str]  # by flag, without dashes
    ids: frozenset[str] | None = None  # the images that get files there, if not all do

    @property
    def record(self) -> Path:
        return self.path / RECORDS[self.suffixes[0]]

    @property
    def content(self) -> dict[str, Any]:
        """What the record must hold."""
        return {"origin": self.origin, "settings": dict(sorted(self.settings.items()))}

    def file_names(self) -> set[str]:
        """The names of all files in the folder that have this record, whatever their format."""
        if not self.path.is_dir():
            return set()
        kind = tuple(suffix for suffix in RECORDS if RECORDS[suffix] == self.record.name)
        names = (name for name in os.listdir(self.path) if not name.startswith("."))
        return {name for name in names if name.endswith(kind)}

    def file_names_of(self, ids: Iterable[str]) -> set[str]:
        """The names of files that these images have there when they are complete."""
        return {
            image_id + suffix
            for image_id in ids
            if self.ids is None or image_id in self.ids
            for suffix in self.suffixes
        }

    def file_names_to_replace(self, record: Mapping[str, Any], ids: Iterable[str]) -> set[str]:
        """The names of these images' files that the run of that record has made."""
        if record == self.content:
            return self.file_names_of(ids)
        flag = record["origin"].rpartition("--")[2]
        format_ = record["settings"].get("out_format")
        other = {"trace": (".png", ".gif"), "out_scores": (".npz",)}
        suffixes = other.get(flag, (MAP_FORMATS.get(format_, ".png"),))
        return {image_id + suffix for image_id in ids for suffix in suffixes}


def require_same_settings(
    folders: Iterable[OutputFolder], ids: Sequence[str], overwrite: bool
) -> None:
    """Raise UsageError if a folder holds outputs that are not known to be of these settings.

    With ``overwrite``, the record's run may have made them, and nothing else, of these images.
    """
    for folder in folders:
        record, present = _read_record(folder), folder.file_names()
        if record == folder.content or not present:
            continue
        others = present - folder.file_names_to_replace(record, ids) if record else present
        ways = "name another folder"
        if record is None:
            problem = "outputs, but no record of the settings that made them"
        elif overwrite and not others:
            continue
        elif overwrite:
            problem = "outputs of other settings, and files besides those of the list "
            problem += f"({min(others)})"
        else:
            found = differences(record["settings"], folder.settings)
            problem = f"outputs of other settings: {found}"
            if record["origin"] != folder.origin:
                problem = f"the outputs of {record['origin']}"
            ways += ", or make these images' outputs again with --overwrite"
        flag = folder.origin.split()[-1]
        raise UsageError(f"{flag} {folder.path}: holds {problem}; {ways}.")


def unfinished(folders: Sequence[OutputFolder], ids: Iterable[str]) -> list[str]:
    """The images that lack a file in one of the folders, in their order; without folders, all."""
    present = [(folder, folder.file_names()) for folder in folders]
    return [
        image_id
        for image_id in ids
        if not folders
        or not all(folder.file_names_of([image_id]) <= names for folder, names in present)
    ]


def prepare_folders(folders: Iterable[OutputFolder], ids: Sequence[str], overwrite: bool) -> None:
    """Write the records; with ``overwrite``, remove these images' outputs before.

    To be called after ``require_same_settings`` and before any output.
    """
    for folder in folders:
        record = _read_record(folder)
        if overwrite and record:
            for name in folder.file_names_to_replace(record, ids):
                (folder.path / name).unlink(missing_ok=True)
        for path in folder.path.glob(TEMPORARY_NAME.format("*", "*")):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)
        if record != folder.content:
            write_json(folder.record, folder.content)


def _read_record(folder: OutputFolder) -> dict[str, Any] | None:
    """The record's content; None if there is none that can be read."""
    try:
        content = json.loads(folder.record.read_text(encoding="utf-8"))
        return {"origin": content["origin"], "settings": content["settings"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
